"""Alert rules in a Grafana: a stub of its provisioning API, or the real one that GRADIOMETER_TEST_GRAFANA names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gradiometer.cli import app
from gradiometer_dashboards.rules import ALERTS
from gradiometer_monitor.config.settings import SettingsError, resolve
from gradiometer_monitor.grafana.change import Change
from gradiometer_monitor.grafana.client import Grafana
from gradiometer_monitor.grafana.provision import apply
from gradiometer_monitor.grafana.settings import ALERTS_PREFIX, GrafanaSettings
from tests._grafana import ServedGrafana, Stub, serve_grafana, token_of

Json = dict[str, Any]
Applied = Callable[..., list[Change]]
Command = Callable[..., Result]


def source_of(grafana: ServedGrafana) -> str:
    """Return the uid of a datasource that was there before."""
    return f"{grafana.prefix}-source"


@pytest.fixture
def grafana(tmp_path: Path) -> Iterator[ServedGrafana]:
    """Give the Grafana to test against."""
    with serve_grafana(tmp_path) as tested:
        uid = source_of(tested)
        tested.ask("POST", "/datasources", {"uid": uid, "name": uid, "type": "prometheus", "access": "proxy"})
        yield tested
        tested.ask("DELETE", f"/datasources/uid/{uid}")


@pytest.fixture
def stub(grafana: ServedGrafana) -> Stub:
    """Give the stub's inside; tests that need it are skipped against a real Grafana."""
    return grafana.server.stub if grafana.server else pytest.skip("a real Grafana cannot be made to fail")


@pytest.fixture
def applied(grafana: ServedGrafana, monkeypatch: pytest.MonkeyPatch) -> Applied:
    """Give a function that applies without dashboards, which have tests of their own, and returns what is of alerts."""
    monkeypatch.setattr("gradiometer_monitor.grafana.provision.names", lambda: ())

    def run(dry_run: bool = False, wait: Callable[[float], Any] | None = None, **rules: Any) -> list[Change]:
        given = grafana.settings | {"alerts": True, "datasource_uid": source_of(grafana), "alert_rules": rules}
        session = Grafana(GrafanaSettings.model_validate(given))
        try:
            return [each for each in apply(session, dry_run=dry_run, wait=wait)[1] if each.what == "alerts"]
        finally:
            session.close()

    return run


@pytest.fixture
def command(grafana: ServedGrafana) -> Command:
    """Give a function that runs the command with ``--alerts``."""
    options = [*grafana.options, "--alerts"]
    return lambda *arguments: CliRunner().invoke(app, ["grafana", "apply", *options, *arguments])


def states(changes: list[Change]) -> list[str]:
    return [change.state for change in changes]


def group_path(grafana: ServedGrafana, name: str = "runs") -> str:
    return f"/v1/provisioning/folder/{grafana.prefix}/rule-groups/{grafana.prefix}-{name}"


def rule_of(grafana: ServedGrafana, name: str) -> Json:
    found: Json = grafana.ask("GET", f"/v1/provisioning/alert-rules/{grafana.prefix}-{name}")
    return found


def test_a_second_apply_changes_nothing(grafana: ServedGrafana, applied: Applied) -> None:
    """Every alert is made once, as the API's, so that Grafana lets nobody edit it; a second time nothing is written."""
    assert states(applied()) == ["created", "created"]
    rules = [rule for name in ("runs", "monitor") for rule in grafana.ask("GET", group_path(grafana, name))["rules"]]
    assert {rule["title"] for rule in rules} == {alert.alertname for alert in ALERTS}
    spike = rule_of(grafana, "spike")
    assert (spike["provenance"], spike["folderUID"], spike["isPaused"]) == ("api", grafana.prefix, False)
    assert states(applied()) == ["unchanged", "unchanged"]
    assert rule_of(grafana, "spike")["updated"] == spike["updated"]


