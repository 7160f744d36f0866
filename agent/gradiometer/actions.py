"""Look at rows as they arrive on the host, and do what the policy's ``actions`` say. Needs no torch.

What must happen to the step itself (skip it, zero a gradient) is for policies: they decide on the device, within the
step, on every rank alike. A row comes later, and at another time on each rank.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gradiometer.callbacks import ActionCall, Callback, Callbacks
from gradiometer.detect import Detector, Seen, detector
from gradiometer.policy.actions import CONDITIONS, ActionSpec
from gradiometer.policy.spec import PolicyError, PolicySpec
from gradiometer.recorder import Recorder, RowHeader
from gradiometer.records import ACTIONS, OWN_CLIPPING, Flag

__all__ = ["Actions", "PolicyActionError"]

logger = logging.getLogger(__name__)
SKIPPED, NONFINITE = int(Flag.SKIPPED), int(Flag.NONFINITE)


class PolicyActionError(RuntimeError):
    """A condition of the policy file was met whose action is to stop the job; the message has the numbers."""


@dataclass(kw_only=True, slots=True)
class _Bound:
    spec: ActionSpec
    detector: Detector
    rest: int = 0
    """Steps in which it is not done again."""
    slot: int | None = None
    since: int = 0
    """Revision of the policy with which it came: rows that an earlier one decided are nothing to it."""


class Actions:
    """The actions in force for one rank. Rows come from the training thread; callbacks run on others."""

    def __init__(
        self, recorder: Recorder, run_id: str, rank: int, callbacks: Mapping[str, Callback] | None = None
    ) -> None:
        self._recorder, self._run_id, self._rank = recorder, run_id, rank
        self._given = dict(callbacks or {})
        self._callbacks = Callbacks(self._given, self._tell)
        self._bound: list[_Bound] = []
        self._error: PolicyActionError | None = None

    def replace(self, actions: Sequence[ActionSpec], policies: Mapping[str, int], revision: int = 0) -> None:
        """Put other actions in force; those that are unchanged keep what they have seen.

        ``policies`` gives the slots of the policies in force, by name, ``revision`` the number of that policy. Raises
        PolicyError, having changed nothing, for a callback that was not given to ``attach``.
        """
        check_callbacks(actions, self._given)
        slots = {**OWN_CLIPPING, **policies}
        following = []
        for spec in actions:
            slot = slots[spec.when.setting.policy] if spec.when.condition == "clip_rate" else None
            kept = next((bound for bound in self._bound if bound.spec == spec and bound.slot == slot), None)
            following.append(kept or _Bound(spec=spec, detector=detector(spec.when, slots), slot=slot, since=revision))
        self._bound = following
        status = self._recorder.status
        for spec in actions:
            status.actions_armed |= 1 << place_of(spec)
        with contextlib.suppress(OSError):  # the next row writes it again
            self._recorder.write_status()
        if any(spec.callback for spec in actions):
            with contextlib.suppress(RuntimeError):  # no thread can be made now; the first call tries again
                self._callbacks.start()

    def check_callbacks(self, spec: PolicySpec) -> None:
        """Raise PolicyError if a policy wants a callback that was not given; from any thread."""
        check_callbacks(spec.actions, self._given)

    def see(self, row: RowHeader) -> None:
        """Take in a row that was written, and do what it calls for."""
        if not self._bound:
            return
        flags = row.flags
        seen = Seen(row.step, row.grad_norm_preclip, bool(flags & SKIPPED), bool(flags & NONFINITE), row.clipped)
        called = []
        for bound in self._bound:
            if row.policy_revision < bound.since:
                continue
            numbers = bound.detector.see(seen)
            if bound.rest > 0:
                bound.rest -= 1
            elif numbers is not None:
                bound.rest = bound.spec.cooldown - 1
                called.append((bound.spec, numbers))
        events = [self._do(spec, row.step, numbers) for spec, numbers in called]
        for message, details in events:  # last: a full disk shall cost the event and nothing else
            self._recorder.event("policy_action", message, **details)

    @property
    def calling(self) -> bool:
        """Whether it is a callback that asks."""
        return self._callbacks.calling

    def check(self) -> None:
        """Raise the PolicyActionError that a row has called for, if one has."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait, within bounds, for a callback under way. Idempotent."""
        self._callbacks.close()

    def _do(self, spec: ActionSpec, step: int, numbers: dict[str, float]) -> tuple[str, dict[str, Any]]:
        """Do it; return message and details of the event that is to tell of it."""
        condition = spec.when.condition
        shown = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
        message = f"action {spec.name!r}: {condition} at step {step} ({shown})"
        self._recorder.status.actions[place_of(spec)] += 1
        if spec.kind == "raise":
            self._error = self._error or PolicyActionError(f"{message}; the policy says to raise")
        elif spec.callback is not None:
            call = ActionCall(
                run_id=self._run_id,
                rank=self._rank,
                step=step,
                action=spec.name,
                condition=condition,
                numbers=numbers,
                path=self._recorder.path,
            )
            self._callbacks.submit(spec.callback, call, spec.timeout)
        logger.warning("gradiometer: %s", message)
        return message, {
            "name": spec.name, "condition": condition, "action": spec.kind, "step": step, "numbers": numbers
        }  # fmt: skip

    def _tell(self, failure: str | None, call: ActionCall, name: str) -> None:
        """Count a call that begins or fails; the counters are written with the next row, or at the end."""
        status = self._recorder.status
        if failure is None:
            status.callbacks += 1
            return
        status.callback_failures += 1
        message = f"callback {name!r} of action {call.action!r}, step {call.step}: {failure}"
        with contextlib.suppress(OSError):  # a full disk, or a run that was finished without it
            self._recorder.event("callback_failed", message, callback=name, name=call.action, step=call.step)


def place_of(spec: ActionSpec) -> int:
    """Return the place of an action's counter: condition by condition, action by action."""
    return CONDITIONS.index(spec.when.condition) * len(ACTIONS) + ACTIONS.index(spec.kind)


def check_callbacks(actions: Sequence[ActionSpec], given: Mapping[str, Callback]) -> None:
    """Raise PolicyError for an action whose callback is not among those given, TypeError for one that is none."""
    for name, function in given.items():
        if not callable(function):
            raise TypeError(f"callbacks[{name!r}] is {function!r}, expected a function of one argument")
    for spec in actions:
        if spec.callback is not None and spec.callback not in given:
            known = ", ".join(sorted(given)) or "none"
            raise PolicyError(
                f"action {spec.name!r} calls {spec.callback!r}, but attach(callbacks=...) was given {known}: pass "
                f"callbacks={{{spec.callback!r}: function}}"
            )
