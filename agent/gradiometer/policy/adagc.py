"""Bound each norm by its own running average."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradiometer.norms import total_norm
from gradiometer.policy.base import Decision, Observation, State
from gradiometer.policy.learning import EPSILON, Lesson, largest, lesson, scaled_to, state_dtype
from gradiometer.policy.units import Units

__all__ = ["AdaGC"]


@dataclass(frozen=True, kw_only=True)
class AdaGC:
    """Scale each unit's norm to at most ``ratio`` times the running average of what it was scaled to.

    Wang, Li, Chen et al., "AdaGC: improving training stability for large language model pretraining", 2025. In the
    first ``warmup_steps`` steps all units together are scaled to ``warmup_max_norm`` instead, and the average is the
    least norm that came of it. As it learns clipped norms it grows by (1 - beta)(ratio - 1) a step at most: doubling
    takes 1733 steps at the defaults.

    With ``safe`` it is at least ``floor``, and a unit whose first norm comes after the warm-up is scaled to
    ``warmup_max_norm`` in that step.

    State, each 0-dim or [U]: ``average`` of the state's dtype, Inf until there is one; ``rejected`` int64.
    """

    name: str
    units: Units
    ratio: float
    beta: float
    warmup_steps: int
    warmup_max_norm: float
    floor: float
    safe: bool

    def init(self) -> State:
        dtype = state_dtype(self.units.device)
        return {"average": self.units.fill(math.inf, dtype), "rejected": self.units.fill(0, torch.int64)}

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        """Decide about one step: one coefficient for all in the warm-up, one for each unit after it."""
        seen = lesson(self.units, observation, state["average"].dtype)
        take = self._warm_up if step < self.warmup_steps else self._safely if self.safe else self._to_the_letter
        decision, average = take(state["average"], seen, observation)
        return decision, {"average": average, "rejected": state["rejected"] + seen.rejected}

    def _warm_up(self, average: Tensor, seen: Lesson, observation: Observation) -> tuple[Decision, Tensor]:
        total = seen.norms if seen.norms.dim() == 0 else total_norm(seen.norms)
        coefficient = (self.warmup_max_norm / (total + EPSILON)).clamp(max=1.0)
        if self.safe:
            usable = total < largest(total.dtype)
            coefficient = torch.where(usable, coefficient, 1.0)
            least = torch.minimum(average, seen.norms * coefficient)
            average = torch.where(seen.learned & usable, least, average)
        else:
            average = torch.minimum(average, seen.norms * coefficient)
        return self.units.scale_together(coefficient, self.warmup_max_norm, observation), average

    def _safely(self, average: Tensor, seen: Lesson, observation: Observation) -> tuple[Decision, Tensor]:
        known = average < math.inf
        floored = average.clamp(min=self.floor)
        bound = torch.where(known, floored * self.ratio, self.warmup_max_norm)
        fed = torch.minimum(seen.norms, bound)
        learned = torch.where(known, torch.lerp(fed, floored, self.beta), fed)
        decision = self.units.scale(scaled_to(bound, seen), bound, observation)
        return decision, torch.where(seen.learned, learned, average)

    def _to_the_letter(self, average: Tensor, seen: Lesson, observation: Observation) -> tuple[Decision, Tensor]:
        bound = average * self.ratio
        coefficient = torch.where(seen.norms > bound, bound / (seen.norms + EPSILON), 1.0)
        average = self.beta * average + (1 - self.beta) * torch.minimum(seen.norms, bound)
        return self.units.scale(coefficient, bound, observation), average
