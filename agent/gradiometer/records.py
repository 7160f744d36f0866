"""The run directory: the one contract between the process that trains and everything that reads.

    <root>/<run_id>/rank-00000/
        manifest.json   who is training, on what, with which parameters; written once
        steps.ring      a header page, then a ring of fixed-size rows, one optimizer step each
        samples.ring    the same, for what is measured every so many steps only; there unless that is off
        events.jsonl    incidents, one JSON object a line
        policy.json     the policies that were in force, see :mod:`gradiometer.live.revisions`
        control.json    what is asked of the run, see :mod:`gradiometer.live.control`

Guarantees: a row that was half written, overwritten while it was read, or lost its pages in a crash is never
returned; readers take no lock, write nothing, and can be many. Assumes a little-endian machine. Needs no torch.

L2 norms are stored per parameter because they compose: the norm of a layer is the root of the sum of the squares
of its parameters' norms. A parameter that had no gradient in a step is stored as **negative zero**: it adds as
nothing, and :func:`numpy.signbit` tells it from a gradient that was zero.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from enum import IntEnum, IntFlag
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gradiometer.rank_files import RunFormatError, open_file, pread_all, read_bounded

__all__ = [
    "FORMAT_VERSION",
    "Flag",
    "Manifest",
    "ParameterInfo",
    "RingGeometry",
    "RingReader",
    "RunFormatError",
    "SampleInfo",
    "State",
    "default_root",
    "find_ranks",
    "find_runs",
    "installed_version",
    "own_clipping",
    "rank_directory",
    "rank_of",
    "read_bounded",
    "read_events",
    "read_manifest",
]

FORMAT_VERSION = 1
MAGIC = b"GRADRING"
HEADER_BYTES = 4096
POLICY_SLOTS = 16
"""Places in the policy columns, and bits in ``clipped``: the pipeline's policies, those in shadow, and last the loop's
own clipping."""
CLIP_GRAD_NORM, CLIP_GRAD_VALUE = "clip_grad_norm_", "clip_grad_value_"
OWN_CLIPPING = {CLIP_GRAD_NORM: POLICY_SLOTS - 2, CLIP_GRAD_VALUE: POLICY_SLOTS - 1}
"""Slots of torch's own functions, by their names; used where the loop has called them."""
PIPELINE_SLOTS = POLICY_SLOTS - len(OWN_CLIPPING)
"""Policies that a pipeline and its shadow may hold together."""
SCALAR_SLOTS = 16
"""Scalars beside the loss that ``Agent.log`` may name in one run."""
STATS = ("grad_norm_preclip", "grad_norm_postclip", "microbatch_norm")
"""Columns kept per parameter. ``microbatch_norm`` is the root mean square over the step's micro-batches, before any
reduction between ranks; it is negative zero in steps whose backward hooks were not armed."""
MANIFEST_BYTES = 64 * 2**20
"""A manifest is refused beyond this: it is read at once. A parameter takes some 150 bytes."""
MAX_ROW_BYTES = 2**28
"""A ring of larger rows is refused: a row is read at once. It has room for 22 million parameter tensors."""
EVENT_BYTES = 32 * 2**20
"""Of ``events.jsonl`` so much is read at once. An agent writes half of it at most; a longer line is passed over."""
CHECKSUM_FACTOR = 0x9E3779B97F4A7C15
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
ACTIONS = ("event", "callback", "raise")
"""What may be done when a condition of the policy file is met; their places are those of counters."""
ACTION_SLOTS = 64
"""Room for the counters of actions: condition by condition, as :data:`gradiometer.policy.actions.CONDITIONS` has them,
and action by action."""
Word = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.void]


class Flag(IntFlag):
    """What happened in a step, beside the numbers."""

    NONFINITE = 1  # some gradient held NaN or Inf
    SKIPPED = 2  # the optimizer did not move the parameters
    CLIPPED = 4  # some policy, or the loop itself, clipped the gradients
    ZEROED = 8  # non-finite gradients were replaced by zeros
    SCALER = 16  # a GradScaler skipped the step before the optimizer saw it
    HOOKED = 32  # backward hooks were armed: microbatch_norm is there
    FAILED = 64  # optimizer.step() raised after the gradients had been measured
    LOSS = 128  # a loss was logged, which may itself be NaN
    OWN_NONFINITE = 256  # this rank's own gradients, before the reduction between ranks, held NaN or Inf
    OWN_WATCHED = 512  # this rank's own gradients were looked at, all or some: without OWN_NONFINITE they were finite


class State(IntEnum):
    """What the writer last said of itself; whether it still lives is for :func:`gradiometer.process.process_alive`."""

    RUNNING = 1
    FINISHED = 2


