"""Clip norms that are spikes: too many standard deviations above their running mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradiometer.policy.base import Decision, Observation, State
from gradiometer.policy.learning import EPSILON, Lesson, lesson, scaled_to, state_dtype
from gradiometer.policy.units import Units

__all__ = ["ZClip"]


@dataclass(frozen=True, kw_only=True)
class ZClip:
    """Cut a norm more than ``z`` deviations S above its running mean M, and every norm at ``max_grad_norm``.

    Kumar, Owen, Chowdhury and Güra, "ZClip: adaptive spike mitigation for LLM pre-training", 2025. With N the norm and
    s = (N - M) / S, a spike is cut to ``clip_factor`` (M + z S / (s / z)), for ``option`` mean to M, for percentile to
    M + z S. Mean and (population) variance are those of the first ``warmup_steps`` raw norms, then running ones, to
    which a spike feeds what it was cut to, or nothing.

    With ``safe`` the warm-up of each unit lasts until so many of its norms were accepted, and S is at least ``floor``
    times M; otherwise it lasts so many steps.

    State, each 0-dim or [U]: ``mean`` and ``variance`` of the state's dtype, ``count`` and ``rejected`` int64.
    """

    name: str
    units: Units
    alpha: float
    z: float
    option: Literal["reciprocal", "mean", "percentile"]
    clip_factor: float
    max_grad_norm: float | None
    warmup_steps: int
    learn_from_spikes: bool
    floor: float
    safe: bool

    def init(self) -> State:
        dtype = state_dtype(self.units.device)
        zeros, counts = self.units.fill(0.0, dtype), self.units.fill(0, torch.int64)
        return {"mean": zeros, "variance": zeros.clone(), "count": counts, "rejected": counts.clone()}

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        """Decide about one step; before the warm-up is over, only ``max_grad_norm`` bounds."""
        seen = lesson(self.units, observation, state["mean"].dtype)
        if step < self.warmup_steps:
            spike, cut = None, torch.full_like(seen.norms, math.inf)
            reach = cut
        elif self.safe:
            spike, cut, reach = self._cut_safely(state, seen.norms)
        else:
            spike, cut, reach = self._cut(state, seen.norms)
        decision = self.units.scale(self._coefficient(self._at_most(cut), seen), self._at_most(reach), observation)
        fed = seen.norms if spike is None else torch.where(spike, cut, seen.norms)
        if self.safe:
            fed = torch.minimum(fed, seen.norms)
        learned = self._learned(seen, spike)
        return decision, self._learn(state, fed, learned, step) | {"rejected": state["rejected"] + seen.rejected}

    def _at_most(self, norms: Tensor) -> Tensor:
        return norms if self.max_grad_norm is None else norms.clamp(max=self.max_grad_norm)

    def _cut(self, state: State, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return where there are spikes and what they are cut to, Inf elsewhere, to the letter; and the threshold.

        That is what a spike is cut to, and elsewhere the norm beyond which it would be one.
        """
        mean, deviation = state["mean"], state["variance"].sqrt()
        limit = mean + self.z * deviation
        if self.option == "percentile":
            cut = limit
            spike = norms > cut
        else:
            score = (norms - mean) / (deviation + EPSILON)
            spike = score > self.z
            cut = mean
            if self.option == "reciprocal":
                cut = (mean + self.z * deviation / (score / self.z)) * self.clip_factor
        return spike, torch.where(spike, cut, math.inf), torch.where(spike, cut, limit)

    def _cut_safely(self, state: State, norms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same with a floor for the deviation, which makes the 1e-6 needless, once there is a mean."""
        mean = state["mean"]
        reach = torch.maximum(state["variance"].sqrt(), mean * self.floor) * self.z
        excess, limit, known = norms - mean, mean + reach, state["count"] >= self.warmup_steps
        spike = (excess > reach) & known
        if self.option == "reciprocal":
            cut = mean + reach * (reach / excess)
            cut = cut if self.clip_factor == 1 else cut * self.clip_factor
        else:
            cut = mean if self.option == "mean" else limit
        shown = torch.where(spike, cut, torch.where(known, limit, math.inf))
        return spike, torch.where(spike, cut, math.inf), shown

    def _coefficient(self, bound: Tensor, seen: Lesson) -> Tensor:
        if self.safe:
            return scaled_to(bound, seen)
        return torch.where(seen.norms > bound, bound / (seen.norms + EPSILON), 1.0)

    def _learned(self, seen: Lesson, spike: Tensor | None) -> Tensor | None:
        """Return which units learn; None for all, which is what the published code does."""
        learned = seen.learned if self.safe else None
        if spike is None or self.learn_from_spikes:
            return learned
        return ~spike if learned is None else learned & ~spike

    def _learn(self, state: State, fed: Tensor, learned: Tensor | None, step: int) -> State:
        """Move mean and variance towards what is fed: evenly in the warm-up (Welford), by 1 - alpha after it."""
        mean, variance, count = state["mean"], state["variance"], state["count"]
        off = fed - mean
        if step < self.warmup_steps or self.safe:
            warming = count < self.warmup_steps
            share = torch.where(warming, 1 / (count + 1).to(mean.dtype), 1 - self.alpha)
            new = mean + off * share
            rest = fed - new
            spread = variance + (rest * torch.where(warming, off, rest) - variance) * share
        else:
            new = self.alpha * mean + (1 - self.alpha) * fed
            spread = self.alpha * variance + (1 - self.alpha) * (fed - new).square()
        if learned is None:
            return {"mean": new, "variance": spread, "count": count + 1}
        return {
            "mean": torch.where(learned, new, mean),
            "variance": torch.where(learned, spread, variance),
            "count": count + learned,
        }
