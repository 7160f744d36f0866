"""Skip steps whose loss or global norm is an outlier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gradiometer.policy.base import Decision, Observation, State
from gradiometer.policy.learning import largest, state_dtype
from gradiometer.policy.units import Units
from gradiometer.policy.window import Window

__all__ = ["MAD_TO_SIGMA", "Skip"]

MAD_TO_SIGMA = 1.482602218505602
"""Standard deviation of a normal distribution in median absolute deviations."""


@dataclass(frozen=True, kw_only=True)
class Skip:
    """Skip a step if a value of :attr:`on`, S of them, lies above its limit.

    The limit is, for ``rule`` sigma (OLMo-core's SkipStepOptimizer), the mean of the last values plus ``factor``
    unbiased standard deviations; for median_mad, their median plus ``factor`` · max(1.4826 MAD, ``floor`` · median);
    for abs, ``factor`` itself. A window holds the values before this step's.

    With ``safe``: a window holds finite values only, and a norm also has to be positive. With sigma, an outlier enters
    as the limit that it exceeded, so that one does not blind the window and many of them shift it, and the deviation
    is at least ``floor`` times the mean's magnitude. A NaN loss is one that was not logged and says nothing; an
    infinite loss, or a norm that is not finite, is always skipped. After ``accept_after`` skips in a row the next step
    is taken if its values are finite. Without ``safe`` every step's raw values enter, NaN among them; but median_mad
    never takes in what is not finite.

    State: ``consecutive`` float32 0-dim, skips in a row up to now; ``rejected`` int64 [S]; ``window`` [S, W] and
    ``count`` [S] of :class:`~gradiometer.policy.window.Window` but for abs.
    """

    name: str
    units: Units
    on: Sequence[Literal["loss", "global_norm"]]
    window: Window | None
    """None for ``rule`` abs."""
    rule: Literal["sigma", "abs", "median_mad"]
    factor: float
    floor: float
    min_history: int
    accept_after: int | None
    safe: bool

    _least: Tensor = field(init=False, repr=False, compare=False)
    """What a value must exceed to teach: 0 for a norm, nothing for a loss; [S]."""
    _may_be_missing: Tensor = field(init=False, repr=False, compare=False)
    """bool [S]: NaN means that there is no value."""

    def __post_init__(self) -> None:
        device, dtype = self.units.device, state_dtype(self.units.device)
        losses = [each == "loss" for each in self.on]
        least = [-math.inf if loss else 0.0 for loss in losses]
        object.__setattr__(self, "_least", torch.tensor(least, dtype=dtype, device=device))
        missing = [loss and self.safe for loss in losses]
        object.__setattr__(self, "_may_be_missing", torch.tensor(missing, device=device))

    def init(self) -> State:
        device = self.units.device
        state = {
            "consecutive": torch.zeros((), device=device),
            "rejected": torch.zeros(len(self.on), dtype=torch.int64, device=device),
        }
        return state if self.window is None else state | self.window.init()

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        """Decide whether to skip one step; the threshold is the limit of the value that exceeds its own the most."""
        del step
        values, limit = self._values(observation), self._limit(state)
        broken, outlier = ~(values < largest(values.dtype)), ~(values <= limit)  # NaN compares false
        missing = None
        if self.safe:
            outlier = outlier | broken
            if "loss" in self.on:  # which may be -Inf, or not there
                missing = values.isnan() & self._may_be_missing
                broken, outlier = (broken | (values == -math.inf)) & ~missing, outlier & ~missing
                outlier = outlier | broken
        skip = outlier.any()
        if self.accept_after is not None:
            skip = skip & ((state["consecutive"] < self.accept_after) | broken.any())
        consecutive = torch.where(skip, state["consecutive"] + 1, 0.0)
        if observation.skipped is not None:
            skip = skip & ~observation.skipped
            consecutive = torch.where(observation.skipped, state["consecutive"], consecutive)
        following = {"consecutive": consecutive} | self._learn(state, values, limit, broken, missing, observation)
        strength = (~skip).to(observation.norms.dtype)
        return Decision(skip=skip, strength=strength, threshold=_nearest(values, limit)), following

    def _values(self, observation: Observation) -> Tensor:
        """Return what is judged, of the state's dtype [S]; a loss that nobody provides is NaN."""
        dtype = self._least.dtype
        norm = self.units.norms(observation).to(dtype)
        if "loss" not in self.on:
            return norm.expand(len(self.on))
        loss = observation.loss
        named = {"global_norm": norm, "loss": torch.full_like(norm, math.nan) if loss is None else loss.to(dtype)}
        return torch.stack([named[each] for each in self.on])

    def _limit(self, state: State) -> Tensor:
        """Return the largest value of each that is no outlier, Inf before there is enough to compare with; [S]."""
        if self.window is None:
            return torch.full_like(self._least, self.factor)
        if self.rule == "sigma":
            middle, deviation = self.window.mean_std(state)
        else:
            middle, deviation = self.window.median_deviation(state)
            deviation = deviation * MAD_TO_SIGMA
        if self.safe or self.rule == "median_mad":
            deviation = torch.maximum(deviation, middle.abs() * self.floor)
        seen = max(self.min_history - 1, 2 if self.safe else 1)
        return torch.where(state["count"] >= seen, middle + self.factor * deviation, math.inf)

    def _learn(
        self,
        state: State,
        values: Tensor,
        limit: Tensor,
        broken: Tensor,
        missing: Tensor | None,
        observation: Observation,
    ) -> State:
        learned = (values > self._least) & ~broken  # a missing value is NaN, which compares false
        if observation.skipped is not None:
            learned = learned & ~observation.skipped
        rejected = ~learned if missing is None else ~(learned | missing)
        following = {"rejected": state["rejected"] + rejected}
        if self.window is None:
            return following
        if self.safe:
            fed = torch.minimum(values, limit) if self.rule == "sigma" else values
            return following | self.window.put(state, fed, learned)
        return following | self.window.put(state, values, None if self.rule == "sigma" else values.isfinite())


def _nearest(values: Tensor, limit: Tensor) -> Tensor:
    """Return the limit of the value that exceeds its own the most; 0-dim."""
    if limit.numel() == 1:
        return limit[0]
    return limit.gather(0, (values / limit).nan_to_num(nan=0.0).argmax(0, keepdim=True)).squeeze(0)
