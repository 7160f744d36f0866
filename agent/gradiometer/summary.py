"""The state behind the metrics of one rank: counts, windows and newest values, from the rows of its ring.

Guarantees: every update is vectorised over rows and layers, and the memory held depends on the number of layers alone.
Non-finite norms are counted and shown as they are in the newest values, and poison no sum, median or maximum.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gradiometer.insight import NoiseAverage, Samples, microbatch_norms, replicas
from gradiometer.metrics import GRAD_NORM_BUCKETS, STEP_SECONDS_BUCKETS, WINDOW_SECONDS
from gradiometer.records import STATS, STATUS, Flag, Manifest, Rows, own_clipping

__all__ = ["LAYER_METRICS", "Histogram", "LayerSummary", "RunSummary", "WindowMax"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

BASELINE_STEPS = 512
BUCKET_NS = int(WINDOW_SECONDS * 1e9) // 30
BUCKETS = 31
"""One more than the window holds, because the newest is not full: a maximum covers one window to one bucket more."""
DECAY = 1 - 1 / BASELINE_STEPS
LAYER_METRICS = (
    "gradiometer_layer_grad_norm_last",
    "gradiometer_layer_grad_norm_window_max",
    "gradiometer_layer_nonfinite_total",
)
"""Metrics of which each exported layer has one series, in every run."""
SAMPLED_METRICS = ("gradiometer_layer_weight_norm", "gradiometer_layer_update_ratio")
COSINE_METRIC = "gradiometer_layer_grad_cosine"
_PRECLIP = STATS.index("grad_norm_preclip")


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

    def observe(self, values: Floats) -> None:
        """Count ``values``, float64[T]."""
        places = np.searchsorted(self.bounds, values, side="left")
        self._counts += np.bincount(places, minlength=len(self._counts))
        with np.errstate(over="ignore"):
            self.sum += float(values[np.isfinite(values)].sum())


class WindowMax:
    """Rolling maximum of ``columns`` values over the last WINDOW_SECONDS of the rows' own time.

    Time is cut in buckets of a thirtieth of the window, and one maximum a column is kept for each of the last 31, so
    that a row costs one comparison a column whatever the step rate. The window ends at the newest row, not now: a run
    that stalls keeps its maximum. NaN is passed over, +Inf is not. A clock that was set back starts a new window.
    """

    def __init__(self, columns: int) -> None:
        self._peaks = np.full((BUCKETS, columns), np.nan)
        self._buckets = np.full(BUCKETS, -1, np.int64)
        self._newest = -1

    def add(self, time_ns: Integers, values: Floats) -> None:
        """Take in rows, oldest first: int64[T] and float64[T, columns]; T is at least 1."""
        buckets = time_ns // BUCKET_NS
        self._newest = int(buckets[-1])
        for bucket in np.unique(buckets[np.abs(buckets - self._newest) < BUCKETS]):
            self._merge(int(bucket), np.fmax.reduce(values[buckets == bucket], axis=0))

    def _merge(self, bucket: int, peak: Floats) -> None:
        slot = bucket % BUCKETS
        if self._buckets[slot] != bucket:
            self._buckets[slot], self._peaks[slot] = bucket, peak
        else:
            np.fmax(self._peaks[slot], peak, out=self._peaks[slot])

    def max(self) -> Floats:
        """Largest value of each column in the window, float64[columns]; NaN where there was none."""
        live = np.abs(self._buckets - self._newest) < BUCKETS
        peaks: Floats = np.fmax.reduce(self._peaks[live], axis=0, initial=np.nan)
        return peaks


class LayerSummary:
    """Norms of every layer, composed from those of its parameters; arrays are in the order of ``Manifest.layers``."""

    def __init__(self, manifest: Manifest) -> None:
        index = manifest.layer_index
        self.names = manifest.layers
        count = len(self.names)
        self._order = np.argsort(index, kind="stable")
        self._starts = np.searchsorted(index[self._order], np.arange(count))
        trainable = np.array([parameter.trainable for parameter in manifest.parameters], np.bool_)
        self.exported: Mask = np.logical_or.reduceat(trainable[self._order], self._starts)
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
        """Norms of the newest row, float64[L]; None before the first."""
        self.nonfinite: Integers = np.zeros(count, np.int64)
        self._window = WindowMax(count)
        self._log_sum, self._log_weight = np.zeros(count), np.zeros(count)

    def update(self, time_ns: Integers, parameter_norms: npt.NDArray[np.float32]) -> None:
        """Take in float32[T, P] norms of the rows at int64[T]."""
        ordered = parameter_norms[:, self._order].astype(np.float64)
        absent = ((ordered == 0) & np.signbit(ordered)).all(axis=0)
        self.exported |= np.logical_or.reduceat(~absent, self._starts)
        norms: Floats = np.sqrt(np.add.reduceat(np.square(ordered), self._starts, axis=1))
        self.last = norms[-1]
        self.nonfinite += np.count_nonzero(~np.isfinite(norms), axis=0)
        self._window.add(time_ns, norms)
        self._follow(norms)

    def _follow(self, norms: Floats) -> None:
        """Decay the sums of log norms behind :meth:`anomaly`: a geometric mean is hardly moved by one spike."""
        weights = DECAY ** np.arange(len(norms) - 1, -1, -1.0)
        usable = np.isfinite(norms) & (norms > 0)
        decay = DECAY ** len(norms)
        self._log_sum = self._log_sum * decay + weights @ np.log(norms, where=usable, out=np.zeros_like(norms))
        self._log_weight = self._log_weight * decay + weights @ usable

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
        values = (peak if last is None else last, peak, self.nonfinite)
        masks = (shown, self.exported & ~np.isnan(peak), self.exported)
        sampled = {name: (known, self.exported & ~np.isnan(known)) for name, known in self._sampled.items()}
        return dict(zip(LAYER_METRICS, zip(values, masks, strict=True), strict=True)) | sampled

    def window_max(self) -> Floats:
        """Largest norm of each layer in the window, float64[L]; NaN where there was none but NaN."""
        return self._window.max()

    def anomaly(self) -> Floats:
        """Log of each layer's window maximum over its usual norm, float64[L]; -Inf for a layer without any norm."""
        peak = self.window_max()
        known = (peak > 0) & (self._log_weight > 0)
        usual = np.divide(self._log_sum, self._log_weight, where=known, out=np.zeros_like(peak))
        return np.where(known, np.log(peak, where=known, out=np.zeros_like(peak)) - usual, -np.inf)


