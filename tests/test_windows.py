"""What is usual of a layer and what is not, against float64 references and on drifting, broken and silent data."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradiometer.records import STATUS, Flag, Manifest
from gradiometer.summary import RunSummary
from gradiometer.tail import RankTail, frame
from gradiometer.windows import (
    BASELINE_STEPS,
    BUCKET_NS,
    CHUNK,
    HOLD_STEPS,
    MINIMUM_SAMPLES,
    WARMUP_STEPS,
    LayerBaseline,
    Streak,
    WindowMax,
    WindowRatio,
    _sampled,
    median_and_mad,
)

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, WriteRun

INF, NAN = math.inf, math.nan
SECOND = 10**9
Floats = npt.NDArray[np.float64]


class Feed:
    """A run of layers ``a``, ``b`` … of one parameter each, fed with norms, one step a second."""

    def __init__(self, manifest: Manifest) -> None:
        self.summary, self._manifest, self._steps = RunSummary(manifest), manifest, 0

    def __call__(self, norms: npt.ArrayLike, **columns: Any) -> RunSummary:
        values = np.asarray(norms, np.float32)
        rows = np.zeros(len(values), self._manifest.ring.dtype)
        rows["begin"] = np.arange(self._steps + 1, self._steps + len(values) + 1)
        rows["time_ns"] = rows["begin"] * SECOND
        rows["parameters"][:, 0, :] = values
        with np.errstate(over="ignore"):
            rows["grad_norm_preclip"] = np.sqrt(np.square(values.astype(np.float64)).sum(axis=1))
        for name, column in columns.items():
            rows[name] = column
        self._steps += len(values)
        self.summary.update(rows, np.zeros(1, STATUS)[0])
        return self.summary


@pytest.fixture
def feed(make_manifest: MakeManifest) -> Feed:
    """Give a run of the layers a, b and c."""
    return Feed(make_manifest(layers=("a", "b", "c")))


def _noise(steps: int, seed: int = 0, deviation: float = 0.3) -> Floats:
    """Make norms [steps, 3] that are log-normal around 1, 10 and 100."""
    return np.exp(np.random.default_rng(seed).normal(np.log([1.0, 10.0, 100.0]), deviation, (steps, 3)))


@settings(max_examples=30)
@given(
    values=st.lists(st.lists(st.floats(-50, 50, width=32) | st.just(NAN), min_size=40, max_size=40), min_size=1),
)
def test_median_and_mad_are_those_of_numpy(values: list[list[float]]) -> None:
    """Each row has the median and the deviation of its known values, or NaN where these are too few."""
    found = median_and_mad(np.array(values, np.float32))
    for row, median, mad in zip(np.array(values), *found, strict=True):
        known = row[~np.isnan(row)]
        if len(known) < MINIMUM_SAMPLES:
            assert np.isnan([median, mad]).all()
            continue
        assert median == pytest.approx(np.median(known), abs=1e-5)
        assert mad == pytest.approx(np.median(np.abs(known - np.median(known))), abs=2e-5)


@pytest.mark.parametrize("drift", [0.0, 0.002, -0.002])
def test_the_sample_is_near_the_whole(feed: Feed, drift: float) -> None:
    """Of random and of drifting norms the sampled median and deviation are those of the last 512 steps, nearly."""
    steps = 2048  # a multiple of the refresh: the baseline is as new as it can be
    norms = _noise(steps) * np.exp(drift * np.arange(steps))[:, None]
    layers = feed(norms).layers
    logs = np.log(norms[-BASELINE_STEPS:])
    median = np.median(logs, axis=0)
    mad = np.median(np.abs(logs - median), axis=0)
    assert np.abs(np.log(layers.median) - median).max() < 0.3 * mad.max() * 1.4826
    assert layers.mad == pytest.approx(mad, rel=0.35)


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(0, 400), max_size=6), seed=st.integers(0, 100))
def test_batches_do_not_matter(make_manifest: MakeManifest, cuts: list[int], seed: int) -> None:
    """Wherever the rows were cut, baselines, flags and ratios are the same."""
    rng = np.random.default_rng(seed)
    norms = _noise(400, seed)
    norms[rng.random(norms.shape) < 0.1] = rng.choice([NAN, INF, 0.0, -0.0])
    norms[200 + seed :, seed % 3] *= rng.choice([1.0, 1e-5, 50.0])
    flags = rng.choice([0, int(Flag.CLIPPED)], 400)
    whole, parts = (Feed(make_manifest(layers=("a", "b", "c"))) for _ in range(2))
    whole(norms, flags=flags)
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 400], strict=True):
        parts(norms[first:last], flags=flags[first:last])
    one, other = whole.summary, parts.summary
    assert one.clip_ratio == other.clip_ratio
    assert one.grad_norm_mad == pytest.approx(other.grad_norm_mad, nan_ok=True)
    for name in ("median", "mad", "vanishing", "exploding"):
        np.testing.assert_array_equal(getattr(one.layers, name), getattr(other.layers, name))
    np.testing.assert_allclose(one.layers.anomaly(), other.layers.anomaly())


def _usual_of(norms: list[float]) -> tuple[float, float] | None:
    """Walk one layer's norms: its median and MAD of logs, as they were last computed, or None."""
    last = len(norms) // 64 * 64
    if last < WARMUP_STEPS:
        return None
    steps = [step for step in range(last) if _sampled(np.array([step]))[0]][-128:]
    logs = [math.log(norms[step]) for step in steps if math.isfinite(norms[step]) and norms[step] > 0]
    if len(logs) < MINIMUM_SAMPLES:
        return None
    median = statistics.median(logs)
    return median, statistics.median(abs(log - median) for log in logs)


