"""What to do with a step whose gradients hold NaN or Inf."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from gradiometer.policy.base import Decision, Layout, Observation, State

__all__ = ["NonFinite"]


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """Skip the step, or zero the tensors that are not finite, as GradScaler, Megatron and torchtitan do.

    State: ``consecutive``, float32 0-dim, the number of non-finite steps in a row up to now.
    """

    name: str
    layout: Layout
    zero: bool = False

    def init(self) -> State:
        return {"consecutive": torch.zeros((), device=self.layout.device)}

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        """Ask for a skip (or zeros) when the global norm is not finite; the threshold is Inf by nature."""
        del step
        bad = ~(observation.total < math.inf)  # NaN compares false
        consecutive = torch.where(bad, state["consecutive"] + 1, 0.0)
        decision = Decision(
            skip=None if self.zero else bad,
            zero=~(observation.norms < math.inf) if self.zero else None,
            threshold=math.inf,
        )
        return decision, {"consecutive": consecutive}
