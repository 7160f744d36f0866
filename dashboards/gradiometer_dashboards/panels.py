"""How our panels look: one builder a kind of panel, so that a dashboard says only what is its own.

Guarantees: every panel has its own id, a title, a description, a unit and a datasource; every graph has its legend as a
table on the right with the last and the largest value. Assumes Grafana 11 or later and schema v1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TypeVar

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as dashboard_builders
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common, dashboard
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from gradiometer_dashboards.colours import BAD
from gradiometer_dashboards.promql import Query

__all__ = [
    "DATASOURCE",
    "Card",
    "Panel",
    "Step",
    "alert_list",
    "bars",
    "folded",
    "graph",
    "histogram_map",
    "layer_map",
    "limited",
    "log_graph",
    "row",
    "states",
    "tabular",
    "timeline",
    "value",
    "value_names",
]

DATASOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")
HEATMAP_POINTS = 240
"""Columns asked for in a layer heatmap: its cost is layers times columns."""

HEATMAP_HIDDEN_BELOW = -1e300
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

TIMELINES = 20
"""Bands of a timeline on one page; the others are on the next."""

IMPORTANCE = 3
"""Grafana's number for an alert list that starts with what is worst."""

Panel = Builder[dashboard.Panel]
AnyPanel = TypeVar("AnyPanel", stat.Panel, timeseries.Panel, heatmap.Panel, table.Panel, statetimeline.Panel)
Step = tuple[float | None, str]


@dataclass(frozen=True, slots=True)
class Card:
    """What every panel states. ``id`` must not change once released: links to a panel hold it. Width is out of 24."""

    id: int
    title: str
    unit: str
    description: str
    _: KW_ONLY
    width: int = 8
    height: int = 8


def row(id_: int, title: str) -> dashboard_builders.Row:
    return dashboard_builders.Row(title).id(id_)


def value(card: Card, *queries: Query, steps: tuple[Step, ...] = ((None, "text"),)) -> stat.Panel:
    """Show the newest value of each query; ``steps`` are (from, colour), the first from minus infinity."""
    panel = _dress(stat.Panel(), card).color_mode(common.BigValueColorMode.VALUE).thresholds(_thresholds(steps))
    panel = panel.graph_mode(common.BigValueGraphMode.NONE)
    panel = panel.reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
    return panel.targets([_target(query, index).instant() for index, query in enumerate(queries)])


def states(card: Card, query: Query, colours: dict[str, str]) -> stat.Panel:
    """Show the names of the series that ``query`` returns, each in its colour."""
    panel = value(card, query).text_mode(common.BigValueTextMode.NAME)
    for name, colour in colours.items():
        fixed = {"mode": dashboard.FieldColorModeId.FIXED, "fixedColor": colour}
        panel = panel.override_by_name(name, [dashboard.DynamicConfigValue("color", fixed)])
    return panel


def graph(card: Card, *queries: Query) -> timeseries.Panel:
    """Draw series over time on a linear axis."""
    panel = _dress(timeseries.Panel(), card).legend(_legend()).tooltip(_tooltip()).line_width(1).fill_opacity(5)
    panel = panel.show_points(common.VisibilityMode.NEVER)
    for index, query in enumerate(queries):
        if query.colour:
            many = "{{" in query.legend  # series that mean the same differ in their shade
            mode = dashboard.FieldColorModeId.SHADES if many else dashboard.FieldColorModeId.FIXED
            fixed = {"mode": mode, "fixedColor": query.colour}
            panel = panel.override_by_query(LETTERS[index], [dashboard.DynamicConfigValue("color", fixed)])
    return panel.targets([_target(query, index).range() for index, query in enumerate(queries)])


def log_graph(card: Card, *queries: Query) -> timeseries.Panel:
    """Draw series over time on a logarithmic axis."""
    scale = common_builders.ScaleDistributionConfig().type(common.ScaleDistribution.LOG).log(10)
    return graph(card, *queries).scale_distribution(scale)


def bars(card: Card, *queries: Query) -> timeseries.Panel:
    """Draw counts, where a lone non-zero sample must be as plain as a series of them.

    They are whole: ``increase`` extrapolates to the edges of its span, and makes 1.1 of one.
    """
    panel = graph(card, *queries).draw_style(common.GraphDrawStyle.BARS).fill_opacity(80)
    return panel.min(0).decimals(0)


def histogram_map(card: Card, query: Query) -> heatmap.Panel:
    """Draw a Prometheus histogram over time; ``query`` returns its cumulative buckets by ``le``."""
    panel = _heatmap(card).rows_frame(heatmap.RowsHeatmapOptions().layout(common.HeatmapCellLayout.LE))
    panel = panel.y_axis(heatmap.YAxisConfig().unit(card.unit).axis_placement(common.AxisPlacement.LEFT))
    return panel.targets([_target(query, 0).range().format(PromQueryFormat.HEATMAP)])


