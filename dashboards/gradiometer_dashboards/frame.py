"""What all dashboards have alike: variables, links between them, annotations, time, and rows of panels.

Guarantees: every dashboard has the same variables under the same names, those it does not use hidden, so that a link
carries run, rank, layer and time range from any of them to any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common, dashboard

from gradiometer_dashboards.colours import BAD, THRESHOLD
from gradiometer_dashboards.panels import DATASOURCE, Panel
from gradiometer_dashboards.promql import FLEET, RUN, firing, series

__all__ = ["TAG", "Section", "frame"]

TAG = "gradiometer"
Section = tuple[builders.Row, Sequence[Panel]]
GRAFANA = common.DataSourceRef(type_val="grafana", uid="-- Grafana --")
MAX_INCIDENTS = 500
"""Annotations shown at once, the newest."""
ALERT_STEP = "15s"
"""How short an alert may be and still be seen; Grafana takes longer steps where the view is long."""


def frame(
    name: str, title: str, description: str, sections: Sequence[Section], *, choices: Sequence[str] = ()
) -> builders.Dashboard:
    """Compose a dashboard; ``choices`` are those of ``run_id``, ``rank`` and ``layer`` that its queries use."""
    board = builders.Dashboard(title).uid(f"gradiometer-{name}").tags([TAG]).readonly().timezone("browser")
    board = board.description(description)
    board = board.time("now-1h", "now").refresh("30s").tooltip(dashboard.DashboardCursorSync.CROSSHAIR)
    board = board.variables(list(_variables(choices))).links([_siblings()])
    board = board.annotations([_every_run(), *_annotations(of_run="run_id" in choices)])
    for heading, section in sections:
        board = board.with_row(heading)
        for panel in section:
            board = board.with_panel(panel)
    return board


def _variables(choices: Sequence[str]) -> Iterator[Builder[dashboard.VariableModel]]:
    yield builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
    known = "gradiometer_run_info" if choices else "gradiometer_build_info"
    yield _many("job", "Job", f"label_values({known}, job)")
    yield _many("instance", "Instance", f'label_values({known}{{job=~"$job"}}, instance)')
    # Run ids that start with a date sort newest first this way.
    newest_first = dashboard.VariableSort.ALPHABETICAL_DESC
    of_fleet = f"label_values({series('gradiometer_run_info', of=FLEET)}, run_id)"
    yield _shown("run_id" in choices, _choice("run_id", "Run", of_fleet, newest_first))
    ranks = f"label_values({series('gradiometer_last_step_timestamp_seconds', of=RUN)}, rank)"
    yield _shown("rank" in choices, _many("rank", "Rank", ranks, dashboard.VariableSort.NUMERICAL_ASC))
    layers = f"label_values({series('gradiometer_layer_grad_norm_last', of=RUN)}, layer)"
    yield _shown("layer" in choices, _many("layer", "Layer", layers, dashboard.VariableSort.NATURAL_ASC))


def _shown(used: bool, variable: builders.QueryVariable) -> builders.QueryVariable:
    return variable if used else variable.hide(dashboard.VariableHide.HIDE_VARIABLE)


def _many(
    name: str, label: str, query: str, sort: dashboard.VariableSort = dashboard.VariableSort.ALPHABETICAL_ASC
) -> builders.QueryVariable:
    everything = dashboard.VariableOption(text="All", value="$__all")
    return _choice(name, label, query, sort).multi(True).include_all(True).all_value(".+").current(everything)


def _choice(name: str, label: str, query: str, sort: dashboard.VariableSort) -> builders.QueryVariable:
    variable = builders.QueryVariable(name).label(label).query(query).datasource(DATASOURCE).sort(sort)
    return variable.refresh(dashboard.VariableRefresh.ON_TIME_RANGE_CHANGED)


def _every_run() -> builders.AnnotationQuery:
    """Turn off what Grafana shows otherwise: all annotations of the dashboard, whichever run they are of."""
    query = builders.AnnotationQuery().name("Annotations & Alerts").datasource(GRAFANA).built_in(1).placement("")
    return query.type("dashboard").enable(False).hide(True).icon_color("rgba(0, 211, 255, 1)")


def _annotations(*, of_run: bool) -> Iterator[builders.AnnotationQuery]:
    """Show what the monitor annotated, of the chosen run or of all; of a run, also its alerts. Each can be turned off.

    Tags can be asked for and not be ruled out, so a change of policy is an incident too: its own colour lies on top.
    """
    tags = [TAG, "$run_id"] if of_run else [TAG]
    yield _tagged("Incidents", tags, "orange")
    yield _tagged("Policy changes", [*tags, "policy_changed"], THRESHOLD)
    if of_run:
        yield _alerts()


def _tagged(name: str, tags: list[str], colour: str) -> builders.AnnotationQuery:
    target = builders.AnnotationTarget().type("tags").tags(tags).match_any(False).limit(MAX_INCIDENTS)
    query = builders.AnnotationQuery().name(name).datasource(GRAFANA).target(cast("Builder[Dataquery]", target))
    return query.enable(True).placement("").icon_color(colour)


def _alerts() -> builders.AnnotationQuery:
    """Show while which of the run's alerts fired, once however many hosts it is of.

    The query stands there twice: Grafana 11 reads that of the annotation, later ones that of its target.
    """
    query = builders.AnnotationQuery().name("Alerts").datasource(DATASOURCE).enable(True).placement("").icon_color(BAD)
    of_run = firing('run_id="$run_id"')
    expr = f"max by (alertname, severity) ({of_run})"
    target = prometheus.Dataquery().ref_id("Anno").expr(expr).interval(ALERT_STEP).range()
    query = query.expr(expr).step(ALERT_STEP).target(target)
    return query.title_format("{{alertname}}").tag_keys("severity")


def _siblings() -> builders.DashboardLink:
    link = builders.DashboardLink("Gradiometer").type(dashboard.DashboardLinkType.DASHBOARDS).tags([TAG])
    return link.include_vars(True).keep_time(True).placement("")
