"""The API under ``/api/v1``: runs and events."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Query

from gradiometer.records import RingReader, RunFormatError
from gradiometer.tail import RankTail, RunState
from gradiometer_monitor.following.runs import MAX_RANKS, Run
from gradiometer_monitor.services import Context
from gradiometer_monitor.store import Event
from gradiometer_monitor.web.lookup import MAX_NUMBER, RunId, RunIdQuery, chosen, no_such_run
from gradiometer_monitor.web.openapi import api_router
from gradiometer_monitor.web.roles import needs
from gradiometer_monitor.web.schemas import (
    EventList,
    EventOut,
    PolicyNames,
    RingOut,
    RunDetail,
    RunList,
    RunSummary,
    Windows,
)

__all__ = ["describe", "router"]

MAX_EVENTS = 1000
MAX_KINDS = 32
Kinds = Annotated[
    list[Annotated[str, Query(max_length=64)]] | None,
    Query(max_length=MAX_KINDS, description="Of these kinds only.", examples=[["nonfinite"]]),
]
After = Annotated[int | None, Query(ge=0, le=MAX_NUMBER, description="The first events above this number.")]
Before = Annotated[int | None, Query(ge=0, le=MAX_NUMBER, description="Events below this number only.")]
Limit = Annotated[int, Query(ge=1, le=MAX_EVENTS, description="At most so many events.")]


def router(context: Context) -> APIRouter:
    """Make the routes of the API."""
    made = api_router()

    @made.get("/runs", tags=["runs"])
    @needs("read")
    def list_runs(
        state: Annotated[list[RunState], Query(max_length=3, description="Of these states only.")] = [],  # noqa: B006
        sort: Annotated[
            Literal["run_id", "newest"], Query(description="By name, or by the newest step, the newest first.")
        ] = "run_id",
        limit: Annotated[int, Query(ge=1, le=MAX_RANKS, description="At most so many runs.")] = MAX_RANKS,
        offset: Annotated[int, Query(ge=0, le=MAX_NUMBER, description="Runs to pass over, in this order.")] = 0,
    ) -> RunList:
        """List the runs that are followed.

        A run leaves some while after its end, once two scrapes have shown that.
        """
        with context.runs.snapshot() as followed:
            found = [describe(run) for run in followed if not state or run.state in state]
        if sort == "newest":
            found.sort(key=lambda run: run.last_step_timestamp_seconds or 0.0, reverse=True)
        return RunList(runs=found[offset : offset + limit], total=len(found), unreadable=context.runs.unreadable())

    @made.get("/runs/{run_id}", tags=["runs"])
    @needs("read")
    def get_run(run_id: RunId) -> RunDetail:
        """Describe one run."""
        with context.runs.snapshot() as followed:
            return _detail(chosen(run_id, followed))

    _add_events(made, context)
    return made


def _add_events(made: APIRouter, context: Context) -> None:
    @made.get("/events", tags=["events"])
    @needs("read")
    def list_events(
        run_id: RunIdQuery = None,
        kind: Kinds = None,
        after: After = None,
        before: Before = None,
        limit: Limit = 100,
    ) -> EventList:
        """List events of all runs, oldest first: the first ones after a number, or else the newest."""
        return _listed(context.store.events(run_id=run_id, kinds=kind or (), after=after, before=before, limit=limit))

    @made.get("/runs/{run_id}/events", tags=["events"])
    @needs("read")
    def list_events_of_run(
        run_id: RunId,
        kind: Kinds = None,
        after: After = None,
        before: Before = None,
        limit: Limit = 100,
    ) -> EventList:
        """List events of one run, oldest first; also of one that is not followed any more."""
        found = context.store.events(run_id=run_id, kinds=kind or (), after=after, before=before, limit=limit)
        if not found and not context.store.events(run_id=run_id, limit=1):
            with context.runs.snapshot() as followed:
                known = [run.run_id for run in followed]
            if run_id not in known:
                raise no_such_run(run_id, known)
        return _listed(found)


def describe(run: Run) -> RunSummary:
    """Describe a run; valid while the lock of its snapshot is held."""
    summary = run.ranks[0].summary
    row, status = summary.newest, summary.status
    return RunSummary(
        run_id=run.run_id,
        state=run.state,
        ranks=[tail.rank for tail in run.ranks],
        steps=int(status["steps"]),
        last_step=None if row is None else int(row["step"]),
        last_step_timestamp_seconds=None if row is None else int(row["time_ns"]) / 1e9,
        grad_norm=None if row is None else float(row["grad_norm_preclip"]),
        grad_norm_baseline=summary.grad_norm_baseline,
        loss=summary.loss,
        clip_ratio=summary.clip_ratio,
        clip_events=int(run.ranks[0].clip_events.sum()),
        nonfinite_steps=int(status["nonfinite_steps"]),
        skipped_steps=int(status["skipped_steps"]),
    )


def _detail(run: Run) -> RunDetail:
    lead = run.ranks[0]
    manifest, revision = lead.manifest, lead.revision
    named = [] if revision is None else [slot for _, slot in revision.named]
    return RunDetail(
        **dict(describe(run)),
        job=manifest.job,
        host=manifest.host,
        device=manifest.device,
        torch_version=manifest.torch_version,
        gradiometer_version=manifest.gradiometer_version,
        world_size=manifest.world_size,
        labels=manifest.labels,
        created=manifest.created_ns / 1e9,
        parameters=len(manifest.parameters),
        layers=list(manifest.layers),
        ring=_ring(lead),
        policy=PolicyNames(
            revision=None if revision is None else revision.revision,
            acting=[slot.name for slot in named if slot.mode == "act"],
            shadow=[slot.name for slot in named if slot.mode == "shadow"],
        ),
        windows=_windows(lead),
    )


def _windows(tail: RankTail) -> Windows:
    summary, layers = tail.summary, tail.summary.layers
    vanishing, exploding = (
        int(np.count_nonzero(each & layers.exported)) for each in (layers.vanishing, layers.exploding)
    )
    return Windows(
        grad_norm_baseline=summary.grad_norm_baseline,
        grad_norm_mad=summary.grad_norm_mad,
        grad_norm_window_max=summary.grad_norm_window_max,
        clip_ratio=summary.clip_ratio,
        layers_vanishing=vanishing if layers.judged else None,
        layers_exploding=exploding if layers.judged else None,
        uncounted_steps=summary.uncounted,
    )


def _ring(tail: RankTail) -> RingOut:
    """Say which steps the ring holds; none where it cannot be read just now."""
    geometry, steps = tail.manifest.ring, []
    try:
        reader = RingReader(tail.path / "steps.ring", geometry)
        try:
            steps = reader.read(limit=2)["step"].tolist()  # the oldest may be about to be overwritten
        finally:
            reader.close()
    except (OSError, RunFormatError):
        pass  # the run goes, and its summary is what is known of it
    last = tail.summary.newest
    return RingOut(
        capacity=geometry.capacity,
        first_step=min(steps, default=None),
        last_step=None if last is None else int(last["step"]),
    )


def _listed(events: list[Event]) -> EventList:
    return EventList(events=[EventOut.model_validate(event, from_attributes=True) for event in events])
