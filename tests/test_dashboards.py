"""The committed dashboards: generated, in step with the catalogue, within the rules of Grafana's dashboard linter."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.models import units

from gradiometer.metrics import CATALOGUE, Metric
from gradiometer_dashboards import build, load, names
from gradiometer_dashboards.promql import RUN, metric

Json = dict[str, Any]
NAMES = tuple(build.DASHBOARDS)
UNITS = {unit for name, unit in vars(units).items() if not name.startswith("_") and isinstance(unit, str)}
SELECTED = re.compile(r"(gradiometer_\w+)(\{[^}]*\})?")
RANGED = re.compile(r"(\w+)\((gradiometer_\w+)\{[^}]*\}\[([^\]]+)\]\)")
COUNTERS_READ_AS_TOTALS = {("Steps", "gradiometer_steps_total")}
"""Where the count itself is what the reader wants: how far the run is."""


def _panels(name: str) -> list[Json]:
    return [panel for panel in load(name)["panels"] if panel["type"] != "row"]


def _variables(name: str) -> dict[str, Json]:
    return {variable["name"]: variable for variable in load(name)["templating"]["list"]}


def _every_panel() -> Iterator[Any]:
    for name in NAMES:
        for panel in _panels(name):
            yield pytest.param(panel, id=f"{name}-{panel['title']}")


def _every_target() -> Iterator[Any]:
    for name in NAMES:
        for panel in _panels(name):
            for target in panel["targets"]:
                yield pytest.param(panel["title"], target["expr"], id=f"{name}-{panel['title']}-{target['refId']}")


def _expressions() -> list[str]:
    return [target["expr"] for name in NAMES for panel in _panels(name) for target in panel["targets"]]


each_dashboard = pytest.mark.parametrize("name", NAMES)
each_panel = pytest.mark.parametrize("panel", list(_every_panel()))
each_target = pytest.mark.parametrize(("title", "expr"), list(_every_target()))


@each_dashboard
def test_json_does_not_drift(name: str) -> None:
    """The committed JSON is what the Python generates."""
    committed = (Path(build.__file__).parent / "json" / f"{name}.json").read_text(encoding="utf-8")
    assert committed == build.render(name)


def test_check_reports_drift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--check`` fails on a missing file and on one that nothing generates, and passes after a build."""
    monkeypatch.setattr(build, "FOLDER", tmp_path / "json")
    monkeypatch.setattr(build, "RULES_FOLDER", tmp_path / "alerts")
    assert build.main(["--check"]) == 1
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    (build.FOLDER / "stray.json").write_text("{}")
    assert build.main(["--check"]) == 1
    assert "stray.json" in capsys.readouterr().err


def test_load_names_what_there_is() -> None:
    """An unknown name is answered with the known ones."""
    assert set(names()) == set(NAMES)
    with pytest.raises(KeyError, match="run"):
        load("no-such-dashboard")


@each_dashboard
def test_uid_and_panel_ids_are_stable(name: str) -> None:
    """The uid is fixed and every panel and row has an id of its own."""
    dashboard = load(name)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert dashboard["uid"] == f"gradiometer-{name}"
    assert len(ids) == len(set(ids))
    assert dashboard.get("id") is None


def test_metric_outside_the_catalogue_is_refused() -> None:
    """A query cannot name a metric that nothing exports."""
    with pytest.raises(KeyError, match="gradiometer_no_such"):
        metric("gradiometer_no_such")


@each_target
def test_metrics_are_in_the_catalogue(title: str, expr: str) -> None:
    """Every metric named is exported, histograms by their parts."""
    selected = {match[1] for match in SELECTED.finditer(expr)}
    exported = {f"{m.name}{part}" for m in CATALOGUE.values() for part in _parts(m)}
    assert selected
    assert selected <= exported


def _parts(declared: Metric) -> tuple[str, ...]:
    return ("_bucket", "_sum", "_count") if declared.kind == "histogram" else ("",)


@each_dashboard
def test_template_datasource(name: str) -> None:
    """The data source is a variable of its own, for Prometheus."""
    variable = _variables(name)["datasource"]
    assert (variable["type"], variable["query"], variable["label"]) == ("datasource", "prometheus", "Data source")


