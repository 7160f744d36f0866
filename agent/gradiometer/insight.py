"""What recorded norms say beyond themselves: noise scale, shares, cosines, which rank was bad. Needs no torch.

Everything here is arithmetic on rows that are on disk, so it costs the training process nothing.
docs/insight.md has the formulas, where they come from, and what cannot be said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gradiometer.records import (
    STATS,
    Flag,
    Manifest,
    RingReader,
    Rows,
    RunFormatError,
    SampleInfo,
    find_ranks,
    rank_of,
    read_events,
    read_manifest,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "COSINE_SAMPLES",
    "SAMPLES",
    "Episode",
    "NoiseAverage",
    "NoiseScale",
    "Samples",
    "average_noise",
    "bad_episodes",
    "compose",
    "microbatch_norms",
    "noise_scale",
    "noise_terms",
    "rank_ratios",
    "replicas",
    "shares",
]

Floats = npt.NDArray[np.float64]
SAMPLES = ("weight_norm", "update_norm")
"""Columns of ``samples.ring``, estimated for the whole parameter where only some of its elements were read:
weights before the step, and by how much it changed them."""
COSINE_SAMPLES = ("grad_norm", "grad_norm_before", "cosine")
"""Columns that follow where the cosine is on: the gradient's norm before the policies in this step and in the step
before, and the cosine between the two, NaN where either is missing or not finite."""
SETTLING = 3
"""The first steps of a run are left out of the noise scale: a gradient at its largest would outweigh the others."""
MIN_STEPS = 8
"""Steps that a noise scale must be averaged over, for in one step |G|² may well come out negative."""
DECAY = 0.95
"""Weight of a step's terms in the running averages when the next is added."""
RANK_ROWS = 256
"""Newest rows of each rank that are read to compare the ranks."""
_PRECLIP, _MICRO = STATS.index("grad_norm_preclip"), STATS.index("microbatch_norm")
_UNUSABLE = int(Flag.NONFINITE | Flag.SKIPPED | Flag.FAILED)


def replicas(manifest: Manifest) -> int | None:
    """Return ``Manifest.data_parallel``, and 1 for a process that trains by itself."""
    return 1 if manifest.world_size == 1 and manifest.data_parallel is None else manifest.data_parallel


def compose(norms: npt.NDArray[np.floating[Any]], index: npt.NDArray[np.intp], groups: int) -> Floats:
    """Compose parameters' L2 norms [T, P] into those of the groups they belong to, float64[T, groups]."""
    composed: Floats = np.sqrt(_sums(np.square(norms.astype(np.float64)), index, groups))
    return composed


def _sums(values: Floats, index: npt.NDArray[np.intp], groups: int) -> Floats:
    sums = np.zeros((len(values), groups))
    np.add.at(sums.T, index, values.T)
    return sums


def shares(norms: Floats) -> Floats:
    """Return each norm's share [T, L] in its row's sum of squares; NaN where that is 0 or not finite."""
    squares = np.square(norms)
    totals = squares.sum(axis=1, keepdims=True)
    known = np.isfinite(totals) & (totals > 0)
    found: Floats = np.divide(squares, totals, where=known, out=np.full_like(squares, np.nan))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class NoiseScale:
    """The gradient noise scale, in micro-batches, and the averages whose ratio it is."""

    scale: float
    """tr(Σ) / |G|²: NaN where ``steps`` are too few, or too noisy to tell |G|² from zero."""
    signal: float
    """Estimate of |G|², the squared norm of the true gradient."""
    noise: float
    """Estimate of tr(Σ), the variance of one micro-batch's gradient."""
    steps: int


def noise_terms(rows: Rows, ranks: int | None) -> tuple[Floats, Floats]:
    """Estimate |G|² and tr(Σ) from each step by itself, two float64[T]; NaN where a step cannot tell.

    Both are unbiased (McCandlish, Kaplan, Amodei et al. 2018, "An Empirical Model of Large-Batch Training", appendix
    A.1), with the micro-batch as the small batch and the step's N = ``ranks`` x micro-batches as the large one.
    A step can tell if its backward hooks were armed, N >= 2 and it was finite.
    """
    norms, micro = rows["parameters"][:, _PRECLIP, :], rows["parameters"][:, _MICRO, :]
    count = rows["microbatches"].astype(np.float64)
    total = count * (ranks or np.nan)
    # Gradients that are in the backward passes and not in the step, as in a GAN, or the other way round.
    alike = (np.signbit(norms) == np.signbit(micro)).all(axis=1)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        big = np.square(norms.astype(np.float64)).sum(axis=1)
        small = np.square(count) * np.square(micro.astype(np.float64)).sum(axis=1)
        signal, noise = (total * big - small) / (total - 1), (small - big) / (1 - 1 / total)
    usable = ((rows["flags"] & np.uint32(_UNUSABLE)) == 0) & ((rows["flags"] & np.uint32(Flag.HOOKED)) != 0)
    usable &= (rows["begin"] > SETTLING) & (total >= 2) & alike & np.isfinite(signal) & np.isfinite(noise)
    return np.where(usable, signal, np.nan), np.where(usable, noise, np.nan)


