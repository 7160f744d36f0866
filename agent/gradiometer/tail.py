"""Follow one rank's run directory while it grows, and frame what it says as samples of the catalogue. Needs no torch.

Guarantees: a poll reads a bounded number of bytes; a row that the ring still held when it was opened, or was written
since, is counted once, whole, or not at all and then as missed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from gradiometer.comparison import Trail, compare
from gradiometer.insight import Samples, noise_scale
from gradiometer.live.revisions import Revision, read_history
from gradiometer.policy.actions import CONDITIONS
from gradiometer.records import (
    ACTIONS,
    OWN_CLIPPING,
    Flag,
    RingReader,
    Rows,
    RunFormatError,
    State,
    rank_of,
    read_manifest,
)
from gradiometer.summary import Histogram, LayerSummary, RunSummary

__all__ = ["Beside", "Frame", "RankTail", "RunState", "Sample", "frame", "identity"]

POLL_BYTES = 4 * 2**20
"""Bytes of rows that one poll reads at most, so that a scrape does not wait long; a larger row is read alone."""
NAMED_LAYERS = 20
"""Vanishing layers, exploding ones, and those where gradients first went non-finite, that a scrape names of each."""
RunState = Literal["running", "finished", "lost"]

Sample = tuple[str, tuple[str, ...], float]
"""Name in the catalogue, label values in the catalogue's order, value."""


