"""A recorded run as NumPy arrays: what notebooks, the command line and tests read. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gradiometer.insight import NoiseScale, Samples, average_noise, compose, replicas, shares
from gradiometer.live.revisions import History, Mode, read_history
from gradiometer.records import (
    OWN_CLIPPING,
    STATS,
    Flag,
    Manifest,
    RingReader,
    Rows,
    own_clipping,
    rank_directory,
    read_events,
    read_manifest,
)

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Run", "compose", "open_run"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class Run:
    """One rank of a recorded run, as NumPy arrays over the T steps the ring still holds.

    Every array is a copy of complete rows, in step order; open the run again to see newer steps.
    """

    path: Path
    manifest: Manifest
    rows: Rows
    status: np.void
    events: list[dict[str, Any]]
    truncated: bool
    """The ring file had lost its tail: rows are missing that the writer had written."""
    history: History
    """The policies that were in force."""
    samples: Samples | None = None
    """What was measured every so many steps only: weights, updates, cosines; None where nothing was."""

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}: {len(self)} steps, {len(self.parameters)} parameters)"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def parameters(self) -> list[str]:
        """Parameter names, in the order of the columns of :attr:`parameter_norms`."""
        return [parameter.name for parameter in self.manifest.parameters]

    @property
    def layers(self) -> list[str]:
        """Layer names, in the order of the columns of :meth:`layer_norms`."""
        return list(self.manifest.layers)

    @property
    def steps(self) -> npt.NDArray[np.int64]:
        """Number of the optimizer step, int64[T]; counted from 0 since the first attach, or as set by a checkpoint."""
        return self._column("step").astype(np.int64)

    @property
    def time(self) -> Floats:
        """Wall clock of each step in seconds since the epoch, float64[T]."""
        return self._column("time_ns").astype(np.float64) / 1e9

    @property
    def grad_norm_preclip(self) -> Floats:
        """Global L2 norm before any clipping, the loop's own included, loss scale divided out, float64[T]."""
        return self._floats("grad_norm_preclip")

    @property
    def grad_norm_postclip(self) -> Floats:
        """Global L2 norm of what the optimizer was given, float64[T]."""
        return self._floats("grad_norm_postclip")

    @property
    def coefficient(self) -> Floats:
        """Ratio of the global norms after and before clipping, float64[T]; 1 when nothing was clipped,
        0 for a skipped step, NaN where zeros took the place of non-finite gradients."""
        return self._floats("coefficient")

    @property
    def loss(self) -> Floats:
        """Loss as logged, float64[T]; NaN where none was."""
        return self._floats("loss")

    @property
    def learning_rate(self) -> Floats:
        """Learning rate of the first param group, float64[T]."""
        return self._floats("learning_rate")

    @property
    def loss_scale(self) -> Floats:
        """Loss scale of the GradScaler, float64[T]; NaN where there was none."""
        return self._floats("loss_scale")

    @property
    def step_seconds(self) -> Floats:
        """Wall time since the step before, float64[T]; NaN for the first."""
        return self._floats("step_seconds")

    @property
    def optimizer(self) -> npt.NDArray[np.int64]:
        """Place in the list given to ``attach`` of the optimizer that stepped, or stepped first, int64[T]."""
        return self._column("optimizer").astype(np.int64)

    @property
    def first_nonfinite(self) -> list[str | None]:
        """For each step the parameter that was first, in backward order, to be NaN or Inf; None if none was."""
        names = self.parameters
        return [names[index] if index >= 0 else None for index in self._column("first_nonfinite").tolist()]

    @property
    def skipped(self) -> npt.NDArray[np.bool_]:
        """Steps in which the optimizer did not move the parameters, bool[T]."""
        return self._flag(Flag.SKIPPED)

    @property
    def nonfinite(self) -> npt.NDArray[np.bool_]:
        """Steps in which some gradient held NaN or Inf, bool[T]."""
        return self._flag(Flag.NONFINITE)

    @property
    def _stages(self) -> list[tuple[str, Mode]]:
        slots = (slot for revision in self.history.revisions for _, slot in revision.named)
        return list(dict.fromkeys((slot.name, slot.mode) for slot in slots))

    @property
    def policies(self) -> list[str]:
        """Names of the policies that decided about some step, those in force at attach first, then as they came.

        One that was in shadow and then acted is there twice; :attr:`shadow` tells which is which.
        """
        return [name for name, _ in self._stages]

    @property
    def clipped(self) -> npt.NDArray[np.bool_]:
        """For each of :attr:`policies`, the steps in which it changed the gradients, bool[T, policies].

        Of one in shadow (:attr:`shadow`), the steps in which it would have.
        """
        clipped = np.zeros((len(self), len(self._stages)), np.bool_)
        for column, rows, place in self._places():
            clipped[rows, column] = self._column("clipped")[rows] >> np.uint32(place) & 1
        return clipped

    @property
    def thresholds(self) -> npt.NDArray[np.float32]:
        """Threshold of each of :attr:`policies`, float32[T, policies]; NaN in steps about which it did not decide."""
        return self._of_policies("policy_threshold")

    @property
    def coefficients(self) -> npt.NDArray[np.float32]:
        """Smallest factor by which each of :attr:`policies` scaled a gradient, or in shadow would have,
        float32[T, policies]; NaN in steps about which it did not decide."""
        return self._of_policies("policy_coefficient")

    def _of_policies(self, name: str) -> npt.NDArray[np.float32]:
        values = np.full((len(self), len(self._stages)), np.nan, np.float32)
        for column, rows, place in self._places():
            values[rows, column] = self._column(name)[rows, place]
        return values

    def _places(self) -> Iterator[tuple[int, npt.NDArray[np.bool_], int]]:
        """Yield for each policy the rows of each revision, bool[T], and its place in their columns."""
        columns = {slot: column for column, slot in enumerate(self._stages)}
        revisions = self._column("policy_revision")
        for revision in self.history.revisions:
            rows: npt.NDArray[np.bool_] = revisions == revision.revision
            for place, slot in revision.named:
                yield columns[slot.name, slot.mode], rows, place

    @property
    def shadow(self) -> npt.NDArray[np.bool_]:
        """Which of :attr:`policies` were in shadow, deciding and never acting, bool[policies]."""
        return np.array([mode == "shadow" for _, mode in self._stages], np.bool_)

    @property
    def own_clipping(self) -> dict[str, npt.NDArray[np.bool_]]:
        """The steps in which the loop's own ``clip_grad_norm_`` or ``clip_grad_value_`` changed the gradients, bool[T];
        only of those that it calls."""
        bits, used = self._column("clipped"), own_clipping(self.rows, self.status)
        return {
            name: (bits >> np.uint32(slot) & 1).astype(np.bool_) for name, slot in OWN_CLIPPING.items() if name in used
        }

    @property
    def parameter_norms(self) -> npt.NDArray[np.float32]:
        """L2 norm of each parameter's gradient before clipping, float32[T, P]; negative zero where it had none."""
        return self.stat("grad_norm_preclip")

    @property
    def scalars(self) -> dict[str, Floats]:
        """What ``Agent.log`` recorded beside the loss: name to float64[T], NaN where nothing was logged."""
        names = [e["names"] for e in self.events if e.get("kind") == "scalars"]
        return {
            name: self._column("scalars")[:, slot].astype(np.float64)
            for slot, name in enumerate(names[-1] if names else ())
        }

    def stat(self, name: str) -> npt.NDArray[np.float32]:
        """One per-parameter column of :data:`STATS` by name, float32[T, P]."""
        if name not in STATS:
            raise KeyError(f"stat {name!r}: the recorded ones are {', '.join(STATS)}")
        return self.rows["parameters"][:, STATS.index(name), :].astype(np.float32)

    def layer_norms(self, stat: str = "grad_norm_preclip") -> Floats:
        """L2 norm of each layer, float64[T, L]: the root of the sum of its parameters' squared norms."""
        return compose(self.stat(stat), self.manifest.layer_index, len(self.layers))

    def layer_shares(self) -> Floats:
        """Share of each layer in the squared norm before clipping, float64[T, L]; NaN where that is not finite."""
        return shares(self.layer_norms())

    def noise_scale(self, last: int | None = None) -> NoiseScale:
        """Estimate the gradient noise scale, in micro-batches, over the ``last`` steps or all that the ring holds.

        Only steps whose backward hooks were armed can tell: attach with ``backward="every"`` for many of them.
        """
        return average_noise(self.rows if last is None else self.rows[-last:], replicas(self.manifest))

    def to_pandas(self) -> pd.DataFrame:
        """Return one row a step: its numbers, ``log/<name>`` of what was logged, ``layer/<name>`` of pre-clip norms.

        Raises ImportError, saying what to install, where pandas is missing.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("Run.to_pandas needs pandas: pip install 'gradiometer[pandas]'") from error
        columns: dict[str, npt.NDArray[Any]] = {
            name: getattr(self, name)
            for name in (
                "time", "grad_norm_preclip", "grad_norm_postclip", "coefficient",
                "loss", "learning_rate", "loss_scale", "step_seconds", "optimizer", "skipped", "nonfinite",
            )
        }  # fmt: skip
        columns |= {f"log/{name}": values for name, values in self.scalars.items()}
        columns |= dict(zip((f"layer/{name}" for name in self.layers), self.layer_norms().T, strict=True))
        return pd.DataFrame(columns, index=pd.Index(self.steps, name="step"))

    def _column(self, name: str) -> npt.NDArray[Any]:
        column: npt.NDArray[Any] = self.rows[name]
        return column

    def _floats(self, name: str) -> Floats:
        return self._column(name).astype(np.float64)

    def _flag(self, flag: Flag) -> npt.NDArray[np.bool_]:
        chosen: npt.NDArray[np.bool_] = (self._column("flags") & np.uint32(flag)) != 0
        return chosen


def open_run(path: str | os.PathLike[str], rank: int = 0) -> Run:
    """Open a recorded run, finished or still running.

    ``path`` is a run directory (``<root>/<run_id>``), or one of its ``rank-…`` directories, which then wins over
    ``rank``. Raises FileNotFoundError if there is no such run and :class:`RunFormatError` if it cannot be read.
    """
    directory = Path(path)
    if directory.is_symlink() or directory.parent.is_symlink():  # the user's own, of which files are opened by no other
        directory = directory.resolve()
    if not (directory / "manifest.json").is_file():
        directory = rank_directory(directory, rank)
    if not (directory / "manifest.json").is_file():
        raise FileNotFoundError(
            f"no run at {path}: {directory / 'manifest.json'} is not there ('gradiometer runs' lists runs)"
        )
    manifest = read_manifest(directory / "manifest.json")
    ring = RingReader(directory / "steps.ring", manifest.ring)
    try:
        events, _ = read_events(directory / "events.jsonl")
        rows, status = ring.read(), ring.status()
        history = read_history(directory, manifest)  # after the rows, whose policies it must know
        samples = _read_samples(directory, manifest)
        return Run(directory, manifest, rows, status, events, ring.truncated, history, samples)
    finally:
        ring.close()


def _read_samples(directory: Path, manifest: Manifest) -> Samples | None:
    if manifest.samples is None:
        return None
    ring = RingReader(directory / "samples.ring", manifest.samples.ring)
    try:
        return Samples(manifest, manifest.samples, ring.read())
    finally:
        ring.close()
