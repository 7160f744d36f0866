"""What became of runs, as events of the monitor: started, finished, lost, alive after all.

| kind | when |
|---|---|
| run_started | a run is followed for the first time |
| run_finished | its ranks said goodbye |
| run_lost | a rank's process is gone without a goodbye, or gave no sign of life for too long; carries the last rows |
| run_found | a run that was lost writes again |

Guarantees: each is told once for each start of a run, which its id and the creation time of its lowest rank tell, also
over restarts of the monitor.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np

from gradiometer.process import process_alive
from gradiometer.records import STATS, Flag, Rows, find_ranks
from gradiometer.tail import RankTail, RunState
from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.runs import HEARTBEAT_SECONDS, Run, Runs

__all__ = ["LAST_ROWS", "Incidents"]

log = getLogger(__name__)

LAST_ROWS, LARGEST_LAYERS, RANKS_NAMED = 8, 3, 64
"""Rows that an incident carries, layers of each row, and ranks that are told of one by one."""
SETTLE_SECONDS = 2.0
"""A run of which other ranks still live is told to be lost only after this: what killed one may be killing them."""
FINISH_SECONDS = 60.0
"""A run whose lowest rank finished is told to be finished after this, though others have not."""
START_SECONDS = 30.0
"""How long rank 0 is waited for before a run of which it is not to be seen here is told to have started."""
CLEAN_SECONDS = 3600.0
"""Pause between two looks for notes of runs whose directories are gone."""
PREFIXES = ("told/", "events/", "counts/")
"""Notes that are kept by run: the second part of their key is its id."""


@dataclass(slots=True)
class _Start:
    """One start of a run, and what has been told of it."""

    created_ns: int
    told: list[str] = field(default_factory=list)
    over_since: float | None = None
    """Since when (monotonic) it is lost or finished, as far as this monitor saw."""
    seen_running: bool = False


class Incidents:
    """Tells, through ``events``, what became of the runs of ``runs``."""

    def __init__(self, runs: Runs, events: Events) -> None:
        self._runs, self._events, self._store = runs, events, events.store
        self._starts: dict[str, _Start] = {}
        self._clean_at = time.monotonic() + CLEAN_SECONDS
        self._gone: set[str] = set()
        self._failing: set[str] = set()
        self._recalled = False

    def follow(self) -> None:
        """Look at every run once; for the thread that polls them, after a poll."""
        with self._runs.snapshot() as runs:
            found = list(runs)
        self._starts = {run.run_id: start for run in found if (start := self._starts.get(run.run_id))}
        if not self._recalled and self._runs.ready.is_set():
            self._recalled = True
            self._recall({run.run_id for run in found})
        for run in found:
            try:
                self._judge(run)
                self._failing.discard(run.run_id)
            except Exception as error:  # whatever is wrong with one run, the others must be told of
                if run.run_id not in self._failing:
                    self._failing.add(run.run_id)
                    log.warning(
                        "what became of run %s cannot be told, and will be looked at again: %s", run.run_id, error
                    )
        if time.monotonic() >= self._clean_at:
            self._clean_at = time.monotonic() + CLEAN_SECONDS
            self.clean()

    def _recall(self, followed: set[str]) -> None:
        """Tell what became, while no monitor ran, of runs that are over for too long to be shown."""
        for key, note in self._store.notes("told/").items():
            run_id = key.partition("/")[2]
            told = note.get("told", ()) if isinstance(note, dict) else ()
            if run_id in followed or not told or {"run_finished", "run_lost"}.intersection(told):
                continue
            try:
                with _opened(self._runs.root / run_id) as run:
                    if run is not None and "running" not in run.states:
                        self._judge(run)
            except Exception as error:  # as in follow
                log.warning("what became of run %s cannot be told: %s", run_id, error)
            self._starts.pop(run_id, None)

    def _judge(self, run: Run) -> None:
        start = self._start(run)
        if start is None:
            return
        if "run_started" not in start.told:
            manifest = run.ranks[0].manifest
            layers = f"{len(manifest.layers)} {'layer' if len(manifest.layers) == 1 else 'layers'}"
            message = f"{layers}, world size {manifest.world_size}, on {manifest.host}"
            self._tell(run, start, "run_started", message, time_ns=start.created_ns, host=manifest.host)
        if run.state == "running":
            start.over_since, start.seen_running = None, True
            if "run_lost" in start.told:
                self._tell(run, start, "run_found", "it writes again, or is seen to live: it was not lost")
            return
        start.over_since = time.monotonic() if start.over_since is None else start.over_since
        kind, patience = ("run_lost", SETTLE_SECONDS) if run.state == "lost" else ("run_finished", FINISH_SECONDS)
        waited = time.monotonic() - start.over_since >= patience
        if kind not in start.told and (waited or "running" not in run.states):
            message, data = _lost(run) if kind == "run_lost" else _finished(run)
            happened = None if start.seen_running else int(max(tail.heartbeat for tail in run.ranks) * 1e9)
            step = _newest_step(run.ranks[0])
            self._tell(run, start, kind, message, step=step, time_ns=happened, **data)

    def _start(self, run: Run) -> _Start | None:
        """Return what is known of the present start of a run; None while its lowest rank may be still to come."""
        created = {tail.manifest.created_ns for tail in run.ranks}
        start = self._starts.get(run.run_id)
        if start is None:
            note = self._store.note(f"told/{run.run_id}")
            start = _Start(int(note["created_ns"]), list(note["told"])) if isinstance(note, dict) else None
        if start is None or start.created_ns not in created:
            lead = run.ranks[0]
            if lead.rank and run.state == "running" and time.time() - lead.manifest.created_ns / 1e9 < START_SECONDS:
                return None
            start = _Start(lead.manifest.created_ns)
        self._starts[run.run_id] = start
        return start

    def _tell(self, run: Run, start: _Start, kind: str, message: str, **data: Any) -> None:
        if kind in start.told:
            return
        start.told.append(kind)
        note = {f"told/{run.run_id}": {"created_ns": start.created_ns, "told": start.told}}
        self._events.tell(run.run_id, kind, message, once=f"{start.created_ns:x}", notes=note, **data)

    def clean(self) -> None:
        """Forget the notes of runs whose directories are gone, at the second look: a disk may be away for a while."""
        if not self._runs.root.is_dir():
            return
        with self._runs.snapshot() as runs:
            current = {(tail.run_id, str(tail.rank)): str(tail.manifest.created_ns) for r in runs for tail in r.ranks}
        gone = set()
        for key in (key for prefix in PREFIXES for key in self._store.notes(prefix)):
            _, run_id, *rest = key.split("/")
            replaced = len(rest) == 2 and current.get((run_id, rest[0]), rest[1]) != rest[1]
            if replaced or not (self._runs.root / run_id).is_dir():
                gone.add(key)
        self._store.add((), dict.fromkeys(gone & self._gone))
        self._gone = gone - self._gone


@contextmanager
def _opened(path: Path) -> Iterator[Run | None]:
    """Open a run that is not followed, as far as its newest rows; None if nothing of it is left."""
    tails: list[RankTail] = []
    try:
        for rank in find_ranks(path)[:RANKS_NAMED]:
            tails.append(RankTail(rank))
            tails[-1].summary.newest = tails[-1].newest()
        states = tuple(map(_state, tails))
        state: RunState = "lost" if "lost" in states else "finished"
        yield Run(run_id=path.name, state=state, ranks=tails, states=states) if tails else None
    finally:
        for tail in tails:
            tail.close()


def _state(tail: RankTail) -> RunState:
    if tail.finished:
        return "finished"
    alive = process_alive(tail.manifest)
    silent = time.time() - tail.heartbeat > HEARTBEAT_SECONDS if alive is None else not alive
    return "lost" if silent else "running"


def _newest_step(tail: RankTail) -> int | None:
    return None if tail.summary.newest is None else int(tail.summary.newest["step"])


def _finished(run: Run) -> tuple[str, dict[str, Any]]:
    lead = run.ranks[0]
    status, seconds = lead.summary.status, lead.heartbeat - lead.manifest.created_ns / 1e9
    going = [tail.rank for tail, state in zip(run.ranks, run.states, strict=True) if state == "running"]
    counts = {name: int(status[name]) for name in ("steps", "nonfinite_steps", "skipped_steps")}
    also = f"; ranks {_listed(going)} still run" if going else ""
    data = counts | {"seconds": round(seconds, 3), "loss": _number(lead.summary.loss), "still_running": going}
    return f"finished after {counts['steps']} steps in {seconds:.0f} s{also}", data


def _lost(run: Run) -> tuple[str, dict[str, Any]]:
    """Say which ranks are lost, what is known of the end, and what to look at."""
    lost = [tail for tail, state in zip(run.ranks, run.states, strict=True) if state == "lost"]
    lost = lost or run.ranks[:1]
    first = lost[0]
    manifest, age = first.manifest, max(0.0, time.time() - first.heartbeat)
    seen = process_alive(manifest) is False
    why = (
        f"process {manifest.pid} on {manifest.host} is gone and did not finish"
        if seen
        else f"process {manifest.pid} on {manifest.host}, which cannot be seen from here, gave no sign of life"
    )
    remedy = (
        "look for the reason in the job's own output, in the kernel's log (out of memory?) and at the scheduler; "
        f"'gradiometer show {run.run_id}' has its layers, and started again under this id it is a new start"
    )
    which = f"rank{'s' * (len(lost) > 1)} {_listed([tail.rank for tail in lost])} of {manifest.world_size}"
    at = _newest_step(first)
    message = f"{which}: {why}; last sign of life {age:.0f} s ago, newest step {'none' if at is None else at}"
    data = {
        "ranks": [_ended(tail) for tail in lost[:RANKS_NAMED]],
        "ranks_lost": len(lost),
        "ranks_followed": len(run.ranks),
        "heartbeat_age_seconds": round(age, 3),
        "uncounted_steps": first.summary.uncounted,
        "rows_rank": first.rank,
        "rows": _rows(first),
        "remedy": remedy,
    }
    return message, data


def _ended(tail: RankTail) -> dict[str, Any]:
    return {
        "rank": tail.rank,
        "pid": tail.manifest.pid,
        "host": tail.manifest.host,
        "step": _newest_step(tail),
        "heartbeat": tail.heartbeat,
    }


def _listed(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:LAST_ROWS]))
    return shown if len(ranks) <= LAST_ROWS else f"{shown} and {len(ranks) - LAST_ROWS} more"


def _rows(tail: RankTail) -> list[dict[str, Any]]:
    """Describe the newest rows, oldest first; none where they cannot be read any more."""
    try:
        rows = tail.recent(LAST_ROWS)
    except OSError as error:
        log.warning("the last rows of %s cannot be read: %s", tail.path, error)
        return []
    return [_row(tail, rows[place : place + 1]) for place in range(len(rows))]


def _row(tail: RankTail, rows: Rows) -> dict[str, Any]:
    row, layers = rows[0], tail.summary.layers
    norms = layers.norms(rows["parameters"][:, STATS.index("grad_norm_preclip"), :])[0]
    largest = np.argsort(-np.nan_to_num(norms, nan=np.inf, posinf=np.inf), kind="stable")[:LARGEST_LAYERS]
    flags, first = Flag(int(row["flags"]) & sum(Flag)), int(row["first_nonfinite"])
    parameters = tail.manifest.parameters
    numbers = ("grad_norm_preclip", "grad_norm_postclip", "coefficient", "loss", "learning_rate", "loss_scale")
    return {
        "step": int(row["step"]),
        "time": int(row["time_ns"]) / 1e9,
        **{name: _number(float(row[name])) for name in (*numbers, "step_seconds")},
        "flags": [str(flag.name).lower() for flag in Flag if flag in flags],
        "first_nonfinite": parameters[first].name if 0 <= first < len(parameters) else None,
        "largest_layers": [
            {"layer": layers.names[place], "grad_norm": _number(float(norms[place]))} for place in largest.tolist()
        ],
    }


def _number(value: float | None) -> float | None:
    """Return a number that JSON can hold, or None."""
    return value if value is not None and math.isfinite(value) else None
