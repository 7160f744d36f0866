"""Observe, decide and act around optimizer steps.

What gradients belong to a step is for :mod:`gradiometer.rounds`, what is done to them for :mod:`gradiometer.clipping`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradiometer import checkpoint
from gradiometer.actions import PolicyActionError
from gradiometer.clipping import Changed, Undo, amp_state, change_gradients, prepare_step, takes_grad_scale, unscale
from gradiometer.hooks import current_scaler
from gradiometer.layers import Parameters
from gradiometer.norms import Meter
from gradiometer.own_clipping import OwnClip, OwnClipping
from gradiometer.policy.base import Layout, Observation, State
from gradiometer.policy.build import Binding, bind
from gradiometer.policy.kinds import NonFiniteSpec, SkipSpec
from gradiometer.policy.pipeline import Outcome, observe
from gradiometer.policy.spec import PolicySpec
from gradiometer.ranks import LossMean
from gradiometer.rounds import Rounds, Watched
from gradiometer.shadows import Shadows, Verdict
from gradiometer.shards import gradients_of
from gradiometer.transfer import bring
from gradiometer.updates import Updates

__all__ = ["NonFiniteGradientError", "Stepper", "Taken", "Turn"]

logger = logging.getLogger(__name__)


class NonFiniteGradientError(RuntimeError):
    """The policy's ``nonfinite`` stage was told to stop the job; the message says what became of the bad steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """One step as it was observed and decided; tensors are on the gradients' device."""

    step: int
    optimizer: int
    outcome: Outcome
    changed: Changed | None = None
    skip: Tensor | None = None
    """Whether the optimizer will not move, with a GradScaler's own verdict in it."""
    streaks: Mapping[str, Tensor]
    """Bad steps in a row, by policy that allows only so many."""
    loss_scale: Tensor | None = None
    learning_rate: float | Tensor
    by_scaler: bool = False
    own: tuple[OwnClip, ...] = ()
    """What the loop's own clipping had done to the gradients, oldest first."""
    stages: tuple[str, ...] = ()
    """Names of the policies that act; those of ``outcome.decisions`` where there are any."""
    shadow: tuple[Verdict, ...] = ()
    """What each policy in shadow would have done."""

    @property
    def after(self) -> Observation | None:
        """Norms of what the optimizer is given; None as in :class:`~gradiometer.policy.pipeline.Outcome`."""
        return self.outcome.after if self.changed is None else self.changed.after


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What became of the stages when another policy took over, by name."""

    kept: tuple[str, ...] = ()
    """Those that go on with the memory they had."""
    anew: tuple[str, ...] = ()
    """Those that begin with none."""


class Stepper:
    """The step path of one agent; ``step`` is the number of the next step."""

    def __init__(
        self,
        parameters: Parameters,
        optimizers: Sequence[Optimizer],
        layout: Layout,
        spec: PolicySpec | None,
        meter: Meter,
        *,
        together: bool,
    ) -> None:
        self.step, self.attached = 0, spec
        """The number of the next step, and the policy that the agent was attached with."""
        self.base = 0
        """What of :attr:`step` is of a checkpoint, and not of steps taken since attach."""
        self.loss: float | Tensor | None = None
        """What was logged as the loss of the coming step, for policies that ask for it."""
        self.loss_mean = LossMean(meter.device)
        """What averages the loss over the ranks."""
        self._loss_missed = False
        self.notices: list[tuple[str, str]] = []
        """Kind and message of what should be told the user, to be taken by whoever records."""
        self._rounds = Rounds(parameters, optimizers, together=together)
        self._meter, self.layout = meter, layout
        self.own = OwnClipping(parameters, self._rounds, meter.device, self.notices)
        self.shadows = Shadows(meter, self.notices)
        """What only watches; it raises nothing."""
        self._undo: dict[int, Undo] = {}
        self.updates: Updates | None = None
        """Shown every step's gradients before they are changed; it raises nothing."""
        binding = bind(spec, layout)
        self.put(binding, binding.init())

    def put(self, binding: Binding, states: Mapping[str, State]) -> None:
        """Put a policy in force, whose stages remember these states; between two steps."""
        spec = binding.spec
        self.binding, self.pipeline = binding, binding.pipeline
        self._states = {name: states[name] for name in binding.pipeline.names} if binding.pipeline else {}
        self.shadows.put(binding.shadow, states)
        self._limits = _raise_limits(spec)
        asking = (
            stage for stage in (spec.stages if spec else ()) if isinstance(stage, SkipSpec) and "loss" in stage.on
        )
        self._loss_for = next((stage.name for stage in asking), None)
        stages = () if spec is None else spec.pipeline
        self.own.policy_changed(clips=any(not isinstance(stage, NonFiniteSpec | SkipSpec) for stage in stages))

    @property
    def spec(self) -> PolicySpec | None:
        """The policy in force."""
        return self.binding.spec

    @property
    def wants_loss(self) -> bool:
        """Whether some policy, acting or in shadow, looks at the loss."""
        return self._loss_for is not None

    @property
    def midway(self) -> bool:
        """Whether some optimizer has yet to step on the decision in force."""
        return self._rounds.current is not None

    @property
    def taken(self) -> int:
        """Steps taken since attach, whatever :attr:`step` a checkpoint has set: the ranks of a job count alike."""
        return self.step - self.base

    def begins_round(self, optimizer: Optimizer) -> bool:
        """Tell whether the optimizer's next update is on a decision of its own, and so the policy may change before."""
        index = self._rounds.index(optimizer)
        return not self._rounds.active(index) and not self._rounds.joins(index)

    def change(self, spec: PolicySpec | None) -> Turn:
        """Put another policy in force from the next step on; None observes only.

        A stage that keeps its name, its kind, the shape of its memory and the units that it is of goes on with that,
        whatever became of its settings, and also from shadow to pipeline and back; others begin anew, and count their
        steps from the next.
        Only where :meth:`begins_round`. If it raises, as :func:`~gradiometer.policy.build.bind` does, nothing has been
        changed.
        """
        old, was = self._states | self.shadows.states, self.binding
        new = bind(spec, self.layout)
        fresh = new.init()
        kept = {name for name in fresh if name in old and _goes_on(name, was, new, old[name], fresh[name])}
        born = {name: was.born[name] if name in kept else self.step for name in fresh}
        self.put(bind(spec, self.layout, born), {name: old[name] if name in kept else fresh[name] for name in fresh})
        return Turn(
            kept=tuple(name for name in fresh if name in kept),
            anew=tuple(name for name in fresh if name not in kept),
        )

    def before_update(self, optimizer: Optimizer) -> Taken | None:
        """Observe, decide and act for a step that is about to be taken.

        Returns what the step was, or None if it is part of a step returned already. Raises RuntimeError if the
        optimizer has been given parameters that were not there at attach.
        """
        rounds = self._rounds
        index = rounds.index(optimizer)
        self.restore(optimizer)
        again = rounds.enter(index)
        with torch.no_grad(), self._in_phase(index, again=again):
            rounds.refresh(index)
            taken = None
            if not again and self._joins(index):
                self._prepare(index)
            else:
                taken = self._take(index, again=again)
            rounds.acted(index)
            return taken

    def within(self, optimizer: Optimizer) -> bool:
        """Tell whether the optimizer is in a step on the gradients it has now: the step calls its parent's."""
        return self._rounds.within(self._rounds.index(optimizer))

    def observe_skipped(self, optimizer: Optimizer) -> Taken | None:
        """Observe a step that a GradScaler has decided not to take: policies take note of it, and are not asked.

        But they are where ranks measure together: the GradScaler of another rank may have decided otherwise, and what
        that rank measures, and which optimizers act on it, must be the same here.
        """
        if self._meter.shared:
            taken = self.before_update(optimizer)
            return None if taken is None else replace(taken, by_scaler=True)
        index = self._rounds.index(optimizer)
        own = self.own.take([index])
        with torch.no_grad(), self._in_phase(index):
            watched = self._rounds.watched[index]
            if self.updates is not None:
                self.updates.begin(self.step, index)
            loss = self._observe_loss()
            gradients = gradients_of(watched)
            observation = observe(self._meter(gradients), loss)
            weighed = self.shadows.weigh(watched, None)
            if self.updates is not None:
                self.updates.look(index, watched, gradients, observation.norms)
            if self.pipeline is not None:
                _, self._states = self.pipeline.decide(self._states, observation, self.step)
            shadow = self.shadows.look(observation, weighed, self.step)
        self._rounds.current = None
        return self._taken(index, Outcome(before=observation), by_scaler=True, own=own, shadow=shadow)

    def stepped(self, optimizer: Optimizer) -> None:
        """Note that the optimizer has used its gradients, or skipped them."""
        self.own.stepped(self._rounds.index(optimizer))

    def restore(self, optimizer: Optimizer) -> None:
        """Put back what acting changed on the optimizer; idempotent."""
        undo = self._undo.pop(id(optimizer), None)
        if undo is not None:
            undo(optimizer)

    def finished(self) -> None:
        """Note that the step in progress is over, or failed; nothing is kept that refers to a gradient."""
        self._rounds.finished()

    def restore_all(self) -> None:
        """Put back what acting changed, on every optimizer."""
        for optimizer in self._rounds.optimizers:
            self.restore(optimizer)

    def check(self, streaks: Mapping[str, tuple[float, int]]) -> None:
        """Raise if rows that reached the host have more bad steps in a row than a policy allows.

        ``streaks`` gives their number and the newest step, by policy: NonFiniteGradientError for ``nonfinite``,
        PolicyActionError for ``skip``.
        """
        for name, limit in self._limits.items():
            count, step = streaks.get(name, (0.0, 0))
            if count >= limit.steps:
                message = (
                    f"{limit.what} in {count:g} step(s) in a row, up to step {step}; policy {name!r} allows "
                    f"{limit.steps - 1}. {limit.excuse}"
                )
                self.notices.append(("policy_raised", message))
                raise limit.error(message)

    def state_dict(self) -> dict[str, Any]:
        return checkpoint.save(
            step=self.step,
            parameters=len(self.layout.names),
            attached=self.attached,
            binding=self.binding,
            states=self._states | self.shadows.states,
        )

    def plan(self, state: Mapping[str, Any], check: Callable[[PolicySpec], None]) -> checkpoint.Plan:
        """Work out how to go on from what :meth:`state_dict` returned; raises ValueError if that is not possible.

        ``check`` raises PolicyError for a policy that could not be carried out here.
        """
        bind_it = partial(bind, layout=self.layout)
        return checkpoint.plan(
            state, parameters=len(self.layout.names), attached=self.attached, bind=bind_it, check=check
        )

    def go_on(self, plan: checkpoint.Plan) -> None:
        """Go on from a checkpoint."""
        self.base += plan.step - self.step
        self.step = plan.step
        self.put(plan.binding, plan.states)

    @contextmanager
    def _in_phase(self, index: int, *, again: bool = False) -> Iterator[None]:
        """Take part in the step's all-reduces even if this rank fails before them: the other ranks are in them."""
        calls, loss_calls, weighed = self._meter.calls, self.loss_mean.calls, self.shadows.weighed
        try:
            yield
        except Exception:
            measures = not self._rounds.awaits(index)
            asked = self._loss_for is not None and not (again and self.pipeline is None)
            if asked and self.loss_mean.calls == loss_calls and measures:
                self.loss_mean.abstain()
            if self._meter.calls == calls and measures:
                if not again and self.updates is not None and self.updates.step != self.step:
                    self.updates.begin(self.step, index)
                self._meter.abstain()
            if self.shadows.weighed == weighed and measures and not again:
                self.shadows.abstain()
            if self.pipeline is None and not again:
                self.step += 1  # the optimizer takes it: its number must not be another step's
            raise

    def _joins(self, index: int) -> bool:
        """Tell whether this step belongs to the open round; notice optimizers that do not step together."""
        joins = self._rounds.joins(index)
        if not joins and self._rounds.awaits(index):
            self._part("their gradients changed between the steps")
        return joins

    def _part(self, reason: str) -> None:
        self.notices.append(("optimizers_apart", self._rounds.part(reason, self.step)))

    def _take(self, index: int, *, again: bool) -> Taken | None:
        scale, found_inf = amp_state(self._rounds.optimizers[index])
        if not self._rounds.scaled_alike(index, scale):
            self._part("a GradScaler has unscaled only some of them: call scaler.unscale_() on each before stepping")
        members = self._rounds.members(index)
        own = self.own.take(members, again=again)
        if again and self.pipeline is None and len(members) == 1:
            return None  # nobody asks for these norms, and another rank may evaluate its closure less often
        loss = self._observe_loss()
        watched = self._rounds.union(members)
        updates = None if again else self.updates
        if updates is not None:
            updates.begin(self.step, index)
        gradients = gradients_of(watched)
        norms = self._meter(gradients)
        weighed = None if again else self.shadows.weigh(watched, scale)
        observation = observe(norms if scale is None else norms / bring(scale, norms.device), loss)
        outcome, states = Outcome(before=observation), self._states
        if self.pipeline is not None:
            outcome, states = self.pipeline.decide(self._states, observation, self.step)
        if updates is not None:
            updates.look(index, watched, gradients, observation.norms)
        shadow = () if again else self.shadows.look(observation, weighed, self.step)
        changed = self._act(index, members, watched, outcome, scale)
        if again:
            return None
        if changed is not None:
            outcome = outcome.with_strength(changed.strength)
        self._states = states
        skip = outcome.skip
        if found_inf is not None:
            stopped = bring(found_inf, norms.device) > 0
            skip = stopped if skip is None else skip | stopped
        return self._taken(index, outcome, changed=changed, skip=skip, scale=scale, own=own, shadow=shadow)

    def _observe_loss(self) -> Tensor | None:
        """Return the mean of the ranks' losses of this step, None where no policy asks; all ranks must call alike."""
        if self._loss_for is None:
            return None
        if self.loss is None and not self._loss_missed:
            self._loss_missed = True
            message = (
                f"policy {self._loss_for!r} looks at the loss, but none was logged before step {self.step}: call "
                "agent.log(loss=loss) before optimizer.step()"
            )
            logger.warning("gradiometer: %s", message)
            self.notices.append(("policy_loss_missing", message))
        return self.loss_mean(self.loss)

    def _act(
        self, index: int, members: list[int], watched: Watched, outcome: Outcome, scale: Tensor | None
    ) -> Changed | None:
        if self.pipeline is None and len(members) == 1:
            return None
        kernel = outcome.coefficient is not None and outcome.coefficient.dim() == 0 and outcome.change is None
        scaled = not (kernel and all(takes_grad_scale(self._rounds.optimizers[member]) for member in members))
        unscaled = False
        if outcome.change is not None and scale is not None:
            unscaled = True
            unscale(watched, scale)
        changed = change_gradients(watched, outcome, self._meter, multiply=scaled)
        self._rounds.open(members, outcome, scaled=scaled, unscaled=unscaled)
        self._prepare(index)
        return changed

    def _prepare(self, index: int) -> None:
        current, optimizer = self._rounds.current, self._rounds.optimizers[index]
        assert current is not None
        current.stepped.add(index)
        if self.pipeline is not None:
            self._undo[id(optimizer)] = prepare_step(
                optimizer, current.outcome, scaled=current.scaled, unscaled=current.unscaled
            )

    def _taken(
        self,
        index: int,
        outcome: Outcome,
        *,
        changed: Changed | None = None,
        skip: Tensor | None = None,
        scale: Tensor | None = None,
        by_scaler: bool = False,
        own: tuple[OwnClip, ...] = (),
        shadow: tuple[Verdict, ...] = (),
    ) -> Taken:
        scaler = current_scaler()
        scale = scale if scaler is None else scaler._get_scale_async()
        states = {name: self._states.get(name, {}) for name in self._limits}
        taken = Taken(
            step=self.step,
            optimizer=index,
            outcome=outcome,
            changed=changed,
            skip=skip,
            streaks={name: state["consecutive"] for name, state in states.items() if "consecutive" in state},
            loss_scale=scale,
            learning_rate=self._rounds.optimizers[index].param_groups[0]["lr"],
            by_scaler=by_scaler,
            own=own,
            stages=() if self.pipeline is None else self.pipeline.names,
            shadow=shadow,
        )
        self.step += 1
        return taken


