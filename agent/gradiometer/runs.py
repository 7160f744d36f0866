"""Find a recorded run by what a person calls it. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from gradiometer.records import find_ranks, find_runs
from gradiometer.run import Run, open_run

__all__ = ["NoSuchRunError", "find_run"]


class NoSuchRunError(FileNotFoundError):
    """No run is called so; the message names those there are."""


def find_run(run: str, root: Path, rank: int = 0) -> Run:
    """Open a run by its id below ``root``, or by path; raises NoSuchRunError that lists the runs there are."""
    path = root / run if (root / run).exists() else Path(run)
    try:
        return open_run(path, rank)
    except FileNotFoundError as error:
        ranks = [each.name for each in find_ranks(path)]
        if ranks:
            raise NoSuchRunError(f"run {run!r} has no rank {rank}: in {path} there are {', '.join(ranks)}") from error
        newest = sorted(find_runs(root), key=lambda each: each.stat().st_mtime)[-5:]
        known = ", ".join(each.name for each in newest) or "none"
        raise NoSuchRunError(f"no run {run!r} (rank {rank}) in {root}; the newest there: {known}") from error
