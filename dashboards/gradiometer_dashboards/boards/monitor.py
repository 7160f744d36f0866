"""The *Monitor* dashboard: whether the instrument itself is well, what it costs, and what it could not tell."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders

from gradiometer_dashboards import colours, panels
from gradiometer_dashboards.boards.monitor_outlets import outlets
from gradiometer_dashboards.frame import Section, frame
from gradiometer_dashboards.panels import Card, Panel
from gradiometer_dashboards.promql import (
    FLEET,
    TARGETS,
    Query,
    chosen_in_view,
    increase,
    increase_in_view,
    over_view,
    rate,
    scraped,
    series,
)
from gradiometer_dashboards.tables import linked

__all__ = ["monitor"]

WELL_OR_NOT = {0: ("failing", colours.BAD), 1: ("well", colours.GOOD)}


def _failing(name: str, legend: str) -> Query:
    """Count the series that are zero, where one means well."""
    return Query(expr=f"count({series(name, of=FLEET)} == 0) or vector(0)", legend=legend)


def _sum_in_view(name: str, legend: str) -> Query:
    return Query(expr=f"sum({increase_in_view(name, of=FLEET)}) or vector(0)", legend=legend)


UP = Query(expr=f"count(({TARGETS}) == 1) or vector(0)", legend="up")
DOWN = Query(expr=f"count(({TARGETS}) == 0) or vector(0)", legend="down")
SLOWEST = Query(expr=f"max({scraped('scrape_duration_seconds')})", legend="slowest")
COLLECTORS_FAILING = _failing("gradiometer_collector_success", "collectors")
SERVICES_FAILING = _failing("gradiometer_service_healthy", "services")
CONFIGS_REJECTED = _failing("gradiometer_config_last_reload_successful", "configs")
IN_MEMORY = _failing("gradiometer_store_persistent", "monitors")
ROWS_LOST = _sum_in_view("gradiometer_rows_dropped_total", "steps")
EVENTS_LOST = _sum_in_view("gradiometer_events_dropped_total", "incidents")
ERRORS = _sum_in_view("gradiometer_agent_errors_total", "errors")
OMITTED = Query(expr=f"sum({series('gradiometer_series_omitted', of=FLEET)}) or vector(0)", legend="series")

_AGENTS = f"count by (job, instance, run_id) ({series('gradiometer_grad_norm_last', of=FLEET)})"


def _overhead(seconds: str) -> str:
    """Divide the time that all ranks of a host spent in hooks by their number."""
    return f"max by (run_id) ({seconds} / on (job, instance, run_id) {_AGENTS})"


OVERHEAD_NOW = Query(
    expr=f"max({_overhead(rate('gradiometer_agent_seconds_total', of=FLEET))}) or vector(0)", legend="largest"
)
OVERHEAD = Query(
    expr=chosen_in_view(
        _overhead(rate("gradiometer_agent_seconds_total", of=FLEET)),
        f"max by (run_id) ({over_view('rate', 'gradiometer_agent_seconds_total', of=FLEET)})",
    ),
    legend="{{run_id}}",
)
WERE_DOWN = Query(
    expr=f"max by (instance) ({TARGETS}) and on (instance) (min_over_time(up{{{FLEET}}}[$__range] @ end()) == 0)",
    legend="{{instance}}",
)


def _lost_by_run(name: str) -> Query:
    """Count what each process counts for itself, of the runs that lost most."""
    return Query(
        expr=chosen_in_view(
            f"sum by (run_id) ({increase(name, of=FLEET)})",
            f"sum by (run_id) ({over_view('increase', name, of=FLEET)}) > 0",
        ),
        legend="{{run_id}}",
    )


def _missing_by_run(name: str, how: str) -> Query:
    return Query(
        expr=chosen_in_view(
            f"{how} by (run_id) ({series(name, of=FLEET)})",
            f"{how} by (run_id) ({over_view('max_over_time', name, of=FLEET)}) > 0",
        ),
        legend="{{run_id}}",
    )


def _scrape_quantile(quantile: float) -> Query:
    buckets = f"sum by (le) ({rate('gradiometer_scrape_seconds', '_bucket', of=FLEET)})"
    return Query(expr=f"histogram_quantile({quantile:g}, {buckets}) >= 0", legend=f"p{quantile * 100:g}")


def _by_host(name: str) -> Query:
    """Take what Prometheus tells of each scrape, of the 20 hosts where it is most."""
    most = f"max by (instance) (max_over_time({name}{{{FLEET}}}[$__range] @ end()))"
    return Query(
        expr=chosen_in_view(f"max by (instance) ({scraped(name)})", most, by="instance"), legend="{{instance}}"
    )


SIZES = Query(
    expr=chosen_in_view(
        f"max by (instance) ({series('gradiometer_scrape_size_bytes', of=FLEET)})",
        f"max by (instance) ({over_view('max_over_time', 'gradiometer_scrape_size_bytes', of=FLEET)})",
        by="instance",
    ),
    legend="{{instance}}",
)


COLLECTORS_FAILED = Query(
    expr=chosen_in_view(
        f"min by (instance, collector) ({series('gradiometer_collector_success', of=FLEET)})",
        f"min by (instance, collector) ({over_view('min_over_time', 'gradiometer_collector_success', of=FLEET)})",
        by="instance, collector",
        first="({} == 0)",
    ),
    legend="{{instance}} {{collector}}",
)
COLLECTOR_SECONDS = Query(
    expr=f"max by (collector) ({series('gradiometer_collector_seconds', of=FLEET)})", legend="{{collector}}"
)
SERVICES = Query(expr=f"min by (service) ({series('gradiometer_service_healthy', of=FLEET)})", legend="{{service}}")
SERVICE_FAILURES = Query(
    expr=chosen_in_view(
        f"sum by (instance, service) ({increase('gradiometer_service_failures_total', of=FLEET)})",
        f"sum by (instance, service) ({over_view('increase', 'gradiometer_service_failures_total', of=FLEET)})",
        by="instance, service",
    ),
    legend="{{instance}} {{service}}",
)


def monitor() -> builders.Dashboard:
    """Compose the dashboard; ``build()`` of the result is Grafana's model of it."""
    return frame(
        "monitor",
        "Gradiometer / Monitor",
        "Whether the monitors and agents are well, what they cost, and what they could not tell.",
        [
            (panels.row(100, "Is all well?"), [*_hosts(), *_losses(), *_first_graphs()]),
            _lost(),
            _scrapes(),
            _parts(),
            *outlets(),
        ],
    )


