"""Turn a step's numbers, once they are on the host, into a row of the ring and into incidents.

Everything here runs on the host with NumPy; nothing here knows a tensor. Guarantees: an episode of non-finite steps
is two events, its first step and its end, however long it lasts.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gradiometer.clip_calls import ClipCall, Undone, undo
from gradiometer.recorder import Recorder, RowHeader
from gradiometer.records import OWN_CLIPPING, PIPELINE_SLOTS, SCALAR_SLOTS, Flag, Manifest

__all__ = ["Journal", "StepRecord", "first_nonfinite"]

logger = logging.getLogger(__name__)
Norms = npt.NDArray[np.float32]
NAN = math.nan
# Plain integers: the operators of an IntFlag cost a microsecond each.
NONFINITE, SKIPPED, CLIPPED = int(Flag.NONFINITE), int(Flag.SKIPPED), int(Flag.CLIPPED)
ZEROED, HOOKED, LOSS = int(Flag.ZEROED), int(Flag.HOOKED), int(Flag.LOSS)
OWN_NONFINITE, OWN_WATCHED = int(Flag.OWN_NONFINITE), int(Flag.OWN_WATCHED)


@dataclass(kw_only=True, slots=True)
class StepRecord:
    """What the host knows of a step when its row sets out; the rest travels from the device and is named here."""

    step: int
    time_ns: int
    optimizer: int
    flags: int = 0
    step_seconds: float = NAN
    agent_seconds: float = 0.0
    host: dict[str, float] = field(default_factory=dict)
    """Values known to the host, by the same names as those that travel."""
    travelling: tuple[str, ...] = ()
    """Names of the scalars at the head of the row, in order."""
    late: tuple[str, ...] = ()
    """Names of the scalars that ``Agent.log`` appended to the end of the row."""
    has_postclip: bool = False
    """Whether the norms after the policies follow those before; else one coefficient gives them."""
    arrivals: tuple[int, ...] = ()
    """Parameters in the order in which their micro-batch gradients came; their norms follow."""
    passes: int = 0
    """Backward passes of the step where more arrived than are kept, else 0."""
    logged: set[str] = field(default_factory=set)
    revision: int = 0
    """Of the policy that decided the step."""
    acting: tuple[int, ...] = ()
    """Slots of the policies that act."""
    watching: tuple[int, ...] = ()
    """Slots of the policies in shadow that decided."""
    own: tuple[ClipCall, ...] = ()
    """What the loop's own clipping did before; the norms it measured come last."""


