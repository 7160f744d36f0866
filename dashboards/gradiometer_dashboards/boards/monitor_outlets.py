"""What a monitor does beside being scraped, for the *Monitor* dashboard: rows that are shut until somebody asks."""

from __future__ import annotations

from gradiometer_dashboards import colours, panels
from gradiometer_dashboards.frame import Section
from gradiometer_dashboards.panels import Card, Panel
from gradiometer_dashboards.promql import FLEET, Query, chosen_in_view, increase, over_view, rate, series
from gradiometer_dashboards.thresholds import THRESHOLDS

__all__ = ["outlets"]


def outlets() -> list[Section]:
    """Build the sections."""
    return [
        (panels.folded(104, "Requests and settings", *_requests()), []),
        (panels.folded(105, "Run directories", *_directories()), []),
        (panels.folded(106, "Remote write", *_receivers(), *_shipped()), []),
        (panels.folded(107, "Grafana annotations", *_annotations()), []),
        (panels.folded(108, "Alert actions", *_actions()), []),
    ]


def _counted(name: str, by: str, legend: str) -> Query:
    return Query(expr=f"sum by ({by}) ({increase(f'gradiometer_{name}', of=FLEET)})", legend=legend)


def _total(name: str, legend: str) -> Query:
    return Query(expr=f"sum({increase(f'gradiometer_{name}', of=FLEET)})", legend=legend)


def _per_second(name: str, by: str, legend: str) -> Query:
    return Query(expr=f"sum by ({by}) ({rate(f'gradiometer_{name}', of=FLEET)})", legend=legend)


def _largest(name: str, by: str, legend: str) -> Query:
    return Query(expr=f"max by ({by}) ({series(f'gradiometer_{name}', of=FLEET)})", legend=legend)


CONFIG_AGE = Query(
    expr=f"time() - min({series('gradiometer_config_last_reload_success_timestamp_seconds', of=FLEET)})",
    legend="of the oldest",
)


def _by_host(name: str) -> Query:
    """Count on each host, of the 20 where there was most."""
    full = f"gradiometer_{name}"
    most = f"sum by (instance) ({over_view('increase', full, of=FLEET)})"
    counted = f"sum by (instance) ({increase(full, of=FLEET)})"
    return Query(expr=chosen_in_view(counted, most, by="instance"), legend="{{instance}}")


_DISK = f"max by (instance) ({series('gradiometer_run_directories_bytes', of=FLEET)})"
DISK = Query(
    expr=chosen_in_view(
        _DISK,
        f"max by (instance) ({over_view('max_over_time', 'gradiometer_run_directories_bytes', of=FLEET)})",
        by="instance",
    ),
    legend="{{instance}}",
)


def _were_down(name: str, by: str, legend: str) -> Query:
    down = over_view("min_over_time", f"gradiometer_{name}", of=FLEET)
    now = series(f"gradiometer_{name}", of=FLEET)
    return Query(expr=f"min by ({by}) ({now}) and on ({by}) (min by ({by}) ({down}) == 0)", legend=legend)


def _requests() -> list[Panel]:
    requests = Card(
        27,
        "Requests",
        "reqps",
        "Requests that all monitors answered, by route and status code. Codes of 400 and more beside /metrics are "
        "somebody who may not, or a scraper without its token; 503 is a monitor that is overloaded or not yet ready.",
        width=12,
    )
    messages = Card(
        28,
        "Log messages dropped",
        "short",
        "Messages that were not logged because the same was said often enough within a minute: something repeats "
        "itself, and the log says what. Of the 20 hosts with most.",
        width=6,
    )
    config = Card(
        29,
        "Age of the oldest config",
        "s",
        "Time since the config was read that has been in force longest. It falls when all monitors have reloaded.",
        width=6,
    )
    return [
        panels.graph(requests, _per_second("http_requests_total", "path, code", "{{path}} {{code}}")).min(0),
        panels.bars(messages, _by_host("log_messages_dropped_total")),
        panels.graph(config, CONFIG_AGE).min(0),
    ]


def _directories() -> list[Panel]:
    disk = Card(
        30,
        "Disk space of runs",
        "bytes",
        "What the directories of runs take, of the 20 hosts where it is most. Without bounds in the monitor's config "
        "nothing is ever removed.",
        width=12,
    )
    pruned = Card(
        31, "Runs removed", "short", "Directories that monitors removed because a bound asked for it.", width=6
    )
    freed = Card(32, "Disk space freed", "bytes", "What these removals freed.", width=6)
    return [
        panels.graph(disk, DISK).min(0),
        panels.bars(pruned, _by_host("pruned_runs_total")),
        panels.bars(freed, _by_host("pruned_bytes_total")),
    ]


