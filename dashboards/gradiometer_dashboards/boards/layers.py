"""The *Layers* dashboard: which layers of a run stand out, and how each of them fares."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import heatmap, table, timeseries
from grafana_foundation_sdk.models import common, dashboard

from gradiometer_dashboards import colours, panels
from gradiometer_dashboards.frame import Section, frame
from gradiometer_dashboards.panels import Card, Panel
from gradiometer_dashboards.promql import Query, Selector
from gradiometer_dashboards.queries import layers as layer_queries
from gradiometer_dashboards.queries.layers import IN_GRAPH, IN_MAP, IN_TABLE, LAYERS
from gradiometer_dashboards.tables import Column, joined, labelled, link_within

__all__ = ["largest", "layer_link", "layers"]

_CHOSEN = "Choose layers at the top to see others."
_STAND_OUT = f"those furthest above their own usual norm in the time shown. {_CHOSEN}"
_IN_MAP = f"Of more than {IN_MAP} layers, those that vanish or explode, and {_STAND_OUT}"
_OF_MANY = f"Of more than {IN_GRAPH} layers, {_STAND_OUT}"
_NAMED = "/^(?!all other layers$)/"
"""Series that are a layer."""
_OF_SERIES, _OF_CELL = "${__field.labels.layer}", "${__value.raw}"


def layers() -> builders.Dashboard:
    """Compose the dashboard; ``build()`` of the result is Grafana's model of it."""
    return frame(
        "layers",
        "Gradiometer / Layers",
        "Gradients of one training run by layer: who stands out, who learns nothing, who decides what a clip does.",
        [_now(), _norms(), _balance(), _updates(), _trouble()],
        choices=("run_id", "layer"),
    )


def layer_link(board: str, title: str, layer: str = _OF_CELL) -> dict[str, Any]:
    """Link to a dashboard of ours with this run, time and data source, and one layer chosen."""
    return link_within(board, title, "layer", layer)


def largest(card: Card, *links: dict[str, Any], of: Selector = LAYERS) -> table.Panel:
    """List the layers with the largest norms of the last minute, one row each; ``links`` lead on from their names."""
    rank = layer_queries.by_layer(layer_queries.LARGEST, of=of)

    def column(title: str, expr: str, decimals: int = 3, unit: str = "none") -> Column:
        return Column(title=title, expr=layer_queries.only_first(expr, rank), unit=unit, decimals=decimals)

    state = Column(
        title="State",
        expr=layer_queries.only_first(layer_queries.state(of), rank),
        names=layer_queries.STATE_NAMES,
    )
    return joined(
        card,
        Column(title="Layer", label="layer", links=links),
        [
            column("Largest", rank),
            column("Newest", layer_queries.by_layer(layer_queries.LAST, of=of)),
            column("Score", layer_queries.by_layer(layer_queries.SCORE, of=of), 1),
            column("Share", layer_queries.share(of), 1, "percentunit"),
            column("Update / weight", layer_queries.by_layer(layer_queries.UPDATE_RATIO, of=of), 1, "sci"),
            state,
        ],
        layer_queries.only_first(rank, rank),
    )


def _here() -> tuple[dict[str, Any], ...]:
    return layer_link("layers", "Only this layer"), layer_link("run", "The run at this time")


def _by_layer(panel: timeseries.Panel) -> timeseries.Panel:
    """Let each layer's series lead to that layer alone, and back to the run."""
    links = [
        layer_link("layers", "Only this layer", _OF_SERIES),
        layer_link("run", "The run at this time", _OF_SERIES),
    ]
    return panel.override_by_regexp(_NAMED, [dashboard.DynamicConfigValue("links", links)])


def _from_top(card: Card, query: Query) -> heatmap.Panel:
    """Draw one row a layer, the first on top."""
    return panels.layer_map(card, query).y_axis(heatmap.YAxisConfig().reverse(True))


def _now() -> Section:
    return panels.row(100, "Now"), [*_counts(), *_outliers()]


def _counts() -> list[Panel]:
    count = Card(1, "Layers", "locale", "Layers of the run that have series of their own here.", width=3, height=4)
    vanishing = Card(
        2,
        "Vanishing",
        "locale",
        "Layers whose gradient has been next to nothing for 64 steps: at most 1/1000 of their usual norm, or below "
        "1e-8 an element. They learn nothing. 0 is good.",
        width=4,
        height=4,
    )
    exploding = Card(
        3,
        "Exploding",
        "locale",
        "Layers whose gradient was above 10 times their usual norm, or not finite, in each of the last 8 steps. "
        "0 is good.",
        width=4,
        height=4,
    )
    nonfinite = Card(
        4,
        "Layers with NaN or Inf in view",
        "locale",
        "Layers that held a gradient of NaN or Inf in some step of the time shown. 0 is good; if it is all of them, "
        "one bad batch or loss will do, and the table Where NaN began, below, names the first.",
        width=5,
        height=4,
    )
    return [
        panels.value(count, layer_queries.COUNT),
        panels.value(vanishing, layer_queries.VANISHING, steps=colours.ANY_IS_ODD),
        panels.value(exploding, layer_queries.EXPLODING, steps=colours.ANY_IS_BAD),
        panels.value(nonfinite, layer_queries.NONFINITE_LAYERS, steps=colours.ANY_IS_BAD).decimals(0),
    ]


