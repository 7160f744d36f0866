"""Sum up a recorded run: as tables for people, as plain values for programs. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gradiometer.insight import Episode, bad_episodes, rank_ratios
from gradiometer.live.revisions import Mode
from gradiometer.process import process_alive
from gradiometer.records import OWN_CLIPPING, RingReader, RunFormatError, State, read_manifest
from gradiometer.run import Run

__all__ = ["draw", "layer_table", "run_state", "summarize"]

MAX_LAYERS, MAX_EVENTS = 40, 20
LARGE_RATIO = 3.0
"""A rank is named whose own gradients are this many times those of the others."""


def run_state(run: Run) -> str:
    """Tell whether the run is ``running``, ``finished``, ``lost`` (its process died) or ``unknown`` (another host)."""
    if run.status["state"] == State.FINISHED:
        return "finished"
    return {True: "running", False: "lost", None: "unknown"}[process_alive(run.manifest)]


def job_state(run: Run, ranks: Iterable[Path]) -> str:
    """Tell the state of a run of several ``ranks``: ``lost`` if any of them is, else that of ``run``, one of them."""
    return "lost" if any(_is_lost(path) for path in ranks) else run_state(run)


def _is_lost(path: Path) -> bool:
    try:
        manifest = read_manifest(path / "manifest.json")
        ring = RingReader(path / "steps.ring", manifest.ring)
    except (RunFormatError, OSError):
        return False
    try:
        return ring.status()["state"] != State.FINISHED and process_alive(manifest) is False
    finally:
        ring.close()


def summarize(run: Run, *, compare_ranks: bool = True) -> dict[str, Any]:
    """Return what there is to say about a run as JSON values; unknown numbers are None.

    To ``compare_ranks`` is to read the files of all of them.
    """
    siblings = run.path.parent if compare_ranks and run.manifest.world_size > 1 else None
    manifest, norms = run.manifest, run.grad_norm_preclip
    finite = norms[np.isfinite(norms)]
    return {
        "run_id": manifest.run_id,
        "path": str(run.path),
        "state": run_state(run),
        "rank": manifest.rank,
        "world_size": manifest.world_size,
        "device": manifest.device,
        "started": _clock(manifest.created_ns / 1e9),
        "steps": int(run.status["steps"]),
        "steps_in_ring": len(run),
        "parameters": len(run.parameters),
        "policy": run.history.newest.policy,
        "policy_revision": run.history.newest.revision,
        "policy_changes": int(run.status["policy_changes"]),
        "policy_rejections": int(run.status["policy_rejections"]),
        "clip_events": _clip_events(run, "act")
        | {name: int(run.status["clip_events"][OWN_CLIPPING[name]]) for name in run.own_clipping},
        "shadow_events": _clip_events(run, "shadow"),
        "nonfinite_steps": int(run.status["nonfinite_steps"]),
        "skipped_steps": int(run.status["skipped_steps"]),
        "rows_dropped": int(run.status["rows_dropped"]),
        "events_dropped": int(run.status["events_dropped"]),
        "agent_errors": int(run.status["agent_errors"]),
        "agent_seconds": float(run.status["agent_seconds"]),
        "grad_norm_median": _known(np.median(finite)) if len(finite) else None,
        "grad_norm_max": _known(finite.max()) if len(finite) else None,
        "loss_last": _last(run.loss),
        "learning_rate_last": _last(run.learning_rate),
        "noise_scale": _known(run.noise_scale().scale),
        "grad_cosine_median": None if run.samples is None else _median(run.samples.total_cosine),
        "bad_ranks": [] if siblings is None else [_episode(each) for each in bad_episodes(siblings)],
        "large_ranks": {} if siblings is None else _large_ranks(siblings),
        "layers": list(_layers(run)),
        "events": run.events,
    }


def _clip_events(run: Run, mode: Mode) -> dict[str, int]:
    """Name the counters of what acts, or of what is in shadow, by the policy that the newest row was decided by."""
    revision, counts = run.history.find(int(run.status["policy_revision"])), run.status["clip_events"]
    return {slot.name: int(counts[place]) for place, slot in (revision.named if revision else ()) if slot.mode == mode}


def _episode(episode: Episode) -> dict[str, Any]:
    return {"step": episode.step, "parameter": episode.parameter, "ranks": list(episode.ranks)}


def _large_ranks(run: Path) -> dict[str, float]:
    """Map the ranks whose own gradients are much larger than the others' to how many times."""
    return {str(rank): ratio for rank, ratio in rank_ratios(run).items() if ratio >= LARGE_RATIO}


def _layers(run: Run) -> Iterator[dict[str, Any]]:
    """Yield each layer's norms over the steps in the ring, in the order of the model."""
    norms = run.layer_norms()
    clipped = run.layer_norms("grad_norm_postclip") < norms * (1 - 1e-6)
    squares = np.where(np.isfinite(norms), np.square(norms), 0.0)
    total = squares.sum()
    ratios = None if run.samples is None else run.samples.update_ratio
    for index, name in enumerate(run.layers):
        finite = norms[np.isfinite(norms[:, index]), index]
        yield {
            "layer": name,
            "median": _known(np.median(finite)) if len(finite) else None,
            "max": _known(finite.max()) if len(finite) else None,
            "share": _known(squares[:, index].sum() / total) if total else None,
            "clipped_steps": int(clipped[:, index].sum()),
            "nonfinite_steps": int(len(norms) - len(finite)),
            "update_ratio": None if ratios is None else _median(ratios[:, index]),
        }


