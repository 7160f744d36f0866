"""The policy of a run over the API: what is in force and was, and the request for another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, HTTPException, Query, Response

from gradiometer.live.control import Answer, RequestError, await_answer, request_policy, requests_rank
from gradiometer.live.revisions import Revision, describe_change, read_history
from gradiometer.policy.audit import cover
from gradiometer.policy.problems import PolicyError
from gradiometer.policy.spec import load_policy
from gradiometer.records import RunFormatError, rank_of, read_manifest
from gradiometer_monitor.services import Context
from gradiometer_monitor.store import Event
from gradiometer_monitor.web.auth import Requester
from gradiometer_monitor.web.lookup import MAX_RANK, RunId, directory_of
from gradiometer_monitor.web.openapi import api_router
from gradiometer_monitor.web.roles import needs
from gradiometer_monitor.web.schemas import Answered, Error, PolicyOut, PolicyRequest, Rejection, RevisionOut, Stage

__all__ = ["router"]

MAX_WAIT_SECONDS = 30.0
"""How long a request may wait for the job's answer."""
WAITING = 8
"""Requests that wait at once, each in a thread; one more is answered at once, as not answered yet."""
REJECTIONS = 100
T = TypeVar("T")
Rank = Annotated[
    int | None,
    Query(ge=0, le=MAX_RANK, description="A rank of the group that is meant, where groups train by themselves."),
]
CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": Error, "description": "The run is over, or the job refused the policy; the old one stays."}
}


def router(context: Context) -> APIRouter:
    """Make the routes of policies."""
    made, waiting = api_router("policy"), CapacityLimiter(WAITING)

    @made.get("/runs/{run_id}/policy", responses=CONFLICT)
    @needs("read")
    def get_policy(run_id: RunId, rank: Rank = None) -> PolicyOut:
        """Show the policy in force, those that were, and the requests that were refused."""
        leader = _leader(directory_of(run_id, context.runs), rank)
        history = _answered(leader.parent, lambda: read_history(leader, read_manifest(leader / "manifest.json")))
        refused = context.store.events(run_id=run_id, kinds=("policy_rejected",), limit=REJECTIONS)
        revisions = _described(history.revisions)
        number = rank_of(leader)
        return PolicyOut(
            run_id=run_id,
            rank=number,
            in_force=revisions[-1],
            revisions=revisions,
            rejections=[_rejection(event) for event in refused if event.rank == number],
        )

    @made.put(
        "/runs/{run_id}/policy", responses={202: {"model": Answered, "description": "Not answered yet."}, **CONFLICT}
    )
    @needs("write")
    async def put_policy(
        run_id: RunId,
        asked: PolicyRequest,
        by: Requester,
        response: Response,
        wait: Annotated[
            float, Query(ge=0, le=MAX_WAIT_SECONDS, description="For how many seconds to wait for the job's answer.")
        ] = 0.0,
        dry_run: Annotated[bool, Query(description="Only check the policy against the run's model.")] = False,
    ) -> Answered:
        """Ask a running job to take up another policy, between two steps.

        Answers 200 once it is in force, 202 while the job has not answered, 409 if it refused.
        """
        run = await to_thread.run_sync(directory_of, run_id, context.runs)
        if dry_run:
            return await to_thread.run_sync(_check, run, asked)
        request, leader = await to_thread.run_sync(_ask, context, run, asked, by)
        if wait > 0 and waiting.available_tokens > 0:
            answer = await to_thread.run_sync(_wait, leader, request, wait, limiter=waiting)
            if answer is not None:
                return Answered(status="applied", request=request, revision=answer.revision, step=answer.step)
        response.status_code = 202
        return Answered(status="pending", request=request)

    return made


def _ask(context: Context, run: Path, asked: PolicyRequest, by: str) -> tuple[str, Path]:
    """Write the request, and tell who asked; return its id and the directory of the rank that reads it."""
    leader = _leader(run, asked.rank)
    request = _answered(run, lambda: request_policy(run, asked.policy, rank=asked.rank, by=by, note=asked.note))
    what = "a policy" if asked.policy else "no policy"
    context.events.tell(
        run.name, "policy_requested", f"{by} asked for {what}",
        request=request, by=by, note=asked.note, rank=asked.rank, policy=asked.policy,
    )  # fmt: skip
    return request, leader


def _check(run: Path, asked: PolicyRequest) -> Answered:
    """Match a policy with the model of a run, whether it runs or not."""
    if asked.policy is None:
        return Answered(status="valid", stages=[])
    policy = asked.policy
    spec = _answered(run, lambda: load_policy(policy))
    parameters = _answered(run, lambda: read_manifest(_leader(run, asked.rank) / "manifest.json")).parameters
    covered, problems = cover(spec, "policy", [each.name for each in parameters], [each.layer for each in parameters])
    if problems:
        raise HTTPException(422, str(PolicyError.of(problems)))
    stages = [
        Stage(
            name=stage.name,
            mode="act" if place < len(spec.pipeline) else "shadow",
            parameters=sum(found.parameters),
            units=found.units,
        )
        for place, (stage, found) in enumerate(zip(spec.stages, covered, strict=True))
    ]
    return Answered(status="valid", stages=stages)


def _wait(leader: Path, request: str, seconds: float) -> Answer | None:
    """Return the answer, None if there was none in time. Raises HTTPException 409 for a refusal."""
    try:
        answer = _answered(leader.parent, lambda: await_answer(leader, request, seconds))
    except TimeoutError:
        return None
    if not answer.applied:
        reasons = "; ".join(answer.reasons) or "it gave no reason"
        raise HTTPException(409, f"the job refused request {request}, and its old policy stays: {reasons}")
    return answer


def _leader(run: Path, rank: int | None) -> Path:
    return _answered(run, lambda: requests_rank(run, rank))


def _answered(run: Path, ask: Callable[[], T]) -> T:
    """Put what can be wrong with a run, or a request to it, in an answer; TimeoutError is for the caller."""
    try:
        return ask()
    except PolicyError as error:
        raise HTTPException(422, str(error)) from error
    except RequestError as error:
        raise HTTPException(409, _told(error, run)) from error
    except FileNotFoundError as error:
        raise HTTPException(404, _told(error, run)) from error
    except TimeoutError:
        raise
    except (OSError, RunFormatError) as error:
        reason = error.strerror if isinstance(error, OSError) else _told(error, run)
        raise HTTPException(503, f"the directory of the run cannot be used just now ({reason}): see the log") from error


def _told(error: Exception, run: Path) -> str:
    """Say what is wrong without telling where on the disk the runs are."""
    return str(error).replace(f"{run.parent}/", "")


def _described(revisions: Sequence[Revision]) -> list[RevisionOut]:
    return [_revision(revisions[place - 1] if place else None, each) for place, each in enumerate(revisions)]


def _revision(before: Revision | None, revision: Revision) -> RevisionOut:
    first = "as attached" if revision.source == "attach" else "the revisions before are forgotten"
    return RevisionOut(
        **revision.model_dump(include={"revision", "step", "time_ns", "policy", "source", "request", "by"}),
        acting=list(revision.acting),
        shadow=[slot.name for _, slot in revision.named if slot.mode == "shadow"],
        change=first if before is None else describe_change(before.policy, revision.policy),
    )


def _rejection(event: Event) -> Rejection:
    request, reasons = event.data.get("request"), event.data.get("reasons")
    return Rejection(
        time_ns=event.time_ns,
        request=None if request is None else str(request),
        by=str(event.data.get("by") or ""),
        reasons=list(map(str, reasons)) if isinstance(reasons, list) else [],
    )
