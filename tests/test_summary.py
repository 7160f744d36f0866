"""The state behind the metrics, against plain Python that walks the rows one by one."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradiometer.metrics import GRAD_NORM_BUCKETS, STEP_SECONDS_BUCKETS, WINDOW_SECONDS
from gradiometer.records import STATUS, Flag, Manifest, Rows
from gradiometer.summary import Histogram, RunSummary
from gradiometer.tail import RankTail
from gradiometer.windows import BUCKET_NS, WindowMax

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, Spawn, WaitUntil, WriteRun

INF, NAN = math.inf, math.nan
STATUS_ZERO = np.zeros(1, STATUS)[0]
SECOND = 10**9


def _rows(manifest: Manifest, norms: npt.ArrayLike, first: int = 1, **columns: Any) -> Rows:
    """Make rows of given parameter norms [T, P], one step a second, without a file."""
    values = np.asarray(norms, np.float32)
    rows = np.zeros(len(values), manifest.ring.dtype)
    rows["begin"] = rows["end"] = np.arange(first, first + len(values))
    rows["time_ns"] = np.arange(first, first + len(values)) * SECOND
    rows["loss"] = NAN
    rows["parameters"][:, 0, :] = values
    rows["grad_norm_preclip"] = np.sqrt(np.square(values.astype(np.float64)).sum(axis=1))
    for name, column in columns.items():
        rows[name] = column
    return rows


def _fed(manifest: Manifest, norms: npt.ArrayLike, **columns: Any) -> RunSummary:
    summary = RunSummary(manifest)
    summary.update(_rows(manifest, norms, **columns), STATUS_ZERO)
    return summary


@pytest.mark.parametrize("bounds", [GRAD_NORM_BUCKETS, STEP_SECONDS_BUCKETS])
@given(values=st.lists(st.floats(min_value=0) | st.just(NAN) | st.just(INF) | st.just(1.0), max_size=40))
def test_histogram_counts_like_a_loop(bounds: tuple[float, ...], values: list[float]) -> None:
    """A bucket counts what is at or below its bound, and the last one everything."""
    histogram = Histogram(bounds)
    histogram.observe(np.array(values))
    assert histogram.cumulative == [sum(value <= bound for value in values) for bound in bounds] + [len(values)]


def test_histogram_sum_is_not_poisoned() -> None:
    """NaN and Inf are counted and left out of the sum."""
    histogram = Histogram((1.0,))
    histogram.observe(np.array([0.5, NAN, INF, 2.0]))
    assert (histogram.cumulative, histogram.sum) == ([1, 4], 2.5)


Steps = st.lists(
    st.tuples(st.integers(0, 90), st.floats(0, 1e6) | st.just(NAN) | st.just(INF)), min_size=1, max_size=60
)


@given(steps=Steps, cut=st.integers(0, 60))
def test_window_max_is_the_largest_of_the_last_minute(steps: list[tuple[int, float]], cut: int) -> None:
    """A maximum covers one window to one bucket more before the newest row, wherever the batches were cut."""
    times = np.cumsum([seconds for seconds, _ in steps]).astype(np.int64) * SECOND
    values = np.array([value for _, value in steps])
    window = WindowMax(1)
    for part in (slice(cut), slice(cut, None)):
        if len(times[part]):
            window.add(times[part], values[part, None])

    def largest(reach_ns: int) -> float:
        return max((v for t, v in zip(times, values, strict=True) if times[-1] - t < reach_ns and v == v), default=-1.0)

    found = float(window.max()[0])
    found = -1.0 if math.isnan(found) else found
    assert largest(int(WINDOW_SECONDS * SECOND)) <= found <= largest(int(WINDOW_SECONDS * SECOND) + BUCKET_NS)


def test_window_starts_anew_when_the_clock_is_set_back() -> None:
    """Rows of a future that the clock has left do not stay in the window."""
    window = WindowMax(1)
    window.add(np.array([10_000 * SECOND]), np.array([[9.0]]))
    window.add(np.array([1000 * SECOND]), np.array([[1.0]]))
    assert window.max().tolist() == [1.0]


def test_window_of_nothing_is_unknown() -> None:
    """Before the first row a maximum is NaN."""
    assert np.isnan(WindowMax(3).max()).all()


@given(steps=Steps, cut=st.integers(0, 60))
def test_finite_window_max_is_the_largest_finite_norm(
    make_manifest: MakeManifest, steps: list[tuple[int, float]], cut: int
) -> None:
    """Of the norms of the last minute, to a bucket more, NaN and Inf are none; the other maximum has Inf."""
    times = np.cumsum([seconds for seconds, _ in steps]).astype(np.int64) * SECOND
    norms = [value for _, value in steps]
    manifest = make_manifest(layers=("a",))
    summary = RunSummary(manifest)
    rows = _rows(manifest, np.zeros((len(norms), 1)), time_ns=times, grad_norm_preclip=norms)
    for part in (rows[:cut], rows[cut:]):
        summary.update(part, STATUS_ZERO)
    window = int(WINDOW_SECONDS * SECOND)

    def largest(reach_ns: int) -> float:
        recent = [norm for at, norm in zip(times, norms, strict=True) if times[-1] - at < reach_ns]
        return max((norm for norm in recent if math.isfinite(norm)), default=-1.0)

    found = summary.grad_norm_finite_window_max
    assert largest(window) <= (-1.0 if math.isnan(found) else found) <= largest(window + BUCKET_NS)
    if INF in norms and times[-1] - times[0] < window:
        assert summary.grad_norm_window_max == INF


@given(first=st.lists(st.integers(-1, 4), min_size=1, max_size=40), cut=st.integers(0, 40))
def test_origins_like_a_loop(make_manifest: MakeManifest, first: list[int], cut: int) -> None:
    """A step counts for the layer of its first non-finite parameter, with none, or one that is not there, for none.

    The newest are told first, also by who goes on from the state of another.
    """
    manifest = make_manifest(layers=("a", "b", "a", "c"))
    summary = RunSummary(manifest)
    rows = _rows(manifest, np.ones((len(first), 4)), first_nonfinite=first)
    for part in (rows[:cut], rows[cut:]):
        summary.update(part, STATUS_ZERO)
    layers = {0: "a", 1: "b", 2: "a", 3: "c"}
    began = [layers[each] for each in first if each in layers]
    later = RunSummary(manifest)
    later.resume(json.loads(json.dumps(summary.counts())))
    for origins in (summary.layers.origins, later.layers.origins):
        steps = dict(zip("abc", origins.steps.tolist(), strict=True))
        assert {name: n for name, n in steps.items() if n} == Counter(began)
        assert ["abc"[place] for place in origins.newest(2)] == list(dict.fromkeys(reversed(began)))[:2]


norms_lists = st.lists(
    st.lists(st.floats(0, 1e10, width=32) | st.sampled_from([-0.0, NAN, INF]), min_size=4, max_size=4),
    min_size=1,
    max_size=30,
)


@given(norms=norms_lists, cut=st.integers(0, 30))
def test_layers_like_a_loop(make_manifest: MakeManifest, norms: list[list[float]], cut: int) -> None:
    """Norms, maxima and non-finite counts of layers are those of a walk over rows and parameters."""
    manifest = make_manifest(layers=("a", "b", "a", "c"))
    summary = RunSummary(manifest)
    rows = _rows(manifest, norms)
    for part in (rows[:cut], rows[cut:]):
        summary.update(part, STATUS_ZERO)
    members = {"a": (0, 2), "b": (1,), "c": (3,)}
    expected = {layer: [math.sqrt(sum(r[p] ** 2 for p in ps)) for r in norms] for layer, ps in members.items()}
    columns = [values.tolist() for values, _ in summary.layers.columns().values()]
    for place, layer in enumerate(summary.layers.names):
        series = expected[layer]
        peak = max((value for value in series if value == value), default=NAN)
        found = [column[place] for column in columns[:3]]
        assert found == pytest.approx([series[-1], peak, sum(not math.isfinite(v) for v in series)], nan_ok=True)


def test_layer_window_max_forgets_after_the_window(make_manifest: MakeManifest) -> None:
    """A spike of a layer is gone once the window and a bucket have passed."""
    norms = [[9.0], *[[1.0]] * 70]
    assert _fed(make_manifest(layers=("a",)), norms[:60]).layers.window_max().tolist() == [9.0]
    assert _fed(make_manifest(layers=("a",)), norms).layers.window_max().tolist() == [1.0]


def test_frozen_layer_is_exported_once_it_has_a_gradient(make_manifest: MakeManifest) -> None:
    """Negative zero is no gradient, positive zero and NaN of either sign are."""
    manifest = make_manifest(layers=("a", "b", "c", "d"))
    frozen = tuple(p.model_copy(update={"trainable": p.layer == "a"}) for p in manifest.parameters)
    manifest = manifest.model_copy(update={"parameters": frozen})
    summary = _fed(manifest, [[-0.0, -0.0, -0.0, -0.0]])
    assert summary.layers.exported.tolist() == [True, False, False, False]
    summary.update(_rows(manifest, [[-0.0, -0.0, 0.0, -NAN]], first=2), STATUS_ZERO)
    assert summary.layers.exported.tolist() == [True, False, True, True]


def test_layers_are_unknown_before_the_first_row(make_manifest: MakeManifest) -> None:
    """Only the counter is known then: it is born at 0."""
    known = [mask.any() for _, mask in RunSummary(make_manifest()).layers.columns().values()]
    assert known == [False, False, True, False]


def test_anomaly_is_how_far_the_peak_is_above_the_usual(make_manifest: MakeManifest) -> None:
    """A layer at its usual norm has anomaly 0, one that hardly moved and then jumped a hundredfold log 100 / 0.1."""
    norms = [[1.0, 5.0, -0.0]] * 400 + [[1.0, 500.0, -0.0]]
    steady, jumped, silent = _fed(make_manifest(layers=("a", "b", "c")), norms).layers.anomaly()
    assert steady == pytest.approx(0, abs=1e-9)
    assert jumped == pytest.approx(math.log(100) / 0.1)  # the floor of the deviation
    assert silent == -INF


@given(norms=st.lists(st.floats(0, 1e6) | st.just(NAN) | st.just(INF), max_size=700), cut=st.integers(0, 700))
@settings(max_examples=30)
def test_baseline_is_the_median_of_the_last_finite_steps(
    make_manifest: MakeManifest, norms: list[float], cut: int
) -> None:
    """Of more than 512 finite norms the newest count, and non-finite ones not at all."""
    manifest = make_manifest(layers=("a",))
    summary = RunSummary(manifest)
    rows = _rows(manifest, np.zeros((len(norms), 1)), grad_norm_preclip=np.array(norms))
    for part in (rows[:cut], rows[cut:]):
        summary.update(part, STATUS_ZERO)
    finite = [norm for norm in norms if math.isfinite(norm)][-512:]
    expected = statistics.median(finite) if finite else NAN
    assert summary.grad_norm_baseline == pytest.approx(expected, nan_ok=True)


def test_loss_is_the_newest_that_was_logged(make_manifest: MakeManifest) -> None:
    """A step whose loss was not logged keeps that of an earlier one; a loss of NaN is a loss."""
    logged = [Flag.LOSS, Flag.LOSS, 0]
    assert _fed(make_manifest(), np.ones((3, 4)), loss=[3.0, 2.0, NAN], flags=logged).loss == 2.0
    assert _fed(make_manifest(), np.ones((3, 4))).loss is None
    assert math.isnan(_fed(make_manifest(), np.ones((1, 4)), loss=[NAN], flags=[Flag.LOSS]).loss or 0.0)


def test_rows_that_were_overtaken_are_missed(make_manifest: MakeManifest) -> None:
    """A gap before, between or given up after the rows is counted, and nothing twice."""
    manifest = make_manifest()
    summary = RunSummary(manifest)
    summary.update(_rows(manifest, np.ones((2, 4)), first=11), STATUS_ZERO)
    summary.update(_rows(manifest, np.ones((6, 4)), first=13)[[0, 1, 5]], STATUS_ZERO)
    assert (summary.rows_missed, summary.last_seen) == (10 + 3, 18)
    for _ in range(2):
        summary.give_up(20)
    assert (summary.rows_missed, summary.last_seen) == (15, 20)


@pytest.mark.parametrize("limit", [1, 3, 100])
def test_a_late_reader_misses_nothing(
    make_manifest: MakeManifest,
    write_run: WriteRun,
    append: Append,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
) -> None:
    """What the ring gave up before it was opened, or while it was first read, is history; what it does later is not."""
    manifest = make_manifest(capacity=8)
    monkeypatch.setattr("gradiometer.tail.POLL_BYTES", limit * manifest.ring.dtype.itemsize)
    recorder = write_run(manifest, np.ones((30, 4)))
    tail = RankTail(recorder.path)
    append(recorder, np.ones((2, 4)))
    assert not tail.caught_up
    for _ in range(20):
        tail.poll()
    assert tail.caught_up
    assert (tail.summary.grad_norm.cumulative[-1], tail.summary.rows_missed) == (8, 0)
    append(recorder, np.ones((11, 4)))
    for _ in range(20):
        tail.poll()
    assert (tail.summary.grad_norm.cumulative[-1], tail.summary.rows_missed) == (16, 3)
    tail.close()


def test_a_loss_that_comes_late_is_the_newest(make_manifest: MakeManifest, write_run: WriteRun, append: Append) -> None:
    """A loss that amends a row which was read already is taken, also when the next row has come by then without one."""
    recorder = write_run(make_manifest(), np.ones((1, 4)), loss=NAN)
    tail, losses = RankTail(recorder.path), list[float | None]()

    def look() -> None:
        tail.poll()
        losses.append(tail.summary.loss)

    look()
    recorder.amend(0.5)
    look()
    append(recorder, np.ones((1, 4)), loss=NAN)
    look()
    recorder.amend(0.25)
    append(recorder, np.ones((1, 4)), loss=NAN)
    look()
    assert losses == [None, 0.5, 0.5, 0.25]
    assert (tail.summary.grad_norm.cumulative[-1], tail.summary.rows_missed) == (3, 0)
    tail.close()


WRITER = """
import sys
from pathlib import Path
from gradiometer.records import Manifest
from gradiometer.recorder import Recorder, RowHeader

