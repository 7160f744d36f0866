"""The *Run* dashboard: one training run, from "is it alive" down to the layer that misbehaves."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders

from gradiometer_dashboards import colours, panels
from gradiometer_dashboards.frame import Section, frame
from gradiometer_dashboards.panels import Card, Panel
from gradiometer_dashboards.promql import RUN, Query, Selector, increase, increase_in_view, peak, rate, series

__all__ = ["run"]

_MINUTE = 60.0

STATE = Query(expr=f"max by (state) ({series('gradiometer_run_state')}) == 1", legend="{{state}}")
STEPS = Query(expr=f"max({series('gradiometer_steps_total')})", legend="steps")
DATA_AGE = Query(
    expr=f"time() - min({series('gradiometer_last_step_timestamp_seconds')})",
    legend="since the slowest rank's newest step",
)
NORM_OVER_BASELINE = Query(
    expr=f"max({series('gradiometer_grad_norm_window_max')}) / max({series('gradiometer_grad_norm_baseline')})",
    legend="largest norm / baseline",
)
NONFINITE_IN_VIEW = Query(expr=f"max({increase_in_view('gradiometer_nonfinite_steps_total')})", legend="non-finite")
SKIPPED_IN_VIEW = Query(expr=f"max({increase_in_view('gradiometer_skipped_steps_total')})", legend="skipped")

NORM_LAST = Query(expr=f"max({series('gradiometer_grad_norm_last')})", legend="newest step", colour=colours.NORM)
NORM_PEAK = Query(expr=f"max({peak('gradiometer_grad_norm_window_max')})", legend="window maximum", colour=colours.PEAK)
NORM_BASELINE = Query(
    expr=f"max({series('gradiometer_grad_norm_baseline')})", legend="baseline", colour=colours.BASELINE
)


def _mode(mode: str) -> Selector:
    return RUN & f'mode="{mode}"'


def clip_threshold(mode: str, legend: str) -> Query:
    """Show the thresholds of the policies that ``act`` or are in ``shadow``."""
    return Query(expr=f"max by (policy) ({series('gradiometer_clip_threshold', of=_mode(mode))})", legend=legend)


CLIP_THRESHOLD = clip_threshold("act", "threshold of {{policy}}")
SHADOW_THRESHOLD = clip_threshold("shadow", "threshold of {{policy}} in shadow")
NORM_HISTOGRAM = Query(expr=f"max by (le) ({increase('gradiometer_grad_norm', '_bucket')})", legend="{{le}}")


def clip_ratio(mode: str, legend: str) -> Query:
    """Divide the steps that each policy clipped, or in ``shadow`` would have, by those that were taken.

    A run that stands still has no ratio: dividing by zero would draw NaN in the legend.
    """
    return Query(
        expr=f"max by (policy) ({rate('gradiometer_clip_events_total', of=_mode(mode))})"
        f" / on () group_left () (max({rate('gradiometer_steps_total')}) > 0)",
        legend=legend,
    )


CLIP_RATIO = clip_ratio("act", "{{policy}}")
SHADOW_RATIO = clip_ratio("shadow", "{{policy}} in shadow")
CLIP_COEFFICIENT = Query(
    expr=f"min by (policy) (min_over_time({series('gradiometer_clip_coefficient', of=_mode('act'))}[$__interval]))",
    legend="{{policy}}",
)
NONFINITE_STEPS = Query(
    expr=f"max({increase('gradiometer_nonfinite_steps_total')})", legend="non-finite", colour=colours.NONFINITE
)
SKIPPED_STEPS = Query(
    expr=f"max({increase('gradiometer_skipped_steps_total')})", legend="skipped", colour=colours.SKIPPED
)

LOSS = Query(expr=f"max({series('gradiometer_loss')})", legend="loss", colour=colours.LOSS)
LEARNING_RATE = Query(
    expr=f"max({series('gradiometer_learning_rate')})", legend="learning rate", colour=colours.LEARNING_RATE
)


def step_seconds(quantile: float) -> Query:
    """Estimate a quantile of the step time from its histogram."""
    return Query(
        expr=f"histogram_quantile({quantile:g}, sum by (le) ({rate('gradiometer_step_seconds', '_bucket')}))",
        legend=f"p{quantile * 100:g}",
    )


LAYERS_TOP = Query(
    expr=f"topk(10, max by (layer) ({series('gradiometer_layer_grad_norm_window_max')}))", legend="{{layer}}"
)
# The colours span decades. The clamp keeps the logarithm finite: one infinite cell would flatten all the others.
LAYERS_OVER_TIME = Query(
    expr=f"log10(clamp(max by (layer) ({peak('gradiometer_layer_grad_norm_window_max')}), 1e-9, 1e9))",
    legend="{{layer}}",
)

_LAYER_SQUARES = f"max by (layer) ({series('gradiometer_layer_grad_norm_last')}) ^ 2"
LAYER_SHARES = Query(expr=f"topk(10, {_LAYER_SQUARES} / on () group_left () sum({_LAYER_SQUARES}))", legend="{{layer}}")
UPDATE_RATIOS = Query(
    expr=f"log10(clamp(max by (layer) ({series('gradiometer_layer_update_ratio')}), 1e-9, 1e9))", legend="{{layer}}"
)
NOISE_SCALE = Query(expr=f"max({series('gradiometer_grad_noise_scale')})", legend="noise scale")
GRAD_COSINE = Query(expr=f"max({series('gradiometer_grad_cosine')})", legend="cosine")
RANK_NONFINITE = Query(expr=f"max by (rank) ({increase('gradiometer_rank_nonfinite_total')})", legend="rank {{rank}}")
RANK_NORMS = Query(expr=f"max by (rank) ({series('gradiometer_rank_microbatch_norm_last')})", legend="rank {{rank}}")

AGENT_OVERHEAD = Query(expr=f"max by (instance) ({rate('gradiometer_agent_seconds_total')})", legend="{{instance}}")
ROWS_DROPPED = Query(expr=f"sum({increase('gradiometer_rows_dropped_total')})", legend="rows")
EVENTS_DROPPED = Query(expr=f"sum({increase('gradiometer_events_dropped_total')})", legend="events")
SERIES_DROPPED = Query(expr=f"sum({increase('gradiometer_series_dropped_total')})", legend="series")
AGENT_ERRORS = Query(expr=f"sum({increase('gradiometer_agent_errors_total')})", legend="errors")


def run() -> builders.Dashboard:
    """Compose the dashboard; ``build()`` of the result is Grafana's model of it."""
    return frame(
        "run",
        "Gradiometer / Run",
        "Gradient norms, clipping and incidents of one training run, by step and by layer.",
        [_now(), _gradient(), _clipping(), _shadow(), _training(), _layers(), _insight(), _instrument()],
        choices=("run_id",),
    )


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
        panels.states(state, STATE, colours.STATES),
        panels.value(steps, STEPS),
        panels.value(age, DATA_AGE, steps=((None, "green"), (_MINUTE, "orange"), (5 * _MINUTE, "red"))),
        panels.value(normal, NORM_OVER_BASELINE, steps=((None, "green"), (5, "orange"), (20, "red"))),
        panels.value(incidents, NONFINITE_IN_VIEW, SKIPPED_IN_VIEW, steps=((None, "green"), (0.5, "orange"))),
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
        panels.log_graph(norm, NORM_LAST, NORM_PEAK, NORM_BASELINE, CLIP_THRESHOLD),
        panels.histogram_map(histogram, NORM_HISTOGRAM),
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
        panels.graph(ratio, CLIP_RATIO).min(0).max(1),
        panels.log_graph(coefficient, CLIP_COEFFICIENT),
        panels.bars(incidents, NONFINITE_STEPS, SKIPPED_STEPS),
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
    norms = (NORM_LAST, NORM_PEAK)
    return panels.row(107, "Shadow"), [
        panels.log_graph(thresholds, *norms, CLIP_THRESHOLD, SHADOW_THRESHOLD),
        panels.graph(ratio, CLIP_RATIO, SHADOW_RATIO).min(0).max(1),
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
        panels.graph(loss, LOSS),
        panels.graph(rate, LEARNING_RATE),
        panels.graph(seconds, *(step_seconds(quantile) for quantile in (0.5, 0.9, 0.99))),
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
        panels.layer_map(over_time, LAYERS_OVER_TIME),
        panels.ranking(largest, LAYERS_TOP, label="layer", column="Norm"),
    ]


def _insight() -> Section:
    return panels.row(106, "Insight"), [*_by_layer(), *_of_the_step()]


def _by_layer() -> list[Panel]:
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
        panels.layer_map(ratios, UPDATE_RATIOS),
        panels.graph(share, LAYER_SHARES).min(0),
    ]


def _of_the_step() -> list[Panel]:
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
        panels.log_graph(noise, NOISE_SCALE),
        panels.graph(cosine, GRAD_COSINE).min(-1).max(1),
        panels.bars(bad, RANK_NONFINITE),
        panels.log_graph(own, RANK_NORMS),
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
        panels.graph(overhead, AGENT_OVERHEAD).min(0),
        panels.bars(dropped, ROWS_DROPPED, EVENTS_DROPPED, SERIES_DROPPED),
        panels.bars(errors, AGENT_ERRORS),
    ]
