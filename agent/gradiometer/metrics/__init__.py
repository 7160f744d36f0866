"""The catalogue: every metric that gradiometer exports, declared once. Needs no torch.

The monitor, the in-process exporter, the dashboards, the alert rules and the documentation all name metrics from here;
a name that is not here fails a test.
"""

from gradiometer.metrics.metric import (
    GRAD_NORM_BUCKETS,
    SCRAPE_SECONDS_BUCKETS,
    STEP_SECONDS_BUCKETS,
    WINDOW_SECONDS,
    Metric,
)
from gradiometer.metrics.of_monitor import OF_MONITOR
from gradiometer.metrics.of_runs import OF_RUNS
from gradiometer.metrics.pushed import OF_STEPS

__all__ = [
    "CATALOGUE",
    "GRAD_NORM_BUCKETS",
    "PUSHED",
    "SCRAPE_SECONDS_BUCKETS",
    "STEP_SECONDS_BUCKETS",
    "WINDOW_SECONDS",
    "Metric",
]

CATALOGUE: dict[str, Metric] = {metric.name: metric for metric in (*OF_RUNS, *OF_MONITOR)}
PUSHED: dict[str, Metric] = {metric.name: metric for metric in OF_STEPS}
"""What remote write sends, with each step's own timestamp. No name is in both, or a push would fight a scrape."""
