"""The *Run* dashboard: one training run, from "is it alive" down to the layer that misbehaves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common, dashboard

from gradiometer_dashboards import panels, queries
from gradiometer_dashboards.panels import DATASOURCE, Card

__all__ = ["TAG", "UID", "run"]

UID = "gradiometer-run"
TAG = "gradiometer"
Section = tuple[builders.Row, list[Builder[dashboard.Panel]]]
GRAFANA = common.DataSourceRef(type_val="grafana", uid="-- Grafana --")
MAX_INCIDENTS = 500
"""Annotations shown at once, the newest."""
_MINUTE = 60.0


def run() -> builders.Dashboard:
    """Compose the dashboard; ``build()`` of the result is Grafana's model of it."""
    board = builders.Dashboard("Gradiometer / Run").uid(UID).tags([TAG]).readonly().timezone("browser")
    board = board.description("Gradient norms, clipping and incidents of one training run, by step and by layer.")
    board = board.time("now-1h", "now").refresh("30s").tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
    board = board.variables(list(_variables())).annotations([_every_run(), _incidents()]).links([_siblings()])
    sections = [_now(), _gradient(), _clipping(), _shadow(), _training(), _layers(), _insight(), _instrument()]
    for heading, section in sections:
        board = board.with_row(heading)
        for panel in section:
            board = board.with_panel(panel)
    return board


def _variables() -> Iterator[Builder[dashboard.VariableModel]]:
    known = queries.metric("gradiometer_run_info")
    matchers = queries.SELECTOR
    yield builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
    yield _many("job", f"label_values({known}, job)")
    yield _many("instance", f"label_values({known}{{{matchers.job}}}, instance)")
    # Run ids that start with a date sort newest first this way.
    newest_first = dashboard.VariableSort.ALPHABETICAL_DESC
    yield _choice(
        "run_id", "Run", f"label_values({known}{{{matchers.job}, {matchers.instance}}}, run_id)", newest_first
    )


def _many(name: str, query: str) -> builders.QueryVariable:
    variable = _choice(name, name.capitalize(), query, dashboard.VariableSort.ALPHABETICAL_ASC).multi(True)
    everything = dashboard.VariableOption(text="All", value="$__all")
    return variable.include_all(True).all_value(".+").current(everything)


def _choice(name: str, label: str, query: str, sort: dashboard.VariableSort) -> builders.QueryVariable:
    variable = builders.QueryVariable(name).label(label).query(query).datasource(DATASOURCE).sort(sort)
    return variable.refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)


def _every_run() -> builders.AnnotationQuery:
    """Turn off what Grafana shows otherwise: all annotations of the dashboard, whichever run they are of."""
    query = builders.AnnotationQuery().name("Annotations & Alerts").datasource(GRAFANA).built_in(1).placement("")
    return query.type("dashboard").enable(False).hide(True).icon_color("rgba(0, 211, 255, 1)")


def _incidents() -> builders.AnnotationQuery:
    """Show what the monitor annotated of the chosen run."""
    target = builders.AnnotationTarget().type("tags").tags([TAG, "$run_id"]).match_any(False).limit(MAX_INCIDENTS)
    query = builders.AnnotationQuery().name("Incidents").datasource(GRAFANA).target(cast("Builder[Dataquery]", target))
    return query.enable(True).placement("").icon_color("orange")


def _siblings() -> builders.DashboardLink:
    link = builders.DashboardLink("Gradiometer").type(dashboard.DashboardLinkType.DASHBOARDS).tags([TAG])
    return link.include_vars(True).keep_time(True).placement("")


