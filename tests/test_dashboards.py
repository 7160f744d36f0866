"""The committed dashboards: generated, in step with the catalogue, within the rules of Grafana's dashboard linter."""

from __future__ import annotations

import re
import urllib.parse
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from grafana_foundation_sdk.models import units

from gradiometer.metrics import CATALOGUE
from gradiometer_dashboards import build, colours, load, names
from gradiometer_dashboards.frame import TAG
from gradiometer_dashboards.promql import metric
from tests._dashboards import (
    NAMES,
    PARTS,
    Target,
    each_panel,
    each_target,
    metric_of,
    panels,
    rows_and_panels,
    strings_under,
    targets,
    variables,
)

if TYPE_CHECKING:
    from tests.conftest import Golden

Json = dict[str, Any]
UNITS = {unit for name, unit in vars(units).items() if not name.startswith("_") and isinstance(unit, str)}
BUILT_IN = {
    "alertlist", "barchart", "bargauge", "gauge", "heatmap", "histogram", "row", "stat", "state-timeline",
    "status-history", "table", "text", "timeseries",
}  # fmt: skip
"""Panels that every Grafana has."""
WITHOUT_QUERIES = {"alertlist", "row", "text"}
COLOURS = {value for name, value in vars(colours).items() if name.isupper() and isinstance(value, str)}
VARIABLES = ["datasource", "job", "instance", "run_id", "rank", "layer"]
OF_PROMETHEUS = {"up", "ALERTS"}
OF_THE_SCRAPE = {"scrape_duration_seconds", "scrape_samples_scraped", "scrape_samples_post_metric_relabeling"}
"""What Prometheus itself says of a scrape: on the Monitor board alone."""
COUNTERS_READ_AS_TOTALS = {"gradiometer_steps_total"}
"""Where the count itself is what the reader wants: how far the run is."""
RATES = {"rate", "irate", "increase"}
OVER_TIME = {f"{name}_over_time" for name in ("max", "min", "avg", "last", "count", "quantile", "sum", "present")}
PEAKS = {("max_over_time", "$__interval"), ("max_over_time", "$__range")}
NORMS = re.compile(r"gradiometer_(layer_|rank_microbatch_)?grad_norm_(last|(finite_)?window_max|baseline|quantile)")

each_dashboard = pytest.mark.parametrize("name", NAMES)


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
    ids = [panel["id"] for panel in rows_and_panels(name)]
    assert dashboard["uid"] == f"gradiometer-{name}"
    assert dashboard["title"] == f"Gradiometer / {name.capitalize()}"
    assert len(ids) == len(set(ids))
    assert dashboard.get("id") is None


def test_ids_are_those_of_the_last_release(golden: Golden) -> None:
    """Links hold a panel's id: one that changes, or a panel that goes, is a line of a diff."""
    lines = [f"{name} {p['id']} {p['type']} {p['title']}\n" for name in sorted(NAMES) for p in rows_and_panels(name)]
    golden("dashboards.txt", "".join(lines))


def test_metric_outside_the_catalogue_is_refused() -> None:
    """A query cannot name a metric that nothing exports."""
    with pytest.raises(KeyError, match="gradiometer_no_such"):
        metric("gradiometer_no_such")


@each_target
def test_metrics_are_in_the_catalogue(target: Target) -> None:
    """Every metric named is exported, histograms by their parts, or is one of the few that Prometheus makes."""
    exported = {m.name for m in CATALOGUE.values() if m.kind != "histogram"} | set(PARTS) | OF_PROMETHEUS
    assert target.metrics
    assert target.metrics <= exported | (OF_THE_SCRAPE if target.board == "monitor" else set())


@each_target
def test_labels_are_in_the_catalogue(target: Target) -> None:
    """Every label that a selector matches is one that its metric has."""
    for name, matchers in target.selectors:
        declared = metric_of(name)
        if declared is not None:
            known = {*declared.labels, "job", "instance", "le"}
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= known, name


@each_dashboard
def test_template_datasource(name: str) -> None:
    """The data source is a variable of its own, for Prometheus."""
    variable = variables(name)["datasource"]
    assert (variable["type"], variable["query"], variable["label"]) == ("datasource", "prometheus", "Data source")


@each_dashboard
@pytest.mark.parametrize("label", ["job", "instance"])
def test_template_job_and_instance(name: str, label: str) -> None:
    """Job and instance are queried, many may be chosen, and *All* does not list them one by one."""
    variable = variables(name)[label]
    assert (variable["type"], variable["label"], variable["allValue"]) == ("query", label.capitalize(), ".+")
    assert variable["multi"]
    assert variable["includeAll"]
    assert variable["datasource"]["uid"] == "${datasource}"


