"""Find the runs below a root and follow them: appearing, growing, finishing, crashing, replaced, removed.

Guarantees: a poll does a bounded amount of work; one unreadable run never disturbs another; at most MAX_RANKS rank
directories are held open. One lock orders polls, which run in a thread of their own, and scrapes, which come from the
HTTP server's: a poll holds it for one rank at a time, a scrape while it renders. Nothing is written below the root.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from logging import getLogger
from pathlib import Path

from gradiometer.process import process_alive
from gradiometer.records import find_ranks, find_runs
from gradiometer.tail import Frame, RankTail, RunState, frame, identity
from gradiometer_monitor.following.counts import Counts
from gradiometer_monitor.store import Store

__all__ = ["Run", "Runs"]

log = getLogger(__name__)

MAX_RANKS = 512
"""Rank directories followed at once; each holds a file open. Runs that are over make room for new ones."""
ADOPTED_PER_POLL = 16
DISCOVERY_SHARE = 0.05
"""Share of the time that looking for new directories may take: a root with many old runs is looked at less often."""
DISCOVERY_PAUSE = 30.0
"""Seconds until the next look at most: one that hung on a network says little about the next."""
TURN_SECONDS = 0.25
"""How long a poll stands back at most for those who asked for the lock."""
RETRY_SECONDS = 30.0
"""An unreadable directory is tried again after this long, or at once when its manifest changes."""
HEARTBEAT_SECONDS = 900.0
"""A run of another host, whose process cannot be seen from here, is lost when it was silent for this long."""
CLOCK_JUMP_SECONDS = 60.0
"""When the wall clock moved by so much more or less than time passed, it was set: silence is then counted anew."""
SCRAPES = 2
"""Scrapes that must have shown a run's end before its series may leave."""

Identity = tuple[int, int]


@dataclass(slots=True)
class _Rank:
    """A rank directory that is followed."""

    tail: RankTail
    state: RunState = "running"
    scrapes: int = 0
    """Scrapes since the rank was over."""
    gone_at: float | None = None
    """Heartbeat when the process was first seen to be gone, which need not be asked again."""
    hidden: bool = False
    """The heartbeat moved after that: somebody writes whom this process cannot see, as from another container."""
    excused_until: float = 0.0
    """Before this instant (monotonic) silence is no sign: the clock that it is told by was set."""

    def poll(self) -> bool:
        """Read what came, tell whether there is more, and judge the state."""
        alive = self._alive()  # asked before reading: a process that was gone by now cannot have written after it
        behind = self.tail.poll()
        if alive is False and self.gone_at is None:
            self.gone_at = self.tail.heartbeat
        elif alive is False and self.gone_at != self.tail.heartbeat:
            self.hidden, alive = True, None
        self.judge(alive, time.time())
        return behind

    def _alive(self) -> bool | None:
        if self.hidden:
            return None
        return False if self.gone_at is not None or self.tail.finished else process_alive(self.tail.manifest)

    def judge(self, alive: bool | None, now: float) -> None:
        """Choose the state; ``alive`` is what is known of the process."""
        tail = self.tail
        if tail.finished:
            self.state = "finished"
        elif alive is None:
            silent = now - tail.heartbeat > HEARTBEAT_SECONDS and time.monotonic() >= self.excused_until
            self.state = "lost" if silent else "running"
        else:
            self.state = "running" if alive else "lost"

    def expired(self, now: float, retention_seconds: float) -> bool:
        return self.state != "running" and now - self.tail.heartbeat > retention_seconds


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """A rank directory that cannot be read, and when to try again (monotonic)."""

    identity: Identity | None
    error: str
    retry_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run as it is now; valid while the lock of :meth:`Runs.snapshot` is held."""

    run_id: str
    state: RunState
    ranks: list[RankTail]
    """Lowest first, at least one."""
    states: tuple[RunState, ...] = ()
    """Of each rank."""

    @property
    def key(self) -> tuple[Path, Identity]:
        """Tell the run from a later one of the same name: what is cached for one must not serve the other."""
        return self.ranks[0].path, self.ranks[0].identity

    def frame(self) -> Frame:
        """Frame the run's samples. Raises OSError if its newest rows cannot be read."""
        return frame(self.ranks, self.state)