def test_what_a_rule_is_made_of(grafana: ServedGrafana, applied: Applied) -> None:
    """It asks the datasource given, links where people are, and stands on its limit."""
    applied(
        runbook_url="https://gradiometer-monitor/runbooks",
        grafana_url="https://g.example",
        by=("cluster",),
        thresholds={"spike_ratio": 20},
        job="train-.*",
    )
    spike, down = rule_of(grafana, "spike"), rule_of(grafana, "monitordown")
    assert spike["annotations"]["runbook_url"] == "https://gradiometer-monitor/runbooks/Spike"
    assert spike["annotations"]["dashboard_url"].startswith(f"https://g.example/d/{grafana.prefix}-run?var-job=")
    assert spike["annotations"]["__dashboardUid__"] == f"{grafana.prefix}-run"
    queries = {query["refId"]: query for query in spike["data"]}
    assert {query["datasourceUid"] for query in spike["data"]} == {source_of(grafana), "__expr__"}
    assert queries["C"]["model"]["conditions"][0]["evaluator"]["params"] == [20]
    assert "cluster" in queries["A"]["model"]["expr"]
    assert "train-.*" in down["data"][0]["model"]["expr"]


def test_links_lead_to_the_grafana_given(grafana: ServedGrafana, applied: Applied) -> None:
    """Unless people open Grafana elsewhere, links begin with its address, without a password."""
    applied()
    address = GrafanaSettings.model_validate(grafana.settings).address
    assert rule_of(grafana, "stalled")["annotations"]["dashboard_url"].startswith(f"{address}/d/{grafana.prefix}-")


def test_a_dry_run_writes_nothing(grafana: ServedGrafana, applied: Applied) -> None:
    """What would be made is told, also where the folder is not there yet, and is not there afterwards."""
    assert states(applied(dry_run=True)) == ["created", "created"]
    assert grafana.ask("GET", group_path(grafana)) is None


def test_another_threshold_is_an_update(grafana: ServedGrafana, applied: Applied) -> None:
    """Only the group that differs is written, and what differs is told."""
    applied()
    changed = applied(thresholds={"clip_ratio": 0.5})
    assert states(changed) == ["updated", "unchanged"]
    assert changed[0].detail == f"{grafana.prefix}-clipsaturated: data, annotations"
    assert states(applied(thresholds={"clip_ratio": 0.5})) == ["unchanged", "unchanged"]


def test_a_rule_of_another_version_goes_and_a_missing_one_comes(grafana: ServedGrafana, applied: Applied) -> None:
    """A group becomes what this version has, if all of it came over the API under our prefix."""
    applied()
    group = grafana.ask("GET", group_path(grafana))
    old, *rest = group["rules"]
    retired = old | {"uid": f"{grafana.prefix}-retired", "title": "GradiometerRetired"}
    grafana.ask("PUT", group_path(grafana), group | {"interval": 60, "rules": [*rest, retired]})
    (runs, _) = applied()
    assert runs.state == "updated"
    assert runs.detail == (
        f"interval 60 → 30 s; {old['uid']} was missing; {retired['uid']} is no rule of ours any more"
    )
    assert rule_of(grafana, "retired") is None
    assert states(applied()) == ["unchanged", "unchanged"]


def test_rules_of_somebody_else_are_kept(stub: Stub, grafana: ServedGrafana, applied: Applied) -> None:
    """Rules of a file, of nobody, of another folder, and a group with a strange rule in it are left, with a remedy."""
    applied()
    uid, sent = f"{grafana.prefix}-spike", len(stub.writes())
    for change, said in (
        ({"provenance": "file"}, f"the rule {uid} is of a provisioning file"),
        ({"provenance": ""}, f"the rule {uid} is somebody's own"),
        ({"provenance": "converted_prometheus"}, f"the rule {uid} is of converted_prometheus"),
        ({"folderUID": "other"}, f"the rule {uid} is in the folder other"),
        ({"uid": "mine"}, "the rule mine in it is not ours, and would be deleted: move it"),
    ):
        before = dict(stub.rules)
        rule = stub.rules.pop(uid) | {"for": "7m"} | change
        stub.rules[rule["uid"]] = rule
        (runs, monitor) = applied()
        assert (runs.state, monitor.state) == ("kept", "unchanged")
        assert said in runs.detail
        assert "leave out --alerts" in runs.detail or "move it" in runs.detail
        stub.rules = before
    assert len(stub.writes()) == sent


