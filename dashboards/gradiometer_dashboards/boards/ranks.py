"""The *Ranks* dashboard: which rank of a run has other gradients, another model or less speed than the others."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import timeseries
from grafana_foundation_sdk.models import common, dashboard

from gradiometer_dashboards import colours, panels
from gradiometer_dashboards.frame import Section, frame
from gradiometer_dashboards.panels import Card, Panel
from gradiometer_dashboards.queries import ranks as rank_queries
from gradiometer_dashboards.queries.ranks import IN_GRAPH, IN_MAP
from gradiometer_dashboards.tables import Column, joined, link_within
from gradiometer_dashboards.thresholds import THRESHOLDS

__all__ = ["ranks"]

_DEVIATION_STEPS = ((None, colours.GOOD), (THRESHOLDS.rank_deviation, colours.BAD))
_AGE_STEPS = ((None, colours.GOOD), (60.0, colours.WARNING), (THRESHOLDS.stalled_seconds, colours.BAD))
_BEHIND_STEPS = ((None, colours.GOOD), (2.0, colours.WARNING))
_ALONE = "one rank a host"
_OF_MANY = f"Of more than {IN_GRAPH} ranks"
_LIMIT = f"the red line, at {THRESHOLDS.rank_deviation:.0%}, is where the alert is"


def ranks() -> builders.Dashboard:
    """Compose the dashboard; ``build()`` of the result is Grafana's model of it."""
    return frame(
        "ranks",
        "Gradiometer / Ranks",
        "The ranks of one training run beside each other: whose gradients differ, whose model does, who is late.",
        [_now(), _own_gradients(), _agreement(), _stragglers(), _each_rank(), _hosts()],
        choices=("run_id", "rank"),
    )


def _link(board: str, title: str, rank: str) -> dict[str, Any]:
    return link_within(board, title, "rank", rank)


def _links(rank: str) -> list[dict[str, Any]]:
    return [
        _link("ranks", "Only this rank", rank),
        _link("run", "The run at this time", rank),
        _link("layers", "Its layers at this time", rank),
    ]


def _by_rank(panel: timeseries.Panel) -> timeseries.Panel:
    """Let each rank's series lead to that rank alone, and to the run and its layers."""
    links = dashboard.DynamicConfigValue("links", _links("${__field.labels.rank}"))
    return panel.override_by_regexp("/.*/", [links])


def _now() -> Section:
    return panels.row(100, "Now"), [*_who_reports(), *_who_stands_out()]


def _who_reports() -> list[Panel]:
    reporting = Card(
        1,
        "Ranks",
        "locale",
        f"Ranks that took a step in the last {THRESHOLDS.stalled_seconds:g} s, and ranks that there are any steps of "
        "here. The two differ where a rank hangs or died; of a run that is over none reports.",
        width=4,
        height=4,
    )
    size = Card(
        2,
        "World size",
        "none",
        "Processes of the run, as they counted themselves at the start. Fewer ranks beside it: the others have not "
        "attached, or run on hosts whose monitor is not scraped.",
        width=3,
        height=4,
    )
    compared = Card(
        3,
        "Comparison",
        "none",
        "What deviation, steps behind and lag are worth here: a monitor compares the ranks that it follows. A single "
        "rank has nothing to be compared with; ranks of which each host has one are compared by host, at the end.",
        width=5,
        height=4,
    )
    comparison = panels.value(compared, rank_queries.COMPARISON).text_mode(common.BigValueTextMode.NAME)
    return [
        panels.value(reporting, rank_queries.REPORTING, rank_queries.SEEN),
        panels.states(size, rank_queries.WORLD_SIZE, {}),
        comparison,
    ]


def _who_stands_out() -> list[Panel]:
    behind = Card(
        4,
        "Furthest behind",
        "locale",
        "The rank that is most steps behind the furthest on its host, and how many. Where each step waits for all "
        "ranks, 0 or 1 is usual; more is a rank that hangs, died, or trains by itself.",
        width=4,
        height=4,
    )
    deviation = Card(
        5,
        "Largest deviation",
        "percentunit",
        "The rank whose global norm was furthest from the median of its host's at the same step, in the last minute. "
        "All ranks record the norm of the same gradients, so 0 is good and anything else means that they no longer "
        "train the same model. Inf: not finite on this rank alone.",
        width=4,
        height=4,
    )
    bad = Card(
        6,
        "Ranks with bad batches",
        "locale",
        "Ranks whose own gradients, before they were averaged with the others', held NaN or Inf in the time shown. "
        "0 is good; one rank alone points at its data or its device, all of them at the model.",
        width=4,
        height=4,
    )
    named = common.BigValueTextMode.VALUE_AND_NAME
    return [
        panels.value(behind, rank_queries.FURTHEST_BEHIND, steps=_BEHIND_STEPS).text_mode(named).no_value(_ALONE),
        panels.value(deviation, rank_queries.LARGEST_DEVIATION, steps=_DEVIATION_STEPS)
        .text_mode(named)
        .no_value(_ALONE),
        panels.value(bad, rank_queries.BAD_RANKS, steps=colours.ANY_IS_BAD).no_value("not looked at").decimals(0),
    ]


