"""Rows and layers over HTTP: down-sampled as an independent reference does, of runs that are written, wrap, resume."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from gradiometer.live.revisions import History as PolicyHistory
from gradiometer.live.revisions import Revision, Slot, write_history
from gradiometer.recorder import RowHeader
from gradiometer.records import Flag
from gradiometer.run import Run, open_run
from gradiometer_monitor.web.history import BASE_BUCKETS_LEAST, HistoryCache, Selection, Source
from tests._monitor import WRITER, Monitor

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, Spawn, Start, Train, WaitUntil, WriteRun

NAN = float("nan")
Follow = Callable[[], Monitor]
STAT = "grad_norm_preclip"


def rows(monitor: Monitor, run_id: str = "run", query: str = "") -> dict[str, Any]:
    """Ask for the rows of a run, which must answer."""
    status, body, _ = monitor.get(f"/api/v1/runs/{run_id}/rows?{query}")
    assert status == 200, body
    found: dict[str, Any] = json.loads(body)
    return found


def numbers(values: list[float | None]) -> npt.NDArray[np.float64]:
    return np.array([NAN if value is None else value for value in values], np.float64)


def source(path: Path) -> Source:
    run = open_run(path)
    return Source(path=run.path, identity=(0, 0), manifest=run.manifest)


def grouped(run: Run, size: int) -> Iterator[npt.NDArray[np.intp]]:
    """Cut a run into the rows of each bucket, by the number that each row has since the start."""
    number = (run.rows["begin"].astype(np.int64) - 1) // size
    for bucket in np.unique(number):
        yield np.flatnonzero(number == bucket)


def assert_equals_reference(found: dict[str, Any], run: Run) -> None:
    """Assert that an answer about a whole run with all layers is what NumPy makes of the run."""
    groups = list(grouped(run, found["bucket_steps"]))
    assert found["steps"] == [int(run.steps[group].min()) for group in groups]
    assert found["rows"] == [len(group) for group in groups]
    assert found["clipped_steps"] == [int((run.rows["flags"][g] & int(Flag.CLIPPED) != 0).sum()) for g in groups]
    finite = np.where(np.isfinite(run.grad_norm_preclip), run.grad_norm_preclip, -1.0)
    expected = [NAN if (peak := finite[group].max()) < 0 else peak for group in groups]
    np.testing.assert_array_equal(numbers(found["columns"][STAT]), expected)
    np.testing.assert_allclose(numbers(found["columns"]["loss"]), [run.loss[group].mean() for group in groups])
    np.testing.assert_array_equal(found["nonfinite_steps"], [run.nonfinite[group].sum() for group in groups])
    assert [bool(flags & Flag.NONFINITE) for flags in found["flags"]] == [run.nonfinite[g].any() for g in groups]
    norms = run.layer_norms()
    for place, layer in enumerate(found["layers"]):
        assert layer["name"] == run.layers[place]
        column = norms[:, place]
        peaks = [np.max(column[g], where=np.isfinite(column[g]), initial=-1.0) for g in groups]
        np.testing.assert_allclose(numbers(layer["values"]), [NAN if p < 0 else p for p in peaks], rtol=1e-6)
        assert layer["nonfinite"] == [i for i, g in enumerate(groups) if not np.isfinite(column[g]).all()]


def spiky(count: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """Draw norms of four parameters with single spikes, and some rows that are not finite."""
    rng = np.random.default_rng(seed)
    norms = rng.random((count, 4)) + 0.1
    norms[rng.integers(count, size=count // 20), 1] *= 1000
    norms[rng.integers(count, size=count // 30), 2] = NAN
    norms[rng.integers(count, size=count // 30), 3] = np.inf
    return norms


@pytest.fixture(scope="module")
def served(shared_start: Start) -> Monitor:
    """Start the daemon that most tests of this file share."""
    return shared_start()


@pytest.fixture
def follow(served: Monitor, tmp_path: Path, wait_until: WaitUntil) -> Iterator[Follow]:
    """Give a function that moves the run to where the daemon follows it, where it can be written on; remove it."""

    def move() -> Monitor:
        (tmp_path / "run").rename(served.root / "run")
        wait_until(lambda: served.state("run"))
        return served

    yield move
    shutil.rmtree(served.root / "run")
    wait_until(lambda: not served.runs())


@pytest.mark.parametrize(("written", "points"), [(50, 1000), (300, 1000), (300, 16), (300, 1)])
def test_rows_equal_the_run(
    follow: Follow, make_manifest: MakeManifest, write_run: WriteRun, written: int, points: int
) -> None:
    """With and without a wrapped ring, every bucket holds the largest of its rows, composed by layer."""
    manifest = make_manifest(capacity=256, created_ns=time.time_ns())
    losses = list(np.random.default_rng(1).random(written))
    flags = [int(Flag.CLIPPED) * (step % 3 == 0) for step in range(written)]
    norms = spiky(written)
    flags = [f | int(Flag.NONFINITE) * (not np.isfinite(n).all()) for f, n in zip(flags, norms, strict=True)]
    write_run(manifest, norms, loss=losses, flags=flags)
    served = follow()
    found = rows(served, query=f"points={points}&layers=*")
    assert len(found["steps"]) <= points
    assert found["complete"] is (written <= 255)
    assert_equals_reference(found, open_run(served.root / "run"))
    assert (found["first_step"], found["last_step"]) == (found["steps"][0], written - 1)


def test_large_rings_are_merged_from_kept_buckets(
    make_manifest: MakeManifest, write_run: WriteRun, append: Append, tmp_path: Path
) -> None:
    """A ring of more rows than buckets are kept is answered at every resolution, before and after it grew."""
    manifest = make_manifest(capacity=40_000)
    recorder = write_run(manifest, spiky(9000), loss=NAN)
    cache = HistoryCache()
    for grown in (0, 3000):
        append(recorder, spiky(grown, seed=2) if grown else np.empty((0, 4)), loss=NAN)
        run = open_run(tmp_path / "run")
        for points in (20_000, 3000, 700, 10):
            window = cache.select(source(tmp_path / "run"), STAT, Selection(points=points))
            groups = list(grouped(run, 2**window.level))
            finite = np.where(np.isfinite(run.grad_norm_preclip), run.grad_norm_preclip, -1.0)
            assert len(groups) <= points
            peaks = [NAN if (peak := finite[group].max()) < 0 else peak for group in groups]
            np.testing.assert_array_equal(window.buckets.scalars[STAT], peaks)
            usual = run.grad_norm_preclip[np.isfinite(run.grad_norm_preclip)]
            assert window.baseline[-1] == np.median(usual[-512:])


def test_a_range_has_the_steps_asked_for(follow: Follow, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """from, to and after cut the rows; where the ring has overwritten some of them the answer says so."""
    write_run(make_manifest(capacity=64, created_ns=time.time_ns()), np.ones((100, 4)))
    monitor = follow()
    found = rows(monitor, query="from_step=50&to_step=59")
    assert (found["steps"], found["complete"], found["bucket_steps"]) == (list(range(50, 60)), True, 1)
    assert rows(monitor, query="from_step=10&to_step=59")["complete"] is False
    assert rows(monitor, query="after_step=97")["steps"] == [98, 99]
    assert rows(monitor, query="after_sequence=98")["steps"] == [98, 99]
    assert rows(monitor, query="from_step=59&to_step=50")["steps"] == []
    nothing = rows(monitor, query="after_sequence=100")
    assert (nothing["steps"], nothing["first_step"], nothing["last_sequence"]) == ([], None, 100)


def test_an_answer_is_continued_by_the_next(
    follow: Follow, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """Buckets after a sequence, of the same size, replace the last of the earlier answer and follow it."""
    recorder = write_run(make_manifest(capacity=512, created_ns=time.time_ns()), spiky(101))
    monitor = follow()
    before = rows(monitor, query="points=20&layers=*")
    append(recorder, spiky(60, seed=3))
    query = f"after_sequence={before['last_sequence'] - 1}&bucket_steps={before['bucket_steps']}&points=20&layers=*"
    more, whole = rows(monitor, query=query), rows(monitor, query="points=25&layers=*")
    keep = before["steps"].index(more["steps"][0])
    assert whole["bucket_steps"] == more["bucket_steps"] == before["bucket_steps"] == 8
    for name in ("steps", "last_steps", "rows", "flags"):
        assert before[name][:keep] + more[name] == whole[name]
    assert before["columns"][STAT][:keep] + more["columns"][STAT] == whole["columns"][STAT]


def test_no_torn_row_while_a_process_writes(
    spawn: Spawn, start: Start, make_manifest: MakeManifest, tmp_path: Path, wait_until: WaitUntil
) -> None:
    """Asked again and again while a process writes as fast as it can, every row's norm is that of its layers."""
    layers = [f"layer.{place}" for place in range(200)]
    manifest = make_manifest(layers=layers, capacity=64)
    writer = WRITER.replace("sys.argv[3])):", "sys.argv[3])):\n    os.sched_yield()")
    spawn(sys.executable, "-c", writer, tmp_path, manifest.model_dump_json(), "400000", "stay")
    wait_until(lambda: (tmp_path / "run" / "rank-00000" / "manifest.json").exists())
    monitor = start()
    wait_until(lambda: monitor.state("run"))
    seen, checked = 0, 0
    while checked < 20:
        found = rows(monitor, query=f"layers=*&points=64&after_sequence={seen}")
        if not found["steps"] or found["bucket_steps"] > 1:
            continue
        values = np.array([numbers(layer["values"]) for layer in found["layers"]])
        np.testing.assert_allclose(np.sqrt(np.square(values).sum(axis=0)), found["columns"][STAT], rtol=1e-5)
        assert np.all(np.diff(found["steps"]) > 0)
        assert found["steps"][-1] + 1 <= found["last_sequence"]
        checked += found["last_sequence"] > seen
        seen = max(0, found["last_sequence"] - 30)


