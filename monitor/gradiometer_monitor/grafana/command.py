"""``gradiometer grafana``: put the dashboards into a Grafana by hand, and see what that changes."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradiometer_monitor.grafana.client import Grafana, GrafanaError
from gradiometer_monitor.grafana.provision import Change
from gradiometer_monitor.grafana.provision import apply as provision
from gradiometer_monitor.grafana.settings import GrafanaSettings

__all__ = ["app"]

app = typer.Typer(
    add_completion=False, help="Put the dashboards into a Grafana.", no_args_is_help=True, rich_markup_mode=None
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing; say what would be changed.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Make folder, datasource and dashboards in Grafana, and say what that changed.

    Exit status: 0 all is as it should be; 1 something failed; 2 usage; 3 something was left as somebody made it;
    4 with --dry-run, something would be changed.
    """
    given = {
        "url": url, "token_file": token_file, "prometheus_url": prometheus_url, "datasource_uid": datasource_uid,
        "scrape_interval_seconds": scrape_interval_seconds, "folder": folder, "uid_prefix": uid_prefix,
        "org_id": org_id, "ca_file": ca_file, "timeout_seconds": timeout_seconds, "overwrite": overwrite,
    }  # fmt: skip
    version, changes = _apply(_settings(given), dry_run=dry_run)
    if as_json:
        said = {"grafana": version, "dry_run": dry_run, "changes": [asdict(change) for change in changes]}
        typer.echo(json.dumps(said, indent=1))
    else:
        Console(width=WIDTH).print(_table(changes, version, dry_run=dry_run))
    raise typer.Exit(_status(changes, dry_run=dry_run))


def _settings(given: dict[str, Any]) -> GrafanaSettings:
    try:
        return GrafanaSettings.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False):
            name = "--" + ".".join(map(str, item["loc"])).replace("_", "-")
            typer.echo(f"gradiometer: {name}: {item['msg'].removeprefix('Value error, ')}", err=True)
        raise typer.Exit(USAGE) from error


def _apply(settings: GrafanaSettings, *, dry_run: bool) -> tuple[str, list[Change]]:

    try:
        grafana = Grafana(settings)
    except OSError as error:
        file, remedy = settings.token_file, "give a file that is there and that you may read"
        typer.echo(f"gradiometer: --token-file: {file} cannot be read ({error.strerror}): {remedy}", err=True)
        raise typer.Exit(USAGE) from error
    except ValueError as error:
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
