"""``gradiometer prune``: remove runs that are over, by age and by the room they take. Needs no torch."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from gradiometer.prune import DAY_SECONDS, Pruned, Stored, choose, find_stored, remove
from gradiometer.records import default_root

__all__ = ["parse_bytes", "prune"]

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Read a size as a person writes it, as 50G or 500MiB, in powers of 1024. Raises ValueError."""
    found = SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"--max-bytes {text!r}: expected a number of bytes, or one with K, M, G or T, as in 50G")
    return int(float(found[1]) * UNITS[found[2].upper()])


def prune(
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Where runs live [env: GRADIOMETER_DIR; default: the user's state directory]."),
    ] = None,
    older_than: Annotated[
        float | None, typer.Option("--older-than", help="Remove runs that ended more than so many days ago.", min=0)
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option("--max-bytes", help="Remove the oldest until all take no more: 50G, 500MiB.")
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Run that stays; may be repeated.")] = None,
    keep_newest: Annotated[int, typer.Option(help="How many of the newest runs stay.", min=0)] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Remove runs that are over, the oldest first. Exit status 1 if some could not be removed."""
    if older_than is None and max_bytes is None:
        raise ValueError("say what is to go: --older-than DAYS, --max-bytes SIZE, or both")
    root = default_root(directory)
    stored = find_stored(root)
    _check_names(keep or [], stored, root)
    bound = None if max_bytes is None else parse_bytes(max_bytes)
    chosen = choose(
        stored,
        max_age_seconds=None if older_than is None else older_than * DAY_SECONDS,
        max_bytes=bound,
        keep=keep or [],
        keep_newest=keep_newest,
    )
    if not as_json:
        _print_plan(chosen, stored, root)
        _print_excess(chosen, stored, bound)
    removes = bool(chosen) and not dry_run
    if removes and not yes:
        _ask(len(chosen))
    pruned = remove(root, chosen) if removes else Pruned()
    if as_json:
        typer.echo(json.dumps(_report(stored, chosen, pruned, dry_run=dry_run), indent=1))
    elif removes:
        _print_result(pruned)
    if pruned.kept:
        raise typer.Exit(1)


def _check_names(keep: Sequence[str], stored: Sequence[Stored], root: Path) -> None:
    unknown = set(keep).difference(each.run_id for each in stored)
    if unknown:
        raise ValueError(f"--keep {', '.join(sorted(unknown))}: no such run in {root}; nothing was removed")


def _ask(count: int) -> None:
    """Have a person agree, and refuse where there is none. Raises ValueError or typer.Abort."""
    if not sys.stdin.isatty():
        raise ValueError("nothing was removed: there is no terminal to ask on; add --yes, or --dry-run to see only")
    typer.confirm(f"remove {_counted(count)}?", abort=True, err=True)


def _print_plan(chosen: Sequence[Stored], stored: Sequence[Stored], root: Path) -> None:
    for each in chosen:
        ended = datetime.fromtimestamp(each.ended, UTC).astimezone().isoformat(" ", "minutes")[:16]
        typer.echo(f"{each.name}  ended {ended}  {decimal(each.bytes)}")
    freed, taken = sum(each.bytes for each in chosen), sum(each.bytes for each in stored)
    typer.echo(f"{_counted(len(chosen))} of {len(stored)} in {root}: {decimal(freed)} of {decimal(taken)}")
    for each in stored:
        if each.problem:
            typer.echo(f"left alone: {each.name}: {each.problem}", err=True)


def _print_excess(chosen: Sequence[Stored], stored: Sequence[Stored], bound: int | None) -> None:
    """Say that a bound of bytes is not met, and what takes the room."""
    staying = [each for each in stored if each not in chosen]
    taken = sum(each.bytes for each in staying)
    if bound is None or taken <= bound:
        return
    kinds = Counter(
        "may still be running" if each.running else "cannot be told" if each.problem else "kept as asked"
        for each in staying
    )
    why = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    typer.echo(f"what stays takes {decimal(taken)}, more than --max-bytes {decimal(bound)}: {why}", err=True)


def _print_result(pruned: Pruned) -> None:
    typer.echo(f"removed {_counted(len(pruned.removed))}, {decimal(pruned.bytes)} are free")
    for name, reason in pruned.kept.items():
        typer.echo(f"not removed: {name}: {reason}", err=True)


def _counted(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _report(stored: Sequence[Stored], chosen: Sequence[Stored], pruned: Pruned, *, dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "bytes": sum(each.bytes for each in stored),
        "chosen": [{"run": each.name, "ended": each.ended, "bytes": each.bytes} for each in chosen],
        "chosen_bytes": sum(each.bytes for each in chosen),
        "removed": [each.name for each in pruned.removed],
        "removed_bytes": pruned.bytes,
        "not_removed": pruned.kept,
        "running": [each.name for each in stored if each.running],
        "left_alone": {each.name: each.problem for each in stored if each.problem},
    }
