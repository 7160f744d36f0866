"""The Run and Layers boards: shares add up, one row a layer, bad layers hide no others, links keep what was chosen."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

from gradiometer_dashboards import load
from gradiometer_dashboards.evaluation import Prometheus, View
from gradiometer_dashboards.interpolation import replaced
from tests._dashboards import panel_titled, panels, strings_under

if TYPE_CHECKING:
    from tests.conftest import Promtool

Json = dict[str, Any]
RUN = "gpt"
ALL = {"run_id": RUN, "job": ".+", "instance": ".+", "rank": ".+", "layer": ".+"}
SPANS = {"__rate_interval": "1m", "__interval": "15s", "__range": "10m"}
NORMS = {"embed": 3.0, "blocks.2.up": 4.0, "blocks.10.up": 12.0}
"""Whose squares add up to 13 squared."""
OTHER_STEP = 2.0
"""By how much the second host's norms are larger: it was scraped at another step, of other layers' doing too."""


def _expr(board: str, title: str, place: int = 0, **filling: str) -> str:
    return replaced(str(panel_titled(board, title)["targets"][place]["expr"]), {**ALL, **SPANS, **filling})


def _sample(name: str, values: str, **labels: str) -> Json:
    pairs = ",".join(f'{key}="{value}"' for key, value in ({"job": "gradiometer", "run_id": RUN} | labels).items())
    return {"series": f"{name}{{{pairs}}}", "values": values}


def _layer(name: str, layer: str, values: str, instance: str = "h1") -> Json:
    return _sample(f"gradiometer_layer_{name}", values, layer=layer, instance=instance)


def _run_of(hosts: tuple[str, ...], omitted: int = 0, norm: float = 13.0) -> Iterator[Json]:
    """Yield the norms of a run whose hosts were scraped at steps of different norms."""
    for place, host in enumerate(hosts):
        factor = OTHER_STEP**place
        norms = dict(zip(NORMS, list(NORMS.values())[:: -1 if place else 1], strict=True))
        yield _sample("gradiometer_grad_norm_last", f"{norm * factor}x80", instance=host, rank=str(place))
        yield _sample("gradiometer_series_omitted", f"{omitted}x80", instance=host)
        for layer, value in norms.items():
            for name in ("grad_norm_last", "grad_norm_window_max", "anomaly_score", "update_ratio"):
                yield _layer(name, layer, f"{value * factor}x80", host)
            yield _layer("nonfinite_total", layer, "0x80", host)


def _check(promtool: Promtool, folder: Path, series: list[Json], *checks: tuple[str, dict[str, float]]) -> None:
    """Evaluate at the tenth minute: each expression to the values by labels that it must have."""
    tests = [
        {
            "expr": expr,
            "eval_time": "10m",
            "exp_samples": [{"labels": labels, "value": value} for labels, value in expected.items()],
        }
        for expr, expected in checks
    ]
    content = {"tests": [{"interval": "15s", "input_series": series, "promql_expr_test": tests}]}
    (folder / "tests.yml").write_text(yaml.safe_dump(content, width=10_000))
    done = promtool("test", "rules", folder / "tests.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def _rounded(expr: str) -> str:
    return f"round({expr}, 0.0001)"


@pytest.mark.native
@pytest.mark.parametrize("hosts", [("h1",), ("h1", "h2")], ids=["one host", "two hosts"])
def test_shares_sum_to_one(hosts: tuple[str, ...], tmp_path: Path, promtool: Promtool) -> None:
    """Shares are squares over their sum, also where two hosts were scraped at steps of different norms."""
    shares, others = (_expr("layers", "Share of the squared norm", place) for place in (0, 1))
    first, second = list(NORMS.values()), list(NORMS.values())[::-1]
    seen = [first, second][: len(hosts)]
    mean = {layer: sum(norms[place] ** 2 / 169 for norms in seen) / len(seen) for place, layer in enumerate(NORMS)}
    each = {f'{{layer="{layer}"}}': round(value, 4) for layer, value in mean.items()}
    chosen = _expr("layers", "Share of the squared norm", layer="embed")
    _check(
        promtool,
        tmp_path,
        list(_run_of(hosts)),
        (_rounded(shares), each),
        (_rounded(others), {"{}": 0.0}),
        (_rounded(chosen), {'{layer="embed"}': round(mean["embed"], 4)}),
    )


@pytest.mark.native
def test_shares_know_what_a_budget_leaves_out(tmp_path: Path, promtool: Promtool) -> None:
    """Layers that have no series are in the whole all the same, and among all others."""
    shares, others = (_expr("layers", "Share of the squared norm", place) for place in (0, 1))
    _check(
        promtool,
        tmp_path,
        list(_run_of(("h1",), omitted=70, norm=26.0)),
        (_rounded(f"sum({shares})"), {"{}": 0.25}),
        (_rounded(others), {"{}": 0.75}),
    )


@pytest.mark.native
def test_tables_have_one_row_a_layer(tmp_path: Path, promtool: Promtool) -> None:
    """Each column of each table of layers is one series a layer, with no other label, on two hosts too."""
    series = list(_run_of(("h1", "h2")))
    series += [
        _sample("gradiometer_layer_state", "1x80", layer=layer, state=state, instance=host)
        for host in ("h1", "h2")
        for layer, state in (("embed", "vanishing"), ("embed", "exploding"), ("blocks.2.up", "vanishing"))
    ]
    tables = [("run", "Largest layers"), ("layers", "Largest layers"), ("layers", "Layers that stood out")]
    tables += [("layers", "Vanishing or exploding now")]
    exprs = [_expr(*table, place) for table in tables for place in range(len(panel_titled(*table)["targets"]))]
    checks = [(f"count({expr}) - count(count by (layer) ({expr}))", {"{}": 0.0}) for expr in exprs]
    worse = {'{layer="embed"}': 2.0, '{layer="blocks.2.up"}': 1.0}
    _check(promtool, tmp_path, series, *checks, (_expr("layers", "Vanishing or exploding now", 1), worse))
    for expr in exprs:
        assert not re.search(r"\bby \((?!layer\)|job, instance\))", expr), expr


@pytest.mark.native
def test_bad_layers_do_not_wipe_the_map(tmp_path: Path, promtool: Promtool) -> None:
    """NaN is a gap, Inf and 0 stop at the ends of the scale, and the others keep their colours."""
    values = {"good": "10", "inf": "+Inf", "nan": "NaN", "none": "0"}
    series = [_layer("grad_norm_window_max", layer, " ".join([value] * 80)) for layer, value in values.items()]
    series += [_layer("nonfinite_total", layer, "0x80") for layer in values]
    shown = f"sum by (layer) ({_expr('layers', 'Gradient norm by layer')}) > -100"
    expected = {'{layer="good"}': 1.0, '{layer="inf"}': 4.0, '{layer="none"}': -8.0}
    lines = f"sum by (layer) ({_expr('layers', 'Norms of chosen layers')})"
    _check(
        promtool,
        tmp_path,
        series,
        (shown, expected),
        (lines, {'{layer="good"}': 10.0, '{layer="none"}': 0.0}),
    )


@pytest.mark.native
def test_rows_of_the_map_are_in_natural_order(tmp_path: Path, promtool: Promtool) -> None:
    """Sorted as Prometheus sorts, by label, the layers come as a person would list them."""
    natural = [
        *("blocks.0.mlp", "blocks.2.experts.3.up", "blocks.2.experts.10.up", "blocks.2.mlp", "blocks.10.mlp"),
        *("blocks.100.mlp", "embed", "head.1"),
    ]
    series = [_layer("grad_norm_window_max", layer, "1x80") for layer in natural]
    series += [_layer("nonfinite_total", layer, "0x80") for layer in natural]
    keys = [re.sub(r"\d+", lambda number: f" {'abc'[len(number[0]) - 1]}{number[0]}", layer) for layer in natural]
    assert keys == sorted(keys)
    assert natural != sorted(natural)
    expected = {f'{{by_number="{key}", layer="{layer}"}}': 0.0 for key, layer in zip(keys, natural, strict=True)}
    _check(promtool, tmp_path, series, (_expr("layers", "Gradient norm by layer"), expected))


@pytest.mark.native
def test_many_layers_stay_few(tmp_path: Path, promtool: Promtool) -> None:
    """Of many layers each panel shows a bounded number: those in trouble, then those that stand out most."""
    names = [f"blocks.{number}" for number in range(400)]
    series = [_layer("nonfinite_total", layer, "0x80") for layer in names]
    for name in ("grad_norm_window_max", "grad_norm_last", "anomaly_score", "update_ratio", "weight_norm"):
        series += [_layer(name, layer, f"{number}x80") for number, layer in enumerate(names)]
    series += [_sample("gradiometer_grad_norm_last", "1x80", rank="0", instance="h1")]
    series += [_sample("gradiometer_layer_state", "1x80", layer="blocks.3", state="vanishing", instance="h1")]
    found = {
        (panel["title"], place): panel["type"]
        for panel in panels("layers")
        for place, target in enumerate(panel["targets"])
        if re.search(r"gradiometer_layer_(?!grad_norm_quantile)", target["expr"])
        and panel["type"] in ("heatmap", "timeseries", "table")
    }
    most = {"heatmap": 200, "timeseries": 12, "table": 10}
    checks = [
        (f"(count({_expr('layers', *key)}) or vector(0)) <= bool {most[kind]}", {"{}": 1.0})
        for key, kind in found.items()
    ]
    ill = f'count(({_expr("layers", "Gradient norm by layer")}) and on (layer) {{layer="blocks.3"}})'
    assert len(checks) > 10
    _check(
        promtool,
        tmp_path,
        series,
        *checks,
        (f"count({_expr('layers', 'Gradient norm by layer')})", {"{}": 200.0}),
        (ill, {"{}": 1.0}),
    )


@pytest.mark.native
def test_a_spike_survives_a_day(tmp_path: Path, promtool: Promtool) -> None:
    """A maximum that a single scrape saw is at its height in every peak panel, a day wide: a point is minutes there."""
    spike = "1x13 50 1x66"
    series = [_layer(name, "embed", spike) for name in ("grad_norm_window_max", "anomaly_score")]
    series += [_layer("nonfinite_total", "embed", "0x80")]
    series += [_sample("gradiometer_grad_norm_finite_window_max", spike, instance="h1")]
    series += [_sample("gradiometer_layer_grad_norm_quantile", spike, instance="h1", q="1")]
    shown = {
        ("run", "Global gradient norm", 1): 50.0,
        ("layers", "Norms of chosen layers", 0): 50.0,
        ("layers", "Norms across all layers", 0): 50.0,
        ("layers", "Anomaly score", 0): 50.0,
        ("layers", "Gradient norm by layer", 0): 1.699,
    }
    checks = [
        (f"max(max_over_time(round({_expr(*key, __interval='5m')}, 0.001)[10m:5m]))", {"{}": height})
        for key, height in shown.items()
    ]
    _check(promtool, tmp_path, series, *checks)


def _state(state: str) -> Iterator[Json]:
    for name in ("running", "finished", "lost"):
        yield _sample("gradiometer_run_state", "1x80" if name == state else "0x80", state=name, instance="h1")


def _alert(name: str, severity: str, run_id: str = RUN) -> Json:
    labels = {"alertname": name, "alertstate": "firing", "severity": severity, "run_id": run_id}
    return _sample("ALERTS", "1x80", **labels)


@pytest.mark.native
@pytest.mark.parametrize(
    ("scale", "finite", "shown"),
    [("_x80", "6x80", 1e9), ("1024x80", "6x80", 3.0), ("1024x80", "_x80", None)],
    ids=["without a scaler", "with one", "none finite"],
)
def test_overflows_of_a_scaler_hide_no_norm(
    scale: str, finite: str, shown: float | None, tmp_path: Path, promtool: Promtool
) -> None:
    """Beside a GradScaler's overflows the largest finite norm is what is told; without one an Inf is."""
    norms = {"grad_norm_window_max": "+Inf+0x80", "grad_norm_finite_window_max": finite, "grad_norm_baseline": "2x80"}
    series = [_sample(f"gradiometer_{name}", values, instance="h1") for name, values in norms.items()]
    series += [*_state("running"), _sample("gradiometer_loss_scale", scale, instance="h1")]
    expr = f"clamp_max({_expr('run', 'Norm / baseline')}, 1e9)"
    peak = _expr("run", "Global gradient norm", 1)
    told = {} if shown is None else {'{state="running"}': shown}
    _check(promtool, tmp_path, series, (expr, told), (peak, {} if finite == "_x80" else {"{}": 6.0}))


