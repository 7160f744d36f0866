"""Bound each norm by a multiple of its running average."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gradiometer.policy.base import Decision, Observation, State
from gradiometer.policy.learning import EPSILON, lesson, scaled_to, state_dtype
from gradiometer.policy.units import Units

__all__ = ["EmaRatio"]


@dataclass(frozen=True, kw_only=True)
class EmaRatio:
    """Scale each unit's norm n to at most ``ratio`` · e, where e is the running average of what it was scaled to.

    The adaptive clipping of OLMo (Groeneveld et al., "OLMo: accelerating the science of language models", 2024). e
    begins with the norm of the second step; a unit without one is compared with its own norm. As e learns clipped norms
    it grows by (1 - beta)(ratio - 1) a step at most.

    With ``safe``, e begins with the first norm after the first step that may teach, and is at least ``floor``.

    State, each 0-dim or [U]: ``average`` e of the state's dtype, NaN until there is one; ``rejected`` int64.
    """

    name: str
    units: Units
    ratio: float
    beta: float
    floor: float
    safe: bool

    def init(self) -> State:
        dtype = state_dtype(self.units.device)
        return {"average": self.units.fill(math.nan, dtype), "rejected": self.units.fill(0, torch.int64)}

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        """Decide about one step; the first one teaches nothing, as in the published code."""
        seen = lesson(self.units, observation, state["average"].dtype)
        stored, norms = state["average"], seen.norms
        if self.safe:
            own = torch.where(seen.usable, norms, math.inf)
            average = torch.where(stored.isnan(), own, stored).clamp(min=self.floor)
            bound = average * self.ratio
            coefficient = scaled_to(bound, seen)
        else:
            average = norms if step <= 1 else stored
            bound = average * self.ratio
            coefficient = (bound / (norms + EPSILON)).clamp(max=1.0)
        if step > 0:
            moved = torch.lerp(average, norms * coefficient, 1 - self.beta)
            stored = torch.where(seen.learned, moved, stored) if self.safe else moved
        decision = self.units.scale(coefficient, bound, observation)
        return decision, {"average": stored, "rejected": state["rejected"] + seen.rejected}
