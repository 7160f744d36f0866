"""What becomes of runs is told once for each start, with the last rows; and counts outlive the monitor."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradiometer.records import Flag
from gradiometer_monitor.following import counts as counts_module
from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.incidents import LAST_ROWS, SETTLE_SECONDS, Incidents
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.store import Event, Store

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, Start, Train, WaitUntil, WriteRun

NAN = float("nan")


class Daemon:
    """The parts of a monitor that follow runs, and its state, which may be started again."""

    def __init__(self, root: Path) -> None:
        self._root, self.store = root, Store(root / ".monitor")
        self.runs = Runs(root, retention_seconds=900, store=self.store)
        self.incidents = Incidents(self.runs, Events(self.runs, self.store))

    def look(self) -> list[Event]:
        """Poll until there is nothing more, and return the events that the monitor told."""
        while self.runs.poll():
            pass
        self.incidents.follow()
        return [event for event in self.store.events(after=0) if event.rank is None]

    def kinds(self) -> list[str]:
        """Name the events."""
        return [event.kind for event in self.look()]

    def close(self, *, crash: bool = False) -> None:
        """End in order, or without a last word."""
        if crash:
            self.runs._counts._store = None
        self.runs.close()
        self.store.close()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Give a function that starts a monitor anew, after the one before has ended."""
    held: list[Daemon] = []

    def start(*, crash: bool = False) -> Daemon:
        for each in held:
            each.close(crash=crash)
        held[:] = [Daemon(tmp_path)]
        return held[0]

    yield start
    for each in held:
        each.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Put the passing of time in the test's hands."""
    offset, wall, monotonic = [0.0], time.time, time.monotonic
    monkeypatch.setattr(time, "time", lambda: wall() + offset[0])
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + offset[0])
    return offset