class NoiseAverage:
    """Running averages of the two terms of the noise scale, for which their ratio has no meaning step by step."""

    def __init__(self) -> None:
        self.steps = 0
        self._signal = self._noise = self._weight = 0.0

    def update(self, rows: Rows, ranks: int | None) -> None:
        """Take in rows that follow those seen before."""
        signal, noise = noise_terms(rows, ranks)
        signal, noise = signal[~np.isnan(signal)], noise[~np.isnan(noise)]
        weights, decay = DECAY ** np.arange(len(signal) - 1, -1, -1.0), DECAY ** len(signal)
        self._signal = self._signal * decay + float(weights @ signal)
        self._noise = self._noise * decay + float(weights @ noise)
        self._weight = self._weight * decay + float(weights.sum())
        self.steps += len(signal)

    @property
    def terms(self) -> tuple[float, float]:
        """The averages of |G|² and of tr(Σ); NaN before the first step."""
        return (self._signal / self._weight, self._noise / self._weight) if self._weight else (np.nan, np.nan)


def noise_scale(averages: Iterable[NoiseAverage]) -> NoiseScale:
    """Combine the averages of the ranks of a run, each of which saw micro-batches of its own."""
    known = [average for average in averages if average.steps]
    terms = np.array([average.terms for average in known]).reshape(-1, 2)
    return _ratio(terms[:, 0], terms[:, 1], max((average.steps for average in known), default=0))


def _ratio(signals: Floats, noises: Floats, steps: int) -> NoiseScale:
    signal = float(signals.mean()) if len(signals) else np.nan
    noise = float(noises.mean()) if len(noises) else np.nan
    scale = max(0.0, noise / signal) if steps >= MIN_STEPS and signal > 0 else np.nan
    return NoiseScale(scale=scale, signal=signal, noise=noise, steps=steps)


def average_noise(rows: Rows, ranks: int | None) -> NoiseScale:
    """Estimate the noise scale over all of the rows, each counting alike."""
    signal, noise = noise_terms(rows, ranks)
    known = ~np.isnan(signal)
    return _ratio(signal[known], noise[known], int(np.count_nonzero(known)))