def _receivers() -> list[Panel]:
    unused = " Empty where no receiver is set."
    up = Card(
        33,
        "Receivers that were down",
        "none",
        "When a receiver took nothing; those that took samples all the time are left out, and empty is good.",
        width=6,
    )
    waiting = Card(
        34,
        "Oldest step not sent",
        "s",
        "How long the oldest step has been waiting, of the slowest host. It climbs while the receiver is down or too "
        "slow; once it reaches the length of a run's ring, steps are lost. The red line is where the alert begins."
        + unused,
        width=6,
    )
    pending = Card(35, "Steps not sent", "short", "Steps that are recorded and wait to be sent." + unused, width=6)
    seconds = Card(
        36,
        "Time of a request",
        "s",
        "Mean time that the receiver takes for a request: it, or the network, is what makes steps wait." + unused,
        width=6,
    )
    oldest = _largest("remote_write_pending_seconds", "receiver", "{{receiver}}")
    spent = _per_second("remote_write_request_seconds_total", "receiver", "").expr
    made = _per_second("remote_write_requests_total", "receiver", "").expr
    mean = Query(expr=f"{spent} / on (receiver) ({made} > 0)", legend="{{receiver}}")
    down = _were_down("remote_write_up", "instance, receiver", "{{instance}} to {{receiver}}")
    return [
        panels.timeline(up, down, colours.UP_OR_DOWN).no_value("none was down"),
        panels.limited(panels.graph(waiting, oldest).min(0), THRESHOLDS.remote_write_seconds),
        panels.graph(pending, _largest("remote_write_pending_rows", "receiver", "{{receiver}}")).min(0),
        panels.graph(seconds, mean).min(0),
    ]


def _shipped() -> list[Panel]:
    samples = Card(37, "Samples sent", "cps", "Samples that the receiver took, of all hosts.", width=6)
    requests = Card(
        38,
        "Requests to the receiver",
        "reqps",
        "Requests by what became of them. Refused ones are dropped with their samples; those to be made again wait.",
        width=6,
    )
    dropped = Card(
        39,
        "Steps dropped",
        "short",
        "Steps that were not sent, by reason: overtaken is a receiver that was down for longer than the ring lasts, "
        "too_old and future are clocks that differ.",
        width=6,
    )
    failed = Card(
        40,
        "Samples failed",
        "short",
        "Samples that steps were sent without, by reason: rejected by the receiver, not valid, or of a series that was "
        "rejected before.",
        width=6,
    )
    return [
        panels.graph(samples, _per_second("remote_write_samples_sent_total", "receiver", "{{receiver}}")).min(0),
        panels.graph(
            requests, _per_second("remote_write_requests_total", "receiver, result", "{{receiver}} {{result}}")
        ).min(0),
        panels.bars(dropped, _counted("remote_write_rows_dropped_total", "reason", "{{reason}}")),
        panels.bars(failed, _counted("remote_write_samples_failed_total", "reason", "{{reason}}")),
    ]


def _annotations() -> list[Panel]:
    unused = " Empty where the monitor annotates nothing."
    up = Card(
        41,
        "Grafana that was unreachable",
        "none",
        "When Grafana did not answer a monitor; those that it always answered are left out, and empty is good.",
    )
    results = Card(
        42,
        "Annotations",
        "short",
        "Events that were due, by what became of them. Rejected and skipped ones are in no dashboard." + unused,
    )
    waiting = Card(
        43, "Annotations waiting", "short", "Events that wait for Grafana, of the host with most of them." + unused
    )
    return [
        panels.timeline(up, _were_down("grafana_up", "instance", "{{instance}}"), colours.UP_OR_DOWN).no_value(
            "it always was up"
        ),
        panels.bars(results, _counted("annotations_total", "result", "{{result}}")),
        panels.graph(
            waiting, Query(expr=f"max({series('gradiometer_annotations_waiting', of=FLEET)})", legend="most")
        ).min(0),
    ]


def _actions() -> list[Panel]:
    unused = " Empty where no rules for alerts are set."
    received = Card(
        44,
        "Alerts received",
        "short",
        "Alerts that Alertmanager sent to the webhooks, and of these those that no rule matches or that were cut off.",
    )
    queued = Card(
        45,
        "Not yet done",
        "short",
        "Alerts not yet looked at, and requests that jobs have not answered, over all hosts. Near zero is usual; a "
        "request stays open while its job stands still." + unused,
    )
    outcomes = Card(
        46,
        "Outcomes",
        "short",
        "Alerts that a rule matched, by rule and by what became of them." + unused,
    )
    open_ = f"sum({series('gradiometer_alert_actions_open', of=FLEET)})"
    waits = f"sum({series('gradiometer_alerts_queued', of=FLEET)})"
    return [
        panels.bars(
            received,
            _counted("alerts_received_total", "status", "{{status}}"),
            _total("alerts_unmatched_total", "unmatched"),
            _total("alerts_truncated_total", "cut off"),
        ),
        panels.graph(queued, Query(expr=waits, legend="queued"), Query(expr=open_, legend="open")).min(0),
        panels.bars(outcomes, _counted("alert_actions_total", "rule, outcome", "{{rule}}: {{outcome}}")),
    ]