class Journal:
    """Writes one rank's steps: rows to the recorder, episodes to its events."""

    def __init__(self, recorder: Recorder, manifest: Manifest) -> None:
        self._recorder, self._names = recorder, [p.name for p in manifest.parameters]
        self._taken_over: list[tuple[int, frozenset[int]]] = []
        """Revisions of which no row is written yet, and the slots that change hands with each."""
        self._filled: tuple[int, ...] | None = None
        self._distributed = manifest.world_size > 1
        self._scalar_slots: dict[str, int] = {}
        self._refused = False
        self._episode: int | None = None
        self._order_known = False
        self._misuses: set[str] = set()
        self.newest: RowHeader | None = None
        """Scalars of the row that was written last."""

    def write(self, record: StepRecord, scalars: Mapping[str, float], values: Norms, order: tuple[int, ...]) -> bool:
        """Write one step; ``values`` is the row as it travelled, ``scalars`` those of it and of the host by name.

        Returns whether the step was non-finite.
        ``order`` is the latest known backward order, for steps whose own arrivals were not watched.
        """
        if record.late:
            late = values[-len(record.late) :].tolist()
            scalars = {**scalars, **dict(zip(record.late, late, strict=True))}
            values = values[: -len(record.late)]
        seen, post, micro = self._split(record, values, scalars)
        pre, own = seen, None
        if record.own:
            own = undo(record.own, seen, scalars, values)
            pre = own.norms
            self._report_misuse(record, own)
        bad = not math.isfinite(scalars["total"]) and not bool(np.isfinite(seen).all())
        header = self._header(record, scalars, pre, micro, order, own, bad=bad)
        stats = self._recorder.stats
        stats[0], stats[1] = pre, post
        stats[2] = self._microbatch_norms(record, micro) if record.arrivals else -0.0
        self._recorder.scalars[:] = NAN
        self._fill_scalars(scalars)
        if record.revision != self._recorder.status.policy_revision:
            self._turn_to(record.revision)
        self._recorder.commit(header)
        self.newest = header
        nonfinite = bool(header.flags & NONFINITE)
        self._follow_episode(header, nonfinite=nonfinite)
        self._announce_order(record)
        return nonfinite

    def change(self, revision: int, taken_over: frozenset[int]) -> None:
        """Expect rows of another policy, which has slots that were another stage's: those then count from 0."""
        self._taken_over.append((revision, taken_over))

    def _turn_to(self, revision: int) -> None:
        status = self._recorder.status
        while self._taken_over and self._taken_over[0][0] <= revision:
            for slot in self._taken_over.pop(0)[1]:
                status.clip_events[slot] = 0
        status.policy_revision = revision

    def amend(self, scalars: Mapping[str, float]) -> None:
        """Add scalars that were logged after the newest row was written."""
        self._fill_scalars(scalars)
        self._recorder.amend(scalars.get("loss"))

    def _split(self, record: StepRecord, values: Norms, scalars: Mapping[str, float]) -> tuple[Norms, Norms, Norms]:
        """Cut the row into norms before and after the policies [P] and micro-batch norms [arrivals]."""
        start, width = len(record.travelling), len(self._names)
        pre = values[start : start + width]
        start += width
        if scalars.get("skip", 0.0) > 0:
            post = np.copysign(np.float32(0), pre)
        elif record.has_postclip:
            post = values[start : start + width]
        elif scalars.get("coefficient", 1.0) != 1.0:
            post = pre * np.float32(scalars["coefficient"])
        else:
            post = pre
        start += width * record.has_postclip
        micro = values[start : start + len(record.arrivals)]
        return pre, post, micro / np.float32(scalars.get("loss_scale", 1.0)) if record.arrivals else micro

    def _header(
        self,
        record: StepRecord,
        scalars: Mapping[str, float],
        pre: Norms,
        micro: Norms,
        order: tuple[int, ...],
        own: Undone | None,
        *,
        bad: bool,
    ) -> RowHeader:
        skipped = scalars.get("skip", 0.0) > 0
        seen = scalars["total"]
        after = 0.0 if skipped else scalars.get("total_after", seen * scalars.get("coefficient", 1.0))
        self._empty_others(record)
        clipped = self._fill_policies(record, scalars, bad=bad, skipped=skipped) | self._fill_own(own)
        watched = self._fill_shadow(record, scalars)
        before, bad = (seen, bad) if own is None else (own.total, bad or own.nonfinite)
        zeroed = bad and math.isfinite(after) and not skipped
        flags = record.flags | NONFINITE * bad | SKIPPED * skipped | CLIPPED * bool(clipped)
        flags |= HOOKED * bool(record.arrivals) | ZEROED * zeroed | LOSS * ("loss" in scalars)
        flags |= self._own(scalars, micro) if self._distributed else 0
        return RowHeader(
            step=record.step,
            time_ns=record.time_ns,
            flags=flags,
            clipped=clipped | watched,
            optimizer=record.optimizer,
            microbatches=(record.passes or _microbatches(record.arrivals)) if record.arrivals else 0,
            first_nonfinite=first_nonfinite(pre, record.arrivals, micro, order) if bad else -1,
            policy_revision=record.revision,
            grad_norm_preclip=before,
            grad_norm_postclip=after,
            coefficient=_coefficient(scalars if own is None else {}, before, after, skipped=skipped),
            learning_rate=scalars.get("learning_rate", NAN),
            loss=scalars.get("loss", NAN),
            loss_scale=scalars.get("loss_scale", NAN),
            step_seconds=record.step_seconds,
            agent_seconds=record.agent_seconds,
        )

    def _own(self, scalars: Mapping[str, float], micro: Norms) -> int:
        """Return the flags that say what this rank's own gradients were, before any reduction between ranks."""
        watched = "own" in scalars or len(micro) > 0
        bad = not math.isfinite(scalars.get("own", 0.0)) or not bool(np.isfinite(micro).all())
        return OWN_WATCHED * watched | OWN_NONFINITE * bad

    def _empty_others(self, record: StepRecord) -> None:
        """Leave nothing in the columns of slots that the step has no use for."""
        used = record.acting + record.watching
        if used != self._filled:
            self._recorder.policies[:, :PIPELINE_SLOTS], self._filled = NAN, used

    def _fill_policies(self, record: StepRecord, scalars: Mapping[str, float], *, bad: bool, skipped: bool) -> int:
        """Fill the columns of the policies that act and return the mask of those that changed the gradients.

        A stage without a strength of its own acts on non-finite steps; where one skips, nothing is left to the others.
        A stage without a threshold was not asked, for a GradScaler had decided.
        """
        columns, clipped = self._recorder.policies, 0
        for slot in record.acting:
            own, threshold = scalars.get(f"strength{slot}"), scalars.get(f"threshold{slot}", NAN)
            strength = (0.0 if bad and not math.isnan(threshold) else 1.0) if own is None else own
            if skipped and own:  # a stage that skips has strength 0, and leaves nothing to the others
                strength = 1.0
            columns[:, slot] = threshold, strength
            clipped |= (strength < 1.0) << slot
        return clipped

    def _fill_shadow(self, record: StepRecord, scalars: Mapping[str, float]) -> int:
        """Fill the columns of the policies in shadow and return the mask of those that would have changed something.

        They decide about the gradients as they were measured, so what became of the step is nothing to them.
        """
        columns, watched = self._recorder.policies, 0
        for slot in record.watching:
            strength = scalars[f"strength{slot}"]
            columns[:, slot] = scalars[f"threshold{slot}"], strength
            watched |= (strength < 1.0) << slot
        return watched

    def _fill_own(self, own: Undone | None) -> int:
        """Fill the columns of torch's own functions and return the mask of those that changed the gradients."""
        clipped = 0
        for slot in OWN_CLIPPING.values():
            threshold, strength = (NAN, NAN) if own is None else own.columns.get(slot, (NAN, NAN))
            self._recorder.policies[:, slot] = threshold, strength
            clipped |= (strength < 1.0) << slot
        return clipped

    def _report_misuse(self, record: StepRecord, own: Undone) -> None:
        for misuse, message in own.misuses.items():
            if misuse not in self._misuses:
                self._misuses.add(misuse)
                logger.warning("gradiometer: %s", message)
                self._recorder.event("clip_misuse", message, step=record.step)

    def _fill_scalars(self, scalars: Mapping[str, float]) -> None:
        logged = {key.removeprefix("log."): value for key, value in scalars.items() if key.startswith("log.")}
        if not logged.keys() <= self._scalar_slots.keys():
            self._add_scalars([name for name in logged if name not in self._scalar_slots])
        for name, value in logged.items():
            if name in self._scalar_slots:
                self._recorder.scalars[self._scalar_slots[name]] = value

    def _add_scalars(self, names: list[str]) -> None:
        """Give new names the slots that are left, and announce them together."""
        free = SCALAR_SLOTS - len(self._scalar_slots)
        for name in names[:free]:
            self._scalar_slots[name] = len(self._scalar_slots)
        if free:
            known = list(self._scalar_slots)
            self._recorder.event("scalars", f"recording the scalars {', '.join(known)}", names=known)
        if len(names) > free and not self._refused:
            self._refused = True
            message = f"scalar {names[free]!r} is not recorded: a run holds at most {SCALAR_SLOTS} beside the loss"
            self._recorder.event("scalar_refused", message, name=names[free])

    def _microbatch_norms(self, record: StepRecord, micro: Norms) -> Norms:
        """Return the root mean square over each parameter's micro-batches, [P]; negative zero where there was none."""
        norms = np.full(len(self._names), -0.0, np.float32)
        index = np.asarray(record.arrivals)
        squares = np.bincount(index, np.square(micro.astype(np.float64)), len(norms))
        counts = np.bincount(index, minlength=len(norms))
        seen = counts > 0
        norms[seen] = np.sqrt(squares[seen] / counts[seen])
        return norms

    def _follow_episode(self, header: RowHeader, *, nonfinite: bool) -> None:
        if nonfinite and self._episode is None:
            self._episode = header.step
            name = self._names[header.first_nonfinite] if header.first_nonfinite >= 0 else "unknown"
            done = "the step was skipped" if header.flags & SKIPPED else "the optimizer used it"
            done = "it was replaced by zeros" if header.flags & ZEROED else done
            own, said = _origin(header.flags)
            message = f"the gradient of {name} went non-finite at step {header.step}; {done}{said}"
            skipped = bool(header.flags & SKIPPED)
            self._recorder.event("nonfinite", message, step=header.step, parameter=name, skipped=skipped, own=own)
        elif not nonfinite and self._episode is not None:
            steps, self._episode = header.step - self._episode, None
            message = f"gradients are finite again at step {header.step}, after {steps} bad step{'s' * (steps > 1)}"
            self._recorder.event("finite_again", message, step=header.step, steps=steps)

    def _announce_order(self, record: StepRecord) -> None:
        if record.arrivals and not self._order_known:
            self._order_known = True
            names = [self._names[index] for index in dict.fromkeys(record.arrivals)]
            message = f"gradients arrive from {names[0]} first to {names[-1]} last"
            self._recorder.event("backward_order", message, step=record.step, parameters=names)


