"""The alert rules, run by promtool over literal series: each fires, resolves, and is silent when nothing is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from gradiometer_dashboards.rules import ALERTS, Settings, prometheus_rules
from gradiometer_dashboards.rules.annotations import fill
from gradiometer_dashboards.rules.of_gradients import NONFINITE_LAYERS
from gradiometer_dashboards.thresholds import THRESHOLDS
from tests._alert_cases import Case, cases
from tests._alert_series import MINUTES, samples

if TYPE_CHECKING:
    from tests.conftest import Promtool

pytestmark = pytest.mark.native

CASES = {case.name: case for case in cases()}
FIRING = 'count by (alertname, job) (ALERTS{alertstate="firing"})'
FOUND = re.compile(r'\{alertname="Gradiometer(\w+)", job="gradiometer-([^"]+)"\} (\S+?)(?:,|$)', re.MULTILINE)
MOMENT = re.compile(r"time: ([\dhms]+),")

Timeline = dict[str, dict[str, dict[float, int]]]
"""By case and alert, the minutes at which it fires, and how many of it."""
Simulate = Callable[..., Timeline]


@pytest.fixture(scope="module")
def simulate(promtool: Promtool, tmp_path_factory: pytest.TempPathFactory) -> Simulate:
    """Give a function that lets promtool evaluate rules over cases, all at once, and returns what fires when."""

    def run(rules: str, chosen: Iterable[Case]) -> Timeline:
        folder = tmp_path_factory.mktemp("rules")
        (folder / "rules.yml").write_text(rules)
        (folder / "test.yml").write_text(json.dumps(_unit_test(list(chosen))))
        done = promtool("test", "rules", folder / "test.yml")
        assert "Unit Testing" in done.stdout, done.stderr
        return _timeline(done.stdout + done.stderr)

    return run


def _unit_test(chosen: list[Case]) -> dict[str, Any]:
    """Write a unit test, of which JSON is YAML too, that expects nothing ever to fire: promtool tells what does."""
    series = [
        {"series": name.replace('job="J"', f'job="gradiometer-{case.name}"'), "values": samples(row)}
        for case in chosen
        for name, row in case.rows.items()
    ]
    moments = [{"expr": FIRING, "eval_time": f"{minute}m"} for minute in range(MINUTES + 1)]
    group = {"interval": "30s", "input_series": series, "promql_expr_test": moments}
    return {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [group]}


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
    must = range(ceil(case.fires), int(case.fires + case.holds) + 1)
    wrong += [f"{case.of} does not fire at {at}, but at {sorted(when)}" for at in must if at not in when]
    for alert, at in fired.items():
        wrong += [f"{alert} still fires at {max(at)}"] if max(at) >= case.quiet < MINUTES else []
    wrong += [f"{case.of} fires at {min(when)} already"] if when and min(when) < case.fires - 2.5 else []
    return wrong


def _instances(alert: str) -> int:
    """Say how many of an alert may fire in a case: one a run, and one a host of what is about hosts."""
    return 2 if alert == "MonitorDown" else 1


def test_annotations_name_whom_it_is_about(
    promtool: Promtool, tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    """Labels, texts and links of each alert are as in the golden file: layers, ranks and policies by name."""
    first = {alert.name: CASES[f"{alert.name}-alone"] for alert in ALERTS}
    unit_test = _unit_test(list(first.values()))
    group = unit_test["tests"][0]
    del group["promql_expr_test"]
    group["alert_rule_test"] = [
        {"alertname": f"Gradiometer{name}", "eval_time": f"{ceil(case.fires or 0)}m", "exp_alerts": []}
        for name, case in first.items()
    ]
    (tmp_path / "rules.yml").write_text(prometheus_rules(Settings()))
    (tmp_path / "test.yml").write_text(json.dumps(unit_test))
    done = promtool("test", "rules", tmp_path / "test.yml")
    found = re.findall(r"^ +(?:Labels|Annotations):(\{.*\})", done.stdout + done.stderr, re.MULTILINE)
    written = [" ".join(re.sub(r'([{ ])(\w+)="', r'\n\1  \2="', text).split(" " * 9)) for text in found]
    assert "error expanding" not in done.stdout + done.stderr
    golden("alerts.txt", "\n".join(written) + "\n")


ORIGINS = [
    ("born", "_x40 2x80", {19: {}, 20: {"head": 2}, 29: {"head": 2}, 30: {}}),
    ("gains", "3x39 4x80", {19: {}, 20: {"head": 1}, 29: {"head": 1}, 30: {}}),
    ("born before a gap", "_x38 2x3 _x14 2x60", {20: {"head": 2}, 25: {"head": 2}, 28: {"head": 2}, 40: {}}),
    ("gains in a gap", "1x39 _x20 4x60", {25: {}, 30: {"head": 3}, 39: {"head": 3}, 40: {}}),
    ("restarts", "5x39 _x4 1x80", {19: {}, 22: {"head": 1}, 28: {"head": 1}, 33: {}}),
    ("leaves", "_x40 2x10 stale", {25: {"head": 2}, 29: {"head": 2}, 31: {}}),
    ("known when first scraped", "2x80", {1: {"head": 2}, 9: {"head": 2}, 11: {}}),
    ("a host leaves", "5x110 | 7x30 stale", {14: {}, 20: {}, 30: {}, 50: {}}),
    ("a host comes", "5x110 | _x40 5x80", {14: {}, 22: {}, 32: {}}),
    ("none", "_x80", {20: {}}),
]
BEGUN_ANEW = [
    ("fewer", "5x19 stale _x49 1x80", {34: {}, 35: {"head": 1}, 44: {"head": 1}, 46: {}}),
    ("as many", "1x19 stale _x49 1x80", {34: {}, 35: {"head": 1}, 44: {"head": 1}, 46: {}}),
    ("as many soon", "1x19 stale _x11 1x80", {15: {}, 17: {"head": 1}, 24: {"head": 1}, 30: {}}),
    ("not there", "1x19 stale", {25: {}, 35: {}}),
    ("not there yet", "1x119", {15: {}, 30: {}}),
]


@pytest.mark.parametrize(("values", "named"), [case[1:] for case in ORIGINS], ids=[case[0] for case in ORIGINS])
def test_where_it_began_is_named_while_it_is_news(
    promtool: Promtool, tmp_path: Path, values: str, named: dict[int, dict[str, float]]
) -> None:
    """A counter that is born with what it counted is named for ten minutes, like one that gains; not again after."""
    _check_named(promtool, tmp_path, values.split(" | "), "5000+300x120", named)


@pytest.mark.parametrize(("values", "named"), [case[1:] for case in BEGUN_ANEW], ids=[case[0] for case in BEGUN_ANEW])
def test_where_it_began_is_named_in_a_run_begun_anew(
    promtool: Promtool, tmp_path: Path, values: str, named: dict[int, dict[str, float]]
) -> None:
    """It is news though the counter has no more than before the run began anew, after five minutes of pause."""
    steps = "5000+300x119" if "stale" not in values else "5000+300x19 stale _x9 300+300x90"
    _check_named(promtool, tmp_path, [values], steps, named)


def _check_named(
    promtool: Promtool, tmp_path: Path, values: Sequence[str], steps: str, named: dict[int, dict[str, float]]
) -> None:
    """Ask who is named at some minutes, of the counter of a layer on hosts, which all have taken the same steps."""
    of = 'job="J", run_id="r"'
    series = [
        {"series": f"gradiometer_{name}", "values": each}
        for host, counter in zip("ab", values, strict=False)
        for name, each in (
            (f'nonfinite_origin_total{{{of}, layer="head", instance="{host}"}}', counter),
            (f'steps_total{{{of}, instance="{host}"}}', steps),
        )
    ]
    tests = [
        {
            "expr": fill(NONFINITE_LAYERS, by="layer", of=of),
            "eval_time": f"{minute}m",
            "exp_samples": [{"labels": f'{{layer="{layer}"}}', "value": value} for layer, value in found.items()],
        }
        for minute, found in named.items()
    ]
    group = {"interval": "30s", "input_series": series, "promql_expr_test": tests}
    (tmp_path / "test.yml").write_text(json.dumps({"tests": [group]}))
    done = promtool("test", "rules", tmp_path / "test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_limit_that_is_raised_is_noticed(simulate: Simulate) -> None:
    """With each alert's limit higher, none fires in its first case: every limit is tested from above."""
    first = {alert.name: CASES[f"{alert.name}-alone"] for alert in ALERTS}
    found = simulate(_with_limits(lambda limit: limit * 1.7 or 1.0), first.values())
    assert [name for name, case in first.items() if name in found.get(case.name, {})] == []


