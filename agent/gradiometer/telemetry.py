"""Record what the step path saw: a small row from the device, written once it has arrived. Raises nothing."""

from __future__ import annotations

import contextlib
import math
import numbers
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradiometer import transfer
from gradiometer._guard import Guard
from gradiometer.actions import Actions
from gradiometer.backward import MICROBATCHES, BackwardWatch
from gradiometer.journal import Journal, StepRecord
from gradiometer.own_clipping import row_width
from gradiometer.recorder import Recorder
from gradiometer.records import POLICY_SLOTS, SCALAR_SLOTS, Flag, Manifest
from gradiometer.stepper import Taken

__all__ = ["Telemetry"]

FIXED_SCALARS = 9
STREAK = "streak."
"""Before the name of a policy, the number of steps in a row that it found bad."""
CHECK_SECONDS = 1.0
"""How often the run directory is checked for having vanished."""


class Telemetry:
    """The recording half of one agent. ``guard`` is where its failures, and those of its hooks, stop."""

    def __init__(self, recorder: Recorder, manifest: Manifest, device: torch.device) -> None:
        self.recorder, self.manifest = recorder, manifest
        self.guard = Guard("recording", self._count_error)
        self.streaks: dict[str, tuple[float, int]] = {}
        """Bad steps in a row that policies with a limit have counted, by policy: the most in the rows that reached the
        host since it was last emptied, and the step of that row."""
        self.actions: Actions | None = None
        """Shown every row that was written."""
        self.revision = 0
        """Of the policy in force."""
        self.slots = {name: slot for slot, name in enumerate(manifest.policies)}
        """The slot of each policy in force, by name."""
        self._device, self._pid = device, os.getpid()
        width = FIXED_SCALARS + POLICY_SLOTS + 2 * (POLICY_SLOTS + SCALAR_SLOTS + 2)
        width += (2 + MICROBATCHES) * len(manifest.parameters) + row_width(len(manifest.parameters))
        self._transfer: transfer.Transfer[StepRecord] = transfer.Transfer(width, device)
        self._journal = Journal(recorder, manifest)
        self._current: StepRecord | None = None
        self._last: StepRecord | None = None
        self._written: StepRecord | None = None
        self._next: dict[str, float | Tensor] = {}
        self._names: set[str] = set()
        self._last_time, self._next_check = math.nan, 0.0
        with self.guard:
            recorder.event("attached", f"attached to {len(manifest.parameters)} parameters; policy: {_said(manifest)}")

    @property
    def pending(self) -> bool:
        """Whether a step has begun and not been finished."""
        return self._current is not None

    def notice(self, kind: str, message: str, **details: Any) -> None:
        """Write an incident."""
        with self.guard:
            self.recorder.event(kind, message, **details)

    def change(self, revision: int, slots: Mapping[str, int], taken_over: frozenset[int]) -> None:
        """Record the steps to come as decided by another policy, by its table of slots."""
        self.revision, self.slots = revision, dict(slots)
        self._journal.change(revision, taken_over)

    def begin(self, taken: Taken, watch: BackwardWatch) -> None:
        """Send the row of a step on its way to the host, with what was seen of its backward passes."""
        if os.getpid() != self._pid:
            return  # a forked child must not write its parent's run
        with self.guard:
            if self._current is not None:
                self._current.flags |= Flag.FAILED  # the step before raised in the optimizer
            self._current = record = self._record(taken)
            arrivals = watch.take()
            if len(arrivals) >= MICROBATCHES * len(self.manifest.parameters):
                record.passes = watch.passes
            pieces = self._pieces(taken, record, arrivals, watch.own)
            row = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            if not self._transfer.send(row.to(torch.float32), record):
                self.recorder.status.rows_dropped += 1

    def finish(self, order: tuple[int, ...], agent_seconds: float) -> bool:
        """Write the rows that have arrived; return whether one of them was non-finite.

        ``agent_seconds`` is what the step in progress has cost the host; ``order`` the latest backward order.
        """
        assert self._current is not None
        self._last, self._current = self._current, None
        self._last.agent_seconds = agent_seconds
        if self._next_check <= self._last.time_ns:
            self._next_check = self._last.time_ns + CHECK_SECONDS * 1e9
            with self.guard:
                self.recorder.check_directory()
        return self._write(order, wait=False)

    def log(self, named: Mapping[str, float | Tensor], *, late_allowed: bool) -> None:
        """Keep scalars for the next row, or add them to the last one if they are late for it."""
        held = {name: self._hold(name, value) for name, value in named.items()}
        held = {name: value for name, value in held.items() if self._has_room(name)}
        last = self._last
        if last is not None and late_allowed and self._current is None and last.logged.isdisjoint(held):
            with self.guard:
                if self._add_late(last, held):
                    last.logged.update(held)
                    return
        self._next.update(held)

    @property
    def coming_loss(self) -> float | Tensor | None:
        """The loss that was logged for the step to come, if any; a tensor is this object's own."""
        return self._next.get("loss")

    def _has_room(self, name: str) -> bool:
        """Tell whether a row can carry a scalar of this name: one too many may, for the journal to refuse it."""
        if name != "loss" and len(self._names) <= SCALAR_SLOTS:
            self._names.add(name)
        return name == "loss" or name in self._names

    def flush(self, order: tuple[int, ...]) -> None:
        """Wait for every row under way and write it."""
        self._write(order, wait=True)

    def close(self, order: tuple[int, ...]) -> None:
        """Flush and finish the run directory; a forked child leaves its parent's alone."""
        if os.getpid() != self._pid:
            return
        self.flush(order)
        if self.actions is not None:  # the last rows may have called for a callback
            with self.guard:
                self.actions.close()
        with self.guard:
            self.recorder.check_directory()
        with self.guard:
            self.recorder.close()

    def _count_error(self) -> None:
        self.recorder.status.agent_errors += 1
        with contextlib.suppress(OSError):
            self.recorder.write_status()

    def _record(self, taken: Taken) -> StepRecord:
        now = time.time_ns()
        seconds, self._last_time = (now - self._last_time) / 1e9, now
        return StepRecord(
            step=taken.step,
            time_ns=now,
            optimizer=taken.optimizer,
            flags=int(Flag.SCALER) if taken.by_scaler else 0,
            step_seconds=seconds,
            revision=self.revision,
            acting=self._places(taken.stages),
            watching=self._places([verdict.name for verdict in taken.shadow]),
        )

    def _places(self, names: Iterable[str]) -> tuple[int, ...]:
        return tuple(self.slots[name] for name in names if name in self.slots)

    def _pieces(
        self, taken: Taken, record: StepRecord, arrivals: list[tuple[int, Tensor]], own: Tensor | None
    ) -> list[Tensor]:
        """Return the parts of the row, and name them in the record."""
        scalars = _scalars(taken, self.slots) | self._next
        if own is not None:
            scalars["own"] = own
        self._next = {}
        record.logged = {name for name in scalars if name == "loss" or name.startswith("log.")}
        tensors = {}
        for name, value in scalars.items():
            if not isinstance(value, Tensor):
                record.host[name] = value
            elif transfer.reads_are_free(value.device):
                record.host[name] = value.item()
            else:
                tensors[name] = transfer.bring(value, self._device)
        record.travelling = tuple(tensors)
        pieces = [torch.stack(list(tensors.values()))] if tensors else []
        pieces.append(taken.outcome.before.norms)
        if taken.after is not None:
            record.has_postclip = True
            pieces.append(taken.after.norms)
        if arrivals:
            record.arrivals = tuple(index for index, _ in arrivals)
            pieces.append(torch.stack([transfer.bring(norm, self._device) for _, norm in arrivals]))
        record.own = tuple(clip.call for clip in taken.own)
        pieces += [transfer.bring(clip.norms, self._device) for clip in taken.own if clip.norms is not None]
        return pieces

    def _hold(self, name: str, value: float | Tensor) -> float | Tensor:
        """Return a number, or a copy on its device of a tensor that the host cannot read for nothing."""
        shown = name.removeprefix("log.")
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise TypeError(f"{shown} has shape {tuple(value.shape)}, expected one element: reduce it first")
            if value.is_complex():
                raise TypeError(f"{shown} is complex, expected a real number")
            value = value.detach().reshape(())
            if transfer.reads_are_free(value.device):
                return float(value)
            return value.to(torch.float32, copy=True)
        if isinstance(value, np.ndarray) and value.size == 1:
            value = value.item()
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{shown} is a {type(value).__name__}, expected a number or a one-element tensor")
        return float(value)

    def _add_late(self, last: StepRecord, held: Mapping[str, float | Tensor]) -> bool:
        """Add scalars to a row that is under way, or was just written; return False if neither is possible."""
        tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
        if self._transfer.newest is last:
            last.host |= {name: value for name, value in held.items() if not isinstance(value, Tensor)}
            if tensors:
                self._transfer.extend(
                    torch.stack([transfer.bring(tensor, self._device) for tensor in tensors.values()])
                )
                last.late += tuple(tensors)
            return True
        if last is not self._written:
            return True  # its row was dropped or could not be written, and what belongs to it goes with it
        if tensors:
            return False
        self._journal.amend({name: value for name, value in held.items() if not isinstance(value, Tensor)})
        return True

    def _write(self, order: tuple[int, ...], *, wait: bool) -> bool:
        incident = False
        # The newest row stays open for what is logged after its step, where numbers are not known at once.
        keep_newest = not wait and not transfer.reads_are_free(self._device)
        with self.guard:
            for record, values in self._transfer.arrived(wait=wait, keep_newest=keep_newest):
                travelled = dict(zip(record.travelling, values[: len(record.travelling)].tolist(), strict=True))
                scalars = record.host | travelled | {"step": float(record.step)}
                # A step of an earlier policy is nothing that the one in force could raise for.
                for name, count in scalars.items() if record.revision == self.revision else ():
                    if name.startswith(STREAK) and count >= self.streaks.get(name, (0.0, 0))[0]:
                        self.streaks[name] = (count, record.step)
                before = self._journal.newest
                with self.guard:
                    incident |= self._journal.write(record, scalars, values, order)
                newest = self._journal.newest
                if newest is None or newest is before:
                    continue
                self._written = record  # whatever became of its events
                if self.actions is not None:
                    with self.guard:
                        self.actions.see(newest)
        return incident


