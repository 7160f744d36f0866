"""Recording rules that make one series a run of what each of its hosts exports: for fleets of many hosts.

Guarantees: every metric of the catalogue that hosts export of runs is either reduced over them or left as it is, by
name; the same Python gives the same text. ``run:gradiometer_x:max`` is renamed to ``gradiometer_x`` on its way to the
central store (``deploy/fleet/prometheus-shard.yml``), where dashboards and alerts are as they are on one host.

A sum over hosts is never recorded: when a host leaves it falls, and ``rate`` takes the fall for a restart. What each
process counts for itself stays a series a host, to be summed after the rate.

Layers are a file of their own, ``fleet-layers.rules.yml``: where the monitors' setting ``layers`` is ``lead`` a run has
each of its layers once already, and to record as many series again would cost more than all else here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from gradiometer.metrics import CATALOGUE, Metric
from gradiometer.metrics.of_monitor import OF_MONITOR
from gradiometer_dashboards.rules.model import Settings

__all__ = ["REDUCTIONS", "fleet_layer_rules", "fleet_rules", "of_layers", "recorded"]

Reduction = Literal["max", "min", "each"]
"""Over the hosts of a run; ``each`` stays a series a host."""

_SAME = (
    "grad_norm", "grad_norm_window_max", "grad_norm_finite_window_max", "grad_norm_mad", "clip_ratio",
    "layer_grad_norm_last", "layer_grad_norm_window_max", "layer_grad_norm_quantile", "layer_nonfinite_total",
    "nonfinite_origin_total", "layer_anomaly_score",
    "layers_vanishing", "layers_exploding", "layer_state", "layer_weight_norm", "layer_update_ratio",
    "layer_grad_cosine", "grad_cosine", "grad_noise_scale", "skipped_steps_in_a_row", "clip_events_total",
    "clip_threshold", "policy_revision", "policy_changes_total", "policy_rejections_total", "policy_actions_total",
    "step_seconds", "loss", "learning_rate", "loss_scale", "run_state", "run_info", "run_label_info", "series_omitted",
)  # fmt: skip
"""The same on every host but for the instant at which it was scraped, or such that the largest is what matters."""
_SMALLEST = ("clip_coefficient", "uncounted_steps")
_OF_RANKS = (
    "grad_norm_last", "rank_nonfinite_total", "rank_microbatch_norm_last", "rank_norm_deviation", "rank_steps_behind",
    "rank_lag_seconds", "last_step_timestamp_seconds",
)  # fmt: skip
"""A rank is on one host: there is nothing to reduce."""
_COMPARED = (
    "steps_total", "nonfinite_steps_total", "skipped_steps_total", "nonfinite_updates_total", "grad_norm_baseline",
)  # fmt: skip
"""By which dashboards compare the hosts of a run."""
_OF_PROCESSES = (
    "rows_dropped_total", "events_dropped_total", "series_dropped_total", "agent_errors_total", "agent_seconds_total",
    "callback_failures_total", "build_info",
)  # fmt: skip
"""What each host counts for itself, of its own ranks."""


def _named(names: Sequence[str], reduction: Reduction) -> dict[str, Reduction]:
    return {f"gradiometer_{name}": reduction for name in names}


REDUCTIONS: dict[str, Reduction] = {
    **_named(_SAME, "max"),
    **_named(_SMALLEST, "min"),
    **_named((*_OF_RANKS, *_COMPARED, *_OF_PROCESSES), "each"),
    **{metric.name: "each" for metric in OF_MONITOR},
}
"""How each metric of the catalogue is reduced over the hosts of a run."""

_HEAD = """\
# Written by `gradiometer rules`; docs/scaling.md tells when and how to use it.
# Evaluate it as often as hosts are scraped (evaluation_interval = scrape_interval). A counter that falls, but to no
# less than half, fell because the host that counted most left: it stays. One that falls further began anew.
groups:
"""


def recorded(name: str, part: str = "") -> str:
    """Name the series that is recorded of a metric; ``part`` is that of a histogram."""
    return f"run:{name}{part}:{REDUCTIONS[name]}"


def fleet_rules(settings: Settings) -> str:
    """Return the text of ``alerts/fleet.rules.yml``; of the labels of targets, the job and ``settings.by`` stay."""
    return _render(settings, layers=False)


def fleet_layer_rules(settings: Settings) -> str:
    """Return the text of ``alerts/fleet-layers.rules.yml``."""
    return _render(settings, layers=True)


def _render(settings: Settings, *, layers: bool) -> str:
    groups: dict[str, list[str]] = {}
    for metric in CATALOGUE.values():
        if REDUCTIONS[metric.name] != "each" and of_layers(metric) == layers:
            groups.setdefault(_group(metric), []).extend(_rules(metric, ("job", *settings.by)))
    return _HEAD + "".join(f"  - name: {name}\n    rules:\n{''.join(rules)}" for name, rules in groups.items())


def of_layers(metric: Metric) -> bool:
    """Tell whether a metric comes and goes with the monitors' setting ``layers``, or is joined with one that does."""
    by_layer = metric.labels == ("run_id", "layer") and metric.name.startswith("gradiometer_layer_")
    return by_layer or metric.name == "gradiometer_series_omitted"


def _group(metric: Metric) -> str:
    """Put into one group what is evaluated one after the other; what is many has groups of its own."""
    if of_layers(metric):
        return f"gradiometer-fleet-{metric.name.removeprefix('gradiometer_').replace('_', '-')}"
    return "gradiometer-fleet-runs"


def _rules(metric: Metric, by: Sequence[str]) -> Iterator[str]:
    for part in ("_bucket", "_count", "_sum") if metric.kind == "histogram" else ("",):
        labels = ", ".join((*by, *metric.labels, *(("le",) if part == "_bucket" else ())))
        now, before = f"{REDUCTIONS[metric.name]} by ({labels}) ({metric.name}{part})", recorded(metric.name, part)
        yield f"      - record: {before}\n        expr: "
        if metric.kind == "gauge":
            yield f"{now}\n"
        else:
            yield f">-\n          ({before} > {now} <= 2 * {now})\n          or {now}\n"
