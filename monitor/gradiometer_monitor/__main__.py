"""Run the monitor: ``python -m gradiometer_monitor``."""

import typer

from gradiometer_monitor.cli import monitor

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command()(monitor)
    app()
