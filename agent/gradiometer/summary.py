"""The state behind the metrics of one rank: counts, windows and newest values, from the rows of its ring.

Guarantees: every update is vectorised over rows and layers, and the memory held depends on the number of layers alone.
Non-finite norms are counted and shown as they are in the newest values, and poison no sum, median or maximum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gradiometer.comparison import StepTrail
from gradiometer.insight import NoiseAverage, Samples, microbatch_norms, replicas
from gradiometer.layer_norms import LayerNorms
from gradiometer.metrics import GRAD_NORM_BUCKETS, STEP_SECONDS_BUCKETS
from gradiometer.origins import Origins
from gradiometer.records import STATS, STATUS, Flag, Manifest, Rows, own_clipping
from gradiometer.windows import (
    BASELINE_STEPS,
    WARMUP_STEPS,
    LayerBaseline,
    LongestStreak,
    Streak,
    WindowMax,
    WindowRatio,
)

__all__ = ["LAYER_METRICS", "Histogram", "LayerSummary", "RunSummary"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

VANISHING_RATIO, VANISHING_STEPS = 1e-3, 64
"""A layer is vanishing when its norm was at most a thousandth of its usual one in so many steps running: no schedule
and no batch does that, and some zero gradients, as of a branch that was not taken, are none."""
VANISHING_ELEMENT = 1e-8
"""Root mean square of a gradient's elements at or below which the layer is vanishing whatever is usual: Adam's epsilon,
from which down the optimizer no longer makes up for the gradient's size. Zero is below it."""
EXPLODING_RATIO, EXPLODING_STEPS = 10.0, 8
"""A layer is exploding when its norm was above ten times its usual one, or not finite, in so many steps running: a
spike, and a loss scale that is being found, take fewer."""
LAYER_METRICS = (
    "gradiometer_layer_grad_norm_last",
    "gradiometer_layer_grad_norm_window_max",
    "gradiometer_layer_nonfinite_total",
    "gradiometer_layer_anomaly_score",
)
"""Metrics of which each exported layer has one series, in every run."""
SAMPLED_METRICS = ("gradiometer_layer_weight_norm", "gradiometer_layer_update_ratio")
COSINE_METRIC = "gradiometer_layer_grad_cosine"
_PRECLIP = STATS.index("grad_norm_preclip")
_NONFINITE = np.uint32(Flag.NONFINITE)
_USED = np.uint32(Flag.NONFINITE | Flag.SKIPPED | Flag.ZEROED | Flag.FAILED)
"""Of these only NONFINITE is set where the optimizer used gradients that were not finite."""


class Histogram:
    """Counts of observations up to each of ``bounds``; NaN falls in +Inf, and only finite values are summed."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.sum = 0.0
        self._counts = np.zeros(len(bounds) + 1, np.int64)

    @property
    def cumulative(self) -> list[int]:
        """Observations at or below each bound, and last all of them."""
        totals: list[int] = self._counts.cumsum().tolist()
        return totals

    @property
    def state(self) -> list[float]:
        """What :meth:`resume` takes: the sum, then the counts."""
        return [self.sum, *self._counts.tolist()]

    def resume(self, state: list[float]) -> None:
        """Go on from another's :attr:`state`. Raises ValueError if it has other buckets."""
        if len(state) != len(self._counts) + 1:
            raise ValueError(f"a histogram of {len(state) - 2} bounds, expected {len(self.bounds)}")
        self.sum, self._counts = float(state[0]), np.array(state[1:], np.int64)

    def observe(self, values: Floats) -> None:
        """Count ``values``, float64[T]."""
        places = np.searchsorted(self.bounds, values, side="left")
        self._counts += np.bincount(places, minlength=len(self._counts))
        with np.errstate(over="ignore"):
            self.sum += float(values[np.isfinite(values)].sum())


