"""Clip the norm of all gradients together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradiometer.policy.base import Decision, Observation, State
from gradiometer.policy.units import Units

__all__ = ["EPSILON", "GlobalNorm", "clip_coefficient"]

EPSILON = 1e-6
"""Added to the norm by ``torch.nn.utils.clip_grad_norm_``, and so here."""


def clip_coefficient(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """Return min(1, max_norm / (norm + 1e-6)), and 1 where the norm is not finite: scaling cannot mend it."""
    coefficient = (max_norm / (norm + EPSILON)).clamp(max=1.0)
    return torch.where(norm < math.inf, coefficient, 1.0)  # NaN compares false


@dataclass(frozen=True, kw_only=True)
class GlobalNorm:
    """Scale the gradients so that their L2 norm is at most ``max_norm``: ``torch.nn.utils.clip_grad_norm_``.

    Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013. Where the one
    unit leaves parameters out, neither do they count in the norm nor are they scaled. Stateless.
    """

    name: str
    units: Units
    max_norm: float

    def init(self) -> State:
        return {}

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        """Decide one coefficient for every gradient, or [P] where some are left out."""
        del step
        coefficient = clip_coefficient(self.units.norms(observation), self.max_norm)
        return self.units.scale(coefficient, self.max_norm, observation), state