@each_dashboard
@pytest.mark.parametrize("label", ["job", "instance"])
def test_template_job_and_instance(name: str, label: str) -> None:
    """Job and instance are queried, many may be chosen, and *All* does not list them one by one."""
    variable = _variables(name)[label]
    assert (variable["type"], variable["label"], variable["allValue"]) == ("query", label.capitalize(), ".+")
    assert variable["multi"]
    assert variable["includeAll"]
    assert variable["datasource"]["uid"] == "${datasource}"


@each_dashboard
def test_template_label_promql(name: str) -> None:
    """Each queried variable asks for the values of a label that its catalogue metric, or the scrape, gives."""
    for variable in _variables(name).values():
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((\w+)(\{.*\})?, (\w+)\)", variable["query"])
            assert match, variable["query"]
            assert match[3] in {*CATALOGUE[match[1]].labels, "job", "instance"}


@each_dashboard
def test_template_on_time_change_reload(name: str) -> None:
    """Queried variables follow the time range, or old runs could not be chosen."""
    assert {v["refresh"] for v in _variables(name).values() if v["type"] == "query"} == {2}


@each_panel
def test_panel_datasource(panel: Json) -> None:
    """Panel and targets use the data source variable."""
    chosen = {panel["datasource"]["uid"], *(target["datasource"]["uid"] for target in panel["targets"])}
    assert chosen == {"${datasource}"}


@each_panel
def test_panel_title_description(panel: Json) -> None:
    """Every panel says what it shows."""
    assert panel["title"]
    assert panel["description"].endswith(".")


@each_panel
def test_panel_units(panel: Json) -> None:
    """Every panel has a unit that Grafana knows."""
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS


@each_panel
def test_panel_no_targets(panel: Json) -> None:
    """Every panel has queries, each under its own letter."""
    letters = [target["refId"] for target in panel["targets"]]
    assert letters
    assert len(letters) == len(set(letters))


@each_panel
def test_layer_heatmap_rules(panel: Json) -> None:
    """A heatmap of layers is not taken for a histogram: neither calculated, nor subtracted, nor cut at zero."""
    if panel["type"] == "heatmap":
        assert panel["options"]["calculate"] is False
        if "layer" in panel["targets"][0]["expr"]:
            assert panel["targets"][0]["format"] == "time_series"
            assert panel["options"]["filterValues"]["le"] < -9


@each_target
def test_target_rate_interval(title: str, expr: str) -> None:
    """Rates span the scrape interval whatever the zoom; only a count over the whole view may take the view."""
    for function, _, span in RANGED.findall(expr):
        if function in {"rate", "irate", "increase"}:
            assert span == "$__rate_interval" or (function, span) == ("increase", "$__range")
        else:
            assert (function, span) in {("max_over_time", "$__interval"), ("min_over_time", "$__interval")}
    assert expr.count("[") == len(RANGED.findall(expr))


@each_target
def test_target_matchers(title: str, expr: str) -> None:
    """Every selector carries the job, instance and run that were chosen."""
    for match in SELECTED.finditer(expr):
        mode = r', mode="(act|shadow)"' if "mode" in metric_of(match[1]).labels else ""
        assert re.fullmatch(re.escape(f"{{{RUN}") + mode + "}", match[2])


def metric_of(series: str) -> Metric:
    """Find the metric of a series: a histogram's have suffixes."""
    return CATALOGUE.get(series) or CATALOGUE[re.sub(r"_(bucket|sum|count)$", "", series)]


@each_target
def test_target_counter_agg(title: str, expr: str) -> None:
    """Counters are drawn as rates or increases, never as they stand."""
    aggregated = sorted(name for function, name, _ in RANGED.findall(expr) if function in {"rate", "irate", "increase"})
    counters = sorted(
        match[1] for match in SELECTED.finditer(expr) if re.search(r"_(total|bucket|sum|count)$", match[1])
    )
    if {(title, counter) for counter in counters} != COUNTERS_READ_AS_TOTALS:
        assert counters == aggregated


ONE = {"job": "gradiometer", "instance": "127.0.0.1:9477"}
FILLINGS = {
    "one": ONE,
    "several": {"job": "(gradiometer|training)", "instance": r"(a\\.example:9477|b\\.example:9477)"},
    "all": {"job": ".+", "instance": ".+"},
}


