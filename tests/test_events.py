"""Events of jobs and of the monitor: each once, over restarts, torn lines, full disks and files that are cut."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from gradiometer.recorder import Recorder
from gradiometer_monitor.following import events as module
from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.store import Event, Store

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, WriteRun

Follow = Callable[[], tuple[Events, Runs]]


@pytest.fixture
def follow(tmp_path: Path) -> Iterator[Follow]:
    """Give a function that starts a monitor's following anew, after the one before has ended."""
    opened: list[tuple[Runs, Store]] = []

    def end() -> None:
        for runs, store in opened:
            runs.close()
            store.close()
        opened.clear()

    def start() -> tuple[Events, Runs]:
        end()
        store = Store(tmp_path / ".monitor")
        runs = Runs(tmp_path, retention_seconds=900, store=store)
        opened.append((runs, store))
        while runs.poll():
            pass
        events = Events(runs, store)
        while events.follow():
            pass
        return events, runs

    yield start
    end()


@pytest.fixture
def recorder(make_manifest: MakeManifest, write_run: WriteRun) -> Recorder:
    """Write a run with two events."""
    recorder = write_run(make_manifest(created_ns=time.time_ns()), np.ones((3, 4)))
    for step in range(2):
        recorder.event("nonfinite", f"at {step}", step=step, parameter="a")
    return recorder


def _steps(events: Events) -> list[int | None]:
    return [event.step for event in events.store.events(after=0, kinds=["nonfinite"])]


def test_events_are_read_once_over_restarts(recorder: Recorder, follow: Follow) -> None:
    """What was written before, between and after two starts is there once, in order, as it was written."""
    events, _ = follow()
    (first, _) = events.store.events(after=0)
    assert (first.run_id, first.rank, first.message, first.data) == ("run", 0, "at 0", {"parameter": "a"})
    recorder.event("nonfinite", "at 2", step=2)
    events, _ = follow()
    recorder.event("nonfinite", "at 3", step=3)
    assert events.follow()
    assert not events.follow()
    assert _steps(events) == [0, 1, 2, 3]


def test_a_torn_last_line_waits(recorder: Recorder, follow: Follow) -> None:
    """A line without its end is not read until it has one, and then whole."""
    path, line = recorder.path / "events.jsonl", json.dumps({"kind": "nonfinite", "step": 7, "time_ns": 1})
    with path.open("a") as file:
        file.write(line[:20])
    events, _ = follow()
    assert _steps(events) == [0, 1]
    with path.open("a") as file:
        file.write(line[20:] + "\n")
    events.follow()
    assert _steps(events) == [0, 1, 7]


@pytest.mark.parametrize(
    "line",
    [
        b"no json",
        b"[1]",
        b'{"kind": 3, "step": "x", "time_ns": 1e300}',
        b'{"step": 99999999999999999999999}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"kind": "odd", "message": "\\ud800", "more": {"\\udfff": [NaN, -Infinity, 1e999, 1.5]}}',
        b'{"kind": "deep", "more": ' + b"[" * 950 + b"]" * 950 + b"}",
        b'{"message": {"a": 1}, "kind": "' + b"k" * 300 + b'"}',
    ],
)
def test_lines_of_any_kind_are_taken(recorder: Recorder, follow: Follow, line: bytes) -> None:
    """A line that is no event, or whose fields are of other types, is kept as what it can be, and stops nothing."""
    with (recorder.path / "events.jsonl").open("ab") as file:
        file.write(line + b"\n")
    recorder.event("nonfinite", "after", step=8)
    events, _ = follow()
    assert _steps(events) == [0, 1, 8]
    assert len(events.store.events(after=0)) == 4
    assert all(len(event.kind) <= 64 for event in events.store.events(after=0))
    for event in events.store.events(after=0):
        json.dumps([event.kind, event.message, event.data], allow_nan=False, ensure_ascii=False).encode()


