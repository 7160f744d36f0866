"""What the policies that learn from norms share: the dtype of their state, what may teach them, and how they scale.

A value that passes :meth:`Lesson.learned` is finite and strictly positive, and small enough for its square to be added
up; nothing else enters a statistic with ``compat: safe``. The reasons are in docs/adr/0009-policies-that-learn.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gradiometer.policy.base import Observation
from gradiometer.policy.global_norm import EPSILON
from gradiometer.policy.units import Units

__all__ = ["EPSILON", "Lesson", "largest", "lesson", "scaled_to", "state_dtype"]


def state_dtype(device: torch.device) -> torch.dtype:
    """Return float64, in which a replay on the host agrees with the live run; float32 where a device lacks it."""
    return torch.float32 if device.type == "mps" else torch.float64


@cache
def largest(dtype: torch.dtype) -> float:
    """Return the largest norm that is taken for finite: 1e5 squares of its double still add up to a number."""
    return math.sqrt(torch.finfo(dtype).max) / 1e4


@dataclass(frozen=True, slots=True)
class Lesson:
    """One step's norms of the units, 0-dim or [U], of the state's dtype, and what may be made of them."""

    norms: Tensor
    usable: Tensor
    """bool: the norm is finite and strictly positive, so a coefficient can be worked out."""
    learned: Tensor
    """bool: usable, in a step whose gradients are all finite and that no earlier stage skips.

    A GradScaler skips what is not all finite, on each rank by itself: the global norm says so on every rank alike.
    """
    rejected: Tensor
    """bool: the unit has a gradient whose norm teaches nothing."""


def lesson(units: Units, observation: Observation, dtype: torch.dtype) -> Lesson:
    """Sort out what one step may teach each of the units."""
    own = units.norms(observation)
    norms = own.to(dtype)
    usable = (norms > 0) & (norms < largest(dtype))  # NaN compares false
    learned = usable if own is observation.total else usable & (observation.total < math.inf)
    if observation.skipped is not None:
        learned = learned & ~observation.skipped
    present = units.present(observation)
    rejected = ~learned if present is None else present & ~learned
    return Lesson(norms, usable, learned, rejected)


def scaled_to(threshold: Tensor, seen: Lesson) -> Tensor:
    """Return min(1, threshold / norm), and 1 where the norm is not usable; ``threshold`` is positive or Inf.

    Without the 1e-6 that references add to the norm: where norms are of that size, it would shrink what is below the
    threshold.
    """
    return torch.where(seen.usable, (threshold / seen.norms).clamp(max=1.0), 1.0)
