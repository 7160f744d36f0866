"""Tell what became of the policy while the job ran: revisions, events, counters. Telemetry: it raises nothing."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Sequence

from gradiometer.live.control import Request
from gradiometer.live.requests import KINDS
from gradiometer.live.revisions import History, Revision, SlotTable, Source, describe_change, slots_of, write_history
from gradiometer.policy.spec import PolicySpec
from gradiometer.stepper import Turn
from gradiometer.telemetry import Telemetry

__all__ = ["Chronicle"]

logger = logging.getLogger(__name__)


class Chronicle:
    """The policies of one agent, from the one it was attached with; ``leader`` is the rank that reads requests."""

    def __init__(self, telemetry: Telemetry, spec: PolicySpec | None, leader: int) -> None:
        self._telemetry, self._lock = telemetry, threading.Lock()
        self._table = SlotTable(slots_of(spec))
        attached = Revision(
            revision=0,
            step=0,
            time_ns=time.time_ns(),
            policy=None if spec is None else spec.to_dict(),
            slots=self._table.slots,
            source="attach",
        )
        self._history = History(leader=leader, takes=KINDS, revisions=(attached,))
        self._unwritten = False
        """Whether ``policy.json`` is behind."""
        with telemetry.guard:
            self._write()

    def change(self, request: Request, spec: PolicySpec | None, step: int, turn: Turn) -> None:
        """Tell that another policy decides from ``step`` on; for the training thread, before that step."""
        self._turn_to(spec, step, turn, source="request", request=request.id, by=request.by, note=request.note)

    def restore(self, spec: PolicySpec | None, step: int, anew: Sequence[str]) -> None:
        """Tell of the policy that a checkpoint has brought back, if that is another than the one in force."""
        if self._history.newest.policy != (None if spec is None else spec.to_dict()):
            names = () if spec is None else spec.names
            turn = Turn(kept=tuple(name for name in names if name not in anew), anew=tuple(anew))
            self._turn_to(spec, step, turn, source="checkpoint")

    def _turn_to(
        self,
        spec: PolicySpec | None,
        step: int,
        turn: Turn,
        *,
        source: Source,
        request: str | None = None,
        by: str = "",
        note: str = "",
    ) -> None:
        old, new = self._history.newest, None if spec is None else spec.to_dict()
        taken_over = self._table.change(slots_of(spec))
        revision = Revision(
            revision=old.revision + 1,
            step=step,
            time_ns=time.time_ns(),
            policy=new,
            slots=self._table.slots,
            source=source,
            request=request,
            by=by,
        )
        with self._lock:
            self._history = self._history.model_copy(update={"revisions": (*self._history.revisions, revision)})
        recorder = self._telemetry.recorder
        with self._telemetry.guard:
            self._telemetry.change(revision.revision, self._table.places, taken_over)
            recorder.status.policy_changes += 1
            recorder.write_status()
        with self._telemetry.guard:
            self._write()
        said = describe_change(old.policy, new)
        message = f"from step {step} on another policy is in force (revision {revision.revision}): {said}"
        logger.info("gradiometer: %s", message)
        with self._telemetry.guard:
            recorder.event(
                "policy_changed", message, step=step, revision=revision.revision, source=source, request=request,
                by=by, note=note, old=old.policy, new=new, kept=turn.kept, anew=turn.anew,
            )  # fmt: skip

    def tend(self) -> None:
        """Try again to write ``policy.json`` if it is behind, as after a full disk; for the thread."""
        if self._unwritten:
            with contextlib.suppress(OSError):
                self._write()

    def _write(self) -> None:
        with self._lock:
            self._unwritten = True
            self._history = write_history(self._telemetry.recorder.path, self._history)
            self._unwritten = False

    def reject(self, request: Request | None, reasons: Sequence[str]) -> None:
        """Tell that a request was refused, None where it was none; for any thread."""
        asked, by = (request.id, request.by) if request is not None else (None, "")
        message = f"a request to change the policy was refused, the old one stays: {'; '.join(reasons)}"
        logger.warning("gradiometer: %s", message)
        with self._lock, contextlib.suppress(OSError):
            recorder = self._telemetry.recorder
            recorder.event("policy_rejected", message, request=asked, by=by, reasons=list(reasons))
            recorder.count_rejection()
