"""What the *Run* dashboard asks of a run as a whole; what it asks of layers is in
:mod:`gradiometer_dashboards.queries.layers`.

Guarantees: a run that spans hosts is counted once, and a peak of one step is seen at any zoom.
"""

from __future__ import annotations

from gradiometer_dashboards import colours
from gradiometer_dashboards.promql import (
    FLEET,
    RUN,
    Query,
    Selector,
    finite,
    firing,
    gained_in_view,
    increase,
    peak,
    rate,
    series,
)
from gradiometer_dashboards.thresholds import THRESHOLDS

__all__ = [
    "AGENT_ERRORS",
    "AGENT_OVERHEAD",
    "ALERTS",
    "CALLBACK_FAILURES",
    "CLIPPED_NOW",
    "CLIP_COEFFICIENT",
    "CLIP_RATIO",
    "CLIP_THRESHOLD",
    "DATA_AGE",
    "EVENTS_DROPPED",
    "GPU_MEMORY",
    "GPU_POWER",
    "GPU_TEMPERATURE",
    "GPU_THROTTLED",
    "GPU_UTILIZATION",
    "GRAD_COSINE",
    "HARMFUL_STEPS",
    "HARM_IN_VIEW",
    "LEARNING_RATE",
    "LOSS",
    "LOSS_SCALE",
    "NOISE_SCALE",
    "NONFINITE_IN_VIEW",
    "NONFINITE_STEPS",
    "NORM_BASELINE",
    "NORM_HISTOGRAM",
    "NORM_LAST",
    "NORM_OVER_BASELINE",
    "NORM_PEAK",
    "POLICY_ACTIONS",
    "POLICY_CHANGES",
    "POLICY_REJECTIONS",
    "POLICY_REVISION",
    "ROWS_DROPPED",
    "SERIES_DROPPED",
    "SHADOW_RATIO",
    "SHADOW_THRESHOLD",
    "SKIPPED_IN_A_ROW",
    "SKIPPED_IN_VIEW",
    "SKIPPED_STEPS",
    "SPIKE",
    "STATE",
    "STEPS",
    "clip_ratio",
    "clip_threshold",
    "of_gpus",
    "step_seconds",
]

_STATES = series("gradiometer_run_state")
STATE = Query(expr=f"max by (state) ({_STATES}) == 1", legend="{{state}}")
STEPS = Query(expr=f"max({series('gradiometer_steps_total')})", legend="steps")
_AGE = f"time() - min({series('gradiometer_last_step_timestamp_seconds')})"
DATA_AGE = Query(expr=f"({_AGE}) * on () group_right () (max by (state) ({_STATES}) == 1)", legend="{{state}}")
"""By state: a long time is bad of a run that is running, and says nothing of one that is over."""
_LARGEST, _FINITE = (
    f"max({series(f'gradiometer_grad_norm_{name}')}) / max({series('gradiometer_grad_norm_baseline')})"
    for name in ("window_max", "finite_window_max")
)
_TELLING = f"{_LARGEST} unless on () {series('gradiometer_loss_scale')} > 0 or {_FINITE}"
NORM_OVER_BASELINE = Query(
    expr=f"({_TELLING}) * on () group_right () (max by (state) ({_STATES}) == 1)", legend="{{state}}"
)
"""By state: of a run that is over it is the last minute that there was, and nobody has to look."""
CLIPPED_NOW = Query(expr=f"max({series('gradiometer_clip_ratio')})", legend="clipped")
NONFINITE_IN_VIEW = Query(expr=f"max({gained_in_view('gradiometer_nonfinite_steps_total')})", legend="non-finite")
SKIPPED_IN_VIEW = Query(expr=f"max({gained_in_view('gradiometer_skipped_steps_total')})", legend="skipped")
HARM_IN_VIEW = Query(expr=f"max({gained_in_view('gradiometer_nonfinite_updates_total')})", legend="NaN in weights")

