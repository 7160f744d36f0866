"""The *Fleet* dashboard: what somebody on call opens first, to see which of all runs needs attention."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders

from gradiometer_dashboards import colours, panels
from gradiometer_dashboards.boards.fleet_gpus import gpus
from gradiometer_dashboards.boards.fleet_table import AGE, SPEED, STATE, age, runs_table
from gradiometer_dashboards.frame import Section, frame
from gradiometer_dashboards.panels import Card, Panel
from gradiometer_dashboards.promql import (
    FLEET,
    TARGETS,
    Query,
    chosen_in_view,
    firing,
    increase,
    over_view,
    peak,
    series,
)
from gradiometer_dashboards.tables import Column, labelled, link_to, linked
from gradiometer_dashboards.thresholds import THRESHOLDS

__all__ = ["fleet"]

SEVERITIES = {3: ("critical", colours.BAD), 2: ("warning", colours.WARNING), 1: ("info", colours.FINISHED)}


def _count(condition: str, legend: str) -> Query:
    """Count the series that there are, also where there are none."""
    return Query(expr=f"count({condition}) or vector(0)", legend=legend)


RUNNING = _count(f"{STATE} == 1", "running")
FINISHED = _count(f"{STATE} == 0", "finished")
LOST = _count(f"{STATE} == 2", "lost")
CRITICAL = _count(firing('severity="critical"'), "critical")
OTHER = _count(firing('severity!="critical"'), "others")
UP = _count(f"({TARGETS}) == 1", "up")
DOWN = _count(f"({TARGETS}) == 0", "down")
_GPUS_LOST = f"min by (uuid) ({series('gradiometer_gpu_up', of=FLEET)})"
GPUS_LOST = Query(expr=f"count({_GPUS_LOST} == 0) or 0 * count({_GPUS_LOST})", legend="lost")

_CRITICAL, _WARNING = (firing(f'severity="{severity}"') for severity in ("critical", "warning"))
ALERTS = Query(
    expr=f"max by (alertname, run_id, instance) (3 * {_CRITICAL} or 2 * {_WARNING} or {firing()})",
    legend="{{alertname}}",
)


def _by_run(name: str) -> str:
    return f"max by (run_id) ({series(name, of=FLEET)})"


NORM_OVER_TIME = Query(
    expr=chosen_in_view(
        # One Inf would take the axis with it; that a norm was not finite is said by the panel beside.
        f"max by (run_id) ({peak('gradiometer_grad_norm_finite_window_max', of=FLEET)})"
        f" / {_by_run('gradiometer_grad_norm_baseline')}",
        f"max by (run_id) ({over_view('max_over_time', 'gradiometer_grad_norm_finite_window_max', of=FLEET)})"
        f" / max by (run_id) ({over_view('avg_over_time', 'gradiometer_grad_norm_baseline', of=FLEET)})",
    ),
    legend="{{run_id}}",
)
NONFINITE_OVER_TIME = Query(
    expr=chosen_in_view(
        f"max by (run_id) ({increase('gradiometer_nonfinite_steps_total', of=FLEET)})",
        f"max by (run_id) ({over_view('increase', 'gradiometer_nonfinite_steps_total', of=FLEET)}) > 0",
    ),
    legend="{{run_id}}",
)
_SPEED_AT_END = f"max by (run_id) ({over_view('rate', 'gradiometer_steps_total', of=FLEET, span='$__rate_interval')})"
_USUAL_SPEED = f"max by (run_id) ({over_view('rate', 'gradiometer_steps_total', of=FLEET)})"
SPEED_OVER_TIME = Query(
    expr=chosen_in_view(
        SPEED,
        f"{_SPEED_AT_END} / ({_USUAL_SPEED} > 0)",
        first="bottomk(20, {})",
    ),
    legend="{{run_id}}",
)
AGE_OVER_TIME = Query(expr=chosen_in_view(AGE, age(" @ end()")), legend="{{run_id}}")


def fleet() -> builders.Dashboard:
    """Compose the dashboard; ``build()`` of the result is Grafana's model of it."""
    return frame(
        "fleet",
        "Gradiometer / Fleet",
        "All runs on all hosts: which one needs attention, and what fires.",
        [(panels.row(100, "Now"), [*_now(), runs_table(9)]), _alerts(), _over_time(), gpus(103)],
    )


def _now() -> list[Panel]:
    return [*_runs(), *_hosts()]