def _now() -> Section:
    state = Card(
        1,
        "State",
        "none",
        "What the run's processes last said or showed of themselves: running, finished, or lost.",
        width=4,
        height=4,
    )
    steps = Card(2, "Steps", "locale", "Optimizer steps recorded since the run began.", width=4, height=4)
    age = Card(
        3,
        "Data age",
        "s",
        "Time since the newest step of the slowest rank. It grows when the run hangs, and when it is over.",
        width=4,
        height=4,
    )
    normal = Card(
        4,
        "Norm / baseline",
        "none",
        "Largest global norm of the last minute as a multiple of the run's own median.",
        width=6,
        height=4,
    )
    incidents = Card(
        5,
        "Incidents in view",
        "locale",
        "Steps in the time range shown with a non-finite gradient, and steps that did not move the parameters.",
        width=6,
        height=4,
    )
    return panels.row(100, "Now"), [
        panels.states(state, queries.STATE, {"running": "green", "finished": "blue", "lost": "red"}),
        panels.value(steps, queries.STEPS),
        panels.value(age, queries.DATA_AGE, steps=((None, "green"), (_MINUTE, "orange"), (5 * _MINUTE, "red"))),
        panels.value(normal, queries.NORM_OVER_BASELINE, steps=((None, "green"), (5, "orange"), (20, "red"))),
        panels.value(
            incidents, queries.NONFINITE_IN_VIEW, queries.SKIPPED_IN_VIEW, steps=((None, "green"), (0.5, "orange"))
        ),
    ]


def _gradient() -> Section:
    norm = Card(
        6,
        "Global gradient norm",
        "none",
        "L2 norm of all gradients before clipping: of the newest step, and the largest of the last minute "
        "so that a spike of one step stays visible. Baseline is the median of the recent finite steps. A threshold is "
        "in the units of what its policy bounds, which need not be this norm.",
        width=12,
        height=10,
    )
    histogram = Card(
        7,
        "Distribution of the global gradient norm",
        "none",
        "How many steps had which norm before clipping: every step counts, however far apart scrapes are. "
        "Non-finite norms are in the topmost bucket.",
        width=12,
        height=10,
    )
    return panels.row(101, "Gradient"), [
        panels.log_graph(norm, queries.NORM_LAST, queries.NORM_PEAK, queries.NORM_BASELINE, queries.CLIP_THRESHOLD),
        panels.histogram_map(histogram, queries.NORM_HISTOGRAM),
    ]


def _clipping() -> Section:
    ratio = Card(
        8,
        "Clip ratio",
        "percentunit",
        "Share of the steps in which a policy changed the gradients. Near one, the threshold is what sets "
        "the size of the update, not the gradient. No line while the run stands still.",
    )
    coefficient = Card(
        9,
        "Smallest clip coefficient",
        "none",
        "Smallest factor that a policy applied to a gradient, of the steps that were scraped; one means untouched.",
    )
    incidents = Card(
        10,
        "Non-finite and skipped steps",
        "short",
        "Steps with NaN or Inf in some gradient, and steps in which the optimizer did not move the "
        "parameters, each counted over the last few scrapes.",
    )
    return panels.row(102, "Clipping and incidents"), [
        panels.graph(ratio, queries.CLIP_RATIO).min(0).max(1),
        panels.log_graph(coefficient, queries.CLIP_COEFFICIENT),
        panels.bars(incidents, queries.NONFINITE_STEPS, queries.SKIPPED_STEPS),
    ]


def _shadow() -> Section:
    thresholds = Card(
        25,
        "Thresholds in shadow",
        "none",
        "Thresholds of the policies that only watch beside those in force and the norm that they judge: what clipping "
        "by them would have been. In the units of what each policy bounds, which need not be this norm.",
        width=16,
        height=10,
    )
    ratio = Card(
        26,
        "Clip ratio in shadow",
        "percentunit",
        "Share of the steps in which a policy that only watches would have changed the gradients, beside the share in "
        "which one in force did.",
        height=10,
    )
    norms = (queries.NORM_LAST, queries.NORM_PEAK)
    return panels.row(107, "Shadow"), [
        panels.log_graph(thresholds, *norms, queries.CLIP_THRESHOLD, queries.SHADOW_THRESHOLD),
        panels.graph(ratio, queries.CLIP_RATIO, queries.SHADOW_RATIO).min(0).max(1),
    ]


