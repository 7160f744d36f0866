"""Run policies over recorded norms: the very decide code of a live run, on the CPU, over a run's ring.

Open-loop: the norms are those of the run as it went, and a policy that had acted would have changed those that follow.
Guarantees: replaying the policy that was live over a whole run on the CPU gives the decisions that were made, to the
bit, where gradients were narrower than float64 and the loop did not clip by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradiometer.norms import total_norm
from gradiometer.policy.audit import scope_of
from gradiometer.policy.base import Decision, Layout, Observation
from gradiometer.policy.build import build_pipeline, build_shadow
from gradiometer.policy.kinds import AgcSpec, AnySpec, SkipSpec, ValueSpec
from gradiometer.policy.pipeline import Pipeline, Shadow
from gradiometer.policy.spec import PolicySpec
from gradiometer.records import Flag
from gradiometer.replay.history import Ran, recorded
from gradiometer.run import Run

__all__ = ["UNREPLAYABLE", "Progress", "replay"]

UNREPLAYABLE: dict[type[AnySpec], str] = {
    ValueSpec: "what a clamp does depends on each element, and norms do not tell",
    AgcSpec: "it needs the norms of gradients and weights row by row, and a run holds those of whole parameters",
}
"""Why a kind cannot be replayed. Such a stage is the last of its pipeline, so no other depends on it."""
CHUNK = 4096
Progress = Callable[[int], None]
"""Told how many steps more are done."""


@dataclass(slots=True)
class _Columns:
    """Decisions of one stage over all steps, gathered without a look at any."""

    thresholds: Tensor
    strengths: Tensor
    skips: Tensor


def replay(run: Run, spec: PolicySpec, label: str, progress: Progress | None = None) -> Ran:
    """Ask what a policy would have decided in each step of ``run``, which must hold at least one.

    Stages that cannot be replayed are left out, and named with the reason. Where the first step is not 0 the policy
    begins there as if it were new. Raises PolicyError for patterns that do not fit the run.
    """
    layout = Layout(
        names=run.parameters,
        layers=[parameter.layer for parameter in run.manifest.parameters],
        device=torch.device("cpu"),
    )
    left_out = {stage.name: UNREPLAYABLE[type(stage)] for stage in spec.stages if type(stage) in UNREPLAYABLE}
    able = {
        section: tuple(stage for stage in getattr(spec, section) if stage.name not in left_out)
        for section in ("pipeline", "shadow")
    }
    kept = spec.model_copy(update={**able, "actions": ()})
    born = dict.fromkeys(kept.names, int(run.steps[0]))
    pipeline, shadow = build_pipeline(kept, layout, born), build_shadow(kept, layout, born)
    asks = any(isinstance(stage, SkipSpec) and "loss" in stage.on for stage in kept.stages)
    with _quietly():
        columns, skips = _drive(run, pipeline, shadow, _losses(run) if asks else None, progress)
    return _ran(run, kept, label, columns, skips, left_out)


@contextmanager
def _quietly() -> Iterator[None]:
    """Give torch one thread and no autograd: these are very many very small calls."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(threads)


def _losses(run: Run) -> Tensor:
    return torch.from_numpy(run.loss)  # float64, as a live policy is given it


def _drive(
    run: Run, pipeline: Pipeline | None, shadow: Shadow | None, losses: Tensor | None, progress: Progress | None
) -> tuple[list[_Columns], npt.NDArray[np.bool_]]:
    """Run the stages over every step; return the columns of each, and the steps that the pipeline skips."""
    states = pipeline.init() if pipeline else {}
    watching = shadow.init() if shadow else {}
    gathered: list[list[_Columns]] = []
    skips: list[Tensor] = []
    never = torch.zeros((), dtype=torch.bool)
    for start in range(0, len(run), CHUNK):
        norms = torch.from_numpy(run.rows["parameters"][start : start + CHUNK, 0].astype(np.float32)).unbind()
        loss = [None] * len(norms) if losses is None else losses[start : start + CHUNK].unbind()
        chunk: list[tuple[Decision, ...]] = []
        skipped = []
        for step, each, its in zip(run.steps[start : start + CHUNK].tolist(), norms, loss, strict=True):
            observation = Observation(norms=each, total=total_norm(each), loss=its)
            decisions: tuple[Decision, ...] = ()
            skip = None
            if pipeline is not None:
                outcome, states = pipeline.decide(states, observation, step)
                decisions, skip = outcome.decisions, outcome.skip
            if shadow is not None:
                more, watching = shadow.decide(watching, observation, step)
                decisions += more
            chunk.append(decisions)
            skipped.append(never if skip is None else skip)
        gathered.append([_column(stage) for stage in zip(*chunk, strict=True)])
        skips.append(torch.stack(skipped))
        if progress is not None:
            progress(len(norms))
    joined = [
        _Columns(*(torch.cat([getattr(each, field) for each in stage]) for field in _Columns.__slots__))
        for stage in zip(*gathered, strict=True)
    ]
    return joined, torch.cat(skips).numpy()


def _column(decisions: Sequence[Decision]) -> _Columns:
    """Put one stage's decisions together; a stage without a strength of its own is told by its skips and zeros."""
    first = decisions[0]
    if isinstance(first.threshold, Tensor):
        thresholds = torch.stack([torch.as_tensor(each.threshold, dtype=torch.float32) for each in decisions])
    else:
        thresholds = torch.tensor([float(each.threshold) for each in decisions], dtype=torch.float32)
    never = torch.zeros((), dtype=torch.bool)
    skips = torch.stack([never if each.skip is None else each.skip for each in decisions])
    if first.strength is not None:
        strengths = torch.stack([each.strength for each in decisions if each.strength is not None]).float()
    else:
        zeroed = [never if each.zero is None else each.zero.any() for each in decisions]
        strengths = 1.0 - (skips | torch.stack(zeroed)).float()
    return _Columns(thresholds, strengths, skips)


def _ran(
    run: Run,
    spec: PolicySpec,
    label: str,
    columns: Sequence[_Columns],
    skips: npt.NDArray[np.bool_],
    left_out: dict[str, str],
) -> Ran:
    """Read the columns as a recorded row would say it: where one stage skips, nothing is left to the others."""
    unasked = (run.rows["flags"] & np.uint32(Flag.SCALER)) != 0
    stopped = run.skipped & ~unasked & ~recorded(run).skipped_by_policy
    stages: list[dict[str, Any]] = []
    for place, (stage, column) in enumerate(zip(spec.stages, columns, strict=True)):
        acts = place < len(spec.pipeline)
        strength, threshold = column.strengths.numpy().copy(), column.thresholds.numpy().copy()
        nothing_left = ((skips | stopped) if acts else column.skips.numpy()) & (strength > 0)
        strength[nothing_left | unasked] = 1.0
        threshold[unasked] = np.nan
        stages.append(
            {
                "name": stage.name,
                "kind": stage.kind,
                "acts": acts,
                "scope": scope_of(stage, spec.groups),
                "threshold": threshold,
                "coefficient": strength,
            }
        )
    return Ran.of(run, label, spec.to_dict(), stages, skipped=skips & ~unasked, left_out=left_out)
