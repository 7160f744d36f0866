"""``gradiometer grafana``: put the dashboards, and alert rules, into a Grafana by hand, and see what that changes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradiometer_dashboards.rules.choices import read_thresholds, split_thresholds
from gradiometer_monitor.grafana.change import Change
from gradiometer_monitor.grafana.client import Grafana, GrafanaError
from gradiometer_monitor.grafana.provision import apply as provision
from gradiometer_monitor.grafana.rule_settings import AlertRuleSettings
from gradiometer_monitor.grafana.settings import GrafanaSettings

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    help="Put the dashboards and alerts into a Grafana.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
WIDTH = 200
FAILED, USAGE, KEPT, PENDING = 1, 2, 3, 4

Url = Annotated[str, typer.Option(envvar="GRADIOMETER_GRAFANA_URL", help="Where Grafana is, with its sub path.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        envvar="GRADIOMETER_GRAFANA_TOKEN_FILE",
        help="File with a service account's token; without it user:password@ must stand in the URL.",
    ),
]
Alerts = Annotated[
    bool,
    typer.Option(
        "--alerts", help="Make the alert rules too, where Prometheus has none of ours; the next five are of them."
    ),
]
Labels = Annotated[list[str] | None, typer.Option(help="Label that alerts keep, as 'cluster'; may be repeated.")]
Limits = Annotated[list[str] | None, typer.Option("--set", help="THRESHOLD=VALUE, as spike_ratio=20; may be repeated.")]
GrafanaUrl = Annotated[
    str | None, typer.Option(help="Where people open Grafana: links begin with it [default: --url].")
]
RunbookUrl = Annotated[str, typer.Option(help="What runbooks' addresses begin with.")]
Job = Annotated[str, typer.Option(help="Regular expression of the scrape jobs that are monitors.")]
RULES = AlertRuleSettings()


@app.callback()
def _group() -> None:
    """Keep ``apply`` a command of its own, though it is the only one."""


@app.command()
def apply(
    url: Url,
    token_file: TokenFile = None,
    prometheus_url: Annotated[
        str | None, typer.Option(help="Where Grafana finds Prometheus; the datasource is made of it.")
    ] = None,
    datasource_uid: Annotated[str | None, typer.Option(help="Datasource that the dashboards open with.")] = None,
    scrape_interval_seconds: Annotated[
        int | None, typer.Option(help="Interval of the scrapes, for the datasource that is made.")
    ] = None,
    folder: Annotated[str | None, typer.Option(help="Title of the dashboards' folder [default: Gradiometer].")] = None,
    uid_prefix: Annotated[
        str | None, typer.Option(help="What all uids begin with; another one gives another set [default: gradiometer].")
    ] = None,
    org_id: Annotated[int | None, typer.Option(help="Organisation, for a user who is in several.")] = None,
    ca_file: Annotated[Path | None, typer.Option(help="Authorities to trust instead of the system's.")] = None,
    timeout_seconds: Annotated[float | None, typer.Option(help="Time for an answer [default: 10].")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Set back what was changed in Grafana.")] = False,
    alerts: Alerts = False,
    grafana_url: GrafanaUrl = None,
    runbook_url: RunbookUrl = RULES.runbook_url,
    job: Job = RULES.job,
    by: Labels = None,
    set_: Limits = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would be changed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Make folder, datasource, dashboards and, with --alerts, alert rules in Grafana, and say what that changed.

    Exit status: 0 all is as it should be; 1 something failed; 2 usage; 3 something was left as somebody made it;
    4 with --dry-run, something would be changed.
    """
    given: dict[str, Any] = {
        "url": url, "token_file": token_file, "prometheus_url": prometheus_url, "datasource_uid": datasource_uid,
        "scrape_interval_seconds": scrape_interval_seconds, "folder": folder, "uid_prefix": uid_prefix,
        "org_id": org_id, "ca_file": ca_file, "timeout_seconds": timeout_seconds, "overwrite": overwrite,
        "alerts": alerts,
        "alert_rules": {"grafana_url": grafana_url, "runbook_url": runbook_url, "job": job, "by": by or ()},
    }  # fmt: skip
    given["alert_rules"]["thresholds"] = _limits(set_ or ())
    version, changes = _apply(_settings(given), dry_run=dry_run)
    if as_json:
        said = {"grafana": version, "dry_run": dry_run, "changes": [asdict(change) for change in changes]}
        typer.echo(json.dumps(said, indent=1))
    else:
        Console(width=WIDTH).print(_table(changes, version, dry_run=dry_run))
    raise typer.Exit(_status(changes, dry_run=dry_run))


def _limits(given: Sequence[str]) -> dict[str, Any]:
    limits = split_thresholds(given)
    try:
        read_thresholds(limits)
    except ValueError as error:
        typer.echo(f"gradiometer: --set: {error}", err=True)
        raise typer.Exit(USAGE) from error
    return limits


def _settings(given: dict[str, Any]) -> GrafanaSettings:
    try:
        settings = GrafanaSettings.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False):
            name = "--" + ".".join(str(part) for part in item["loc"] if part != "alert_rules").replace("_", "-")
            typer.echo(f"gradiometer: {name}: {item['msg'].removeprefix('Value error, ')}", err=True)
        raise typer.Exit(USAGE) from error
    if settings.alert_rules != RULES and not settings.alerts:
        typer.echo("gradiometer: --alerts: expected it too, with options that are of the alert rules", err=True)
        raise typer.Exit(USAGE)
    return settings


def _apply(settings: GrafanaSettings, *, dry_run: bool) -> tuple[str, list[Change]]:

    try:
        grafana = Grafana(settings)
    except (OSError, ValueError) as error:
        typer.echo(f"gradiometer: {error}", err=True)
        raise typer.Exit(USAGE) from error
    try:
        return provision(grafana, dry_run=dry_run, wait=time.sleep)
    except GrafanaError as error:
        typer.echo(f"gradiometer: {error}", err=True)
        raise typer.Exit(FAILED) from error
    finally:
        grafana.close()


def _status(changes: list[Change], *, dry_run: bool) -> int:
    states = {change.state for change in changes}
    if "failed" in states:
        return FAILED
    if dry_run and states & {"created", "updated"}:
        return PENDING
    return KEPT if "kept" in states else 0


def _table(changes: list[Change], version: str, *, dry_run: bool) -> Table:
    title = f"Grafana {version}" + (", what would be done" if dry_run else "")
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, padding=0)
    for heading in ("what", "uid", "name", "state", ""):
        table.add_column(heading, overflow="fold")
    for change in changes:
        table.add_row(change.what, change.uid, change.name, change.state, change.detail)
    return table
