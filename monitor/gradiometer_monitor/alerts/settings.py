"""Settings of the Alertmanager webhook: which alerts lead to which actions."""

from __future__ import annotations

from gradiometer_monitor.section import Section

__all__ = ["AlertSettings"]


class AlertSettings(Section):
    """Rules from alerts to actions."""

    dry_run: bool = False
    """Tell what would be done, and do nothing."""
