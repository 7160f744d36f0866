"""``gradiometer rules``: write the alert rules for the place where they are installed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradiometer_dashboards.rules.catalogue import alerts
from gradiometer_dashboards.rules.choices import (
    read_job,
    read_labels,
    read_thresholds,
    read_url,
    split_thresholds,
)
from gradiometer_dashboards.rules.concerns import CONCERNS, Form, check_concerns
from gradiometer_dashboards.rules.fleet import fleet_layer_rules, fleet_rules
from gradiometer_dashboards.rules.grafana import grafana_rules
from gradiometer_dashboards.rules.model import Settings
from gradiometer_dashboards.rules.prometheus import operator_rules, prometheus_rules

__all__ = ["rules"]

FORMS: dict[Form, Callable[[Settings], str]] = {
    "prometheus": prometheus_rules,
    "grafana": grafana_rules,
    "operator": operator_rules,
    "fleet": fleet_rules,
    "fleet-layers": fleet_layer_rules,
}
DEFAULTS = Settings()
WIDTH = 160
Choice = TypeVar("Choice")


def rules(
    context: typer.Context,
    form: Annotated[Form, typer.Argument(help="Who is to read them.")] = "prometheus",
    grafana_url: Annotated[
        str, typer.Option(help="Where people open Grafana: links begin with it.")
    ] = DEFAULTS.grafana_url,
    runbook_url: Annotated[str, typer.Option(help="What runbooks' addresses begin with.")] = DEFAULTS.runbook_url,
    job: Annotated[str, typer.Option(help="Regular expression of the scrape jobs that are monitors.")] = DEFAULTS.job,
    by: Annotated[list[str] | None, typer.Option(help="Label that alerts keep, as 'cluster'; may be repeated.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="THRESHOLD=VALUE, as spike_ratio=20; may be repeated.")
    ] = None,
    datasource_uid: Annotated[
        str, typer.Option(help="Uid in Grafana of the Prometheus that Grafana's rules ask.")
    ] = DEFAULTS.datasource_uid,
    keep_firing: Annotated[
        bool,
        typer.Option(
            "--keep-firing/--no-keep-firing",
            help="Write keep_firing_for, which Prometheus before 2.42 and vmalert before 1.92 refuse.",
        ),
    ] = True,
    out: Annotated[Path | None, typer.Option(help="File to write, instead of the standard output.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Only list the alerts and what they mean.")] = False,
) -> None:
    """Write the alert rules, for Prometheus and what reads its files, for Grafana's own alerting, or the operator.

    fleet and fleet-layers are the recording rules of docs/scaling.md; they take --by and --out. An option that a
    format has no use for is refused.
    """
    check_concerns(form, _given(context))
    settings = Settings(
        grafana_url=_checked("--grafana-url", read_url, grafana_url),
        runbook_url=_checked("--runbook-url", read_url, runbook_url),
        job=_checked("--job", read_job, job),
        by=_checked("--by", read_labels, by or ()),
        thresholds=_checked("--set", read_thresholds, split_thresholds(set_ or ())),
        datasource_uid=_uid(datasource_uid),
        keep_firing=keep_firing,
    )
    if list_:
        Console(width=WIDTH).print(_table(settings))
        return
    text = FORMS[form](settings)
    if out is None:
        typer.echo(text, nl=False)
    else:
        _write(out, text)


def _given(context: typer.Context) -> list[str]:
    """List the parameters that the user gave, be it with the value that they have anyway."""
    sources = {name: context.get_parameter_source(name) for name in CONCERNS}
    return [name for name, source in sources.items() if source is not None and source.name != "DEFAULT"]


def _write(out: Path, text: str) -> None:
    """Write all of it or nothing: Prometheus may read the file that is there at any time."""
    file = out.resolve()
    whole = file.is_file() or not file.exists()  # what is no file, as /dev/stdout, cannot be replaced
    place = file.with_name(f".{file.name}.{os.getpid()}.tmp") if whole else file
    try:
        place.write_text(text, encoding="utf-8")
        if whole:
            if file.exists():
                shutil.copymode(file, place)
            place.replace(file)
    except OSError as error:
        if whole:
            with suppress(OSError):
                place.unlink()
        raise ValueError(
            f"--out: {str(out)!r} cannot be written ({error.strerror}); give a file in a folder that is there, where "
            "you may write, and that has room"
        ) from error


def _checked(option: str, read: Callable[[Any], Choice], given: Any) -> Choice:
    """Read a choice; what is wrong with it is told with the option's name."""
    try:
        return read(given)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _uid(value: str) -> str:
    if not re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", value):
        raise ValueError(f"--datasource-uid: {value!r} is no uid: at most 40 letters, digits, hyphens and underscores")
    return value


def _table(settings: Settings) -> Table:
    table = Table(title="Alerts of gradiometer", title_justify="left", title_style="bold", box=SIMPLE, padding=0)
    for heading in ("alert", "severity", "for", "what it means"):
        table.add_column(heading, no_wrap=heading != "what it means")
    for alert in alerts(settings):
        table.add_row(alert.alertname, alert.severity, alert.lasting, alert.meaning)
    return table