class LayerSummary:
    """Norms of every layer, composed from those of its parameters; arrays are in the order of ``Manifest.layers``."""

    def __init__(self, manifest: Manifest) -> None:
        self._index = index = manifest.layer_index
        self.names = manifest.layers
        count = len(self.names)
        self._norms = LayerNorms(manifest)
        trainable = np.array([parameter.trainable for parameter in manifest.parameters], np.bool_)
        self.exported: Mask = self._norms.any_of(trainable)
        """Layers of which some parameter is trainable or ever had a gradient, bool[L]."""
        self.metrics: tuple[str, ...] = LAYER_METRICS
        """Metrics of which each exported layer of this run has one series."""
        if manifest.samples is not None:
            self.metrics += SAMPLED_METRICS
            self.metrics += (COSINE_METRIC,) if "cosine" in manifest.samples.columns else ()
        self._sampled = {name: np.full(count, np.nan) for name in self.metrics[len(LAYER_METRICS) :]}
        self.cosine = float("nan")
        """Cosine of the whole gradient and that of the step before, newest sample; NaN where it is not known."""
        self.last: Floats | None = None
        """Norms of the newest row, float64[L], zero where there was no gradient; None before the first."""
        self.present: Mask = np.zeros(count, np.bool_)
        """Layers that had a gradient in the newest row, bool[L]."""
        self.nonfinite: Integers = np.zeros(count, np.int64)
        self.origins = Origins(count)
        self._window, self._baseline = WindowMax(count), LayerBaseline(count)
        self._peak: Floats | None = None
        self._below, self._above = Streak(count), Streak(count)
        self._log_sum, self._log_weight = np.zeros(count), np.zeros(count)
        elements = [max(1, parameter.numel) * parameter.trainable for parameter in manifest.parameters]
        self._floor = VANISHING_ELEMENT * np.sqrt(np.bincount(index, elements, count))

    def norms(self, parameter_norms: npt.NDArray[np.float32]) -> Floats:
        """Compose float32[T, P] norms of parameters to float64[T, L] of layers."""
        return self._norms.compose(parameter_norms)[0]

    def update(self, time_ns: Integers, parameter_norms: npt.NDArray[np.float32], fresh: int) -> None:
        """Take in float32[T, P] norms of the rows at int64[T], of which the last ``fresh`` are to be counted."""
        norms, absent = self._norms.compose(parameter_norms)
        self.exported |= ~absent.all(axis=0)
        self.last, self.present = norms[-1], ~absent[-1]
        self.nonfinite += np.count_nonzero(~np.isfinite(norms[len(norms) - fresh :]), axis=0)
        self._window.add(time_ns, norms)
        self._peak = None
        while len(norms):
            room = self._baseline.room
            self._judge(norms[:room], ~absent[:room])
            norms, absent = norms[room:], absent[room:]

    def originate(self, parameters: npt.NDArray[np.int32]) -> None:
        """Count the steps whose first non-finite parameters these are, int32[T]; below 0 there was none."""
        self.origins.add(self._index[parameters[(parameters >= 0) & (parameters < len(self._index))]])

    def _warm_up(self, norms: Floats) -> None:
        """Add up the first log norms, for :meth:`anomaly`."""
        usable = np.isfinite(norms) & (norms > 0)
        self._log_sum += np.log(norms, where=usable, out=np.zeros_like(norms)).sum(axis=0)
        self._log_weight += np.count_nonzero(usable, axis=0)

    def _judge(self, norms: Floats, present: Mask) -> None:
        """Take in float64[T, L] norms of rows between which the baseline does not change."""
        if self._baseline.steps < WARMUP_STEPS:
            self._warm_up(norms)
        usual = self.median
        self._below.add(norms <= np.fmax(usual * VANISHING_RATIO, self._floor), present)
        with np.errstate(invalid="ignore"):
            self._above.add(~(norms <= usual * EXPLODING_RATIO) & ~np.isnan(usual), present)
        self._baseline.add(norms, self.vanishing | self.exploding)

    @property
    def judged(self) -> bool:
        """Whether there were enough steps to say of layers that they vanish or explode."""
        return self._baseline.steps >= WARMUP_STEPS

    @property
    def median(self) -> Floats:
        """Usual norm of each layer, float64[L]: the median of its baseline; NaN where there is none yet."""
        return self._baseline.usual

    @property
    def mad(self) -> Floats:
        """Median absolute deviation of each layer's log norm, float64[L]; NaN where there is no baseline yet."""
        return self._baseline.mad

    @property
    def vanishing(self) -> Mask:
        """Layers whose gradient has been vanishing up to the newest row, bool[L]."""
        return (self._below.length >= VANISHING_STEPS) & self.judged

    @property
    def exploding(self) -> Mask:
        """Layers whose gradient has been exploding up to the newest row, bool[L]."""
        return self._above.length >= EXPLODING_STEPS

    def sample(self, samples: Samples) -> None:
        """Take in the newest sample, of which a layer that another optimizer holds need not be a part."""
        part = samples.weight_norms[-1] > 0
        newest = (samples.weight_norms[-1], samples.update_ratio[-1], samples.cosine[-1])
        for known, values in zip(self._sampled.values(), newest, strict=False):
            known[part] = values[part]
        self.cosine = float(samples.total_cosine[-1])

    def columns(self) -> dict[str, tuple[Floats | Integers, Mask]]:
        """Map each of :attr:`metrics` to its values [L], and to whether they are known and exported, bool[L]."""
        last, peak = self.last, self.window_max()
        shown = self.exported & (last is not None)
        score = self.score
        values = (peak if last is None else last, peak, self.nonfinite, score)
        masks = (shown, self.exported & ~np.isnan(peak), self.exported, self.exported & (score > -np.inf))
        sampled = {name: (known, self.exported & ~np.isnan(known)) for name, known in self._sampled.items()}
        return dict(zip(LAYER_METRICS, zip(values, masks, strict=True), strict=True)) | sampled

    def window_max(self) -> Floats:
        """Largest norm of each layer in the window, float64[L]; NaN where there was none but NaN."""
        if self._peak is None:
            self._peak = self._window.max()
        return self._peak

    @property
    def score(self) -> Floats:
        """By how many robust deviations the log of each layer's window maximum is above its usual, float64[L].

        NaN before the layer has a baseline; -Inf without a norm above zero in the window.
        """
        return self._baseline.score(self.window_max())

    def anomaly(self) -> Floats:
        """Rank the layers, float64[L]: by :attr:`score`; -Inf for a layer without any norm.

        While there is no score it is the log of the window maximum over the geometric mean of the first norms.
        """
        peak = self.window_max()
        known = (peak > 0) & (self._log_weight > 0)
        usual = np.divide(self._log_sum, self._log_weight, where=known, out=np.zeros_like(peak))
        first = np.where(known, np.log(peak, where=known, out=np.zeros_like(peak)) - usual, -np.inf)
        score = self.score
        return np.where(np.isnan(score), first, score)


