"""The command line of the monitor."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from gradiometer_monitor.daemon import serve
from gradiometer_monitor.logs import log_to_stderr
from gradiometer_monitor.settings import SettingsError, resolve

__all__ = ["monitor"]

log = logging.getLogger(__name__)


def monitor(
    directory: Annotated[Path | None, typer.Option("--dir", help="Where runs live [env: GRADIOMETER_DIR].")] = None,
    host: Annotated[str | None, typer.Option(help="Loopback address to serve on [default: 127.0.0.1].")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one [default: 9477].")] = None,
    poll_seconds: Annotated[float | None, typer.Option(help="Pause between polls [default: 1].")] = None,
    series_budget: Annotated[int | None, typer.Option(help="Series a run may have [default: 10000].")] = None,
    retention_seconds: Annotated[
        float | None, typer.Option(help="How long a run that is over is still shown [default: 900].")
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="The monitor's own state [default: .monitor in the runs' directory].")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings.")] = None,
    port_file: Annotated[Path | None, typer.Option(help="File to write the port to once it is bound.")] = None,
) -> None:
    """Serve the metrics of this host's runs to Prometheus."""
    log_to_stderr()
    try:
        settings = resolve(
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
    except SettingsError as error:
        log.error("%s", error)  # noqa: TRY400 - one line for the user, who is not helped by a traceback
        raise typer.Exit(2) from error
    raise typer.Exit(serve(settings))
