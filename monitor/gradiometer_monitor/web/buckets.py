"""Down-sample rows of a ring: buckets of adjacent rows, in which every spike is kept. Pure arithmetic on arrays.

A bucket holds 2**level rows whose sequences are aligned to its size, so that buckets of one level never move while a
run grows, and those of a higher level are merged from those of a lower one. It ends early where the policy changes,
for the policy columns are named by the revision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gradiometer.layer_norms import LayerNorms
from gradiometer.records import POLICY_SLOTS, STATS, Flag, Manifest, Rows

__all__ = ["BUCKET", "Buckets", "StatNorms", "bucket_rows", "merge", "newer"]

Floats = npt.NDArray[np.float64]

BUCKET = np.dtype(
    [
        ("first", "<i8"),  # sequence of the first and of the last row
        ("last", "<i8"),
        ("rows", "<i8"),
        ("step", "<i8"),  # the lowest and the highest step
        ("last_step", "<i8"),
        ("time_ns", "<i8"),  # of the last row, as everything that is said to be the last
        ("flags", "<u4"),  # any of the rows' flags
        ("clipped", "<i4", (POLICY_SLOTS,)),  # rows in which the policy of each slot clipped, or would have
        ("policy_revision", "<u4"),
        ("nonfinite_steps", "<i8"),
        ("skipped_steps", "<i8"),
        ("clipped_steps", "<i8"),
        ("grad_norm_preclip", "<f8"),  # largest finite value, NaN where there is none
        ("grad_norm_postclip", "<f8"),
        ("coefficient", "<f8"),  # smallest finite value
        ("loss_sum", "<f8"),  # of the finite ones
        ("loss_count", "<i8"),
        ("loss_max", "<f8"),
        ("loss_nonfinite", "<i8"),  # losses that were logged as NaN or Inf
        ("learning_rate", "<f8"),  # last
        ("loss_scale", "<f8"),  # last
        ("step_seconds", "<f8"),  # largest
        ("thresholds", "<f4", (POLICY_SLOTS,)),  # last
    ]
)
"""What is kept of a bucket, beside its layers."""
_LARGEST = ("grad_norm_preclip", "grad_norm_postclip", "loss_max", "step_seconds")
_SUMMED = (
    "rows",
    "nonfinite_steps",
    "skipped_steps",
    "clipped_steps",
    "clipped",
    "loss_sum",
    "loss_count",
    "loss_nonfinite",
)
_LAST = ("last", "time_ns", "policy_revision", "learning_rate", "loss_scale", "thresholds")


class Buckets:
    """Buckets in the order of their rows: BUCKET[B], and of each layer float32[B, L] and bool[B, L].

    A layer's value is the largest finite norm: NaN where none was finite, negative zero where the layer had no gradient
    in any of the rows. The second array says where some norm was not finite.
    """

    def __init__(
        self, scalars: npt.NDArray[np.void], layers: npt.NDArray[np.float32], bad: npt.NDArray[np.bool_]
    ) -> None:
        self.scalars, self.layers, self.bad = scalars, layers, bad

    @classmethod
    def empty(cls, layers: int) -> Buckets:
        return cls(np.empty(0, BUCKET), np.empty((0, layers), np.float32), np.empty((0, layers), np.bool_))

    def __len__(self) -> int:
        return len(self.scalars)

    def __getitem__(self, which: slice) -> Buckets:
        return Buckets(self.scalars[which], self.layers[which], self.bad[which])

    @property
    def nbytes(self) -> int:
        return self.scalars.nbytes + self.layers.nbytes + self.bad.nbytes


class StatNorms:
    """The norms of layers of one stat, in the coding of :attr:`Buckets.layers`."""

    def __init__(self, manifest: Manifest, stat: str) -> None:
        self._norms, self._stat = LayerNorms(manifest), STATS.index(stat)
        self.count = self._norms.count

    def of(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Norms of the layers, float32[T, L]: not finite becomes NaN, without gradient negative zero."""
        composed, absent = self._norms.compose(rows["parameters"][:, self._stat, :])
        with np.errstate(over="ignore"):
            norms = composed.astype(np.float32)
        norms[~np.isfinite(norms)] = np.nan
        norms[absent] = -0.0
        return norms


