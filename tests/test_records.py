"""The run directory: what was written is read, and what was torn, cut or never finished is not."""

from __future__ import annotations

import json
import os
import random
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.process import pid_namespace, process_alive
from gradiometer.recorder import EVENTS_BYTES, Recorder, RowHeader, RunInUseError, check_run_id
from gradiometer.records import (
    HEADER_BYTES,
    POLICY_SLOTS,
    Manifest,
    RingGeometry,
    RingReader,
    RunFormatError,
    default_root,
    find_ranks,
    find_runs,
    read_events,
    read_manifest,
)
from gradiometer.run import open_run

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Spawn, WaitUntil, WriteRun

NAN = float("nan")

WRITER = """
import os, sys, time
import numpy as np, psutil
from pathlib import Path
from gradiometer.records import Manifest
from gradiometer.recorder import Recorder, RowHeader

manifest = Manifest.model_validate_json(sys.argv[2])
mine = {"pid": os.getpid(), "process_start": psutil.Process().create_time()}
recorder = Recorder(Path(sys.argv[1]), manifest.model_copy(update=mine))
rest = [0.0] * 8
for step in range(int(sys.argv[3])):
    recorder.stats[:] = step % 65536
    recorder.commit(RowHeader(step, step, 0, 0, 0, 0, -1, 0, *[float(step)] * 8))
    if step % 3 == 0:
        recorder.scalars[0] = step
        recorder.amend(float(step))
"""
"""A writer of self-consistent rows: every field of a row follows from its step."""


def _start_writer(spawn: Spawn, root: Path, manifest: Manifest, steps: int = 10**9) -> subprocess.Popen[str]:
    return spawn(sys.executable, "-c", WRITER, root, manifest.model_dump_json(), str(steps))


def _check_pattern(rows: npt.NDArray[np.void]) -> None:
    steps = rows["step"]
    assert (rows["begin"] == steps + 1).all()
    assert (rows["loss"] == steps).all()
    assert (rows["agent_seconds"] == steps).all()
    assert (rows["parameters"] == (steps % 65536)[:, None, None]).all()


def _read(path: Path, manifest: Manifest, **options: int) -> npt.NDArray[np.void]:
    ring = RingReader(path / "steps.ring", manifest.ring)
    try:
        return ring.read(**options)
    finally:
        ring.close()


floats = st.floats(allow_nan=True, allow_infinity=True)
headers = st.builds(
    RowHeader,
    *(st.integers(-(2**63), 2**63 - 1) for _ in range(2)),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**POLICY_SLOTS - 1),
    *(st.integers(0, 2**32 - 1) for _ in range(2)),
    st.integers(-(2**31), 2**31 - 1),
    st.integers(0, 2**32 - 1),
    *(floats for _ in range(8)),
)


@given(header=headers, seed=st.integers(0, 2**32 - 1), layers=st.integers(1, 9))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, make_manifest: MakeManifest, header: RowHeader, seed: int, layers: int
) -> None:
    """Every field of a row, every bit pattern of a stat, comes back as it went in."""
    recorder = Recorder(tmp_path_factory.mktemp("run"), make_manifest(layers="abcdefghi"[:layers], capacity=2))
    bits = np.random.default_rng(seed).integers(0, 2**32, recorder.stats.shape, np.uint32)
    recorder.stats[:] = bits.view(np.float32)
    recorder.commit(header)
    recorder.close()
    (row,) = open_run(recorder.path).rows
    assert np.array_equal(np.array([row[name] for name in header._fields]), np.array(header), equal_nan=True)
    assert row["parameters"].tobytes() == bits.tobytes()


def test_a_row_fills_cache_lines() -> None:
    """A row is a multiple of 64 bytes and its last word is the sequence."""
    for parameters in range(1, 40):
        dtype = RingGeometry(capacity=2, parameters=parameters).dtype
        assert dtype.itemsize % 64 == 0
        assert dtype.fields is not None
        assert dtype.fields["end"][1] == dtype.itemsize - 8