def test_a_lost_run_is_told_once_with_its_last_rows(
    daemon: Callable[..., Daemon], make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """The incident says who, when, what was last and what to do; restarts and further looks tell nothing more."""
    norms = np.tile([1.0, 2.0, 3.0, 4.0], (20, 1))
    norms[-1, 2] = NAN
    manifest = make_manifest(process_start=1.0, created_ns=time.time_ns())
    write_run(manifest, norms, first_nonfinite=[-1] * 19 + [2], time_ns=time.time_ns(), loss=[2.5] * 19 + [NAN])
    monitor = daemon()
    started, lost = monitor.look()
    assert (started.kind, started.time_ns) == ("run_started", manifest.created_ns)
    assert (lost.kind, lost.run_id, lost.step) == ("run_lost", "run", 19)
    assert f"process {os.getpid()} on {manifest.host} is gone" in lost.message
    assert lost.data["ranks"][0]["rank"] == 0
    assert "gradiometer show run" in lost.data["remedy"]
    rows = lost.data["rows"]
    assert [row["step"] for row in rows] == list(range(20 - LAST_ROWS, 20))
    assert rows[0]["grad_norm_preclip"] == pytest.approx(30**0.5)
    assert [layer["layer"] for layer in rows[0]["largest_layers"]] == ["head", "blocks.0", "embed"]
    assert rows[-1]["flags"] == ["nonfinite", "skipped"]
    assert (rows[-1]["first_nonfinite"], rows[-1]["grad_norm_preclip"], rows[-1]["loss"]) == ("blocks.0.2", None, None)
    assert rows[-1]["largest_layers"][0] == {"layer": "blocks.0", "grad_norm": None}
    assert "NaN" not in json.dumps(lost.data)
    assert monitor.kinds() == ["run_started", "run_lost"]
    for crash in (False, True):
        assert daemon(crash=crash).kinds() == ["run_started", "run_lost"]


@pytest.mark.parametrize("end", ["run_finished", "run_lost"])
def test_what_ended_while_no_monitor_ran_is_told(
    daemon: Callable[..., Daemon], make_manifest: MakeManifest, write_run: WriteRun, clock: list[float], end: str
) -> None:
    """A run that was seen to run and is over for too long to be shown is told to be over, when it was, once."""
    manifest = make_manifest(created_ns=time.time_ns())
    recorder = write_run(manifest, np.ones((3, 4)), time_ns=time.time_ns())
    monitor = daemon()
    assert monitor.kinds() == ["run_started"]
    monitor.close()
    if end == "run_finished":
        recorder.close()
    else:
        gone = manifest.model_copy(update={"process_start": 1.0})
        (recorder.path / "manifest.json").write_text(gone.model_dump_json())
    clock[0] = 86_400
    for _ in range(2):
        monitor = daemon()
        *_, told = monitor.look()
        assert monitor.kinds() == ["run_started", end]
        assert (told.kind, told.step) == (end, 2)
        assert abs(told.time_ns - manifest.created_ns) < 60e9
        with monitor.runs.snapshot() as found:
            assert list(found) == []


def test_a_run_that_comes_back_is_a_new_start(
    daemon: Callable[..., Daemon], make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """Resumed under the same id, it is told to start again, and to end again."""
    write_run(make_manifest(process_start=1.0, created_ns=time.time_ns()), np.ones((3, 4)))
    monitor = daemon()
    assert monitor.kinds() == ["run_started", "run_lost"]
    time.sleep(0.01)
    again = write_run(make_manifest(created_ns=time.time_ns()), np.ones((2, 4)))
    assert monitor.kinds() == ["run_started", "run_lost", "run_started"]
    again.close()
    *_, finished = daemon().look()
    assert (finished.kind, finished.data["steps"]) == ("run_finished", 2)
    assert finished.message.startswith("finished after 2 steps")


def test_other_ranks_are_waited_for(
    daemon: Callable[..., Daemon], make_manifest: MakeManifest, write_run: WriteRun, clock: list[float]
) -> None:
    """When a rank dies while others live, what it takes with it in the next seconds is told in the same incident."""
    for rank in range(3):
        manifest = make_manifest(rank=rank, world_size=3, created_ns=time.time_ns())
        gone = manifest.model_copy(update={"process_start": 1.0})
        write_run(gone if rank == 1 else manifest, np.ones((3, 4)))
    monitor = daemon()
    assert monitor.kinds() == ["run_started"]
    clock[0] += SETTLE_SECONDS + 1
    *_, lost = monitor.look()
    assert (lost.kind, lost.data["ranks_lost"], lost.data["ranks_followed"]) == ("run_lost", 1, 3)
    assert (lost.data["rows_rank"], lost.message[:13]) == (1, "rank 1 of 3: ")


def test_a_run_that_lives_after_all_is_told(
    daemon: Callable[..., Daemon], make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """Where a process cannot be seen, what it writes corrects what was told; both are told once."""
    recorder = write_run(make_manifest(process_start=1.0, created_ns=time.time_ns()), np.ones((3, 4)))
    monitor = daemon()
    assert monitor.kinds() == ["run_started", "run_lost"]
    for _ in range(3):
        append(recorder, np.ones((1, 4)), time_ns=time.time_ns() + 10**6)
        assert monitor.kinds() == ["run_started", "run_lost", "run_found"]


def test_ranks_that_appear_one_by_one_are_one_start(
    daemon: Callable[..., Daemon], make_manifest: MakeManifest, write_run: WriteRun, clock: list[float]
) -> None:
    """A rank that is seen before rank 0 starts nothing of its own; one that stays alone does, as on another host."""
    write_run(make_manifest(rank=2, world_size=3, created_ns=time.time_ns()), np.ones((1, 4)))
    write_run(make_manifest("part", rank=2, world_size=3, created_ns=time.time_ns()), np.ones((1, 4)))
    monitor = daemon()
    assert monitor.kinds() == []
    write_run(make_manifest(rank=0, world_size=3, created_ns=time.time_ns()), np.ones((1, 4)))
    clock[0] += 31
    monitor.look()
    assert sorted(event.run_id for event in monitor.look()) == ["part", "run"]
    assert daemon().kinds() == ["run_started", "run_started"]


def test_notes_of_runs_that_are_gone_are_forgotten(
    daemon: Callable[..., Daemon], make_manifest: MakeManifest, write_run: WriteRun, tmp_path: Path
) -> None:
    """At the second look, as a disk may be away for a while; what is there stays, but for earlier starts of it."""
    for run_id in ("stays", "goes"):
        write_run(make_manifest(run_id, created_ns=time.time_ns()), np.ones((3, 4))).event("attached", "here")
    monitor = daemon()
    monitor.look()
    monitor.incidents._events.follow()
    monitor.store.put("counts/stays/0/1", {"sequence": 1})
    monitor.store.put("grafana/goes", "not ours")
    (tmp_path / "goes").rename(tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
    monitor = daemon()
    monitor.look()
    before = set(monitor.store.notes(""))
    monitor.incidents.clean()
    assert set(monitor.store.notes("")) == before
    monitor.incidents.clean()
    after = set(monitor.store.notes(""))
    gone = before - after
    assert {key.split("/")[0] for key in gone} == {"told", "events", "counts"}
    assert {key.split("/")[1] for key in gone} == {"goes", "stays"}
    assert "counts/stays/0/1" in gone
    assert {"told/stays", "grafana/goes"} <= after


def _counted(monitor: Daemon) -> dict[str, Any]:
    with monitor.runs.snapshot() as (run,):
        return run.ranks[0].summary.counts()


@pytest.mark.parametrize("keep_seconds", [0.0, 600.0])
@pytest.mark.parametrize("crash", [False, True])
def test_a_restart_loses_no_counter(
    daemon: Callable[..., Daemon],
    make_manifest: MakeManifest,
    write_run: WriteRun,
    append: Append,
    crash: bool,
    keep_seconds: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counts go on where they were though the ring has turned, and windows come from what it holds.

    A ring that turns before counts are due has them kept sooner.
    """
    monkeypatch.setattr(counts_module, "KEEP_SECONDS", keep_seconds)
    rng = np.random.default_rng(0)
    norms = rng.random((40, 4))
    norms[::5, 3] = NAN
    recorder = write_run(make_manifest(capacity=8, created_ns=time.time_ns()), norms[:6], flags=int(Flag.OWN_WATCHED))
    monitor = daemon()
    for first in range(6, 40, 4):
        monitor.look()
        append(recorder, norms[first : first + 4], flags=int(Flag.OWN_WATCHED))
    monitor.look()
    before = _counted(monitor)
    assert sum(before["grad_norm"][1:]) == 40
    assert before["layers"] == {"2": 8}
    monitor = daemon(crash=crash)
    monitor.look()
    assert _counted(monitor) == before
    largest = np.nanmax(np.sqrt(np.square(norms[32:]).sum(axis=1)))
    with monitor.runs.snapshot() as (run,):
        assert run.ranks[0].summary.grad_norm_window_max == pytest.approx(largest)
    append(recorder, norms[:4], flags=int(Flag.OWN_WATCHED))
    monitor.look()
    assert _counted(monitor)["layers"] == {"2": 9}
    assert sum(_counted(monitor)["grad_norm"][1:]) == 44


def test_what_was_overwritten_while_it_was_away_is_missed(
    daemon: Callable[..., Daemon], make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """Rows that no monitor could read are dropped rows; those of before the first monitor are uncounted, and said."""
    recorder = write_run(make_manifest(capacity=8, created_ns=time.time_ns()), np.ones((20, 4)))
    monitor = daemon()
    monitor.look()
    found = _counted(monitor)
    assert (found["uncounted"], found["rows_missed"], sum(found["grad_norm"][1:])) == (12, 0, 8)
    monitor.close()
    append(recorder, np.ones((30, 4)))
    monitor = daemon()
    monitor.look()
    found = _counted(monitor)
    assert (found["uncounted"], found["rows_missed"], sum(found["grad_norm"][1:])) == (12, 22, 16)
    assert found["sequence"] == 50


@pytest.mark.parametrize(
    "broken",
    [
        "text",
        {},
        {"sequence": "x"},
        {"sequence": 10**6},
        {"layers": {"99": 1}},
        {"grad_norm": [0.0, 1]},
        {"exported": ["a"]},
    ],
)
def test_counts_that_do_not_fit_are_not_taken(
    daemon: Callable[..., Daemon], make_manifest: MakeManifest, write_run: WriteRun, broken: Any
) -> None:
    """Notes that are of another ring, or were tampered with, count nothing: the ring is read from its start."""
    manifest = make_manifest(created_ns=time.time_ns())
    write_run(manifest, np.ones((5, 4)))
    monitor = daemon()
    monitor.look()
    good = _counted(monitor)
    monitor.close()
    key = f"counts/run/0/{manifest.created_ns}"
    store = Store(monitor._root / ".monitor")
    kept = store.note(key)
    store.put(key, kept | broken if broken and isinstance(broken, dict) else broken)
    store.close()
    monitor = daemon()
    monitor.look()
    assert _counted(monitor) == good


def test_a_directory_that_is_closed_for_a_while_loses_nothing(
    daemon: Callable[..., Daemon],
    make_manifest: MakeManifest,
    write_run: WriteRun,
    append: Append,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that cannot be read, and can again, goes on counting; steps that were overwritten meanwhile are missed."""
    recorder = write_run(make_manifest(capacity=8, created_ns=time.time_ns()), np.ones((8, 4)))
    monitor = daemon()
    monitor.look()

    def refuse(path: Path) -> tuple[int, int]:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("gradiometer_monitor.following.runs.identity", refuse)
        monitor.runs.poll()
        with monitor.runs.snapshot() as found:
            assert list(found) == []
    append(recorder, np.ones((20, 4)))
    monkeypatch.setattr(monitor.runs, "_discover_at", 0.0)
    monitor.runs._unreadable.clear()
    monitor.look()
    found_counts = _counted(monitor)
    assert sum(found_counts["grad_norm"][1:]) + found_counts["rows_missed"] == 28


def test_the_daemon_tells_and_goes_on(
    start: Start, train: Train, make_manifest: MakeManifest, wait_until: WaitUntil, tmp_path: Path
) -> None:
    """A killed job is told by the real daemon, whose counters are the same after it was killed itself."""
    monitor = start()
    job = train(make_manifest("job", capacity=64), 200)
    wait_until(lambda: monitor.state("job") == "running")
    job.kill()
    wait_until(lambda: monitor.state("job") == "lost")
    before = monitor.samples()
    monitor.end()
    monitor = start()
    wait_until(lambda: monitor.state("job") == "lost")
    after = monitor.samples()
    counters = ("gradiometer_grad_norm_count", "gradiometer_uncounted_steps", "gradiometer_rows_dropped_total")
    for name in counters:
        assert before[name, ("job",)] == after[name, ("job",)]
    monitor.end()
    store = Store(tmp_path / ".monitor")
    told = [event.kind for event in store.events(run_id="job", after=0) if event.rank is None]
    store.close()
    assert told == ["run_started", "run_lost"]
