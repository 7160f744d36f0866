"""Alerts lead to actions in the runs they name: once a firing, within limits, and never lost."""

from __future__ import annotations

import json
import secrets
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from gradiometer import Agent, open_run
from gradiometer.live.control import request_policy
from gradiometer.live.requests import waiting
from gradiometer_monitor.alerts import service as alerts_service
from gradiometer_monitor.alerts.desk import FullError
from gradiometer_monitor.config.settings import SettingsError, resolve
from tests._alerts import Bench, alert, notification, post
from tests._training import attach, small_model, train

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Start, WaitUntil, WriteRun

TIGHT: list[Any] = [{"nonfinite": {}}, {"global_norm": {"max_norm": 0.01}}]
FIRST: list[Any] = [{"global_norm": {"max_norm": 1.0}}]
POLICY = {"name": "tighten", "action": "policy", "policy": TIGHT}
SAVE, STOP = {"name": "save", "action": "checkpoint"}, {"name": "stop", "action": "stop"}


class Job:
    """A training of this process, whose steps are taken while a test waits for something."""

    def __init__(self, root: Path) -> None:
        self.model = small_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.001)
        self.agent: Agent = attach(root, self.model, self.optimizer, run_id="run", policy=FIRST)
        self.saved = 0

    def until(self, check: Callable[[], Any], seconds: float = 30.0) -> Any:
        """Train, heeding checkpoints, until a check finds something; return that."""
        self.agent.requested("stop")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            train(self.model, self.optimizer, [0])
            if self.agent.requested("checkpoint"):
                self.saved += 1
                self.agent.done("checkpoint", "here")
            if found := check():
                return found
        raise AssertionError("nothing came of it")

    @property
    def policies(self) -> list[Any]:
        return [each.policy and each.policy["pipeline"] for each in open_run(self.agent.path).history.revisions]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Give a training that can be asked."""
    found = Job(tmp_path)
    yield found
    found.agent.detach()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    """Give a function that makes a service of alerts over ``tmp_path``; closed in the end."""
    made: list[Bench] = []

    def make(*rules: dict[str, Any], **settings: Any) -> Bench:
        made.append(Bench(tmp_path, *rules, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


MakeBench = Callable[..., Bench]


def test_a_policy_is_put_in_force_once_a_firing(job: Job, bench: MakeBench) -> None:
    """An alert that is notified again and again changes the policy once; the next firing changes it again."""
    found = bench(POLICY)
    first = alert(start="2026-11-23T01:00:00Z")
    found.post(first)
    job.until(lambda: found.turn() == ["asked", "applied"])
    for _ in range(3):
        found.post(first)
        found.turn()
    assert found.counted("repeated") == 3
    assert job.policies == [FIRST, TIGHT]
    asked, applied = found.told
    assert asked.data["summary"] == "Spike in run"
    assert asked.data["request"] == applied.data["request"]
    assert applied.step == open_run(job.agent.path).history.newest.step
    assert (applied.data["rule"], applied.data["alert"], applied.data["action"]) == ("tighten", "Spike", "policy")
    found.post(alert(start="2026-11-23T01:30:00Z"))
    job.until(lambda: found.turn()[2:] == ["asked", "applied"])


def test_resolved_restores_what_was_in_force(job: Job, bench: MakeBench) -> None:
    """The policy from before comes back when the last alert of the rule is resolved, and not while another fires."""
    found = bench({**POLICY, "on_resolved": "restore", "cooldown_seconds": 600})
    one, two = (alert(layer=layer, start="2026-11-23T01:00:00Z") for layer in ("a", "b"))
    found.post(one, two)
    job.until(lambda: found.turn() == ["asked", "applied", "cooled_down"])
    found.post(one | {"status": "resolved"})
    found.turn()
    assert job.policies == [FIRST, TIGHT]
    found.post(two | {"status": "resolved"})
    job.until(lambda: found.turn()[3:] == ["asked", "applied"])
    assert job.policies == [FIRST, TIGHT, FIRST]
    assert [event.data["action"] for event in found.told[3:]] == ["restore", "policy"]


def test_what_somebody_has_changed_since_stays(job: Job, bench: MakeBench) -> None:
    """A policy that a person has put in force meanwhile is not taken away by a resolved alert."""
    found = bench({**POLICY, "on_resolved": "restore"})
    first = alert()
    found.post(first)
    job.until(lambda: found.turn() == ["asked", "applied"])
    request_policy(job.agent.path, None, by="a person")
    job.until(lambda: job.policies[-1] is None)
    found.post(first | {"status": "resolved"})
    found.turn()
    assert found.outcomes[2:] == ["superseded"]
    assert "a person" in found.told[-1].message
    assert job.policies == [FIRST, TIGHT, None]


def test_a_checkpoint_and_then_a_stop(job: Job, bench: MakeBench) -> None:
    """Two rules that match one alert act in their order, and the loop's answers are told."""
    found = bench(SAVE, STOP)
    found.post(alert())
    job.until(lambda: found.turn() and job.agent.requested("stop"))
    assert job.saved == 1
    job.agent.detach()
    found.turn()
    assert [(event.data["rule"], event.data["outcome"]) for event in found.told] == [
        ("save", "asked"),
        ("stop", "asked"),
        ("save", "applied"),
        ("stop", "applied"),
    ]
    assert "here" in found.told[2].message


