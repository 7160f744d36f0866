"""What is asked of a training loop, a file each in a rank's directory: a checkpoint, or to stop. Needs no torch.

    <root>/<run_id>/rank-00000/
        request-<id>.json    a request that waits; of the ranks of a group, the lowest takes it for all

The agent takes them one after another, the oldest first, and removes what it has taken. The answers are events that
name the request: ``request_taken`` at the step agreed on, then ``request_done``, or ``request_failed``;
``request_refused`` where it never reaches the loop. Guarantees: none replaces another, nor a change of the policy,
which is asked for in ``control.json``; no more than :data:`MAX_WAITING` wait.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gradiometer.live.control import ID, RequestError, asker, check_runs, new_id, requests_rank
from gradiometer.live.revisions import read_history, write_atomically
from gradiometer.records import read_bounded, read_manifest

__all__ = ["KINDS", "MAX_WAITING", "Kind", "LoopRequest", "read_loop_request", "request_loop", "waiting"]

Kind = Literal["checkpoint", "stop"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MAX_WAITING = 16
"""Requests of one run that wait for the agent; one more is refused to whoever asks."""
MAX_BYTES = 16_384
"""A request is refused beyond this."""
_NAME = re.compile(rf"request-({ID[1:-1]})\.json")


class LoopRequest(BaseModel):
    """One request to the loop. Other kinds may come; an agent refuses those it does not know."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    version: Literal[1] = 1
    id: Annotated[str, Field(pattern=ID)]
    kind: Kind
    by: Annotated[str, Field(max_length=256)] = ""
    """Who asks."""
    time_ns: int = 0
    note: Annotated[str, Field(max_length=1024)] = ""
    """Why."""


def request_loop(
    run: Path, kind: Kind, *, rank: int | None = None, by: str | None = None, note: str = "", request: str | None = None
) -> str:
    """Ask the loop of a running job for a checkpoint, or to stop; return the id of the request.

    ``request`` is that id where it was chosen before: what is asked again under an id is done once. Raises RequestError
    if the run does not run, or its agent takes no such request, or too many wait; FileNotFoundError if there is no such
    run, OSError if its directory cannot be written.
    """
    directory = requests_rank(run, rank)
    check_runs(directory, "nobody is left to ask")
    known = read_history(directory, read_manifest(directory / "manifest.json")).takes
    if kind not in known:
        raise RequestError(
            f"the agent of the run in {directory} takes no request {kind!r}, but {', '.join(known) or 'policies'}: "
            "train with a newer gradiometer"
        )
    if len(waiting(directory)) >= MAX_WAITING:
        raise RequestError(f"{MAX_WAITING} requests wait in {directory} already: ask again when the job has taken them")
    made, now = new_id()
    asked = LoopRequest(id=request or made, kind=kind, by=by if by is not None else asker(), time_ns=now, note=note)
    write_atomically(directory / f"request-{asked.id}.json", asked.model_dump_json(indent=1))
    return asked.id


def waiting(directory: Path) -> dict[str, Path]:
    """Return the files of the requests that wait, by id, the oldest first."""
    found = {match[1]: path for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def read_loop_request(path: Path) -> LoopRequest:
    """Read a request that waits; raises RequestError for what is none, with a line for each thing that is wrong."""
    try:
        request = LoopRequest.model_validate(json.loads(read_bounded(path, MAX_BYTES, "request")))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
        raise RequestError("\n".join(f"{path.name}: {line}" for line in lines)) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path.name} is not a request: {error}") from error
    if path.name != f"request-{request.id}.json":
        raise RequestError(f"{path.name} holds the request {request.id}: expected the one that its name says")
    return request
