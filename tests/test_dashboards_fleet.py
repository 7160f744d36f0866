"""The Fleet and Monitor boards: one row a run, links that keep what was chosen, and the few that matter out of many."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from gradiometer_dashboards import load
from gradiometer_dashboards.interpolation import replaced
from tests._dashboards import panel_titled, panels, strings_under

if TYPE_CHECKING:
    from tests.conftest import Promtool

Json = dict[str, Any]
HANDED_OVER = ["${__url_time_range}", "${datasource:queryparam}", "${job:queryparam}", "${instance:queryparam}"]
EVERYTHING = {"job": ".+", "instance": ".+", "__rate_interval": "1m", "__interval": "15s", "__range": "10m"}
NOW = "10m"


def _transformation(panel: Json, name: str) -> Json:
    (options,) = [each["options"] for each in panel["transformations"] if each["id"] == name]
    return dict(options)


def _columns() -> dict[str, str]:
    """Read the table of runs as Grafana does: each header to the query that fills it, the order of the rows first."""
    panel = panel_titled("fleet", "Runs")
    (hidden,) = _transformation(panel, "organize")["excludeByName"]
    headers = {hidden: "order", **_transformation(panel, "organize")["renameByName"]}
    found = {}
    for target in panel["targets"]:
        value = f"Value #{target['refId']}"
        label = re.search(r"by \(run_id, (\w+)\)", target["expr"])
        found[headers.get(value) or headers[label[1] if label else ""]] = str(target["expr"])
    return found


def test_each_column_is_one_query() -> None:
    """Every query of the table of runs is shown under one header, in the order in which columns are declared."""
    panel, columns = panel_titled("fleet", "Runs"), _columns()
    organized = _transformation(panel, "organize")
    assert len(columns) == len(panel["targets"])
    in_order = sorted(organized["indexByName"], key=organized["indexByName"].__getitem__)
    assert [organized["renameByName"][name] for name in in_order] == ["Run", *list(columns)[1:]]
    assert {override["matcher"]["options"] for override in panel["fieldConfig"]["overrides"]} == {
        *organized["renameByName"].values()
    }


def test_table_is_joined_by_run_and_sorted_by_need() -> None:
    """Times are dropped before the join, which would else be columns, and the order is that of the first query."""
    panel = panel_titled("fleet", "Runs")
    kept = set(_transformation(panel, "filterFieldsByName")["include"]["names"])
    assert [each["id"] for each in panel["transformations"]] == [
        *("filterFieldsByName", "joinByField", "sortBy", "organize")
    ]
    assert _transformation(panel, "joinByField") == {"byField": "run_id", "mode": "outer"}
    assert _transformation(panel, "sortBy")["sort"] == [{"field": "Value #A", "desc": True}]
    assert kept == {"Value #A", *_transformation(panel, "organize")["renameByName"]}
    assert "Time" not in kept
    assert {(target["format"], target["instant"]) for target in panel["targets"]} == {("table", True)}


def test_links_hand_over_what_was_chosen() -> None:
    """Each link to a board of ours keeps time range, data source, job and hosts, and names the row's run."""
    urls = {url for board in ("fleet", "monitor") for panel in panels(board) for url in strings_under(panel, "url")}
    ours = {url for url in urls if url.startswith("/d/")}
    assert {re.sub(r"\?.*", "", url) for url in ours} == {
        f"/d/gradiometer-{name}" for name in ("run", "layers", "ranks")
    }
    assert urls - ours == {"/alerting/list?search=${__data.fields.alertname}"}
    for url in ours:
        parts = url.partition("?")[2].split("&")
        assert parts[:-1] == HANDED_OVER
        assert parts[-1] in {"var-run_id=${__data.fields.run_id}", "var-run_id=${__field.labels.run_id}"}


def test_links_name_a_label_that_there_is() -> None:
    """A series whose link holds its run has one, and so has a row."""
    for board in ("fleet", "monitor"):
        for panel in panels(board):
            if any("run_id=" in url for url in strings_under(panel, "url")):
                assert all("run_id" in target["expr"] for target in panel["targets"]), panel["title"]