@dataclass(frozen=True, repr=False)
class Samples:
    """What was measured every so many steps only, as NumPy arrays over S samples and L layers, in step order.

    A step that was skipped is there, with an update of 0.
    """

    manifest: Manifest
    info: SampleInfo
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """Number of the optimizer step, int64[S]."""
        return self.rows["step"].astype(np.int64)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names that :meth:`stat` takes."""
        return self.info.columns

    def stat(self, name: str) -> npt.NDArray[np.float32]:
        """One column by name, of each parameter, float32[S, P]."""
        if name not in self.columns:
            raise KeyError(f"sample {name!r}: the recorded ones are {', '.join(self.columns)}")
        return self.rows["parameters"][:, self.columns.index(name), :].astype(np.float32)

    @property
    def weight_norms(self) -> Floats:
        """L2 norm of each layer's weights before the step, float64[S, L]; 0 where none was measured."""
        return self._layers("weight_norm")

    @property
    def update_norms(self) -> Floats:
        """L2 norm of what the step added to each layer's weights, float64[S, L]."""
        return self._layers("update_norm")

    @property
    def update_ratio(self) -> Floats:
        """Norm of the update over that of the weights, float64[S, L]; NaN where the weights are 0 or not measured."""
        weights = self.weight_norms
        return np.divide(self.update_norms, weights, where=weights > 0, out=np.full_like(weights, np.nan))

    @property
    def cosine(self) -> Floats:
        """Cosine of each layer's gradient and that of the step before, float64[S, L]; NaN where it is not known."""
        return self._cosines(self.manifest.layer_index, len(self.manifest.layers))

    @property
    def total_cosine(self) -> Floats:
        """Cosine of the whole gradient and that of the step before, float64[S]; NaN where it is not known."""
        return self._cosines(np.zeros(len(self.manifest.parameters), np.intp), 1)[:, 0]

    def _layers(self, name: str) -> Floats:
        return compose(self.stat(name), self.manifest.layer_index, len(self.manifest.layers))

    def _cosines(self, index: npt.NDArray[np.intp], groups: int) -> Floats:
        if "cosine" not in self.columns:
            return np.full((len(self), groups), np.nan)
        norms, before, cosines = (
            self.stat(name).astype(np.float64) for name in ("grad_norm", "grad_norm_before", "cosine")
        )
        known = np.isfinite(norms) & np.isfinite(before) & np.isfinite(cosines)
        norms, before, cosines = (np.where(known, each, 0.0) for each in (norms, before, cosines))
        lengths = compose(norms, index, groups) * compose(before, index, groups)
        dots = _sums(norms * before * cosines, index, groups)
        return np.divide(dots, lengths, where=lengths > 0, out=np.full_like(dots, np.nan))

    def to_pandas(self) -> pd.DataFrame:
        """Return one row a sample: ``update_ratio/<layer>``, ``weight_norm/<layer>`` and, if on, ``cosine/<layer>``.

        Raises ImportError, saying what to install, where pandas is missing.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("Samples.to_pandas needs pandas: pip install 'gradiometer[pandas]'") from error
        found = {"update_ratio": self.update_ratio, "weight_norm": self.weight_norms}
        if "cosine" in self.columns:
            found["cosine"] = self.cosine
        columns = {
            f"{name}/{layer}": values[:, place]
            for name, values in found.items()
            for place, layer in enumerate(self.manifest.layers)
        }
        return pd.DataFrame(columns, index=pd.Index(self.steps, name="step"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """An incident of non-finite gradients in a job of several ranks, and whose it was."""

    step: int
    """Its first step."""
    parameter: str
    """The first of them in backward order, on the lowest rank."""
    ranks: tuple[int, ...]
    """Those whose own gradients, before the reduction between ranks, held NaN or Inf."""
    unknown: tuple[int, ...]
    """Those of which that is not known, for their own gradients could not be looked at."""


def bad_episodes(run: Path) -> list[Episode]:
    """List the episodes of non-finite gradients of a run directory, from the events of all its ranks."""
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for rank, path in _ranks(run).items():
        for event in read_events(path / "events.jsonl")[0]:
            if event.get("kind") == "nonfinite" and isinstance(event.get("step"), int):
                found.setdefault(event["step"], {})[rank] = event
    return [
        Episode(
            step=step,
            parameter=str(next(iter(events.values())).get("parameter", "unknown")),
            ranks=tuple(rank for rank, event in events.items() if event.get("own") is True),
            unknown=tuple(rank for rank, event in events.items() if event.get("own") is None),
        )
        for step, events in sorted(found.items())
    ]


def _ranks(run: Path) -> Mapping[int, Path]:
    return {rank_of(path): path for path in find_ranks(run)}


def _readable(path: Path) -> dict[int, float]:
    """Return a rank's own norms by step; none where its files cannot be read."""
    try:
        return _own_norms(path)
    except (OSError, RunFormatError):
        return {}


def microbatch_norms(rows: Rows) -> Floats:
    """Global L2 norm, root mean square over a rank's own micro-batches, float64[T]; NaN where hooks were not armed."""
    hooked = (rows["flags"] & np.uint32(Flag.HOOKED)) != 0
    norms = np.sqrt(np.square(rows["parameters"][:, _MICRO, :].astype(np.float64)).sum(axis=1))
    return np.where(hooked, norms, np.nan)


def rank_ratios(run: Path) -> dict[int, float]:
    """Compare the ranks' gradients before the reduction: each one's norm over the median of the others', over steps.

    The median over those of the newest 256 steps whose backward hooks were armed and whose gradients were finite on
    every rank that can be read; empty where there is none.
    """
    found = {rank: norms for rank, path in _ranks(run).items() if (norms := _readable(path))}
    common = set.intersection(*(set(norms) for norms in found.values())) if len(found) > 1 else set()
    if not common:
        return {}
    table = np.array([[norms[step] for step in sorted(common)] for norms in found.values()])
    return {rank: _ratio_to_others(table, place) for place, rank in enumerate(found)}


def _ratio_to_others(table: Floats, place: int) -> float:
    others = np.median(np.delete(table, place, axis=0), axis=0)
    ratios = np.divide(table[place], others, where=others > 0, out=np.full_like(others, np.nan))
    return float(np.median(ratios))


def _own_norms(path: Path) -> dict[int, float]:
    ring = RingReader(path / "steps.ring", read_manifest(path / "manifest.json").ring)
    try:
        rows = ring.read(after=max(0, int(ring.status()["head"]) - RANK_ROWS))
    finally:
        ring.close()
    norms = microbatch_norms(rows)
    return {int(step): float(norm) for step, norm in zip(rows["step"], norms, strict=True) if np.isfinite(norm)}