@each_dashboard
def test_template_label_promql(name: str) -> None:
    """Each queried variable asks for the values of a label that its catalogue metric, or the scrape, gives."""
    for variable in variables(name).values():
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((\w+)(\{.*\})?, (\w+)\)", variable["query"])
            assert match, variable["query"]
            assert match[3] in {*CATALOGUE[match[1]].labels, "job", "instance"}


@each_dashboard
def test_template_on_time_change_reload(name: str) -> None:
    """Queried variables follow the time range, or old runs could not be chosen."""
    assert {v["refresh"] for v in variables(name).values() if v["type"] == "query"} == {2}


@each_dashboard
def test_variables_are_the_same(name: str) -> None:
    """Every dashboard has the same variables, or a link would lose what was chosen; the unused are hidden."""
    assert list(variables(name)) == VARIABLES
    used = {found for t in targets(name) for found in re.findall(r"\$\{?(\w+)", t.expr)}
    for variable in ("run_id", "rank", "layer"):
        hidden = variables(name)[variable].get("hide", 0) == 2
        assert hidden == (variable not in used), variable


@each_dashboard
def test_links_between_dashboards(name: str) -> None:
    """Each dashboard leads to all others, with its time range and variables."""
    dashboard = load(name)
    (link,) = [link for link in dashboard["links"] if link["type"] == "dashboards"]
    assert (link["tags"], link["includeVars"], link["keepTime"]) == ([TAG], True, True)
    assert TAG in dashboard["tags"]


@each_panel
def test_data_links(panel: Json) -> None:
    """A link from a value leads to a dashboard that there is, with time range, data source, job, instance and run."""
    for url in strings_under(panel, "url"):
        if url.startswith("/alerting/"):
            continue
        path, _, query = url.partition("?")
        uid = path.removeprefix("/d/")
        assert uid.removeprefix("gradiometer-") in NAMES, url
        parts = query.split("&")
        assert "${__url_time_range}" in parts
        handed = {match[1] for part in parts if (match := re.match(r"(?:var-|\$\{)(\w+)(?:=|:queryparam\})", part))}
        assert handed >= {"datasource", "job", "instance", "run_id"}, url
        assert handed <= {*VARIABLES}, url
        assert not re.search(r"\s", urllib.parse.unquote(query)), url


@each_panel
def test_panel_type(panel: Json) -> None:
    """Panels are Grafana's own, and share the dashboard's time range."""
    assert panel["type"] in BUILT_IN
    assert not {"timeFrom", "timeShift", "libraryPanel"} & {key for key, value in panel.items() if value}


@each_panel
def test_panel_datasource(panel: Json) -> None:
    """Panel and targets use the data source variable."""
    if panel["type"] not in WITHOUT_QUERIES:
        chosen = {panel["datasource"]["uid"], *(target["datasource"]["uid"] for target in panel["targets"])}
        assert chosen == {"${datasource}"}


@each_panel
def test_panel_title_description(panel: Json) -> None:
    """Every panel says what it shows, in sentences."""
    assert panel["title"]
    assert panel["description"][0].isupper()
    assert panel["description"].endswith(".")


@each_panel
def test_panel_units(panel: Json) -> None:
    """Every panel, and every column with a unit of its own, has one that Grafana knows."""
    if panel["type"] not in WITHOUT_QUERIES:
        config = panel["fieldConfig"]
        own = [p["value"] for o in config["overrides"] for p in o["properties"] if p["id"] == "unit"]
        assert {config["defaults"]["unit"], *own} <= UNITS


@each_panel
def test_panel_no_targets(panel: Json) -> None:
    """Every panel that draws data has queries, each under its own letter, at most one of a letter."""
    letters = [target["refId"] for target in panel.get("targets", ())]
    assert bool(letters) != (panel["type"] in WITHOUT_QUERIES)
    assert len(letters) == len(set(letters))


@each_panel
def test_panel_legends(panel: Json) -> None:
    """A graph's legend is a table on the right that tells the last value and the largest."""
    if panel["type"] == "timeseries":
        legend = panel["options"]["legend"]
        assert (legend["showLegend"], legend["displayMode"], legend["placement"]) == (True, "table", "right")
        assert {"lastNotNull", "max"} <= set(legend["calcs"])


@each_panel
def test_norms_have_logarithmic_axes(panel: Json) -> None:
    """Norms span decades: on a linear axis a spike leaves nothing else to see."""
    exprs = [target["expr"] for target in panel.get("targets", ())]
    if panel["type"] == "timeseries" and any(NORMS.search(e) and "/" not in e and "log10" not in e for e in exprs):
        assert panel["fieldConfig"]["defaults"]["custom"]["scaleDistribution"]["type"] == "log"


