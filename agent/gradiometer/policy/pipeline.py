"""A policy bound to a model: stages in order, each seeing the norms as the earlier ones leave them. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import mul, or_

import torch
from torch import Tensor

from gradiometer.norms import total_norm
from gradiometer.policy.base import Decision, Layout, Observation, Policy, State
from gradiometer.policy.global_norm import GlobalNorm
from gradiometer.policy.group_norm import GroupNorm
from gradiometer.policy.nonfinite import NonFinite
from gradiometer.policy.select import select
from gradiometer.policy.spec import AnySpec, GlobalNormSpec, GroupNormSpec, NonFiniteSpec, PolicyError, PolicySpec
from gradiometer.policy.value import Value

__all__ = ["Clamp", "Outcome", "Pipeline", "build_pipeline", "observe"]


@dataclass(frozen=True, slots=True)
class Clamp:
    """The element-wise clamp that the last stage asked for."""

    max_abs: float
    chosen: Sequence[bool]
    slot: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What is to be done to the gradients of one step, and what their norms will be."""

    before: Observation
    after: Observation | None = None
    """Norms once ``coefficient`` and ``zero`` are carried out (a clamp or a skip is not in them); None where they are
    those before, times a 0-dim coefficient or 1."""
    coefficient: Tensor | None = None
    """0-dim for every gradient alike, or [P]; None leaves them as they are."""
    skip: Tensor | None = None
    zero: Tensor | None = None
    clamp: Clamp | None = None
    strengths: tuple[Tensor | None, ...] = ()
    """For each stage, the smallest factor it applied, as in :class:`~gradiometer.policy.base.Decision`."""
    thresholds: tuple[float | Tensor, ...] = ()


def observe(norms: Tensor) -> Observation:
    """Compose the parameters' norms [P] into an observation."""
    return Observation(norms=norms, total=total_norm(norms))


class Pipeline:
    """The stages of one policy. Holds no state: :meth:`decide` is a pure function of what it is given."""

    def __init__(self, stages: Sequence[Policy]) -> None:
        self.stages = tuple(stages)
        self.names = tuple(stage.name for stage in stages)

    def init(self) -> dict[str, State]:
        """Return every stage's first state, by name."""
        return {stage.name: stage.init() for stage in self.stages}

    def decide(self, states: dict[str, State], observation: Observation, step: int) -> tuple[Outcome, dict[str, State]]:
        """Run the stages over one step's observation; return what is to be done and the next states."""
        seen, following, decisions, alike = observation, {}, [], True
        for stage in self.stages:
            decision, following[stage.name] = stage.decide(states[stage.name], seen, step)
            decisions.append(decision)
            alike = alike and _scales_alike(decision)
            if stage is not self.stages[-1] or not alike:
                seen = _after(seen, decision)
        return _outcome(observation, seen, decisions), following


def _outcome(before: Observation, after: Observation, decisions: list[Decision]) -> Outcome:
    last = decisions[-1]
    alike = all(_scales_alike(decision) for decision in decisions)
    return Outcome(
        before=before,
        after=None if alike and last.clamp is None else after,
        coefficient=_fold(mul, [decision.coefficient for decision in decisions]),
        skip=_fold(or_, [decision.skip for decision in decisions]),
        zero=_fold(or_, [decision.zero for decision in decisions]),
        clamp=None if last.clamp is None else Clamp(last.clamp, last.clamp_mask, len(decisions) - 1),
        strengths=tuple(decision.strength for decision in decisions),
        thresholds=tuple(decision.threshold for decision in decisions),
    )


def _scales_alike(decision: Decision) -> bool:
    """Tell whether the decision, but for a skip, is at most one factor for every gradient."""
    return decision.zero is None and (decision.coefficient is None or decision.coefficient.dim() == 0)


def _after(observation: Observation, decision: Decision) -> Observation:
    if decision.zero is not None:
        return observe(torch.where(decision.zero, torch.zeros_like(observation.norms), observation.norms))
    if decision.coefficient is None:
        return observation
    norms = observation.norms * decision.coefficient
    total = observation.total * decision.coefficient if decision.coefficient.dim() == 0 else total_norm(norms)
    return Observation(norms=norms, total=total)


def _fold(operator: Callable[[Tensor, Tensor], Tensor], parts: list[Tensor | None]) -> Tensor | None:
    return reduce(operator, [part for part in parts if part is not None]) if any(p is not None for p in parts) else None


def build_pipeline(spec: PolicySpec, layout: Layout) -> Pipeline:
    """Bind a policy to a model's parameters; raises PolicyError for a pattern that covers none of them."""
    return Pipeline([_build(stage, layout) for stage in spec.pipeline])


def _build(spec: AnySpec, layout: Layout) -> Policy:
    if isinstance(spec, NonFiniteSpec):
        return NonFinite(name=spec.name, layout=layout, zero=spec.action == "zero")
    try:
        chosen = select(layout.names, spec.match, spec.exclude)
    except ValueError as error:
        raise PolicyError(f"policy {spec.name}: {error}") from error
    if isinstance(spec, GlobalNormSpec):
        return GlobalNorm(name=spec.name, layout=layout, max_norm=spec.max_norm, chosen=chosen)
    if isinstance(spec, GroupNormSpec):
        return GroupNorm(name=spec.name, layout=layout, max_norm=spec.max_norm, scope=spec.scope, chosen=chosen)
    return Value(name=spec.name, layout=layout, max_abs=spec.max_abs, chosen=chosen)
