"""``gradiometer replay``: policies over a recorded run, side by side with what it did. Loads torch when it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gradiometer.policy.problems import PolicyError
from gradiometer.policy.spec import PolicySpec, load_policy
from gradiometer.records import default_root
from gradiometer.replay.history import SPIKE, Ran, notes, recorded, spikes, summarize_ran
from gradiometer.run import Run
from gradiometer.runs import find_run

__all__ = ["ReplayError", "replay", "replay_all"]

PIPE_WIDTH, INTERRUPTED = 1000, 130


class ReplayError(ValueError):
    """The run cannot be replayed, or not here; the message says why."""


def replay(
    run: Annotated[str, typer.Argument(help="Run id, or the path of a run directory.")],
    policy: Annotated[list[Path], typer.Option(help="Policy file; may be repeated.")],
    directory: Annotated[Path | None, typer.Option("--dir", help="Where runs live.")] = None,
    rank: Annotated[int, typer.Option(help="Which rank of a distributed run.", min=0)] = 0,
    last: Annotated[int | None, typer.Option(help="Replay the last N steps only.", min=1)] = None,
    settle: Annotated[
        int, typer.Option(help="Leave the first N replayed steps out of the figures: statistics form there.", min=0)
    ] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw norms and thresholds into this PNG (needs the extra 'plot').")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Ask what policies would have done in a recorded run. Open-loop: its norms are those of the run as it went."""
    specs = {str(path): load_policy(path) for path in policy}
    found = find_run(run, default_root(directory), rank)
    found = found if last is None else replace(found, rows=found.rows[-last:])
    if not len(found):
        raise ReplayError(f"run {run!r} holds no step yet: there is nothing to replay")
    if settle >= len(found):
        raise ReplayError(f"--settle is {settle}, but there are {len(found)} steps: leave some of them in")
    try:
        rans = replay_all(found, specs, quiet=as_json)
    except KeyboardInterrupt:
        typer.echo("stopped by Ctrl-C", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if plot is not None:
        _plot(found, rans, plot)
    result = _result(found, rans, settle)
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        _draw(result, Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH))


def replay_all(run: Run, specs: dict[str, PolicySpec], *, quiet: bool = False) -> list[Ran]:
    """Replay each policy over the run, with a progress bar on stderr where that is a terminal."""
    try:
        from gradiometer.replay.driver import replay as replay_one
    except ModuleNotFoundError as error:
        raise ReplayError(f"replaying needs {error.name}: pip install 'gradiometer[torch]'") from error
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
        TimeRemainingColumn(), console=console, transient=True, disable=quiet or not console.is_terminal,
    )  # fmt: skip
    rans = []
    with bar:
        for label, spec in specs.items():
            task = bar.add_task(label, total=len(run))
            try:
                rans.append(replay_one(run, spec, label, partial(bar.advance, task)))
            except PolicyError as error:
                raise PolicyError(f"{label}: {error}") from error
    return rans


def _plot(run: Run, rans: Sequence[Ran], path: Path) -> None:
    try:
        from gradiometer.replay.plot import plot_replay
    except ModuleNotFoundError as error:
        raise ReplayError(f"--plot needs {error.name}: pip install 'gradiometer[plot]'") from error
    plot_replay(run, rans, path)


def _result(run: Run, rans: Sequence[Ran], settle: int) -> dict[str, Any]:
    spiking = spikes(run.grad_norm_preclip)
    return {
        "run_id": run.manifest.run_id,
        "path": str(run.path),
        "open_loop": True,
        "notes": notes(run, rans),
        "steps": len(run) - settle,
        "first_step": int(run.steps[settle]),
        "last_step": int(run.steps[-1]),
        "spikes": int(spiking[settle:].sum()),
        "nonfinite_steps": int(run.nonfinite[settle:].sum()),
        "recorded": summarize_ran(recorded(run), run, spiking, settle),
        "replayed": [summarize_ran(ran, run, spiking, settle) for ran in rans],
    }


def _draw(result: dict[str, Any], console: Console) -> None:
    head = (
        f"{result['run_id']}: {result['steps']} steps, {result['first_step']} to {result['last_step']}; "
        f"{result['nonfinite_steps']} non-finite, {result['spikes']} spikes (norms {SPIKE:g} times the median before)"
    )
    console.print(Text(head, style="bold"), soft_wrap=True)
    table = Table(box=SIMPLE, padding=0)
    for heading in ("policy", "stage"):
        table.add_column(heading, overflow="fold")
    for heading in (
        "clip rate",
        "clipped",
        "skipped",
        "spikes caught",
        "threshold min",
        "median",
        "last",
        "smallest factor",
    ):
        table.add_column(heading, justify="right")
    for each in (result["recorded"], *result["replayed"]):
        rate = _percent(each["clip_rate"])
        counts = [str(each[key]) for key in ("steps_clipped", "steps_skipped", "spikes_caught")]
        table.add_row(Text(each["label"], style="bold"), "", rate, *counts)
        for stage in each["stages"]:
            table.add_row(*(Text(cell) for cell in _cells(stage)))
        for name in each["not_replayed"]:
            table.add_row("", Text(f"{name}: not replayed"))
    console.print(table)
    for each in result["replayed"]:
        for name, reason in each["not_replayed"].items():
            console.print(Text(f"{each['label']}: {name} cannot be replayed: {reason}"), soft_wrap=True)
    for note in result["notes"]:
        console.print(Text(note), soft_wrap=True)


def _cells(stage: dict[str, Any]) -> list[str]:
    name = stage["name"] if stage["mode"] == "act" else f"{stage['name']} (shadow)"
    counts = [str(stage[key]) for key in ("steps_clipped", "steps_skipped", "spikes_caught")]
    threshold = stage["threshold"] or {}
    thresholds = [f"{threshold[key]:.4g}" if key in threshold else "-" for key in ("min", "median", "last")]
    return ["", name, _percent(stage["clip_rate"]), *counts, *thresholds, f"{stage['smallest_coefficient']:.3g}"]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