@each_panel
def test_heatmaps(panel: Json) -> None:
    """A heatmap of series is not taken for a histogram: neither calculated, nor subtracted, nor cut at zero."""
    if panel["type"] == "heatmap":
        assert panel["options"]["calculate"] is False
        (target,) = panel["targets"]
        if "_bucket" in target["expr"]:
            assert (target["format"], target["legendFormat"]) == ("heatmap", "{{le}}")
        else:
            assert target["format"] == "time_series"
            assert panel["options"]["filterValues"]["le"] < -9


@each_target
def test_target_kind(target: Target) -> None:
    """What is drawn over time is a range, a value or a table is an instant; only ranges have an interval."""
    kind, over_time = target.panel["type"], {"timeseries", "heatmap", "state-timeline", "status-history"}
    assert bool(target.target.get("range")) == (kind in over_time)
    assert bool(target.target.get("instant")) == (kind not in over_time)
    if not target.target.get("range"):
        assert not re.search(r"\$\{?__interval", target.expr)


@each_target
def test_target_rate_interval(target: Target) -> None:
    """Rates span the scrape interval whatever the zoom; only a count over the whole view may take the view."""
    for function, _, span in target.ranges:
        assert function in RATES | OVER_TIME, function
        assert span in {"$__rate_interval", "$__range"} | ({"$__interval"} if function in OVER_TIME else set())
    assert target.expr.count("[") == len(target.ranges)


@each_target
def test_target_peaks(target: Target) -> None:
    """A rolling maximum that is drawn over time keeps its peak between two points, however far out one zooms."""
    if target.target.get("range"):
        kept = [name for function, name, span in target.ranges if (function, span) in PEAKS]
        peaks = [name for name, _ in target.selectors if name.endswith("_window_max")]
        assert [name for name in kept if name in peaks] == peaks


@each_target
def test_target_job_and_instance(target: Target) -> None:
    """Every selector carries the job and the instance that were chosen; an alert about a run has no instance."""
    for name, matchers in target.selectors:
        assert 'job=~"$job"' in matchers, name
        assert ('instance=~"$instance"' in matchers) != (name == "ALERTS"), name


@each_target
def test_target_run(target: Target) -> None:
    """On the dashboard of one run every selector of something that runs have carries that run."""
    if variables(target.board)["run_id"].get("hide", 0) != 2:
        for name, matchers in target.selectors:
            declared = metric_of(name)
            if declared is not None and "run_id" in declared.labels:
                assert 'run_id="$run_id"' in matchers, name


@each_target
def test_target_counter_agg(target: Target) -> None:
    """Counters are drawn as rates or increases, never as they stand, unless they were born within the view."""
    rated = sorted(name for function, name, _ in target.ranges if function in RATES)
    counters = {name for name, m in CATALOGUE.items() if m.kind == "counter"} | set(PARTS)
    born = re.findall(
        r"\((?:last_over_time\()?(\w+)\{[^{}]*\}(?:\[\$__range\]\))? unless \1\{[^{}]*\} offset \$__range\)",
        target.expr,
    )
    read = Counter(name for name, _ in target.selectors if name in counters - COUNTERS_READ_AS_TOTALS)
    counted = sorted((read - Counter(2 * born)).elements())
    assert [name for name in rated if name not in COUNTERS_READ_AS_TOTALS] == counted
    gauges = {name for name, m in CATALOGUE.items() if m.kind == "gauge"}
    assert not gauges & set(rated), "a rate of a gauge"


def _colours(name: str) -> list[tuple[str, str, str]]:
    """List what has a fixed colour: the legend, or the query without its matchers, and the colour."""
    found = []
    for panel in panels(name):
        by_letter = {target["refId"]: target for target in panel.get("targets", ())}
        for override in panel.get("fieldConfig", {}).get("overrides", ()):
            for each in override["properties"]:
                if each["id"] == "color" and each["value"].get("mode") in ("fixed", "shades"):
                    target = by_letter.get(override["matcher"]["options"])
                    legend = target["legendFormat"] if target else override["matcher"]["options"]
                    expr = re.sub(r'\{[^}]*?(mode="\w+")?\}', r"\1", target["expr"]) if target else legend
                    found.append((legend, expr, each["value"]["fixedColor"]))
    return found


def test_one_colour_a_meaning() -> None:
    """What has the same name, or asks the same, has the same colour on every dashboard."""
    meanings: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in NAMES:
        for legend, expr, colour in _colours(name):
            meanings["legend", legend].add(colour)
            meanings["query", expr].add(colour)
    assert meanings
    assert {key: found for key, found in meanings.items() if len(found) > 1} == {}


@each_dashboard
def test_colours_have_names(name: str) -> None:
    """Fixed colours and those of limits are among the few that have a meaning."""
    limits = {
        step["color"]
        for panel in panels(name)
        for step in panel.get("fieldConfig", {}).get("defaults", {}).get("thresholds", {}).get("steps", ())
    }
    assert {colour for _, _, colour in _colours(name)} | limits <= COLOURS | {"transparent"}
