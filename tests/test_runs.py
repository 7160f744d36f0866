"""The list of runs that the monitor keeps: what appears, stays, leaves, and how much work that may be."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from gradiometer.tail import RankTail
from gradiometer_monitor.following import runs as module
from gradiometer_monitor.following.runs import Runs

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, WaitUntil, WriteRun


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Put the passing of time in the test's hands: its offset from now in seconds."""
    offset, wall, monotonic = [0.0], time.time, time.monotonic
    monkeypatch.setattr(time, "time", lambda: wall() + offset[0])
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + offset[0])
    return offset


def _names(runs: Runs, *, scrape: bool = True) -> list[str]:
    runs.poll()
    with runs.snapshot(scrape=scrape) as found:
        return [run.run_id for run in found]


def test_a_run_leaves_after_retention_and_two_scrapes(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, clock: list[float]
) -> None:
    """A finished run stays through its retention, then until two scrapes showed its end, and does not come back."""
    recorder = write_run(make_manifest(created_ns=time.time_ns()), np.ones((3, 4)))
    runs = Runs(tmp_path, retention_seconds=900)
    assert _names(runs) == ["run"]
    recorder.close()
    clock[0] = 899
    assert _names(runs) == ["run"]
    clock[0] = 901
    assert _names(runs) == ["run"]
    assert _names(runs) == []
    assert _names(runs) == []
    runs.close()


def test_a_run_that_nobody_scraped_stays(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, clock: list[float]
) -> None:
    """Being listed is not being scraped."""
    runs = Runs(tmp_path, retention_seconds=0)
    write_run(make_manifest(created_ns=time.time_ns()), np.ones((3, 4)), close=True)
    assert [_names(runs, scrape=False) for _ in range(5)] == [["run"]] * 5
    runs.close()


def test_a_running_run_never_leaves(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, clock: list[float]
) -> None:
    """A live process whose steps stopped long ago is still there: that is what one wants to see."""
    write_run(make_manifest(created_ns=time.time_ns()), np.ones((3, 4)))
    runs = Runs(tmp_path, retention_seconds=900)
    clock[0] = 86_400
    assert [_names(runs) for _ in range(4)] == [["run"]] * 4
    runs.close()


def test_history_is_not_shown(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A run that was past its retention when the monitor started never appears."""
    write_run(make_manifest(process_start=1.0), np.ones((3, 4)))
    runs = Runs(tmp_path, retention_seconds=900)
    assert _names(runs) == []
    runs.close()


def test_silent_run_of_another_host_is_lost(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, clock: list[float]
) -> None:
    """Where the process cannot be seen, fifteen minutes without a step decide."""
    write_run(make_manifest(host="elsewhere.invalid", created_ns=time.time_ns()), np.empty((0, 4)))
    runs = Runs(tmp_path, retention_seconds=1e9)
    for offset, state in ((0, "running"), (890, "running"), (910, "lost")):
        clock[0] = offset
        runs.poll()
        with runs.snapshot() as (run,):
            assert run.state == state
    runs.close()


def test_a_clock_that_is_set_loses_no_run(
    tmp_path: Path,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When the wall clock jumps ahead, silence is counted anew: the run is not lost before it had its time to speak."""
    write_run(make_manifest(host="elsewhere.invalid", created_ns=time.time_ns()), np.empty((0, 4)))
    runs = Runs(tmp_path, retention_seconds=1e9)
    runs.poll()
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + 86_400)
    states = []
    for offset in (0, 800, 910):
        clock[0] = offset
        runs.poll()
        with runs.snapshot() as (run,):
            states.append(run.state)
    assert states == ["running", "running", "lost"]
    runs.close()