def test_wrap_around_keeps_the_newest(make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A ring of 5 rows holds the last 5, in order, and reads from any sequence, with any limit."""
    manifest = make_manifest(capacity=5)
    path = write_run(manifest, np.arange(13.0)[:, None] * np.ones(4)).path
    assert _read(path, manifest)["step"].tolist() == [8, 9, 10, 11, 12]
    for after in range(16):
        for limit in (1, 2, 9):
            expected = [step for step in range(8, 13) if step >= after][:limit]
            assert _read(path, manifest, after=after, limit=limit)["step"].tolist() == expected


def test_any_flipped_byte_of_a_row_hides_it(make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A row of which a single byte differs is not returned, whichever byte it is."""
    manifest = make_manifest(layers=("a",), capacity=4)
    path = write_run(manifest, [[1.0], [2.0], [3.0]]).path
    size, whole = manifest.ring.dtype.itemsize, (path / "steps.ring").read_bytes()
    for place in range(HEADER_BYTES + size, HEADER_BYTES + 2 * size):
        torn = bytearray(whole)
        torn[place] ^= 1 << place % 8
        (path / "steps.ring").write_bytes(torn)
        assert _read(path, manifest)["step"].tolist() == [0, 2], f"byte {place}"


def test_ring_cut_at_any_byte(make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A cut ring is refused, if its header is cut, or gives the rows that are left, and says so."""
    manifest = make_manifest(layers=("a",), capacity=4)
    path = write_run(manifest, [[1.0], [2.0], [3.0]]).path
    whole = (path / "steps.ring").read_bytes()
    for length in (*range(0, HEADER_BYTES, 97), *range(HEADER_BYTES - 2, len(whole))):
        (path / "steps.ring").write_bytes(whole[:length])
        if length < HEADER_BYTES:
            with pytest.raises(RunFormatError, match="truncated"):
                RingReader(path / "steps.ring", manifest.ring)
            continue
        run = open_run(path)
        complete = (length - HEADER_BYTES) // manifest.ring.dtype.itemsize
        assert run.steps.tolist() == [0, 1, 2][:complete]
        assert run.truncated


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        (0, b"SQLite f", "is not a gradiometer ring"),
        (8, b"\2", "another format version"),
        (16, b"\0", "not of one run"),
    ],
)
def test_foreign_ring_is_refused(
    make_manifest: MakeManifest, write_run: WriteRun, place: int, content: bytes, message: str
) -> None:
    """Another magic, version or geometry is named in the error."""
    manifest = make_manifest()
    ring = write_run(manifest, np.ones((1, 4))).path / "steps.ring"
    data = bytearray(ring.read_bytes())
    data[place : place + len(content)] = content
    ring.write_bytes(data)
    with pytest.raises(RunFormatError, match=message):
        RingReader(ring, manifest.ring)


def test_manifest_cut_at_any_byte(make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A cut manifest is refused with the file's name; only a cut of trailing space does no harm."""
    path = write_run(make_manifest(layers=("a",)), [[1.0]]).path / "manifest.json"
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(RunFormatError, match=r"manifest\.json"):
            read_manifest(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"run_id": "../up"}, "run_id"),
        ({"ring": {"capacity": 1, "parameters": 4}}, "capacity"),
        ({"parameters": None}, "parameters"),
    ],
)
def test_wrong_manifest_is_refused(
    make_manifest: MakeManifest, write_run: WriteRun, changes: dict[str, Any], message: str
) -> None:
    """The error names the field."""
    path = write_run(make_manifest(), np.ones((1, 4))).path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(RunFormatError, match=message):
        read_manifest(path)


def test_a_manifest_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is too large for a manifest is refused, however large it is."""
    path = tmp_path / "manifest.json"
    path.touch()
    os.truncate(path, 2**40)
    monkeypatch.setattr("gradiometer.records.MANIFEST_BYTES", 2**20)
    with pytest.raises(RunFormatError, match=r"manifest\.json has more than 1048576 bytes"):
        read_manifest(path)


@pytest.mark.parametrize("content", [b"[]", b"3", b"\xff\xfe"])
def test_foreign_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    """JSON that is no object, and what is no text at all, are no manifest."""
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(RunFormatError):
        read_manifest(tmp_path / "manifest.json")


def test_manifest_of_a_later_minor_version_is_read(make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """Fields that are not known are passed over."""
    manifest = make_manifest()
    path = write_run(manifest, np.ones((1, 4))).path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"colour": "red"}))
    assert read_manifest(path) == manifest


def test_reading_at_full_speed_never_gives_a_wrong_row(
    tmp_path: Path, make_manifest: MakeManifest, spawn: Spawn, wait_until: WaitUntil
) -> None:
    """Beside a writer that laps the ring many times, each row read is whole, and sequences only rise."""
    manifest = make_manifest(layers=[f"l{place}" for place in range(500)], capacity=8)
    writer = _start_writer(spawn, tmp_path, manifest)
    path = wait_until(lambda: next(iter(find_ranks(tmp_path / "run")), None))
    ring = RingReader(path / "steps.ring", manifest.ring)
    seen, began = 0, time.monotonic()
    while seen <= 1000 or int(ring.status()["head"]) <= 1000 or time.monotonic() - began < 3:
        assert time.monotonic() - began < 60, seen
        rows = ring.read()
        _check_pattern(rows)
        assert (np.diff(rows["begin"].astype(np.int64)) > 0).all()
        seen += len(rows)
    assert writer.poll() is None
    ring.close()


@pytest.mark.parametrize("seed", range(6))
def test_killed_writer_leaves_a_gapless_prefix(
    tmp_path: Path, make_manifest: MakeManifest, spawn: Spawn, wait_until: WaitUntil, seed: int
) -> None:
    """After kill -9 at any moment every row up to the last is there and right; only the one in writing may be lost."""
    capacity = 100_000
    manifest = make_manifest(layers=[f"l{place}" for place in range(50)], capacity=capacity)
    writer = _start_writer(spawn, tmp_path, manifest, steps=capacity)  # which laps nothing, however late it is killed
    path = wait_until(lambda: next(iter(find_ranks(tmp_path / "run")), None))
    time.sleep(random.Random(seed).uniform(0.01, 0.4))
    writer.kill()
    writer.wait()
    run = open_run(path)
    _check_pattern(run.rows)
    head = int(run.status["head"])
    assert run.steps.tolist() == list(range(len(run)))
    assert head - 1 <= len(run) <= head + 1
    assert process_alive(run.manifest) is False


def test_second_writer_is_refused_while_the_first_lives(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """The error names the run and the process; another rank of the run is welcome."""
    write_run(make_manifest(), np.ones((1, 4)))
    with pytest.raises(RunInUseError, match=f"'run', rank 0, is being written by process {os.getpid()}"):
        Recorder(tmp_path, make_manifest())
    write_run(make_manifest(rank=1, world_size=2), np.ones((1, 4)))
    assert [path.name for path in find_ranks(tmp_path / "run")] == ["rank-00000", "rank-00001"]


def test_old_run_is_kept_aside(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A run whose process is gone, or that finished, makes room, keeps its rows, and is not found as a rank."""
    write_run(make_manifest(process_start=1.0), [[1.0] * 4])
    write_run(make_manifest(), [[2.0] * 4] * 2, close=True)
    write_run(make_manifest(), [[3.0] * 4] * 3)
    run = tmp_path / "run"
    assert [len(open_run(run / f"rank-00000{suffix}")) for suffix in (".1", ".2", "")] == [1, 2, 3]
    assert find_ranks(run) == [run / "rank-00000"]


