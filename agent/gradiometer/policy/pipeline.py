"""A policy bound to a model: stages in order, each seeing the norms as the earlier ones leave them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import mul, or_

import torch
from torch import Tensor

from gradiometer.norms import total_norm
from gradiometer.policy.base import Change, Decision, Observation, Policy, State

__all__ = ["Outcome", "Pipeline", "Shadow", "observe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What is to be done to the gradients of one step, and what their norms will be."""

    before: Observation
    after: Observation | None = None
    """Norms once ``coefficient`` and ``zero`` are carried out (a change of elements or a skip is not in them); None
    where they are those before, times a 0-dim coefficient or 1."""
    coefficient: Tensor | None = None
    """0-dim for every gradient alike, or [P]; None leaves them as they are."""
    skip: Tensor | None = None
    zero: Tensor | None = None
    change: Change | None = None
    """What the last stage does to elements, after all else."""
    decisions: tuple[Decision, ...] = ()
    """What each stage wanted."""

    def with_strength(self, strength: Tensor) -> Outcome:
        """Return it with the smallest factor that :attr:`change` turned out to have applied."""
        *earlier, last = self.decisions
        return replace(self, decisions=(*earlier, replace(last, strength=strength)))


def observe(norms: Tensor, loss: Tensor | None = None) -> Observation:
    """Compose the parameters' norms [P] into an observation."""
    return Observation(norms=norms, total=total_norm(norms), loss=loss)


class _Stages:
    """Policies bound to one layout. They hold no state: deciding is a pure function of what it is given."""

    def __init__(self, stages: Sequence[Policy], born: Mapping[str, int] | None = None) -> None:
        self.stages = tuple(stages)
        self.names = tuple(stage.name for stage in stages)
        self.born = dict.fromkeys(self.names, 0) | dict(born or {})
        """Step at which each stage came into force: it counts its own from there."""

    def init(self) -> dict[str, State]:
        """Return every stage's first state, by name."""
        return {stage.name: stage.init() for stage in self.stages}


class Pipeline(_Stages):
    """The stages of a policy that act."""

    def decide(self, states: dict[str, State], observation: Observation, step: int) -> tuple[Outcome, dict[str, State]]:
        """Run the stages over one step's observation; return what is to be done and the next states."""
        seen, following, decisions, alike = observation, {}, [], True
        for stage in self.stages:
            decision, following[stage.name] = stage.decide(states[stage.name], seen, step - self.born[stage.name])
            decisions.append(decision)
            alike = alike and _scales_alike(decision)
            if stage is not self.stages[-1] or not alike:
                seen = _after(seen, decision)
        return _outcome(observation, seen, decisions), following


class Shadow(_Stages):
    """The policies that decide, are recorded, and never act. Each sees the gradients as they were measured."""

    def decide(
        self, states: dict[str, State], observation: Observation, step: int
    ) -> tuple[tuple[Decision, ...], dict[str, State]]:
        """Ask every policy about one step; return what each would do and the next states."""
        asked = {stage.name: self.ask(stage, states, observation, step) for stage in self.stages}
        return tuple(decision for decision, _ in asked.values()), {name: state for name, (_, state) in asked.items()}

    def ask(
        self, stage: Policy, states: dict[str, State], observation: Observation, step: int
    ) -> tuple[Decision, State]:
        """Ask one of the policies about one step: each decides by itself, so one that fails stops no other."""
        return stage.decide(states[stage.name], observation, step - self.born[stage.name])


def _outcome(before: Observation, after: Observation, decisions: list[Decision]) -> Outcome:
    last = decisions[-1]
    alike = all(_scales_alike(decision) for decision in decisions)
    return Outcome(
        before=before,
        after=None if alike and last.change is None else after,
        coefficient=_fold(mul, [decision.coefficient for decision in decisions]),
        skip=_fold(or_, [decision.skip for decision in decisions]),
        zero=_fold(or_, [decision.zero for decision in decisions]),
        change=last.change,
        decisions=tuple(decisions),
    )


def _scales_alike(decision: Decision) -> bool:
    """Tell whether the decision, but for a skip, is at most one factor for every gradient."""
    return decision.zero is None and (decision.coefficient is None or decision.coefficient.dim() == 0)


def _after(observation: Observation, decision: Decision) -> Observation:
    """Return what the next stage sees."""
    skipped = _fold(or_, [observation.skipped, decision.skip])
    norms, total, coefficient = observation.norms, observation.total, decision.coefficient
    if decision.zero is not None:
        norms = torch.where(decision.zero, torch.zeros_like(norms), norms)
        total = total_norm(norms)
    elif coefficient is not None:
        norms = norms * coefficient
        total = total * coefficient if coefficient.dim() == 0 else total_norm(norms)
    return Observation(norms=norms, total=total, loss=observation.loss, skipped=skipped)


def _fold(operator: Callable[[Tensor, Tensor], Tensor], parts: Sequence[Tensor | None]) -> Tensor | None:
    folded: Tensor | None = None
    for part in parts:
        if part is not None:
            folded = part if folded is None else operator(folded, part)
    return folded
