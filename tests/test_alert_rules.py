"""The alert rules, run by promtool over literal series: each fires, resolves, and is silent when nothing is wrong."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from gradiometer_dashboards.rules import ALERTS, Settings, prometheus_rules
from tests._alert_cases import Case, cases
from tests._alert_series import MINUTES, samples

pytestmark = pytest.mark.native

CASES = {case.name: case for case in cases()}
FIRING = 'count by (alertname, job) (ALERTS{alertstate="firing"})'
FOUND = re.compile(r'\{alertname="Gradiometer(\w+)", job="gradiometer-([^"]+)"\} (\S+?)(?:,|$)', re.MULTILINE)
MOMENT = re.compile(r"time: ([\dhms]+),")

Timeline = dict[str, dict[str, dict[float, int]]]
"""By case and alert, the minutes at which it fires, and how many of it."""
Simulate = Callable[..., Timeline]


@pytest.fixture(scope="module")
def simulate(native_binary: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Simulate:
    """Give a function that lets promtool evaluate rules over cases, all at once, and returns what fires when."""
    promtool = native_binary("promtool")

    def run(rules: str, chosen: Iterable[Case]) -> Timeline:
        folder = tmp_path_factory.mktemp("rules")
        (folder / "rules.yml").write_text(rules)
        (folder / "test.yml").write_text(json.dumps(_unit_test(list(chosen))))
        done = subprocess.run(
            [promtool, "test", "rules", folder / "test.yml"], capture_output=True, text=True, timeout=120, check=False
        )
        assert "FAILED" in done.stdout + done.stderr, done.stderr
        return _timeline(done.stdout + done.stderr)

    return run


def _unit_test(chosen: list[Case]) -> dict[str, Any]:
    """Write a unit test, of which JSON is YAML too, that expects nothing ever to fire: promtool then tells what does."""
    series = [
        {"series": name.replace('job="J"', f'job="gradiometer-{case.name}"'), "values": samples(row)}
        for case in chosen
        for name, row in case.rows.items()
    ]
    moments = [{"expr": FIRING, "eval_time": f"{30 * place}s"} for place in range(2 * MINUTES + 1)]
    group = {"interval": "30s", "input_series": series, "promql_expr_test": moments}
    return {"rule_files": ["rules.yml"], "evaluation_interval": "30s", "tests": [group]}


def _timeline(text: str) -> Timeline:
    found: Timeline = {}
    minute = 0.0
    for line in text.splitlines():
        if moment := MOMENT.search(line):
            minute = _minutes(moment[1])
        assert "err" not in line or "errors" in line.lower(), line
        for alert, case, count in FOUND.findall(line):
            found.setdefault(case, {}).setdefault(alert, {})[minute] = int(float(count))
    return found


def _minutes(duration: str) -> float:
    parts = {unit: int(number) for number, unit in re.findall(r"(\d+)([hms])", duration)}
    return 60 * parts.get("h", 0) + parts.get("m", 0) + parts.get("s", 0) / 60


@pytest.fixture(scope="module")
def timeline(simulate: Simulate) -> Timeline:
    """Give what fires when, over all cases, by the rules as they are shipped."""
    return simulate(prometheus_rules(Settings()), CASES.values())


@pytest.mark.parametrize("name", CASES)
def test_fires_when_it_should_and_only_then(name: str, timeline: Timeline) -> None:
    """An alert fires from when on it must, once, until it must not; no other one ever does."""
    assert _wrong(CASES[name], timeline.get(name, {})) == []


def _wrong(case: Case, fired: dict[str, dict[float, int]]) -> list[str]:
    """Say in which ways what fired is not what the case expects."""
    wrong = []
    may = {case.of, *case.allowed} if case.fires is not None else set(case.allowed)
    wrong += [f"{alert} fires at {sorted(when)}" for alert, when in fired.items() if alert not in may]
    wrong += [
        f"{alert} fires more than once" for alert, when in fired.items() if max(when.values()) > _instances(alert)
    ]
    if case.fires is None:
        return wrong
    when = fired.get(case.of, {})
    must = [case.fires + 0.5 * place for place in range(int(2 * case.holds) + 1)]
    wrong += [f"{case.of} does not fire at {at}, but at {sorted(when)}" for at in must if at not in when]
    for alert, at in fired.items():
        wrong += [f"{alert} still fires at {max(at)}"] if max(at) >= case.quiet < MINUTES else []
    wrong += [f"{case.of} fires at {min(when)} already"] if when and min(when) < case.fires - 2.5 else []
    return wrong


def _instances(alert: str) -> int:
    """Say how many of an alert may fire in a case: one a run, and one a host of what is about hosts."""
    return 2 if alert == "MonitorDown" else 1


def test_every_alert_has_cases() -> None:
    """No alert is without a case in which it must fire."""
    assert {alert.name for alert in ALERTS} == {case.of for case in CASES.values() if case.fires is not None}
