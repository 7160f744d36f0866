"""Find what a path of the API names, among what is followed: a name from a request is never joined to a path."""

from __future__ import annotations

from pathlib import Path as File
from typing import Annotated

from fastapi import HTTPException, Path, Query

from gradiometer.records import RUN_ID
from gradiometer_monitor.following.runs import Run, Runs

__all__ = ["MAX_NUMBER", "MAX_RANK", "RunId", "RunIdQuery", "chosen", "directory_of", "no_such_run"]

MAX_NUMBER = 2**63 - 1
"""Largest number that the store holds."""
MAX_RANK = 99_999
"""Ranks have five digits."""
NAMED = 10
"""Runs that a message names."""
RunId = Annotated[
    str,
    Path(pattern=rf"^{RUN_ID.pattern}$", description="Id of a run, as the list of runs has it.", examples=["demo"]),
]
RunIdQuery = Annotated[str | None, Query(pattern=rf"^{RUN_ID.pattern}$", description="Of this run only.")]


def chosen(run_id: str, followed: list[Run]) -> Run:
    """Return the run of that id. Raises HTTPException 404 that names those there are."""
    found = next((run for run in followed if run.run_id == run_id), None)
    if found is None:
        raise no_such_run(run_id, [run.run_id for run in followed])
    return found


def directory_of(run_id: str, runs: Runs) -> File:
    """Return the directory of a run that is followed. Raises HTTPException as :func:`chosen` does."""
    with runs.snapshot() as followed:
        return chosen(run_id, followed).ranks[0].path.parent


def no_such_run(run_id: str, known: list[str]) -> HTTPException:
    """Make the error that says which runs there are."""
    named = ", ".join(known[-NAMED:]) or "none"
    more = f", and {len(known) - NAMED} more" if len(known) > NAMED else ""
    return HTTPException(404, f"no run {run_id!r} is followed; there are: {named}{more}")
