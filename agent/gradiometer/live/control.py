"""What is asked of a running job: ``control.json`` in a rank's directory, and the answer to it. Needs no torch.

    <root>/<run_id>/rank-00000/
        control.json    the newest request; of the ranks of a group, the lowest reads it for all

The answer is a revision in ``policy.json``, or an event ``policy_rejected``, that names the request. Guarantees: a
request is there whole or not at all; what can be known to be wrong without the job is refused before it is written.
"""

from __future__ import annotations

import getpass
import json
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gradiometer.live.revisions import read_history, write_atomically
from gradiometer.policy.audit import cover
from gradiometer.policy.problems import PolicyError
from gradiometer.policy.spec import PolicySource, load_policy
from gradiometer.process import process_alive
from gradiometer.records import (
    RingReader,
    State,
    find_ranks,
    rank_directory,
    rank_of,
    read_bounded,
    read_events,
    read_manifest,
)

__all__ = [
    "Answer",
    "Request",
    "RequestError",
    "answer_of",
    "asker",
    "await_answer",
    "check_runs",
    "new_id",
    "read_request",
    "rejections",
    "request_policy",
    "requests_rank",
]

CONTROL_FILE = "control.json"
ID = "^[A-Za-z0-9-]{1,64}$"
MAX_BYTES = 2**20
"""A request is refused beyond this."""
POLL_SECONDS = 0.1
REFUSALS = ("policy_rejected", "request_refused", "request_failed")
"""Kinds of events that answer a request with no."""


class RequestError(ValueError):
    """A request cannot be made or read; the message says what to do about it."""


class Request(BaseModel):
    """A request for another policy; others are in files of their own, see :mod:`gradiometer.live.requests`."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    version: Literal[1] = 1
    id: Annotated[str, Field(pattern=ID)]
    kind: Literal["policy"] = "policy"
    policy: dict[str, Any] | None
    """As one writes it; null observes only."""
    by: Annotated[str, Field(max_length=256)] = ""
    time_ns: int = 0
    note: Annotated[str, Field(max_length=1024)] = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of a request."""

    applied: bool
    revision: int | None = None
    """Of the new policy."""
    step: int | None = None
    """The first step that was decided by the new policy, or the last before the loop did what it was asked."""
    reasons: tuple[str, ...] = ()
    note: str = ""
    """What the loop said of it."""


def requests_rank(run: Path, rank: int | None = None) -> Path:
    """Return the rank directory whose requests are read, for all ranks of its group.

    That is the lowest rank's, or ``rank``'s where groups of ranks train by themselves. ``run`` may be a rank directory.
    Raises FileNotFoundError if there is no such run, RequestError if the rank that reads is not in this directory.
    """
    if (run / "manifest.json").is_file():
        run, rank = run.parent, rank_of(run)
    ranks = find_ranks(run)
    found = ranks[:1] if rank is None else [path for path in ranks if rank_of(path) == rank]
    if not found:
        raise FileNotFoundError(f"no run at {run}" if rank is None else f"no rank {rank} in {run}")
    leader = read_history(found[0], read_manifest(found[0] / "manifest.json")).leader
    directory = rank_directory(run, leader)
    if directory not in ranks:
        raise RequestError(
            f"requests of {found[0].name} are read by rank {leader}, whose directory is not in {run}: ask on the host "
            f"of rank {leader}"
        )
    return directory


def new_id() -> tuple[str, int]:
    """Make the id of a request, by which requests sort in time, and return it with the wall clock in nanoseconds."""
    now = time.time_ns()
    return f"{now:020d}-{secrets.token_hex(4)}", now