def _small(id_: int, title: str, unit: str, description: str) -> Card:
    return Card(id_, title, unit, description, width=4, height=4)


def _hosts() -> list[Panel]:
    up = _small(1, "Monitors up", "none", "Monitors and exporters that Prometheus can scrape.")
    down = _small(
        2,
        "Monitors down",
        "none",
        "Monitors and exporters that it cannot scrape: the runs of their hosts are seen by nobody.",
    )
    slowest = _small(
        3,
        "Slowest scrape",
        "s",
        "Longest of the newest scrapes, as Prometheus measured it. At the scrape's time limit, 10 s unless changed, "
        "the scrape is lost.",
    )
    collectors = _small(
        4, "Collectors failing", "none", "Sources of a scrape that failed in the newest one: what they tell is missing."
    )
    services = _small(
        5, "Services failing", "none", "Services whose newest round failed, as remote write or annotations; all retry."
    )
    configs = _small(
        6, "Configs rejected", "none", "Monitors that go on with an old config, because the new one cannot be used."
    )
    return [
        panels.value(up, UP, steps=((None, colours.BAD), (0.5, colours.GOOD))),
        panels.value(down, DOWN, steps=colours.ANY_IS_BAD),
        panels.value(slowest, SLOWEST, steps=((None, colours.GOOD), (2, colours.WARNING), (8, colours.BAD))),
        panels.value(collectors, COLLECTORS_FAILING, steps=colours.ANY_IS_BAD),
        panels.value(services, SERVICES_FAILING, steps=colours.ANY_IS_ODD),
        panels.value(configs, CONFIGS_REJECTED, steps=colours.ANY_IS_ODD),
    ]


def _losses() -> list[Panel]:
    memory = _small(
        7,
        "Without a store",
        "none",
        "Monitors that work from memory, or cannot write to their disk: events and counts are lost with the process. "
        "Their log says why.",
    )
    rows = _small(
        8, "Steps lost in view", "locale", "Steps that the agent or the reader lost, in no panel of any board."
    )
    events = _small(
        9, "Incidents lost in view", "locale", "Incidents that were not written because a run's file of them was full."
    )
    omitted = _small(
        10, "Series left out", "locale", "Series of layers that a budget leaves out of scrapes: raise it, or accept it."
    )
    errors = _small(
        11, "Agent errors in view", "locale", "Telemetry failures that agents caught so that training went on."
    )
    overhead = _small(
        12,
        "Largest overhead",
        "percentunit",
        "Largest share of a run's wall time that its agents spend in their hooks, on average of a host's ranks.",
    )
    return [
        panels.value(memory, IN_MEMORY, steps=colours.ANY_IS_ODD),
        panels.value(rows, ROWS_LOST, steps=colours.ANY_IS_ODD),
        panels.value(events, EVENTS_LOST, steps=colours.ANY_IS_ODD),
        panels.value(omitted, OMITTED, steps=colours.ANY_IS_ODD),
        panels.value(errors, ERRORS, steps=colours.ANY_IS_ODD),
        panels.value(overhead, OVERHEAD_NOW, steps=((None, colours.GOOD), (0.03, colours.WARNING), (0.1, colours.BAD))),
    ]


