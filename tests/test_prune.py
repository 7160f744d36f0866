"""What is pruned and what never is: running runs, what is outside of the root, what was started again meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gradiometer import prune as module
from gradiometer.cli import app
from gradiometer.commands.prune import parse_bytes
from gradiometer.prune import DAY_SECONDS, Stored, choose, find_stored, remove
from gradiometer.recorder import Recorder
from gradiometer.records import find_runs
from gradiometer_monitor.config.settings import SettingsError, resolve
from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.retention import RetentionService, RetentionSettings
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.services import Context
from gradiometer_monitor.store import Store

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Spawn, Start, WaitUntil, WriteRun

Old = Callable[..., Recorder]
DAY_NS = int(DAY_SECONDS * 1e9)


@pytest.fixture
def old(make_manifest: MakeManifest, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch) -> Old:
    """Give a function that writes a run which ended so many days ago."""
    wall = time.time_ns

    def write(run_id: str, days: float, **fields: Any) -> Recorder:
        then = wall() - int(days * DAY_NS)
        with monkeypatch.context() as patch:
            patch.setattr(time, "time_ns", lambda: then)
            return write_run(
                make_manifest(run_id, created_ns=then - 10**9, **fields), np.ones((3, 4)), time_ns=then, close=True
            )

    return write


def _names(root: Path) -> list[str]:
    return [path.name for path in find_runs(root)]


def _listed(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def _prune(root: Path, **bounds: Any) -> dict[str, str]:
    return remove(root, choose(find_stored(root), **bounds)).kept


def test_by_age_and_oldest_first(tmp_path: Path, old: Old) -> None:
    """What ended longer ago goes, and the disk is freed; links, foreign files and the monitor's state stay."""
    for days, run_id in enumerate("abcd"):
        old(run_id, days)
    (tmp_path / ".monitor").mkdir()
    (tmp_path / "notes.txt").touch()
    stored = find_stored(tmp_path)
    assert [each.name for each in stored] == ["d", "c", "b", "a"]
    assert all(each.bytes >= 64 * 500 for each in stored)
    chosen = choose(stored, max_age_seconds=1.5 * DAY_SECONDS)
    pruned = remove(tmp_path, chosen)
    assert [each.name for each in pruned.removed] == ["d", "c"]
    assert pruned.bytes == stored[0].bytes + stored[1].bytes
    assert _listed(tmp_path) == [".monitor", "a", "b", "notes.txt"]


def test_by_bytes(tmp_path: Path, old: Old) -> None:
    """The oldest go until the rest fits, named ones and the newest excepted; what runs counts, and stays."""
    for days, run_id in enumerate("abcde", 1):
        old(run_id, days)
    stored = find_stored(tmp_path)
    each = stored[0].bytes
    assert [found.name for found in choose(stored, max_bytes=3 * each)] == ["e", "d"]
    assert [found.name for found in choose(stored, max_bytes=3 * each, keep=["e"])] == ["d", "c"]
    assert [found.name for found in choose(stored, max_bytes=0, keep_newest=2)] == ["e", "d", "c"]
    assert [found.name for found in choose(stored, max_bytes=4 * each, max_age_seconds=3.5 * DAY_SECONDS)] == ["e", "d"]
    assert choose(stored, max_bytes=5 * each) == []
    assert choose(stored) == []