@pytest.mark.native
def test_where_nan_began_is_counted_from_the_first_scrape(tmp_path: Path, promtool: Promtool) -> None:
    """Of the layers whose counter was born, gained or left in view, and of no other; those with most steps alone."""
    counters = {
        "born": "_x30 2x60", "gains": "3x29 4x60", "left": "_x30 5x4 stale", "before": "3x100", "both": "_x28 1x4 2x60",
    }  # fmt: skip
    many = {f"other.{place}": f"_x30 {20 + place}x60" for place in range(9)}
    expr = f"round({_expr('layers', 'Where NaN began', __range='5m')})"
    for of, expected in (
        (counters, {"born": 2.0, "gains": 1.0, "left": 5.0, "both": 2.0}),
        (counters | many, {"left": 5.0, **{layer: 20.0 + place for place, layer in enumerate(many)}}),
    ):
        series = [
            _sample("gradiometer_nonfinite_origin_total", values, layer=layer, instance=host)
            for layer, values in of.items()
            for host in ("h1", "h2")
        ]
        found = {f'{{layer="{layer}"}}': value for layer, value in expected.items()}
        _check(promtool, tmp_path, series, (expr, found))


@pytest.mark.native
def test_alerts_of_the_run_are_named(tmp_path: Path, promtool: Promtool) -> None:
    """Those of this run, by name: 2 for critical, 1 for the others; the word none, and only where there is a run."""
    expr = _expr("run", "Firing alerts")
    firing = [
        *(_alert("GradiometerSpike", "warning"), _alert("GradiometerLayerExploding", "critical")),
        *(_alert("GradiometerStalled", "critical", "another"), _alert("SomebodyElses", "critical")),
    ]
    _check(
        promtool,
        tmp_path,
        [*_state("running"), *firing],
        (expr, {'{alert="Spike"}': 1, '{alert="LayerExploding"}': 2}),
    )
    _check(promtool, tmp_path, list(_state("running")), (expr, {'{alert="none"}': 0}))
    _check(promtool, tmp_path, [_alert("GradiometerSpike", "warning", "another")], (expr, {}))