def draw(run: Run, console: Console) -> None:
    """Draw a run: the facts, where it is, in one piece that can be copied, the layers, the incidents."""
    summary = summarize(run)
    console.print(_facts(summary))
    console.print(Text(summary["path"]), soft_wrap=True)
    console.print(layer_table(summary["layers"]))
    if summary["events"]:
        console.print(_incidents(summary["events"]))


def _facts(summary: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    clips = _counts(summary["clip_events"]) or "no policy"
    shadow = {"would have clipped": _counts(summary["shadow_events"])} if summary["shadow_events"] else {}
    facts = {
        "run": f"{summary['run_id']} ({summary['state']}), rank {summary['rank']} of {summary['world_size']}",
        "started": f"{summary['started']} on {summary['device']}",
        "steps": f"{summary['steps']}, of which the ring holds {summary['steps_in_ring']}",
        "gradient norm": f"median {_number(summary['grad_norm_median'])}, largest {_number(summary['grad_norm_max'])}",
        "steps clipped by": clips,
        **shadow,
        **_changes(summary),
        "non-finite steps": f"{summary['nonfinite_steps']}, skipped {summary['skipped_steps']}",
        "last loss": _number(summary["loss_last"]),
        **_diagnostics(summary),
        "agent": f"{summary['agent_seconds']:.2f} s in hooks, {summary['agent_errors']} errors, "
        f"{summary['rows_dropped']} rows dropped",
    }
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), Text(value, overflow="fold"))
    return table


def _counts(events: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in events.items())


def _changes(summary: dict[str, Any]) -> dict[str, str]:
    """Put in words that the policy was changed while the job ran, if it was or should have been."""
    changes, rejections = summary["policy_changes"], summary["policy_rejections"]
    if not changes and not rejections:
        return {}
    return {"policy changes": f"{changes}, {rejections} refused; see 'gradiometer policy show'"}


def _diagnostics(summary: dict[str, Any]) -> dict[str, str]:
    """Put in words what was found out beside the norms; nothing is said of what is not known."""
    found = {}
    if summary["noise_scale"] is not None:
        found["noise scale"] = f"{_number(summary['noise_scale'])} micro-batches"
    if summary["grad_cosine_median"] is not None:
        found["cosine to last step"] = f"median {_number(summary['grad_cosine_median'])}"
    if summary["bad_ranks"]:
        said = [f"step {each['step']}: {_named(each['ranks'])}" for each in summary["bad_ranks"][-MAX_EVENTS:]]
        found["non-finite on"] = "; ".join(said)
    if summary["large_ranks"]:
        said = [f"rank {rank} ({ratio:.3g} times the others)" for rank, ratio in summary["large_ranks"].items()]
        found["large gradients on"] = ", ".join(said)
    return found


def _named(ranks: Sequence[int]) -> str:
    return ", ".join(f"rank {rank}" for rank in ranks) or "not seen on which rank"


def layer_table(layers: Sequence[dict[str, Any]]) -> Table:
    """Draw the layers' norms; beyond 40 layers, those with the largest share of the squared norm."""
    shown = list(layers)
    title = "Gradient norm by layer, before clipping"
    if len(shown) > MAX_LAYERS:
        chosen = {id(layer) for layer in sorted(shown, key=lambda layer: -(layer["share"] or 0.0))[:MAX_LAYERS]}
        shown = [layer for layer in shown if id(layer) in chosen]
        title += f" (the {MAX_LAYERS} of {len(layers)} with the largest share)"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("layer", overflow="fold")
    for heading in ("median", "max", "share", "update ratio", "clipped steps", "non-finite"):
        table.add_column(heading, justify="right")
    for layer in shown:
        share = "-" if layer["share"] is None else f"{layer['share']:.1%}"
        bad = Text(str(layer["nonfinite_steps"]), style="red" if layer["nonfinite_steps"] else "")
        table.add_row(
            layer["layer"],
            _number(layer["median"]),
            _number(layer["max"]),
            share,
            _number(layer["update_ratio"]),
            str(layer["clipped_steps"]),
            bad,
        )
    return table


def _incidents(events: Sequence[dict[str, Any]]) -> Table:
    title = "Events" if len(events) <= MAX_EVENTS else f"Events (the last {MAX_EVENTS} of {len(events)})"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("time")
    table.add_column("kind")
    table.add_column("message", overflow="fold")
    for event in events[-MAX_EVENTS:]:
        when = _clock(event["time_ns"] / 1e9)[11:19] if "time_ns" in event else "?"
        table.add_row(when, str(event.get("kind", "?")), str(event.get("message", event.get("line", ""))))
    return table


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().isoformat(timespec="seconds")


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _last(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float | None:
    known = values[~np.isnan(values)]
    return _known(known[-1]) if len(known) else None


def _median(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