def first_nonfinite(pre: Norms, arrivals: tuple[int, ...], micro: Norms, order: tuple[int, ...]) -> int:
    """Return the parameter whose gradient was the first, in backward order, to be NaN or Inf; -1 if none is.

    The step's own arrivals decide where they were watched; else the latest known order; else the parameters' order,
    backwards, for a backward pass usually runs so.
    """
    for index, norm in zip(arrivals, micro, strict=True):
        if not math.isfinite(norm):
            return index
    bad = ~np.isfinite(pre)
    candidates: tuple[int, ...] = (*order, *range(len(pre) - 1, -1, -1))
    for index in candidates:
        if bad[index]:
            return index
    return -1


def _origin(flags: int) -> tuple[bool | None, str]:
    """Tell whether this rank's own gradients were non-finite, None where that is not known, and put it in words."""
    if flags & OWN_NONFINITE:
        return True, "; it came from this rank's own batch"
    if flags & OWN_WATCHED:
        return False, "; of this rank's own batch no gradient was seen to be non-finite: look at the other ranks"
    return None, ""


def _microbatches(arrivals: tuple[int, ...]) -> int:
    return max(Counter(arrivals).values())


def _coefficient(scalars: Mapping[str, float], before: float, after: float, *, skipped: bool) -> float:
    if skipped:
        return 0.0
    if "coefficient" in scalars:
        return scalars["coefficient"]
    if math.isfinite(before):
        return after / before if before > 0 else 1.0
    return NAN if math.isfinite(after) else 1.0