values = st.floats(0.5, 4.0, width=32) | st.sampled_from([NAN, INF, 0.0, -0.0])


@settings(max_examples=20)
@given(
    start=st.lists(values, max_size=60), seed=st.integers(0, 100), steps=st.integers(0, 900), broken=st.floats(0, 0.9)
)
def test_a_layer_is_judged_like_in_a_loop(
    make_manifest: MakeManifest, start: list[float], seed: int, steps: int, broken: float
) -> None:
    """Medians, deviations and streaks are those of a walk over float64 norms, whatever is among them."""
    rng = np.random.default_rng(seed)
    norms = rng.lognormal(0, 0.3, steps).astype(np.float32)
    norms[rng.random(steps) < broken] = rng.choice([NAN, INF, 0.0, -0.0])
    found = [*start, *norms.tolist()]
    if not found:
        return
    feed = Feed(make_manifest(layers=("a",)))
    layers = feed(np.array(found)[:, None]).layers
    usual = _usual_of(found)
    assert (usual is None) == bool(np.isnan(layers.median[0]))
    if usual is not None:
        assert np.log(layers.median[0]) == pytest.approx(usual[0], abs=1e-6)
        assert layers.mad[0] == pytest.approx(usual[1], abs=1e-6)
    zeros = 0
    for norm in found:
        absent = norm == 0 and math.copysign(1, norm) < 0
        zeros = zeros if absent else zeros + 1 if norm == 0 else 0
    assert layers.vanishing[0] == (zeros >= 64 and len(found) >= WARMUP_STEPS)


def test_alternating_steps_are_all_sampled() -> None:
    """Layers that have a gradient in every second or third step only have a baseline of their own norms."""
    baseline, nobody = LayerBaseline(2), np.zeros(2, np.bool_)
    steps = np.arange(BASELINE_STEPS)
    norms = np.stack([np.where(steps % 2 == 0, 2.0, 0.0), np.where(steps % 3 == 1, 5.0, 0.0)], axis=1)
    for first in range(0, BASELINE_STEPS, 64):
        baseline.add(norms[first : first + 64], nobody)
    assert np.exp(baseline.median) == pytest.approx([2.0, 5.0])


def test_nothing_is_unusual_in_warm_up(feed: Feed) -> None:
    """Whatever the first steps are, no score, flag or deviation comes of them."""
    wild = np.exp(np.random.default_rng(1).normal(0, 5, (WARMUP_STEPS - 1, 3)))
    wild[:, 1] = 0.0
    summary = feed(wild)
    assert not (summary.layers.vanishing | summary.layers.exploding).any()
    assert np.isnan(summary.layers.score).all()
    assert math.isnan(summary.grad_norm_mad)
    summary = feed(_noise(1))
    assert not math.isnan(summary.grad_norm_mad)
    assert np.isfinite(summary.layers.score[[0, 2]]).all()


def test_noise_and_schedules_raise_no_flag(feed: Feed) -> None:
    """A steep start, a slow decay by four decades and wide noise are what training looks like."""
    steps = np.arange(8000)
    level = 10 * np.exp(-steps / 50) + np.exp(-steps / 800) + 1e-6
    norms = _noise(8000, deviation=0.6) * level[:, None]
    for first in range(0, 8000, 100):
        layers = feed(norms[first : first + 100]).layers
        assert not (layers.vanishing | layers.exploding).any()