def _goes_on(name: str, old: Binding, new: Binding, memory: State, fresh: State) -> bool:
    """Tell whether the stage of that name goes on with what it remembers."""
    kinds = [{stage.name: stage.kind for stage in each.spec.stages} if each.spec else {} for each in (old, new)]
    if kinds[0].get(name) != kinds[1].get(name) or memory.keys() != fresh.keys():
        return False
    if old.units(name) != new.units(name):
        return False
    return all(memory[key].shape == fresh[key].shape and memory[key].dtype == fresh[key].dtype for key in fresh)


@dataclass(frozen=True, slots=True)
class _Limit:
    """After how many bad steps in a row to raise what, and what became of them."""

    steps: int
    error: type[RuntimeError]
    what: str
    excuse: str


def _raise_limits(spec: PolicySpec | None) -> dict[str, _Limit]:
    """Return the limits of the acting policies that have one, by name."""
    limits = {}
    for stage in spec.pipeline if spec else ():
        steps: int | None = getattr(stage, "max_consecutive", None)
        if getattr(stage, "then", "raise") != "raise":
            continue
        if isinstance(stage, NonFiniteSpec):
            steps = 1 if stage.action == "raise" else steps
            became = "They were taken with zeros" if stage.action == "zero" else "No parameter was moved by them"
            limit: tuple[type[RuntimeError], str, str] = (NonFiniteGradientError, "gradients were NaN or Inf", became)
        else:
            limit = (PolicyActionError, "loss or norm was an outlier", "No parameter was moved by them")
        if steps is not None:
            limits[stage.name] = _Limit(steps, *limit)
    return limits
