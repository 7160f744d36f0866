"""What the *Ranks* dashboard asks, for one rank as for thousands.

Guarantees: a graph of ranks has at most IN_GRAPH series and the heatmap IN_MAP, the same over the whole view. A rank
that several monitors export, as of a directory that hosts share, is one series.
"""

from __future__ import annotations

from gradiometer_dashboards import colours
from gradiometer_dashboards.promql import (
    RUN,
    Query,
    by_number,
    chosen_in_view,
    finite,
    increase,
    increase_in_view,
    over_view,
    peak,
    series,
)
from gradiometer_dashboards.thresholds import THRESHOLDS

__all__ = ["IN_GRAPH", "IN_MAP", "RANKS", "by_rank", "host_count"]

IN_GRAPH = 20
"""Series of a graph."""
IN_MAP = 128
"""Ranks of the heatmap: its cost is ranks times columns."""
RANKS = RUN & 'rank=~"$rank"'
"""Selects the ranks chosen."""

_NEWEST_STEP, _OWN = "gradiometer_last_step_timestamp_seconds", "gradiometer_rank_microbatch_norm_last"
_BAD, _STEPS, _BASELINE = (
    "gradiometer_rank_nonfinite_total",
    "gradiometer_steps_total",
    "gradiometer_grad_norm_baseline",
)
_LEAST, _MOST = "1e-9", "1e3"
"""What a logarithmic axis shows of 0 and of Inf."""


def _max_by_rank(expr: str) -> str:
    return f"max by (rank) ({expr})"


def by_rank(name: str) -> str:
    """Select a metric ``gradiometer_rank_…``, one series a rank chosen."""
    return _max_by_rank(series(f"gradiometer_rank_{name}", of=RANKS))


def _in_graph(expr: str, name: str) -> Query:
    """Draw the ranks whose metric ``name`` was the largest of the time shown."""
    largest = _max_by_rank(over_view("max_over_time", name, of=RANKS))
    chosen = chosen_in_view(expr, largest, by="rank", first=f"topk({IN_GRAPH}, {{}})")
    return Query(expr=chosen, legend="rank {{rank}}")


AGE = f"time() - {_max_by_rank(series(_NEWEST_STEP, of=RANKS))}"
REPORTING = Query(expr=f"sum({AGE} < bool {THRESHOLDS.stalled_seconds:g})", legend="reporting")
SEEN = Query(expr=f"count({_max_by_rank(series(_NEWEST_STEP, of=RANKS))})", legend="seen")
WORLD_SIZE = Query(expr=f"max by (world_size) ({series('gradiometer_run_info')})", legend="{{world_size}}")

_COUNT = f"count({_max_by_rank(series(_NEWEST_STEP))})"
_MOST_ON_A_HOST = f"max(count by (instance) ({series(_NEWEST_STEP)}))"


def _said(condition: str, words: str) -> str:
    return f'label_replace({condition}, "compared", "{words}", "", "")'


COMPARISON = Query(
    expr=" or ".join(
        [
            _said(f"{_COUNT} == 1", "single rank: nothing to compare"),
            _said(f"{_COUNT} > 1 and {_MOST_ON_A_HOST} == 1", "one rank a host: compare hosts"),
            _said(f"{_MOST_ON_A_HOST} > 1", "ranks of a host are compared"),
        ]
    ),
    legend="{{compared}}",
)
FURTHEST_BEHIND = Query(expr=f"topk(1, {by_rank('steps_behind')})", legend="rank {{rank}}")
LARGEST_DEVIATION = Query(expr=f"topk(1, {by_rank('norm_deviation')})", legend="rank {{rank}}")
BAD_IN_VIEW = _max_by_rank(increase_in_view(_BAD, of=RANKS))
BAD_RANKS = Query(expr=f"sum({BAD_IN_VIEW} > bool 0)", legend="ranks")

