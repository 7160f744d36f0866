"""Write a run directory: the manifest once, a row a step, an incident now and then. Needs no torch.

Guarantees: the ring is preallocated, so a full disk fails when the run is opened, with the number of bytes that were
missing; a row is two ``pwrite`` calls and no mapping, so neither a full disk nor a truncated file can kill the
process with SIGBUS; the files are the user's alone (0700). Assumes one writer, in one process.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradiometer.process import process_alive
from gradiometer.records import (
    ACTION_SLOTS,
    CHECKSUM_FACTOR,
    FORMAT_VERSION,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    POLICY_SLOTS,
    RUN_ID,
    STATUS,
    STATUS_OFFSET,
    Flag,
    Manifest,
    RingGeometry,
    RunFormatError,
    State,
    rank_directory,
    read_manifest,
)

__all__ = ["Recorder", "RingWriter", "RowHeader", "RunInUseError", "Status", "check_labels", "check_run_id"]

EVENTS_BYTES = 16 * 2**20
"""Events beyond this size of ``events.jsonl`` are dropped and counted."""
MAX_LABELS, MAX_LABEL_LENGTH = 16, 128
UNKNOWN_SECONDS = 900.0
"""How long a writer whose process cannot be looked up from here may be silent before its run id is free again."""
_MASK = 2**64 - 1
_NONFINITE, _SKIPPED = int(Flag.NONFINITE), int(Flag.SKIPPED)
_STATUS = struct.Struct(f"<QQq6Qd{POLICY_SLOTS + 3 + ACTION_SLOTS + 3}Q")
_ROW_HEADER = struct.Struct("<qqIIIIiI8d")
_COUNTER = struct.Struct("<Q")
_LOSS = struct.Struct("<d")
_FIELDS: Mapping[str, Any] = RingGeometry(capacity=2, parameters=1).dtype.fields or {}
_COUNTERS: Mapping[str, Any] = STATUS.fields or {}
_REJECTIONS_OFFSET = STATUS_OFFSET + _COUNTERS["policy_rejections"][1]
_ROW_HEADER_OFFSET = _FIELDS["step"][1]
_LOSS_OFFSET = _FIELDS["loss"][1]
_POLICIES = slice(_FIELDS["policy_threshold"][1], _FIELDS["parameters"][1])


class RunInUseError(RuntimeError):
    """Another live process writes the run directory that was asked for."""


def check_run_id(run_id: str) -> str:
    """Return ``run_id`` if it is a safe directory name and label value, else raise ValueError."""
    if not isinstance(run_id, str) or not RUN_ID.fullmatch(run_id):
        raise ValueError(
            f"run_id {run_id!r}: expected up to 128 letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
    return run_id


def check_labels(labels: Mapping[str, str] | None) -> dict[str, str]:
    """Return the labels as strings; raises ValueError for a name or a number of them that metrics cannot carry."""
    if not isinstance(labels, Mapping | None):
        raise TypeError(f"labels is a {type(labels).__name__}, expected a mapping of names to strings")
    labels = dict(labels or {})
    if len(labels) > MAX_LABELS:
        raise ValueError(f"labels has {len(labels)} entries, expected at most {MAX_LABELS}")
    for name, value in labels.items():
        if not isinstance(name, str) or not (name.isascii() and name.isidentifier()) or name.startswith("__"):
            raise ValueError(
                f"label name {name!r}: expected letters, digits and '_', not starting with a digit or '__'"
            )
        if not isinstance(value, str) or len(value) > MAX_LABEL_LENGTH:
            raise ValueError(
                f"label {name} is {value!r:.40}, expected a string of at most {MAX_LABEL_LENGTH} characters"
            )
    return labels


class RowHeader(NamedTuple):
    """The scalars of a row, in the order of the format; NaN where a value is not known."""

    step: int
    time_ns: int
    flags: int
    clipped: int
    optimizer: int
    microbatches: int
    first_nonfinite: int
    policy_revision: int
    grad_norm_preclip: float
    grad_norm_postclip: float
    coefficient: float
    learning_rate: float
    loss: float
    loss_scale: float
    step_seconds: float
    agent_seconds: float


@dataclass(kw_only=True, slots=True)
class Status:
    """The writer's counters, as :data:`gradiometer.records.STATUS` lays them out."""

    head: int = 0
    state: State = State.RUNNING
    heartbeat_ns: int = 0
    rows_dropped: int = 0
    agent_errors: int = 0
    events_dropped: int = 0
    nonfinite_steps: int = 0
    skipped_steps: int = 0
    steps: int = 0
    agent_seconds: float = 0.0
    clip_events: list[int] = field(default_factory=lambda: [0] * POLICY_SLOTS)
    callbacks: int = 0
    callback_failures: int = 0
    actions_armed: int = 0
    actions: list[int] = field(default_factory=lambda: [0] * ACTION_SLOTS)
    policy_revision: int = 0
    policy_changes: int = 0
    policy_rejections: int = 0

    def count(self, row: RowHeader) -> None:
        """Add a row that was written."""
        self.head += 1
        self.steps += 1
        self.heartbeat_ns = row.time_ns
        self.agent_seconds += row.agent_seconds
        self.nonfinite_steps += bool(row.flags & _NONFINITE)
        self.skipped_steps += bool(row.flags & _SKIPPED)
        clipped = row.clipped
        while clipped:
            self.clip_events[(clipped & -clipped).bit_length() - 1] += 1
            clipped &= clipped - 1

    def pack(self) -> bytes:
        return _STATUS.pack(
            self.head,
            self.state,
            self.heartbeat_ns,
            self.rows_dropped,
            self.agent_errors,
            self.events_dropped,
            self.nonfinite_steps,
            self.skipped_steps,
            self.steps,
            self.agent_seconds,
            *self.clip_events,
            self.callbacks,
            self.callback_failures,
            self.actions_armed,
            *self.actions,
            self.policy_revision,
            self.policy_changes,
            self.policy_rejections,
        )


