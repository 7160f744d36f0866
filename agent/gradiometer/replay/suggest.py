"""Propose a policy from what a run has recorded, with the reasons: robust statistics, NumPy alone.

Norms are skewed, and a spike is what is looked for: so medians, and deviations of logarithms. Hampel, "The influence
curve and its role in robust estimation", JASA 1974, for the median absolute deviation as a scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradiometer.insight import compose
from gradiometer.replay.history import SPIKE, SPIKE_WINDOW, rolling_median
from gradiometer.run import Run

__all__ = ["WANTED", "Findings", "Proposal", "describe", "find", "propose"]

WANTED = 200
"""Finite steps below which nothing is proposed: fewer do not tell a tail from a spike."""
SETTLED, AHEAD, LONGEST = 1.5, 10, 0.25
"""Warm-up ends with the first block of steps whose median is within this factor of the median of so many blocks that
follow; it is at most this share of the run."""
DRIFT = 2.0
"""A norm drifts if the medians of tenths of the run differ by this factor."""
HEAVY = 0.6
"""Robust deviation of the logarithms beyond which tails are heavy: one step in six is 1.8 times the median."""
DOMINATES = 0.5
"""A layer dominates spikes if it has more than this share of the squared norm in them, and half of that elsewhere."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What the norms of a run say; unknown numbers are NaN."""

    steps: int
    finite: int
    nonfinite: int
    longest_nonfinite: int
    """Most non-finite steps in a row, before :attr:`lost_at`."""
    lost_at: int | None
    """The step from which on all are non-finite, and whose gradients the optimizer used: weights were lost there."""
    warmup: int
    """Steps at the start that are left out of all below."""
    median: float
    quantiles: dict[str, float]
    """p90, p99, p99.9 and max."""
    deviation: float
    """1.4826 times the median absolute deviation of the logarithms, each tenth of the run about its own median."""
    spikes: tuple[int, ...]
    """Step numbers."""
    highest: float
    """The highest spike, in rolling medians."""
    drift: float
    """Largest median of a tenth of the run over the smallest."""
    rises: bool
    layer: str | None
    """The layer that dominates spikes."""
    layer_share: float
    calm_quantile: float
    """99.5th percentile of the norms that are no spikes."""
    layer_quantile: float
    """The same for :attr:`layer`."""

    @property
    def enough(self) -> bool:
        """Whether there are steps enough to propose anything."""
        return self.finite - self.warmup >= WANTED


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """A policy as one would write it, and why."""

    policy: dict[str, Any]
    reasons: tuple[str, ...]


def find(run: Run) -> Findings:
    """Work out what the norms of a run say."""
    norms = run.grad_norm_preclip
    finite = np.isfinite(norms) & (norms > 0)
    warmup = _warmup(norms, finite)
    calm_from = np.arange(len(norms)) >= warmup
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = norms / rolling_median(norms)
    spiking = finite & calm_from & (ratios >= SPIKE)
    values = norms[finite & calm_from]
    layer, share, quantile = _dominating(run, spiking, finite & calm_from & ~spiking)
    levels = _levels(values, 10)
    lost = _lost(run)
    return Findings(
        steps=len(norms),
        finite=int(finite.sum()),
        nonfinite=int(run.nonfinite.sum()),
        longest_nonfinite=_longest(run.nonfinite[:lost]),
        lost_at=None if lost is None else int(run.steps[lost]),
        warmup=warmup,
        median=_quantile(values, 50),
        quantiles={f"p{p:g}": _quantile(values, p) for p in (90, 99, 99.9)} | {"max": _quantile(values, 100)},
        deviation=_deviation(values),
        spikes=tuple(run.steps[spiking].tolist()),
        highest=float(ratios[spiking].max()) if spiking.any() else math.nan,
        drift=float(levels.max() / levels.min()) if len(levels) else math.nan,
        rises=bool(len(levels) and levels[-1] > levels[0]),
        layer=layer,
        layer_share=share,
        calm_quantile=_quantile(norms[finite & calm_from & ~spiking], 99.5),
        layer_quantile=quantile,
    )


