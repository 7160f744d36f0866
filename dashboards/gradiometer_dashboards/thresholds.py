"""What is too much: the limits of the alerts, at which the panels change colour too. Needs nothing but Python."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["THRESHOLDS", "Thresholds"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """The limits, each with its unit in its name or its comment; ratios are from 0 to 1."""

    spike_ratio: float = 10.0
    """Largest norm of the window over the run's baseline."""
    warm_up_steps: int = 1000
    """Steps of a run in which alerts that compare with the usual are silent: norms fall fast, and clips are many."""
    clip_ratio: float = 0.9
    """Share of the steps clipped, over 15 minutes."""
    skipped_in_a_row: int = 10
    """Consecutive steps that did not move the parameters."""
    stalled_seconds: float = 300.0
    """Since the newest step of a run that is running, and at least ten of its usual steps."""
    rank_deviation: float = 0.05
    """Relative difference of a rank's global norm from that of the other ranks at the same step."""


THRESHOLDS = Thresholds()
