"""What the alert rules are made of: metrics that exist, links that lead somewhere, files that their readers take."""

from __future__ import annotations

import inspect
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from typer.testing import CliRunner

from gradiometer.cli import app
from gradiometer.metrics import CATALOGUE
from gradiometer_dashboards import load, names
from gradiometer_dashboards.rules import (
    ALERTS,
    Alert,
    Settings,
    fleet_rules,
    grafana_rules,
    operator_rules,
    prometheus_rules,
    recordings,
)
from gradiometer_dashboards.rules.command import rules
from gradiometer_dashboards.rules.concerns import CONCERNS
from gradiometer_dashboards.rules.grafana import groups
from gradiometer_dashboards.thresholds import THRESHOLDS

if TYPE_CHECKING:
    from tests.conftest import Promtool

Json = dict[str, Any]
DASHBOARDS = {"fleet", "run", "layers", "ranks", "monitor"}
EXPORTED = {
    f"{metric.name}{part}"
    for metric in CATALOGUE.values()
    for part in (("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",))
}
PROMETHEUS: Json = yaml.safe_load(prometheus_rules(Settings()))
GRAFANA: Json = yaml.safe_load(grafana_rules(Settings()))
each_alert = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)


def _rules(document: Json) -> Iterator[Json]:
    for group in document["groups"]:
        yield from group["rules"]


def _queries(rule: Json) -> dict[str, str]:
    """Give the expressions of one of Grafana's rules that Prometheus is asked."""
    asked = [data for data in rule["data"] if data["datasourceUid"] != "__expr__"]
    return {data["refId"]: data["model"]["expr"] for data in asked}


OF_GRAFANA: dict[str, Json] = {rule["title"]: rule for rule in _rules(GRAFANA)}


def _expressions() -> Iterator[str]:
    """Give every expression and every template: all that names a metric."""
    for rule in _rules(PROMETHEUS):
        yield from (rule["expr"], *rule.get("annotations", {}).values())
    for rule in OF_GRAFANA.values():
        yield from _queries(rule).values()


def test_only_metrics_of_the_catalogue_are_named() -> None:
    """Rules, recordings and templates name what is exported, what they record, and ``up``."""
    recorded = {each.name for each in recordings(Settings())}
    named = {name for text in _expressions() for name in re.findall(r"(?<![\w:/-])gradiometer_\w+", text)}
    assert named <= EXPORTED
    assert {name for text in _expressions() for name in re.findall(r"run:\w+:\w+", text)} <= recorded


def test_labels_are_those_of_the_metrics() -> None:
    """Each matcher is of a label that its metric has, or that the scrape adds."""
    matched = [match for text in _expressions() for match in re.findall(r"(gradiometer_\w+)\{([^}]*)\}", text)]
    assert matched
    for name, matchers in matched:
        bucket = {"le"} if name.endswith("_bucket") else set()
        metric = CATALOGUE.get(name) or CATALOGUE[re.sub(r"_(bucket|sum|count)$", "", name)]
        assert set(re.findall(r"(\w+)=", matchers)) <= {*metric.labels, "job", "instance", *bucket}, name


@each_alert
def test_links_lead_to_a_dashboard_and_a_panel(alert: Alert) -> None:
    """The dashboard is one of ours, and so is the panel where there is one."""
    assert alert.dashboard in DASHBOARDS
    if alert.panel is not None and alert.dashboard in names():
        assert alert.panel in {panel["id"] for panel in load(alert.dashboard)["panels"]}


@each_alert
def test_an_alert_about_a_run_is_one_a_run(alert: Alert) -> None:
    """Its identity is the run; which host, rank or layer is concerned is told, and splits nothing."""
    if "run_id" in alert.by:
        assert alert.by == ("job", "run_id")
        assert "instance" not in " ".join(re.findall(r"by \(([^)]*)\)", alert.value))