def asker() -> str:
    """Name who asks, where nothing better is known."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def request_policy(
    run: Path,
    source: PolicySource | None,
    *,
    rank: int | None = None,
    by: str | None = None,
    note: str = "",
    request: str | None = None,
) -> str:
    """Ask a running job for another policy, or with None for none; return the id of the request.

    ``request`` is that id where it was chosen before: what is asked again under an id is done once.

    Raises PolicyError for a policy that is none or that does not fit the model, RequestError if the run does not run,
    FileNotFoundError if there is no such run, OSError if its directory cannot be written.
    """
    spec = None if source is None else load_policy(source)
    directory = requests_rank(run, rank)
    check_runs(
        directory,
        "its policy can be changed no longer; give the next one the policy with attach(policy=...) or gradiometer run "
        "--policy",
    )
    if spec is not None:
        parameters = read_manifest(directory / "manifest.json").parameters
        where = str(source) if isinstance(source, str | Path) else "policy"
        _, problems = cover(spec, where, [each.name for each in parameters], [each.layer for each in parameters])
        if problems:
            raise PolicyError.of(problems)
    made, now = new_id()
    asked = Request(
        id=request or made,
        policy=None if spec is None else spec.to_dict(),
        by=by if by is not None else asker(),
        time_ns=now,
        note=note,
    )
    text = asked.model_dump_json(indent=1)
    if len(text) > MAX_BYTES:
        raise RequestError(f"the request has {len(text)} bytes, expected at most {MAX_BYTES}: shorten its patterns")
    write_atomically(directory / CONTROL_FILE, text)
    return asked.id


def read_request(directory: Path) -> Request:
    """Read the newest request; raises RequestError for what is none, with a line for each thing that is wrong."""
    path = directory / CONTROL_FILE
    try:
        return Request.model_validate(json.loads(read_bounded(path, MAX_BYTES, "request")))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
        raise RequestError("\n".join(f"{path}: {line}" for line in lines)) from error
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path} is not a request: {error}") from error


def await_answer(
    directory: Path,
    request: str,
    seconds: float,
    tell: Callable[[int], None] | None = None,
    *,
    of_policy: bool = True,
) -> Answer:
    """Wait until the agent has answered the request; ``tell`` is told the newest step meanwhile.

    ``of_policy`` says whether it is one for a policy, whose place another can take.

    Raises TimeoutError if there is no answer in ``seconds``, RequestError if the run ended without one, or another
    request took this one's place.
    """
    manifest = read_manifest(directory / "manifest.json")
    end, offset = time.monotonic() + seconds, 0
    while True:
        over = not _runs(directory)  # asked before the answer is looked for, which an ending run may still give
        revision = read_history(directory, manifest).answer(request)
        if revision is not None:
            return Answer(applied=True, revision=revision.revision, step=revision.step)
        events, offset = read_events(directory / "events.jsonl", offset)
        answer = next((found for event in events if (found := answer_of(event, request)) is not None), None)
        if answer is not None:
            return answer
        if over:
            raise RequestError(f"the run in {directory} ended before it answered")
        if time.monotonic() >= end:
            if of_policy:
                _check_not_replaced(directory, request)
            raise TimeoutError(
                f"no answer within {seconds:g} s; the request stands, and the job may take it up yet: the events of "
                "the run will say"
            )
        if tell is not None:
            tell(_newest_step(directory))
        time.sleep(min(POLL_SECONDS, seconds))


def answer_of(event: Mapping[str, Any], request: str) -> Answer | None:
    """Return the answer that an event gives to a request, if it does; of a policy it tells refusals only."""
    if event.get("request") != request:
        return None
    if event.get("kind") == "request_done":
        return Answer(applied=True, step=event.get("step"), note=str(event.get("note", "")))
    if event.get("kind") in REFUSALS:
        return Answer(applied=False, reasons=tuple(map(str, event.get("reasons", ()))))
    return None


def rejections(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the events of requests that were refused."""
    return (event for event in events if event.get("kind") == "policy_rejected")


def _check_not_replaced(directory: Path, request: str) -> None:
    newest = read_request(directory)
    if newest.id != request:
        raise RequestError(f"request {newest.id} of {newest.by or 'unknown'} took the place of this one: ask again")


def check_runs(directory: Path, consequence: str) -> None:
    """Raise RequestError if the writer of a rank directory is not at work any more."""
    if not _runs(directory):
        raise RequestError(f"the run in {directory} does not run any more: {consequence}")


def _runs(directory: Path) -> bool:
    """Tell whether the writer of a rank directory is at work, as far as can be told from here."""
    manifest = read_manifest(directory / "manifest.json")
    ring = RingReader(directory / "steps.ring", manifest.ring)
    try:
        return ring.status()["state"] != State.FINISHED and process_alive(manifest) is not False
    finally:
        ring.close()


def _newest_step(directory: Path) -> int:
    ring = RingReader(directory / "steps.ring", read_manifest(directory / "manifest.json").ring)
    try:
        newest = ring.newest()
        return -1 if newest is None else int(newest["step"])
    finally:
        ring.close()