def _first_graphs() -> list[Panel]:
    down = Card(
        13,
        "Monitors that were down",
        "none",
        "When each monitor was down that was so in view; those that were up all the time are left out. Empty is good.",
        width=12,
    )
    overhead = Card(
        14,
        "Agent overhead",
        "percentunit",
        "Share of wall time that the agent spends in its hooks, on average of a host's ranks, of the 20 runs with "
        "most. Usual is below one per cent; short steps and many parameters make it more.",
        width=12,
    )
    return [
        panels.timeline(down, WERE_DOWN, colours.UP_OR_DOWN).no_value("none was down"),
        linked(panels.graph(overhead, OVERHEAD).min(0), "run", "Show the run"),
    ]


def _lost() -> Section:
    def card(id_: int, title: str, description: str) -> Card:
        return Card(id_, title, "short", description, width=6, height=8)

    rows = card(
        15,
        "Steps lost",
        "Steps that the agent found no free slot for or that the ring overwrote before they were read, by run. Where "
        "this is not empty, the boards show less than happened.",
    )
    uncounted = card(
        16,
        "Steps before the monitor came",
        "Steps that histograms and non-finite counts of layers do not hold, because they had left the ring before it "
        "was first read. A line that stays level is history, not a fault.",
    )
    omitted = card(
        17,
        "Series left out by run",
        "Series of layers that a budget leaves out of each scrape, by run. What is left out are the layers that behave "
        "as usual; their quantiles are still exported.",
    )
    errors = card(
        18,
        "Agent errors",
        "Telemetry failures by run, which the agent caught. The job's log has the first of each kind.",
    )
    return panels.row(101, "What was lost"), [
        linked(
            panels.bars(rows, _lost_by_run("gradiometer_rows_dropped_total")).no_value("none"), "run", "Show the run"
        ),
        panels.graph(uncounted, _missing_by_run("gradiometer_uncounted_steps", "max")).min(0).no_value("none"),
        panels.graph(omitted, _missing_by_run("gradiometer_series_omitted", "sum")).min(0).no_value("none"),
        linked(
            panels.bars(errors, _lost_by_run("gradiometer_agent_errors_total")).no_value("none"), "run", "Show the run"
        ),
    ]


def _scrapes() -> Section:
    made = Card(
        19,
        "Time to make a scrape",
        "s",
        "Quantiles over all monitors of the time to make a scrape, estimated from histogram buckets. Milliseconds are "
        "usual; seconds are a collector that hangs.",
        width=6,
    )
    taken = Card(
        20,
        "Time to scrape",
        "s",
        "Duration of each scrape as Prometheus measured it, network and compression included, of the 20 slowest hosts.",
        width=6,
    )
    samples = Card(
        21,
        "Samples a scrape",
        "short",
        "Samples that Prometheus got in one scrape, of the 20 hosts with most. It grows with runs and layers, up to "
        "the monitor's budget of series.",
        width=6,
    )
    size = Card(
        22, "Size of a scrape", "bytes", "Size before compression, of the 20 hosts where it is largest.", width=6
    )
    return panels.row(102, "Scrapes"), [
        panels.graph(made, *(_scrape_quantile(quantile) for quantile in (0.5, 0.9, 0.99))).min(0),
        panels.graph(taken, _by_host("scrape_duration_seconds")).min(0),
        panels.graph(
            samples,
            _by_host("scrape_samples_scraped"),
        ).min(0),
        panels.graph(size, SIZES).min(0),
    ]


def _parts() -> Section:
    collectors = Card(
        23,
        "Collectors that failed",
        "none",
        "Sources of scrapes that failed at some time in view; empty is good. What a collector tells is missing while "
        "it fails, and nothing else is.",
        width=6,
    )
    seconds = Card(
        24,
        "Time by collector",
        "s",
        "Duration of the newest collection, of the slowest host. After 4 s of all together a scrape goes on without.",
        width=6,
    )
    services = Card(
        25,
        "Services",
        "none",
        "Whether each service is well, or its newest round failed on some host: the graph beside names it. They "
        "try again by themselves.",
        width=6,
    )
    failures = Card(
        26,
        "Failed rounds of services",
        "short",
        "Rounds that failed over the last few scrapes, of the 20 hosts and services with most in view.",
        width=6,
    )
    return panels.row(103, "Collectors and services"), [
        panels.timeline(collectors, COLLECTORS_FAILED, WELL_OR_NOT).no_value("none failed"),
        panels.graph(seconds, COLLECTOR_SECONDS).min(0),
        panels.timeline(services, SERVICES, WELL_OR_NOT),
        panels.bars(failures, SERVICE_FAILURES),
    ]