recorder = Recorder(Path(sys.argv[1]), Manifest.model_validate_json(sys.argv[2]))
sys.stdin.readline()
for step in range(20_000):
    recorder.stats[:] = 1.0
    recorder.commit(RowHeader(step, step, 0, 0, 0, 0, -1, 0, *[float("nan")] * 8)._replace(grad_norm_preclip=1.0))
    recorder.amend(float(step))
recorder.close()
"""


@pytest.mark.parametrize("capacity", [20_000, 16])
def test_beside_a_writer_each_row_is_counted_once(
    tmp_path: Path, make_manifest: MakeManifest, spawn: Spawn, wait_until: WaitUntil, capacity: int
) -> None:
    """A row that is amended while it is read is no gap, and one that the ring overtook is missed, not forgotten."""
    manifest = make_manifest(capacity=capacity)
    writer = spawn(sys.executable, "-c", WRITER, tmp_path, manifest.model_dump_json(), stdin=subprocess.PIPE)
    path = tmp_path / "run/rank-00000"
    wait_until((path / "manifest.json").exists)
    tail = RankTail(path)
    assert writer.stdin is not None
    writer.stdin.write("go\n")
    writer.stdin.flush()
    while not tail.finished:
        tail.poll()
    while tail.poll():
        pass
    tail.close()
    counted = tail.summary.grad_norm.cumulative[-1]
    assert tail.summary.last_seen == 20_000
    assert counted + tail.summary.rows_missed == 20_000
    assert (tail.summary.rows_missed == 0) == (capacity == 20_000)
    assert tail.summary.loss == 19_999
