"""Clip at a percentile of the norms seen so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradiometer.policy.base import Decision, Observation, State
from gradiometer.policy.learning import EPSILON, Lesson, lesson, scaled_to
from gradiometer.policy.units import Units
from gradiometer.policy.window import Window

__all__ = ["Percentile"]


@dataclass(frozen=True, kw_only=True)
class Percentile:
    """AutoClip: scale to at most the ``p``-th percentile of the last ``window.size`` raw norms, this one included.

    Seetharaman, Wichern, Pardo and Le Roux, "AutoClip: adaptive gradient clipping for source separation networks",
    MLSP 2020. The published code keeps an endless list; here it is a window. Feeds raw norms.

    State: ``window`` and ``count`` of :class:`~gradiometer.policy.window.Window`; ``rejected`` int64, 0-dim or [U].
    """

    name: str
    units: Units
    window: Window
    p: float
    min_history: int
    safe: bool

    def init(self) -> State:
        return self.window.init() | {"rejected": self.units.fill(0, torch.int64)}

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        """Decide about one step: no threshold (Inf) until ``min_history`` norms have been seen."""
        del step
        seen = lesson(self.units, observation, self.window.dtype)
        following = self.window.put(state, seen.norms, seen.learned if self.safe else None)
        threshold = self._threshold(following)
        decision = self.units.scale(self._coefficient(threshold, seen), threshold, observation)
        return decision, following | {"rejected": state["rejected"] + seen.rejected}

    def _threshold(self, state: State) -> Tensor:
        found = self.window.quantile(state, self.p / 100)
        if not self.safe:
            found = torch.where(state["window"].isnan().any(-1), torch.nan, found)
        return torch.where(state["count"] >= self.min_history, found, torch.inf)

    def _coefficient(self, threshold: Tensor, seen: Lesson) -> Tensor:
        if self.safe:
            return scaled_to(threshold, seen)
        return (threshold / (seen.norms + EPSILON)).clamp(max=1.0)
