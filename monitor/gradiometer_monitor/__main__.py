"""Run the monitor: ``python -m gradiometer_monitor``."""

import typer

from gradiometer_monitor.cli import monitor

if __name__ == "__main__":
    typer.run(monitor)
