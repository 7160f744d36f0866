"""The API under ``/api/v1``: runs and events."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from gradiometer_monitor.runs import Run
from gradiometer_monitor.services import Context
from gradiometer_monitor.web.schemas import EventList, EventOut, RunList, RunSummary

__all__ = ["describe", "router"]

MAX_EVENTS = 1000


def router(context: Context) -> APIRouter:
    """Make the routes of the API."""
    made = APIRouter(prefix="/api/v1")

    @made.get("/runs")
    def list_runs() -> RunList:
        """List the runs that are followed."""
        with context.runs.snapshot() as found:
            return RunList(runs=[describe(run) for run in found], unreadable=context.runs.unreadable())

    @made.get("/events")
    def list_events(
        run_id: str | None = None,
        kind: Annotated[list[str] | None, Query()] = None,
        after: Annotated[int | None, Query(ge=0)] = None,
        before: Annotated[int | None, Query(ge=0)] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_EVENTS)] = 100,
    ) -> EventList:
        """List events, oldest first: the first ones after a number, or else the newest."""
        found = context.store.events(run_id=run_id, kinds=kind or (), after=after, before=before, limit=limit)
        return EventList(events=[EventOut.model_validate(event, from_attributes=True) for event in found])

    return made


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
        clip_events=int(run.ranks[0].clip_events.sum()),
        nonfinite_steps=int(status["nonfinite_steps"]),
        skipped_steps=int(status["skipped_steps"]),
    )