def _own_gradients() -> Section:
    over_time = Card(
        7,
        "Own gradients by rank",
        "none",
        "Decimal logarithm of the norm of each rank's own gradients, before they were averaged, by number of the rank. "
        "Even columns are good; a bright row is a rank with other data or labels than the rest, a dark one a rank that "
        f"gets padding or nothing. Empty for sharded parameters, whose own gradients are not seen. Of more than "
        f"{IN_MAP} ranks, those with the largest norms of the time shown: choose ranks at the top to see others.",
        width=24,
        height=12,
    )
    norms = Card(
        8,
        "Own gradient norm",
        "none",
        "Norm of each rank's own gradients in its newest step with armed backward hooks. Batches differ, so lines "
        f"cross; one that stays apart is a rank with other data, and one that ends was not finite. "
        f"{_OF_MANY}, those with the largest of the time shown.",
        width=12,
        height=10,
    )
    spread = Card(
        9,
        "Spread of own gradients",
        "none",
        "The largest norm over the smallest, and the standard deviation over the mean, of all ranks chosen. What is "
        "usual depends on batch and model; a step upwards is a rank, or its data, that went another way.",
        width=12,
        height=10,
    )
    return panels.row(101, "Own gradients"), [
        panels.layer_map(over_time, rank_queries.OWN_MAP),
        _by_rank(panels.log_graph(norms, rank_queries.OWN_NORMS)),
        panels.log_graph(spread, rank_queries.OWN_RATIO, rank_queries.OWN_VARIATION),
    ]


def _agreement() -> Section:
    deviation = Card(
        10,
        "Deviation of the global norm",
        "percentunit",
        "How far each rank's global norm was from the median of its host's at the same step: the largest of a minute. "
        f"At the lower edge is good; {_LIMIT}. One rank above the others has other weights or a broken device, or its "
        "gradients were not reduced; of two ranks both are as far off. Inf is drawn at the upper edge. "
        f"{_OF_MANY}, the largest of the time shown.",
        width=12,
        height=10,
    )
    bad = Card(
        11,
        "Bad batches",
        "short",
        "Steps in which a rank's own gradients held NaN or Inf, over the last few scrapes: the rank that began it, "
        "while after the reduction all ranks have it. Empty is good. "
        f"{_OF_MANY}, those with most in the time shown.",
        width=12,
        height=10,
    )
    graph = panels.limited(panels.log_graph(deviation, rank_queries.DEVIATIONS), THRESHOLDS.rank_deviation)
    return panels.row(102, "Agreement"), [
        _by_rank(graph),
        _by_rank(panels.bars(bad, rank_queries.BAD_BATCHES)),
    ]


def _stragglers() -> Section:
    age = Card(
        12,
        "Data age",
        "s",
        "Time since each rank's newest step. A step and a scrape is usual, the same for all; one line that climbs "
        f"alone is a rank that hangs. The red line, at {THRESHOLDS.stalled_seconds:g} s, is where the alert for "
        f"stalled runs can fire. {_OF_MANY}, the oldest.",
        height=10,
    )
    behind = Card(
        13,
        "Steps behind",
        "locale",
        "Steps that each rank is behind the furthest on its host. 0 or 1 is usual where ranks wait for each other. "
        f"{_OF_MANY}, those furthest behind in the time shown.",
        height=10,
    )
    lag = Card(
        14,
        "Lag",
        "s",
        "How much later than the first on its host each rank ended the same steps, mean of a minute. Near 0 for all is "
        "good; one that is always last keeps the others waiting. It shows what a rank does after the last wait for the "
        "others: whose forward or backward pass is slow makes all ranks late together. "
        f"{_OF_MANY}, those that lagged most in the time shown.",
        height=10,
    )
    return panels.row(103, "Stragglers"), [
        _by_rank(panels.limited(panels.graph(age, rank_queries.AGES).min(0), THRESHOLDS.stalled_seconds)),
        _by_rank(panels.graph(behind, rank_queries.BEHIND).min(0)),
        _by_rank(panels.graph(lag, rank_queries.LAGS).min(0)),
    ]