def propose(found: Findings, parameters: Mapping[str, Sequence[str]]) -> Proposal | None:
    """Propose a policy; None where there are too few steps. ``parameters`` are the names of those of each layer."""
    if not found.enough:
        return None
    limit = max(found.calm_quantile, found.median * math.exp(3 * found.deviation))
    limit = min(limit, SPIKE * found.median) if found.spikes else limit
    max_norm = _round_up(limit)
    bad: dict[str, Any] = {"action": "skip", "max_consecutive": max(10, 2 * found.longest_nonfinite)}
    pipeline: list[dict[str, Any]] = [{"nonfinite": bad}]
    reasons = [_bad_steps(found, bad["max_consecutive"])]
    drifts, heavy = found.drift >= DRIFT, found.deviation >= HEAVY
    if found.layer is not None and not drifts:
        bound = _round_up(found.layer_quantile)
        pipeline.append({"group_norm": {"max_norm": bound, "scope": "layer", "match": list(parameters[found.layer])}})
        reasons.append(
            f"group_norm: layer {found.layer} has {found.layer_share:.0%} of the squared norm in spikes, far more than "
            f"in other steps: it is bounded by itself, at {bound:g}, so that its spikes do not shrink the others"
        )
    if drifts and heavy:
        pipeline.append({"percentile": {"p": 98.0, "window": 1000, "min_history": 100}})
        reasons.append(
            f"percentile: {_drifted(found)}, so a fixed max_norm would be wrong before long, and its tails are heavy "
            f"(deviation {found.deviation:.2f} in logarithms), so a bound in standard deviations would be too"
        )
    elif drifts:
        pipeline.append({"zclip": {"z": 3.0, "max_grad_norm": None}})
        reasons.append(f"zclip: {_drifted(found)}, so a fixed max_norm would be wrong before long; it follows the norm")
    else:
        pipeline.append({"global_norm": {"max_norm": max_norm}})
        reasons.append(
            f"global_norm: the norm keeps its level (tenths of the run differ by a factor of {found.drift:.2f}), so a "
            f"fixed max_norm will do: {max_norm:g} is {max_norm / found.median:.2f} times the median, above all but "
            "the outermost of the ordinary steps"
        )
    reasons.append(_published(found))
    return Proposal(policy={"version": 1, "pipeline": pipeline}, reasons=tuple(reasons))


