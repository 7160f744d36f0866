"""What the screen shows, as plain data: a line for each run, and the one run that is looked at. Strings are as read."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradiometer.layer_norms import LayerNorms
from gradiometer.live.revisions import Revision
from gradiometer.records import STATS, Flag, RingReader, Rows, RunFormatError, read_events
from gradiometer.summary import RunSummary
from gradiometer.tail import RankTail, RunState
from gradiometer_monitor.following.runs import Run

__all__ = ["History", "Incident", "LayerLine", "RunLine", "RunView", "Speed", "line_of"]

Floats = npt.NDArray[np.float64]

STEPS = 600
"""Steps of the run that is looked at which the charts show."""
HISTORY_BYTES = 32 * 2**20
"""Rows read at once for the charts; fewer steps are shown of a run whose rows are so large."""
INCIDENTS = 100
"""Newest incidents that are kept for the screen."""
RATE_SECONDS = 10.0
_PRECLIP = STATS.index("grad_norm_preclip")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLine:
    """One run in the list. A number that is not known is None."""

    run_id: str
    state: RunState
    ranks: int
    created: float
    """When the run was started, Unix time."""
    step: int | None
    steps_per_second: float | None
    grad_norm: float | None
    baseline: float | None
    """Usual norm: the median of the newest 512."""
    ratio: float | None
    """The newest norm over the baseline."""
    loss: float | None
    learning_rate: float | None
    clip_ratio: float | None
    """Share of the steps of the last minute that were clipped."""
    nonfinite_steps: int
    skipped_steps: int
    updated: float | None
    """Time of the newest step, Unix time."""

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints: what JSON cannot hold is None."""
        return {
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerLine:
    """One layer of the run that is looked at."""

    name: str
    last: float
    ratio: float
    """Newest norm over the layer's usual one; NaN where that is not known."""
    share: float
    """Of the squared norm of the newest step, 0 to 1."""
    nonfinite: int
    trend: str
    """``vanishing``, ``exploding`` or nothing."""
    norms: Floats
    """Of the steps of the charts, float64[T]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Incident:
    """One event of the run that is looked at."""

    time: float
    step: int | None
    rank: int
    kind: str
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView:
    """The run that is looked at."""

    line: RunLine
    steps: npt.NDArray[np.int64]
    norms: Floats
    """Global norm before clipping, float64[T]."""
    clipped: npt.NDArray[np.bool_]
    nonfinite: npt.NDArray[np.bool_]
    threshold: float | None
    """Of the policy that acts and has the lowest, newest step."""
    layers: list[LayerLine]
    """The most unusual first."""
    incidents: list[Incident]
    """Newest first."""
    policy: str


@dataclass(slots=True)
class Speed:
    """Steps a second of one run, by the rows' own time over the last seconds."""

    _seen: deque[tuple[int, float]] = field(default_factory=deque)

    def update(self, step: int, seconds: float) -> None:
        if not self._seen or self._seen[-1][0] != step:
            self._seen.append((step, seconds))
        while len(self._seen) > 2 and self._seen[1][1] < self._seen[-1][1] - RATE_SECONDS:
            self._seen.popleft()

    @property
    def value(self) -> float | None:
        """None before two different steps were seen."""
        if len(self._seen) < 2:
            return None
        (first, begun), (last, ended) = self._seen[0], self._seen[-1]
        return (last - first) / (ended - begun) if ended > begun and last > first else None


def line_of(run: Run, speed: Speed) -> RunLine:
    """Describe a run for the list; valid while the lock of its snapshot is held."""
    lead = run.ranks[0]
    summary, row = lead.summary, lead.newest()
    status = summary.status
    if row is not None:
        speed.update(int(row["step"]), int(row["time_ns"]) / 1e9)
    norm = None if row is None else float(row["grad_norm_preclip"])
    baseline = _known(summary.grad_norm_baseline)
    seconds = None if row is None else _known(float(row["step_seconds"]))
    return RunLine(
        run_id=run.run_id,
        state=run.state,
        ranks=len(run.ranks),
        created=lead.manifest.created_ns / 1e9,
        step=None if row is None else int(row["step"]),
        steps_per_second=speed.value or (1 / seconds if seconds else None),
        grad_norm=norm,
        baseline=baseline,
        ratio=None if norm is None or not baseline else norm / baseline,
        loss=_loss(summary, row),
        learning_rate=None if row is None else _known(float(row["learning_rate"])),
        clip_ratio=_known(summary.clip_ratio),
        nonfinite_steps=int(status["nonfinite_steps"]),
        skipped_steps=int(status["skipped_steps"]),
        updated=None if row is None else int(row["time_ns"]) / 1e9,
    )


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _loss(summary: RunSummary, row: np.void | None) -> float | None:
    """Return the newest loss that was logged, which may be NaN."""
    return float(row["loss"]) if row is not None and int(row["flags"]) & Flag.LOSS else summary.loss


class History:
    """The newest steps and incidents of one run, which is the one that is looked at. Close it in the end."""

    def __init__(self, tail: RankTail) -> None:
        self.identity = tail.identity
        manifest = tail.manifest
        self._path, self._run_id = tail.path, tail.run_id
        self._ring = RingReader(tail.path / "steps.ring", manifest.ring)
        self._norms = LayerNorms(manifest)
        self._limit = max(1, min(STEPS, HISTORY_BYTES // manifest.ring.dtype.itemsize))
        self._after = max(0, int(self._ring.status()["head"]) - self._limit)
        self._rows: deque[tuple[int, float, int]] = deque(maxlen=self._limit)
        self._layers: deque[npt.NDArray[np.float32]] = deque(maxlen=self._limit)
        self._incidents: deque[Incident] = deque(maxlen=INCIDENTS)
        self._offsets: dict[Path, int] = {}

    def view(self, run: Run, line: RunLine) -> RunView:
        """Read what came, and show the run; valid while the lock of its snapshot is held."""
        self._read_rows()
        self._read_incidents(run)
        lead = run.ranks[0]
        flags = np.array([each[2] for each in self._rows], np.int64)
        return RunView(
            line=line,
            steps=np.array([each[0] for each in self._rows], np.int64),
            norms=np.array([each[1] for each in self._rows], np.float64),
            clipped=(flags & int(Flag.CLIPPED)) != 0,
            nonfinite=(flags & int(Flag.NONFINITE)) != 0,
            threshold=_threshold(lead),
            layers=self._layer_lines(lead),
            incidents=list(reversed(self._incidents)),
            policy=_describe(lead.revision),
        )

    def _read_rows(self) -> None:
        rows: Rows = self._ring.read(self._after, self._limit)
        head = int(self._ring.status()["head"])
        if head - self._after > 2 * self._limit:  # the run is faster than it can be shown: go on with the newest
            self._after = head - self._limit
            rows = self._ring.read(self._after, self._limit)
        if not len(rows):
            return
        self._after = int(rows["begin"][-1])
        columns = (rows[name].tolist() for name in ("step", "grad_norm_preclip", "flags"))
        self._rows.extend(zip(*columns, strict=True))
        norms, _ = self._norms.compose(rows["parameters"][:, _PRECLIP, :])
        with np.errstate(over="ignore"):
            self._layers.extend(norms.astype(np.float32))

    def _read_incidents(self, run: Run) -> None:
        new = []
        for tail in run.ranks:
            path = tail.path / "events.jsonl"
            try:
                found, self._offsets[path] = read_events(path, self._offsets.get(path, 0))
            except OSError:
                continue
            new += [_incident(raw, tail) for raw in found]
        self._incidents.extend(sorted(new, key=lambda each: each.time))

    def _layer_lines(self, tail: RankTail) -> list[LayerLine]:
        layers = tail.summary.layers
        if layers.last is None or not self._layers:
            return []
        norms = np.array(self._layers, np.float64)
        squares = np.square(layers.last)
        total = float(squares[np.isfinite(squares)].sum()) or 1.0
        shown = np.flatnonzero(layers.exported)
        rank = np.nan_to_num(layers.anomaly(), nan=-np.inf)
        order = shown[np.lexsort((-rank[shown], -layers.nonfinite[shown]))]
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = layers.last / layers.median
        return [
            LayerLine(
                name=layers.names[place],
                last=float(layers.last[place]),
                ratio=float(ratio[place]),
                share=float(squares[place] / total) if np.isfinite(squares[place]) else float("nan"),
                nonfinite=int(layers.nonfinite[place]),
                trend="vanishing" if layers.vanishing[place] else "exploding" if layers.exploding[place] else "",
                norms=norms[:, place],
            )
            for place in order
        ]

    def close(self) -> None:
        """Close the ring. Idempotent."""
        self._ring.close()


def open_history(tail: RankTail) -> History | None:
    """Open the history of a run; None if it cannot be read just now."""
    try:
        return History(tail)
    except (OSError, RunFormatError):
        return None


def _incident(raw: dict[str, Any], tail: RankTail) -> Incident:
    step, time_ns = raw.get("step"), raw.get("time_ns")
    return Incident(
        time=(time_ns if isinstance(time_ns, int) else tail.manifest.created_ns) / 1e9,
        step=step if isinstance(step, int) else None,
        rank=tail.rank,
        kind=str(raw.get("kind", "unreadable")),
        message=str(raw.get("message", "")),
    )


def _threshold(tail: RankTail) -> float | None:
    """Return the lowest threshold of the policies that act, as of the newest step."""
    row, revision = tail.summary.newest, tail.revision
    if row is None or revision is None:
        return None
    values = [float(row["policy_threshold"][place]) for place, slot in revision.named if slot.mode == "act"]
    return min((value for value in values if np.isfinite(value)), default=None)


def _describe(revision: Revision | None) -> str:
    """Write a policy in a line, as it would be called."""
    if revision is None:
        return "not known"
    policy = revision.policy or {}
    parts = [
        f"{label}{_stage(stage)}"
        for label, key in (("", "pipeline"), ("shadow ", "shadow"))
        for stage in policy.get(key, ())
    ]
    who = f", by {revision.by}" if revision.by else ""
    return f"{', '.join(parts) or 'observes only'}  (revision {revision.revision} from step {revision.step}{who})"


def _stage(stage: Any) -> str:
    if not isinstance(stage, dict) or len(stage) != 1:
        return str(stage)
    ((kind, settings),) = stage.items()
    given = ", ".join(f"{name}={value}" for name, value in settings.items()) if isinstance(settings, dict) else ""
    return f"{kind}({given})" if given else str(kind)