class ParameterInfo(BaseModel):
    """One parameter tensor of the model. Tied parameters are listed once, under their first name."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    name: str
    layer: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    trainable: bool = True
    placement: str = "local"


class RingGeometry(BaseModel):
    """Shape of the ring: everything a reader needs to find a row."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    capacity: Annotated[int, Field(ge=2)]
    parameters: Annotated[int, Field(ge=1)]
    stats: Annotated[int, Field(ge=1, le=64)] = len(STATS)

    @property
    def dtype(self) -> np.dtype[np.void]:
        """Layout of a row; ``itemsize`` is a multiple of 64 bytes so that rows never share a cache line."""
        body: list[Any] = [
            ("begin", "<u8"),
            ("checksum", "<u8"),
            ("step", "<i8"),
            ("time_ns", "<i8"),
            ("flags", "<u4"),
            ("clipped", "<u4"),
            ("optimizer", "<u4"),
            ("microbatches", "<u4"),
            ("first_nonfinite", "<i4"),
            ("policy_revision", "<u4"),
            ("grad_norm_preclip", "<f8"),
            ("grad_norm_postclip", "<f8"),
            ("coefficient", "<f8"),
            ("learning_rate", "<f8"),
            ("loss", "<f8"),
            ("loss_scale", "<f8"),
            ("step_seconds", "<f8"),
            ("agent_seconds", "<f8"),
            ("scalars", "<f8", (SCALAR_SLOTS,)),
            ("policy_threshold", "<f4", (POLICY_SLOTS,)),
            ("policy_coefficient", "<f4", (POLICY_SLOTS,)),
            ("parameters", "<f4", (self.stats, self.parameters)),
        ]
        packed = np.dtype(body)
        assert packed.fields is not None
        size = -(-(packed.itemsize + 8) // 64) * 64
        names = list(packed.names or ())
        return np.dtype(
            {
                "names": [*names, "end"],
                "formats": [*(packed.fields[name][0] for name in names), np.dtype("<u8")],
                "offsets": [*(packed.fields[name][1] for name in names), size - 8],
                "itemsize": size,
            }
        )

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + self.capacity * self.dtype.itemsize


HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("header_bytes", "<u4"),
        ("row_bytes", "<u8"),
        ("capacity", "<u8"),
        ("parameters", "<u4"),
        ("stats", "<u4"),
    ]
)
STATUS_OFFSET = 256
STATUS = np.dtype(
    [
        ("head", "<u8"),  # sequence of the newest complete row; the first row is 1
        ("state", "<u8"),
        ("heartbeat_ns", "<i8"),  # wall clock of the newest row, or of the end
        ("rows_dropped", "<u8"),
        ("agent_errors", "<u8"),
        ("events_dropped", "<u8"),
        ("nonfinite_steps", "<u8"),
        ("skipped_steps", "<u8"),
        ("steps", "<u8"),
        ("agent_seconds", "<f8"),
        ("clip_events", "<u8", (POLICY_SLOTS,)),
        ("callbacks", "<u8"),  # that were begun
        ("callback_failures", "<u8"),
        ("actions_armed", "<u8"),  # bit for each place of `actions` that the policy has, or had
        ("actions", "<u8", (ACTION_SLOTS,)),
        ("policy_revision", "<u8"),  # of the newest row: by its table the slots of clip_events are named
        ("policy_changes", "<u8"),
        ("policy_rejections", "<u8"),
    ]
)


class SampleInfo(BaseModel):
    """What ``samples.ring`` holds: a row in every ``every`` steps of each optimizer."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    every: Annotated[int, Field(ge=1)]
    columns: tuple[str, ...]
    ring: RingGeometry


class Manifest(BaseModel):
    """``manifest.json``: what a reader must know of a run before it looks at a row."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    format_version: int
    run_id: Annotated[str, Field(pattern=rf"^{RUN_ID.pattern}$")]
    job: str = ""
    rank: Annotated[int, Field(ge=0)] = 0
    world_size: Annotated[int, Field(ge=1)] = 1
    pid: int
    process_start: float
    """Creation time of the process in seconds since the epoch: pids are used again."""
    host: str
    pid_namespace: str = ""
    """What :func:`gradiometer.process.pid_namespace` returned: elsewhere ``pid`` is another process, or none.
    Empty where unknown."""
    created_ns: int
    gradiometer_version: str
    torch_version: str
    python_version: str
    device: str
    optimizers: tuple[str, ...] = ()
    parameters: tuple[ParameterInfo, ...]
    ring: RingGeometry
    policy: dict[str, Any] | None = None
    policies: Annotated[tuple[str, ...], Field(max_length=PIPELINE_SLOTS)] = ()
    """Names of the pipeline's policies and then those in shadow, in the order of the policy columns."""
    shadow: tuple[str, ...] = ()
    """Those of :attr:`policies` that decide and are recorded, and never act."""
    labels: dict[str, str] = {}
    data_parallel: Annotated[int, Field(ge=1)] | None = None
    """Number of ranks whose gradients are averaged, each of a batch of its own; None where that is not known."""
    samples: SampleInfo | None = None

    @property
    def acting(self) -> tuple[str, ...]:
        """Those of :attr:`policies` that act, in their order."""
        return tuple(name for name in self.policies if name not in self.shadow)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layer names in the order of their first parameter."""
        return tuple(dict.fromkeys(parameter.layer for parameter in self.parameters))

    @property
    def layer_index(self) -> npt.NDArray[np.intp]:
        """For each parameter, the place of its layer in :attr:`layers`; intp[P]."""
        place = {layer: index for index, layer in enumerate(self.layers)}
        return np.array([place[parameter.layer] for parameter in self.parameters], dtype=np.intp)


def installed_version() -> str:
    """Return gradiometer's version; ``uninstalled`` when it runs from a source tree that pip does not know."""
    try:
        return version("gradiometer")
    except PackageNotFoundError:
        return "uninstalled"