@pytest.mark.native
def test_data_age_is_of_a_state(tmp_path: Path, promtool: Promtool) -> None:
    """The age is the slowest rank's, under the name of the run's state, of which only one has a colour of concern."""
    stamps = [
        _sample("gradiometer_last_step_timestamp_seconds", f"{newest}x80", rank=rank, instance="h1")
        for rank, newest in (("0", 590), ("1", 560))
    ]
    for state in ("running", "finished"):
        _check(
            promtool,
            tmp_path,
            [*stamps, *_state(state)],
            (_expr("run", "Data age"), {f'{{state="{state}"}}': 40.0}),
        )
    overrides = panel_titled("run", "Data age")["fieldConfig"]["overrides"]
    assert [each["matcher"]["options"] for each in overrides] == ["finished"]


@pytest.mark.native
def test_gpus_are_those_of_the_run(tmp_path: Path, promtool: Promtool) -> None:
    """Each rank has its GPU's values, also two ranks that share one; GPUs of other runs and idle ones are not shown."""
    series = []
    for gpu, used in (("0", 30), ("1", 60), ("2", 90)):
        at = {"gpu": gpu, "uuid": f"GPU-{gpu}", "instance": "h1", "run_id": ""}
        series += [_sample("gradiometer_gpu_memory_used_bytes", f"{used}x80", **at)]
        series += [_sample("gradiometer_gpu_memory_total_bytes", "120x80", **at)]
        series += [_sample("gradiometer_gpu_throttled", "1x80", **at, reason="thermal")]
    for gpu, rank, run_id in (("0", "0", RUN), ("1", "1", RUN), ("1", "2", RUN), ("2", "0", "another")):
        at = {"gpu": gpu, "uuid": f"GPU-{gpu}", "instance": "h1", "run_id": run_id, "rank": rank}
        series += [_sample("gradiometer_gpu_run_info", "1x80", **at)]
    memory = {("0", "0"): 0.25, ("1", "1"): 0.5, ("1", "2"): 0.5}
    _check(
        promtool,
        tmp_path,
        series,
        (
            _expr("run", "GPU memory"),
            {f'{{gpu="{gpu}", instance="h1", rank="{rank}"}}': value for (gpu, rank), value in memory.items()},
        ),
        (
            _expr("run", "GPU throttled"),
            {f'{{gpu="{gpu}", instance="h1", reason="thermal"}}': 1.0 for gpu in ("0", "1")},
        ),
    )