_OWN_NOW = finite(by_rank("microbatch_norm_last"))
# The colours span decades. The clamp keeps the logarithm finite: one infinite cell would flatten all the others.
OWN_MAP = Query(
    expr=by_number(
        chosen_in_view(
            f"log10(clamp({_max_by_rank(peak(_OWN, of=RANKS))}, 1e-9, 1e9))",
            _max_by_rank(over_view("max_over_time", _OWN, of=RANKS)),
            by="rank",
            first=f"topk({IN_MAP}, {{}})",
        ),
        "rank",
    ),
    legend="{{rank}}",
)
OWN_NORMS = _in_graph(finite(_max_by_rank(peak(_OWN, of=RANKS))), _OWN)
OWN_RATIO = Query(expr=f"max({_OWN_NOW}) / (min({_OWN_NOW}) > 0)", legend="largest / smallest", colour=colours.PEAK)
OWN_VARIATION = Query(
    expr=f"stddev({_OWN_NOW}) / (avg({_OWN_NOW}) > 0)", legend="standard deviation / mean", colour=colours.NORM
)

DEVIATIONS = _in_graph(
    f"clamp({_max_by_rank(peak('gradiometer_rank_norm_deviation', of=RANKS))}, {_LEAST}, {_MOST})",
    "gradiometer_rank_norm_deviation",
)
BAD_BATCHES = Query(
    expr=chosen_in_view(
        _max_by_rank(increase(_BAD, of=RANKS)),
        f"{_max_by_rank(over_view('increase', _BAD, of=RANKS))} > 0",
        by="rank",
        first=f"topk({IN_GRAPH}, {{}})",
    ),
    legend="rank {{rank}}",
)
AGES = Query(
    expr=chosen_in_view(
        AGE,
        _max_by_rank(over_view("max_over_time", _NEWEST_STEP, of=RANKS)),
        by="rank",
        first=f"bottomk({IN_GRAPH}, {{}})",
    ),
    legend="rank {{rank}}",
)
BEHIND = _in_graph(_max_by_rank(peak("gradiometer_rank_steps_behind", of=RANKS)), "gradiometer_rank_steps_behind")
LAGS = _in_graph(by_rank("lag_seconds"), "gradiometer_rank_lag_seconds")

HOST = f"topk by (rank) (1, max by (rank, instance) ({series(_NEWEST_STEP, of=RANKS)}))"
GPU = f"topk by (rank) (1, max by (rank, gpu) ({series('gradiometer_gpu_run_info', of=RANKS)}))"


def _by_host(name: str) -> str:
    return f"max by (instance) ({series(name)})"


def host_count(name: str) -> str:
    """Count in view what each host's monitor says of the run, by the middle of a counter's name."""
    return f"max by (instance) ({increase_in_view(f'gradiometer_{name}_total')})"


HOST_RANKS = f"count by (instance) ({series(_NEWEST_STEP)})"
HOST_AGE = f"time() - min by (instance) ({series(_NEWEST_STEP)})"
HOST_STEPS, HOST_BASELINE, HOST_NORM = (_by_host(name) for name in (_STEPS, _BASELINE, "gradiometer_grad_norm_last"))


def _apart(baseline: str) -> str:
    """Say how far each host is from those in the middle, as a share."""
    known = f"({finite(baseline)})"
    return f"abs({known} / on () group_left () (quantile(0.5, {known}) > 0) - 1)"


HOSTS_APART = Query(
    expr=chosen_in_view(
        f"clamp({_apart(HOST_BASELINE)}, {_LEAST}, {_MOST})",
        _apart(f"max by (instance) ({over_view('max_over_time', _BASELINE)})"),
        by="instance",
        first=f"topk({IN_GRAPH}, {{}})",
    ),
    legend="{{instance}}",
)
HOSTS_BEHIND = Query(
    expr=chosen_in_view(
        f"max({HOST_STEPS}) - on () group_right () {HOST_STEPS}",
        f"max by (instance) ({over_view('max_over_time', _STEPS)})",
        by="instance",
        first=f"bottomk({IN_GRAPH}, {{}})",
    ),
    legend="{{instance}}",
)
