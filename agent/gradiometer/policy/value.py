"""Clamp every element of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gradiometer.policy.base import Change, Decision, Observation, Piece, State, Weighed
from gradiometer.transfer import bring

__all__ = ["Clamp", "Value"]

ROUNDING = 1e-7
"""What changes anything has a factor of at most 1 less this: float32 shall not round it up to 1."""


@dataclass(frozen=True, kw_only=True)
class Clamp:
    """Clamp the elements of the ``chosen`` gradients to ±``max_abs``. NaN stays NaN."""

    max_abs: float
    chosen: Sequence[bool]
    cut: Sequence[int] = ()

    def weigh(self, pieces: Sequence[Piece], device: torch.device, scale: Tensor | None = None) -> Weighed:
        """Compare the largest element with the bound."""
        gradients = [piece.gradient for piece in pieces]
        largest = _largest(gradients, device)
        largest = largest if scale is None else largest / bring(scale, device)
        factor = (self.max_abs / largest).clamp(max=1 - ROUNDING)
        return Weighed(
            strength=torch.where(largest > self.max_abs, factor, 1.0),
            active=~(largest <= self.max_abs),  # NaN compares false: the others are clamped
            make=partial(self._make, gradients),
        )

    def _make(self, gradients: list[Tensor]) -> None:
        if gradients:
            torch._foreach_clamp_min_(gradients, -self.max_abs)
            torch._foreach_clamp_max_(gradients, self.max_abs)


@dataclass(frozen=True, kw_only=True)
class Value:
    """Clamp each element of the gradients to ±``max_abs``: ``torch.nn.utils.clip_grad_value_``.

    What that does to the norms cannot be known from the norms, so they are measured again after the clamp, which is
    the last thing done to the gradients. NaN stays NaN. Stateless.
    """

    name: str
    change: Change
    max_abs: float

    def init(self) -> State:
        return {}

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        """Ask for the clamp; how strong it was is measured by the one who carries it out."""
        del observation, step
        return Decision(change=self.change, threshold=self.max_abs), state


def _largest(values: list[Tensor], device: torch.device) -> Tensor:
    """Return the largest magnitude of any element, 0-dim. Infinity norms are slow on the CPU, extrema are not."""
    values = [value for value in values if value.numel()]
    if not values:
        return torch.zeros((), device=device)
    if values[0].device.type == "cpu":
        extrema = [extremum for value in values for extremum in torch.aminmax(value)]
    else:
        extrema = list(torch._foreach_norm(values, float("inf")))
    return torch.stack([bring(extremum, device).float() for extremum in extrema]).abs().max()
