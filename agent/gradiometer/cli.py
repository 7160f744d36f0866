"""The command line. Shows help and reads runs without torch; only ``demo`` loads it."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from gradiometer.commands.policy import app as policy_app
from gradiometer.commands.prune import prune
from gradiometer.commands.replay import replay
from gradiometer.commands.request import request
from gradiometer.commands.suggest import suggest
from gradiometer.launch import launch, make_settings
from gradiometer.policy.spec import PolicyError, PolicySource, load_policy
from gradiometer.recorder import RunInUseError, check_run_id
from gradiometer.records import RunFormatError, default_root, find_ranks, find_runs, installed_version
from gradiometer.report import draw, job_state, summarize
from gradiometer.run import open_run
from gradiometer.runs import find_run

__all__ = ["app", "main"]

MONITOR_COMMANDS = {
    "monitor": ("gradiometer_monitor.cli:monitor", "Serve this host's runs: metrics, an API, and a page"),
    "top": ("gradiometer_monitor.top.command:top", "Watch this host's runs in the terminal"),
    "grafana": ("gradiometer_monitor.grafana.command:app", "Put the dashboards into a Grafana"),
    "rules": ("gradiometer_dashboards.rules.command:rules", "Write the alert rules for Prometheus or Grafana"),
    "token": ("gradiometer_monitor.web.token_command:token", "Make a token for a client of the monitor"),
}
"""Commands that need the extra: where each is, and what it does."""


class _Commands(TyperGroup):
    """The commands, of which those of the monitor are imported when they are asked for: that takes a second."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *MONITOR_COMMANDS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _of_monitor(cmd_name) if cmd_name in MONITOR_COMMANDS else super().get_command(ctx, cmd_name)


def _of_monitor(name: str) -> Any:
    """Make a command of the monitor, or what says which of its dependencies is missing."""
    place, said = MONITOR_COMMANDS[name]
    module, _, attribute = place.partition(":")
    made = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    try:
        found = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        missing = str(error.name)

        @made.command(
            name,
            help=f"{said} (needs the extra 'monitor').",
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )
        def refuse() -> None:
            subject = "the monitor" if name == "monitor" else f"gradiometer {name}"
            raise UsageError(f"{subject} needs {missing}: pip install 'gradiometer[monitor]'")

        return typer.main.get_command(made)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    made.command(name)(found)
    return typer.main.get_command(made)


app = typer.Typer(
    cls=_Commands,
    help="An instrument that measures gradients: per-layer norms and clip events of live PyTorch runs.",
    no_args_is_help=True,
    rich_markup_mode=None,  # which would take "[default: 9477]" for a style
    pretty_exceptions_enable=False,
)
app.add_typer(policy_app, name="policy")
PIPE_WIDTH = 1000
Dir = Annotated[
    Path | None,
    typer.Option("--dir", help="Where runs live [env: GRADIOMETER_DIR; default: the user's state directory]."),
]


class UsageError(Exception):
    """What the user asked for cannot be done; the message is for the user."""


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if show_version:
        typer.echo(f"gradiometer {installed_version()}")
        raise typer.Exit