def test_optional_parts_are_shut() -> None:
    """What not every fleet has asks nothing until somebody opens it."""
    shut = {"fleet": {"GPUs"}, "monitor": {"Remote write", "Grafana annotations", "Alert actions"}}
    for board, expected in shut.items():
        rows = [panel for panel in load(board)["panels"] if panel["type"] == "row"]
        assert expected <= {row["title"] for row in rows if row.get("collapsed") and row["panels"]}


def _sample(name: str, values: str, **labels: str) -> Json:
    pairs = ",".join(f'{key}="{value}"' for key, value in ({"job": "gradiometer"} | labels).items())
    return {"series": f"{name}{{{pairs}}}", "values": values}


def _run(run_id: str, host: str, state: str, **values: str) -> Iterator[Json]:
    """Yield what one host's monitor tells of a run."""
    whose = {"run_id": run_id, "instance": host}
    told = {
        "run_info": "1x80",
        "steps_total": "0+30x80",
        "nonfinite_steps_total": "0x80",
        "skipped_steps_total": "0x80",
    }
    for name, numbers in (told | values).items():
        more = {"job_name": f"job of {run_id}", "world_size": "2"} if name == "run_info" else {}
        yield _sample(f"gradiometer_{name}", numbers, **whose, **more)
    for name in ("running", "finished", "lost"):
        yield _sample("gradiometer_run_state", "1x80" if name == state else "0x80", state=name, **whose)


def _rank(run_id: str, host: str, rank: str, seconds: str) -> Iterator[Json]:
    labels = {"run_id": run_id, "instance": host, "rank": rank}
    yield _sample("gradiometer_last_step_timestamp_seconds", seconds, **labels)
    yield _sample("gradiometer_grad_norm_last", "1x80", **labels)


def _fleet() -> list[Json]:
    """Three runs on two hosts: ``wide`` spans both and is in trouble, ``gone`` is lost, ``done`` had a GradScaler."""
    norms = {"grad_norm_window_max": "12x80", "grad_norm_finite_window_max": "12x80", "grad_norm_baseline": "2x80"}
    norms["clip_ratio"] = "0.95x80"
    return [
        *_run("wide", "h1", "running", **norms, nonfinite_steps_total="0+1x80"),
        *_run("wide", "h2", "running", **norms, nonfinite_steps_total="0+1x80"),
        *_rank("wide", "h1", "0", "0+15x80"),
        *_rank("wide", "h2", "1", "0+15x20 300x60"),
        *_run("gone", "h1", "lost", grad_norm_window_max="30x80", grad_norm_baseline="2x80", steps_total="50x80"),
        *_rank("gone", "h1", "0", "60x80"),
        *_run("done", "h2", "finished", steps_total="90x80", nonfinite_steps_total="0+1x80", loss_scale="1024x80"),
        *_rank("done", "h2", "0", "90x80"),
        *(_alert("GradiometerNonFiniteUpdate", "critical", run) for run in ("wide", "left-long-ago")),
        _alert("GradiometerSpike", "warning", "wide"),
        _alert("OfSomebodyElse", "critical", "done"),
        *(_sample("up", value, instance=host) for host, value in (("h1", "1x80"), ("h2", "1x80"), ("h3", "0x80"))),
        *(_sample("gradiometer_build_info", "1x80", instance=host) for host in ("h1", "h2")),
        {"series": 'up{job="node",instance="h1:9100"}', "values": "0x80"},
    ]


def _alert(name: str, severity: str, run_id: str) -> Json:
    return _sample("ALERTS", "1x80", alertname=name, severity=severity, run_id=run_id, alertstate="firing")


def _check(promtool: Promtool, file: Path, series: list[Json], expected: Mapping[str, Mapping[str, float]]) -> None:
    """Have promtool evaluate each expression, which must return these series with these values and no other."""
    checks = [
        {
            "expr": replaced(expr, EVERYTHING),
            "eval_time": NOW,
            "exp_samples": [{"labels": labels, "value": value} for labels, value in samples.items()],
        }
        for expr, samples in expected.items()
    ]
    test = {"interval": "15s", "input_series": series, "promql_expr_test": checks}
    file.write_text(yaml.safe_dump({"tests": [test]}))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


