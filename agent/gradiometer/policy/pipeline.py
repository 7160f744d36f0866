"""A policy bound to a model: stages in order, each seeing the norms as the earlier ones leave them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Clamp:
    """The element-wise clamp that the last stage asked for."""

    max_abs: float
    chosen: Sequence[bool]
    slot: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What is to be done to the gradients of one step, and what their norms will be."""

    before: Observation
    after: Observation
    """Norms once ``coefficient`` and ``zero`` are carried out; a clamp or a skip is not in them."""
    coefficient: Tensor | None = None
    """0-dim for every gradient alike, or [P]; None leaves them as they are."""
    skip: Tensor | None = None
    zero: Tensor | None = None
    clamp: Clamp | None = None
    strengths: tuple[Tensor, ...] = ()
    """For each stage, the smallest factor it applied, 0-dim."""
    thresholds: tuple[float | Tensor, ...] = ()


def observe(norms: Tensor) -> Observation:
    """Compose the parameters' norms [P] into an observation."""
    total = total_norm(norms)
    return Observation(norms=norms, total=total, finite=torch.isfinite(total))


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
        outcome, following = Outcome(before=observation, after=observation), {}
        for slot, stage in enumerate(self.stages):
            decision, following[stage.name] = stage.decide(states[stage.name], outcome.after, step)
            outcome = _add(outcome, decision, slot)
        return outcome, following


def _add(outcome: Outcome, decision: Decision, slot: int) -> Outcome:
    clamp = outcome.clamp
    if decision.clamp is not None:
        clamp = Clamp(max_abs=decision.clamp, chosen=decision.clamp_mask, slot=slot)
    return replace(
        outcome,
        after=_after(outcome.after, decision),
        coefficient=_product(outcome.coefficient, decision.coefficient),
        skip=_either(outcome.skip, decision.skip),
        zero=_either(outcome.zero, decision.zero),
        clamp=clamp,
        strengths=(*outcome.strengths, decision.strength),
        thresholds=(*outcome.thresholds, decision.threshold),
    )


def _after(observation: Observation, decision: Decision) -> Observation:
    if decision.zero is not None:
        return observe(torch.where(decision.zero, torch.zeros_like(observation.norms), observation.norms))
    if decision.coefficient is None:
        return observation
    norms = observation.norms * decision.coefficient
    uniform = decision.coefficient.dim() == 0
    total = observation.total * decision.coefficient if uniform else total_norm(norms)
    return replace(observation, norms=norms, total=total)


def _product(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return right if left is None else left if right is None else left * right


def _either(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    return right if left is None else left if right is None else left | right


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