def test_a_limit_that_is_lowered_is_noticed(simulate: Simulate) -> None:
    """With each alert's limit lower, each fires in the case that is just below it: all but two that count
    what is wrong, and have no value where nothing is."""
    below = {alert.name: CASES.get(f"{alert.name}-below", CASES["healthy"]) for alert in ALERTS}
    found = simulate(
        _with_limits(lambda limit: limit * 0.6 or -1.0), {case.name: case for case in below.values()}.values()
    )
    unnoticed = [name for name, case in below.items() if name not in found.get(case.name, {})]
    assert unnoticed == ["LossNonFinite", "MonitorDegraded"]


def _with_limits(change: Callable[[float], float]) -> str:
    """Write the rules with other limits."""
    document = yaml.safe_load(prometheus_rules(Settings()))
    limits = {alert.alertname: alert.limit for alert in ALERTS}
    for rule in (rule for group in document["groups"] for rule in group["rules"] if "alert" in rule):
        expr, _, limit = rule["expr"].rpartition(" > ")
        assert float(limit) == limits[rule["alert"]]
        rule["expr"] = f"{expr} > {change(float(limit))}"
    return json.dumps(document)


@pytest.mark.parametrize(
    ("threshold", "value", "name"),
    [
        ("spike_deviations", 10, "noisy"), ("spike_deviations", 400, "Spike-alone"),
        ("warm_up_steps", 0, "warm-up"), ("warm_up_steps", 10**6, "Spike-alone"),
        ("scaled_nonfinite_ratio", 0.0005, "scaler"), ("scaled_nonfinite_ratio", 0.2, "scaler-overflows"),
        ("stalled_steps", 0.5, "slow"), ("stalled_steps", 10_000, "Stalled-alone"),
        ("starting_seconds", 600, "starting"), ("starting_seconds", 18_000, "stuck-at-start"),
        ("rank_deviation", 0.04, "RankDivergence-below"), ("rank_deviation", 0.1, "hosts"),
        ("rank_steps_behind", 4, "slow-ranks"), ("rank_steps_behind", 200, "behind"),
        ("rank_seconds_behind", 5, "fast-ranks"), ("rank_seconds_behind", 100, "behind"),
    ],
)  # fmt: skip
def test_a_threshold_that_is_changed_is_noticed(simulate: Simulate, threshold: str, value: float, name: str) -> None:
    """Every threshold that is not an alert's limit itself makes some case fail when it is another."""
    changed: dict[str, Any] = {threshold: value}
    rules = prometheus_rules(Settings(thresholds=replace(THRESHOLDS, **changed)))
    assert _wrong(CASES[name], simulate(rules, [CASES[name]]).get(name, {}))


def test_every_alert_has_cases() -> None:
    """No alert is without a case in which it must fire."""
    assert {alert.name for alert in ALERTS} == {case.of for case in CASES.values() if case.fires is not None}