@each_alert
def test_what_an_alert_says_is_whole(alert: Alert) -> None:
    """Summary, description, runbook and dashboard are there, in both files, and nothing is left to be filled."""
    ours = next(rule for rule in _rules(PROMETHEUS) if rule.get("alert") == alert.alertname)
    for rule in (ours, OF_GRAFANA[alert.alertname]):
        said = rule["annotations"]
        assert {"summary", "description", "runbook_url", "dashboard_url"} <= set(said)
        assert not re.search(r"<\w+>", " ".join(said.values()))
        assert said["runbook_url"] == f"http://127.0.0.1:9477/runbooks/{alert.name}"
        assert said["dashboard_url"].startswith(f"http://127.0.0.1:3000/d/gradiometer-{alert.dashboard}?var-job=")
        assert rule["labels"] == {"severity": alert.severity}


@pytest.mark.native
@pytest.mark.parametrize("by", [(), ("cluster", "namespace")], ids=["usual", "more-labels"])
def test_promtool_finds_nothing_wrong(by: tuple[str, ...], promtool: Promtool, tmp_path: Path) -> None:
    """``promtool check rules`` takes the rules, and the queries of Grafana's as if they were rules, with no warning."""
    settings = Settings(by=by)
    queries = [expr for rule in _rules(yaml.safe_load(grafana_rules(settings))) for expr in _queries(rule).values()]
    recorded = [{"record": f"check:of_grafana:{place}", "expr": expr} for place, expr in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(prometheus_rules(settings))
    (tmp_path / "grafana.yml").write_text(yaml.safe_dump({"groups": [{"name": "grafana", "rules": recorded}]}))
    done = promtool("check", "rules", "--lint-fatal", *tmp_path.glob("*.yml"))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.native
def test_vmalert_takes_them(native_binary: Callable[[str], str], tmp_path: Path) -> None:
    """VictoriaMetrics' vmalert parses expressions and templates; an old one without ``keep_firing_for``."""
    (tmp_path / "rules.yml").write_text(_run("--no-keep-firing")[1])
    command = [native_binary("vmalert"), f"-rule={tmp_path / 'rules.yml'}", "-dryRun"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def test_labels_that_are_kept_are_kept_everywhere() -> None:
    """With ``--by cluster``, whatever groups by run groups by cluster too, and names are looked for in that cluster."""
    settings = Settings(by=("cluster",))
    for rule in _rules(yaml.safe_load(prometheus_rules(settings))):
        for grouped in re.findall(r"by \(([^)]*)\)", rule["expr"]):
            assert "cluster" in grouped, rule
        assert all("$labels.cluster" in text for text in rule.get("annotations", {}).values() if "| query }}" in text)


def test_the_operators_resource_holds_the_same_groups() -> None:
    """A PrometheusRule wraps what Prometheus reads."""
    resource = yaml.safe_load(operator_rules(Settings()))
    assert (resource["apiVersion"], resource["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert resource["spec"] == PROMETHEUS


@each_alert
def test_grafana_asks_for_the_same(alert: Alert) -> None:
    """Grafana's rule has a fixed uid, compares the same value with the same limit, and stands on no recording rule."""
    rule = OF_GRAFANA[alert.alertname]
    nodes = {data["refId"]: data["model"] for data in rule["data"]}
    assert re.fullmatch(r"gradiometer-[a-z]{3,28}", rule["uid"])
    assert nodes["B"]["expression"] == "A"
    assert (rule["condition"], nodes["C"]["expression"]) == ("C", "B")
    assert nodes["C"]["conditions"] == [{"evaluator": {"type": "gt", "params": [alert.limit]}}]
    assert not any("run:" in expr for expr in _queries(rule).values())
    assert (rule["noDataState"], rule["execErrState"]) == (
        "OK",
        "Error" if alert.name == "MonitorDown" else "KeepLast",
    )


@each_alert
def test_grafana_finds_whom_it_is_about_among_its_labels(alert: Alert) -> None:
    """What names the worst keeps the alert's labels and one more: that is how Grafana matches the two."""
    rule = OF_GRAFANA[alert.alertname]
    queries, texts = _queries(rule), rule["annotations"]["summary"] + rule["annotations"]["description"]
    if alert.who is None:
        assert set(queries) == {"A"}
        assert "$values.D" not in texts
    else:
        assert queries["W"].startswith(f"topk by ({', '.join(alert.by)}) (1, ")
        assert f"({', '.join((*alert.by, alert.who.label))})" in queries["W"]
        assert f"$values.D }}}}{{{{ with .Labels.{alert.who.label} }}}}" in texts
    assert "query" not in texts


def test_grafanas_file_is_as_it_provisions() -> None:
    """Groups have organisation, folder and interval; uids are unique; a dollar sign is only where none is expanded."""
    assert GRAFANA["apiVersion"] == 1
    assert {(group["orgId"], group["folder"], group["interval"]) for group in GRAFANA["groups"]} == {
        (1, "Gradiometer", "30s")
    }
    assert len({rule["uid"] for rule in OF_GRAFANA.values()}) == len(ALERTS)
    for rule in OF_GRAFANA.values():
        raw = {"data", "annotations"}  # the others have variables of the environment filled in
        assert "$" not in str({key: value for key, value in rule.items() if key not in raw})


def test_a_dollar_is_no_variable_of_grafana() -> None:
    """Grafana takes ``$NAME`` in a file's queries for its environment's: an anchor's dollar is doubled."""
    (down,) = (
        rule for rule in _rules(yaml.safe_load(grafana_rules(Settings(job="^a$|^b$")))) if "Down" in rule["title"]
    )
    assert down["data"][0]["model"]["expr"].count('{job=~"^a$$|^b$$"}') == 3
    assert down["data"][0]["model"]["expr"].replace("$$", "").count("$") == 0
    (over_api,) = (rule for rule in groups(Settings(job="^a$|^b$"))[1]["rules"] if "Down" in rule["title"])
    assert over_api["data"][0]["model"]["expr"] == down["data"][0]["model"]["expr"].replace("$$", "$")


def _run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["rules", *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        return 2, str(done.exception)
    return done.exit_code, done.output


def test_the_command_writes_what_is_shipped(tmp_path: Path) -> None:
    """Without options it prints the committed files; with ``--out`` it writes one."""
    assert _run() == (0, prometheus_rules(Settings()))
    assert _run("grafana", "--out", str(tmp_path / "grafana.yml")) == (0, "")
    assert (tmp_path / "grafana.yml").read_text() == grafana_rules(Settings())
    (tmp_path / "folder").mkdir()
    assert "Is a directory" in _run("--out", str(tmp_path / "folder"))[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "grafana.yml"]


def test_the_command_takes_what_differs_from_place_to_place() -> None:
    """Addresses, job, labels, thresholds and the datasource are in what it writes."""
    given = (
        "--grafana-url", "https://g.example/sub/", "--runbook-url", "https://r.example/books", "--job", "mon",
        "--by", "cluster", "--set", "spike_ratio=20", "--set", "warm_up_steps=5",
    )  # fmt: skip
    status, text = _run(*given)
    rules = {rule["alert"]: rule for rule in _rules(yaml.safe_load(text)) if "alert" in rule}
    spike = rules["GradiometerSpike"]
    assert status == 0
    assert spike["expr"].endswith("> 20")
    assert "min5m >= 5" in spike["expr"]
    assert "run_id, cluster" in spike["expr"]
    assert spike["annotations"]["dashboard_url"].startswith("https://g.example/sub/d/gradiometer-run?")
    assert spike["annotations"]["runbook_url"] == "https://r.example/books/Spike"
    assert 'up{job=~"mon"}' in rules["GradiometerMonitorDown"]["expr"]
    assert "datasourceUid: mimir" in _run("grafana", "--datasource-uid", "mimir")[1]


def test_the_command_lists_the_alerts() -> None:
    """``--list`` says of each alert what it means."""
    status, text = _run("--list")
    assert status == 0
    assert all(alert.alertname in text and alert.severity in text and alert.meaning in text for alert in ALERTS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--set", "spik=2"), "no threshold 'spik'; there are: spike_ratio"),
        (("--set", "spike_ratio"), "spike_ratio='' is not a number"),
        (("--set", "spike_ratio=nan"), "spike_ratio='nan' is not a number from 0 to 1e+09; by default it is 10"),
        (("--set", "warm_up_steps=1.5"), "warm_up_steps='1.5' is not a whole number"),
        (("--set", "clip_ratio=90"), "clip_ratio='90' is not a number from 0 to 1; by default it is 0.9"),
        (("--by", "rank"), "'rank' is a label that alerts have, or that would split them"),
        (("--by", "a-b"), "'a-b' is no name of a label"),
        (("--job", "("), "'(' is no regular expression"),
        (("--job", 'a"'), "holds a quote"),
        (("--grafana-url", "grafana:3000"), "--grafana-url: 'grafana:3000' is no address"),
        (("--grafana-url", "http://me:secret@g"), "leave them out"),
        (("--runbook-url", "http://h/{{x}}"), "--runbook-url: 'http://h/{{x}}' is no address"),
        (("grafana", "--datasource-uid", "a b"), "'a b' is no uid"),
        (("--out", "/nowhere/rules.yml"), "--out: '/nowhere/rules.yml' cannot be written (No such file or directory)"),
        (("--out", "/dev/full"), "--out: '/dev/full' cannot be written (No space left on device)"),
    ],
)
def test_the_command_says_what_is_wrong(given: tuple[str, ...], said: str) -> None:
    """A setting that cannot be is refused with its name, its value and what it may be."""
    status, text = _run(*given)
    assert status == 2
    assert said in text
    assert "secret" not in text


FORMATS = ("prometheus", "grafana", "operator", "fleet", "fleet-layers")
OTHER_VALUES = (
    ("--grafana-url", "https://g.example"), ("--runbook-url", "https://r.example"), ("--job", "mon"),
    ("--by", "cluster"), ("--set", "spike_ratio=20"), ("--datasource-uid", "mimir"), ("--no-keep-firing",),
    ("--list",),
)  # fmt: skip


@pytest.mark.parametrize("option", OTHER_VALUES, ids=lambda option: option[0])
@pytest.mark.parametrize("form", FORMATS)
def test_no_option_is_ignored(form: str, option: tuple[str, ...]) -> None:
    """In each format an option changes what is written, or is refused with its name and what it would be good for."""
    usual = _run(form)[1]
    status, text = _run(form, *option)
    if status == 0:
        assert text != usual
    else:
        assert option[0] in text.split(":")[0]
        assert re.search(
            rf"which {form} has no use for; leave it out, or take one of the formats that it is for: (\w+)", text
        )


@pytest.mark.parametrize("option", [*OTHER_VALUES[:-1], ("--out", "rules.yml")], ids=lambda option: option[0])
def test_nothing_is_ignored_beside_the_list(
    option: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--list`` writes no rules: what is about writing them is refused, and no file is made."""
    monkeypatch.chdir(tmp_path)
    status, text = _run("grafana" if option[0] == "--datasource-uid" else "prometheus", "--list", *option)
    assert status == 2
    assert option[0] in text.split(":")[0]
    assert "which --list has no use for" in text
    assert list(tmp_path.iterdir()) == []


def test_an_option_is_refused_though_it_says_what_is_usual() -> None:
    """Whoever gives a format an option that it does not heed is told, whatever the value; fleets' own are taken."""
    assert _run("fleet", "--grafana-url", Settings().grafana_url)[0] == 2
    assert _run("grafana", "--keep-firing")[0] == 2
    assert _run("fleet", "--by", "rack") == (0, fleet_rules(Settings(by=("rack",))))


def test_every_option_of_the_command_says_whom_it_concerns() -> None:
    """A new option has a row in the table, or it would be ignored in silence somewhere."""
    assert inspect.signature(rules).parameters.keys() - {"context", "form"} == CONCERNS.keys()


def test_the_page_of_alerts_lists_them_and_their_thresholds() -> None:
    """docs/alerts.md has a row for each alert, with its severity, and names each threshold as it is."""
    page = Path(__file__).parent.parent / "docs" / "alerts.md"
    if not page.exists():
        pytest.skip("the documentation is not beside the tests")
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE) == [(a.alertname, a.severity) for a in ALERTS]
    stated = dict(re.findall(r"`(\w+)` \((\d+)(?: %)?\)", text))
    for field in fields(THRESHOLDS):
        value = getattr(THRESHOLDS, field.name)
        assert stated[field.name] == f"{100 * value if value < 1 else value:g}", field.name
