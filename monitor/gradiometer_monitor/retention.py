"""How long run directories are kept, and how much room they may take."""

from __future__ import annotations

from gradiometer_monitor.section import Section

__all__ = ["RetentionSettings"]


class RetentionSettings(Section):
    """What is pruned: runs that are over, the oldest first."""

    max_age_days: float | None = None
    """Runs that ended longer ago are removed; None keeps them however old."""
    max_bytes: int | None = None
    """The oldest runs are removed until all take no more; None sets no bound."""