_FIRING = firing('run_id="$run_id"')
_CRITICAL = firing('run_id="$run_id", severity="critical"')
_NO_ALERT = f'label_replace(0 * max({_STATES}), "alert", "none", "", "")'
ALERTS = Query(
    expr=f'max by (alert) (label_replace(2 * {_CRITICAL} or {_FIRING}, "alert", "$1", "alertname", "Gradiometer(.*)"))'
    f" or on () {_NO_ALERT}",
    legend="{{alert}}",
)
"""The names of the alerts that fire: 2 for what is critical, 1 for the others, and 0 for the word none."""

NORM_LAST = Query(
    expr=finite(f"max({series('gradiometer_grad_norm_last')})"), legend="newest step", colour=colours.NORM
)
NORM_PEAK = Query(
    expr=f"max({peak('gradiometer_grad_norm_finite_window_max')})", legend="window maximum", colour=colours.PEAK
)
_BASELINE = f"max({series('gradiometer_grad_norm_baseline')})"
NORM_BASELINE = Query(expr=_BASELINE, legend="baseline", colour=colours.BASELINE)
SPIKE = Query(
    expr=f"{THRESHOLDS.spike_ratio:g} * {_BASELINE}",
    legend=f"{THRESHOLDS.spike_ratio:g} times the baseline",
    colour=colours.BAD,
)


def _mode(mode: str) -> Selector:
    return RUN & f'mode="{mode}"'


def clip_threshold(mode: str, legend: str, colour: str) -> Query:
    """Show the thresholds of the policies that ``act`` or are in ``shadow``; one that bounds no norm has Inf."""
    found = f"max by (policy) ({series('gradiometer_clip_threshold', of=_mode(mode))})"
    return Query(expr=finite(found), legend=legend, colour=colour)


CLIP_THRESHOLD = clip_threshold("act", "threshold of {{policy}}", colours.THRESHOLD)
SHADOW_THRESHOLD = clip_threshold("shadow", "threshold of {{policy}} in shadow", colours.SHADOW)
NORM_HISTOGRAM = Query(expr=f"max by (le) ({increase('gradiometer_grad_norm', '_bucket')})", legend="{{le}}")


def clip_ratio(mode: str, legend: str, colour: str) -> Query:
    """Divide the steps that each policy clipped, or in ``shadow`` would have, by those that were taken.

    A run that stands still has no ratio: dividing by zero would draw NaN in the legend.
    """
    return Query(
        expr=f"max by (policy) ({rate('gradiometer_clip_events_total', of=_mode(mode))})"
        f" / on () group_left () (max({rate('gradiometer_steps_total')}) > 0)",
        legend=legend,
        colour=colour,
    )


CLIP_RATIO = clip_ratio("act", "{{policy}}", colours.CLIPPED)
SHADOW_RATIO = clip_ratio("shadow", "{{policy}} in shadow", colours.SHADOW)
CLIP_COEFFICIENT = Query(
    expr=f"min by (policy) (min_over_time({series('gradiometer_clip_coefficient', of=_mode('act'))}[$__interval]))",
    legend="{{policy}}",
    colour=colours.CLIPPED,
)
NONFINITE_STEPS = Query(
    expr=f"max({increase('gradiometer_nonfinite_steps_total')})", legend="non-finite", colour=colours.NONFINITE
)
SKIPPED_STEPS = Query(
    expr=f"max({increase('gradiometer_skipped_steps_total')})", legend="skipped", colour=colours.SKIPPED
)
HARMFUL_STEPS = Query(
    expr=f"max({increase('gradiometer_nonfinite_updates_total')})", legend="NaN in weights", colour=colours.HARM
)
SKIPPED_IN_A_ROW = Query(
    expr=f"max({peak('gradiometer_skipped_steps_in_a_row')})", legend="skipped in a row", colour=colours.SKIPPED
)