@app.command()
def runs(
    directory: Dir = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False
) -> None:
    """List the recorded runs, newest last."""
    root = default_root(directory)
    rows = sorted((_listed(path) for path in find_runs(root)), key=lambda row: row.get("started", ""))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    if not rows:
        typer.echo(f"no runs in {root}: 'gradiometer demo' makes one, gradiometer.attach() makes yours")
        return
    _console().print(_run_table(rows, root))


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="Run id, or the path of a run directory.")],
    directory: Dir = None,
    rank: Annotated[int, typer.Option(help="Which rank of a distributed run.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Sum up one run: its layers, clip events and incidents."""
    found = find_run(run, default_root(directory), rank)
    if as_json:
        typer.echo(json.dumps(summarize(found), indent=1))
    else:
        draw(found, _console())


@app.command()
def demo(
    steps: Annotated[int, typer.Option(help="Optimizer steps to take.", min=1)] = 600,
    run_id: Annotated[str | None, typer.Option(help="Name of the run; made from the clock unless given.")] = None,
    directory: Dir = None,
    policy: Annotated[
        str | None,
        typer.Option(help="Policy file, or 'none' to see what happens without clipping [default: norm 0.2]."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the monitor; 0 takes a free one [default: 9477].", min=0, max=65535)
    ] = None,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="Run the monitor beside the training.")] = True,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to train.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.", min=0)] = 0,
) -> None:
    """Train a deep LSTM on real text, and watch its gradients."""
    if run_id is not None:
        check_run_id(run_id)
    try:
        from gradiometer.demo import DEFAULT_POLICY, DemoError, DemoSettings, run_demo
    except ModuleNotFoundError as error:
        raise UsageError(f"the demo needs {error.name}: pip install 'gradiometer[torch,monitor]'") from error
    chosen: PolicySource | None = DEFAULT_POLICY
    if policy is not None:
        chosen = None if policy == "none" else load_policy(policy)
    settings = DemoSettings(
        steps=steps, run_id=run_id, root=directory, policy=chosen, port=port, serve=serve, device=device, seed=seed
    )
    try:
        raise typer.Exit(run_demo(settings, Console()))
    except DemoError as error:
        raise UsageError(str(error)) from error


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[
        list[str] | None, typer.Argument(help="The program and its arguments, after '--': python train.py --epochs 3")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="Policy file to clip by; gradients are only measured without one.")
    ] = None,
    directory: Dir = None,
    run_id: Annotated[str | None, typer.Option(help="Name of the run; made from the clock unless given.")] = None,
    backward: Annotated[Literal["auto", "every", "off"], typer.Option(help="When backward hooks are armed.")] = "auto",
    label: Annotated[list[str] | None, typer.Option(help="NAME=VALUE, exported with the run; may be repeated.")] = None,
    updates_every: Annotated[
        int, typer.Option(help="In which steps it is measured how far weights move; 0: in none.", min=0)
    ] = 100,
    cosine: Annotated[
        bool, typer.Option("--cosine", help="Then also the cosine of the gradient and that of the step before.")
    ] = False,
    ring_bytes: Annotated[
        int | None,
        typer.Option(help="Disk space of a rank's ring: how many steps are kept [default: 134217728].", min=1),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Tell on stderr which run each process writes. Without it, only the run id is told, at the start, and "
            "only if stderr is a terminal.",
        ),
    ] = False,
) -> None:
    """Run a training program as it is, and measure every model that it trains."""
    settings = make_settings(
        policy=policy,
        root=directory,
        run_id=run_id,
        backward=backward,
        labels=label or [],
        updates_every=updates_every,
        cosine=cosine,
        ring_bytes=ring_bytes,
        verbose=verbose,
    )
    launch(command or [], settings)


def _listed(path: Path) -> dict[str, Any]:
    """Describe one run of a list; one that cannot be read says why."""
    try:
        ranks = find_ranks(path)
        run = open_run(ranks[0])
    except (RunFormatError, OSError) as error:
        return {"run_id": path.name, "state": "unreadable", "error": str(error)}
    summary = summarize(run, compare_ranks=False)
    keys = ("run_id", "started", "steps", "grad_norm_median", "nonfinite_steps", "skipped_steps", "loss_last")
    state = job_state(run, ranks[1 : run.manifest.world_size])  # an earlier start may have left more
    return {"state": state, "ranks": len(ranks)} | {key: summary[key] for key in keys}


def _console() -> Console:
    """Make the console for tables: in a pipe or a file nothing is cut to the width of a terminal."""
    return Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)


_NUMBERS = ("ranks", "steps", "median norm", "non-finite", "skipped", "last loss")


def _run_table(rows: list[dict[str, Any]], root: Path) -> Table:
    table = Table(title=f"Runs in {root}", title_justify="left", title_style="bold", box=SIMPLE, padding=0)
    headings = {
        "run_id": "run",
        "state": "state",
        "ranks": "ranks",
        "started": "started",
        "steps": "steps",
        "grad_norm_median": "median norm",
        "nonfinite_steps": "non-finite",
        "skipped_steps": "skipped",
        "loss_last": "last loss",
    }
    for heading in headings.values():
        table.add_column(heading, no_wrap=heading == "run", justify="right" if heading in _NUMBERS else "left")
    for row in rows:
        row["started"] = str(row.get("started", "-"))[:16].replace("T", " ")
        table.add_row(*(_cell(row.get(key)) for key in headings))
    return table


def _cell(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


app.command()(prune)
app.command()(replay)
app.command()(request)
app.command()(suggest)


def main() -> None:
    """Run the command line; what the user can mend is one line on stderr and exit status 2."""
    try:
        app()
    except (UsageError, PolicyError, RunFormatError, RunInUseError, ValueError, OSError) as error:
        typer.echo(f"gradiometer: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