def test_directory_of_a_failed_attach_is_replaced(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """A directory without a manifest is no run, and is in nobody's way."""
    (tmp_path / "run/rank-00000").mkdir(parents=True)
    (tmp_path / "run/rank-00000/steps.ring").write_bytes(b"half")
    assert find_runs(tmp_path) == []
    assert len(open_run(write_run(make_manifest(), np.ones((1, 4))).path)) == 1


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from gradiometer.records import Manifest
from gradiometer.recorder import Recorder
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    Recorder(Path(sys.argv[1]), Manifest.model_validate_json(sys.argv[2]))
except OSError as error:
    sys.exit(str(error))
"""


def test_full_disk_fails_at_once_and_leaves_nothing(tmp_path: Path, make_manifest: MakeManifest, spawn: Spawn) -> None:
    """A ring that does not fit is refused when it is made, with its size and the remedies."""
    manifest = make_manifest(capacity=1000)
    process = spawn(sys.executable, "-c", FULL_DISK, tmp_path, manifest.model_dump_json(), stderr=subprocess.PIPE)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"cannot preallocate {manifest.ring.file_bytes} bytes" in message
    assert "smaller ring_bytes" in message
    assert list(tmp_path.iterdir()) == []


def test_files_are_the_users_alone(make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """Directories are 0700 and files 0600, whatever the umask."""
    old = os.umask(0)
    try:
        path = write_run(make_manifest(), np.ones((1, 4))).path
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (path.parent, path, *path.iterdir())}
    files = dict.fromkeys(("manifest.json", "steps.ring", "events.jsonl"), 0o600)
    assert modes == {"run": 0o700, "rank-00000": 0o700} | files


def test_amended_row_is_the_newest(make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A loss that comes after its step is read with it, and no row is added."""
    manifest = make_manifest()
    recorder = write_run(manifest, np.ones((2, 4)), loss=NAN)
    recorder.amend(0.25)
    ring = RingReader(recorder.path / "steps.ring", manifest.ring)
    newest = ring.newest()
    assert newest is not None
    assert (int(newest["step"]), float(newest["loss"]), len(ring.read())) == (1, 0.25, 2)
    ring.close()


def test_counters_are_the_rows(make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """The status block counts steps, bad steps, clips by policy and the agent's time."""
    recorder = write_run(make_manifest(), [[1.0] * 4, [NAN] * 4, [1.0] * 4], clipped=[0b101, 0, 0b100])
    status = open_run(recorder.path).status
    names = ("head", "steps", "nonfinite_steps", "skipped_steps", "state")
    assert [int(status[name]) for name in names] == [3, 3, 1, 1, 1]
    assert status["clip_events"][:4].tolist() == [1, 0, 2, 0]
    assert float(status["agent_seconds"]) == pytest.approx(0.003)


def test_event_in_writing_is_left_for_later(tmp_path: Path) -> None:
    """A line without its end is not read, and then read once; one that is no JSON is told as such."""
    path = tmp_path / "events.jsonl"
    assert read_events(path) == ([], 0)
    path.write_bytes(b'{"kind": "a"}\nnonsense\n{"kind": "b"')
    events, offset = read_events(path)
    assert [event["kind"] for event in events] == ["a", "unreadable"]
    with path.open("ab") as file:
        file.write(b"}\n")
    assert read_events(path, offset)[0] == [{"kind": "b"}]


def test_events_are_bounded(make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """Past the bound an event is counted instead of written."""
    recorder = write_run(make_manifest(), np.ones((1, 4)))
    recorder.event("large", "x" * (EVENTS_BYTES - 1000))
    for _ in range(3):
        recorder.event("more", "y" * 1000)
    run = open_run(recorder.path)
    assert [event["kind"] for event in run.events] == ["large"]
    assert int(run.status["events_dropped"]) == 3


def test_finding_runs(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """Only directories with a safe name and a manifest are runs; links and a missing root are none."""
    for run_id in ("b", "a"):
        write_run(make_manifest(run_id), np.ones((1, 4)))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert [path.name for path in find_runs(tmp_path)] == ["a", "b"]
    assert find_runs(tmp_path / "missing") == []


def test_a_run_of_somebody_else_is_refused_by_name(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that this user may not read is found, and its ranks are refused with the reason."""
    write_run(make_manifest(), np.ones((1, 4)))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert find_runs(tmp_path) == [tmp_path / "run"]
    with pytest.raises(PermissionError, match="runs are for the user who trains") as caught:
        find_ranks(tmp_path / "run")
    assert caught.value.filename == str(tmp_path / "run")


@pytest.mark.parametrize("run_id", ["", "..", ".x", "a/b", "a b", "ü", "a" * 129, "a\n"])
def test_unsafe_run_id_is_refused(run_id: str) -> None:
    """A run's name is a directory and a label: it is refused with the rule."""
    with pytest.raises(ValueError, match="expected up to 128 letters"):
        check_run_id(run_id)


def test_process_alive(make_manifest: MakeManifest, spawn: Spawn, wait_until: WaitUntil) -> None:
    """A pid that was used again, a zombie and a dead process are not alive; another host's cannot be known."""
    assert process_alive(make_manifest()) is True
    assert process_alive(make_manifest(process_start=1.0)) is False
    assert process_alive(make_manifest(host="elsewhere.invalid")) is None
    child = spawn(sys.executable, "-c", "input()", stdin=subprocess.PIPE)
    process = psutil.Process(child.pid)
    manifest = make_manifest(pid=child.pid, process_start=process.create_time())
    assert process_alive(manifest) is True
    child.kill()
    wait_until(lambda: process.status() == psutil.STATUS_ZOMBIE)
    assert process_alive(manifest) is False
    child.wait()
    assert process_alive(manifest) is False


def test_a_process_of_another_container_cannot_be_known(
    make_manifest: MakeManifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where both pid namespaces are known and differ, a pid says nothing; where one is not, it is believed."""
    monkeypatch.setattr("gradiometer.process.pid_namespace", lambda: "pid:[1]")
    answers = [process_alive(make_manifest(pid_namespace=name)) for name in ("", "pid:[1]", "pid:[2]")]
    assert answers == [True, True, None]
    monkeypatch.setattr("gradiometer.process.pid_namespace", lambda: "")
    assert process_alive(make_manifest(pid_namespace="pid:[2]")) is True


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has pid namespaces")
def test_pid_namespace_is_this_process(spawn: Spawn) -> None:
    """The name is not empty, and that of a child is the same."""
    code = "from gradiometer.process import pid_namespace; print(pid_namespace())"
    child = spawn(sys.executable, "-c", code, stdout=subprocess.PIPE).communicate(timeout=60)[0]
    assert pid_namespace() == child.strip() != ""


def test_logged_names_take_no_column(make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A scalar that is called like a column of the data frame has its own."""
    recorder = write_run(make_manifest(), np.ones((2, 4)))
    recorder.event("scalars", "named", names=["time"])
    recorder.scalars[0] = 5.0
    recorder.amend(NAN)
    run = open_run(recorder.path)
    frame = run.to_pandas()
    assert frame["time"].tolist() == run.time.tolist()
    assert frame["log/time"].tolist()[-1] == 5.0


def test_root_is_argument_then_environment_then_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of the three that is given wins."""
    monkeypatch.setenv("GRADIOMETER_DIR", "/from/environment")
    assert default_root(tmp_path) == tmp_path
    assert default_root() == Path("/from/environment")
    monkeypatch.delenv("GRADIOMETER_DIR")
    assert default_root().name == "runs"
