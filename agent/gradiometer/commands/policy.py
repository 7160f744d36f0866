"""``gradiometer policy``: policy files before they are used, and in a running job. Loads no torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradiometer.commands.live import apply, show
from gradiometer.policy.actions import ActionSpec
from gradiometer.policy.audit import Coverage, cover, describe, scope_of
from gradiometer.policy.kinds import NonFiniteSpec, SkipSpec
from gradiometer.policy.problems import PolicyError, Problem
from gradiometer.policy.schema import policy_schema
from gradiometer.policy.spec import PolicySpec, load_policy
from gradiometer.records import default_root
from gradiometer.run import Run
from gradiometer.runs import find_run
from gradiometer.yaml_source import read_source

__all__ = ["app"]

app = typer.Typer(
    help="Check policy files; see and change the policy of a running job.", no_args_is_help=True, rich_markup_mode=None
)
PIPE_WIDTH, SHOWN = 1000, 8


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Policy files.", metavar="FILE...")],
    run: Annotated[
        str | None, typer.Option(help="A recorded run, by id or path: match the patterns with its parameters.")
    ] = None,
    directory: Annotated[Path | None, typer.Option("--dir", help="Where runs live.")] = None,
) -> None:
    """Report everything that is wrong with policy files, or what they do. Exit status 1 where something is wrong."""
    recorded = None if run is None else find_run(run, default_root(directory))
    console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    wrong = [not _checked(file, recorded, console) for file in files]
    raise typer.Exit(int(any(wrong)))


app.command()(apply)
app.command()(show)


@app.command()
def schema() -> None:
    """Print the JSON Schema of policy files, for editors."""
    typer.echo(json.dumps(policy_schema(), indent=1))


def _checked(file: Path, run: Run | None, console: Console) -> bool:
    """Check one file, say what was found, and tell whether it is right."""
    try:
        spec = load_policy(file)
        covered = None if run is None else _cover(spec, file, run)
    except PolicyError as error:
        for line in str(error).splitlines():
            typer.echo(line, err=True)
        return False
    console.print(Text(f"{file}: a policy of {len(spec.stages)}"), soft_wrap=True)
    console.print(_table(spec, covered))
    if spec.pipeline and not (isinstance(spec.pipeline[0], NonFiniteSpec) or _guarded(spec)):
        console.print(Text("no stage 'nonfinite': a step with NaN goes to the optimizer as it is"), soft_wrap=True)
    for action in spec.actions:
        done = "call " + action.callback if action.callback else action.kind
        console.print(Text(f"{action.name}: {done} when {_condition(action)}"), soft_wrap=True)
    if run is not None and covered is not None:
        for line in _coverage(spec, covered, run):
            console.print(Text(line), soft_wrap=True)
    return True


def _guarded(spec: PolicySpec) -> bool:
    """Tell whether a stage skips steps with NaN by the way: ``skip`` where it looks at the norm of all parameters."""
    return not spec.groups.exclude and any(
        isinstance(stage, SkipSpec) and "global_norm" in stage.on and not stage.match and not stage.exclude
        for stage in spec.pipeline
    )


def _condition(action: ActionSpec) -> str:
    """Say when an action is done, in the words and with all settings of its condition."""
    setting = action.when.setting
    given = setting.model_dump().items() if isinstance(setting, BaseModel) else ()
    shown = ", ".join(f"{key} {value}" for key, value in given) or str(setting)
    return f"{action.when.condition}: {shown}; at most once in {action.cooldown} steps"


def _cover(spec: PolicySpec, file: Path, run: Run) -> list[Coverage]:
    parameters = run.manifest.parameters
    covered, problems = cover(spec, str(file), [p.name for p in parameters], [p.layer for p in parameters])
    if problems:
        source = read_source(file, "policy", PolicyError)
        raise PolicyError.of([_placed(problem, source.place(problem.path)) for problem in problems])
    return covered


def _placed(problem: Problem, place: tuple[int | None, int | None]) -> Problem:
    return replace(problem, line=place[0], column=place[1])


def _table(spec: PolicySpec, covered: Sequence[Coverage] | None) -> Table:
    table = Table(box=SIMPLE, padding=0)
    for heading in ("", "policy", "what it does", "of each", "for"):
        table.add_column(heading, overflow="fold")
    if covered is not None:
        table.add_column("covers", justify="right")
    for place, stage in enumerate(spec.stages):
        acting = place < len(spec.pipeline)
        name = stage.kind if stage.name == stage.kind else f"{stage.kind} ({stage.name})"
        chosen = [*getattr(stage, "match", ())] + [f"not {each}" for each in getattr(stage, "exclude", ())]
        chosen += [f"not {each}" for each in spec.groups.exclude if stage.kind != "nonfinite"]
        cells = [str(place + 1) if acting else "shadow", name, describe(stage), scope_of(stage, spec.groups)]
        cells.append(", ".join(chosen) or "all parameters")
        if covered is not None:
            cells.append(
                f"{_count(sum(covered[place].parameters), 'parameter')}, {_count(covered[place].units, 'unit')}"
            )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _coverage(spec: PolicySpec, covered: Sequence[Coverage], run: Run) -> list[str]:
    """Say what each stage leaves alone, and what nothing clips."""
    names, lines = run.parameters, []
    for stage, coverage in zip(spec.stages, covered, strict=True):
        left = [name for name, mine in zip(names, coverage.parameters, strict=True) if not mine]
        if left:
            lines.append(f"{stage.name} leaves alone {_some(left)}")
    clipping = [
        each.parameters
        for stage, each in zip(spec.pipeline, covered, strict=False)
        if stage.kind not in ("nonfinite", "skip")
    ]
    bare = [name for place, name in enumerate(names) if not any(parameters[place] for parameters in clipping)]
    if bare and clipping:
        lines.append(f"nothing clips {_some(bare)}")
    return lines


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{len(names)} of the parameters: {', '.join(names[:SHOWN])}{more}"
