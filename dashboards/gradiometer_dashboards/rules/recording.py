"""What the alerts on runs stand on, recorded so that each is computed once, and can be graphed beside the alert."""

from __future__ import annotations

from gradiometer_dashboards.rules.expressions import highest, moved, newest, peak_norm
from gradiometer_dashboards.rules.model import Recording, Settings

__all__ = [
    "CLIPPED",
    "CLIPPING",
    "NONFINITE_STEPS",
    "NONFINITE_UPDATES",
    "RATIO",
    "RUNNING",
    "STEPS",
    "STEP_AGE",
    "STEP_SECONDS",
    "recordings",
]

RUNNING = "run:gradiometer_run_running:max5m"
"""1 for a run that was running within the last 5 minutes."""
STEPS = "run:gradiometer_steps:min5m"
"""Steps that the run had taken at every scrape of the last 5 minutes: a run that began anew begins at 0."""
NONFINITE_UPDATES = "run:gradiometer_nonfinite_updates:increase10m"
NONFINITE_STEPS = "run:gradiometer_nonfinite_steps:increase10m"
RATIO = "run:gradiometer_grad_norm:max3m_over_baseline"
CLIPPING = 'mode="act", policy!~"percentile|adagc|agc"'
"""Of the policies that act, those whose usual step is untouched: the others bound most steps, by design."""
CLIPPED = "run:gradiometer_clip_events:ratio15m"
STEP_SECONDS = "run:gradiometer_step_seconds:mean"
"""Over the whole run, so that a run that hangs keeps it."""
STEP_AGE = "run:gradiometer_last_step:age_seconds"


def recordings(settings: Settings) -> tuple[Recording, ...]:
    """List the recording rules, in the order in which they must be computed."""
    by = settings.of_run
    grouped = f"max by ({', '.join(by)})"
    acted = highest("gradiometer_clip_events_total", by, of=CLIPPING, over="15m", reduce="increase")
    taken = highest("gradiometer_steps_total", by, over="15m", reduce="increase")
    baseline = newest("gradiometer_grad_norm_baseline", by, "3m")
    steps = highest("gradiometer_steps_total", by, over="5m", reduce="min_over_time")
    expressions = {
        RUNNING: highest("gradiometer_run_state", by, of='state="running"', over="5m"),
        STEPS: "min" + steps.removeprefix("max"),
        NONFINITE_UPDATES: moved("gradiometer_nonfinite_updates_total", by),
        NONFINITE_STEPS: moved("gradiometer_nonfinite_steps_total", by),
        RATIO: f"{peak_norm(by)}\n/ {baseline}",
        CLIPPED: f"{acted}\n/ {taken}",
        STEP_SECONDS: f"{grouped} (gradiometer_step_seconds_sum / gradiometer_step_seconds_count)",
        STEP_AGE: f"time() - {highest('gradiometer_last_step_timestamp_seconds', by)}",
    }
    return tuple(Recording(name=name, expr=expr) for name, expr in expressions.items())
