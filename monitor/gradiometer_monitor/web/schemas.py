"""What the API takes and answers with, as pydantic models. A number that is not known, or not finite, is null."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from gradiometer.records import PIPELINE_SLOTS
from gradiometer.tail import RunState
from gradiometer_monitor.web.lookup import MAX_RANK

__all__ = [
    "Answered",
    "Error",
    "EventList",
    "EventOut",
    "PolicyOut",
    "PolicyRequest",
    "RevisionOut",
    "RunDetail",
    "RunList",
    "RunSummary",
]

MAX_NOTE = 1024
EXAMPLE: dict[str, Any] = {
    "examples": [
        {"policy": {"pipeline": [{"nonfinite": {}}, {"global_norm": {"max_norm": 1.0}}]}, "note": "the loss spikes"}
    ]
}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
"""A finite number, or null."""


class Model(BaseModel):
    """Fields' docstrings are their descriptions in the OpenAPI document."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Error(Model):
    """Why a request was refused."""

    detail: str
    """One sentence: what is wrong, and the remedy."""


class RunSummary(Model):
    """One run, in a line."""

    run_id: str
    state: RunState
    """A run is lost if its process is gone and did not say goodbye."""
    ranks: list[int]
    """Ranks whose directories are on this host."""
    steps: int
    """Optimizer steps recorded."""
    last_step: int | None
    """Number of the newest step."""
    last_step_timestamp_seconds: Number
    """When it was, in seconds since the epoch."""
    grad_norm: Number
    """Global L2 norm before clipping, newest step of the lowest rank."""
    grad_norm_baseline: Number
    """Running median of that norm."""
    loss: Number
    """Newest loss that was logged."""
    clip_ratio: Number
    """Share of the steps of the last 60 s, and at least the last 32, whose gradients were clipped; 0 to 1."""
    clip_events: int
    """Steps in which some policy that acts, or the loop itself, changed the gradients; summed over policies."""
    nonfinite_steps: int
    """Steps in which some gradient held NaN or Inf."""
    skipped_steps: int
    """Steps in which the optimizer did not move the parameters."""


class RunList(Model):
    """The runs that are followed, and the directories that cannot be read."""

    runs: list[RunSummary]
    total: int
    """Runs that fit the question, of which ``limit`` and ``offset`` show a part."""
    unreadable: dict[str, str]
    """Kind of error by ``<run_id>/rank-…``."""


class RingOut(Model):
    """What the ring of the lowest rank holds."""

    capacity: int
    """Rows that it has room for."""
    first_step: int | None
    """Oldest step that it holds still."""
    last_step: int | None
    """Newest step."""


class PolicyNames(Model):
    """The policy in force, by the names of its stages."""

    revision: int | None
    """0 is the policy that the run began with."""
    acting: list[str]
    """Stages that act, in their order."""
    shadow: list[str]
    """Stages that decide and are recorded, and never act."""


class Windows(Model):
    """What is usual and what is not, of the lowest rank."""

    grad_norm_baseline: Number
    """Median of the last 512 finite global norms."""
    grad_norm_mad: Number
    """Median absolute deviation of these from it; null before 128 of them."""
    grad_norm_window_max: Number
    """Largest global norm of the last 60 s of steps."""
    clip_ratio: Number
    """As that of the run."""
    layers_vanishing: int | None
    """How many layers vanish; null before the 128 steps without which nothing is said."""
    layers_exploding: int | None
    """How many layers explode; null likewise."""
    uncounted_steps: int
    """Steps that had left the ring before it was first read: histograms and counts of layers do not hold them."""


class RunDetail(RunSummary):
    """One run."""

    job: str
    """Name of the job, as given."""
    host: str
    """Where the lowest rank runs."""
    device: str
    """Device of the parameters."""
    torch_version: str
    gradiometer_version: str
    world_size: int
    """Ranks of the job, on all hosts."""
    labels: dict[str, str]
    """Labels that the user gave the run."""
    created: float
    """When the run began, in seconds since the epoch."""
    parameters: int
    """Parameter tensors."""
    layers: list[str]
    """Names of the layers, in the order of the model."""
    ring: RingOut
    policy: PolicyNames
    windows: Windows


class EventOut(Model):
    """Something that happened to a run."""

    number: int
    """Grows with each event that the monitor hears of; ``after`` and ``before`` go by it."""
    id: str
    """Unique, and the same after a restart of the monitor."""
    run_id: str
    rank: int | None
    """None for what the monitor tells."""
    time_ns: int
    """Wall clock, in nanoseconds since the epoch."""
    kind: str
    """What happened, in snake_case: ``nonfinite``, ``policy_changed``, ``policy_requested`` …"""
    message: str
    """The same in words."""
    step: int | None
    """The step in which it happened."""
    data: dict[str, Any]
    """What else is known of it."""


class EventList(Model):
    """Events, oldest first."""

    events: list[EventOut]


class RevisionOut(Model):
    """A policy, and from which step on it was in force."""

    revision: int
    """0 is the policy that the run began with."""
    step: int
    """The first step that was decided by it."""
    time_ns: int
    """When that was, in nanoseconds since the epoch."""
    policy: dict[str, Any] | None
    """As one writes it; null observes only."""
    source: str
    """``attach``, ``request`` or ``checkpoint``."""
    request: str | None
    """Id of the request that asked for it."""
    by: str
    """Who asked."""
    acting: list[str]
    """Stages that act."""
    shadow: list[str]
    """Stages that only watch."""
    change: str
    """What is different from the revision before, in a line."""


class Rejection(Model):
    """A request that the job refused."""

    time_ns: int
    request: str | None
    by: str
    reasons: list[str]


class PolicyOut(Model):
    """The policy of a run, and how it came to be."""

    run_id: str
    rank: int
    """The rank that reads requests, and whose history this is."""
    in_force: RevisionOut
    revisions: list[RevisionOut]
    """Those that are remembered, newest last."""
    rejections: list[Rejection]
    """The newest that were refused, newest last."""


class PolicyRequest(BaseModel):
    """A policy that a running job is asked to take up."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra=EXAMPLE,
    )
    policy: dict[str, Any] | None
    """As a policy file has it; null clips no more, and observes only."""
    note: Annotated[str, Field(max_length=MAX_NOTE)] = ""
    """Why, for the record."""
    rank: Annotated[int, Field(ge=0, le=MAX_RANK)] | None = None
    """A rank of the group that is meant, where groups of ranks train by themselves."""


class Stage(Model):
    """What a stage of a policy covers of the run's model."""

    name: str
    mode: Literal["act", "shadow"]
    parameters: int
    """Parameter tensors that it covers."""
    units: int
    """How many units are bounded, each by itself."""


class Answered(Model):
    """What became of a request."""

    status: Literal["applied", "pending", "valid"]
    """In force; not answered yet; or only checked, because ``dry_run`` asked for that."""
    request: str | None = None
    """Id of the request; null for a check."""
    revision: int | None = None
    """The revision that it became."""
    step: int | None = None
    """The first step that was decided by it."""
    stages: Annotated[list[Stage], Field(max_length=PIPELINE_SLOTS)] | None = None
    """What each stage would cover; of a check."""
