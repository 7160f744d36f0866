"""What the API answers with, as pydantic models. A number that is not known, or not finite, is null."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator

__all__ = ["EventList", "EventOut", "RunList", "RunSummary"]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
"""A finite number, or null."""


class RunSummary(BaseModel):
    """One run, in a line."""

    run_id: str
    state: Literal["running", "finished", "lost"]
    ranks: list[int]
    steps: int
    """Optimizer steps recorded."""
    last_step: int | None
    last_step_timestamp_seconds: Number
    grad_norm: Number
    """Global L2 norm before clipping, newest step of the lowest rank."""
    grad_norm_baseline: Number
    loss: Number
    clip_events: int
    """Steps in which some policy that acts, or the loop itself, changed the gradients; summed over policies."""
    nonfinite_steps: int
    skipped_steps: int


class RunList(BaseModel):
    """The runs that are followed, and the directories that cannot be read."""

    runs: list[RunSummary]
    unreadable: dict[str, str]
    """Kind of error by ``<run_id>/rank-…``."""


class EventOut(BaseModel):
    """Something that happened to a run."""

    number: int
    """Grows with each event that the monitor hears of; ``after`` and ``before`` go by it."""
    id: str
    run_id: str
    rank: int | None
    """None for what the monitor tells."""
    time_ns: int
    kind: str
    message: str
    step: int | None
    data: dict[str, Any]


class EventList(BaseModel):
    """Events, oldest first."""

    events: list[EventOut]