def _by_run(**values: float) -> dict[str, float]:
    return {f'{{run_id="{run}"}}': value for run, value in values.items()}


@pytest.mark.native
def test_table_has_one_row_a_run(tmp_path: Path, promtool: Promtool) -> None:
    """Each column has one value a run, also of the run on two hosts, and nothing of runs that left."""
    jobs = {f'{{run_id="{run}", job_name="job of {run}"}}': 1.0 for run in ("wide", "gone", "done")}
    expected = {
        "order": _by_run(wide=16 + 4 + 2 + 1, gone=8 + 2, done=0),
        "State": _by_run(wide=1, gone=2, done=0),
        "Critical alerts": _by_run(wide=1, gone=0, done=0),
        "Other alerts": _by_run(wide=1, gone=0, done=0),
        "Job": jobs,
        "Norm / baseline": _by_run(wide=6, gone=15),
        "Clip ratio": _by_run(wide=0.95),
        "Non-finite steps": _by_run(wide=40, gone=0, done=40),
        "Skipped steps": _by_run(wide=0, gone=0, done=0),
        "Steps": _by_run(wide=1200, gone=50, done=90),
        "Steps/s": _by_run(wide=2, gone=0, done=0),
        "Data age": _by_run(wide=300, gone=540),
        "Ranks seen": _by_run(wide=2, gone=1, done=1),
    }
    columns = _columns()
    assert set(expected) == set(columns)
    _check(promtool, tmp_path / "t.yml", _fleet(), {columns[name]: rows for name, rows in expected.items()})


@pytest.mark.native
def test_first_screen_counts_each_run_once(tmp_path: Path, promtool: Promtool) -> None:
    """A run on two hosts is one, another exporter's target is none of ours, and an empty fleet is all zeros."""
    counts = {
        "Running": 1, "Finished": 1, "Lost": 1, "Critical alerts": 2, "Other alerts": 1, "Monitors up": 2,
        "Monitors down": 1,
    }  # fmt: skip
    exprs = {title: panel_titled("fleet", title)["targets"][0]["expr"] for title in counts}
    _check(promtool, tmp_path / "t.yml", _fleet(), {exprs[title]: {"{}": n} for title, n in counts.items()})
    nothing = [_sample("something_else", "1x80")]
    _check(promtool, tmp_path / "n.yml", nothing, {expr: {"{}": 0} for expr in exprs.values()})


@pytest.mark.native
def test_alerts_are_listed_by_severity(tmp_path: Path, promtool: Promtool) -> None:
    """Critical is 3 and warning 2, which the table sorts by; what is not ours is not listed."""
    (target,) = panel_titled("fleet", "Firing alerts")["targets"]
    rows = {("GradiometerNonFiniteUpdate", "wide"): 3, ("GradiometerNonFiniteUpdate", "left-long-ago"): 3}
    rows |= {("GradiometerSpike", "wide"): 2}
    samples = {f'{{alertname="{name}", run_id="{run}"}}': value for (name, run), value in rows.items()}
    _check(promtool, tmp_path / "t.yml", _fleet(), {target["expr"]: samples})


@pytest.mark.native
@pytest.mark.parametrize(
    ("title", "last"), [("Norm / baseline", 29.0), ("Non-finite steps", 4 * 29.0), ("Speed", 0.0), ("Data age", 29.0)]
)
def test_graphs_keep_the_twenty_that_matter(title: str, last: float, tmp_path: Path, promtool: Promtool) -> None:
    """Of thirty runs each graph keeps twenty, among them the worst."""
    series: list[Json] = []
    for place in range(30):
        speed = f"0+{300 if place < 29 else 100}x20 {6000 if place < 29 else 2000}x60" if place == 29 else "0+300x80"
        series += _run(
            f"r{place:02}", "h1", "running", grad_norm_finite_window_max=f"{place}x80", grad_norm_baseline="1x80",
            nonfinite_steps_total=f"0+{place}x80", steps_total=speed,
        )  # fmt: skip
        series += _rank(f"r{place:02}", "h1", "0", f"{600 - place}x80")
    (target,) = panel_titled("fleet", title)["targets"]
    expected = {f"count({target['expr']})": {"{}": 20.0}, f"sum({target['expr']} and on (run_id) X)": {"{}": last}}
    worst = [_sample("X", "1x80", run_id="r29")]
    _check(promtool, tmp_path / "t.yml", series + worst, expected)