def bucket_rows(rows: Rows, norms: StatNorms, level: int) -> Buckets:
    """Put complete rows, oldest first, into buckets of 2**level."""
    single = np.zeros(len(rows), BUCKET)
    for name, column in (("first", "begin"), ("last", "begin"), ("step", "step"), ("last_step", "step")):
        single[name] = rows[column]
    for name in ("time_ns", "flags", "policy_revision", "learning_rate", "loss_scale"):
        single[name] = rows[name]
    for name in ("grad_norm_preclip", "grad_norm_postclip", "coefficient", "step_seconds"):
        single[name] = _finite(rows[name])
    single["rows"], single["thresholds"] = 1, rows["policy_threshold"]
    single["clipped"] = rows["clipped"][:, None] >> np.arange(POLICY_SLOTS, dtype=np.uint32) & np.uint32(1)
    flagged = ("nonfinite_steps", Flag.NONFINITE), ("skipped_steps", Flag.SKIPPED), ("clipped_steps", Flag.CLIPPED)
    for name, flag in flagged:
        single[name] = (rows["flags"] & np.uint32(flag)) != 0
    logged = (rows["flags"] & np.uint32(Flag.LOSS)) != 0
    finite = logged & np.isfinite(rows["loss"])
    single["loss_sum"], single["loss_count"] = np.where(finite, rows["loss"], 0), finite
    single["loss_max"], single["loss_nonfinite"] = np.where(finite, rows["loss"], np.nan), logged & ~finite
    layers = norms.of(rows)
    return merge([Buckets(single, layers, np.isnan(layers))], level)


def merge(parts: Sequence[Buckets], level: int) -> Buckets:
    """Merge buckets of this level or lower ones, in the order of their rows, into buckets of 2**level rows."""
    scalars = np.concatenate([part.scalars for part in parts])
    layers = parts[0].layers if len(parts) == 1 else np.concatenate([part.layers for part in parts])
    bad = parts[0].bad if len(parts) == 1 else np.concatenate([part.bad for part in parts])
    place, revision = (scalars["first"] - 1) >> level, scalars["policy_revision"]
    starts = np.flatnonzero(np.r_[True, (place[1:] != place[:-1]) | (revision[1:] != revision[:-1])][: len(scalars)])
    if len(starts) == len(scalars):
        return Buckets(scalars, layers, bad)
    ends = np.r_[starts[1:], len(scalars)] - 1
    merged = np.zeros(len(starts), BUCKET)
    for name in _LAST:
        merged[name] = scalars[name][ends]
    for name in _SUMMED:
        merged[name] = np.add.reduceat(scalars[name], starts)
    for name in _LARGEST:
        merged[name] = np.fmax.reduceat(scalars[name], starts)
    merged["first"], merged["coefficient"] = scalars["first"][starts], np.fmin.reduceat(scalars["coefficient"], starts)
    merged["step"] = np.minimum.reduceat(scalars["step"], starts)
    merged["last_step"] = np.maximum.reduceat(scalars["last_step"], starts)
    merged["flags"] = np.bitwise_or.reduceat(scalars["flags"], starts)
    return Buckets(merged, _largest(layers, starts), np.logical_or.reduceat(bad, starts, axis=0))


def _largest(layers: npt.NDArray[np.float32], starts: npt.NDArray[np.intp]) -> npt.NDArray[np.float32]:
    """Take maxima over groups of buckets; of negative zeros alone it is one too, of these and NaN it is NaN."""
    peak = np.fmax.reduceat(layers, starts, axis=0)
    zero = peak == 0
    if zero.any():
        present = np.logical_or.reduceat((layers == 0) & ~np.signbit(layers), starts, axis=0)
        broken = np.logical_or.reduceat(np.isnan(layers), starts, axis=0)
        silent = np.where(broken, np.float32(np.nan), np.float32(-0.0))
        peak[zero] = np.where(present, np.float32(0.0), silent)[zero]
    return peak


def newer(buckets: Buckets, oldest: int) -> Buckets:
    """Leave out the buckets all of whose rows came before sequence ``oldest``."""
    return buckets[int(np.searchsorted(buckets.scalars["last"], oldest)) :]


def _finite(values: npt.NDArray[Any]) -> Floats:
    finite: Floats = np.where(np.isfinite(values), values, np.nan)
    return finite