def _each_rank() -> Section:
    card = Card(
        15,
        "Ranks",
        "none",
        "Every rank chosen, the oldest data first; of a run that is over all are old. Behind, lag and deviation are "
        "against the other ranks of its host; empty where it is alone there. A GPU is named where the host's monitor "
        "sees one that the rank computes on. Click a rank to see it alone, or its run and layers at this time.",
        width=24,
        height=12,
    )
    columns = [
        Column(title="Host", expr=rank_queries.HOST, label="instance"),
        Column(title="Data age", expr=rank_queries.AGE, unit="s", decimals=1, steps=_AGE_STEPS),
        Column(title="Behind", expr=rank_queries.by_rank("steps_behind"), unit="locale", steps=_BEHIND_STEPS),
        Column(title="Lag", expr=rank_queries.by_rank("lag_seconds"), unit="s", decimals=2),
        Column(
            title="Deviation",
            expr=rank_queries.by_rank("norm_deviation"),
            unit="percentunit",
            decimals=2,
            steps=_DEVIATION_STEPS,
        ),
        Column(title="Own norm", expr=rank_queries.by_rank("microbatch_norm_last"), decimals=3),
        Column(title="Bad batches", expr=rank_queries.BAD_IN_VIEW, unit="locale", decimals=0, steps=colours.ANY_IS_BAD),
        Column(title="GPU", expr=rank_queries.GPU, label="gpu"),
    ]
    key = Column(title="Rank", label="rank", links=tuple(_links("${__value.raw}")), width=80)
    return panels.row(104, "Each rank"), [joined(card, key, columns, rank_queries.AGE)]


def _hosts() -> Section:
    table = Card(
        16,
        "Hosts",
        "none",
        "What the monitor of each host says of the run, the oldest data first. Steps, norms and skips are the same on "
        "all hosts, as far as they are as new: a host with another baseline trains another model, one with fewer steps "
        "hangs. Counts in the time shown; rows dropped are each host's own.",
        width=24,
        height=8,
    )
    apart = Card(
        17,
        "Baseline against the other hosts",
        "percentunit",
        "How far the usual norm of each host, the median of its last 512 steps, is from that of the hosts in the "
        f"middle. At the lower edge is good; {_LIMIT} within a host. One host has no other. Of more than {IN_GRAPH} "
        "hosts, the furthest.",
        width=12,
        height=9,
    )
    behind = Card(
        18,
        "Steps behind the furthest host",
        "locale",
        "How many steps fewer than the furthest host each has recorded. Scrapes come at different times, so some are "
        "usual: as many as are taken between two scrapes. One that climbs is a host that hangs, or whose monitor does.",
        width=12,
        height=9,
    )
    graph = panels.limited(panels.log_graph(apart, rank_queries.HOSTS_APART), THRESHOLDS.rank_deviation)
    return panels.row(105, "Hosts"), [
        joined(table, Column(title="Host", label="instance"), _host_columns(), rank_queries.HOST_AGE),
        graph,
        panels.graph(behind, rank_queries.HOSTS_BEHIND).min(0),
    ]


def _host_columns() -> list[Column]:
    return [
        Column(title="Ranks", expr=rank_queries.HOST_RANKS, unit="locale"),
        Column(title="Data age", expr=rank_queries.HOST_AGE, unit="s", decimals=1, steps=_AGE_STEPS),
        Column(title="Steps", expr=rank_queries.HOST_STEPS, unit="locale"),
        Column(title="Baseline", expr=rank_queries.HOST_BASELINE, decimals=4),
        Column(title="Newest norm", expr=rank_queries.HOST_NORM, decimals=4),
        Column(title="Non-finite", expr=rank_queries.host_count("nonfinite_steps"), unit="locale", decimals=0),
        Column(title="Skipped", expr=rank_queries.host_count("skipped_steps"), unit="locale", decimals=0),
        Column(
            title="Non-finite updates",
            expr=rank_queries.host_count("nonfinite_updates"),
            unit="locale",
            decimals=0,
            steps=colours.ANY_IS_BAD,
        ),
        Column(title="Rows dropped", expr=rank_queries.host_count("rows_dropped"), unit="locale", decimals=0),
    ]
