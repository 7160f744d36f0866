"""``gradiometer request``: ask the loop of a running job, from beside it. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from gradiometer.commands.live import Dir, Rank, Target, run_path
from gradiometer.live.control import RequestError, await_answer, requests_rank
from gradiometer.live.requests import request_loop

__all__ = ["request"]


def request(
    run: Target,
    what: Annotated[Literal["checkpoint", "stop"], typer.Argument(help="What the loop is to do.")],
    directory: Dir = None,
    rank: Rank = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the job has answered.")] = True,
    timeout: Annotated[float, typer.Option(help="For how many seconds at most.", min=0)] = 300.0,
    note: Annotated[str, typer.Option(help="Why, for the record.")] = "",
) -> None:
    """Ask a running job for a checkpoint, or to stop; exit status 1 if it refuses, or gives no answer."""
    path = run_path(run, directory)
    asked = request_loop(path, what, rank=rank, note=note)
    typer.echo(f"asked for a {what} (request {asked})", err=wait)
    if not wait:
        return
    try:
        answer = await_answer(requests_rank(path, rank), asked, timeout, of_policy=False)
    except (TimeoutError, RequestError) as error:
        typer.echo(f"gradiometer: {error}", err=True)
        raise typer.Exit(1) from error
    if not answer.applied:
        typer.echo("refused:\n" + "\n".join(f"  {reason}" for reason in answer.reasons), err=True)
        raise typer.Exit(1)
    typer.echo(f"done after step {answer.step}" + (f": {answer.note}" if answer.note else ""))
