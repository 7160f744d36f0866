"""What the ranks of a run say beside each other: norms that ought to be the same, and who comes late. Needs no torch.

Every rank of a run records the global norm of the same gradients: after the reduction of DDP, summed over the shards of
FSDP and tensor parallelism and over pipeline stages. So whatever two ranks record for one step is comparable, and a
difference means that they no longer train the same model. Guarantees: ranks are compared at the same step only; what is
told depends on the rows alone, wherever the batches were cut in which they came, and memory is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradiometer.metrics import WINDOW_SECONDS
from gradiometer.records import Rows

__all__ = ["TRAIL_STEPS", "Comparison", "StepTrail", "Trail", "compare"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

TRAIL_STEPS = 4096
"""Newest steps of a rank that are compared: more than a window of 60 s up to 68 steps a second."""
WINDOW_NS = int(WINDOW_SECONDS * 1e9)


@dataclass(frozen=True, slots=True)
class Trail:
    """The newest steps of a rank, oldest first, in the order of their numbers; never changed."""

    steps: Integers
    """int64[T], each larger than the one before."""
    time_ns: Integers
    norms: Floats
    """Global norm before clipping, float64[T]."""

    def part(self, chosen: Mask | slice) -> Trail:
        return Trail(self.steps[chosen], self.time_ns[chosen], self.norms[chosen])


class StepTrail:
    """Keeps the :class:`Trail` of a rank: the last WINDOW_SECONDS of its rows' own time, TRAIL_STEPS at most.

    Where the step numbers fall back, as after a checkpoint was loaded, what came before is forgotten.
    """

    def __init__(self) -> None:
        self.newest = Trail(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))

    def add(self, rows: Rows) -> None:
        """Take in rows, oldest first, at least one."""
        rows = rows[-TRAIL_STEPS:]
        steps = np.concatenate([self.newest.steps, rows["step"].astype(np.int64)])
        times = np.concatenate([self.newest.time_ns, rows["time_ns"].astype(np.int64)])
        norms = np.concatenate([self.newest.norms, rows["grad_norm_preclip"].astype(np.float64)])
        falls = (np.diff(steps) <= 0).nonzero()[0]
        first = max(len(steps) - TRAIL_STEPS, int(falls[-1]) + 1 if len(falls) else 0, 0)
        found = Trail(steps[first:], times[first:], norms[first:])
        self.newest = found.part(np.abs(found.time_ns - found.time_ns[-1]) < WINDOW_NS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """What the ranks say beside each other, float64[R] each, in the order in which they were given."""

    deviation: Floats
    """Largest relative difference of the rank's norm from the median of the ranks at the same step.

    Inf where it was not finite and another's was, 0 where none was; NaN for a rank that shares no step with another.
    """
    lag_seconds: Floats
    """How much later than the first rank it ended the same step, on average; NaN as above."""


def compare(trails: Sequence[Trail]) -> Comparison:
    """Compare ranks at the steps that at least two of them have, of the last WINDOW_SECONDS up to the newest row."""
    trails = _recent(trails)
    steps = np.unique(np.concatenate([trail.steps for trail in trails])) if trails else np.empty(0, np.int64)
    norms, times = np.full((len(steps), len(trails)), np.nan), np.zeros((len(steps), len(trails)), np.int64)
    there: Mask = np.zeros(norms.shape, np.bool_)
    for column, trail in enumerate(trails):
        places = np.searchsorted(steps, trail.steps)
        norms[places, column], times[places, column], there[places, column] = trail.norms, trail.time_ns, True
    shared = np.count_nonzero(there, axis=1) >= 2
    norms, times, there = norms[shared], times[shared], there[shared]
    known = there.any(axis=0)
    return Comparison(
        deviation=np.where(known, _deviation(norms, there).max(axis=0, initial=0.0), np.nan),
        lag_seconds=_mean_lag(times, there),
    )


def _recent(trails: Sequence[Trail]) -> list[Trail]:
    """Leave out the steps that are a window away from the newest of all, as of a rank that stands still."""
    newest = max((int(trail.time_ns[-1]) for trail in trails if len(trail.steps)), default=0)
    return [trail.part(newest - trail.time_ns < WINDOW_NS) for trail in trails]


def _deviation(norms: Floats, there: Mask) -> Floats:
    """Return each rank's relative difference from the median of the finite norms of its step, float64[S, R]."""
    finite = np.isfinite(norms)
    median = _median(np.where(finite, norms, np.nan), np.count_nonzero(finite, axis=1))[:, None]
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        found = np.abs(norms - median) / np.abs(median)
    found = np.where(norms == median, 0.0, found)
    found = np.where(there & ~finite, np.where(finite.any(axis=1, keepdims=True), np.inf, 0.0), found)
    deviation: Floats = np.where(there, found, 0.0)
    return deviation


def _median(norms: Floats, known: npt.NDArray[np.intp]) -> Floats:
    """Return the median of each row of float64[S, R], NaN passed over, of which each has ``known`` others."""
    ordered = np.sort(norms, axis=1)  # NaN come last
    places = np.stack([np.maximum(known - 1, 0) // 2, np.minimum(known // 2, max(0, norms.shape[1] - 1))], axis=1)
    if not ordered.size:
        return np.full(len(norms), np.nan)
    low, high = np.take_along_axis(ordered, places, axis=1).T
    middle: Floats = low + (high - low) / 2  # which overflows for no two norms
    return middle


def _mean_lag(times: Integers, there: Mask) -> Floats:
    """Return how many seconds after the first rank each ended its steps, on average; float64[R]."""
    latest = np.iinfo(np.int64).max
    first = np.where(there, times, latest).min(axis=1, initial=latest, keepdims=True)
    late = np.where(there, times - first, 0)
    count = np.count_nonzero(there, axis=0)
    mean: Floats = np.divide(late.sum(axis=0) * 1e-9, count, where=count > 0, out=np.full(len(count), np.nan))
    return mean