def default_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Resolve where runs live: the argument, else ``GRADIOMETER_DIR``, else the user's state directory."""
    chosen = root or os.environ.get("GRADIOMETER_DIR")
    return Path(chosen).expanduser() if chosen else platformdirs.user_state_path("gradiometer") / "runs"


def find_runs(root: Path) -> list[Path]:
    """List the run directories below ``root``, oldest name first; a missing root has none. Links are not followed.

    Those that this user may not read are among them: :func:`find_ranks` says so.
    """
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if RUN_ID.fullmatch(p.name) and not p.is_symlink() and _is_run(p))


def _is_run(path: Path) -> bool:
    try:
        return bool(find_ranks(path))
    except PermissionError:
        return True


def rank_directory(run: Path, rank: int) -> Path:
    """Return where a rank of a run is recorded."""
    return run / f"rank-{rank:05d}"


def rank_of(directory: Path) -> int:
    """Return the rank that a rank directory is of; an earlier start's has a number after it, as in ``rank-00000.1``."""
    return int(directory.name.removeprefix("rank-").partition(".")[0])


def find_ranks(run: Path) -> list[Path]:
    """List the rank directories of a run that have a manifest, in rank order.

    Raises PermissionError for a run that this user may not read.
    """
    if not run.is_dir():
        return []
    if not os.access(run, os.R_OK | os.X_OK):
        raise PermissionError(
            errno.EACCES, "not readable: runs are for the user who trains, so read them as that", str(run)
        )
    return sorted(
        p.parent for p in run.glob("rank-[0-9][0-9][0-9][0-9][0-9]/manifest.json") if not p.parent.is_symlink()
    )


def checksum(words: Word) -> Word:
    """Sum the words of each row's payload (uint64, wrapping), mixed with its sequence number.

    ``words`` is uint64[..., W], the whole row; the two outer words and the checksum itself are left out of the sum.
    """
    mixed: Word = words[..., 2:-1].sum(axis=-1, dtype=np.uint64) + words[..., 0] * np.uint64(CHECKSUM_FACTOR)
    return mixed


def own_clipping(rows: Rows, status: np.void) -> set[str]:
    """Return which of torch's own clipping functions the loop has called, as far as rows and counters tell."""
    thresholds, events = rows["policy_threshold"], status["clip_events"]
    return {name for name, slot in OWN_CLIPPING.items() if events[slot] or (thresholds[:, slot] > 0).any()}