class RunSummary:
    """What one rank's rows and counters come to; fed by whoever follows the ring.

    Counters are the writer's own, so they are exact even if the reader was away. Histograms and per-layer counts begin
    with the oldest row that the ring held when the reader first came, :attr:`uncounted` rows after the run's first, and
    :attr:`rows_missed` says how many were not read since. A reader that is started again takes over the
    :meth:`counts` of the one before.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.status: np.void = np.zeros(1, STATUS)[0]
        """The writer's counters, :data:`gradiometer.records.STATUS`."""
        self.newest: np.void | None = None
        """Copy of the newest row that was read."""
        self.last_seen = 0
        """Sequence of the newest row that was read or given up."""
        self.rows_missed = 0
        """Rows that the ring overwrote, or a crash destroyed, before they were read; not the :attr:`uncounted`."""
        self.uncounted = 0
        """Rows that had left the ring before it was first read: histograms and per-layer counts begin after them."""
        self._counted = 0
        self.loss: float | None = None
        """Newest loss that was logged, NaN too; None if none was."""
        self.own_clipping: set[str] = set()
        """Which of torch's own clipping functions the loop calls."""
        self.grad_norm = Histogram(GRAD_NORM_BUCKETS)
        self.step_seconds = Histogram(STEP_SECONDS_BUCKETS)
        self.layers = LayerSummary(manifest)
        self.noise = NoiseAverage()
        self.own_nonfinite: int | None = None
        """Steps in which this rank's own gradients were not finite before the reduction; None if none was looked at."""
        self.microbatch_norm = float("nan")
        """Norm of this rank's own gradients in the newest step with armed hooks; NaN where there was none."""
        self.nonfinite_updates = 0
        """Steps in which the optimizer moved the parameters by gradients that were not finite."""
        self.trail = StepTrail()
        """The newest steps, by which the rank is compared with the others."""
        self._replicas = replicas(manifest)
        self._window, self._clipped, self._skipped = WindowMax(2), WindowRatio(), LongestStreak()
        self._baseline, self._finite = np.empty(0), 0

    @property
    def grad_norm_window_max(self) -> float:
        return float(self._window.max()[0])

    @property
    def grad_norm_finite_window_max(self) -> float:
        """Largest norm in the window that was finite, which a GradScaler's overflows do not hide; NaN without any."""
        return float(self._window.max()[1])

    @property
    def grad_norm_baseline(self) -> float:
        """Median of the last 512 finite global norms before clipping; NaN before the first."""
        return float(np.median(self._baseline)) if len(self._baseline) else float("nan")

    @property
    def grad_norm_mad(self) -> float:
        """Median absolute deviation of the norms behind the baseline; NaN before 128 of them, which say too little."""
        if self._finite < WARMUP_STEPS:
            return float("nan")
        return float(np.median(np.abs(self._baseline - np.median(self._baseline))))

    @property
    def clip_ratio(self) -> float:
        """Share of steps whose gradients were clipped, of the last minute or at least the last 32; NaN before these."""
        return self._clipped.ratio

    @property
    def skipped_in_a_row(self) -> int:
        """Most consecutive steps that did not move the parameters, of the last minute."""
        return self._skipped.rows

    def update(self, rows: Rows, status: np.void) -> None:
        """Take in rows that follow those seen before, oldest first, and the counters read after them."""
        self.status = status
        if not len(rows):
            return
        fresh = rows[rows["begin"] > self._counted]
        self._miss(int(rows["begin"][-1]), len(fresh))
        self.newest = rows[-1].copy()
        time_ns, norms = rows["time_ns"].astype(np.int64), rows["grad_norm_preclip"].astype(np.float64)
        self.own_clipping |= own_clipping(rows, status)
        self._count(fresh)
        self._update_windows(rows, time_ns, norms)
        self.layers.update(time_ns, rows["parameters"][:, _PRECLIP, :], len(fresh))

    def _miss(self, newest: int, counted: int) -> None:
        """Note that the rows up to ``newest`` were read or given up, and count those as missed that were not read."""
        self.rows_missed += max(0, newest - max(self.last_seen, self._counted)) - counted
        self.last_seen = max(self.last_seen, newest)

    def _count(self, rows: Rows) -> None:
        """Take in rows that no counter holds yet."""
        self.grad_norm.observe(rows["grad_norm_preclip"].astype(np.float64))
        self.step_seconds.observe(_known(rows["step_seconds"]))
        flags = rows["flags"]
        if (flags & np.uint32(Flag.OWN_WATCHED)).any():
            bad = int(np.count_nonzero(flags & np.uint32(Flag.OWN_NONFINITE)))
            self.own_nonfinite = bad + (self.own_nonfinite or 0)
        used = (flags & _USED) == _NONFINITE
        self.nonfinite_updates += int(np.count_nonzero(used & ~np.isfinite(rows["grad_norm_postclip"])))
        self.layers.originate(rows["first_nonfinite"])

    def _update_windows(self, rows: Rows, time_ns: Integers, norms: Floats) -> None:
        flags = rows["flags"]
        hooked = rows[(flags & np.uint32(Flag.HOOKED)) != 0]
        if len(hooked):
            self.noise.update(hooked, self._replicas)
            self.microbatch_norm = float(microbatch_norms(hooked[-1:])[0])
        known = np.isfinite(norms)
        self._window.add(time_ns, np.stack([norms, np.where(known, norms, np.nan)], axis=1))
        self._clipped.add(time_ns, (flags & np.uint32(Flag.CLIPPED)) != 0)
        self._skipped.add(time_ns, (flags & np.uint32(Flag.SKIPPED)) != 0, rows["optimizer"].astype(np.int64))
        self.trail.add(rows)
        finite = norms[known]
        self._baseline, self._finite = (
            np.concatenate([self._baseline, finite])[-BASELINE_STEPS:],
            self._finite + len(finite),
        )
        logged = rows[(rows["flags"] & int(Flag.LOSS)) != 0]
        self.loss = float(logged["loss"][-1]) if len(logged) else self.loss

    def amend(self, row: np.void) -> None:
        """Take the newest row that was read as it is now: its loss may have been logged since."""
        self.newest = row.copy()
        if int(row["flags"]) & Flag.LOSS:
            self.loss = float(row["loss"])

    def start_after(self, sequence: int) -> None:
        """Take the rows up to ``sequence`` for history, which the reader came too late for: they are not missed.

        After :meth:`resume` they are, as far as they were not counted.
        """
        if not self._counted and sequence > self.last_seen:
            self.uncounted += sequence - self.last_seen
            self.last_seen = sequence
        self.give_up(sequence)

    def give_up(self, sequence: int) -> None:
        """Count the rows up to ``sequence`` that were not read as missed: they never will be."""
        if sequence > self.last_seen:
            self._miss(sequence, 0)

    def counts(self) -> dict[str, Any]:
        """Return, as JSON can, what was counted and cannot be read again once the ring has turned."""
        return {
            "sequence": max(self.last_seen, self._counted),
            "uncounted": self.uncounted,
            "rows_missed": self.rows_missed,
            "loss": self.loss,
            "own_nonfinite": self.own_nonfinite,
            "nonfinite_updates": self.nonfinite_updates,
            "grad_norm": self.grad_norm.state,
            "step_seconds": self.step_seconds.state,
            "layers": {str(place): int(self.layers.nonfinite[place]) for place in self.layers.nonfinite.nonzero()[0]},
            "origins": self.layers.origins.state,
            "exported": self.layers.exported.nonzero()[0].tolist() if not self.layers.exported.all() else None,
        }

    def resume(self, counts: dict[str, Any]) -> None:
        """Go on counting where an earlier reader of the same rows was; before the first row.

        The rows it had counted are still to be read, as far as there are any: windows and baselines come from them.
        Raises KeyError, TypeError, ValueError or IndexError, having taken some, if ``counts`` are not of this run.
        """
        self.grad_norm.resume(counts["grad_norm"])
        self.step_seconds.resume(counts["step_seconds"])
        for place, count in counts["layers"].items():
            self.layers.nonfinite[int(place)] = count
        self.layers.origins.resume(counts.get("origins", {}))  # which earlier monitors did not count
        self.layers.exported[slice(None) if counts["exported"] is None else counts["exported"]] = True
        self.uncounted, self.rows_missed = int(counts["uncounted"]), int(counts["rows_missed"])
        self.loss, self.own_nonfinite = counts["loss"], counts["own_nonfinite"]
        self.nonfinite_updates = int(counts.get("nonfinite_updates", 0))  # nor these
        self._counted = int(counts["sequence"])


def _known(values: npt.NDArray[Any]) -> Floats:
    known: Floats = values[~np.isnan(values)].astype(np.float64)
    return known