def layer_map(card: Card, query: Query) -> heatmap.Panel:
    """Draw one row a series over time, coloured by value."""
    panel = _heatmap(card).max_data_points(HEATMAP_POINTS).cell_values(heatmap.CellValues().unit(card.unit))
    # Unless told otherwise Grafana hides the cells that are not positive, and a logarithm may well be negative.
    panel = panel.filter_values(heatmap.FilterValueRange().le(HEATMAP_HIDDEN_BELOW))
    # In the heatmap format Grafana takes series for cumulative buckets and subtracts each from the next.
    return panel.targets([_target(query, 0).range().format(PromQueryFormat.TIME_SERIES)])


def limited(panel: timeseries.Panel, limit: float) -> timeseries.Panel:
    """Draw a line into a graph where too much begins."""
    dashed = common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
    return panel.thresholds(_thresholds(((None, "transparent"), (limit, BAD)))).thresholds_style(dashed)


def folded(id_: int, title: str, *inside: Panel) -> dashboard_builders.Row:
    """Head a row that is shut when the dashboard opens, and then asks nothing."""
    heading = row(id_, title).collapsed(True)
    for panel in inside:
        heading = heading.with_panel(panel)
    return heading


def timeline(card: Card, query: Query, names: Mapping[int, tuple[str, str]]) -> statetimeline.Panel:
    """Draw a band a series, which changes its text and colour with the value: ``names`` has both for each value."""
    panel = _dress(statetimeline.Panel(), card).mappings([value_names(names)]).merge_values(True).per_page(TIMELINES)
    panel = panel.show_value(common.VisibilityMode.NEVER).legend(
        common_builders.VizLegendOptions().show_legend(False).display_mode(common.LegendDisplayMode.LIST)
    )
    return panel.targets([_target(query, 0).range()])


def value_names(names: Mapping[int, tuple[str, str]]) -> dashboard.ValueMap:
    """Show a text in a colour in place of a number."""
    shown = {
        str(number): dashboard.ValueMappingResult(text=text, color=colour, index=index)
        for index, (number, (text, colour)) in enumerate(names.items())
    }
    return dashboard.ValueMap(options=shown)


def alert_list(card: Card, label_filter: str) -> dashboard_builders.Panel:
    """List the alerts of rules that Grafana knows, its own and those of its data sources, by their labels."""
    states = {"firing": True, "pending": True, "recovering": True, "noData": True, "error": True, "normal": False}
    panel = dashboard_builders.Panel().type("alertlist").id(card.id).title(card.title).description(card.description)
    return (
        panel.span(card.width)
        .height(card.height)
        .options(
            {
                "alertInstanceLabelFilter": label_filter,
                "alertName": "",
                "dashboardAlerts": False,
                "groupBy": [],
                "groupMode": "default",
                "maxItems": 50,
                "showInstances": True,
                "sortOrder": IMPORTANCE,
                "stateFilter": states,
                "viewMode": "list",
            }
        )
    )


def tabular(card: Card, *queries: Query) -> table.Panel:
    """Begin a table of the newest values of queries, which transformations are to shape."""
    judged = dashboard_builders.FieldColor().mode(dashboard.FieldColorModeId.THRESHOLDS)
    panel = _dress(table.Panel(), card).color_scheme(judged)
    return panel.targets([_target(query, i).instant().format(PromQueryFormat.TABLE) for i, query in enumerate(queries)])


def _dress(panel: AnyPanel, card: Card) -> AnyPanel:
    panel = panel.id(card.id).title(card.title).description(card.description).unit(card.unit)
    return panel.datasource(DATASOURCE).span(card.width).height(card.height)


def _target(query: Query, index: int) -> prometheus.Dataquery:
    target = prometheus.Dataquery().ref_id(LETTERS[index]).datasource(DATASOURCE)
    return target.expr(query.expr).legend_format(query.legend)


def _heatmap(card: Card) -> heatmap.Panel:
    colour = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Turbo").steps(64)
    panel = _dress(heatmap.Panel(), card).calculate(False).color(colour).cell_gap(0).show_legend()
    panel = panel.show_value(common.VisibilityMode.NEVER)
    return panel.tooltip(heatmap.HeatmapTooltip().mode(common.TooltipDisplayMode.SINGLE))


def _legend() -> common_builders.VizLegendOptions:
    legend = common_builders.VizLegendOptions().display_mode(common.LegendDisplayMode.TABLE).show_legend(True)
    return legend.placement(common.LegendPlacement.RIGHT).calcs(["lastNotNull", "max"])


def _tooltip() -> common_builders.VizTooltipOptions:
    return common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)


def _thresholds(steps: tuple[Step, ...]) -> dashboard_builders.ThresholdsConfig:
    config = dashboard_builders.ThresholdsConfig().mode(dashboard.ThresholdsMode.ABSOLUTE)
    return config.steps([dashboard.Threshold(value=start, color=colour) for start, colour in steps])
