"""Observe, decide and act around optimizer steps.

What gradients belong to a step is for :mod:`gradiometer.rounds`, what is done to them for :mod:`gradiometer.clipping`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradiometer.clipping import Clamped, Undo, amp_state, change_gradients, prepare_step, takes_grad_scale, unscale
from gradiometer.hooks import current_scaler
from gradiometer.layers import Parameters
from gradiometer.norms import Meter
from gradiometer.own_clipping import OwnClip, OwnClipping
from gradiometer.policy.base import Layout, Observation, State
from gradiometer.policy.build import build_pipeline
from gradiometer.policy.kinds import NonFiniteSpec
from gradiometer.policy.pipeline import Outcome, observe
from gradiometer.policy.spec import PolicySpec
from gradiometer.rounds import Rounds, Watched
from gradiometer.shards import gradients_of
from gradiometer.transfer import bring
from gradiometer.updates import Updates

__all__ = ["Changed", "NonFiniteGradientError", "Stepper", "Taken"]


class NonFiniteGradientError(RuntimeError):
    """The policy's ``nonfinite`` stage was told to stop the job; the message says what became of the bad steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """One step as it was observed and decided; tensors are on the gradients' device."""

    step: int
    optimizer: int
    outcome: Outcome
    clamped: Clamped | None = None
    skip: Tensor | None = None
    """Whether the optimizer will not move, with a GradScaler's own verdict in it."""
    consecutive: Tensor | None = None
    loss_scale: Tensor | None = None
    learning_rate: float | Tensor
    by_scaler: bool = False
    own: tuple[OwnClip, ...] = ()
    """What the loop's own clipping had done to the gradients, oldest first."""
    policies: tuple[str, ...] = ()
    """Names of the stages whose decisions the outcome holds."""

    @property
    def after(self) -> Observation | None:
        """Norms of what the optimizer is given; None as in :class:`~gradiometer.policy.pipeline.Outcome`."""
        return self.outcome.after if self.clamped is None else self.clamped.after


@dataclass(frozen=True, kw_only=True, slots=True)
class Changed:
    """What a change of the policy has done; each name is that of a stage."""

    kept: tuple[str, ...]
    """Those that go on with the memory they had."""
    anew: tuple[str, ...]
    """Those that begin with none."""


