"""Draw a replay: the norm of each step, and each policy's threshold over it. Needs matplotlib, and no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gradiometer.replay.history import Ran
from gradiometer.run import Run

__all__ = ["plot_replay"]

NORM, CLIP, SKIP, BAD = "#94a3b8", "#b45309", "#b91c1c", "#7c3aed"
THRESHOLDS = ("#0f766e", "#1d4ed8", "#a16207", "#be185d")


def plot_replay(run: Run, rans: Sequence[Ran], path: Path, *, title: str | None = None, dpi: int = 80) -> None:
    """Write a PNG with a panel for each policy: norms on a log axis, thresholds, and what was clipped or skipped."""
    figure = Figure(figsize=(10, 0.7 + 2.9 * len(rans)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rans), 1, sharex=True, squeeze=False)[:, 0]
    norms = run.grad_norm_preclip
    positive = norms[np.isfinite(norms) & (norms > 0)]
    low, high = (positive.min() / 1.6, positive.max() * 1.6) if len(positive) else (0.1, 10.0)
    for axis, ran in zip(axes, rans, strict=True):
        _panel(axis, run, ran, low, high)
    axes[-1].set_xlabel("optimizer step")
    figure.suptitle(title or f"{run.manifest.run_id}: what each policy would have done (open-loop replay)", fontsize=11)
    figure.savefig(path, dpi=dpi)


def _panel(axis: Any, run: Run, ran: Ran, low: float, high: float) -> None:
    steps, norms = run.steps, run.grad_norm_preclip
    axis.plot(steps, np.where(norms > 0, norms, np.nan), color=NORM, linewidth=0.8, label="gradient norm, whole model")
    for place, stage in enumerate(stage for stage in ran.stages if np.isfinite(stage.threshold).any()):
        style = "-" if stage.acts else "--"
        label = f"threshold of {stage.name}{_part(ran.policy, stage.name)}" + ("" if stage.acts else " (shadow)")
        label += "" if stage.scope == "model" else f", the {stage.scope} cut most"
        seen = np.where(np.isfinite(stage.threshold), stage.threshold, np.nan)
        color = THRESHOLDS[place % len(THRESHOLDS)]
        axis.plot(steps, seen, style, color=color, linewidth=1.3, label=label)
    skipped = ran.skipped_by_policy
    clipped = ran.clipped & ~skipped
    for chosen, color, mark, word, height in (
        (clipped & np.isfinite(norms), CLIP, "|", "clipped", 0.04),
        (skipped, SKIP, "x", "skipped", 0.1),
        (run.nonfinite, BAD, "v", "NaN or Inf", 0.17),
    ):
        if chosen.any():
            axis.plot(
                steps[chosen], np.full(chosen.sum(), height), mark, color=color, markersize=5,
                transform=axis.get_xaxis_transform(), label=f"{word} ({_steps(chosen)})", linestyle="none",
            )  # fmt: skip
    axis.set(yscale="log", ylim=(low / 1.8, high * 6), ylabel="L2 norm, log scale", xlim=(steps[0], steps[-1] + 1))
    done = [f"{word} {chosen.mean():.1%}" for word, chosen in (("clips", clipped), ("skips", skipped)) if chosen.any()]
    said = f"{' and '.join(done)} of the steps" if done else "changes no step"
    axis.set_title(f"{ran.label}: {said}", loc="left", fontsize=10)
    axis.legend(loc="upper right", fontsize=7.5, ncols=2, framealpha=0.85)
    axis.grid(visible=True, which="major", linewidth=0.3)


def _part(policy: Mapping[str, Any] | None, name: str) -> str:
    """Say of which parameters the norm is that a threshold bounds, where it is not the one that is drawn."""
    stages = [*(policy or {}).get("pipeline", ()), *(policy or {}).get("shadow", ())]
    for kind, settings in (item for stage in stages for item in stage.items()):
        if settings.get("name", kind) == name:
            chosen = [*settings.get("match", ())] + [f"all but {each}" for each in settings.get("exclude", ())]
            return f" on {chosen[0]}{', …' if len(chosen) > 1 else ''}" if chosen else ""
    return ""


def _steps(chosen: Any) -> str:
    count = int(chosen.sum())
    return f"{count} step" if count == 1 else f"{count} steps"