def _runs() -> list[Panel]:
    def card(id_: int, title: str, description: str) -> Card:
        return Card(id_, title, "none", description, width=3, height=4)

    some_bad, some_odd = ((None, colours.GOOD), (1, colours.BAD)), ((None, colours.GOOD), (1, colours.WARNING))
    return [
        panels.value(card(1, "Running", "Runs whose processes live."), RUNNING, steps=((None, colours.GOOD),)),
        panels.value(
            card(2, "Finished", "Runs that ended in order within the last 15 minutes; then they leave."),
            FINISHED,
            steps=((None, colours.FINISHED),),
        ),
        panels.value(
            card(3, "Lost", "Runs whose process is gone without a goodbye: killed, crashed, or its host is."),
            LOST,
            steps=some_bad,
        ),
        panels.value(
            card(4, "Critical alerts", "Critical alerts of ours that fire, by Prometheus' own rules: look now."),
            CRITICAL,
            steps=some_bad,
        ),
        panels.value(
            card(5, "Other alerts", "Warnings of ours that fire: look today. The table of alerts below names them."),
            OTHER,
            steps=some_odd,
        ),
    ]


def _hosts() -> list[Panel]:
    up = Card(6, "Monitors up", "none", "Monitors and exporters that Prometheus can scrape.", width=3, height=4)
    down = Card(
        7,
        "Monitors down",
        "none",
        "Monitors and exporters that it cannot: what runs on their hosts is not seen, here or by any alert. One that "
        "was down for the whole time range, with all others of its job, is not known.",
        width=3,
        height=4,
    )
    lost = Card(
        8,
        "GPUs lost",
        "none",
        "GPUs that answered once and do not any more. Without NVML there are none to lose.",
        width=3,
        height=4,
    )
    some_bad = ((None, colours.GOOD), (1, colours.BAD))
    return [
        panels.value(up, UP, steps=((None, colours.BAD), (1, colours.GOOD))),
        panels.value(down, DOWN, steps=some_bad),
        panels.value(lost, GPUS_LOST, steps=some_bad).no_value("no GPUs"),
    ]


def _alerts() -> Section:
    table = Card(
        10,
        "Firing alerts",
        "none",
        "Alerts of Prometheus' rules that fire, the critical ones first. Empty is good, if Prometheus has our rules. "
        "The alert leads to its rule, with runbook and what it found; the run to its dashboards.",
        width=14,
        height=9,
    )
    grafana = Card(
        11,
        "Alerts as Grafana knows them",
        "none",
        "The same for who has Grafana evaluate the rules, or lets it read those of Prometheus: what fires, what is "
        "about to, and rules that fail.",
        width=10,
        height=9,
    )
    rule = {"title": "Show the rule", "url": "/alerting/list?search=${__data.fields.alertname}", "targetBlank": False}
    to_run = tuple(link_to(board, f"Show the {board}") for board in ("run", "layers", "ranks"))
    columns = [
        Column(title="Severity", names=SEVERITIES, width=100),
        Column(title="Alert", label="alertname", links=(rule,)),
        Column(title="Run", label="run_id", links=to_run),
        Column(title="Host", label="instance"),
    ]
    return panels.row(101, "Alerts"), [
        labelled(table, ALERTS, columns).no_value("none fires"),
        panels.alert_list(grafana, '{alertname=~"Gradiometer.*"}'),
    ]


def _over_time() -> Section:
    def card(id_: int, title: str, unit: str, description: str) -> Card:
        return Card(id_, title, unit, description, width=12, height=9)

    norm = card(
        12,
        "Norm / baseline",
        "none",
        "Largest finite norm of a minute as a multiple of the run's own median, of the 20 runs with the highest peak "
        f"in view. Around one is usual; the red line, at {THRESHOLDS.spike_ratio:g}, is where the alert for spikes is.",
    )
    nonfinite = card(
        13,
        "Non-finite steps",
        "short",
        "Steps with NaN or Inf in some gradient, over the last few scrapes, of the 20 runs with most in view. Empty is "
        "good. Now and then is usual for a GradScaler that searches its scale; many in a row are not.",
    )
    speed = card(
        14,
        "Speed",
        "none",
        "Optimizer steps a second, of the 20 runs that have slowed down most against their own mean in view. A fall to "
        "zero is a hang; a fall of all runs at once is shared storage or network.",
    )
    old = card(
        15,
        "Data age",
        "s",
        "Time since the newest step of each run's slowest rank, of the 20 unfinished runs with the oldest. Usual is "
        f"the time of a step and a scrape; the red line, at {THRESHOLDS.stalled_seconds:g} s, is where the alert for "
        "stalled runs can fire.",
    )
    return panels.row(102, "Over time"), [
        linked(panels.limited(panels.log_graph(norm, NORM_OVER_TIME), THRESHOLDS.spike_ratio), "run", "Show the run"),
        linked(panels.bars(nonfinite, NONFINITE_OVER_TIME).no_value("none"), "layers", "Show its layers"),
        linked(panels.graph(speed, SPEED_OVER_TIME).min(0), "ranks", "Show its ranks"),
        linked(panels.limited(panels.graph(old, AGE_OVER_TIME).min(0), THRESHOLDS.stalled_seconds), "run", "Show it"),
    ]