def test_a_run_that_went_back_to_a_checkpoint(follow: Follow, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """Steps that were taken again are there twice, in the order in which they were written."""
    steps = [0, 1, 2, 3, 2, 3, 4]
    write_run(make_manifest(created_ns=time.time_ns()), np.ones((7, 4)), step=steps)
    monitor = follow()
    assert rows(monitor)["steps"] == steps
    assert rows(monitor, query="from_step=4")["steps"] == [4]
    assert rows(monitor, query="points=1")["last_step"] == 4


def test_a_run_that_began_anew_is_another(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil, spawn: Spawn, tmp_path: Path
) -> None:
    """A job that was started again under its id is not shown with what the old one had."""
    gone = spawn(sys.executable, "-c", "")
    gone.wait()
    write_run(make_manifest(pid=gone.pid, created_ns=time.time_ns()), np.ones((9, 4)), close=True)
    monitor = start()
    first = rows(monitor)
    write_run(make_manifest(created_ns=time.time_ns()), 2 * np.ones((3, 4)))

    def begun_anew() -> dict[str, Any] | None:
        status, body, _ = monitor.get("/api/v1/runs/run/rows")
        # Between the old directory, moved away, and the new one the monitor may find none.
        found: dict[str, Any] = json.loads(body) if status == 200 else {"created_ns": first["created_ns"]}
        return found if found["created_ns"] != first["created_ns"] and len(found["steps"]) == 3 else None

    second = wait_until(begun_anew)
    assert (second["steps"], second["columns"][STAT]) == ([0, 1, 2], [4.0] * 3)


def test_each_rank_has_its_own_rows(follow: Follow, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """The rows of a rank are its own; a rank that is not there is told with those that are."""
    for rank in (0, 1):
        manifest = make_manifest(rank=rank, world_size=2, created_ns=time.time_ns())
        write_run(manifest, (rank + 1) * np.ones((5, 4)))
    monitor = follow()
    assert rows(monitor, query="rank=1")["columns"][STAT] == [4.0] * 5
    status, body, _ = monitor.get("/api/v1/runs/run/rows?rank=7")
    assert (status, json.loads(body)["detail"]) == (
        404,
        "rank 7 of run 'run' is not followed: those that are, are 0, 1",
    )


WRONG = [
    ("other/rows", 404, "no run 'other' is followed; there are: run"),
    ("run/rows?columns=norm", 422, "grad_norm_baseline"),
    ("run/rows?stat=norm", 422, "microbatch_norm"),
    ("run/rows?layers=nothing", 404, "layers 'nothing': the run has 3 layers: embed, blocks.0, head"),
    ("run/rows?points=0", 422, "greater than or equal to 1"),
    ("run/rows?from_step=99999999999999999999", 422, "less than or equal to"),
    ("run/rows?from=1&to=2", 422, "no such parameter; there are rank, from_step, to_step"),
    ("run/rows?pionts=5", 422, "did you mean 'points'?"),
    ("run?rank=0", 422, "no such parameter; this operation has none"),
    ("run/layers?rank=5", 404, "rank 5 of run 'run' is not followed"),
    ("..%2F..%2Fetc/rows", 404, ""),
]


def test_wrong_requests_name_the_remedy(follow: Follow, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """What is wrong with a request is said, with what would be right."""
    write_run(make_manifest(created_ns=time.time_ns()), np.ones((3, 4)))
    monitor = follow()
    for path, status, said in WRONG:
        found, body, _ = monitor.get(f"/api/v1/runs/{path}")
        assert (path, found) == (path, status)
        assert said in body.decode().replace('\\"', '"')


def test_only_what_was_asked_for_is_sent(follow: Follow, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """Columns and layers are chosen by name; a layer without a gradient is null, and so is a loss not logged."""
    norms = np.ones((3, 4))
    norms[1:, 3] = -0.0
    write_run(make_manifest(created_ns=time.time_ns()), norms, loss=NAN)
    found = rows(follow(), query="columns=loss&columns=coefficient&layers=head&layers=embed")
    assert found["columns"] == {"loss": [None] * 3, "coefficient": [1.0] * 3}
    assert {layer["name"]: layer["values"] for layer in found["layers"]} == {
        "embed": [1.0] * 3,
        "head": [1.0, None, None],
    }


def test_policies_are_named_by_the_revision_of_the_row(
    follow: Follow, make_manifest: MakeManifest, write_run: WriteRun, tmp_path: Path
) -> None:
    """After a change of the policy the same slot is another's; buckets do not mix the two."""
    recorder = write_run(make_manifest(policies=("a",), created_ns=time.time_ns()), np.empty((0, 4)))
    revisions = tuple(
        Revision(revision=n, step=3 * n, time_ns=1, policy=None, slots=(Slot(name=name),), source="attach")
        for n, name in enumerate("ab")
    )
    write_history(tmp_path / "run" / "rank-00000", PolicyHistory(revisions=revisions))
    for step in range(6):
        recorder.policies[0, 0] = step + 1
        recorder.stats[:] = 1
        recorder.commit(_header(step, revision=step // 3))
    found = rows(follow(), query="points=2")
    assert found["rows"] == [3, 1, 2]
    assert {p["name"]: (p["threshold"], p["clipped_steps"]) for p in found["policies"]} == {
        "a": ([3.0, None, None], [3, 0, 0]),
        "b": ([None, 4.0, 6.0], [0, 1, 2]),
    }


def _header(step: int, revision: int) -> RowHeader:
    rest = (2.0, 1.0, 0.5, 0.1, 2.0, NAN, 1.0, 0.0)
    return RowHeader(step, 10**18 + step, int(Flag.CLIPPED), 1, 0, 1, -1, revision, *rest)


def test_memory_is_bounded(make_manifest: MakeManifest, write_run: WriteRun, tmp_path: Path) -> None:
    """Histories are let go of beyond the limit, also with more layers than rows, and answers stay the same."""
    layers = [f"layer.{place}" for place in range(3000)]
    cache, windows = HistoryCache(limit=16 * 2**20), []
    for run_id in ("a", "b", "c"):
        write_run(make_manifest(run_id, layers=layers, capacity=600), np.ones((600, 3000)), close=True)
    for _ in range(2):
        for run_id in ("a", "b", "c"):
            windows.append(cache.select(source(tmp_path / run_id), STAT, Selection(points=100)))
            assert cache.nbytes <= 16 * 2**20
    assert {len(window.buckets) for window in windows} == {75}
    assert len(windows[0].buckets) * 4 >= BASE_BUCKETS_LEAST


def test_many_clients_ask_at_once(make_manifest: MakeManifest, write_run: WriteRun, tmp_path: Path) -> None:
    """Threads that ask one history for different ranges get what each asked for."""
    write_run(make_manifest(capacity=4096), np.arange(1, 2001)[:, None] * np.ones((2000, 4)))
    cache, found = HistoryCache(), dict[int, int]()
    here = source(tmp_path / "run")

    def ask(step: int) -> None:
        window = cache.select(here, STAT, Selection(from_step=step, to_step=step + 9))
        found[step] = int(window.buckets.scalars[STAT][0] / 2)

    threads = [threading.Thread(target=ask, args=(step,)) for step in range(0, 1900, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {step: step + 1 for step in range(0, 1900, 100)}


def test_layers_say_what_the_summary_knows(start: Start, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """The table has the layers in the order of the model: last, largest, share, what was not finite or not there."""
    norms = np.array([[3.0, 6.0, 8.0, 0.5], [3.0, NAN, 1.0, 0.5], [3.0, 0.0, 4.0, -0.0]])
    write_run(make_manifest(created_ns=time.time_ns()), norms)
    status, body, _ = start().get("/api/v1/runs/run/layers")
    table = json.loads(body)
    assert (status, table["last_step"]) == (200, 2)
    found = {layer["name"]: layer for layer in table["layers"]}
    assert list(found) == ["embed", "blocks.0", "head"]
    assert [(x["last"], x["window_max"], x["nonfinite_steps"]) for x in found.values()] == [
        (3.0, 3.0, 0), (4.0, 10.0, 1), (None, 0.5, 0),
    ]  # fmt: skip
    assert [x["share"] for x in found.values()] == pytest.approx([9 / 25, 16 / 25, 0])
    assert [x["vanishing"] or x["exploding"] for x in found.values()] == [False] * 3


def test_a_ring_that_cannot_be_read_is_told(
    start: Start, train: Train, make_manifest: MakeManifest, tmp_path: Path, wait_until: WaitUntil
) -> None:
    """When the ring is gone under the monitor the answer is 503 or 404, without a path of the disk."""
    train(make_manifest(), 5)
    monitor = start("--poll-seconds", "3600")
    wait_until(lambda: monitor.state("run"))
    (tmp_path / "run/rank-00000/steps.ring").unlink()
    status, body, _ = monitor.get("/api/v1/runs/run/rows")
    assert (status, json.loads(body)) == (
        503, {"detail": "rank 0 of run 'run' cannot be read (FileNotFoundError): the monitor's log says why"},
    )  # fmt: skip
