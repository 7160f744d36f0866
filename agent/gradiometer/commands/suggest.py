"""``gradiometer suggest``: a policy for a run, from its history, as YAML with the reasons."""

from __future__ import annotations

import json
import math
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from gradiometer.commands.replay import replay_all
from gradiometer.policy.spec import load_policy
from gradiometer.records import default_root
from gradiometer.replay.history import spikes, summarize_ran
from gradiometer.replay.suggest import WANTED, Findings, Proposal, describe, find, propose
from gradiometer.run import Run
from gradiometer.runs import find_run

__all__ = ["suggest"]

LABEL = "the proposal"


def suggest(
    run: Annotated[str, typer.Argument(help="Run id, or the path of a run directory.")],
    directory: Annotated[Path | None, typer.Option("--dir", help="Where runs live.")] = None,
    rank: Annotated[int, typer.Option(help="Which rank of a distributed run.", min=0)] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the policy to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
) -> None:
    """Propose a policy from a run's history, with the reasons, as YAML. Exit status 1 where it is too early."""
    found_run = find_run(run, default_root(directory), rank)
    found = find(found_run)
    names: dict[str, list[str]] = {}
    for parameter in found_run.manifest.parameters:
        names.setdefault(parameter.layer, []).append(parameter.name)
    proposal = propose(found, names)
    result: dict[str, Any] = {"run_id": found_run.manifest.run_id, "enough": found.enough, "wanted_steps": WANTED}
    result |= {"findings": _known(asdict(found)), "proposal": None}
    if proposal is None:
        usable = found.finite - found.warmup
        typer.echo(
            f"too early: {usable} finite steps after warm-up, wanted are {WANTED}. Nothing is proposed from fewer, for "
            "they do not tell a tail from a spike",
            err=True,
        )
        if as_json:
            typer.echo(json.dumps(result, indent=1))
        raise typer.Exit(1)
    figures = _replayed(found_run, found, proposal)
    text = _text(found_run, found, proposal, figures)
    result["proposal"] = {**asdict(proposal), "yaml": text, "replay": figures}
    if output is not None:
        output.write_text(text, encoding="utf-8")
    typer.echo(json.dumps(result, indent=1) if as_json else text, nl=as_json)


def _replayed(run: Run, found: Findings, proposal: Proposal) -> dict[str, Any]:
    """Replay the proposal over the run; the figures are without the warm-up, and open-loop."""
    (ran,) = replay_all(run, {LABEL: load_policy(proposal.policy)})
    spiking = spikes(run.grad_norm_preclip)
    figures = summarize_ran(ran, run, spiking, found.warmup)
    return figures | {"spikes": int(spiking[found.warmup :].sum()), "open_loop": True}


def _text(run: Run, found: Findings, proposal: Proposal, figures: dict[str, Any]) -> str:
    """Write the policy as YAML, the reasons as comments."""
    steps = len(run) - found.warmup
    scaled = (figures["steps_clipped"] - figures["steps_skipped"]) / steps
    would = (
        f"Replayed over {steps} steps of that run, open-loop: it clips {scaled:.2%} of them, skips "
        f"{figures['steps_skipped']}, and catches {figures['spikes_caught']} of {figures['spikes']} spikes."
    )
    lines = [f"Proposed by gradiometer suggest from run {run.manifest.run_id}.", "", *describe(found), ""]
    lines += [*proposal.reasons, "", would]
    comment = "\n".join(
        textwrap.fill(line, 116, initial_indent="# ", subsequent_indent="#   ") or "#" for line in lines
    )
    return f"{comment}\n{yaml.safe_dump(proposal.policy, sort_keys=False)}"


def _known(value: Any) -> Any:
    """Return JSON values: what is not known is None."""
    if isinstance(value, dict):
        return {key: _known(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
