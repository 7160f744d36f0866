"""The dashboards' queries in promtool: they parse whatever is chosen, and two hosts of a run do not double it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from gradiometer.metrics import CATALOGUE
from gradiometer_dashboards.interpolation import replaced
from tests._dashboards import NAMES, Target, targets

if TYPE_CHECKING:
    from tests.conftest import Promtool

pytestmark = pytest.mark.native

Json = dict[str, Any]
RUN = "2026-01-31-gpt.1"
FILLINGS: dict[str, dict[str, str]] = {
    "one": {"job": "gradiometer", "instance": "h1:9477", "rank": "0", "layer": r"blocks\\.0"},
    "several": {
        "job": "(gradiometer|training)",
        "instance": r"(h1:9477|h2\\.example:9477)",
        "rank": "(0|1)",
        "layer": "(head|embed)",
    },
    "all": dict.fromkeys(("job", "instance", "rank", "layer"), ".+"),
}
VALUES: dict[str, tuple[str, ...]] = {
    "mode": ("act", "shadow"), "state": ("running", "lost", "vanishing", "exploding"), "q": ("0.5", "0.99", "1"),
    "result": ("accepted", "refused", "created", "rejected"), "rank": ("0", "1"), "layer": ("head", "embed"),
    "code": ("200", "500"), "type": ("corrected", "uncorrected"),
}  # fmt: skip
"""What labels are, where a query may ask for one value; ``x`` elsewhere."""
OF_EACH_HOST = {
    "gradiometer_agent_errors_total", "gradiometer_agent_seconds_total", "gradiometer_callback_failures_total",
    "gradiometer_events_dropped_total", "gradiometer_rows_dropped_total", "gradiometer_series_dropped_total",
    "gradiometer_series_omitted", "gradiometer_uncounted_steps",
}  # fmt: skip
"""What each host counts for itself, which adds up."""


def _of_a_run(target: Target) -> bool:
    """Whether a query is of what all hosts of a run say alike, so that a second host changes nothing."""
    known = [CATALOGUE.get(name.removesuffix("_bucket")) for name in target.metrics]
    alike = all(m is not None and "run_id" in m.labels and m.name not in OF_EACH_HOST for m in known)
    return alike and "instance" not in target.expr.replace('instance=~"$instance"', "")


def _filled(expr: str, filling: Mapping[str, str]) -> str:
    spans = {"__rate_interval": "1m0s", "__interval": "15s", "__range": "600s"}
    return replaced(expr, {"run_id": RUN, **spans, **filling})


def _check(promtool: Promtool, command: str, file: Path, content: Json) -> None:
    file.write_text(yaml.safe_dump(content))
    done = promtool(*command.split(), file)
    assert done.returncode == 0, done.stdout + done.stderr


def _series(name: str, labels: Mapping[str, str], values: str) -> Json:
    pairs = ",".join(f'{key}="{value}"' for key, value in labels.items())
    return {"series": f"{name}{{{pairs}}}", "values": values}


def _exported(instance: str) -> Iterator[Json]:
    """Yield every series that the catalogue promises: counters and buckets grow by one a minute, gauges stay at one."""
    scraped = {"job": "gradiometer", "instance": instance}
    for declared in CATALOGUE.values():
        choices = [(RUN,) if label == "run_id" else VALUES.get(label, ("x",)) for label in declared.labels]
        for chosen in itertools.product(*choices):
            labels = scraped | dict(zip(declared.labels, chosen, strict=True))
            if declared.kind == "histogram":
                for edge in [*(f"{edge:g}" for edge in declared.buckets), "+Inf"]:
                    yield _series(f"{declared.name}_bucket", labels | {"le": edge}, "0+1x80")
                for part in ("_sum", "_count"):
                    yield _series(f"{declared.name}{part}", labels, "0+1x80")
            else:
                yield _series(declared.name, labels, "1+0x80" if declared.kind == "gauge" else "0+1x80")
    for name in ("up", "scrape_duration_seconds", "scrape_samples_scraped", "scrape_samples_post_metric_relabeling"):
        yield _series(name, scraped, "1+0x80")


def _alert() -> Json:
    labels = {"job": "gradiometer", "run_id": RUN, "alertname": "GradiometerSpike", "severity": "warning"}
    return _series("ALERTS", labels | {"alertstate": "firing"}, "1+0x80")


def _run_tests(promtool: Promtool, file: Path, hosts: tuple[str, ...], checks: list[tuple[str, float]]) -> None:
    tests = [
        {"expr": expr, "eval_time": "10m", "exp_samples": [{"labels": "{}", "value": value}]} for expr, value in checks
    ]
    series = [_alert(), *(line for host in hosts for line in _exported(host))]
    content = {"tests": [{"interval": "15s", "input_series": series, "promql_expr_test": tests}]}
    _check(promtool, "test rules", file, content)


@pytest.mark.parametrize("filling", FILLINGS.values(), ids=FILLINGS)
def test_target_promql(filling: dict[str, str], tmp_path: Path, promtool: Promtool) -> None:
    """Prometheus parses every query, whatever is chosen in the variables."""
    exprs = [_filled(target.expr, filling) for name in NAMES for target in targets(name)]
    rules = [{"record": f"q{place}", "expr": expr} for place, expr in enumerate(exprs)]
    _check(promtool, "check rules", tmp_path / "rules.yml", {"groups": [{"name": "boards", "rules": rules}]})


@pytest.mark.parametrize("hosts", [("h1:9477",), ("h1:9477", "h2:9477")], ids=["one host", "two hosts"])
def test_no_query_is_ambiguous(hosts: tuple[str, ...], tmp_path: Path, promtool: Promtool) -> None:
    """With every catalogue metric exported, by one host or by two, no query matches many with many."""
    exprs = [_filled(target.expr, FILLINGS["all"]) for name in NAMES for target in targets(name)]
    checks = [(f"(count({expr}) or vector(0)) >= bool 0", 1.0) for expr in exprs]
    _run_tests(promtool, tmp_path / "tests.yml", hosts, checks)


def test_a_second_host_doubles_nothing(tmp_path: Path, promtool: Promtool) -> None:
    """What all hosts of a run say alike is the same whether one of them is looked at or both."""
    found = [target for name in NAMES for target in targets(name) if _of_a_run(target)]
    assert len(found) > 20
    checks = []
    for target in found:
        both = _filled(target.expr, FILLINGS["all"])
        one = _filled(target.expr, FILLINGS["all"] | {"instance": "h1:9477"})
        checks += [(f"count(({both}) != ({one})) or vector(0)", 0.0)]
        checks += [(f"(count({both}) or vector(0)) - (count({one}) or vector(0))", 0.0)]
    _run_tests(promtool, tmp_path / "tests.yml", ("h1:9477", "h2:9477"), checks)


def test_clip_ratio_counts_a_step_once(tmp_path: Path, promtool: Promtool) -> None:
    """A run seen by two hosts that clips every fourth step has a clip ratio of a quarter, whatever is in shadow."""
    expr = next(t.expr for t in targets("run") if t.panel["title"] == "Clip ratio")
    labels = {"job": "gradiometer", "run_id": RUN}
    series = [
        _series(name, {**labels, "instance": instance, **more}, values)
        for instance in ("h1:9477", "h2:9477")
        for name, more, values in (
            ("gradiometer_steps_total", {}, "0+40x80"),
            ("gradiometer_clip_events_total", {"policy": "clip", "mode": "act"}, "0+10x80"),
            ("gradiometer_clip_events_total", {"policy": "wider", "mode": "shadow"}, "0+20x80"),
        )
    ]
    quarter = {"labels": '{policy="clip"}', "value": 0.25}
    check = {"expr": _filled(expr, FILLINGS["all"]), "eval_time": "10m", "exp_samples": [quarter]}
    content = {"tests": [{"interval": "15s", "input_series": series, "promql_expr_test": [check]}]}
    _check(promtool, "test rules", tmp_path / "tests.yml", content)