@pytest.mark.parametrize(("factor", "steps", "flag"), [(1e-4, 64, "vanishing"), (20.0, 8, "exploding")])
def test_a_layer_that_leaves_its_range_is_named(feed: Feed, factor: float, steps: int, flag: str) -> None:
    """It takes so many steps running and not one fewer; one usual step ends it; absent gradients do not."""
    norms = _noise(1024, deviation=0.05)
    feed(norms)
    broken = norms[:1] * [1, factor, 1]
    assert not getattr(feed(np.repeat(broken, steps - 1, axis=0)).layers, flag).any()
    assert not getattr(feed([[1.0, -0.0, 100.0]]).layers, flag).any()
    assert getattr(feed(broken).layers, flag).tolist() == [False, True, False]
    assert not getattr(feed(norms[:1]).layers, flag).any()


def test_a_lasting_change_is_told_as_long_as_it_is_held(feed: Feed) -> None:
    """A layer that vanished stays so though its baseline's steps have passed, and is usual after the bound."""
    usual, vanished = _noise(1024, deviation=0.05), _noise(1024, deviation=0.05) * [1, 1e-5, 1]
    feed(usual)
    layers = feed(vanished).layers
    assert layers.vanishing.tolist() == [False, True, False]
    for _ in range(HOLD_STEPS // len(vanished) + 1):
        layers = feed(vanished).layers
    assert not layers.vanishing.any()
    assert layers.median[1] == pytest.approx(10 * 1e-5, rel=0.1)


def test_zero_gradients_vanish_and_absent_ones_do_not(feed: Feed) -> None:
    """A dead layer is told from one that has no gradient, and from one below Adam's epsilon an element."""
    tiny = 1e-8 * math.sqrt(6) * 0.9  # six elements
    layers = feed(np.tile([0.0, -0.0, tiny], (200, 1))).layers
    assert layers.vanishing.tolist() == [True, False, True]
    assert layers.exported.tolist() == [True, True, True]


def test_not_finite_norms_explode_and_poison_nothing(feed: Feed) -> None:
    """Eight steps of NaN or Inf running are an explosion; the baseline is that of the finite norms."""
    feed(_noise(512, deviation=0.05))
    layers = feed([[NAN, INF, 100.0]] * 100).layers
    assert layers.exploding.tolist() == [True, True, False]
    assert layers.median == pytest.approx([1, 10, 100], rel=0.1)
    assert layers.score[1] == INF
    layers = feed([[NAN, 1.0, 100.0]] * 100).layers
    assert not layers.columns()["gradiometer_layer_anomaly_score"][1][0]


def test_a_spike_scores_by_its_own_deviation(feed: Feed) -> None:
    """The score is the largest norm's distance in robust deviations; a gauge that knows none is left out."""
    norms = _noise(1024, deviation=0.3)
    norms[-1, 1] = 10 * math.e**3
    found = feed(norms).layers.score
    assert found[1] == pytest.approx(3 / 0.3, rel=0.3)
    assert found[0] < 5
    silent = feed(np.tile([-0.0, 0.0, 1.0], (200, 1))).layers
    assert silent.columns()["gradiometer_layer_anomaly_score"][1].tolist() == [False, False, True]


@given(
    steps=st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=MINIMUM_SAMPLES, max_size=100),
    cut=st.integers(0, 100),
)
def test_clip_ratio_is_that_of_the_last_minute(steps: list[tuple[int, bool]], cut: int) -> None:
    """It is that of the last minute, or of the last 32 steps where it had fewer, however the batches were cut."""
    times = np.cumsum([1 + seconds for seconds, _ in steps]).astype(np.int64) * SECOND
    clipped = np.array([so for _, so in steps])
    window = WindowRatio()
    for part in (slice(cut), slice(cut, None)):
        if len(times[part]):
            window.add(times[part], clipped[part])
    newest = times[-1] // BUCKET_NS
    live = newest - times // BUCKET_NS < 31
    shown = clipped[live] if live.sum() >= MINIMUM_SAMPLES else clipped[-MINIMUM_SAMPLES:]
    assert window.ratio == pytest.approx(shown.mean())


jumps = st.sampled_from([0, 1, 1, 2, 5, 30, 61, -1, -5, -30, -70, 500, -500])


