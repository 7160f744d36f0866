"""Every PromQL expression of the dashboards, apart from the panels that draw them.

Guarantees: each series carries the matchers of :data:`SELECTOR`, and each metric is in the catalogue. A run that spans
hosts is exported by each host's monitor; what is the same on all of them (norms, decisions) is therefore reduced with
``max``, and what each process counts for itself (losses, errors) with ``sum``.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradiometer.metrics import CATALOGUE

__all__ = ["SELECTOR", "Query", "Selector"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selector:
    """Label matchers that stand in every query, as dashboard variables."""

    job: str = 'job=~"$job"'
    instance: str = 'instance=~"$instance"'
    run: str = 'run_id="$run_id"'

    def __str__(self) -> str:
        return f"{self.job}, {self.instance}, {self.run}"


SELECTOR = Selector()


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """An expression and the legend of its series, in which ``{{label}}`` stands for a label's value."""

    expr: str
    legend: str


def metric(name: str) -> str:
    """Return ``name`` if the catalogue has it, else raise ``KeyError``."""
    return CATALOGUE[name].name


def series(name: str, part: str = "", *, mode: str = "") -> str:
    """Select a metric of the chosen run; ``part`` is ``_bucket``, ``_sum`` or ``_count`` of a histogram.

    ``mode`` chooses policies that ``act`` or are in ``shadow``.
    """
    chosen = f', mode="{mode}"' if mode else ""
    return f"{metric(name)}{part}{{{SELECTOR}{chosen}}}"


def rate(name: str, part: str = "", *, mode: str = "") -> str:
    return f"rate({series(name, part, mode=mode)}[$__rate_interval])"


def increase(name: str, part: str = "") -> str:
    return f"increase({series(name, part)}[$__rate_interval])"


def increase_in_view(name: str) -> str:
    """Count what a counter gained over the dashboard's whole time range."""
    return f"increase({series(name)}[$__range])"


def peak(name: str) -> str:
    """Keep the largest sample between two points of a graph, which zooming out would lose."""
    return f"max_over_time({series(name)}[$__interval])"


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

NORM_LAST = Query(expr=f"max({series('gradiometer_grad_norm_last')})", legend="newest step")
NORM_PEAK = Query(expr=f"max({peak('gradiometer_grad_norm_window_max')})", legend="window maximum")
NORM_BASELINE = Query(expr=f"max({series('gradiometer_grad_norm_baseline')})", legend="baseline")


def clip_threshold(mode: str, legend: str) -> Query:
    """Show the thresholds of the policies that ``act`` or are in ``shadow``."""
    return Query(expr=f"max by (policy) ({series('gradiometer_clip_threshold', mode=mode)})", legend=legend)


CLIP_THRESHOLD = clip_threshold("act", "threshold of {{policy}}")
SHADOW_THRESHOLD = clip_threshold("shadow", "threshold of {{policy}} in shadow")
NORM_HISTOGRAM = Query(expr=f"max by (le) ({increase('gradiometer_grad_norm', '_bucket')})", legend="{{le}}")


def clip_ratio(mode: str, legend: str) -> Query:
    """Divide the steps that each policy clipped, or in ``shadow`` would have, by those that were taken.

    A run that stands still has no ratio: dividing by zero would draw NaN in the legend.
    """
    return Query(
        expr=f"max by (policy) ({rate('gradiometer_clip_events_total', mode=mode)})"
        f" / on () group_left () (max({rate('gradiometer_steps_total')}) > 0)",
        legend=legend,
    )


CLIP_RATIO = clip_ratio("act", "{{policy}}")
SHADOW_RATIO = clip_ratio("shadow", "{{policy}} in shadow")
CLIP_COEFFICIENT = Query(
    expr=f"min by (policy) (min_over_time({series('gradiometer_clip_coefficient', mode='act')}[$__interval]))",
    legend="{{policy}}",
)
NONFINITE_STEPS = Query(expr=f"max({increase('gradiometer_nonfinite_steps_total')})", legend="non-finite")
SKIPPED_STEPS = Query(expr=f"max({increase('gradiometer_skipped_steps_total')})", legend="skipped")

LOSS = Query(expr=f"max({series('gradiometer_loss')})", legend="loss")
LEARNING_RATE = Query(expr=f"max({series('gradiometer_learning_rate')})", legend="learning rate")


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