def test_grafanas_own_words_are_no_difference(stub: Stub, grafana: ServedGrafana, applied: Applied) -> None:
    """Durations written otherwise, another order and fields that are Grafana's do not make every apply a change."""
    applied()
    rule = stub.rules[f"{grafana.prefix}-layerexploding"]
    assert (rule["for"], rule["keep_firing_for"], rule["missingSeriesEvalsToResolve"]) == ("1m", "12m", 10)
    rule |= {"for": "60s", "id": 7, "orgID": 3, "updated": "2027-01-01T00:00:00Z", "guid": "x"}
    rule["data"][0]["model"]["legendFormat"] = "__auto"
    stub.rules = dict(reversed(stub.rules.items()))
    assert states(applied()) == ["unchanged", "unchanged"]
    for change in ({"for": "61s"}, {"labels": rule["labels"] | {"team": "a"}}, {"isPaused": True}, {"condition": "B"}):
        stub.rules[rule["uid"]] = rule | change
        (runs, _) = applied()
        assert (runs.state, runs.detail) == ("updated", f"{rule['uid']}: {next(iter(change))}")


def test_an_older_grafana_is_not_written_to_again_and_again(stub: Stub, applied: Applied) -> None:
    """What a release does not know of a rule is passed over there, and does not differ for ever."""
    stub.unknown_fields = ("keep_firing_for", "missingSeriesEvalsToResolve")
    assert states(applied()) == ["created", "created"]
    assert states(applied()) == ["unchanged", "unchanged"]


def test_rights_that_lack_are_named(stub: Stub, grafana: ServedGrafana, applied: Applied) -> None:
    """An Editor may; a Viewer's error names the role and the permissions, one a group."""
    assert grafana.token_file is not None
    grafana.token_file.write_text(token_of("Editor"))
    assert states(applied()) == ["created", "created"]
    grafana.token_file.write_text(token_of("Viewer"))
    failed = applied(job="other")
    assert states(failed) == ["unchanged", "failed"]
    assert "status 403" in failed[1].detail
    assert "the role Editor" in failed[1].detail
    assert "alert.provisioning:write" in failed[1].detail


def test_an_editor_need_not_read_the_datasource(stub: Stub, grafana: ServedGrafana) -> None:
    """Where it is not ours to make, an account that may not look at it is told so, and nothing fails."""
    assert grafana.token_file is not None
    grafana.token_file.write_text(token_of("Editor"))
    given = grafana.settings | {"alerts": True, "datasource_uid": source_of(grafana)}
    session = Grafana(GrafanaSettings.model_validate(given))
    changes = apply(session)[1]
    session.close()
    source = next(change for change in changes if change.what == "datasource")
    assert (source.state, "datasources:read" in source.detail) == ("unchanged", True)
    assert {change.state for change in changes if change.what != "datasource"} == {"created"}


def test_passing_failures_are_tried_again(stub: Stub, grafana: ServedGrafana, applied: Applied) -> None:
    """A group is written again after a pause; one whose answer was lost is found to be there."""
    stub.fault("PUT", "-runs", times=1, drop=True)
    stub.fault("PUT", "-monitor", times=2, status=503)
    pauses: list[float] = []
    assert states(applied(wait=pauses.append)) == ["unchanged", "created"]
    assert pauses == [1, 1, 2]
    assert len(stub.rules) == len(ALERTS)