class RunSummary:
    """What one rank's rows and counters come to; fed by whoever follows the ring.

    Counters are the writer's own, so they are exact even if the reader was away; histograms, windows and per-layer
    counts begin with the oldest row that the ring held when the reader came, and :attr:`rows_missed` says how many
    rows were not read since.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.status: np.void = np.zeros(1, STATUS)[0]
        """The writer's counters, :data:`gradiometer.records.STATUS`."""
        self.newest: np.void | None = None
        """Copy of the newest row that was read."""
        self.last_seen = 0
        """Sequence of the newest row that was read or given up."""
        self.rows_missed = 0
        """Rows that the ring overwrote while it was followed, or a crash destroyed, before they were read."""
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
        self._replicas = replicas(manifest)
        self._window = WindowMax(1)
        self._baseline = np.empty(0)

    @property
    def grad_norm_window_max(self) -> float:
        return float(self._window.max()[0])

    @property
    def grad_norm_baseline(self) -> float:
        """Median of the last 512 finite global norms before clipping; NaN before the first."""
        return float(np.median(self._baseline)) if len(self._baseline) else float("nan")

    def update(self, rows: Rows, status: np.void) -> None:
        """Take in rows that follow those seen before, oldest first, and the counters read after them."""
        self.status = status
        if not len(rows):
            return
        newest = int(rows["begin"][-1])
        self.rows_missed += newest - self.last_seen - len(rows)
        self.last_seen, self.newest = newest, rows[-1].copy()
        time_ns, norms = rows["time_ns"].astype(np.int64), rows["grad_norm_preclip"].astype(np.float64)
        self.own_clipping |= own_clipping(rows, status)
        self._update_scalars(rows, time_ns, norms)
        self.layers.update(time_ns, rows["parameters"][:, _PRECLIP, :])
        self._update_own(rows)

    def _update_own(self, rows: Rows) -> None:
        """Take in what the rows say of this rank's own micro-batches."""
        flags = rows["flags"]
        if (flags & np.uint32(Flag.OWN_WATCHED)).any():
            bad = int(np.count_nonzero(flags & np.uint32(Flag.OWN_NONFINITE)))
            self.own_nonfinite = bad + (self.own_nonfinite or 0)
        hooked = rows[(flags & np.uint32(Flag.HOOKED)) != 0]
        if len(hooked):
            self.noise.update(hooked, self._replicas)
            self.microbatch_norm = float(microbatch_norms(hooked[-1:])[0])

    def _update_scalars(self, rows: Rows, time_ns: Integers, norms: Floats) -> None:
        self.grad_norm.observe(norms)
        self.step_seconds.observe(_known(rows["step_seconds"]))
        self._window.add(time_ns, norms[:, None])
        self._baseline = np.concatenate([self._baseline, norms[np.isfinite(norms)]])[-BASELINE_STEPS:]
        logged = rows[(rows["flags"] & int(Flag.LOSS)) != 0]
        self.loss = float(logged["loss"][-1]) if len(logged) else self.loss

    def start_after(self, sequence: int) -> None:
        """Take the rows up to ``sequence`` for history, which the reader came too late for: they are not missed."""
        self.last_seen = max(self.last_seen, sequence)

    def give_up(self, sequence: int) -> None:
        """Count the rows up to ``sequence`` that were not read as missed: they never will be."""
        if sequence > self.last_seen:
            self.rows_missed += sequence - self.last_seen
            self.last_seen = sequence


def _known(values: npt.NDArray[Any]) -> Floats:
    known: Floats = values[~np.isnan(values)].astype(np.float64)
    return known
