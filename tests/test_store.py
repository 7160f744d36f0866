"""What the monitor remembers: kept once, bounded, over restarts, and on disks that are full, foreign or damaged."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradiometer_monitor import store as module
from gradiometer_monitor.store import ASIDE, DATABASE, FAILING_SECONDS, Event, Store


def _event(place: int, run_id: str = "run") -> Event:
    return Event(id=f"{run_id}/{place}", run_id=run_id, time_ns=place, kind="nonfinite", step=place, data={"at": place})


def test_an_event_is_kept_once_and_numbered(tmp_path: Path) -> None:
    """What is added again, also after a restart, is passed over; numbers only grow."""
    store = Store(tmp_path)
    store.add([_event(1), _event(2), _event(1)], {"cursor": {"at": 3}})
    store.close()
    store = Store(tmp_path)
    store.add([_event(2), _event(3)])
    found = store.events(after=0)
    assert [event.step for event in found] == [1, 2, 3]
    numbers = [event.number for event in found]
    assert numbers == sorted(set(numbers))
    assert found[0].data == {"at": 1}
    assert store.newest == numbers[-1]
    assert store.note("cursor") == {"at": 3}
    store.close()


def test_events_are_found_by_run_kind_and_number(tmp_path: Path) -> None:
    """The first above a number, or the last below one, oldest first."""
    store = Store(None)
    store.add([_event(place, "ab"[place % 2]) for place in range(20)])
    assert [event.step for event in store.events(run_id="b", limit=3)] == [15, 17, 19]
    assert [event.step for event in store.events(run_id="b", after=10, limit=2)] == [11, 13]
    assert [event.step for event in store.events(before=3)] == [0, 1]
    assert store.events(kinds=["other"]) == []
    store.close()


def test_events_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are forgotten, and an id that was forgotten gets a new number."""
    monkeypatch.setattr(module, "MAX_EVENTS", 10)
    monkeypatch.setattr(module, "TRIM_EVERY", 5)
    store = Store(None)
    for place in range(50):
        store.add([_event(place)])
    assert [event.step for event in store.events(after=0)] == list(range(40, 50))
    assert store.newest == 50
    store.close()


def test_notes_are_all_or_nothing_with_their_events(tmp_path: Path) -> None:
    """When an event cannot be written the cursor stays, so that it is read again."""
    store = Store(tmp_path)
    store.put("cursor", 1)
    broken = Event(id="x", run_id="run", time_ns=2**70, kind="kind")
    with pytest.raises(OverflowError):
        store.add([_event(1), broken], {"cursor": 2})
    assert store.note("cursor") == 1
    assert store.events(after=0) == []
    store.put("cursor", None)
    assert store.note("cursor", "none") == "none"
    store.close()


def test_a_full_disk_loses_nothing_that_was_kept(tmp_path: Path) -> None:
    """A write that does not fit raises, what was there stays, and it goes on when there is room."""
    store = Store(tmp_path)
    store.add([_event(1)])
    pages = store._base.execute("PRAGMA page_count").fetchone()[0]
    store._base.execute(f"PRAGMA max_page_count = {pages}")
    large = Event(id="large", run_id="run", time_ns=2, kind="kind", message="x" * 100_000)
    with pytest.raises(sqlite3.OperationalError):
        store.add([large], {"cursor": 1})
    assert [event.step for event in store.events(after=0)] == [1]
    store._base.execute("PRAGMA max_page_count = 1000000")
    store.add([large], {"cursor": 1})
    assert store.note("cursor") == 1
    store.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of its own that holds a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def _fill(place: Path) -> Path:
    """Leave no room on a file system, and return the file that takes it."""
    file = place / "filler"
    with file.open("wb", buffering=0) as out, contextlib.suppress(OSError):
        while True:
            out.write(bytes(4096))
    return file