@given(rows=st.lists(st.tuples(jumps, st.floats(0, 100)), min_size=1, max_size=40), cut=st.integers(0, 40))
def test_a_clock_that_jumps_depends_on_no_batch(rows: list[tuple[int, float]], cut: int) -> None:
    """Wherever the clock is set to, the window's end is the newest row, and batches make no difference."""
    times = (10**6 + np.cumsum([seconds for seconds, _ in rows])) * SECOND
    values = np.array([[value] for _, value in rows])
    parts = ([slice(None)], [slice(cut), slice(cut, None)], [slice(row, row + 1) for row in range(len(rows))])
    found = []
    for batches in parts:
        window = WindowMax(1)
        for batch in batches:
            if len(values[batch]):
                window.add(times[batch], values[batch])
        found.append(window.max()[0])
    held: dict[int, float] = {}
    for bucket, value in zip((times // BUCKET_NS).tolist(), values[:, 0].tolist(), strict=True):
        held = {number: peak for number, peak in held.items() if abs(number - bucket) < 31}
        held[bucket] = max(held.get(bucket, 0.0), value)
    assert found == [max(held.values())] * 3


def test_clip_ratio_needs_some_steps_and_a_clock(feed: Feed) -> None:
    """Before 32 steps it is unknown, and after the clock was set back it is that of the last 32."""
    clipped = int(Flag.CLIPPED)
    assert math.isnan(feed(_noise(31), flags=clipped).clip_ratio)
    assert feed(_noise(1), flags=clipped).clip_ratio == 1.0
    assert feed(_noise(8), flags=0, time_ns=np.arange(8) - 10**15).clip_ratio == 0.75


@pytest.mark.parametrize("rate", [0.01, 1.0, 1000.0])
def test_clip_ratio_is_a_share_at_any_speed(feed: Feed, rate: float) -> None:
    """A job of a step in 100 seconds has a ratio that is as fine as that of a job of 1000 in a second."""
    steps = 1000
    flags = int(Flag.CLIPPED) * (np.arange(steps) % 4 == 0)
    found = feed(_noise(steps), flags=flags, time_ns=(np.arange(steps) / rate * SECOND).astype(np.int64))
    assert found.clip_ratio == pytest.approx(0.25, abs=0.02)


def test_many_layers_are_refreshed_in_turns() -> None:
    """Where there are more layers than are sorted at once, each has the median of its own steps, batches or not."""
    count, steps = 4 * CHUNK + 3, 200
    rng = np.random.default_rng(0)
    norms = rng.lognormal(0, 0.3, (steps, count)).astype(np.float32).astype(np.float64)
    whole, single = LayerBaseline(count), LayerBaseline(count)
    nobody, first, largest = np.zeros(count, np.bool_), 0, 0
    while first < steps:
        part = norms[first : first + whole.room]
        whole.add(part, nobody)
        first += len(part)
        largest = max(largest, len(part))
    for row in norms:
        single.add(row[None], nobody)
    assert largest < 64
    np.testing.assert_array_equal(whole.median, single.median)
    logs = np.log(norms[:, ::97]).astype(np.float32)
    known = {last: np.median(logs[:last][_sampled(np.arange(last))], axis=0) for last in range(128, steps + 1)}
    newest = np.stack([known[last] for last in range(steps - 63, steps + 1)])
    assert np.isclose(whole.median[::97], newest, atol=1e-6).any(axis=0).all()


@given(
    rows=st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=2), min_size=1, max_size=30),
    cut=st.integers(0, 30),
)
def test_streaks_like_a_loop(rows: list[list[tuple[bool, bool]]], cut: int) -> None:
    """A streak grows with what was so, ends with what was not, and passes over what was absent."""
    streak, so = Streak(2), np.array(rows)
    for part in (so[:cut], so[cut:]):
        if len(part):
            streak.add(part[:, :, 0], part[:, :, 1])
    for column in range(2):
        length = 0
        for was_so, present in so[:, column].tolist():
            length = (length + 1 if was_so else 0) if present else length
        assert streak.length[column] == length


def test_flagged_layers_are_exported_by_name(make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A scrape counts all that vanish and names twenty; the run's own figures come with it."""
    layers = [f"blocks.{place}" for place in range(30)]
    path = write_run(make_manifest(layers=layers, capacity=256), np.zeros((200, 30)), flags=int(Flag.CLIPPED)).path
    tail = RankTail(path)
    tail.poll()
    samples = frame([tail], "running").samples
    tail.close()
    values = {name: value for name, labels, value in samples if labels == ("run",)}
    assert (values["gradiometer_layers_vanishing"], values["gradiometer_layers_exploding"]) == (30, 0)
    assert (values["gradiometer_clip_ratio"], values["gradiometer_grad_norm_mad"]) == (1.0, 0.0)
    named = [labels for name, labels, _ in samples if name == "gradiometer_layer_state"]
    assert named == [("run", layer, "vanishing") for layer in layers[:20]]
