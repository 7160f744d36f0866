"""Clip the norm of all gradients together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradiometer.norms import total_norm
from gradiometer.policy.base import Decision, Layout, Observation, State

__all__ = ["EPSILON", "GlobalNorm", "clip_coefficient"]

EPSILON = 1e-6
"""Added to the norm by ``torch.nn.utils.clip_grad_norm_``, and so here."""


def clip_coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """Return min(1, max_norm / (norm + 1e-6)), and 1 where the norm is not finite: scaling cannot mend it."""
    coefficient = (max_norm / (norm + EPSILON)).clamp(max=1.0)
    return torch.where(norm < math.inf, coefficient, 1.0)  # NaN compares false


@dataclass(frozen=True, kw_only=True)
class GlobalNorm:
    """Scale the gradients so that their L2 norm is at most ``max_norm``: ``torch.nn.utils.clip_grad_norm_``.

    Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013. Where ``chosen``
    leaves parameters out, neither do they count in the norm nor are they scaled. Stateless.
    """

    name: str
    layout: Layout
    max_norm: float
    chosen: Sequence[bool]
    _mask: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if not all(self.chosen):
            object.__setattr__(self, "_mask", torch.tensor(self.chosen, device=self.layout.device))

    def init(self) -> State:
        return {}

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        """Decide one coefficient for every gradient, or [P] where some are left out."""
        del step
        if self._mask is None:
            coefficient = strength = clip_coefficient(observation.total, self.max_norm)
        else:
            norm = total_norm(torch.where(self._mask, observation.norms, 0.0))
            strength = clip_coefficient(norm, self.max_norm)
            coefficient = torch.where(self._mask, strength, 1.0)
        return Decision(coefficient=coefficient, strength=strength, threshold=self.max_norm), state