def _said(manifest: Manifest) -> str:
    """Put in words what acts on gradients and what only watches."""
    said = ", ".join(manifest.acting) or "none: gradients are observed only"
    return said + (f"; in shadow, never acting: {', '.join(manifest.shadow)}" if manifest.shadow else "")


def _scalars(taken: Taken, slots: Mapping[str, int]) -> dict[str, float | Tensor]:
    """Name the scalars of a step; those that are tensors will travel."""
    outcome, after = taken.outcome, taken.after
    scalars: dict[str, float | Tensor] = {"total": outcome.before.total, "learning_rate": taken.learning_rate}
    if after is not None:
        scalars["total_after"] = after.total
    elif outcome.coefficient is not None:
        scalars["coefficient"] = outcome.coefficient
    optional = {"skip": taken.skip, "loss_scale": taken.loss_scale}
    scalars |= {f"{STREAK}{name}": count for name, count in taken.streaks.items()}
    scalars |= {name: value for name, value in optional.items() if value is not None}
    if taken.by_scaler:
        scalars["skip"] = 1.0
    for number, clip in enumerate(taken.own):
        scalars |= clip.scalars(number)
    return scalars | _decided(taken, slots)


def _decided(taken: Taken, slots: Mapping[str, int]) -> dict[str, float | Tensor]:
    """Name threshold and strength of each policy by its slot; one without a slot is not recorded."""
    scalars: dict[str, float | Tensor] = {}
    for name, decision in zip(taken.stages, taken.outcome.decisions, strict=False):  # none where a scaler decided
        if (slot := slots.get(name)) is not None:
            scalars[f"threshold{slot}"] = decision.threshold
            if decision.strength is not None:
                scalars[f"strength{slot}"] = decision.strength
    for verdict in taken.shadow:
        if (slot := slots.get(verdict.name)) is not None:
            scalars |= {f"threshold{slot}": verdict.threshold, f"strength{slot}": verdict.strength}
    return scalars