def test_replaced_and_removed_runs(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """A run that starts again in its directory is read from its start; one whose directory went is gone."""
    write_run(make_manifest(created_ns=time.time_ns()), np.ones((5, 4)), close=True)
    runs = Runs(tmp_path, retention_seconds=900)
    runs.poll()
    again = write_run(make_manifest(created_ns=time.time_ns()), np.ones((2, 4)))
    while runs.poll():
        pass
    with runs.snapshot() as (run,):
        assert run.ranks[0].summary.grad_norm.cumulative[-1] == 2
    again.path.parent.rename(tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
    assert _names(runs) == []
    runs.close()


def test_ranks_of_an_earlier_start_are_let_go(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A rank that ended before rank 0 began belongs to an earlier, wider start of the run."""
    write_run(make_manifest(rank=1, created_ns=time.time_ns()), np.ones((5, 4)), close=True)
    write_run(make_manifest(rank=0, created_ns=time.time_ns() + 10**9), np.ones((5, 4)))
    runs = Runs(tmp_path, retention_seconds=900)
    runs.poll()
    runs.poll()
    with runs.snapshot() as (run,):
        assert [tail.rank for tail in run.ranks] == [0]
    runs.close()


def test_runs_are_bounded(
    tmp_path: Path,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Past the bound a run that is over makes room; where all are running the next is refused, and that shows."""
    monkeypatch.setattr(module, "MAX_RANKS", 2)
    now = time.time_ns()
    write_run(make_manifest("over", created_ns=now), np.ones((1, 4)), close=True)
    for place in range(2):
        time.sleep(0.05)  # the newest manifest is followed first, and file systems tell times apart no finer
        write_run(make_manifest(f"live{place}", created_ns=now), np.ones((1, 4)))
    runs = Runs(tmp_path, retention_seconds=900)
    while runs.poll():
        pass
    with runs.snapshot() as found:
        assert len(found) == 2
    assert not runs.poll_succeeded
    runs.close()


def test_a_long_ring_is_read_in_bounded_polls(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A poll reads no more than its bytes, says that there is more, and in the end every row was counted."""
    monkeypatch.setattr("gradiometer.tail.POLL_BYTES", 10 * make_manifest().ring.dtype.itemsize)
    write_run(make_manifest(created_ns=time.time_ns()), np.ones((45, 4)))
    runs = Runs(tmp_path, retention_seconds=900)
    polls = 1
    while runs.poll():
        polls += 1
    with runs.snapshot() as (run,):
        assert run.ranks[0].summary.grad_norm.cumulative[-1] == 45
        assert run.ranks[0].summary.rows_missed == 0
    assert polls == 5
    runs.close()


def test_rows_lost_in_a_crash_are_passed_over(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are damaged, even more of them than a poll reads, are counted as dropped, and those after are read."""
    manifest = make_manifest(created_ns=time.time_ns())
    size = manifest.ring.dtype.itemsize
    monkeypatch.setattr("gradiometer.tail.POLL_BYTES", 5 * size)
    ring = write_run(manifest, np.ones((40, 4))).path / "steps.ring"
    data = bytearray(ring.read_bytes())
    data[4096 + 3 * size : 4096 + 20 * size] = bytes(17 * size)
    ring.write_bytes(data)
    runs = Runs(tmp_path, retention_seconds=900)
    while runs.poll():
        pass
    with runs.snapshot() as (run,):
        summary = run.ranks[0].summary
        assert (summary.grad_norm.cumulative[-1], summary.rows_missed, summary.last_seen) == (23, 17, 40)
    runs.close()


def test_a_look_that_took_long_is_soon_followed_by_another(
    tmp_path: Path,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However long one look for new runs took, as of a network that hung, the next is no more than a pause away."""
    assert module.DISCOVERY_PAUSE <= 60
    monkeypatch.setattr(module, "DISCOVERY_SHARE", 1e-9)  # as if each look had taken hours
    monkeypatch.setattr(module, "DISCOVERY_PAUSE", 0.1)
    runs = Runs(tmp_path, retention_seconds=900)
    assert _names(runs) == []
    write_run(make_manifest("new", created_ns=time.time_ns()), np.ones((5, 4)))
    wait_until(lambda: _names(runs) == ["new"])
    runs.close()


def test_history_is_read_before_it_is_shown(
    tmp_path: Path,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run is held back, and the monitor not ready, until its ring has been read; one that comes later unreadies none.

    A rank is added to its run as soon as it was read.
    """
    monkeypatch.setattr(module, "DISCOVERY_SHARE", 1.0)  # looked for at each poll, however slow the one before was
    monkeypatch.setattr("gradiometer.tail.POLL_BYTES", 10 * make_manifest().ring.dtype.itemsize)
    write_run(make_manifest("long", created_ns=time.time_ns()), np.ones((45, 4)))
    write_run(make_manifest("short", created_ns=time.time_ns()), np.ones((5, 4)))
    runs = Runs(tmp_path, retention_seconds=900)
    for _ in range(4):
        assert _names(runs) == ["short"]
        assert not runs.ready.is_set()
    assert _names(runs) == ["long", "short"]
    assert runs.ready.is_set()
    write_run(make_manifest("short", rank=1, created_ns=time.time_ns()), np.ones((25, 4)))
    ranks: list[list[int]] = []

    def whole() -> bool:
        runs.poll()
        with runs.snapshot() as (_, short):
            ranks.append([tail.rank for tail in short.ranks])
        return ranks[-1] == [0, 1]

    wait_until(whole)
    with runs.snapshot() as (_, short):
        assert short.ranks[1].summary.grad_norm.cumulative[-1] == 25
    assert ranks[0] == [0]
    assert runs.ready.is_set()
    runs.close()


def test_a_heartbeat_that_moves_is_life(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """A process that cannot be found is not lost while it writes."""
    recorder = write_run(make_manifest(process_start=1.0, created_ns=time.time_ns()), np.ones((3, 4)))
    runs = Runs(tmp_path, retention_seconds=900)
    states = []
    for place in range(4):
        runs.poll()
        with runs.snapshot() as (run,):
            states.append(run.state)
        if place in (0, 2):
            append(recorder, np.ones((1, 4)), time_ns=time.time_ns() + place)
    assert states == ["lost", "running", "running", "running"]
    runs.close()


def test_a_run_of_somebody_else_is_listed(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that this user may not read is named, and disturbs no other."""
    for run_id in ("mine", "theirs"):
        write_run(make_manifest(run_id, created_ns=time.time_ns()), np.ones((3, 4)))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "theirs")
    runs = Runs(tmp_path, retention_seconds=900)
    assert _names(runs) == ["mine"]
    assert not runs.poll_succeeded
    assert runs.unreadable() == {"theirs": "PermissionError"}
    runs.close()


def test_a_root_of_somebody_else_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the directory of all runs cannot be read the log says that, not that one run of several cannot."""

    def refused(path: Path) -> list[Path]:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("gradiometer_monitor.following.runs.find_runs", refused)
    runs = Runs(tmp_path, retention_seconds=900)
    runs.poll()
    assert runs.unreadable() == {tmp_path.name: "PermissionError"}
    assert f"the directory of runs, {tmp_path}, cannot be read" in caplog.text
    assert "--dir" in caplog.text
    runs.close()


@pytest.mark.parametrize("name", ["manifest.json", "steps.ring"])
def test_a_pipe_does_not_stop_the_poll(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, name: str
) -> None:
    """A pipe in the place of a file is an unreadable run, not a wait for somebody to write into it."""
    for run_id in ("good", "odd"):
        write_run(make_manifest(run_id, created_ns=time.time_ns()), np.ones((3, 4)))
    file = tmp_path / "odd/rank-00000" / name
    file.unlink()
    os.mkfifo(file)
    runs = Runs(tmp_path, retention_seconds=900)
    assert _names(runs) == ["good"]
    assert runs.unreadable() == {"odd/rank-00000": "RunFormatError"}
    runs.close()


@pytest.mark.parametrize("name", ["manifest.json", "steps.ring", "samples.ring", "rank-00000", "odd"])
def test_links_are_not_followed(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, name: str) -> None:
    """A run, a rank or a file that is a link is not read, wherever it leads, and disturbs no other."""
    for run_id in ("good", "odd"):
        write_run(make_manifest(run_id, created_ns=time.time_ns()), np.ones((3, 4)))
    path = {"odd": tmp_path / "odd", "rank-00000": tmp_path / "odd/rank-00000"}.get(
        name, tmp_path / "odd/rank-00000" / name
    )
    target = tmp_path.with_name(f"{tmp_path.name}-outside")
    if name == "samples.ring":
        target.touch()
    else:
        path.rename(target)
    path.symlink_to(target)
    runs = Runs(tmp_path, retention_seconds=900)
    assert _names(runs) == (["good", "odd"] if name == "samples.ring" else ["good"])
    assert runs.unreadable() == (
        {"odd/rank-00000": "RunFormatError"} if name in ("manifest.json", "steps.ring") else {}
    )
    runs.close()


def test_a_scrape_is_let_in_between_ranks(
    tmp_path: Path,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever asks for the lock while many ranks are read gets it before the last of them."""
    for rank in range(20):
        write_run(make_manifest(rank=rank, created_ns=time.time_ns()), np.ones((3, 4)))
    runs = Runs(tmp_path, retention_seconds=900)
    while runs.poll():
        pass
    order: list[str] = []
    asked = threading.Event()
    real = RankTail.poll

    def poll(tail: RankTail) -> bool:
        order.append("rank")
        asked.set()
        wait_until(lambda: runs._asking or "scrape" in order)  # who asks is at the lock, which this thread holds
        return real(tail)

    def scrape() -> None:
        asked.wait(60)
        with runs.snapshot():
            order.append("scrape")

    monkeypatch.setattr(RankTail, "poll", poll)
    thread = threading.Thread(target=scrape)
    thread.start()
    runs.poll()
    thread.join()
    assert order.index("scrape") < 10
    runs.close()


def test_missing_root_is_an_empty_list(tmp_path: Path) -> None:
    """A root that is not there yet has no runs, and is no failure."""
    runs = Runs(tmp_path / "later", retention_seconds=900)
    assert _names(runs) == []
    assert runs.poll_succeeded
    runs.close()
