"""What somebody who may write below the root can make the monitor do: nothing but show his own run."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gradiometer.live.control import request_policy
from gradiometer.live.revisions import write_atomically
from gradiometer.records import EVENT_BYTES, RingGeometry, RingReader, RunFormatError, read_events, read_manifest
from gradiometer.run import open_run
from tests._monitor import Monitor
from tests._web import AS_WRITER, JOB, send, write_config, write_tokens

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Spawn, Start, Train, WaitUntil, WriteRun

SECRET = '{"secret": "of somebody else"}'
FILES = ("manifest.json", "steps.ring", "events.jsonl", "policy.json", "samples.ring")


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a directory outside of the root that only its owner may read, with a file of each name in it."""
    path = tmp_path_factory.mktemp("elsewhere") / "rank-00000"
    path.mkdir(mode=0o700)
    for name in FILES:
        (path / name).write_text(SECRET)
    return path


def told(monitor: Monitor) -> str:
    """Return everything that the monitor shows."""
    evil = [f"/api/v1/runs/{run.name}{of_it}" for run in monitor.root.glob("evil*") for of_it in ("", "/policy")]
    return "".join(monitor.get(path)[1].decode() for path in ("/metrics", "/", "/api/v1/runs", "/api/v1/events", *evil))


def test_a_link_out_of_the_root_is_not_followed(
    tmp_path: Path, start: Start, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil,
    elsewhere: Path,
) -> None:  # fmt: skip
    """A run, a rank or a file that is a link shows nothing of where it leads, and the good run beside it is served."""
    write_run(make_manifest("good", created_ns=time.time_ns()), [[1.0] * 4])
    for level in ("run", "rank", *FILES[:4]):
        write_run(make_manifest(f"evil-{level}", created_ns=time.time_ns()), [[1.0] * 4])
        evil = tmp_path / f"evil-{level}"
        place = {"run": evil, "rank": evil / "rank-00000"}.get(level, evil / "rank-00000" / level)
        target = {"run": elsewhere.parent, "rank": elsewhere}.get(level, elsewhere / level)
        if place.exists():
            place.rename(tmp_path / f".away-{level}")
        place.symlink_to(target)
    monitor = start()
    wait_until(lambda: monitor.state("good"))
    shown = told(monitor)
    log = monitor.end()
    assert "secret" not in shown + log
    assert "somebody" not in shown + log


def test_a_link_is_not_followed_when_it_comes_later(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, elsewhere: Path
) -> None:
    """Between two looks a run, a rank and a file can be exchanged for links: what opens files looks by itself."""
    write_run(make_manifest("run"), [[1.0] * 4])
    rank, geometry = tmp_path / "run" / "rank-00000", RingGeometry(capacity=64, parameters=4)
    RingReader(rank / "steps.ring", geometry).close()
    rank.rename(tmp_path / ".away")
    rank.symlink_to(elsewhere)
    for attempt in (
        lambda: RingReader(rank / "steps.ring", geometry),
        lambda: read_manifest(rank / "manifest.json"),
        lambda: read_events(rank / "events.jsonl"),
    ):
        with pytest.raises(RunFormatError, match="reached by a link"):
            attempt()
    rank.unlink()
    (tmp_path / "run").rmdir()
    (tmp_path / "run").symlink_to(elsewhere.parent)
    with pytest.raises(RunFormatError, match="reached by a link"):
        read_manifest(rank / "manifest.json")


def test_a_request_is_not_written_through_a_link(
    tmp_path: Path, train: Train, make_manifest: MakeManifest, elsewhere: Path
) -> None:
    """A link in place of control.json is replaced, and where it led nothing changes; one of a directory is refused."""
    train(make_manifest("run"), 3)
    rank, target = tmp_path / "run" / "rank-00000", elsewhere / "authorized_keys"
    target.write_text(SECRET)
    (rank / "control.json").symlink_to(target)
    request_policy(tmp_path / "run", None)
    assert target.read_text() == SECRET
    assert not (rank / "control.json").is_symlink()
    rank.rename(tmp_path / ".away")
    rank.symlink_to(elsewhere)
    with pytest.raises(RunFormatError, match="reached by a link"):
        write_atomically(rank / "control.json", "{}")
    assert sorted(path.name for path in elsewhere.iterdir()) == sorted((*FILES, "authorized_keys"))