def _followed(board: str, title: str, fields: Mapping[str, str]) -> list[tuple[str, dict[str, list[str]]]]:
    """Follow the links of a panel from a view in which everything was chosen: paths and what they hand over."""
    chosen = {"datasource": "prom", "job": "train", "instance": "h1:9477", "run_id": RUN, "rank": "1", "layer": "embed"}
    nowhere = Prometheus(url="http://127.0.0.1:9")
    view = View(dashboard=load(board), prometheus=nowhere, start=1000, end=2000, chosen=chosen)
    urls = [urlsplit(view.link(url, fields)) for url in strings_under(panel_titled(board, title), "url")]
    return [(url.path, parse_qs(url.query)) for url in urls]


@pytest.mark.parametrize(
    ("board", "title", "paths"),
    [
        ("run", "Largest layers", ["layers"]),
        ("layers", "Largest layers", ["layers", "run"]),
        ("layers", "Layers that stood out", ["layers", "run"]),
        ("layers", "Vanishing or exploding now", ["layers", "run"]),
        ("layers", "Where NaN began", ["layers", "run"]),
        ("layers", "Norms of chosen layers", ["layers", "run"]),
    ],
)
def test_links_hand_over_the_layer(board: str, title: str, paths: list[str]) -> None:
    """Links between Run and Layers keep run, rank, time and data source, and choose the layer that was clicked."""
    followed = _followed(board, title, {"raw": "blocks.2.up", "layer": "blocks.2.up"})
    assert [path for path, _ in followed] == [f"/d/gradiometer-{name}" for name in paths]
    for _, query in followed:
        assert query == {
            "from": ["1000000"],
            "to": ["2000000"],
            "var-datasource": ["prom"],
            "var-job": ["train"],
            "var-instance": ["h1:9477"],
            "var-run_id": [RUN],
            "var-rank": ["1"],
            "var-layer": ["blocks.2.up"],
        }


