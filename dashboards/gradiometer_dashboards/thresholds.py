"""What is too much: the limits of the alerts, at which the panels change colour too. Needs nothing but Python."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["THRESHOLDS", "Thresholds"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """The limits, each with its unit in its name or its comment; ratios are from 0 to 1."""

    spike_ratio: float = 10.0
    """Largest finite norm of the window over the run's baseline."""
    spike_deviations: float = 20.0
    """And by how many median absolute deviations the norm is above the baseline, which spares runs that are noisy."""
    warm_up_steps: int = 1000
    """Steps of a run in which alerts that compare with the usual are silent: norms fall fast, and clips are many."""
    clip_ratio: float = 0.9
    """Share of the steps clipped, over 15 minutes."""
    scaled_nonfinite_ratio: float = 0.05
    """Share of the steps with non-finite gradients, over 10 minutes, that a run with a GradScaler may skip."""
    skipped_in_a_row: int = 10
    """Consecutive steps that did not move the parameters: more are too many."""
    stalled_seconds: float = 300.0
    """Since the newest step of a run that is running, and at least ten of its usual steps."""
    stalled_steps: float = 10.0
    """And since the newest step, in usual steps: what is slow is not stalled."""
    starting_seconds: float = 1800.0
    """Since the newest step of a run that has taken fewer than ten: it may still compile."""
    rank_deviation: float = 0.05
    """Relative difference of a rank's global norm from that of the other ranks at the same step."""
    rank_steps_behind: float = 10.0
    """Steps that a rank is behind the furthest."""
    rank_seconds_behind: float = 10.0
    """And by how many seconds' worth of usual steps: ranks are not read all at the same instant."""
    remote_write_seconds: float = 600.0
    """How long the oldest step has been waiting for a remote-write receiver."""


THRESHOLDS = Thresholds()
