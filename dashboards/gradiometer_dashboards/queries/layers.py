"""What is asked of the layers of a run, by the dashboards *Run* and *Layers*.

Guarantees: each query returns one series a layer however many hosts export the run, and a bounded number of them
however many layers it has: those that come first by some measure over the whole view, so that no row comes and goes.
"""

from __future__ import annotations

from gradiometer_dashboards import colours
from gradiometer_dashboards.promql import (
    RUN,
    Query,
    Selector,
    by_number,
    chosen_in_view,
    finite,
    gained_in_view,
    increase,
    increase_in_view,
    over_view,
    peak,
    series,
)

__all__ = [
    "ANOMALY",
    "COSINE",
    "COUNT",
    "EXPLODING",
    "IN_GRAPH",
    "IN_MAP",
    "IN_TABLE",
    "LARGEST",
    "LAST",
    "LAYERS",
    "LEFT_OUT",
    "NONFINITE",
    "NONFINITE_LAYERS",
    "NORMS",
    "NORM_MAP",
    "OTHER_SHARES",
    "QUANTILES",
    "SCORE",
    "SHARES",
    "STATE_COUNTS",
    "STATE_NAMES",
    "UPDATE_MAP",
    "UPDATE_RATIO",
    "VANISHING",
    "WEIGHTS",
    "by_layer",
    "largest_in_view",
    "nonfinite_in_view",
    "only_first",
    "origins_in_view",
    "share",
    "state",
    "worst_score",
]

LAYERS = RUN & 'layer=~"$layer"'
IN_MAP, IN_GRAPH, IN_TABLE = 200, 12, 10
"""Layers in a heatmap, in a graph, in a table."""

LEAST, MOST = "1e-8", "1e4"
"""Bounds of what a heatmap tells apart: one layer at zero or at Inf would else take all its colours."""


def by_layer(name: str, more: str = "", *, of: Selector = LAYERS) -> str:
    """Read a metric of each layer once."""
    return f"max by (layer) ({series(name, of=of & more if more else of)})"


def _peaks(name: str, *, of: Selector = LAYERS) -> str:
    return f"max by (layer) ({peak(name, of=of)})"


def _in_view(name: str, *, of: Selector = LAYERS) -> str:
    return f"max by (layer) ({over_view('max_over_time', name, of=of)})"


def _first(expr: str, count: int, rank: str) -> str:
    return chosen_in_view(expr, rank, by="layer", first=f"topk({count}, {{}})")


LARGEST = "gradiometer_layer_grad_norm_window_max"
LAST, SCORE, UPDATE_RATIO, _COUNTER = (
    "gradiometer_layer_grad_norm_last",
    "gradiometer_layer_anomaly_score",
    "gradiometer_layer_update_ratio",
    "gradiometer_layer_nonfinite_total",
)

# A layer has no score in the first steps; it then stands behind all that have one.
_NONFINITE_STEPS = f"max by (layer) ({over_view('increase', _COUNTER, of=LAYERS)})"
_OUTSTANDING = f"({_in_view(SCORE)} or 0 * {_NONFINITE_STEPS} - 1e6)"
"""By how much each layer was above its own usual norm, at its worst in the view."""


def _standing_out(expr: str) -> str:
    return _first(expr, IN_GRAPH, _OUTSTANDING)


_TROUBLED = f"1e6 * {_in_view('gradiometer_layer_state')}"


def _to_map(expr: str) -> Query:
    """Draw logarithms of ``expr``, those of layers that vanish or explode before all others."""
    chosen = _first(expr, IN_MAP, f"({_TROUBLED} or {_OUTSTANDING})")
    return Query(expr=by_number(f"log10(clamp({chosen}, {LEAST}, {MOST}))", "layer"), legend="{{layer}}")


NORM_MAP = _to_map(_peaks(LARGEST))
UPDATE_MAP = _to_map(by_layer(UPDATE_RATIO))
NORMS = Query(expr=_standing_out(finite(_peaks(LARGEST))), legend="{{layer}}")
ANOMALY = Query(expr=_standing_out(finite(_peaks(SCORE))), legend="{{layer}}")
COSINE = Query(expr=_standing_out(by_layer("gradiometer_layer_grad_cosine")), legend="{{layer}}")
WEIGHTS = Query(expr=_standing_out(by_layer("gradiometer_layer_weight_norm")), legend="{{layer}}")