def _outliers() -> list[Panel]:
    furthest = Card(
        5,
        "Stands out most",
        "none",
        "The layer furthest above its own usual norm in the time shown, and by how many robust deviations of its log "
        "norm. Noise and slow drift stay in single digits; some 20 are ten times the usual.",
        width=5,
        height=4,
    )
    left_out = Card(
        6,
        "Left out of scrapes",
        "locale",
        "Series of layers that the monitor's series budget leaves out. Where this is not 0, those layers are in no "
        "map, graph or table here; the quantiles, all other layers of the shares, and how many vanish or explode still "
        "hold them. Those non-finite most often stay, then those furthest above their usual norm. To see all, raise "
        "the monitor's series_budget.",
        width=3,
        height=4,
    )
    best = Query(expr=f"topk(1, {layer_queries.worst_score()})", legend="{{layer}}")
    return [
        panels.value(furthest, best).text_mode(common.BigValueTextMode.VALUE_AND_NAME).decimals(1).no_value("not yet"),
        panels.value(left_out, layer_queries.LEFT_OUT, steps=colours.ANY_IS_ODD),
    ]


def _norms() -> Section:
    over_time = Card(
        7,
        "Gradient norm by layer",
        "none",
        "Decimal logarithm of each layer's largest norm before clipping, in natural order of names, the first on top. "
        "A dark row is a layer that learns nothing; a bright column is a step that hit every layer; a bright row that "
        f"begins somewhere is a layer that explodes. Below {layer_queries.LEAST} and above {layer_queries.MOST}, Inf "
        f"too, colours do not tell apart. {_IN_MAP}",
        width=14,
        height=14,
    )
    table = Card(
        8,
        "Largest layers",
        "none",
        f"The {IN_TABLE} layers with the largest norm before clipping in the last minute. Score: how many robust "
        "deviations above its own usual norm, in single digits unless something happened. Share: of the squared norm "
        "in the newest step, large is who decides what a global clip does. Update / weight: about 1e-3 is usual. "
        "Click a name to see it alone.",
        width=10,
        height=14,
    )
    return panels.row(101, "Norms"), [
        _from_top(over_time, layer_queries.NORM_MAP),
        largest(table, *_here()),
        *_norm_graphs(),
    ]


def _norm_graphs() -> list[Panel]:
    chosen = Card(
        9,
        "Norms of chosen layers",
        "none",
        f"Largest norm of each layer before clipping, so that a spike of one step stays visible. {_OF_MANY}",
        width=12,
        height=9,
    )
    quantiles = Card(
        10,
        "Norms across all layers",
        "none",
        "How the layers' largest norms are spread: half of the layers are in the dark band. Whatever the series budget "
        "leaves out is in it. A band that widens is a model whose layers drift apart; a gap was not finite.",
        width=12,
        height=9,
    )
    return [
        _by_layer(panels.log_graph(chosen, layer_queries.NORMS)),
        _band(panels.log_graph(quantiles, *layer_queries.QUANTILES)),
    ]


def _band(panel: timeseries.Panel) -> timeseries.Panel:
    """Fill between the extremes faintly, and between the quartiles darker."""
    for upper, lower, opacity in (("largest", "smallest", 8), ("75 % are below", "25 % are below", 25)):
        filled = {"custom.fillBelowTo": lower, "custom.fillOpacity": opacity}
        panel = panel.override_by_name(upper, [dashboard.DynamicConfigValue(id_, to) for id_, to in filled.items()])
    for index, query in enumerate(layer_queries.QUANTILES):
        colour = colours.PEAK if index in (0, len(layer_queries.QUANTILES) - 1) else colours.NORM
        fixed = {"mode": dashboard.FieldColorModeId.FIXED, "fixedColor": colour}
        panel = panel.override_by_name(query.legend, [dashboard.DynamicConfigValue("color", fixed)])
    return panel.fill_opacity(0)


def _balance() -> Section:
    shares = Card(
        11,
        "Share of the squared norm",
        "percentunit",
        f"Whose gradient a global clip follows: the {IN_GRAPH} layers with the largest norms of the time shown, and "
        "all others together; the whole is 100 %. One layer that takes nearly all of it sets the size of every other "
        "layer's update. A gap is a step that was not finite.",
        width=12,
        height=10,
    )
    scores = Card(
        12,
        "Anomaly score",
        "none",
        "By how many robust deviations each layer's largest norm of the last minute is above its own usual one. Noise "
        "and slow drift stay in single digits; all layers high is a bad step, one layer alone is a bad layer. "
        f"{_OF_MANY}",
        width=12,
        height=10,
    )
    stacked = common_builders.StackingConfig().mode(common.StackingMode.NORMAL)
    share_graph = panels.graph(shares, layer_queries.SHARES, layer_queries.OTHER_SHARES).stacking(stacked)
    return panels.row(102, "Balance"), [
        _by_layer(share_graph.fill_opacity(60).line_width(0).min(0).max(1)),
        _by_layer(panels.graph(scores, layer_queries.ANOMALY).no_value("not yet")),
    ]


