"""The command line of the monitor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from gradiometer_monitor.config.check import make_schema, show, unreadable_files, unusable_state
from gradiometer_monitor.config.resolving import Resolved
from gradiometer_monitor.config.settings import Settings, SettingsError, resolve_all
from gradiometer_monitor.daemon import serve
from gradiometer_monitor.logs import log_to_stderr
from gradiometer_monitor.web.listen import check_access

__all__ = ["monitor"]

log = logging.getLogger(__name__)


def monitor(
    directory: Annotated[Path | None, typer.Option("--dir", help="Where runs live [env: GRADIOMETER_DIR].")] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to serve on; beyond loopback only with auth.tokens_file [default: 127.0.0.1]."),
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one [default: 9477].")] = None,
    poll_seconds: Annotated[float | None, typer.Option(help="Pause between polls [default: 1].")] = None,
    series_budget: Annotated[int | None, typer.Option(help="Series a run may have [default: 10000].")] = None,
    retention_seconds: Annotated[
        float | None, typer.Option(help="How long a run that is over is still shown [default: 900].")
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="The monitor's own state [default: .monitor in the runs' directory].")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of settings; read again at SIGHUP [env: GRADIOMETER_MONITOR_CONFIG].")
    ] = None,
    port_file: Annotated[Path | None, typer.Option(help="File to write the port to once it is bound.")] = None,
    check_config: Annotated[
        bool, typer.Option("--check-config", help="Show the settings and where each is from, or what is wrong; leave.")
    ] = False,
    config_schema: Annotated[
        bool, typer.Option("--config-schema", help="Print the JSON Schema of config files, for editors, and leave.")
    ] = False,
) -> None:
    """Serve this host's runs: metrics for Prometheus, an API, and a page."""
    if config_schema:
        typer.echo(make_schema(), nl=False)
        raise typer.Exit

    def read() -> Resolved[Settings]:
        return resolve_all(
            directory,
            config,
            host=host,
            port=port,
            poll_seconds=poll_seconds,
            series_budget=series_budget,
            retention_seconds=retention_seconds,
            port_file=port_file,
            state_dir=state_dir,
        )

    if check_config:
        raise typer.Exit(_check(read))
    log_to_stderr()
    try:
        resolved = read()
    except SettingsError as error:
        for line in str(error).splitlines():
            log.error("%s", line)  # noqa: TRY400 - a line for the user, who is not helped by a traceback
        raise typer.Exit(2) from error
    raise typer.Exit(serve(resolved.settings, read))


def _refused(settings: Settings) -> Iterator[str]:
    try:
        check_access(settings)
    except SettingsError as error:
        yield str(error)


def _check(read: Callable[[], Resolved[Settings]]) -> int:
    """Show what the settings are, or a line for each thing that is wrong; return 0, or 2."""
    try:
        resolved = read()
    except SettingsError as error:
        typer.echo(str(error), err=True)
        return 2
    typer.echo(show(resolved))
    for warning in (*resolved.warnings, *unusable_state(resolved)):
        typer.echo(f"warning: {warning}", err=True)
    wrong = list(unreadable_files(resolved)) or list(_refused(resolved.settings))
    for line in wrong:
        typer.echo(line, err=True)
    return 2 if wrong else 0