def test_two_policies_are_asked_for_one_after_the_other(job: Job, bench: MakeBench) -> None:
    """Of two rules that change the policy the second waits for the answer to the first; none is passed over."""
    found = bench(POLICY, {"name": "off", "action": "policy", "policy": "none"})
    found.post(alert())
    job.until(lambda: found.turn() == ["asked", "applied"] * 2)
    assert job.policies == [FIRST, TIGHT, None]


def test_dry_run_asks_nothing(job: Job, bench: MakeBench) -> None:
    """What would be done is told, once a firing, and is done when dry_run is taken away and the alert still fires."""
    found, first = bench({**POLICY, "on_resolved": "restore"}, SAVE, dry_run=True), alert()
    for _ in range(2):
        found.post(first)
        found.turn()
    assert found.outcomes == ["dry_run"] * 2
    assert found.counted("dry_run") == 4
    found.post(first | {"status": "resolved"})
    assert found.turn() == ["dry_run"] * 3
    assert "restore" in found.told[-1].message
    assert not (job.agent.path / "control.json").exists()
    assert waiting(job.agent.path) == {}
    found.close()
    again = bench(POLICY)
    again.post(first)
    job.until(lambda: again.turn()[3:] == ["asked", "applied"])


def test_limits(job: Job, bench: MakeBench) -> None:
    """A rule rests after it acted on a run, also over a restart, and acts no oftener in an hour than it may."""
    found = bench({**SAVE, "cooldown_seconds": 600})
    found.post(alert())
    job.until(lambda: found.turn() == ["asked", "applied"])
    found.close()
    again = bench({**SAVE, "cooldown_seconds": 600}, {**SAVE, "name": "rarely", "max_per_hour": 2})

    def applied(count: int) -> Callable[[], bool]:
        return lambda: again.turn().count("applied") == count

    for place, count in enumerate((2, 3, 3, 3)):  # a checkpoint that the loop has not seen yet is not asked for twice
        again.post(alert(layer=str(place)))
        job.until(applied(count))
    told = [(event.data["rule"], event.data["outcome"]) for event in again.told[2:]]
    assert told.count(("save", "cooled_down")) == 4
    assert told.count(("rarely", "limited")) == 2
    assert told.count(("rarely", "asked")) == 2