def test_the_users_own_link_is_followed(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """Who opens a run by a link of his own, as ``latest``, reads it."""
    write_run(make_manifest("run"), [[1.0] * 4], close=True)
    (tmp_path / "latest").symlink_to("run")
    assert len(open_run(tmp_path / "latest")) == 1


def make_no_file(path: Path, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "device":
        if os.geteuid() != 0:
            pytest.skip("only root can make a device")
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("no device can be made here")
    else:
        with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as server:
            server.bind(f"{short}/socket")  # the path of one may have a hundred characters only
            Path(short, "socket").rename(path)


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "directory"])
def test_what_is_no_file_holds_nothing_up(
    tmp_path: Path, start: Start, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil, kind: str
) -> None:
    """A pipe, a socket, a device or a directory in place of a file is passed over; the good run is served."""
    write_run(make_manifest("good", created_ns=time.time_ns()), [[1.0] * 4])
    for name in FILES[:4]:
        write_run(make_manifest(f"evil-{name}", created_ns=time.time_ns()), [[1.0] * 4])
        path = tmp_path / f"evil-{name}" / "rank-00000" / name
        path.unlink(missing_ok=True)
        make_no_file(path, kind)
    monitor = start()
    wait_until(lambda: monitor.state("good"))
    assert monitor.get("/metrics")[0] == 200
    assert monitor.get("/-/healthy")[0] == 200


def test_huge_files_take_no_memory(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """Files that claim to be huge are refused, or read a piece at a time and passed over."""
    write_run(make_manifest("run"), [[1.0] * 4])
    rank = tmp_path / "run" / "rank-00000"
    for name in ("events.jsonl", "manifest.json"):
        os.truncate(rank / name, 2**40)  # sparse: it takes no room
    events, offset = read_events(rank / "events.jsonl")
    assert (offset, events[-1]["kind"]) == (EVENT_BYTES, "unreadable")
    with pytest.raises(RunFormatError, match="has more than"):
        read_manifest(rank / "manifest.json")
    with pytest.raises(RunFormatError, match=r"rows of .* bytes, expected at most"):
        RingReader(rank / "steps.ring", RingGeometry(capacity=2, parameters=2**26))


def _events(monitor: Monitor) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(monitor.get("/api/v1/events")[1])["events"]
    return found


def test_text_of_a_run_forges_no_line_of_the_log(
    tmp_path: Path, start: Start, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil
) -> None:
    """Newlines and control characters in a manifest or an event are escaped wherever they are logged."""
    forged = "\n2026-01-01T00:00:00Z ERROR all tokens were revoked\x1b[2J"
    write_run(make_manifest("evil", created_ns=time.time_ns()), [[1.0] * 4])
    write_run(make_manifest("good", created_ns=time.time_ns(), host=forged, labels={"a": forged}), [[1.0] * 4])
    manifest = tmp_path / "evil" / "rank-00000" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"device": [forged], "pid": forged}))
    events = tmp_path / "good" / "rank-00000" / "events.jsonl"
    events.write_text(json.dumps({"kind": forged, "message": forged, "step": 0}) + "\n")
    monitor = start()
    wait_until(lambda: {"run_started", forged} <= {event["kind"] for event in _events(monitor)})
    log = monitor.end()
    assert not [line for line in log.splitlines() if line.startswith("2026-01-01")]
    assert "\x1b" not in log
    assert r"on \n2026-01-01T00:00:00Z ERROR all tokens were revoked\x1b[2J" in log  # it is there, and escaped


def test_text_of_a_run_is_no_markup(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil
) -> None:
    """Labels and layers that look like HTML are data in the API, quoted in the metrics, and in no page as such."""
    markup = '<script>alert("1")</script>'
    write_run(make_manifest("run", created_ns=time.time_ns(), layers=[markup] * 4, labels={"a": markup}), [[1.0] * 4])
    monitor = start()
    wait_until(lambda: monitor.state("run"))
    assert markup not in monitor.get("/")[1].decode()
    assert json.loads(monitor.get("/api/v1/runs/run")[1])["layers"] == [markup]
    assert monitor.get("/api/v1/runs/run")[2]["content-type"] == "application/json"
    assert ("gradiometer_run_label_info", ("run", "a", markup)) in monitor.samples()


def test_what_is_written_is_for_its_owner(
    tmp_path: Path, start: Start, spawn: Spawn, tmp_path_factory: pytest.TempPathFactory, wait_until: WaitUntil
) -> None:
    """Whatever the umask, runs, requests and the monitor's own state are readable by nobody else."""
    directory = tmp_path_factory.mktemp("config")
    code = f"import os; os.umask(0)\n{JOB}"
    process = spawn(sys.executable, "-c", code, tmp_path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "attached\n"
    tokens = write_tokens(directory / "tokens")
    monitor = start("--config", write_config(directory / "monitor.yaml", auth={"tokens_file": str(tokens)}))
    wait_until(lambda: b"job" in monitor.get("/api/v1/runs", **AS_WRITER)[1])
    assert send(monitor, "PUT", "/api/v1/runs/job/policy?wait=30", {"policy": None}, **AS_WRITER)[0] == 200
    modes = {path: stat.S_IMODE(path.lstat().st_mode) for path in (tmp_path / "job", *tmp_path.rglob("*"))}
    assert {path.name for path in modes} >= {"job", "rank-00000", "control.json", "policy.json", "monitor.sqlite"}
    assert {path: mode for path, mode in modes.items() if mode & 0o077} == {}