def test_long_lines_are_bounded(recorder: Recorder, follow: Follow, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long event is kept without its fields, one that is longer than a read is passed over, those after are read."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 40_000)
    recorder.event("nonfinite", "long", step=5, more="x" * 30_000)
    recorder.event("nonfinite", "longer", step=6, more="x" * 100_000)
    recorder.event("nonfinite", "after", step=7)
    events, _ = follow()
    assert _steps(events) == [0, 1, 5, 7]
    kept = events.store.events(after=0, kinds=["nonfinite"])[2]
    assert set(kept.data) == {"left_out_bytes"}
    assert sum(len(json.dumps(event.data)) for event in events.store.events(after=0)) < 30_000


def test_a_file_that_was_cut_is_read_again_without_doubles(recorder: Recorder, follow: Follow) -> None:
    """What is still there is known, and what is new is told."""
    events, _ = follow()
    path = recorder.path / "events.jsonl"
    first = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(first)
    events.follow()
    recorder.event("nonfinite", "new", step=9)
    while events.follow():
        pass
    assert _steps(events)[:2] == [0, 1]
    assert _steps(events).count(0) == 1
    assert 9 in _steps(events)


@pytest.mark.parametrize("level", ["file", "rank", "run"])
def test_a_link_is_not_followed(recorder: Recorder, follow: Follow, tmp_path: Path, level: str) -> None:
    """A link in the place of the file, or of a directory above it, is not read: it could point anywhere."""
    events, _ = follow()
    kept = _steps(events)
    path = {"file": recorder.path / "events.jsonl", "rank": recorder.path, "run": recorder.path.parent}[level]
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    secret = {"file": elsewhere, "rank": elsewhere / "events.jsonl", "run": elsewhere / "rank-00000/events.jsonl"}
    with secret[level].open("a") as file:
        file.write(json.dumps({"kind": "nonfinite", "step": 42}) + "\n")
    while events.follow():
        pass
    assert _steps(events) == kept


def test_a_store_that_fails_is_waited_for(
    recorder: Recorder, follow: Follow, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While the disk is full events wait, the log says so once, and then each is there once."""
    events, _ = follow()
    heard: list[int] = []
    events.listen(lambda: heard.append(1))
    real, full = Store.add, [True]

    def add(self: Store, *arguments: object, **more: object) -> None:
        if full[0]:
            raise sqlite3.OperationalError("database or disk is full")
        real(self, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Store, "add", add)
    recorder.event("nonfinite", "at 2", step=2)
    for _ in range(3):
        events.follow()
    told = events.tell("run", "run_lost", "it is gone")
    assert events.store.events(kinds=["run_lost"]) == []
    assert heard == []
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert f"cannot be kept in state_dir {events.store.directory} (database or disk is full): make room" in caplog.text
    full[0] = False
    events.follow()
    assert _steps(events) == [0, 1, 2]
    assert [event.id for event in events.store.events(kinds=["run_lost"])] == [told.id]
    assert heard


def test_told_from_several_threads(follow: Follow) -> None:
    """What several threads tell at once is all kept."""
    events, _ = follow()
    threads = [
        threading.Thread(
            target=lambda name=name: [events.tell("run", "note", "", once=f"{name}.{n}") for n in range(50)]
        )
        for name in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(events.store.events(limit=1000)) == 200


def test_told_once(follow: Follow) -> None:
    """What is told once is kept once, also after a restart; what is not is kept each time."""
    for _ in range(2):
        events, _ = follow()
        events.tell("run", "run_lost", "gone", once="1", step=3, rank_count=2)
        events.tell("run", "note", "again")
        time.sleep(0.001)
    found = events.store.events(after=0)
    assert [event.kind for event in found] == ["run_lost", "note", "note"]
    lost: Event = found[0]
    assert (lost.rank, lost.step, lost.data) == (None, 3, {"rank_count": 2})