class RankTail:
    """One rank directory, read as far as it has been written.

    The run's name and the rank are those of the directories, which are unique where those in manifests need not be.
    ``recall`` gives, for the new tail, what an earlier reader of the same directory had counted
    (:meth:`gradiometer.summary.RunSummary.counts`), or None. Raises :class:`gradiometer.records.RunFormatError` or
    OSError if the directory cannot be read.
    """

    def __init__(self, path: Path, recall: Callable[[RankTail], dict[str, Any] | None] | None = None) -> None:
        self.path = path
        self.run_id, self.rank = path.parent.name, rank_of(path)
        self.identity = identity(path)
        self.manifest = read_manifest(path / "manifest.json")
        if len(self.manifest.parameters) != self.manifest.ring.parameters:
            raise RunFormatError(
                f"{path / 'manifest.json'} lists {len(self.manifest.parameters)} parameters, its ring has columns for "
                f"{self.manifest.ring.parameters}: the file was edited, or written by a broken agent"
            )
        self.summary = RunSummary(self.manifest)
        self._ring = RingReader(path / "steps.ring", self.manifest.ring)
        self._samples = self._open_samples()
        self.summary.status = status = self._ring.status()
        if recall is not None and (counts := recall(self)) is not None:
            self._resume(counts, int(status["head"]))
        self._revision: Revision | None = None
        self.caught_up = False
        """Every row that was there when the ring was opened has been counted: no counter climbs through history."""
        self._opened_at, self._newest_sample = int(status["head"]), 0
        self._limit = max(1, POLL_BYTES // self.manifest.ring.dtype.itemsize)

    def _resume(self, counts: dict[str, Any], head: int) -> None:
        """Go on from ``counts``, unless they are of other rows: then what they say is not to be relied upon."""
        try:
            self.summary.resume(counts)
            fits = 0 <= self.summary.counts()["sequence"] <= head + 1
        except (KeyError, TypeError, ValueError, IndexError):
            fits = False
        if not fits:
            self.summary = RunSummary(self.manifest)
            self.summary.status = self._ring.status()

    def recent(self, limit: int) -> Rows:
        """Copy the newest ``limit`` complete rows, oldest first. Raises OSError if they cannot be read."""
        return self._ring.read(max(0, int(self._ring.status()["head"]) - limit))[-limit:]

    def _open_samples(self) -> RingReader | None:
        """Open the ring of samples; a run whose steps can be read is followed without it if need be."""
        if self.manifest.samples is None:
            return None
        try:
            return RingReader(self.path / "samples.ring", self.manifest.samples.ring)
        except (OSError, RunFormatError):
            return None

    def _take_sample(self) -> None:
        info, newest = self.manifest.samples, None if self._samples is None else self._samples.newest()
        if info is not None and newest is not None and int(newest["begin"]) != self._newest_sample:
            self._newest_sample = int(newest["begin"])
            self.summary.layers.sample(Samples(self.manifest, info, newest.reshape(1)))

    @property
    def revision(self) -> Revision | None:
        """The policy by which the newest row was decided and the counters are named; None where that is not known."""
        wanted = int(self.summary.status["policy_revision"])
        if self._revision is None or self._revision.revision != wanted:
            try:
                self._revision = read_history(self.path, self.manifest).find(wanted)
            except (OSError, RunFormatError):
                self._revision = None
        return self._revision

    def poll(self) -> bool:
        """Read the rows that came since the last poll; tell whether there are more than one poll may read."""
        summary, ring = self.summary, self._ring
        head = int(ring.status()["head"])
        first = max(summary.last_seen, head - self.manifest.ring.capacity)
        rows, status = ring.read(max(0, summary.last_seen - 1), self._limit + 1), ring.status()
        if len(rows) and int(rows["begin"][0]) == summary.last_seen:
            summary.amend(rows[0])
            rows = rows[1:]
        self._take_sample()
        if not self.caught_up:
            self._pass_over_history(rows, int(status["head"]))
        # The row at `head` may be amended while it is read, and one after it would then leave a gap.
        summary.update(rows[rows["begin"] <= head], status)
        # Rows before `head` are final: those that were not whole now never will be.
        summary.give_up(min(head - 1, first + self._limit))
        self.caught_up |= summary.last_seen + 1 >= self._opened_at
        return summary.last_seen + 1 < head

    def _pass_over_history(self, rows: Rows, head: int) -> None:
        """Miss none of the rows that the ring had given up before its oldest were read."""
        overtaken = head + 1 - self.manifest.ring.capacity  # the writer may be at the place of the last of them
        if len(rows):
            overtaken = min(overtaken, int(rows["begin"][0]) - 1)
        self.summary.start_after(min(overtaken, self._opened_at))

    @property
    def clip_events(self) -> npt.NDArray[np.uint64]:
        """Steps in which each policy that acts, and the loop itself, changed the gradients; uint64[clippers]."""
        acting = [place for place, slot in self.revision.named if slot.mode == "act"] if self.revision else []
        acted: npt.NDArray[np.uint64] = self.summary.status["clip_events"][[*acting, *OWN_CLIPPING.values()]]
        return acted

    def newest(self) -> np.void | None:
        """Copy the newest row as it is now: the job may have logged its loss since it was followed."""
        row = self._ring.newest()
        return self.summary.newest if row is None else row

    @property
    def finished(self) -> bool:
        return int(self.summary.status["state"]) == State.FINISHED

    @property
    def heartbeat(self) -> float:
        """Wall clock of the newest sign of life that the writer left, in seconds since the epoch."""
        return max(int(self.summary.status["heartbeat_ns"]), self.manifest.created_ns) / 1e9

    @property
    def truncated(self) -> bool:
        """The ring file has lost its tail."""
        return self._ring.truncated

    def close(self) -> None:
        """Close the rings. Idempotent."""
        self._ring.close()
        if self._samples is not None:
            self._samples.close()


def identity(path: Path) -> tuple[int, int]:
    """Tell a rank directory from one that took its place: inode and change of its manifest. Raises OSError."""
    stat = (path / "manifest.json").stat()
    return stat.st_ino, stat.st_mtime_ns


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """What one run exports at one instant."""

    run_id: str
    samples: list[Sample]
    histograms: dict[str, Histogram]
    layers: LayerSummary
    """Of the lowest rank: replicated layers are exported once."""
    beside: Beside | None = None
    """The ranks beside each other, where several are followed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beside:
    """The ranks of a run at one instant, to be compared later: nothing in it changes any more."""

    run_id: str
    ranks: tuple[str, ...]
    steps: npt.NDArray[np.int64]
    """Number of the newest step of each rank, int64[R]."""
    trails: tuple[Trail, ...]

    @property
    def series(self) -> int:
        """How many series :meth:`samples` may have."""
        return 3 * len(self.ranks)

    def samples(self) -> Iterator[Sample]:
        """Compare the ranks; what is not known of one is left out."""
        found = compare(self.trails)
        behind = self.steps.max() - self.steps
        columns = {"norm_deviation": found.deviation, "steps_behind": behind, "lag_seconds": found.lag_seconds}
        for name, values in columns.items():
            for rank, value in zip(self.ranks, values.tolist(), strict=True):
                if value == value:
                    yield f"gradiometer_rank_{name}", (self.run_id, rank), value


def frame(ranks: Sequence[RankTail], state: RunState) -> Frame:
    """Frame the ranks of one run, lowest first and at least one; ``state`` is the run's.

    A gauge whose value is not known is left out. Series without a rank are the lowest rank's, except what is lost or
    spent on the run's behalf, which is summed over the ranks.
    """
    lead = ranks[0]
    newest = [tail.newest() for tail in ranks]
    samples = [
        *_run_samples(ranks, state),
        *_known(lead.run_id, _gauges(ranks, newest[0])),
        *_loss_sample(lead, newest[0]),
        *_policy_samples(lead),
        *_action_samples(lead),
        *_layer_states(lead),
        *_origins(lead),
        *(sample for tail, row in zip(ranks, newest, strict=True) for sample in _rank_samples(tail, row)),
    ]
    summary = lead.summary
    histograms = {"gradiometer_grad_norm": summary.grad_norm, "gradiometer_step_seconds": summary.step_seconds}
    beside = _beside(ranks, newest)
    return Frame(run_id=lead.run_id, samples=samples, histograms=histograms, layers=summary.layers, beside=beside)


def _beside(ranks: Sequence[RankTail], newest: Sequence[np.void | None]) -> Beside | None:
    """Put those ranks beside each other that took a step since the newest of them began; None unless there are two.

    The others are what an earlier start of the run has left, and their steps others of the same numbers.
    """
    began = max(tail.manifest.created_ns for tail in ranks) / 1e9
    pairs = [(tail, row) for tail, row in zip(ranks, newest, strict=True) if row is not None]
    pairs = [(tail, row) for tail, row in pairs if tail.heartbeat >= began]
    if len(pairs) < 2:
        return None
    return Beside(
        run_id=ranks[0].run_id,
        ranks=tuple(str(tail.rank) for tail, _ in pairs),
        steps=np.array([int(row["step"]) for _, row in pairs], np.int64),
        trails=tuple(tail.summary.trail.newest for tail, _ in pairs),
    )


def _run_samples(ranks: Sequence[RankTail], state: RunState) -> Iterator[Sample]:
    lead, run = ranks[0], (ranks[0].run_id,)
    for name in ("steps", "nonfinite_steps", "skipped_steps"):
        yield f"gradiometer_{name}_total", run, int(lead.summary.status[name])
    for name in ("agent_errors", "events_dropped", "callback_failures"):
        yield f"gradiometer_{name}_total", run, sum(int(tail.summary.status[name]) for tail in ranks)
    yield "gradiometer_agent_seconds_total", run, sum(float(tail.summary.status["agent_seconds"]) for tail in ranks)
    missed = sum(int(tail.summary.status["rows_dropped"]) + tail.summary.rows_missed for tail in ranks)
    yield "gradiometer_rows_dropped_total", run, missed
    yield "gradiometer_nonfinite_updates_total", run, lead.summary.nonfinite_updates
    yield "gradiometer_skipped_steps_in_a_row", run, lead.summary.skipped_in_a_row
    yield "gradiometer_uncounted_steps", run, lead.summary.uncounted
    for name in get_args(RunState):
        yield "gradiometer_run_state", (*run, name), int(name == state)
    manifest = lead.manifest
    for label in manifest.labels.items():
        yield "gradiometer_run_label_info", (*run, *label), 1
    versions = (manifest.torch_version, manifest.gradiometer_version, str(manifest.world_size))
    for name in ("policy_changes", "policy_rejections"):
        yield f"gradiometer_{name}_total", run, int(lead.summary.status[name])
    names = ",".join(lead.revision.acting) if lead.revision is not None else ""
    yield "gradiometer_run_info", (*run, manifest.job, manifest.device, *versions, names), 1


def _loss_sample(tail: RankTail, newest: np.void | None) -> Iterator[Sample]:
    """Yield the newest loss that was logged: NaN is a value of it, not the lack of one."""
    loss = tail.summary.loss
    if newest is not None and int(newest["flags"]) & Flag.LOSS:
        loss = float(newest["loss"])
    if loss is not None:
        yield "gradiometer_loss", (tail.run_id,), loss


def _gauges(ranks: Sequence[RankTail], newest: np.void | None) -> Iterator[tuple[str, float]]:
    summary = ranks[0].summary
    yield "grad_noise_scale", noise_scale(tail.summary.noise for tail in ranks).scale
    yield "grad_cosine", summary.layers.cosine
    yield "grad_norm_window_max", summary.grad_norm_window_max
    yield "grad_norm_finite_window_max", summary.grad_norm_finite_window_max
    yield "grad_norm_baseline", summary.grad_norm_baseline
    yield "grad_norm_mad", summary.grad_norm_mad
    yield "clip_ratio", summary.clip_ratio
    if newest is not None:
        yield "learning_rate", float(newest["learning_rate"])
        yield "loss_scale", float(newest["loss_scale"])
        yield "policy_revision", int(newest["policy_revision"])


def _known(run_id: str, gauges: Iterator[tuple[str, float]]) -> Iterator[Sample]:
    for name, value in gauges:
        if not np.isnan(value):
            yield f"gradiometer_{name}", (run_id,), value


def _policy_samples(tail: RankTail) -> Iterator[Sample]:
    row, events, revision = tail.summary.newest, tail.summary.status["clip_events"], tail.revision
    slots = [(place, slot.name, slot.mode) for place, slot in revision.named] if revision is not None else []
    slots += [(slot, name, "act") for name, slot in OWN_CLIPPING.items() if name in tail.summary.own_clipping]
    current = row is not None and int(row["policy_revision"]) == int(tail.summary.status["policy_revision"])
    for slot, policy, mode in slots:
        labels = (tail.run_id, policy, mode)
        yield "gradiometer_clip_events_total", labels, int(events[slot])
        for name in ("threshold", "coefficient"):
            value = float(row[f"policy_{name}"][slot]) if row is not None and current else np.nan
            if not np.isnan(value):
                yield f"gradiometer_clip_{name}", labels, value


def _action_samples(tail: RankTail) -> Iterator[Sample]:
    """Yield the counters of the actions that the policy has or had, at 0 before any is called for."""
    armed, counts = int(tail.summary.status["actions_armed"]), tail.summary.status["actions"]
    pairs = ((condition, action) for condition in CONDITIONS for action in ACTIONS)
    for place, pair in enumerate(pairs):
        if armed >> place & 1:
            yield "gradiometer_policy_actions_total", (tail.run_id, *pair), int(counts[place])


def _layer_states(tail: RankTail) -> Iterator[Sample]:
    """Yield how many layers vanish and explode, and the first of them by name."""
    layers = tail.summary.layers
    if not layers.judged:
        return
    for state, flags in (("vanishing", layers.vanishing), ("exploding", layers.exploding)):
        places = (flags & layers.exported).nonzero()[0]
        yield f"gradiometer_layers_{state}", (tail.run_id,), len(places)
        for place in places[:NAMED_LAYERS].tolist():
            yield "gradiometer_layer_state", (tail.run_id, layers.names[place], state), 1


def _origins(tail: RankTail) -> Iterator[Sample]:
    """Yield where gradients first went non-finite: a series a layer would be too many for what most never are."""
    layers = tail.summary.layers
    for place in sorted(layers.origins.newest(NAMED_LAYERS)):
        yield "gradiometer_nonfinite_origin_total", (tail.run_id, layers.names[place]), int(layers.origins.steps[place])


def _rank_samples(tail: RankTail, newest: np.void | None) -> Iterator[Sample]:
    if newest is not None:
        labels = (tail.run_id, str(tail.rank))
        yield "gradiometer_grad_norm_last", labels, float(newest["grad_norm_preclip"])
        yield "gradiometer_last_step_timestamp_seconds", labels, int(newest["time_ns"]) / 1e9
    own, norm = tail.summary.own_nonfinite, tail.summary.microbatch_norm
    if own is not None:
        yield "gradiometer_rank_nonfinite_total", (tail.run_id, str(tail.rank)), own
    if not np.isnan(norm):
        yield "gradiometer_rank_microbatch_norm_last", (tail.run_id, str(tail.rank)), norm