def test_run_is_not_narrowed_by_a_layer_that_was_chosen() -> None:
    """A link back to Run carries the layer, and Run shows all of them all the same."""
    assert not any("$layer" in target["expr"] for panel in panels("run") for target in panel.get("targets", ()))
    narrowed = [t["expr"] for panel in panels("layers") for t in panel["targets"] if "$layer" in t["expr"]]
    assert len(narrowed) > 20


@pytest.mark.native
@pytest.mark.parametrize(
    ("values", "expected"),
    [("_x30 1x60", 1.0), ("_x28 1x4 2x40", 2.0), ("3x100", 0.0), ("3x29 4x40", 1.0)],
    ids=["born with it", "and gains", "before the view", "in view"],
)
def test_incidents_that_a_counter_was_born_with(
    values: str, expected: float, tmp_path: Path, promtool: Promtool
) -> None:
    """What a run counted before its first scrape is counted where that scrape is in view, and nowhere else."""
    harm = f"round({_expr('run', 'Incidents in view', 2, __range='5m')})"
    series = [_sample("gradiometer_nonfinite_updates_total", values, instance="h1")]
    _check(promtool, tmp_path, series, (harm, {"{}": expected}))


@pytest.mark.parametrize("board", ["run", "layers"])
def test_annotations_of_a_run(board: str) -> None:
    """Incidents, changes of policy and alerts of the chosen run, each with a colour and a switch of its own."""
    shown = {each["name"]: each for each in load(board)["annotations"]["list"] if not each["hide"]}
    assert list(shown) == ["Incidents", "Policy changes", "Alerts"]
    assert len({each["iconColor"] for each in shown.values()}) == len(shown)
    assert shown["Incidents"]["target"]["tags"] == ["gradiometer", "$run_id"]
    assert shown["Policy changes"]["target"]["tags"] == ["gradiometer", "$run_id", "policy_changed"]
    assert 'run_id="$run_id"' in shown["Alerts"]["expr"]
    assert shown["Alerts"]["target"]["expr"] == shown["Alerts"]["expr"], (
        "later releases than Grafana 11 read the target"
    )
    assert shown["Alerts"]["target"]["interval"] == shown["Alerts"]["step"]
    assert {each["enable"] for each in shown.values()} == {True}


def test_first_screen_of_a_run() -> None:
    """What is above the fold of a screen of 1080 lines: state to alerts, the norm, the loss and the histogram."""
    first = [p["title"] for p in panels("run") if p["gridPos"]["y"] + p["gridPos"]["h"] <= 21]
    assert first == [
        *("State", "Steps", "Data age", "Norm / baseline", "Incidents in view", "Clip ratio now", "Firing alerts"),
        *("Global gradient norm", "Loss", "Distribution of the global gradient norm"),
    ]
