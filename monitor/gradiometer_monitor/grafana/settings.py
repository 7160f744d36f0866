"""Settings of the Grafana that is provisioned and annotated."""

from __future__ import annotations

from pathlib import Path

from gradiometer_monitor.section import Section

__all__ = ["GrafanaSettings"]


class GrafanaSettings(Section):
    """A Grafana, and how to be let in."""

    url: str
    token_file: Path | None = None
    """File that holds a service account's token; read anew for each session."""