class RingWriter:
    """The writer of one ring file, which must not be there yet.

    The caller fills :attr:`stats`, :attr:`scalars` and :attr:`policies`, which are views into the next row, and hands
    the rest to :meth:`commit`. Raises OSError if the disk is full.
    """

    def __init__(self, path: Path, geometry: RingGeometry) -> None:
        self.geometry, self.status = geometry, Status()
        self._pid, self._ring = os.getpid(), -1
        row = np.zeros(1, self.geometry.dtype)
        self.stats: npt.NDArray[np.float32] = row["parameters"][0]
        """float32[stats, P]; in ``steps.ring``, in the order of :data:`gradiometer.records.STATS`."""
        self.scalars: npt.NDArray[np.float64] = row["scalars"][0]
        self.policies: npt.NDArray[np.float32] = row.view(np.uint8)[_POLICIES].view("<f4").reshape(2, POLICY_SLOTS)
        """float32[2, policy slots]: threshold, then coefficient."""
        self._row, self._payload = row.view(np.uint8).data, row.view("<u8")[2:-1]
        self._begin, self._checksum, self._end = row["begin"], row["checksum"], row["end"]
        self._flags = row["flags"]
        self._ring = _create_ring(path, geometry)
        self.write_status()

    def __del__(self) -> None:
        """Finish the run of an agent that was forgotten together with its optimizer."""
        with contextlib.suppress(OSError):
            self.close()

    def commit(self, row: RowHeader) -> None:
        """Write the row as the newest of the ring, and count it. Its views can be filled anew afterwards."""
        _ROW_HEADER.pack_into(self._row, _ROW_HEADER_OFFSET, *row)
        self._write_row(self.status.head + 1)
        self.status.count(row)
        self.write_status()

    def amend(self, loss: float | None) -> None:
        """Write the newest row again, with the ``loss`` and :attr:`scalars` that came after its step."""
        if loss is not None:
            _LOSS.pack_into(self._row, _LOSS_OFFSET, loss)
            self._flags[0] |= int(Flag.LOSS)
        self._write_row(self.status.head)

    def _write_row(self, sequence: int) -> None:
        self._begin[0] = self._end[0] = sequence
        self._checksum[0] = (int(self._payload.sum(dtype=np.uint64)) + sequence * CHECKSUM_FACTOR) & _MASK
        offset = HEADER_BYTES + (sequence - 1) % self.geometry.capacity * len(self._row)
        _write_all(self._ring, self._row, offset)

    def write_status(self) -> None:
        """Publish the counters of :attr:`status`."""
        _write_all(self._ring, self.status.pack(), STATUS_OFFSET)

    def count_rejection(self) -> None:
        """Count a request that was refused, and publish that counter alone: the one thing another thread may write."""
        self.status.policy_rejections += 1
        _write_all(self._ring, _COUNTER.pack(self.status.policy_rejections), _REJECTIONS_OFFSET)

    def close(self) -> None:
        """Mark the ring finished and close it. Idempotent; a forked child only closes its own descriptor."""
        if self._ring < 0:
            return
        ring, self._ring = self._ring, -1
        self.status.state, self.status.heartbeat_ns = State.FINISHED, time.time_ns()
        try:
            if os.getpid() == self._pid:
                _write_all(ring, self.status.pack(), STATUS_OFFSET)
        finally:
            os.close(ring)