def test_without_a_folder_there_are_no_rules(stub: Stub, applied: Applied) -> None:
    """Where the folder could not be made, rules are not put into nowhere."""
    stub.fault("POST", "/folders", status=403)
    failed = applied()
    assert states(failed) == ["failed", "failed"]
    assert "no folder" in failed[0].detail
    assert not stub.rules


def test_the_command(grafana: ServedGrafana, command: Command) -> None:
    """The exit status is that of the dashboards: to be done, done, nothing to do."""
    options = ("--datasource-uid", source_of(grafana), "--set", "spike_ratio=20", "--runbook-url", "https://r.example")
    dry = command(*options, "--dry-run")
    assert dry.exit_code == 4, dry.stderr
    done = command(*options, "--json")
    assert done.exit_code == 0, done.stderr
    alerts = [change for change in json.loads(done.stdout)["changes"] if change["what"] == "alerts"]
    assert [(each["uid"], each["state"]) for each in alerts] == [
        (f"{grafana.prefix}-runs", "created"),
        (f"{grafana.prefix}-monitor", "created"),
    ]
    assert rule_of(grafana, "spike")["annotations"]["runbook_url"] == "https://r.example/Spike"
    again = command(*options, "--dry-run")
    assert again.exit_code == 0, again.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "--alerts: expected a datasource_uid or prometheus_url too"),
        (("--set", "spik=1"), "--set: there is no threshold 'spik'"),
        (("--set", "clip_ratio=90"), "--set: clip_ratio='90' is not a number from 0 to 1"),
        (("--job", "("), "--job: '(' is no regular expression"),
        (("--by", "rank"), "--by: 'rank' is a label that alerts have"),
        (("--runbook-url", "r"), "--runbook-url: 'r' is no address"),
        (("--grafana-url", "http://me:hunter22@g"), "--grafana-url: it holds a user or a password"),
        (("--datasource-uid", "some", "--uid-prefix", "x" * 23), "uid_prefix of at most 22 characters"),
    ],
)
def test_the_command_says_what_is_wrong(command: Command, given: tuple[str, ...], said: str) -> None:
    """A usage error names the option, and sends nothing."""
    done = command(*given)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "hunter22" not in done.stderr


def test_options_of_rules_need_rules() -> None:
    """A threshold that would go nowhere is a usage error."""
    done = CliRunner().invoke(app, ["grafana", "apply", "--url", "http://a:b@127.0.0.1:1", "--set", "spike_ratio=2"])
    assert (done.exit_code, "--alerts: expected it too" in done.stderr) == (2, True)


def test_the_longest_prefix_leaves_room_for_every_rule() -> None:
    """No rule's uid is longer than Grafana takes, and the bound is no tighter than that."""
    assert ALERTS_PREFIX + 1 + max(len(alert.name) for alert in ALERTS) == 40


def test_the_monitors_config(tmp_path: Path) -> None:
    """The section has the same settings; thresholds are given by name, and what is wrong is refused by its place."""
    (config := tmp_path / "monitor.yaml").write_text(
        "grafana:\n  url: http://me:pw@g.example\n  alerts: true\n  prometheus_url: http://p:9090\n"
        "  alert_rules: {by: [cluster], thresholds: {spike_ratio: 20, warm_up_steps: 10}}\n"
    )
    section = resolve(tmp_path, config).grafana
    assert section is not None
    assert (section.rules.thresholds.spike_ratio, section.rules.thresholds.warm_up_steps) == (20, 10)
    assert section.rules.datasource_uid == "gradiometer-prometheus"
    assert section.rules.grafana_url == "http://g.example"
    config.write_text(config.read_text().replace("warm_up_steps: 10", "warm_up_steps: 1.5") + "  apply: false\n")
    with pytest.raises(SettingsError) as caught:
        resolve(tmp_path, config)
    assert "grafana.alert_rules.thresholds" in str(caught.value)
    assert "grafana.alerts" in str(caught.value)