def _updates() -> Section:
    ratios = Card(
        13,
        "Update / weight by layer",
        "none",
        "Decimal logarithm of the norm of a step's update over that of the weights, in the newest sampled step. "
        "About -3 is usual; a layer far above the others is about to be torn apart, one far below stands still. Empty "
        f"with updates_every=0. {_IN_MAP}",
        width=24,
        height=12,
    )
    weights = Card(
        14,
        "Weight norm",
        "none",
        "L2 norm of the weights. Steady growth under a constant learning rate shrinks the update in proportion; a jump "
        f"is an update that was too large. {_OF_MANY}",
        width=12,
    )
    cosine = Card(
        15,
        "Cosine to the step before",
        "none",
        "Likeness of a layer's successive gradients: near -1 its steps undo each other, as with too large a learning "
        f"rate; near 0 is noise. Measured where the job asked for it by cosine=True. {_OF_MANY}",
        width=12,
    )
    return panels.row(103, "Updates"), [
        _from_top(ratios, layer_queries.UPDATE_MAP),
        _by_layer(panels.log_graph(weights, layer_queries.WEIGHTS)),
        _by_layer(panels.graph(cosine, layer_queries.COSINE).min(-1).max(1).no_value("not asked for: cosine=True")),
    ]


def _trouble() -> Section:
    counts = Card(
        16,
        "Vanishing and exploding layers",
        "locale",
        "How many layers vanish or explode, all layers counted. Anything above zero for longer than a few scrapes is "
        "worth a look at their names beside.",
        width=12,
    )
    named = Card(
        17,
        "Vanishing or exploding now",
        "none",
        "The layers that vanish or explode, at most 20 of each. Nothing here is good.",
        width=12,
    )
    nonfinite = Card(
        18,
        "Non-finite steps by layer",
        "short",
        "Steps in which a gradient of the layer held NaN or Inf, counted over the last few scrapes. Nothing here is "
        f"good. Of more than {IN_GRAPH} layers, those with most such steps in the time shown. {_CHOSEN}",
        width=12,
    )
    origins = Card(
        20,
        "Where NaN began",
        "none",
        "Layers whose gradient was the first of a step, in the order of the backward pass, to hold NaN or Inf, and how "
        "many steps of the time shown began there. From there NaN spreads. The model's last layer says little: the "
        "loss, or what comes before it, was not finite, as in every step once NaN is in the weights. In steps without "
        "armed backward hooks the order is that of the last one with them, or else presumed: the parameters' own, "
        f"backwards. The {IN_TABLE} with most such steps; empty is good.",
        width=12,
    )
    outstanding = Card(
        19,
        "Layers that stood out",
        "none",
        f"The {IN_TABLE} layers furthest above their own usual norm in the time shown: at their worst. Click a name to "
        "see it alone.",
        width=24,
        height=9,
    )
    return panels.row(104, "Trouble"), [
        panels.bars(counts, *layer_queries.STATE_COUNTS),
        _states(named),
        _by_layer(panels.bars(nonfinite, layer_queries.NONFINITE).no_value("none")),
        _origins(origins),
        _outstanding(outstanding),
    ]


def _states(card: Card) -> table.Panel:
    state = layer_queries.state()
    newest = f"{layer_queries.by_layer(layer_queries.LAST)} and on (layer) {state}"
    columns = [
        Column(title="State", expr=state, names=layer_queries.STATE_NAMES),
        Column(title="Newest norm", expr=newest, unit="sci", decimals=2),
    ]
    return joined(card, Column(title="Layer", label="layer", links=_here()), columns, state)


def _origins(card: Card) -> table.Panel:
    query = Query(expr=f"topk({IN_TABLE}, {layer_queries.origins_in_view()})", legend="{{layer}}")
    columns = [Column(title="Layer", label="layer", links=_here()), Column(title="Steps that began here", decimals=0)]
    return labelled(card, query, columns).no_value("none")


def _outstanding(card: Card) -> table.Panel:
    worst = layer_queries.worst_score()

    def column(title: str, expr: str, decimals: int) -> Column:
        return Column(title=title, expr=layer_queries.only_first(expr, worst), decimals=decimals)

    columns = [
        column("Highest score", worst, 1),
        column("Largest norm", layer_queries.largest_in_view(), 3),
        column("Non-finite steps", layer_queries.nonfinite_in_view(), 0),
    ]
    key = Column(title="Layer", label="layer", links=_here())
    return joined(card, key, columns, layer_queries.only_first(worst, worst))