def test_alerts_of_other_hosts_and_names_that_are_paths(
    tmp_path: Path, bench: MakeBench, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """A run that is not here is counted and no error; what is no run id, or leads elsewhere, is nobody's."""
    write_run(make_manifest("real"), np.ones((2, 4)))
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    found = bench(STOP)
    accepted = found.post(alert("elsewhere"), alert("linked"), alert("../real"), alert(""), alert(".monitor"))
    assert (accepted.queued, accepted.unmatched) == (2, 3)
    assert found.turn() == []
    assert found.counted("elsewhere") == 2
    assert not list(tmp_path.rglob("request-*"))


def test_a_run_of_another_host_in_a_shared_directory(
    bench: MakeBench, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """With own_host_only a run that another host writes is left to that one's monitor."""
    write_run(make_manifest("run", host="other"), np.ones((2, 4)))
    found = bench(STOP, own_host_only=True)
    found.post(alert())
    assert found.turn() == []
    assert found.counted("elsewhere") == 1


def test_a_run_that_is_over(bench: MakeBench, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """Nobody is asked in a run that is over; an event says so, once a firing."""
    write_run(make_manifest("run"), np.ones((2, 4)), close=True)
    found, first = bench(STOP), alert()
    for _ in range(2):
        found.post(first)
        found.turn()
    (event,) = found.told
    assert event.data["outcome"] == "refused"
    assert "does not run any more" in event.message


def test_a_job_that_refuses(job: Job, bench: MakeBench, wait_until: WaitUntil) -> None:
    """The reasons of the job that was asked are told."""
    job.agent.requested("stop")
    job.agent._live._since -= 1000
    found = bench(SAVE)
    found.post(alert())

    def refused() -> bool:
        train(job.model, job.optimizer, [0])
        return found.turn() == ["asked", "refused"]

    wait_until(refused)
    assert "agent.requested('checkpoint')" in found.told[-1].message


def test_a_policy_that_does_not_fit_the_model(job: Job, bench: MakeBench) -> None:
    """A pattern that covers no parameter of the run is refused before the job hears of it."""
    found = bench({**POLICY, "policy": [{"global_norm": {"max_norm": 1, "match": "head.*"}}]})
    found.post(alert())
    assert found.turn() == ["refused"]
    assert "head.*" in found.told[0].message
    assert not (job.agent.path / "control.json").exists()


def test_a_run_that_ends_before_it_answers(
    job: Job, bench: MakeBench, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    """What was asked and is never answered is told, at the run's end or after answer_seconds."""
    monkeypatch.setattr(alerts_service, "OVER_SECONDS", 0.0)
    found = bench(STOP)
    found.post(alert())
    assert found.turn() == ["asked"]
    job.agent.detach()
    wait_until(lambda: found.turn() == ["asked", "unanswered"])
    assert "ended before" in found.told[-1].message


def test_killed_between_acceptance_and_action(job: Job, bench: MakeBench) -> None:
    """A monitor that ends after it accepted an alert does after its restart what the alert calls for."""
    found = bench(POLICY)
    found.post(alert())
    found.close()
    found = bench(POLICY)
    job.until(lambda: found.turn() == ["asked", "applied"])
    assert job.policies == [FIRST, TIGHT]


def test_killed_between_action_and_its_note(job: Job, bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A monitor that ends when it has asked, and could not note it, asks again, and the job does it once."""
    found = bench(SAVE)

    def killed(*_: object, **__: object) -> None:
        raise sqlite3.OperationalError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(found.context.events, "tell", killed)
        found.post(alert())
        with pytest.raises(sqlite3.OperationalError):
            found.turn()
    job.until(lambda: job.saved == 1)
    found.close()
    again = bench(SAVE)
    job.until(lambda: again.turn() == ["asked", "applied"])
    train(job.model, job.optimizer, range(200))
    job.until(lambda: not waiting(job.agent.path))
    assert job.saved == 1


def test_what_is_too_old_is_not_done(job: Job, bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An alert that waited while the monitor was down for long is told to be too old, and done if it still fires."""
    found, first = bench(SAVE), alert()
    found.post(first)
    now = time.time
    monkeypatch.setattr("gradiometer_monitor.alerts.service.time.time", lambda: now() + 3600)
    assert found.turn() == ["expired"]
    monkeypatch.undo()
    found.post(first)
    job.until(lambda: found.turn() == ["expired", "asked", "applied"])


def test_many_at_once(job: Job, bench: MakeBench) -> None:
    """The same firing, posted by many threads while the service works, leads to one action."""
    found, first = bench(SAVE), alert()
    with ThreadPoolExecutor(8) as pool:
        accepted = list(pool.map(lambda _: found.post(first), range(40)))
    assert sum(each.queued for each in accepted) == 40
    job.until(lambda: found.turn() == ["asked", "applied"])
    assert found.counted("repeated") == 39
    assert {name: value for name, _, value in found.service.samples()}["gradiometer_alerts_queued"] == 0


def test_a_full_queue_is_for_later(bench: MakeBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be kept is refused as a whole, so that it is sent again."""
    monkeypatch.setattr(alerts_service, "MAX_QUEUED", 2)
    found = bench(STOP)
    found.post(alert(), alert())
    with pytest.raises(FullError, match="2 alerts wait already"):
        found.post(alert())
    found.turn()
    assert found.post(alert()).queued == 1


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"name": "a", "alertname": "A", "action": "dance"}, "'policy', 'checkpoint' or 'stop'"),
        ({"name": "a", "alertname": "A", "action": "policy"}, "'policy' is needed with the action 'policy'"),
        ({"name": "a", "alertname": "A", "action": "stop", "policy": "none"}, "and with no other"),
        ({"name": "a", "action": "stop"}, "would match every alert"),
        ({"name": "a", "alertname": "A", "action": "stop", "on_resolved": "restore"}, "needs the action 'policy'"),
        ({"name": "a b", "alertname": "A", "action": "stop"}, "'a b'"),
        ({"name": "a", "labels_regex": {"job": "("}, "action": "stop"}, "no regular expression"),
        ({"name": "a", "alertname": "A", "action": "policy", "policy": [{"global_nrom": {}}]}, "global_norm"),
        ({"name": "a", "alertname": "A", "action": "policy", "policy": "missing.yaml"}, "missing.yaml"),
        ({"name": "a", "alertname": "A", "action": "stop", "cooldown_seconds": -1}, "from 0 to 604800"),
    ],
)
def test_wrong_rules_are_refused(tmp_path: Path, rule: dict[str, Any], said: str) -> None:
    """A rule that cannot work is told when the settings are read, by its place."""
    (tmp_path / "monitor.yaml").write_text(json.dumps({"alerts": {"rules": [rule]}}))
    with pytest.raises(SettingsError, match=r"alerts\.rules") as caught:
        resolve(tmp_path, tmp_path / "monitor.yaml")
    assert said in str(caught.value)


def test_two_rules_of_one_name(tmp_path: Path) -> None:
    """Names are what events and metrics go by."""
    (tmp_path / "monitor.yaml").write_text(json.dumps({"alerts": {"rules": [{**STOP, "alertname": "A"}] * 2}}))
    with pytest.raises(SettingsError, match="2 rules have the name 'stop'"):
        resolve(tmp_path, tmp_path / "monitor.yaml")


@pytest.mark.parametrize(
    ("rule", "matches"),
    [
        ({"alertname": "Spike"}, True),
        ({"alertname": "Spik"}, False),
        ({"labels": {"team": "a"}}, True),
        ({"labels": {"team": "a", "gone": ""}}, False),
        ({"labels_regex": {"team": "a|b", "gone": ""}}, True),
        ({"labels_regex": {"alertname": "Sp"}}, False),
        ({"labels_regex": {"alertname": "Sp.*"}, "labels": {"team": "b"}}, False),
    ],
)
def test_what_a_rule_matches(bench: MakeBench, rule: dict[str, Any], matches: bool) -> None:
    """Labels are equal or match as a whole; all that a rule says must hold."""
    found = bench({**STOP, "alertname": None, **rule})
    assert found.post(alert(team="a")).queued == matches


def _configure(tmp_path: Path, **alerts: Any) -> tuple[str, str, str]:
    """Write tokens and settings of a daemon with one rule; return the path, and the tokens that read and post."""
    tokens = tmp_path.with_name(f"{tmp_path.name}-tokens")
    tokens.write_text(f"read dashboards {secrets.token_urlsafe(32)}\nalerts alertmanager {secrets.token_urlsafe(32)}\n")
    tokens.chmod(0o600)
    config = tmp_path.with_name(f"{tmp_path.name}.yaml")
    rule = {**POLICY, "alertname": "Spike"}
    config.write_text(json.dumps({"auth": {"tokens_file": str(tokens)}, "alerts": {"rules": [rule], **alerts}}))
    read, alerts_token = (line.split()[2] for line in tokens.read_text().splitlines())
    return str(config), read, alerts_token


def test_a_reload_changes_the_rules(tmp_path: Path, job: Job, start: Start, wait_until: WaitUntil) -> None:
    """After SIGHUP the new rules hold, and a firing that was a dry run before is acted on when it is repeated."""
    config, read, told = _configure(tmp_path, dry_run=True)
    monitor, first = start("--config", config), alert()

    def counted(outcome: str, count: int = 1) -> bool:
        text = monitor.get("/metrics", Authorization=f"Bearer {read}")[1].decode()
        return f'{{rule="tighten",outcome="{outcome}"}} {count}\n' in text

    assert post(monitor.url, notification(first), told)[0] == 200
    wait_until(lambda: counted("dry_run"))
    path = Path(config)
    path.write_text(path.read_text().replace('"dry_run": true', '"dry_run": false'))
    monitor.process.send_signal(signal.SIGHUP)
    wait_until(lambda: counted("dry_run", 0))  # of the service that has the new rules
    assert post(monitor.url, notification(first), told)[0] == 200
    job.until(lambda: job.policies == [FIRST, TIGHT])
    wait_until(lambda: counted("applied"))


def test_the_webhook(tmp_path: Path, job: Job, start: Start, wait_until: WaitUntil) -> None:
    """The daemon takes what has a token that may post, says what is wrong with anything else, and acts."""
    config, read, told = _configure(tmp_path)
    monitor = start("--config", config)
    assert post(monitor.url, notification(alert()))[0] == 401
    assert post(monitor.url, notification(alert()), read)[0] == 403
    assert post(monitor.url, b"{", told)[0] == 422
    assert post(monitor.url, notification(version="5"), told)[0] == 422
    many = notification(alert(), alert("other"), alert(name="Else"), truncatedAlerts=7)
    assert post(monitor.url, many, told) == (200, {"queued": 2, "unmatched": 1})
    job.until(lambda: job.policies == [FIRST, TIGHT])
    authorized = {"Authorization": f"Bearer {read}"}

    def outcomes() -> list[str]:
        found = json.loads(monitor.get("/api/v1/runs/run/events?kind=alert_action", **authorized)[1])["events"]
        return [event["data"]["outcome"] for event in found]

    wait_until(lambda: outcomes() == ["asked", "applied"])

    def scraped() -> dict[tuple[str, ...], float]:
        text = monitor.get("/metrics", **authorized)[1].decode()
        assert told not in text
        families = text_string_to_metric_families(text)
        return {
            (s.name.removeprefix("gradiometer_alert"), *s.labels.values()): s.value for f in families for s in f.samples
        }

    wait_until(lambda: scraped()["s_queued",] == 0)  # also what concerns nobody here was seen to
    samples = scraped()
    assert samples["s_received_total", "firing"] == 3
    assert samples["s_truncated_total",] == 7
    assert samples["s_unmatched_total",] == 1
    outcomes_of = {labels[1]: value for (name, *labels), value in samples.items() if name == "_actions_total"}
    assert {name for name, value in outcomes_of.items() if value} == {"asked", "applied", "elsewhere"}
    assert len(outcomes_of) == len(alerts_service.OUTCOMES)


def test_a_monitor_without_rules_or_tokens(start: Start) -> None:
    """Without tokens nothing can be done through the monitor, and the answer says how that is changed."""
    code, answer = post(start().url, notification(alert()))
    assert code == 403
    assert "auth.tokens_file" in answer["detail"]