@pytest.mark.native
def test_overhead_is_of_one_rank(tmp_path: Path, promtool: Promtool) -> None:
    """What two ranks of a host spend in their hooks together is halved, and hosts are not added up."""
    series = [line for host in ("h1", "h2") for rank in "01" for line in _rank("wide", host, host + rank, "1x80")]
    series += [
        _sample("gradiometer_agent_seconds_total", "0+3x80", run_id="wide", instance=host) for host in ("h1", "h2")
    ]
    exprs = [panel_titled("monitor", title)["targets"][0]["expr"] for title in ("Largest overhead", "Agent overhead")]
    of_run = panel_titled("run", "Agent overhead")["targets"][0]["expr"].replace("$run_id", "wide")
    hosts = {f'{{instance="{host}"}}': 0.1 for host in ("h1", "h2")}
    expected = {exprs[0]: {"{}": 0.1}, exprs[1]: _by_run(wide=0.1), of_run: hosts}
    _check(promtool, tmp_path / "t.yml", series, expected)


@pytest.mark.native
def test_monitor_shows_only_what_failed(tmp_path: Path, promtool: Promtool) -> None:
    """Bands of time are of the hosts that were down and the collectors that failed in view, not of the hundreds."""
    hosts = {"h1": "1x80", "h2": "1x20 0x5 1x55"}
    series = [_sample("up", values, instance=host) for host, values in hosts.items()]
    series += [_sample("gradiometer_build_info", "1x80", instance=host) for host in hosts]
    series += [
        _sample("gradiometer_collector_success", values, instance="h1", collector=name)
        for name, values in (("runs", "1x80"), ("gpu", "0x10 1x70"))
    ]
    titles = ("Monitors that were down", "Collectors that failed")
    down, failed = (panel_titled("monitor", title)["targets"][0]["expr"] for title in titles)
    expected = {down: {'{instance="h2"}': 1.0}, failed: {'{instance="h1", collector="gpu"}': 1.0}}
    _check(promtool, tmp_path / "t.yml", series, expected)


@pytest.mark.native
def test_one_infinite_norm_takes_no_axis(tmp_path: Path, promtool: Promtool) -> None:
    """Graphs have finite norms alone; the table has Inf of a run that is to have none, and of a GradScaler's not."""
    norms = {"bad": "+Inf+0x80", "scaled": "+Inf+0x80", "none": "+Inf+0x80", "good": "2+0x80"}
    finite = {"bad": "4+0x80", "scaled": "30+0x80", "good": "2+0x80"}
    series = [
        _sample(f"gradiometer_grad_norm_{name}", values, run_id=run, instance="h1")
        for run, window in norms.items()
        for name, values in (("window_max", window), ("finite_window_max", finite.get(run)), ("baseline", "1+0x80"))
        if values is not None
    ]
    series += [_sample("gradiometer_run_state", "1x80", run_id=run, state="running", instance="h1") for run in norms]
    series += [_sample("gradiometer_loss_scale", "65536x80", run_id=run, instance="h1") for run in ("scaled", "none")]
    graph = panel_titled("fleet", "Norm / baseline")["targets"][0]["expr"]
    cells = _columns()["Norm / baseline"]
    rows = f"sum by (run_id) (clamp_max({cells}, 1e9))"
    expected = {graph: _by_run(bad=4, scaled=30, good=2), rows: _by_run(bad=1e9, scaled=30, good=2)}
    _check(promtool, tmp_path / "t.yml", series, expected)