def _filled(expr: str, filling: dict[str, str]) -> str:
    """Replace the variables as Grafana does: an alternation for several values, ``allValue`` for all, spans by zoom."""
    spans = {"__rate_interval": "1m0s", "__interval": "15s", "__range": "10m"}
    values = {"run_id": "2026-01-31-gpt.1", **spans, **filling}
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], expr)


def _promtool(binary: Callable[[str], Any], command: str, file: Path, content: Json) -> None:
    file.write_text(yaml.safe_dump(content))
    done = subprocess.run(
        [str(binary("promtool")), *command.split(), str(file)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.native
@pytest.mark.parametrize("filling", FILLINGS.values(), ids=FILLINGS)
def test_target_promql(filling: dict[str, str], tmp_path: Path, native_binary: Callable[[str], Any]) -> None:
    """Prometheus parses every query, whatever is chosen in the variables."""
    rules = [{"record": f"q{i}", "expr": _filled(expr, filling)} for i, expr in enumerate(_expressions())]
    content = {"groups": [{"name": "dashboards", "rules": rules}]}
    _promtool(native_binary, "check rules", tmp_path / "rules.yml", content)


def _exported(instance: str) -> Iterator[Json]:
    """Yield every series that the catalogue promises: counters and buckets grow by one a minute, gauges stay at one."""
    for declared in CATALOGUE.values():
        labels = {"job": "gradiometer", "instance": instance} | dict.fromkeys(declared.labels, "x")
        labels |= {"run_id": "2026-01-31-gpt.1"}
        edges = ([f"{edge:g}" for edge in declared.buckets] + ["+Inf"]) if declared.kind == "histogram" else [None]
        for edge in edges:
            labels |= {"le": edge} if edge else {}
            name = f"{declared.name}_bucket" if edge else declared.name
            for mode in ("act", "shadow") if "mode" in declared.labels else (None,):
                pairs = ",".join(f'{k}="{v}"' for k, v in (labels | ({"mode": mode} if mode else {})).items())
                yield {"series": f"{name}{{{pairs}}}", "values": "1+0x80" if declared.kind == "gauge" else "0+1x80"}


@pytest.mark.native
@pytest.mark.parametrize("instances", [("h1:9477",), ("h1:9477", "h2:9477")], ids=["one host", "two hosts"])
def test_target_returns_data(instances: tuple[str, ...], tmp_path: Path, native_binary: Callable[[str], Any]) -> None:
    """With every catalogue metric exported, by one host or by two, no panel is empty or ambiguous."""
    checks = [
        {
            "expr": f"count({_filled(expr, FILLINGS['all'])}) > bool 0",
            "eval_time": "10m",
            "exp_samples": [{"labels": "{}", "value": 1}],
        }
        for expr in _expressions()
    ]
    series = [line for instance in instances for line in _exported(instance)]
    content = {"tests": [{"interval": "15s", "input_series": series, "promql_expr_test": checks}]}
    _promtool(native_binary, "test rules", tmp_path / "tests.yml", content)


@pytest.mark.native
def test_clip_ratio_counts_a_step_once(tmp_path: Path, native_binary: Callable[[str], Any]) -> None:
    """A run seen by two hosts that clips every fourth step has a clip ratio of a quarter, whatever is in shadow."""
    expr = next(target["expr"] for p in _panels("run") if p["title"] == "Clip ratio" for target in p["targets"])
    labels = 'job="gradiometer",run_id="2026-01-31-gpt.1"'
    series = [
        {"series": f'{name}{{{labels},instance="{instance}"{more}}}', "values": values}
        for instance in ("h1:9477", "h2:9477")
        for name, more, values in (
            ("gradiometer_steps_total", "", "0+40x80"),
            ("gradiometer_clip_events_total", ',policy="clip",mode="act"', "0+10x80"),
            ("gradiometer_clip_events_total", ',policy="wider",mode="shadow"', "0+20x80"),
        )
    ]
    quarter = {"labels": '{policy="clip"}', "value": 0.25}
    check = {"expr": _filled(expr, FILLINGS["all"]), "eval_time": "10m", "exp_samples": [quarter]}
    content = {"tests": [{"interval": "15s", "input_series": series, "promql_expr_test": [check]}]}
    _promtool(native_binary, "test rules", tmp_path / "tests.yml", content)