def _persistent_after(store: Store, seconds: float, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Tell whether the store would be persistent so much later."""
    now = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now + seconds)
        return store.persistent


def test_a_full_file_system_is_told_until_writes_succeed(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store whose writes fail is not persistent, for as long as they do and a while after; what was kept is kept."""
    store = Store(small_disk)
    store.add([_event(1)])
    assert store.persistent
    filler = _fill(small_disk)
    large = Event(id="large", run_id="run", time_ns=2, kind="kind", message="x" * 200_000)
    with pytest.raises(sqlite3.OperationalError):
        store.add([large])
    assert not store.persistent
    store.try_again()  # a note may fit where the event does not
    assert not store.persistent
    filler.unlink()
    store.add([large])
    assert not store.persistent
    assert _persistent_after(store, FAILING_SECONDS + 1, monkeypatch)
    assert [event.id for event in store.events(after=0)] == ["run/1", "large"]
    store.close()


def test_a_write_that_nobody_repeats_is_told_until_there_is_room(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time alone proves nothing: it is tried again whether something can be written."""
    store = Store(small_disk)
    filler = _fill(small_disk)
    for place in range(100):  # the room that the file still has of its own
        with contextlib.suppress(sqlite3.OperationalError):
            store.put(f"note-{place}", "x" * 4096)
    store.try_again()
    assert not _persistent_after(store, 10 * FAILING_SECONDS, monkeypatch)
    filler.unlink()
    store.try_again()
    assert _persistent_after(store, FAILING_SECONDS + 1, monkeypatch)
    store.close()


def test_what_no_store_could_keep_is_no_failure_of_this_one(tmp_path: Path) -> None:
    """An event that cannot be stored anywhere says nothing about the disk."""
    store = Store(tmp_path)
    with pytest.raises(OverflowError):
        store.add([Event(id="x", run_id="run", time_ns=2**70, kind="kind")])
    assert store.persistent
    store.close()


@pytest.mark.parametrize("content", [b"this is no database" * 100, None])
def test_a_damaged_file_is_set_aside(tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    """A file that is foreign, or whose pages were overwritten, is kept beside a new one; the log says so."""
    store = Store(tmp_path)
    store.add([_event(place) for place in range(500)])
    store.close()
    path = tmp_path / DATABASE
    if content is None:
        data = bytearray(path.read_bytes())
        data[4096:40_960] = os.urandom(36_864)
        content = bytes(data)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        store = Store.open(tmp_path)
    assert store.persistent
    assert store.events(after=0) == []
    store.add([_event(1)])
    store.close()
    assert (tmp_path / ASIDE).read_bytes()[:16] == content[:16]
    assert "is damaged" in caplog.text
    store = Store(tmp_path)
    assert len(store.events(after=0)) == 1
    store.close()


def test_a_newer_file_is_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file of a newer monitor is neither read nor set aside; the monitor works from memory and says so."""
    store = Store(tmp_path)
    store._base.execute("PRAGMA user_version = 99")
    store.close()
    store = Store.open(tmp_path)
    assert not store.persistent
    assert "version 99" in caplog.text
    assert not (tmp_path / ASIDE).exists()
    store.close()


def test_one_monitor_at_a_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A second monitor of the same state works from memory with a warning; the first's end frees it."""
    first = Store(tmp_path)
    with pytest.raises(BlockingIOError, match="another monitor"):
        Store(tmp_path)
    second = Store.open(tmp_path)
    assert not second.persistent
    assert "--state-dir" in caplog.text
    first.close()
    second.close()
    third = Store.open(tmp_path)
    assert third.persistent
    third.close()


def test_a_directory_that_cannot_be_written_is_memory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the directory's place is taken by a file, the monitor works from memory with a warning."""
    (tmp_path / "taken").touch()
    store = Store.open(tmp_path / "taken")
    store.add([_event(1)])
    assert (store.persistent, store.newest) == (False, 1)
    assert "nothing is remembered" in caplog.text
    store.close()


def test_the_state_is_the_users_alone(tmp_path: Path) -> None:
    """Directory 0700, files 0600; a lock that is a link is refused."""
    store = Store(tmp_path / "state")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert {(tmp_path / "state" / name).stat().st_mode & 0o777 for name in (DATABASE, "lock")} == {0o600}
    store.close()
    (tmp_path / "state/lock").unlink()
    (tmp_path / "state/lock").symlink_to(tmp_path / "elsewhere")
    refused = Store.open(tmp_path / "state")
    assert not refused.persistent
    refused.close()
    assert not (tmp_path / "elsewhere").exists()
