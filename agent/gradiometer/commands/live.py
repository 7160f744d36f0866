"""``gradiometer policy apply`` and ``show``: the policy of a running job, from beside it. Needs no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradiometer.live.control import Answer, RequestError, await_answer, rejections, request_policy, requests_rank
from gradiometer.live.revisions import Revision, describe_change, read_history
from gradiometer.records import default_root, read_events, read_manifest

__all__ = ["apply", "show"]

WIDTH = 1000
Target = Annotated[str, typer.Argument(help="Run id, or the path of a run directory.")]
Dir = Annotated[
    Path | None,
    typer.Option("--dir", help="Where runs live [env: GRADIOMETER_DIR; default: the user's state directory]."),
]
Rank = Annotated[
    int | None, typer.Option(help="A rank of the group that is meant, where groups train by themselves.", min=0)
]


def apply(
    run: Target,
    file: Annotated[str, typer.Argument(help="Policy file, or 'none' to clip no more.")],
    directory: Dir = None,
    rank: Rank = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until the job has answered.")] = True,
    timeout: Annotated[float, typer.Option(help="For how many seconds at most.", min=0)] = 60.0,
    note: Annotated[str, typer.Option(help="Why, for the record.")] = "",
) -> None:
    """Ask a running job to take up another policy; exit status 1 if it refuses, or gives no answer."""
    path = _path(run, directory)
    request = request_policy(path, None if file == "none" else file, rank=rank, note=note)
    if not wait:
        typer.echo(f"asked (request {request}): 'gradiometer policy show {run}' tells what became of it")
        return
    newest = -2

    def tell(step: int) -> None:
        nonlocal newest
        if newest == -2:
            typer.echo(f"asked (request {request}); the job answers at its next step, the newest is {step}", err=True)
        newest = step

    try:
        answer = await_answer(requests_rank(path, rank), request, timeout, tell)
    except (TimeoutError, RequestError) as error:
        typer.echo(f"gradiometer: {error} (newest step: {newest})", err=True)
        raise typer.Exit(1) from error
    if not answer.applied:
        typer.echo("refused, the old policy stays:\n" + "\n".join(f"  {reason}" for reason in answer.reasons), err=True)
        raise typer.Exit(1)
    typer.echo(f"in force from step {answer.step} on (revision {answer.revision}){_what_changed(path, rank, answer)}")


def show(
    run: Target,
    directory: Dir = None,
    rank: Rank = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
    history: Annotated[bool, typer.Option("--history", help="Print every revision in full as well.")] = False,
) -> None:
    """Print the policy in force, and how it came to be."""
    path = requests_rank(_path(run, directory), rank)
    found = read_history(path, read_manifest(path / "manifest.json"))
    events, _ = read_events(path / "events.jsonl")
    refused = list(rejections(events))
    if as_json:
        typer.echo(json.dumps({**found.model_dump(mode="json"), "rejections": refused}, indent=1))
        return
    typer.echo(_as_yaml(found.newest), nl=False)
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    console.print(_table(found.revisions, refused))
    for revision in found.revisions if history else ():
        typer.echo(f"\n# revision {revision.revision}, from step {revision.step} on\n{_as_yaml(revision)}", nl=False)


def _what_changed(path: Path, rank: int | None, answer: Answer) -> str:
    """Put the change in words, as the history has them; nothing where it is forgotten."""
    directory = requests_rank(path, rank)
    history = read_history(directory, read_manifest(directory / "manifest.json"))
    old, new = (history.find((answer.revision or 0) - back) for back in (1, 0))
    return "" if old is None or new is None else f": {describe_change(old.policy, new.policy)}"


def _path(run: str, directory: Path | None) -> Path:
    root = default_root(directory)
    path = root / run if (root / run).exists() else Path(run)
    if not path.is_dir():
        raise FileNotFoundError(f"no run {run!r} in {root}: 'gradiometer runs' lists those there are")
    return path.resolve() if path.is_symlink() else path


def _as_yaml(revision: Revision) -> str:
    if revision.policy is None:
        return "# no policy: gradients are observed only\n"
    text: str = yaml.safe_dump(revision.policy, sort_keys=False)
    return text


def _table(revisions: Sequence[Revision], refused: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="History", title_justify="left", title_style="bold")
    for heading in ("revision", "step"):
        table.add_column(heading, justify="right")
    for heading in ("time", "who", "what"):
        table.add_column(heading, overflow="fold")
    for _, cells in sorted([*_changes(revisions), *_refusals(refused)], key=lambda row: row[0]):
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _changes(revisions: Sequence[Revision]) -> Iterator[tuple[int, list[str]]]:
    for place, each in enumerate(revisions):
        what = "as attached" if each.source == "attach" else "the revisions before are forgotten"
        if place:
            what = describe_change(revisions[place - 1].policy, each.policy)
        yield each.time_ns, [str(each.revision), str(each.step), _clock(each.time_ns), each.by or "-", what]


def _refusals(refused: Sequence[dict[str, Any]]) -> Iterator[tuple[int, list[str]]]:
    for event in refused:
        when, reasons = int(event.get("time_ns", 0)), "; ".join(map(str, event.get("reasons", ())))
        yield when, ["-", "-", _clock(when), str(event.get("by") or "-"), f"refused: {reasons}"]


def _clock(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / 1e9, UTC).astimezone().isoformat(" ", "seconds")[:19]