class Recorder(RingWriter):
    """The writer of one rank's run directory: a :class:`RingWriter` of its ``steps.ring``, its manifest and events.

    An earlier run of the same id and rank whose process is gone is kept beside the new one, as ``rank-00000.1`` and so
    on.

    Raises RunInUseError if a live process writes the directory, OSError if it cannot be made or the disk is full.
    """

    samples: RingWriter | None = None
    """The ring of what is measured every so many steps only, if anything is."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.path = rank_directory(root / check_run_id(manifest.run_id), manifest.rank)
        self._ring = self._events = -1
        _make_directory(self.path)
        try:
            super().__init__(self.path / "steps.ring", manifest.ring)
            if manifest.samples is not None:
                self.samples = RingWriter(self.path / "samples.ring", manifest.samples.ring)
        except OSError:
            self.close()
            shutil.rmtree(self.path, ignore_errors=True)
            with contextlib.suppress(OSError):  # other ranks, or an earlier run, are in it
                self.path.parent.rmdir()
            raise
        self._events = os.open(self.path / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._inode = os.fstat(self._ring).st_ino
        _write_manifest(self.path / "manifest.json", manifest)

    def event(self, kind: str, message: str, **details: Any) -> None:
        """Append an incident; past :data:`EVENTS_BYTES` it is counted as dropped instead."""
        event = {"time_ns": time.time_ns(), "kind": kind, "message": message, **details}
        line = json.dumps(event, default=str).encode() + b"\n"
        if os.fstat(self._events).st_size + len(line) > EVENTS_BYTES:
            self.status.events_dropped += 1
            self.write_status()
            return
        os.write(self._events, line)

    def check_directory(self) -> None:
        """Raise FileNotFoundError if the directory was removed or replaced under the open files."""
        if (self.path / "steps.ring").stat().st_ino != self._inode:
            raise FileNotFoundError(f"{self.path / 'steps.ring'} was replaced by another file: its rows are lost")

    def close(self) -> None:
        """Mark the run finished and close its files. Idempotent; a forked child only closes its own descriptors."""
        events, self._events = self._events, -1
        if events >= 0:
            os.close(events)
        if self.samples is not None:
            self.samples.close()
        super().close()


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    written = os.pwrite(descriptor, data, offset)
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)


def _make_directory(path: Path) -> None:
    if (path / "manifest.json").exists():
        _refuse_live_writer(path)
        attempt = 1
        while path.with_name(f"{path.name}.{attempt}").exists():
            attempt += 1
        path.rename(path.with_name(f"{path.name}.{attempt}"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        message = f"cannot make the run's directory ({error.strerror}): choose another dir, or set GRADIOMETER_DIR"
        raise OSError(error.errno, message, str(path.parent)) from error
    shutil.rmtree(path, ignore_errors=True)  # what an attach that failed half-way left
    path.mkdir(mode=0o700)


def _refuse_live_writer(path: Path) -> None:
    try:
        old = read_manifest(path / "manifest.json")
    except RunFormatError:
        return
    status = np.fromfile(path / "steps.ring", STATUS, 1, offset=STATUS_OFFSET)
    if not len(status) or status[0]["state"] == State.FINISHED:
        return
    alive, silent = process_alive(old), time.time() - max(int(status[0]["heartbeat_ns"]), old.created_ns) / 1e9
    if alive or (alive is None and silent < UNKNOWN_SECONDS):
        raise RunInUseError(
            f"run_id {old.run_id!r}, rank {old.rank}, is being written by process {old.pid} of host {old.host} in "
            f"{path}, last {silent:.0f} s ago: choose another run_id, or detach the other agent first (a writer of "
            f"another host or container is taken for dead after {UNKNOWN_SECONDS:.0f} s of silence)"
        )


def _create_ring(path: Path, geometry: RingGeometry) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, geometry.file_bytes)
    except OSError as error:
        os.close(descriptor)
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            error.errno,
            f"cannot preallocate {geometry.file_bytes} bytes for the ring {path} ({error.strerror}, {free} free): "
            "free some space, choose another dir, or pass a smaller ring_bytes",
        ) from error
    header = np.zeros(1, HEADER)
    header[0] = (
        MAGIC,
        FORMAT_VERSION,
        HEADER_BYTES,
        geometry.dtype.itemsize,
        geometry.capacity,
        geometry.parameters,
        geometry.stats,
    )
    _write_all(descriptor, header.view(np.uint8).data, 0)
    return descriptor


def _write_manifest(path: Path, manifest: Manifest) -> None:
    """Write atomically: a reader sees no manifest or a whole one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(manifest.model_dump_json(indent=1))
    temporary.chmod(0o600)
    temporary.replace(path)