def test_what_runs_is_never_chosen(tmp_path: Path, old: Old, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """Neither a live process, though silent for years, nor an unseen one that spoke today, nor one that is starting."""
    write_run(make_manifest("live"), np.ones((3, 4)))
    write_run(
        make_manifest("unseen", host="elsewhere.invalid", created_ns=time.time_ns() - DAY_NS // 2), np.ones((0, 4))
    )
    old("wide", 30)
    write_run(make_manifest("wide", rank=1), np.ones((3, 4)))
    old("starts", 30)
    (tmp_path / "starts/rank-00001").mkdir()
    old("over", 30)
    write_run(make_manifest("silent", host="elsewhere.invalid"), np.ones((3, 4)))
    write_run(make_manifest("crashed", process_start=1.0), np.ones((3, 4)))
    assert _prune(tmp_path, max_age_seconds=0, max_bytes=0) == {}
    assert _names(tmp_path) == ["live", "starts", "unseen", "wide"]


def test_earlier_starts_go_by_themselves(tmp_path: Path, old: Old, make_manifest: MakeManifest) -> None:
    """The directories that earlier starts left are pruned though the run goes on, each by its own age."""
    for days in (20, 10):
        old("run", days)
    live = Recorder(tmp_path, make_manifest("run", created_ns=time.time_ns()))
    stored = find_stored(tmp_path)
    assert [each.name for each in stored] == ["run/rank-00000.1", "run/rank-00000.2", "run"]
    assert _prune(tmp_path, max_age_seconds=15 * DAY_SECONDS) == {}
    assert _listed(tmp_path / "run") == ["rank-00000", "rank-00000.2"]
    assert _prune(tmp_path, max_bytes=0, keep_newest=1) == {}
    assert _listed(tmp_path / "run") == ["rank-00000"]
    live.close()


def test_links_are_not_followed(tmp_path: Path, old: Old) -> None:
    """A run that is a link is none; a link within a run goes, and what it points to stays."""
    outside = tmp_path.with_name(f"{tmp_path.name}-outside")
    old("run", 30)
    shutil.copytree(tmp_path / "run", outside / "copied")
    (outside / "precious").write_text("data")
    (tmp_path / "linked").symlink_to(outside / "copied")
    (tmp_path / "run/rank-00000/link").symlink_to(outside)
    (tmp_path / "run/rank-00001").symlink_to(outside)
    assert _prune(tmp_path, max_age_seconds=0) == {}
    assert _listed(tmp_path) == ["linked"]
    assert _listed(outside) == ["copied", "precious"]
    assert _listed(outside / "copied") == ["rank-00000"]


def test_what_cannot_be_read_stays(tmp_path: Path, old: Old, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken manifest or ring, or a directory of another user, is left alone, counted, and said to be."""
    for run_id in ("good", "broken", "foreign", "theirs"):
        old(run_id, 30)
    (tmp_path / "broken/rank-00000/manifest.json").write_text("{")
    (tmp_path / "foreign/rank-00000/steps.ring").write_bytes(b"\0" * 8192)
    real = os.scandir

    def scan(path: Any) -> Any:
        if str(path).endswith("theirs"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scan)
    problems = {each.name: each.problem.split(":")[0] for each in find_stored(tmp_path) if each.problem}
    assert problems == {"broken": "RunFormatError", "foreign": "RunFormatError", "theirs": "PermissionError"}
    assert _prune(tmp_path, max_bytes=0) == {}
    monkeypatch.undo()
    assert _names(tmp_path) == ["broken", "foreign", "theirs"]


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_run_that_is_started_meanwhile_stays(
    tmp_path: Path, old: Old, make_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Whether it starts before the second look, or between that and the renaming, the new start is whole."""
    old("run", 30)
    chosen = choose(find_stored(tmp_path), max_age_seconds=0)
    started: list[Recorder] = []
    real = module._lives

    def begin() -> None:
        if not started:
            started.append(Recorder(tmp_path, make_manifest("run", created_ns=time.time_ns())))

    def lives(path: Path, each: Stored) -> bool:
        found = real(path, each)
        if moment == "between":
            begin()  # the look has seen nothing, the renaming is still to come
        return found

    if moment == "before":
        begin()
    monkeypatch.setattr(module, "_lives", lives)
    kept = remove(tmp_path, chosen).kept
    if moment == "after":
        begin()
        assert kept == {}
    else:
        assert list(kept) == ["run"]
        assert "started again" in kept["run"]
    assert (tmp_path / "run/rank-00000/manifest.json").exists()
    assert _names(tmp_path) == ["run"]
    assert [name for name in _listed(tmp_path) if name.startswith(".")] == []
    started[0].close()


def test_another_directory_in_its_place_stays(tmp_path: Path, old: Old) -> None:
    """A directory, or a link, that took the name after the choice is not what was chosen."""
    for run_id in ("replaced", "linked", "gone"):
        old(run_id, 30)
    chosen = choose(find_stored(tmp_path), max_age_seconds=0)
    aside = tmp_path.with_name(f"{tmp_path.name}-aside")
    aside.mkdir()
    for run_id in ("replaced", "linked", "gone"):
        (tmp_path / run_id).rename(aside / run_id)
    shutil.copytree(aside / "replaced", tmp_path / "replaced")
    (tmp_path / "linked").symlink_to(aside / "linked")
    kept = remove(tmp_path, chosen).kept
    assert set(kept) == {"replaced", "linked", "gone"}
    assert _listed(tmp_path) == ["linked", "replaced"]
    assert (aside / "linked/rank-00000/manifest.json").exists()


def test_a_removal_that_failed_is_finished_by_the_next(
    tmp_path: Path, old: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot be deleted is told and does not keep the others; its remains go next time."""
    for run_id in ("a", "b"):
        old(run_id, 30)
    real, calls = shutil.rmtree, []

    def fail(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise PermissionError(1, "Operation not permitted")
        real(*arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", fail)
    kept = _prune(tmp_path, max_age_seconds=0)
    assert list(kept.values()) == ["[Errno 1] Operation not permitted"]
    (left,) = _listed(tmp_path)
    assert left.startswith(".pruned-")
    assert _prune(tmp_path, max_age_seconds=0) == {}
    assert _listed(tmp_path) == []


def _run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["prune", *map(str, arguments)])
    return result.exit_code, result.output if result.exception is None else f"{result.output}{result.exception}"


def test_the_command_says_what_it_does(tmp_path: Path, old: Old) -> None:
    """A dry run removes nothing, --yes does, and JSON says the same."""
    for run_id in ("a", "b", "c"):
        old(run_id, 30)
    code, said = _run("--dir", tmp_path, "--older-than", "10", "--keep", "b", "--dry-run")
    assert (code, len(find_stored(tmp_path))) == (0, 3)
    assert "2 runs of 3" in said
    code, said = _run("--dir", tmp_path, "--older-than", "10", "--keep", "b", "--yes", "--json")
    report = json.loads(said)
    assert (code, sorted(report["removed"]), report["not_removed"]) == (0, ["a", "c"], {})
    assert report["removed_bytes"] == report["chosen_bytes"] > 0
    assert _names(tmp_path) == ["b"]


def test_a_bound_that_is_not_met_is_told(
    tmp_path: Path, old: Old, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """The command says what takes the room where what may not be removed is larger than the bound."""
    old("a", 30)
    old("b", 30)
    write_run(make_manifest("live"), np.ones((3, 4)))
    code, said = _run("--dir", tmp_path, "--max-bytes", "1", "--keep", "a", "--dry-run")
    assert code == 0
    assert "1 run of 3" in said
    assert "more than --max-bytes 1 byte: 1 kept as asked, 1 may still be running" in said
    assert "more than" not in _run("--dir", tmp_path, "--max-bytes", "1G", "--dry-run")[1]


def test_the_command_refuses_what_is_not_clear(tmp_path: Path, old: Old) -> None:
    """Without a bound, a terminal to ask on, or a run of that name, nothing is removed and the remedy is said."""
    old("a", 30)
    for arguments, remedy in (
        ((), "--older-than"),
        (("--older-than", "1"), "--yes"),
        (("--older-than", "1", "--keep", "b", "--yes"), "no such run"),
        (("--max-bytes", "many", "--yes"), "50G"),
    ):
        code, said = _run("--dir", tmp_path, *arguments)
        assert code != 0
        assert remedy in said
    assert _names(tmp_path) == ["a"]


def test_the_command_asks_on_a_terminal(tmp_path: Path, old: Old, spawn: Spawn) -> None:
    """On a real one, no is no, and yes is yes."""
    old("a", 30)
    for answer, left in ((b"n\n", ["a"]), (b"y\n", [])):
        terminal, stdin = os.openpty()
        command = (sys.executable, "-m", "gradiometer.cli", "prune", "--dir", tmp_path, "--older-than", "1")
        process = spawn(*command, stdin=stdin, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        os.write(terminal, answer)
        assert "remove 1 run?" in process.communicate(timeout=120)[1]
        assert (process.returncode == 0) == (left == [])
        os.close(terminal)
        os.close(stdin)
        assert _names(tmp_path) == left


@pytest.mark.parametrize(("text", "size"), [("10", 10), ("1K", 1024), ("1.5 GiB", 3 * 2**29), ("2tb", 2**41)])
def test_sizes(text: str, size: int) -> None:
    """Sizes are read as a person writes them."""
    assert parse_bytes(text) == size


def _service(root: Path, **settings: Any) -> tuple[RetentionService, Context]:
    store = Store(root / ".monitor")
    runs = Runs(root, retention_seconds=0, store=store)
    context = Context(runs=runs, events=Events(runs, store), store=store)
    return RetentionService(RetentionSettings(**settings), context), context


def _end(context: Context) -> None:
    context.runs.close()
    context.store.close()


def test_the_monitor_measures_and_removes_nothing_unless_told(tmp_path: Path, old: Old) -> None:
    """By default there is a gauge and counters at 0, and everything stays."""
    old("a", 3000)
    service, context = _service(tmp_path)
    assert {name: value for name, _, value in service.samples()} == {
        "gradiometer_pruned_runs_total": 0,
        "gradiometer_pruned_bytes_total": 0,
    }
    assert service.work() >= 600
    values = {name: value for name, _, value in service.samples()}
    assert values["gradiometer_run_directories_bytes"] == find_stored(tmp_path)[0].bytes
    assert _names(tmp_path) == ["a"]
    _end(context)


def test_the_monitor_prunes_tells_and_counts(tmp_path: Path, old: Old) -> None:
    """Each removal is an event; the counters go on after a restart; what is still served stays."""
    for run_id, days in (("a", 30.0), ("b", 20.0), ("shown", 0.5)):
        old(run_id, days)
    service, context = _service(tmp_path, max_age_days=10)
    service.work()
    assert [(event.run_id, event.kind) for event in context.store.events()] == [
        ("a", "run_pruned"),
        ("b", "run_pruned"),
    ]
    assert _names(tmp_path) == ["shown"]
    _end(context)
    service, context = _service(tmp_path, max_age_days=0.1)
    assert {name: value for name, _, value in service.samples()}["gradiometer_pruned_runs_total"] == 2
    context.runs.retention_seconds = 1e9
    context.runs.poll()
    service.work()
    assert _names(tmp_path) == ["shown"]
    context.runs.retention_seconds = 0
    for _ in range(3):
        context.runs.poll()
        with context.runs.snapshot(scrape=True):
            pass
    context.runs.poll()
    service.work()
    assert _names(tmp_path) == []
    values = {name: value for name, _, value in service.samples()}
    assert values["gradiometer_pruned_runs_total"] == 3
    assert values["gradiometer_run_directories_bytes"] == 0
    _end(context)


@pytest.mark.parametrize("bound", [{"max_age_days": 0}, {"max_bytes": 0}], ids=["age", "bytes"])
def test_the_monitor_removes_nothing_that_it_has_not_shown(tmp_path: Path, old: Old, bound: dict[str, Any]) -> None:
    """What ended within a day stays until the monitor has looked at it and let it go, whatever the bounds."""
    old("fresh", 1 / DAY_SECONDS)
    old("older", 1.5)
    service, context = _service(tmp_path, **bound)
    context.runs.retention_seconds = 60
    service.work()
    assert _names(tmp_path) == ["fresh"]
    context.runs.poll()
    service.work()
    assert _names(tmp_path) == ["fresh"]
    context.runs.retention_seconds = 0
    for _ in range(2):
        with context.runs.snapshot(scrape=True) as runs:
            assert [run.run_id for run in runs] == ["fresh"]
    context.runs.poll()
    service.work()
    assert _names(tmp_path) == []
    _end(context)


def test_a_rank_that_is_yet_to_be_looked_at_keeps_its_run(tmp_path: Path, old: Old) -> None:
    """A run of which one rank was let go stays while another has not been followed, and if one was started anew."""
    old("run", 0.5)
    service, context = _service(tmp_path, max_age_days=0)
    context.runs.poll()
    assert context.runs.let_go(tmp_path / "run")
    old("run", 0.5, rank=1)
    assert not context.runs.let_go(tmp_path / "run")
    service.work()
    assert _names(tmp_path) == ["run"]
    _end(context)


def test_an_age_of_nothing_is_once_the_end_was_scraped(
    tmp_path: Path, start: Start, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil
) -> None:
    """With ``max_age_days: 0`` a run goes by itself after it ended, and not before two scrapes have shown its end."""
    config = tmp_path.with_name(f"{tmp_path.name}.yaml")
    config.write_text("retention_seconds: 0\nretention: {max_age_days: 0, interval_seconds: 1}\n")
    monitor = start("--config", str(config))
    recorder = write_run(make_manifest("run", created_ns=time.time_ns()), np.ones((3, 4)))
    finished = "gradiometer_run_state", ("run", "finished")
    wait_until(lambda: monitor.samples().get(finished) == 0)
    recorder.close()
    shown = []

    def gone() -> bool:
        shown.append(monitor.samples().get(finished))
        return not _names(tmp_path)

    wait_until(gone)
    assert shown.count(1) >= 2


def test_the_daemon_prunes_when_its_config_says_so(
    tmp_path: Path, old: Old, start: Start, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil
) -> None:
    """A run that is past its age goes while the daemon runs, which counts it; one that runs stays."""
    old("over", 30)
    write_run(make_manifest("live", created_ns=time.time_ns()), np.ones((3, 4)))
    config = tmp_path.with_name(f"{tmp_path.name}.yaml")
    config.write_text("retention: {max_age_days: 10, interval_seconds: 1}\n")
    monitor = start("--config", str(config))
    wait_until(lambda: _names(tmp_path) == ["live"])
    wait_until(lambda: monitor.samples().get(("gradiometer_pruned_runs_total", ())) == 1)
    assert monitor.samples()["gradiometer_run_directories_bytes", ()] > 0


@pytest.mark.parametrize("setting", ["max_age_days: -1", "max_bytes: many", "interval_seconds: 0", "older: 3"])
def test_wrong_settings_are_refused(tmp_path: Path, setting: str) -> None:
    """A setting out of range, or of no such name, is named."""
    config = tmp_path / "config.yaml"
    config.write_text(f"retention: {{{setting}}}\n")
    with pytest.raises(SettingsError, match=f"retention.{setting.split(':')[0]}"):
        resolve(tmp_path, config)