_LOST = f"max by (layer) ({increase(_COUNTER, of=LAYERS)})"
NONFINITE = Query(expr=_first(_LOST, IN_GRAPH, f"({_NONFINITE_STEPS} > 0)"), legend="{{layer}}")

_HOST = "job, instance"
_SQUARES = f"{series(LAST)} ^ 2"
_OMITTED = series("gradiometer_series_omitted")
# Where a budget leaves layers out their squares are missing in the sum. The global norm has them all, but may be that
# of a neighbouring step where the host has several ranks.
_ALL_SQUARES = (
    f"(sum by ({_HOST}) ({_SQUARES}) and on ({_HOST}) ({_OMITTED} == 0)"
    f" or on ({_HOST}) max by ({_HOST}) ({series('gradiometer_grad_norm_last')} ^ 2))"
)


def share(of: Selector = LAYERS, rank: str | None = None) -> str:
    """Divide the square of each layer's norm by that of the whole gradient, as the same host saw them.

    Each host has all layers, at its own newest step; the mean of shares that sum to 1 sums to 1, their maxima do not.
    Of many layers those that ``rank`` puts first are divided, which is cheaper than to choose afterwards.
    """
    squares = f"{series(LAST, of=of)} ^ 2"
    chosen = _first(squares, IN_GRAPH, rank) if rank else squares
    return f"avg by (layer) (({chosen}) / on ({_HOST}) group_left () {_ALL_SQUARES})"


_SHARES = share(rank=_in_view(LAST))
SHARES = Query(expr=_SHARES, legend="{{layer}}")
OTHER_SHARES = Query(expr=f"clamp_min(1 - sum({_SHARES}), 0)", legend="all other layers", colour=colours.NEUTRAL)


def _quantile(q: str, legend: str) -> Query:
    of = RUN & f'q="{q}"'
    return Query(expr=finite(f"max({peak('gradiometer_layer_grad_norm_quantile', of=of)})"), legend=legend)


QUANTILES = [
    _quantile("1", "largest"),
    _quantile("0.95", "95 % are below"),
    _quantile("0.75", "75 % are below"),
    _quantile("0.5", "median"),
    _quantile("0.25", "25 % are below"),
    _quantile("0", "smallest"),
]

COUNT = Query(expr=f"count({by_layer(LAST, of=RUN)})", legend="layers")
VANISHING = Query(expr=f"max({series('gradiometer_layers_vanishing')})", legend="vanishing")
EXPLODING = Query(expr=f"max({series('gradiometer_layers_exploding')})", legend="exploding")
STATE_COUNTS = (
    Query(expr=f"max({peak('gradiometer_layers_vanishing')})", legend="vanishing", colour=colours.WARNING),
    Query(expr=f"max({peak('gradiometer_layers_exploding')})", legend="exploding", colour=colours.BAD),
)
LEFT_OUT = Query(expr=f"max({_OMITTED})", legend="series left out")
NONFINITE_LAYERS = Query(expr=f"sum(max by (layer) ({increase_in_view(_COUNTER)}) > bool 0)", legend="layers")

STATE_NAMES = {1: ("vanishing", colours.WARNING), 2: ("exploding", colours.BAD)}


def state(of: Selector = LAYERS) -> str:
    """Number the state of each layer that has one, by :data:`STATE_NAMES`."""
    exploding, vanishing = (
        by_layer("gradiometer_layer_state", f'state="{name}"', of=of) for name in ("exploding", "vanishing")
    )
    return f"(2 * {exploding} or {vanishing})"


def worst_score(of: Selector = LAYERS) -> str:
    """Read by how many deviations each layer was above its usual norm, at its worst in the view."""
    return _in_view(SCORE, of=of)


def largest_in_view(of: Selector = LAYERS) -> str:
    """Read each layer's largest norm in the view."""
    return _in_view(LARGEST, of=of)


def nonfinite_in_view(of: Selector = LAYERS) -> str:
    """Count the steps of the view in which each layer held NaN or Inf."""
    return f"max by (layer) ({increase_in_view(_COUNTER, of=of)})"


def origins_in_view(of: Selector = LAYERS) -> str:
    """Count the steps of the view whose first non-finite gradient was one of each layer; of no others."""
    return f"(max by (layer) ({gained_in_view('gradiometer_nonfinite_origin_total', of=of, left=True)}) > 0)"


def only_first(expr: str, rank: str) -> str:
    """Keep the layers of a table that ``rank`` puts first."""
    return _first(expr, IN_TABLE, rank)
