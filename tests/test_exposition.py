"""The text of a scrape: what the parsers of Prometheus read in it is what the run directory holds."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gradiometer.metrics import CATALOGUE
from gradiometer.recorder import Recorder, RowHeader
from gradiometer.records import Flag
from gradiometer.summary import LAYER_METRICS
from gradiometer.tail import Sample
from gradiometer_monitor.exposition import exposition as module
from gradiometer_monitor.exposition.exposition import OPENMETRICS, TEXT, Exposition, LayersOf
from gradiometer_monitor.exposition.layer_lines import share
from gradiometer_monitor.following.runs import Run, Runs

if TYPE_CHECKING:
    from tests.conftest import Append, Golden, MakeManifest, Promtool, WriteRun

INF, NAN = float("inf"), float("nan")
PARSERS: dict[str, Callable[[str], Iterable[Family]]] = {TEXT: parse_text, OPENMETRICS: parse_openmetrics}


class Expose(Protocol):
    def __call__(self, root: Path, budget: int = ...) -> Exposition: ...


@pytest.fixture
def follow() -> Iterator[Callable[[Path], Runs]]:
    """Give a function that follows the runs below a root, and let go of them in the end."""
    followed: list[Runs] = []

    def start(root: Path) -> Runs:
        followed.append(runs := Runs(root, retention_seconds=1e12))
        while runs.poll():
            pass
        return runs

    yield start
    for runs in followed:
        runs.close()


@pytest.fixture
def expose(follow: Callable[[Path], Runs]) -> Expose:
    """Give a function that makes the exposition of the runs below a root."""

    def start(root: Path, budget: int = 10_000) -> Exposition:
        return Exposition(follow(root), series_budget=budget)

    return start


def _samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Map name and label values of each sample to its value."""
    found = [sample for family in parse_text(text) for sample in family.samples]
    samples = {(sample.name, tuple(sample.labels.values())): sample.value for sample in found}
    assert len(samples) == len(found), "a series is there twice"
    return samples