LOSS = Query(expr=finite(f"max({series('gradiometer_loss')})"), legend="loss", colour=colours.LOSS)
LEARNING_RATE = Query(
    expr=f"max({series('gradiometer_learning_rate')})", legend="learning rate", colour=colours.LEARNING_RATE
)
LOSS_SCALE = Query(expr=finite(f"max({series('gradiometer_loss_scale')})"), legend="loss scale", colour=colours.LOSS)


def step_seconds(quantile: float) -> Query:
    """Estimate a quantile of the step time from its histogram; of no steps there is none, rather than NaN."""
    return Query(
        expr=f"histogram_quantile({quantile:g}, sum by (le) ({rate('gradiometer_step_seconds', '_bucket')})) >= 0",
        legend=f"p{quantile * 100:g}",
    )


NOISE_SCALE = Query(expr=f"max({series('gradiometer_grad_noise_scale')})", legend="noise scale")
GRAD_COSINE = Query(expr=f"max({series('gradiometer_grad_cosine')})", legend="cosine")

POLICY_REVISION = Query(expr=f"max({series('gradiometer_policy_revision')})", legend="revision")
POLICY_CHANGES = Query(
    expr=f"max({increase('gradiometer_policy_changes_total')})", legend="changed", colour=colours.THRESHOLD
)
POLICY_REJECTIONS = Query(
    expr=f"max({increase('gradiometer_policy_rejections_total')})", legend="refused", colour=colours.WARNING
)
POLICY_ACTIONS = Query(
    expr=f"max by (condition, action) ({increase('gradiometer_policy_actions_total')})",
    legend="{{condition}}: {{action}}",
)

_AGENTS = f"count by (instance) (group by (instance, rank) ({series('gradiometer_grad_norm_last')}))"
AGENT_OVERHEAD = Query(
    expr=f"max by (instance) ({rate('gradiometer_agent_seconds_total')}) / on (instance) {_AGENTS}",
    legend="{{instance}}",
)
"""What a host's ranks spent in hooks, which is counted for all of them together, over their number."""
ROWS_DROPPED = Query(expr=f"sum({increase('gradiometer_rows_dropped_total')})", legend="rows")
EVENTS_DROPPED = Query(expr=f"sum({increase('gradiometer_events_dropped_total')})", legend="events")
SERIES_DROPPED = Query(expr=f"sum({increase('gradiometer_series_dropped_total')})", legend="series")
AGENT_ERRORS = Query(expr=f"sum({increase('gradiometer_agent_errors_total')})", legend="errors")
CALLBACK_FAILURES = Query(expr=f"sum({increase('gradiometer_callback_failures_total')})", legend="callbacks")

_GPU = "job, instance, gpu, uuid"
_OURS = series("gradiometer_gpu_run_info")


def of_gpus(expr: str) -> Query:
    """Show a value of each GPU on which a rank of the run computes; ranks that share one have a line each."""
    joined = f"{expr} * on ({_GPU}) group_right () {_OURS}"
    return Query(expr=f"max by (instance, gpu, rank) ({joined})", legend="rank {{rank}}: {{instance}} GPU {{gpu}}")


def _gpu(name: str) -> str:
    return series(f"gradiometer_gpu_{name}", of=FLEET)


GPU_UTILIZATION = of_gpus(_gpu("utilization_ratio"))
GPU_MEMORY = of_gpus(f"({_gpu('memory_used_bytes')} / on ({_GPU}) {_gpu('memory_total_bytes')})")
GPU_TEMPERATURE = of_gpus(_gpu("temperature_celsius"))
GPU_POWER = of_gpus(_gpu("power_watts"))
GPU_THROTTLED = Query(
    expr=f"max by (instance, gpu, reason) ({_gpu('throttled')} and on ({_GPU}) {_OURS})",
    legend="{{instance}} GPU {{gpu}}: {{reason}}",
)
