"""Every alert there is, in the order in which they are listed."""

from __future__ import annotations

from gradiometer_dashboards.rules.model import Alert, Settings
from gradiometer_dashboards.rules.of_gradients import of_gradients
from gradiometer_dashboards.rules.of_monitor import of_monitor
from gradiometer_dashboards.rules.of_progress import of_progress
from gradiometer_dashboards.rules.recording import recordings

__all__ = ["ALERTS", "alerts", "recordings"]


def alerts(settings: Settings) -> tuple[Alert, ...]:
    """List the alerts as they are with these settings."""
    return (*of_gradients(settings), *of_progress(settings), *of_monitor(settings))


ALERTS = alerts(Settings())
"""The alerts as they are unless somebody chooses otherwise."""
