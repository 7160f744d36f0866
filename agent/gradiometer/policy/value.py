"""Clamp every element of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradiometer.policy.base import Decision, Layout, Observation, State

__all__ = ["Value"]


@dataclass(frozen=True, kw_only=True)
class Value:
    """Clamp each element of the gradients to ±``max_abs``: ``torch.nn.utils.clip_grad_value_``.

    What that does to the norms cannot be known from the norms, so they are measured again after the clamp, which is
    the last thing done to the gradients. NaN stays NaN. Stateless.
    """

    name: str
    layout: Layout
    max_abs: float
    chosen: Sequence[bool]

    def init(self) -> State:
        return {}

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        """Ask for the clamp; how strong it was is measured by the one who carries it out."""
        del observation, step
        return Decision(clamp=self.max_abs, clamp_mask=self.chosen, threshold=self.max_abs), state
