"""Follow the runs in a thread of its own, and give the screen what it shows, whole, at each look."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from logging import getLogger

from gradiometer_monitor.following.runs import Run, Runs
from gradiometer_monitor.top.view import History, RunLine, RunView, Speed, line_of, open_history

__all__ = ["Follower", "Snapshot"]

log = getLogger(__name__)

CATCH_UP_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """The runs at one instant."""

    lines: list[RunLine] = field(default_factory=list)
    unreadable: int = 0
    """Directories that cannot be read."""
    view: RunView | None = None
    """The run that is looked at, if it is there."""
    ready: bool = False
    """Whether what there was at the start has been read."""
    error: str = ""


class Follower:
    """Polls ``runs`` every ``seconds``; :attr:`snapshot` is always whole. ``changed`` is called after each look."""

    def __init__(self, runs: Runs, seconds: float, changed: Callable[[], None] = lambda: None) -> None:
        self.snapshot = Snapshot()
        self.root = runs.root
        self._runs, self._seconds, self._changed = runs, seconds, changed
        self._selected: str | None = None
        self._history: History | None = None
        self._speeds: dict[str, Speed] = {}
        self._stop, self._now = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="gradiometer-top", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def select(self, run_id: str | None) -> None:
        """Look at a run, or at none."""
        self._selected = run_id
        self._now.set()

    def stop(self) -> None:
        """End the thread and close every file. Idempotent."""
        self._stop.set()
        self._now.set()
        if self._thread.is_alive():
            self._thread.join(2.0)
        self._look_at(None)
        self._runs.close()

    def look(self) -> bool:
        """Poll once and take a snapshot; tell whether there is more to read at once."""
        behind = self._runs.poll()
        with self._runs.snapshot(scrape=True) as runs:
            self._speeds = {run.run_id: self._speeds.get(run.run_id) or Speed() for run in runs}
            lines = [line_of(run, self._speeds[run.run_id]) for run in runs]
            view = self._view(runs, lines)
        ready, unreadable = self._runs.ready.is_set(), len(self._runs.unreadable())
        self.snapshot = Snapshot(lines=lines, unreadable=unreadable, view=view, ready=ready)
        return behind

    def _view(self, runs: list[Run], lines: list[RunLine]) -> RunView | None:
        selected = self._selected
        found = next(((run, line) for run, line in zip(runs, lines, strict=True) if run.run_id == selected), None)
        if found is None:
            self._look_at(None)
            return None
        run, line = found
        if self._history is None or self._history.identity != run.ranks[0].identity:
            self._look_at(None)
            self._history = open_history(run.ranks[0])
        return None if self._history is None else self._history.view(run, line)

    def _look_at(self, history: History | None) -> None:
        if self._history is not None:
            self._history.close()
        self._history = history

    def _run(self) -> None:
        pause = 0.0
        while True:
            self._now.wait(pause)
            self._now.clear()
            if self._stop.is_set():
                return
            started = time.monotonic()
            try:
                pause = CATCH_UP_SECONDS if self.look() else max(0.0, self._seconds - (time.monotonic() - started))
            except Exception as error:  # the screen must outlive whatever one look met, and say it
                log.debug("a look at the runs failed", exc_info=True)
                self.snapshot = Snapshot(lines=self.snapshot.lines, error=f"{type(error).__name__}: {error}")
                pause = self._seconds
            self._changed()
