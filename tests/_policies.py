"""A policy for the tests of what a policy is given: it skips steps whose loss, or norm, is above a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gradiometer.policy import build, kinds
from gradiometer.policy.base import Decision, Layout, Observation, Policy, State

__all__ = ["SkipAbove", "use_skip_by_threshold"]


@dataclass(frozen=True, kw_only=True)
class SkipAbove:
    """Skip a step whose loss or global norm is above ``threshold``; NaN is not above."""

    name: str
    threshold: float
    on: tuple[str, ...]
    device: torch.device

    def init(self) -> State:
        return {"consecutive": torch.zeros((), device=self.device)}

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        del step
        skip = torch.zeros((), dtype=torch.bool, device=self.device)
        if "loss" in self.on:
            assert observation.loss is not None
            skip = skip | (observation.loss > self.threshold)
        if "global_norm" in self.on:
            skip = skip | (observation.total > self.threshold)
        consecutive = torch.where(skip, state["consecutive"] + 1, 0.0)
        decision = Decision(skip=skip, strength=torch.where(skip, 0.0, 1.0), threshold=self.threshold)
        return decision, {"consecutive": consecutive}


def _bind(spec: Any, layout: Layout, chosen: tuple[bool, ...]) -> Policy:
    del chosen
    return SkipAbove(name=spec.name, threshold=spec.threshold, on=spec.on, device=layout.device)


def use_skip_by_threshold() -> None:
    """Let ``skip`` of rule ``abs`` be the above, unless there is one already."""
    build._BUILDERS.setdefault(kinds.SkipSpec, _bind)