class Stepper:
    """The step path of one agent; ``step`` is the number of the next step."""

    def __init__(
        self,
        parameters: Parameters,
        optimizers: Sequence[Optimizer],
        spec: PolicySpec | None,
        meter: Meter,
        *,
        together: bool,
    ) -> None:
        self.layout = Layout(names=parameters.names, layers=parameters.layers, device=meter.device)
        self.pipeline = pipeline = None if spec is None else build_pipeline(spec, self.layout)
        self.spec, self.step = spec, 0
        """The policy in force, and the number of the next step."""
        self.base = 0
        """What of :attr:`step` is of a checkpoint, and not of steps taken since attach."""
        self.notices: list[tuple[str, str]] = []
        """Kind and message of what should be told the user, to be taken by whoever records."""
        self._rounds = Rounds(parameters, optimizers, together=together)
        self._meter = meter
        self.own = OwnClipping(parameters, self._rounds, meter.device, self.notices, policy_clips=_clips(spec))
        self._states = pipeline.init() if pipeline else {}
        self._limit, self._guardian, self._excuse = _raise_limit(spec)
        self._undo: dict[int, Undo] = {}
        self.updates: Updates | None = None
        """Shown every step's gradients before they are changed; it raises nothing."""

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

    def change(self, spec: PolicySpec | None) -> Changed:
        """Put another policy in force from the next step on; None observes only.

        A stage that keeps its name, its kind and the shape of its memory goes on with that, whatever became of its
        settings; others begin anew, and count their steps from the next. Only where :meth:`begins_round`. If it raises,
        as :func:`~gradiometer.policy.build.build_pipeline` does, nothing has been changed.
        """
        pipeline = None if spec is None else build_pipeline(spec, self.layout)
        states = pipeline.init() if pipeline is not None else {}
        kept = {name for name in states if self._goes_on(name, spec, states[name])}
        if pipeline is not None:
            old = self.pipeline.born if self.pipeline is not None else {}
            pipeline.born.update({name: old[name] if name in kept else self.step for name in states})
        self._states = {name: self._states[name] if name in kept else state for name, state in states.items()}
        self.pipeline, self.spec = pipeline, spec
        self._limit, self._guardian, self._excuse = _raise_limit(spec)
        self.own.policy_changed(clips=_clips(spec))
        return Changed(
            kept=tuple(name for name in states if name in kept),
            anew=tuple(name for name in states if name not in kept),
        )

    def _goes_on(self, name: str, spec: PolicySpec | None, fresh: State) -> bool:
        """Tell whether the stage of that name goes on with what it remembers."""
        old = self._states.get(name)
        kinds = [{stage.name: stage.kind for stage in each.pipeline} if each else {} for each in (self.spec, spec)]
        if old is None or kinds[0].get(name) != kinds[1].get(name) or old.keys() != fresh.keys():
            return False
        return all(old[key].shape == fresh[key].shape and old[key].dtype == fresh[key].dtype for key in fresh)

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
            gradients = gradients_of(watched)
            observation = observe(self._meter(gradients))
            if self.updates is not None:
                self.updates.look(index, watched, gradients, observation.norms)
            if self.pipeline is not None:
                _, self._states = self.pipeline.decide(self._states, observation, self.step)
        self._rounds.current = None
        return self._taken(index, Outcome(before=observation), by_scaler=True, own=own)

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

    def check(self, scalars: Mapping[str, float]) -> None:
        """Raise NonFiniteGradientError if the newest row that reached the host says that the policy wants it."""
        consecutive = scalars.get("consecutive", 0.0)
        if self._limit is not None and consecutive >= self._limit:
            raise NonFiniteGradientError(
                f"gradients were NaN or Inf in {consecutive:g} step(s) in a row, up to step {scalars['step']:g}; "
                f"policy {self._guardian!r} allows {self._limit - 1}. {self._excuse}"
            )

    def state_dict(self) -> dict[str, Any]:
        policy = {name: {key: t.detach().cpu().clone() for key, t in s.items()} for name, s in self._states.items()}
        return {"version": 1, "step": self.step, "policy": policy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; raises ValueError, having changed nothing, if the state is of another policy."""
        if state.get("version") != 1:
            raise ValueError(f"agent state has version {state.get('version')!r}, expected 1")
        expected = {name: set(tensors) for name, tensors in self._states.items()}
        found = {name: set(tensors) for name, tensors in state["policy"].items()}
        if found != expected:
            raise ValueError(
                f"agent state is of a policy with {found}, this agent has {expected}: load it before changing"
            )
        self._states = {
            name: {key: tensor.to(self._states[name][key]) for key, tensor in tensors.items()}
            for name, tensors in state["policy"].items()
        }
        step = int(state["step"])
        self.base += step - self.step
        self.step = step

    @contextmanager
    def _in_phase(self, index: int, *, again: bool = False) -> Iterator[None]:
        """Take part in the step's all-reduces even if this rank fails before them: the other ranks are in them."""
        calls = self._meter.calls
        try:
            yield
        except Exception:
            if self._meter.calls == calls and not self._rounds.awaits(index):
                if not again and self.updates is not None and self.updates.step != self.step:
                    self.updates.begin(self.step, index)
                self._meter.abstain()
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
        watched = self._rounds.union(members)
        updates = None if again else self.updates
        if updates is not None:
            updates.begin(self.step, index)
        gradients = gradients_of(watched)
        norms = self._meter(gradients)
        observation = observe(norms if scale is None else norms / bring(scale, norms.device))
        outcome, states = Outcome(before=observation), self._states
        if self.pipeline is not None:
            outcome, states = self.pipeline.decide(self._states, observation, self.step)
        if updates is not None:
            updates.look(index, watched, gradients, observation.norms)
        clamped = self._act(index, members, watched, outcome, scale)
        if again:
            return None
        self._states = states
        skip = outcome.skip
        if found_inf is not None:
            stopped = bring(found_inf, norms.device) > 0
            skip = stopped if skip is None else skip | stopped
        return self._taken(index, outcome, clamped=clamped, skip=skip, scale=scale, own=own)

    def _act(
        self, index: int, members: list[int], watched: Watched, outcome: Outcome, scale: Tensor | None
    ) -> Clamped | None:
        if self.pipeline is None and len(members) == 1:
            return None
        kernel = outcome.coefficient is not None and outcome.coefficient.dim() == 0 and outcome.clamp is None
        scaled = not (kernel and all(takes_grad_scale(self._rounds.optimizers[member]) for member in members))
        unscaled = False
        if outcome.clamp is not None and scale is not None:
            unscaled = True
            unscale(watched, scale)
        clamped = change_gradients(watched, outcome, self._meter, multiply=scaled)
        self._rounds.open(members, outcome, scaled=scaled, unscaled=unscaled)
        self._prepare(index)
        return clamped

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
        clamped: Clamped | None = None,
        skip: Tensor | None = None,
        scale: Tensor | None = None,
        by_scaler: bool = False,
        own: tuple[OwnClip, ...] = (),
    ) -> Taken:
        scaler = current_scaler()
        scale = scale if scaler is None else scaler._get_scale_async()
        state = self._states.get(self._guardian, {})
        taken = Taken(
            step=self.step,
            optimizer=index,
            outcome=outcome,
            clamped=clamped,
            skip=skip,
            consecutive=state.get("consecutive"),
            loss_scale=scale,
            learning_rate=self._rounds.optimizers[index].param_groups[0]["lr"],
            by_scaler=by_scaler,
            own=own,
            policies=() if self.pipeline is None else self.pipeline.names,
        )
        self.step += 1
        return taken


def _clips(spec: PolicySpec | None) -> bool:
    """Tell whether a policy does more than to look after gradients that are not finite."""
    return spec is not None and any(not isinstance(stage, NonFiniteSpec) for stage in spec.pipeline)


def _raise_limit(spec: PolicySpec | None) -> tuple[int | None, str, str]:
    """Return after how many non-finite steps in a row to raise, the stage that says so, and what became of them."""
    for stage in spec.pipeline if spec else ():
        if isinstance(stage, NonFiniteSpec):
            became = "They were taken with zeros" if stage.action == "zero" else "No parameter was moved by them"
            return (1 if stage.action == "raise" else stage.max_consecutive), stage.name, became
    return None, "", ""