def _stable(text: str) -> str:
    """Leave out the monitor's own process, and what differs between two scrapes or installations."""
    text = re.sub(r"^(# \w+ )?(process|python)_.*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r'(build_info\{version=)"[^"]*",python_version="[^"]*"', r'\1"0",python_version="0"', text)
    text = re.sub(r"^(gradiometer_scrape_(?:seconds_\w+|size_bytes).*) .*", r"\1 0", text, flags=re.MULTILINE)
    return re.sub(r"(collector_seconds\{.*\}) .*", r"\1 0.5", text)


@pytest.fixture
def small_runs(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> Path:
    """Two finished runs: one of two ranks with policies and a non-finite step, and one that has no row."""
    ended: dict[str, Any] = {
        "labels": {"team": "a"},
        "process_start": 1.0,
        "policies": ("warmup", "clip", "wider"),
        "shadow": ("wider",),
        "job": 'a "job"',
        "world_size": 2,
    }
    norms = [[3.0, 4.0, 0.0, 12.0], [0.25, 0.5, 0.5, -0.0], [NAN, INF, 1.0, 1.0], [1.0, 2.0, 2.0, 4.0]]
    for rank in (0, 1):
        columns: dict[str, Any] = {"clipped": [6, 0, 5, 2], "first_nonfinite": [-1, -1, 2, -1]}
        recorder = write_run(make_manifest("first", rank=rank, **ended), norms[: 4 - rank], **columns)
        recorder.policies[:] = NAN
        recorder.policies[:, 1:3] = (0.5, 1.5), (0.125, 0.375)
        recorder.status.rows_dropped = 3
        recorder.commit(_quiet_row(recorder.status.steps))
    write_run(make_manifest("second", process_start=1.0), np.empty((0, 4)), close=True)
    return tmp_path


def _quiet_row(step: int) -> RowHeader:
    """Make the scalars of a quiet last step."""
    numbers = (5.0, 0.625, 0.125, 0.001, 1.5, 65536.0, 0.25, 0.001)
    flags = Flag.CLIPPED | Flag.LOSS
    return RowHeader(step, 1_700_000_040_000_000_000, int(flags), 2, 0, 1, -1, 0, *numbers)


@pytest.mark.parametrize(("content_type", "name"), [(TEXT, "metrics.txt"), (OPENMETRICS, "metrics.openmetrics.txt")])
def test_golden_scrape(expose: Expose, small_runs: Path, golden: Golden, content_type: str, name: str) -> None:
    """Any change of a name, a label or a value is a diff that somebody reads."""
    golden(name, _stable(expose(small_runs).render(content_type).decode()))


@pytest.mark.parametrize("content_type", [TEXT, OPENMETRICS])
def test_every_name_is_in_the_catalogue(expose: Expose, small_runs: Path, content_type: str) -> None:
    """A family is the catalogue's, as it declares it, or the process's own; it comes once, in one piece."""
    text = expose(small_runs).render(content_type).decode()
    expected = {metric.family if content_type == OPENMETRICS else metric.name: metric for metric in CATALOGUE.values()}
    for family in PARSERS[content_type](text):
        if family.name.startswith(("process_", "python_")):
            continue
        metric = next(m for name, m in expected.items() if name.removesuffix("_total") == family.name)
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        assert {tuple(k for k in sample.labels if k != "le") for sample in family.samples} == {metric.labels}
    names = [re.split(r"[{ ]", line)[0] for line in text.splitlines() if not line.startswith("#")]
    pieces = [name for name, _ in groupby(re.sub(r"_(bucket|count|sum|total|created)$", "", name) for name in names)]
    assert len(pieces) == len(set(pieces))
    assert "_created" not in text


def test_openmetrics_says_the_same_and_ends(expose: Expose, small_runs: Path) -> None:
    """Both formats have the same samples; OpenMetrics ends with its mark."""
    exposition = expose(small_runs)
    texts = [exposition.render(content_type).decode() for content_type in (TEXT, OPENMETRICS)]
    lines = [sorted(line for line in _stable(text).splitlines() if line[0] != "#") for text in texts]
    assert lines[0] == lines[1]
    assert texts[1].endswith("\n# EOF\n")
    assert texts[1].count("# EOF") == 1


@pytest.mark.native
def test_promtool_finds_nothing_to_say(expose: Expose, small_runs: Path, promtool: Promtool) -> None:
    """Prometheus' own linter accepts what is ours."""
    text = _stable(expose(small_runs).render().decode())
    done = promtool("check", "metrics", text=text)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def _whole_catalogue() -> Iterator[Sample]:
    """Yield one sample of each gauge and counter that is not of the monitor itself."""
    own = ("gradiometer_build_info", "gradiometer_collector", "gradiometer_scrape")
    for metric in CATALOGUE.values():
        if metric.kind != "histogram" and not metric.name.startswith(own):
            yield metric.name, ("x",) * len(metric.labels), 1.0


@pytest.mark.native
def test_the_whole_catalogue_is_valid(expose: Expose, tmp_path: Path, promtool: Promtool) -> None:
    """Both parsers and promtool take every metric there is, those too that these runs do not have."""
    exposition = expose(tmp_path)
    exposition.watch("catalogue", _whole_catalogue)
    for content_type, parse in PARSERS.items():
        found = {family.name for family in parse(exposition.render(content_type).decode())}
        assert {
            metric.name.removesuffix("_total") for metric in CATALOGUE.values() if metric.kind != "histogram"
        } <= found
    text = _stable(exposition.render().decode())
    done = promtool("check", "metrics", text=text)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.native
def test_promtool_takes_hostile_labels(
    expose: Expose,
    tmp_path: Path,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    promtool: Promtool,
) -> None:
    """Prometheus' own parser reads any name of a layer, however long, and values that are not finite."""
    names = ['a"b', "c\\d", "e\nf", "%s} 1", "\u00e9\u4e2d", "\0\r\t", "g" * 10_000]
    write_run(make_manifest(layers=names, job="\n\n#"), [[NAN, INF, 0.0, -0.0, 1e-45, 3e38, 1.0]])
    text = _stable(expose(tmp_path).render().decode())
    done = promtool("check", "metrics", text=text)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


label = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ['"', "\\", "\n", '\\"', "\\n", "{}", '",run_id="x"} 1\n', "%", "%s", "%%d", "} inf", "# EOF", "\r", "\0", " nan"]
)


@settings(max_examples=60)
@given(names=st.lists(label, min_size=1, max_size=5, unique=True), job=label, last=st.sampled_from([1.5, NAN, INF]))
def test_hostile_labels_come_back(
    expose: Expose,
    tmp_path_factory: pytest.TempPathFactory,
    make_manifest: MakeManifest,
    append: Append,
    names: list[str],
    job: str,
    last: float,
) -> None:
    """Whatever a layer or a job is called, both parsers give its name back, and its value."""
    root = tmp_path_factory.mktemp("runs")
    recorder = Recorder(root, make_manifest(layers=names, job=job))
    append(recorder, [[last] * len(names)])
    recorder.close()
    for content_type, parse in PARSERS.items():
        families = {family.name: family for family in parse(expose(root).render(content_type).decode())}
        found = families["gradiometer_layer_grad_norm_last"].samples
        assert [sample.labels["layer"] for sample in found] == names
        assert [sample.value for sample in found] == pytest.approx([last] * len(names), nan_ok=True)
        assert families["gradiometer_run_info"].samples[0].labels["job_name"] == job


def test_values_are_those_of_the_ring(
    expose: Expose, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """Layers to nine digits, the rest exactly; per-run series are rank 0's, and losses are summed over ranks."""
    for rank in (0, 1):
        recorder = write_run(make_manifest(rank=rank, world_size=2), [[1 / 3, 3.0, 4.0, 1e-30 * (rank + 1)]] * 3)
        recorder.status.agent_errors = 2
        recorder.write_status()
    found = _samples(expose(tmp_path).render().decode())
    assert np.float32(found["gradiometer_layer_grad_norm_last", ("run", "embed")]) == np.float32(1 / 3)
    assert np.float32(found["gradiometer_layer_grad_norm_window_max", ("run", "head")]) == np.float32(1e-30)
    assert found["gradiometer_layer_grad_norm_last", ("run", "blocks.0")] == 5.0
    assert found["gradiometer_steps_total", ("run",)] == 3
    assert found["gradiometer_agent_errors_total", ("run",)] == 4
    assert found["gradiometer_agent_seconds_total", ("run",)] == pytest.approx(0.006)
    assert {labels for name, labels in found if name == "gradiometer_grad_norm_last"} == {("run", "0"), ("run", "1")}


def test_unknown_gauges_are_left_out(
    expose: Expose, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """Without loss, scaler or row there is no gauge, while each counter is there at 0."""
    write_run(make_manifest("empty"), np.empty((0, 4)))
    write_run(make_manifest("plain"), np.ones((2, 4)), loss=NAN)
    found = _samples(expose(tmp_path).render().decode())
    gauges = {name for name, labels in found if labels[:1] == ("empty",) and name in CATALOGUE}
    assert {name for name in gauges if CATALOGUE[name].kind == "gauge"} == {
        "gradiometer_run_state",
        "gradiometer_run_info",
        "gradiometer_uncounted_steps",
        "gradiometer_skipped_steps_in_a_row",
        "gradiometer_series_omitted",
    }
    assert found["gradiometer_layer_nonfinite_total", ("empty", "embed")] == 0
    assert ("gradiometer_loss", ("plain",)) not in found
    assert ("gradiometer_loss_scale", ("plain",)) not in found
    assert not any(np.isnan(value) for value in found.values())


def test_loss_logged_after_the_scrape_before_is_seen(
    expose: Expose, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """A loss that amends a row which was followed already is in the next scrape."""
    recorder = write_run(make_manifest(), np.ones((1, 4)), loss=NAN)
    exposition = expose(tmp_path)
    assert ("gradiometer_loss", ("run",)) not in _samples(exposition.render().decode())
    recorder.amend(0.5)
    assert _samples(exposition.render().decode())["gradiometer_loss", ("run",)] == 0.5


def test_policies_of_one_name_are_two_series(
    expose: Expose, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """A name that comes again gets a number: two series may not have the same labels."""
    write_run(make_manifest(policies=("clip", "clip")), np.ones((2, 4)), clipped=[3, 2])
    found = _samples(expose(tmp_path).render().decode())
    counts = [found["gradiometer_clip_events_total", ("run", policy, "act")] for policy in ("clip", "clip#2")]
    assert counts == [1, 2]


def _budget_run(write_run: WriteRun, make_manifest: MakeManifest) -> Any:
    layers = [f"layer{place:03}" for place in range(300)]
    norms = np.ones((50, 300))
    norms[-1, [7, 123]] = 1000.0
    norms[-2, 42] = NAN
    return write_run(make_manifest(layers=layers, capacity=128), norms)


def test_budget_keeps_what_stands_out(
    expose: Expose, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """Beyond its budget a run keeps the layers that went non-finite or far above usual, and counts the rest."""
    _budget_run(write_run, make_manifest)
    exposition = expose(tmp_path, budget=200)
    for scrape in (1, 2):
        found = _samples(exposition.render().decode())
        ours = [labels for name, labels in found if labels and labels[0] == "run"]
        kept = {labels[1] for name, labels in found if name == "gradiometer_layer_grad_norm_last"}
        assert len(ours) <= 200
        assert {"layer007", "layer123", "layer042"} <= kept
        assert len(kept) >= 30
        omitted = len(LAYER_METRICS) * (300 - len(kept))
        assert found["gradiometer_series_omitted", ("run",)] == omitted
        assert found["gradiometer_series_dropped_total", ("run",)] == scrape * omitted


def test_spread_is_that_of_all_layers(
    expose: Expose, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """Quantiles are norms of layers, of those too that the budget leaves out, and Inf is the largest."""
    norms = np.arange(1.0, 201.0)[None, :]
    layers = [f"layer{place:03}" for place in range(200)]
    write_run(make_manifest("finite", layers=layers), norms)
    write_run(make_manifest("infinite", layers=layers), np.where(norms == 7, INF, norms))
    found = _samples(expose(tmp_path, budget=150).render().decode())
    name = "gradiometer_layer_grad_norm_quantile"
    ranks = {q: found[name, ("finite", q)] for q in ("0", "0.25", "0.5", "0.75", "0.95", "1")}
    assert ranks == {"0": 1, "0.25": 50, "0.5": 100, "0.75": 150, "0.95": 190, "1": 200}
    assert found[name, ("infinite", "1")] == INF
    assert found[name, ("infinite", "0.5")] == 101
    assert sum(key == "gradiometer_layer_grad_norm_last" for key, _ in found) < 100


def test_budget_of_all_runs_is_shared(
    follow: Callable[[Path], Runs], tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """What small runs leave goes to the large ones in equal parts, and the whole is kept."""
    for run_id, count in (("small", 3), ("large", 300), ("larger", 500)):
        layers = [f"layer{place:03}" for place in range(count)]
        write_run(make_manifest(run_id, layers=layers), np.ones((2, count)))
    exposition = Exposition(follow(tmp_path), series_budget=10_000, total_series=900)
    found = _samples(exposition.render().decode())
    counts = {
        run: sum(bool(labels) and labels[0] == run for _, labels in found) for run in ("small", "large", "larger")
    }
    omitted = {run: found["gradiometer_series_omitted", (run,)] for run in counts}
    assert 600 < sum(counts.values()) <= 900
    assert abs(counts["large"] - counts["larger"]) <= 3
    assert omitted["small"] == 0 < omitted["large"] < omitted["larger"]


@given(wanted=st.lists(st.integers(0, 1000), max_size=20), total=st.integers(0, 5000))
def test_shares_fill_the_budget(wanted: list[int], total: int) -> None:
    """Nobody gets more than its share, the whole is kept, and no room for one more each is left unless all have all."""
    level = share(wanted, total)
    given_out = sum(min(size, level) for size in wanted)
    assert given_out <= total
    assert given_out == sum(wanted) or given_out > total - len(wanted)


def test_noise_moves_no_series(
    follow: Callable[[Path], Runs], tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """A layer that is slightly more anomalous than a chosen one does not replace it; one far above does."""
    recorder = _budget_run(write_run, make_manifest)
    runs = follow(tmp_path)
    exposition = Exposition(runs, series_budget=200)

    def kept() -> set[str]:
        runs.poll()
        found = _samples(exposition.render().decode())
        return {labels[1] for name, labels in found if name == "gradiometer_layer_grad_norm_last"}

    before = kept()
    rng = np.random.default_rng(0)
    append(recorder, 1 + 0.1 * rng.random((10, 300)))
    assert kept() == before
    spike = np.ones((1, 300))
    spike[0, 299] = 100.0
    append(recorder, spike)
    assert "layer299" in kept() - before


def test_failing_collector_loses_nothing_else(
    expose: Expose, small_runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A collector that raises is exported as failed, logged once, and the rest is served."""
    exposition = expose(small_runs)

    def fail(*_: object) -> bytes:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "generate_latest", fail)
    for _ in range(2):
        found = _samples(exposition.render().decode())
    assert found["gradiometer_collector_success", ("process",)] == 0
    assert found["gradiometer_collector_success", ("runs",)] == 1
    assert ("gradiometer_steps_total", ("first",)) in found
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_failing_run_loses_no_other(expose: Expose, small_runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose frame cannot be made is left out whole, and the collector of runs has failed."""
    exposition = expose(small_runs)
    frame = Run.frame

    def fail_first(run: Run) -> object:
        if run.run_id == "first":
            raise OSError(5, "Input/output error")
        return frame(run)

    monkeypatch.setattr(Run, "frame", fail_first)
    found = _samples(exposition.render().decode())
    assert found["gradiometer_collector_success", ("runs",)] == 0
    assert {labels[0] for name, labels in found if name == "gradiometer_steps_total"} == {"second"}


def test_run_that_starts_again_serves_its_own_layers(
    follow: Callable[[Path], Runs], tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """What is cached for a run does not serve a later one of its name."""
    write_run(make_manifest(layers=("old",)), [[1.0]], close=True)
    runs = follow(tmp_path)
    exposition = Exposition(runs, series_budget=10_000)
    exposition.render()
    time.sleep(0.01)
    write_run(make_manifest(layers=("new",)), [[2.0]])
    while runs.poll():
        pass
    layers = {labels[1] for name, labels in _samples(exposition.render().decode()) if "layer_grad_norm_last" in name}
    assert layers == {"new"}


@pytest.mark.parametrize(("layers", "shown"), [("all", {"lead", "other"}), ("lead", {"lead"}), ("none", set())])
def test_a_run_on_many_hosts_has_its_layers_once(
    tmp_path: Path,
    follow: Callable[[Path], Runs],
    make_manifest: MakeManifest,
    write_run: WriteRun,
    layers: LayersOf,
    shown: set[str],
) -> None:
    """Layers are those of the runs that the setting names; what is told of all of them together is always there."""
    for run_id, rank in (("lead", 0), ("lead", 1), ("other", 1)):
        write_run(make_manifest(run_id, rank=rank), [[1.0, 2.0, 3.0, 4.0]])
    exposition = Exposition(follow(tmp_path), series_budget=10_000, layers=layers)
    samples = _samples(exposition.render().decode())
    assert {labels[0] for name, labels in samples if name == "gradiometer_layer_nonfinite_total"} == shown
    assert {labels[0] for name, labels in samples if name == "gradiometer_layer_grad_norm_quantile"} == {
        "lead",
        "other",
    }
    assert {value for (name, _), value in samples.items() if name == "gradiometer_series_omitted"} == {0}
    exposition.change_budgets(10_000, 10_000, "all")
    found = _samples(exposition.render().decode())
    assert {labels[0] for name, labels in found if name == "gradiometer_layer_nonfinite_total"} == {"lead", "other"}


def test_origins_cost_what_was_non_finite(
    tmp_path: Path, follow: Callable[[Path], Runs], make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """A thousand layers have no series of it; of those where NaN began, the last twenty have one each."""
    layers = [f"blocks.{place}" for place in range(1000)]
    write_run(make_manifest("well", layers=layers), np.ones((30, 1000)))
    first = [*(place for place in range(25) for _ in range(2)), 999, *[0] * 3]
    write_run(make_manifest("ill", layers=layers, capacity=64), np.ones((len(first), 1000)), first_nonfinite=first)
    exposition = Exposition(follow(tmp_path), series_budget=10_000, layers="none")
    samples = _samples(exposition.render().decode())
    found = {labels: value for (name, labels), value in samples.items() if name == "gradiometer_nonfinite_origin_total"}
    assert found == {("ill", f"blocks.{place}"): 2 for place in range(7, 25)} | {
        ("ill", "blocks.0"): 5,
        ("ill", "blocks.999"): 1,
    }


def test_layers_that_are_not_shown_take_nobodys_place(
    tmp_path: Path, follow: Callable[[Path], Runs], make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """A run whose layers another host shows leaves the budget of all runs to the others."""
    many = [f"blocks.{place}" for place in range(100)]
    for run_id, rank in (("lead", 0), ("other", 1)):
        write_run(make_manifest(run_id, rank=rank, layers=many), np.ones((1, 100)))
    exposition = Exposition(follow(tmp_path), series_budget=10_000, total_series=552, layers="lead")
    names = [name for name, _ in _samples(exposition.render().decode())]
    assert names.count("gradiometer_layer_nonfinite_total") == 100