def _training() -> Section:
    loss = Card(11, "Loss", "none", "Loss as the job logged it; empty if it logs none.")
    rate = Card(12, "Learning rate", "sci", "Learning rate of the optimizer's first param group.")
    seconds = Card(
        13,
        "Step time",
        "s",
        "Quantiles of the wall time from one optimizer step to the next, estimated from histogram buckets.",
    )
    return panels.row(103, "Training"), [
        panels.graph(loss, queries.LOSS),
        panels.graph(rate, queries.LEARNING_RATE),
        panels.graph(seconds, *(queries.step_seconds(quantile) for quantile in (0.5, 0.9, 0.99))),
    ]


def _layers() -> Section:
    over_time = Card(
        14,
        "Gradient norm by layer",
        "none",
        "Decimal logarithm of each layer's largest norm before clipping, between 1e-9 and 1e9. A dark row "
        "is a layer that learns nothing; a bright column is a step that hit every layer.",
        width=16,
        height=14,
    )
    largest = Card(
        15,
        "Largest layers",
        "none",
        "The ten layers with the largest norm before clipping in the last minute.",
        height=14,
    )
    return panels.row(104, "Layers"), [
        panels.layer_map(over_time, queries.LAYERS_OVER_TIME),
        panels.ranking(largest, queries.LAYERS_TOP, label="layer", column="Norm"),
    ]


def _insight() -> Section:
    return panels.row(106, "Insight"), [*_by_layer(), *_of_the_step()]


def _by_layer() -> list[Builder[dashboard.Panel]]:
    ratios = Card(
        19,
        "Update / weight by layer",
        "none",
        "Decimal logarithm of the norm of a step's update over that of the weights, in the newest sampled step. "
        "About -3 is usual; a layer far above the others is about to be torn apart, one far below stands still.",
        width=16,
        height=10,
    )
    share = Card(
        20,
        "Share of the squared norm",
        "percentunit",
        "The ten layers with the largest share of the squared gradient norm of the newest step: "
        "who decides what a global clip does.",
        height=10,
    )
    return [
        panels.layer_map(ratios, queries.UPDATE_RATIOS),
        panels.graph(share, queries.LAYER_SHARES).min(0),
    ]


def _of_the_step() -> list[Builder[dashboard.Panel]]:
    noise = Card(
        21,
        "Gradient noise scale",
        "none",
        "Micro-batches a step beyond which a larger batch hardly helps. Empty where a step has one micro-batch only.",
        width=6,
    )
    cosine = Card(
        22,
        "Cosine to the step before",
        "none",
        "Likeness of successive gradients: near -1 the steps undo each other, as with too large a learning rate. "
        "Measured where the job asked for it.",
        width=6,
    )
    bad = Card(
        23,
        "Bad batches by rank",
        "short",
        "Steps in which a rank's own gradients, before they were averaged with the others', held NaN or Inf.",
        width=6,
    )
    own = Card(
        24,
        "Own gradients by rank",
        "none",
        "Norm of each rank's own gradients, before they were averaged, in the newest step with armed backward hooks.",
        width=6,
    )
    return [
        panels.log_graph(noise, queries.NOISE_SCALE),
        panels.graph(cosine, queries.GRAD_COSINE).min(-1).max(1),
        panels.bars(bad, queries.RANK_NONFINITE),
        panels.log_graph(own, queries.RANK_NORMS),
    ]


def _instrument() -> Section:
    overhead = Card(
        16, "Agent overhead", "percentunit", "Host time that the agent spent in its hooks, as a share of wall time."
    )
    dropped = Card(
        17,
        "Dropped",
        "short",
        "Rows lost on the way out of the process, incidents not written for want of room, and layer series "
        "left out of scrapes by the series budget. Where this is not zero, the panels above show less than happened.",
    )
    errors = Card(18, "Agent errors", "short", "Telemetry failures that the agent caught so that training went on.")
    return panels.row(105, "Instrument"), [
        panels.graph(overhead, queries.AGENT_OVERHEAD).min(0),
        panels.bars(dropped, queries.ROWS_DROPPED, queries.EVENTS_DROPPED, queries.SERIES_DROPPED),
        panels.bars(errors, queries.AGENT_ERRORS),
    ]