def _warmup(norms: Floats, finite: npt.NDArray[np.bool_]) -> int:
    places = np.flatnonzero(finite)
    size = max(10, len(places) // 100)
    blocks = len(places) // size
    if blocks < AHEAD + 2:
        return 0
    medians = np.median(norms[places[: blocks * size]].reshape(blocks, size), axis=1)
    for block in range(int(blocks * LONGEST)):
        following = float(np.median(medians[block + 1 : block + 1 + AHEAD]))
        if max(medians[block] / following, following / medians[block]) <= SETTLED:
            return int(places[block * size]) if block else 0
    return int(places[int(blocks * LONGEST) * size])


def _levels(values: Floats, parts: int) -> Floats:
    if len(values) < parts * 10:
        return np.empty(0)
    return np.array([np.median(part) for part in np.array_split(values, parts)])


def _deviation(values: Floats) -> float:
    """Return the robust deviation of the logarithms about the median of their tenth of the run: drift is none."""
    if len(values) < 10:
        return math.nan
    parts = [np.log(part) for part in np.array_split(values, 10)]
    return float(1.4826 * np.median(np.abs(np.concatenate([part - np.median(part) for part in parts]))))


def _dominating(
    run: Run, spiking: npt.NDArray[np.bool_], calm: npt.NDArray[np.bool_]
) -> tuple[str | None, float, float]:
    """Return the layer that dominates spikes, its share of the squared norm in them, and its usual largest norm."""
    if not spiking.any() or not calm.any() or len(run.layers) < 2:
        return None, math.nan, math.nan

    def layer_norms(chosen: npt.NDArray[np.bool_]) -> Floats:
        norms = run.rows["parameters"][chosen, 0].astype(np.float32)
        return compose(norms, run.manifest.layer_index, len(run.layers))

    def shares(norms: Floats) -> Floats:
        squares = np.square(norms)
        return np.asarray(np.median(squares / squares.sum(axis=1, keepdims=True), axis=0))

    usual = layer_norms(calm)
    high, low = shares(layer_norms(spiking)), shares(usual)
    index = int(high.argmax())
    if high[index] < DOMINATES or low[index] > high[index] / 2:
        return None, math.nan, math.nan
    return run.layers[index], float(high[index]), _quantile(usual[:, index], 99.5)


def _longest(bad: npt.NDArray[np.bool_]) -> int:
    longest = run = 0
    for each in bad.tolist():
        run = run + 1 if each else 0
        longest = max(longest, run)
    return longest


def _lost(run: Run) -> int | None:
    """Return the place of the step that made all that follow non-finite: its gradients were used, and so are theirs."""
    finite = np.flatnonzero(~run.nonfinite)
    first = int(finite[-1]) + 1 if len(finite) else 0
    used = run.nonfinite[first:] & ~run.skipped[first:]
    return first if used.any() and len(used) > 1 and used[0] else None


def _quantile(values: Floats, percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else math.nan


def _round_up(value: float) -> float:
    """Return the least number of two digits that is not below ``value``."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit - 1e-9) * unit:.6g}")


def _bad_steps(found: Findings, allowed: int) -> str:
    if not found.nonfinite:
        return (
            f"nonfinite: no step was NaN or Inf; should one come, clipping cannot mend it and skipping does; {allowed} "
            "in a row stop the job"
        )
    if found.lost_at is not None:
        return (
            f"nonfinite: step {found.lost_at} was NaN or Inf and the optimizer used it; the weights were lost, and all "
            f"steps since are NaN or Inf. Such a step is skipped, and {allowed} in a row stop the job"
        )
    return (
        f"nonfinite: {_count(found.nonfinite, 'step')} {'was' if found.nonfinite == 1 else 'were'} NaN or Inf, at most "
        f"{found.longest_nonfinite} in a row: such are skipped, and {allowed} in a row stop the job"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _drifted(found: Findings) -> str:
    return f"the norm {'rises' if found.rises else 'falls'}: medians of tenths of the run differ {found.drift:.2f}-fold"


def _published(found: Findings) -> str:
    place = "above nearly all" if found.quantiles["p99"] < 1 else "among" if found.median < 2 else "below most of"
    said = f"published recipes mostly take max_norm 1.0, which is {place} the norms of this run"
    return f"{said} (median {found.median:.3g})"


def describe(found: Findings) -> list[str]:
    """Say what was found, a line each."""
    bad = f"{found.nonfinite} of them non-finite" if found.nonfinite else "none of them non-finite"
    if found.lost_at is not None:
        bad += f", all from step {found.lost_at} on: the optimizer used that one, and the weights were lost"
    elif found.nonfinite:
        bad += f" (at most {found.longest_nonfinite} in a row)"
    lines = [f"{_count(found.steps, 'step')}, {bad}"]
    if found.warmup:
        lines.append(
            f"warm-up: the first {found.warmup} steps are left out; after them the median of a block of steps is "
            f"within a factor of {SETTLED:g} of the {AHEAD} blocks that follow"
        )
    else:
        lines.append("warm-up: none found; the first steps are at the level of those that follow")
    shown = ", ".join(f"{name} {value:.4g}" for name, value in found.quantiles.items())
    lines.append(f"norms: median {found.median:.4g}, {shown}; deviation of logarithms {found.deviation:.3f} (MAD)")
    if found.spikes:
        where = ", ".join(map(str, found.spikes[:10])) + (", …" if len(found.spikes) > 10 else "")
        lines.append(
            f"spikes: {_count(len(found.spikes), 'step')} at {SPIKE:g} times the median of the {SPIKE_WINDOW} before "
            f"or more, up to {found.highest:.3g} times: at {where}"
        )
    else:
        lines.append(f"spikes: no step was {SPIKE:g} times the median of the {SPIKE_WINDOW} before")
    lines.append(f"drift: medians of tenths of the run differ by a factor of {found.drift:.2f}")
    if found.layer is not None:
        lines.append(f"layers: {found.layer} has {found.layer_share:.0%} of the squared norm in spikes")
    return lines