def read_manifest(path: Path) -> Manifest:
    """Read and validate a ``manifest.json``; raises :class:`RunFormatError` that says what is wrong with it."""
    content = read_bounded(path, MANIFEST_BYTES, "manifest")
    try:
        raw = json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunFormatError(
            f"{path} is not JSON ({error}): it was cut short or is not a gradiometer manifest"
        ) from error
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        raise RunFormatError(
            f"{path} has format_version {version!r}; this gradiometer reads {FORMAT_VERSION}: "
            "use the version that wrote it, or a newer one that names it in its CHANGELOG"
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        raise RunFormatError(f"{path} is not a gradiometer manifest: {error}") from error


class RingReader:
    """Read the rows of one ``steps.ring`` while it is being written, without a lock and without mapping it.

    Raises :class:`RunFormatError` if the file is foreign, of another version, shorter than its header, or does not
    match ``geometry``. A file that lost its tail is read as far as it goes and :attr:`truncated` is set.
    """

    def __init__(self, path: Path, geometry: RingGeometry) -> None:
        self.path, self.geometry = path, geometry
        self._dtype = geometry.dtype
        if self._dtype.itemsize > MAX_ROW_BYTES:
            raise RunFormatError(f"{path} has rows of {self._dtype.itemsize} bytes, expected at most {MAX_ROW_BYTES}")
        self._file = open_file(path)
        try:
            self._check_header()
        except RunFormatError:
            self.close()
            raise

    @property
    def truncated(self) -> bool:
        return os.fstat(self._file.fileno()).st_size < self.geometry.file_bytes

    def _check_header(self) -> None:
        page = os.pread(self._file.fileno(), HEADER_BYTES, 0)
        if len(page) < HEADER_BYTES:
            raise RunFormatError(f"{self.path} has {len(page)} bytes, its header has {HEADER_BYTES}: it was truncated")
        header = np.frombuffer(page, HEADER, 1)[0]
        if header["magic"] != MAGIC:
            raise RunFormatError(f"{self.path} is not a gradiometer ring: it starts with {page[:8]!r}, not {MAGIC!r}")
        geometry = self.geometry
        expected = (FORMAT_VERSION, self._dtype.itemsize, geometry.capacity, geometry.parameters, geometry.stats)
        found = tuple(int(header[name]) for name in ("version", "row_bytes", "capacity", "parameters", "stats"))
        if found != expected:
            raise RunFormatError(
                f"{self.path} has (version, row bytes, capacity, parameters, stats) {found}, the manifest {expected}: "
                "the two files are not of one run, or are of another format version"
            )

    def status(self) -> np.void:
        """Copy the writer's counters (:data:`STATUS`). Each is exact; they are not a snapshot of one instant."""
        status: np.void = np.frombuffer(os.pread(self._file.fileno(), STATUS.itemsize, STATUS_OFFSET), STATUS, 1)[0]
        return status

    def read(self, after: int = 0, limit: int | None = None) -> Rows:
        """Copy the complete rows with a sequence above ``after``, oldest first; at most ``limit``, the oldest ones.

        Rows that the ring no longer holds are simply missing: compare ``begin`` of the first row with ``after + 1``.
        """
        # The row after `head` may be complete already: the writer can die between a row and the header.
        last = int(self.status()["head"]) + 1
        first = max(after + 1, last - self.geometry.capacity)
        if limit is not None:
            last = min(last, first + limit - 1)
        return np.concatenate(
            [self._whole_rows(*span) for span in self._spans(first, last)] or [np.empty(0, self._dtype)]
        )

    def _spans(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Cut the sequences first..last where the ring wraps."""
        capacity = self.geometry.capacity
        while first <= last:
            end = min(last, first + capacity - 1 - (first - 1) % capacity)
            yield first, end
            first = end + 1

    def _whole_rows(self, first: int, last: int) -> Rows:
        """Copy those of the adjacent rows first..last that are complete and not overtaken by the writer."""
        size = self._dtype.itemsize
        offset = HEADER_BYTES + (first - 1) % self.geometry.capacity * size
        copied = pread_all(self._file.fileno(), (last - first + 1) * size, offset)
        words: Word = np.frombuffer(copied, "<u8", len(copied) // size * (size // 8)).reshape(-1, size // 8)
        sequence = np.arange(first, first + len(words), dtype=np.uint64)
        whole = (words[:, 0] == sequence) & (words[:, -1] == sequence) & (words[:, 1] == checksum(words))
        rows: Rows = words[whole].view(self._dtype).reshape(-1)
        return rows

    def newest(self) -> np.void | None:
        """Copy the newest complete row, or None. ``Agent.log`` may still add scalars to it."""
        rows = self.read(after=max(0, int(self.status()["head"]) - 2))
        return rows[-1] if len(rows) else None

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()


def read_events(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """Read ``events.jsonl`` from byte ``offset``: the complete events and the offset after the last of them.

    A last line without its newline is still being written and is left for the next call. A line that is not JSON
    becomes an event of kind ``unreadable``. A missing file has no events. At most EVENT_BYTES are read.
    """
    try:
        with open_file(path) as file:
            text = pread_all(file.fileno(), EVENT_BYTES, offset)
    except FileNotFoundError:
        return [], offset
    end = text.rfind(b"\n") + 1
    if not end and len(text) == EVENT_BYTES:
        return [{"kind": "unreadable", "message": f"a line of more than {EVENT_BYTES} bytes"}], offset + EVENT_BYTES
    return list(_parse_events(text[:end].splitlines())), offset + end


def _parse_events(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            event = None
        yield event if isinstance(event, dict) else {"kind": "unreadable", "line": line.decode("utf-8", "replace")}