class Runs:
    """The runs below ``root``, as far as the last :meth:`poll` saw them.

    A run that is over leaves ``retention_seconds`` after its last heartbeat, but not before two scrapes showed its
    end. One that was past it when the monitor started is never shown. An unreadable one is reported as long, by the
    age of its files. With a ``store``, what was counted outlives the monitor.
    """

    def __init__(self, root: Path, *, retention_seconds: float, store: Store | None = None) -> None:
        self.root = root
        self.retention_seconds = retention_seconds
        self.ready = threading.Event()
        """Set once every run that was there has been read as far as it goes."""
        self.polled_at = time.monotonic()
        """When the last poll was done, or this began."""
        self.poll_seconds, self.poll_succeeded = 0.0, True
        """How long the last poll took, and whether every run could be read."""
        self._ranks: dict[Path, _Rank] = {}
        self._unreadable: dict[Path, _Unreadable] = {}
        self._archived: dict[Path, Identity] = {}
        self._warned: dict[Path, str] = {}
        self._started = time.time()
        self._waiting: list[Path] = []
        self._discover_at = 0.0
        self._lock, self._asked, self._asking = threading.RLock(), threading.Lock(), 0
        self._counts = Counts(store)
        self._clock = time.time() - time.monotonic()

    def poll(self) -> bool:
        """Look at the directories once; tell whether there is more to read at once. Never raises OSError."""
        started = time.perf_counter()
        self._watch_clock()
        behind = self._discover()
        for path, rank in list(self._ranks.items()):
            self._let_others_in()
            with self._lock:
                behind |= self._poll_rank(path, rank)
        with self._lock:
            self._retire()
        self._counts.keep_some([rank.tail for rank in self._ranks.values()])
        self.poll_seconds = time.perf_counter() - started
        self.poll_succeeded = not self._unreadable and not self._warned
        self.polled_at = time.monotonic()
        if not self._waiting and all(rank.tail.caught_up for rank in self._ranks.values()):
            self.ready.set()
        return behind

    def _let_others_in(self) -> None:
        """Wait until who asked for the lock has got it: a thread that takes it again at once would keep it."""
        deadline = time.monotonic() + TURN_SECONDS
        while self._asking and time.monotonic() < deadline:
            time.sleep(0.0002)

    def _watch_clock(self) -> None:
        """Excuse the silence of every run when the wall clock was set."""
        before, self._clock = self._clock, time.time() - time.monotonic()
        if abs(self._clock - before) > CLOCK_JUMP_SECONDS:
            log.warning("the clock was set by %+.0f s", self._clock - before)
            for rank in self._ranks.values():
                rank.excused_until = time.monotonic() + HEARTBEAT_SECONDS

    @contextmanager
    def snapshot(self, *, scrape: bool = False) -> Iterator[list[Run]]:
        """Hold the lock and give the runs, by name; a ``scrape`` counts towards the leaving of those that are over.

        A run is held back until its lowest rank was read as far as it goes, another rank until it was itself:
        otherwise a scrape would take what happened long ago for an increase of now.
        """
        with self._taken():
            shown = [_caught_up(members) for members in self._grouped() if members[0].tail.caught_up]
            for rank in chain.from_iterable(shown):
                rank.scrapes += scrape and rank.state != "running"
            yield [_run(members) for members in shown]

    @contextmanager
    def _taken(self) -> Iterator[None]:
        """Hold the lock, before the next rank is polled."""
        with self._asked:
            self._asking += 1
        try:
            self._lock.acquire()
        finally:
            with self._asked:
                self._asking -= 1
        try:
            yield
        finally:
            self._lock.release()

    def unreadable(self) -> dict[str, str]:
        """Map ``run_id``, ``run_id/rank-…`` or the root's name, for each unreadable directory, to the kind of error."""
        with self._lock:
            return {self._named(path): each.error for path, each in sorted(self._unreadable.items())}

    def _named(self, path: Path) -> str:
        return self.root.name if path == self.root else str(path.relative_to(self.root))

    def let_go(self, run: Path) -> bool:
        """Tell whether nothing of a run is served any more, nor will be: each rank was shown, or was over too long.

        One that has not been looked at yet, as before the first poll, is not let go.
        """
        try:
            found = {path: identity(path) for path in find_ranks(run)}
        except OSError:
            return False
        with self._taken():
            return found.items() <= self._archived.items()

    def close(self) -> None:
        """Keep what was counted and close every file. Idempotent."""
        with self._lock:
            self._counts.keep([rank.tail for rank in self._ranks.values()])
            for path in list(self._ranks):
                self._drop(path)

    def _discover(self) -> bool:
        """Adopt some of the directories that are new, looking for them when it is due; tell whether more wait."""
        if not self._waiting and time.monotonic() >= self._discover_at:
            self._look()
        for path in self._waiting[:ADOPTED_PER_POLL]:
            if self._unknown(path) is not None:
                self._adopt(path)
        del self._waiting[:ADOPTED_PER_POLL]
        return bool(self._waiting)

    def _look(self) -> None:
        """List the directories that are not followed, the newest first, and forget those that are gone."""
        started = time.monotonic()
        found, refused = [], set()
        try:
            for run in find_runs(self.root):
                try:
                    found += find_ranks(run)
                except PermissionError as error:
                    refused.add(run)
                    self._fail(run, None, error)
        except OSError as error:
            self._fail(self.root, None, error)
            return
        with self._lock:
            self._prune(refused.union(found))
            new = sorted((item for path in found if (item := self._unknown(path)) is not None), reverse=True)
        self._waiting = [path for _, path in new]
        now = time.monotonic()
        self._discover_at = now + min((now - started) * (1 / DISCOVERY_SHARE - 1), DISCOVERY_PAUSE)

    def _prune(self, found: set[Path]) -> None:
        """Forget the directories that are gone."""
        for path in self._ranks.keys() - found:
            self._drop(path)
        for known in (self._unreadable, self._archived, self._warned):
            for path in known.keys() - found:
                known.pop(path)

    def _unknown(self, path: Path) -> tuple[int, Path] | None:
        """Return the change time and path of a directory that is new, was replaced, or is to be tried again."""
        try:
            found = identity(path)
        except OSError:
            return None  # it went between the listing and now
        if (failed := self._unreadable.get(path)) is not None:
            known = failed.identity if time.monotonic() < failed.retry_at else None
        else:
            held = self._ranks.get(path)
            known = held.tail.identity if held else self._archived.get(path)
        return None if found == known else (found[1], path)

    def _adopt(self, path: Path) -> None:
        """Begin to follow a directory. It is opened without the lock, for a large manifest takes its time."""
        try:
            with self._lock:
                self._drop(path)
                self._archived.pop(path, None)
                self._make_room()
            rank = _Rank(RankTail(path, self._counts.recall))
            rank.judge(process_alive(rank.tail.manifest), time.time())
        except Exception as error:  # whatever is wrong with one run, the others must be followed
            self._fail(path, _identity(path), error)
            return
        with self._lock:
            self._unreadable.pop(path, None)
            self._warned.pop(path, None)
            self._ranks[path] = rank
            if rank.expired(self._started, self.retention_seconds):
                self._archive(path)

    def _make_room(self) -> None:
        if len(self._ranks) >= MAX_RANKS:
            over = [rank for rank in self._ranks.values() if rank.state != "running"]
            if not over:
                raise _TooManyRunsError(f"{MAX_RANKS} ranks of running jobs are followed already")
            self._archive(min(over, key=lambda rank: rank.tail.heartbeat).tail.path)

    def _poll_rank(self, path: Path, rank: _Rank) -> bool:
        try:
            if identity(path) != rank.tail.identity:
                self._drop(path)
                self._waiting.insert(0, path)
                return True
            caught_up = rank.tail.caught_up
            behind = rank.poll()
        except FileNotFoundError:
            self._drop(path)
            return False
        except Exception as error:  # as in _adopt
            self._drop(path)
            self._fail(path, _identity(path), error)
            return False
        if rank.tail.caught_up and not caught_up and (uncounted := rank.tail.summary.uncounted):
            log.info(
                "run %s: %d steps had left the ring before the monitor came: histograms and counts of layers "
                "begin after them",
                path,
                uncounted,
            )
        if rank.tail.truncated:
            self._warn(path, "its ring was truncated: rows are missing that had been written")
        return behind

    def _retire(self) -> None:
        """Let go of what is over and was shown long enough, and of ranks that an earlier start of a run left."""
        now = time.time()
        for members in self._grouped():
            lead = members[0].tail.manifest.created_ns / 1e9
            ended = all(rank.expired(now, self.retention_seconds) and rank.scrapes >= SCRAPES for rank in members)
            for rank in members:
                if ended or (rank.state != "running" and rank.tail.heartbeat < lead):
                    self._archive(rank.tail.path)
        for path, failed in list(self._unreadable.items()):
            if failed.identity and now - _changed(path) > self.retention_seconds:
                self._archived[path] = failed.identity
                self._unreadable.pop(path)
                self._warned.pop(path, None)

    def _grouped(self) -> list[list[_Rank]]:
        ranks = sorted(self._ranks.values(), key=lambda rank: rank.tail.path)
        return [list(group) for _, group in groupby(ranks, key=lambda rank: rank.tail.run_id)]

    def _archive(self, path: Path) -> None:
        self._archived[path] = self._ranks[path].tail.identity
        self._warned.pop(path, None)
        self._drop(path)

    def _drop(self, path: Path) -> None:
        if rank := self._ranks.pop(path, None):
            self._counts.keep([rank.tail])
            rank.tail.close()

    def _fail(self, path: Path, found: Identity | None, error: Exception) -> None:
        with self._lock:
            retry_at = time.monotonic() + RETRY_SECONDS
            self._unreadable[path] = _Unreadable(identity=found, error=type(error).__name__, retry_at=retry_at)
            expected = isinstance(error, (OSError, ValueError, _TooManyRunsError))
            self._warn(path, str(error), None if expected else error)

    def _warn(self, path: Path, message: str, error: Exception | None = None) -> None:
        """Log what is wrong with a directory, once for each message."""
        if self._warned.get(path) != message:
            self._warned[path] = message
            if path == self.root:
                remedy = "run the monitor as the user who trains, or name another directory with --dir"
                log.warning("the directory of runs, %s, cannot be read: %s; %s", path, message, remedy, exc_info=error)
                return
            log.warning("run %s cannot be followed in full, others are not affected: %s", path, message, exc_info=error)


class _TooManyRunsError(Exception):
    """The bound on followed directories is reached."""


def _caught_up(ranks: list[_Rank]) -> list[_Rank]:
    return [rank for rank in ranks if rank.tail.caught_up]


def _run(ranks: list[_Rank]) -> Run:
    """A run is lost if a rank of it is, and else what its lowest rank is, like everything about it that has no rank."""
    lead = ranks[0].tail.manifest.created_ns / 1e9
    lost = any(rank.state == "lost" and rank.tail.heartbeat >= lead for rank in ranks)  # not of an earlier start
    state = "lost" if lost else ranks[0].state
    states = tuple(rank.state for rank in ranks)
    return Run(run_id=ranks[0].tail.run_id, state=state, ranks=[rank.tail for rank in ranks], states=states)


def _identity(path: Path) -> Identity | None:
    try:
        return identity(path)
    except OSError:
        return None


def _changed(path: Path) -> float:
    """Return when the files of a rank directory were last written, in seconds since the epoch; 0 if they are gone."""
    times = [file.stat().st_mtime for name in ("manifest.json", "steps.ring") if (file := path / name).exists()]
    return max(times, default=0.0)
