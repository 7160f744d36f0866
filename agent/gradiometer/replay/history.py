"""What policies did, or would have done, in the steps of a recorded run: NumPy alone, no torch.

The same figures for the run as it went (:func:`recorded`) and for a replay, so that they can stand side by side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gradiometer.policy.audit import scope_of
from gradiometer.policy.spec import PolicyError, load_policy
from gradiometer.records import OWN_CLIPPING, Flag
from gradiometer.run import Run

__all__ = ["SPIKE", "SPIKE_WINDOW", "Ran", "StageRan", "notes", "recorded", "rolling_median", "spikes", "summarize_ran"]

SPIKE, SPIKE_WINDOW = 3.0, 100
"""A spike is a norm of at least this many times the median of up to so many finite norms before it."""
LEAST = 10
"""Norms that there must be before a step can be called a spike."""
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageRan:
    """One stage over T steps."""

    name: str
    kind: str
    acts: bool
    """False for a policy in shadow."""
    scope: str = "model"
    """What has a threshold of its own; where there are several, :attr:`threshold` is that of what was cut the most."""
    threshold: npt.NDArray[np.float32]
    """Threshold in force, [T]; NaN in steps in which it was not asked."""
    coefficient: npt.NDArray[np.float32]
    """Smallest factor it applied, [T]; 1 where it changed nothing, 0 where it skipped the step."""

    @property
    def clipped(self) -> Bools:
        """Steps in which it changed the gradients, [T]."""
        return self.coefficient < 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """A policy over the T steps of a run: the one that was live, or one that was replayed."""

    label: str
    policy: dict[str, Any] | None
    stages: tuple[StageRan, ...]
    skipped: Bools
    skipped_by_policy: Bools
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Stages that could not be replayed, and why."""

    @classmethod
    def of(
        cls,
        run: Run,
        label: str,
        policy: dict[str, Any] | None,
        stages: Sequence[Mapping[str, Any]],
        *,
        skipped: Bools,
        left_out: Mapping[str, str],
    ) -> Ran:
        """Make a replay of ``run`` from the columns of its stages; ``skipped`` are the steps its pipeline skips."""
        assert len(skipped) == len(run)
        made = tuple(StageRan(**stage) for stage in stages)
        return cls(
            label=label,
            policy=policy,
            stages=made,
            skipped=skipped,
            skipped_by_policy=skipped,
            left_out=left_out,
        )

    @property
    def clipped(self) -> Bools:
        """Steps in which some acting stage changed the gradients or skipped, [T]."""
        clipped: Bools = self.skipped_by_policy.copy()
        for stage in self.stages:
            if stage.acts:
                clipped |= stage.clipped
        return clipped


def recorded(run: Run) -> Ran:
    """Return what the run itself did, by its recorded rows: its policies, and the loop's own clipping."""
    kinds: dict[str, str] = {}
    scopes: dict[str, str] = {}
    for revision in run.history.revisions:
        with contextlib.suppress(PolicyError):  # of a version that had other settings
            if revision.policy is not None:
                spec = load_policy(revision.policy)
                kinds |= {stage.name: stage.kind for stage in spec.stages}
                scopes |= {stage.name: scope_of(stage, spec.groups) for stage in spec.stages}
    stages = [
        StageRan(
            name=name,
            kind=kinds.get(name, name),
            acts=not shadow,
            scope=scopes.get(name, "model"),
            threshold=threshold,
            coefficient=_or_one(coefficient),
        )
        for name, shadow, threshold, coefficient in zip(
            run.policies, run.shadow, run.thresholds.T, run.coefficients.T, strict=True
        )
    ]
    by_policy = np.zeros(len(run), np.bool_)
    for acting in (stage for stage in stages if stage.acts):
        by_policy |= acting.coefficient == 0
    for name in run.own_clipping:
        threshold, coefficient = (
            run.rows[f"policy_{column}"][:, OWN_CLIPPING[name]] for column in ("threshold", "coefficient")
        )
        stages.append(StageRan(name=name, kind=name, acts=True, threshold=threshold, coefficient=_or_one(coefficient)))
    return Ran(
        label="the run itself",
        policy=run.history.newest.policy,
        stages=tuple(stages),
        skipped=run.skipped,
        skipped_by_policy=run.skipped & by_policy,
    )


def _or_one(factors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.where(np.isnan(factors), np.float32(1), factors)


def rolling_median(norms: Floats, window: int = SPIKE_WINDOW) -> Floats:
    """Return the median of up to ``window`` finite norms before each step, [T]; NaN before there are ten."""
    median = np.full(len(norms), np.nan)
    finite = np.flatnonzero(np.isfinite(norms))
    values = norms[finite]
    medians = np.full(len(values) + 1, np.nan)  # of the values before each, and after the last
    for count in range(LEAST, min(window, len(values)) + 1):
        medians[count] = np.median(values[:count])
    if len(values) >= window:
        views = np.lib.stride_tricks.sliding_window_view(values, window)
        for start in range(0, len(views), 8192):
            part = np.partition(views[start : start + 8192], (window - 1) // 2, axis=1)
            low = part[:, (window - 1) // 2]
            high = low if window % 2 else part[:, window // 2 :].min(axis=1)
            medians[window + start : window + start + len(part)] = (low + high) / 2
    seen = np.searchsorted(finite, np.arange(len(norms)))  # finite norms before each step
    median[:] = medians[seen]
    return median


def spikes(norms: Floats) -> Bools:
    """Return the steps whose norm is finite and a spike, [T]."""
    with np.errstate(invalid="ignore"):
        return np.isfinite(norms) & (norms >= SPIKE * rolling_median(norms))


def summarize_ran(ran: Ran, run: Run, spiking: Bools, settle: int = 0) -> dict[str, Any]:
    """Return the figures of a policy over a run as JSON values, the first ``settle`` steps left out."""
    kept = slice(settle, None)
    steps = len(run) - settle
    return {
        "label": ran.label,
        "policy": ran.policy,
        "clip_rate": _share(int(ran.clipped[kept].sum()), steps),
        "steps_clipped": int(ran.clipped[kept].sum()),
        "steps_skipped": int(ran.skipped[kept].sum()),
        "spikes_caught": int((spiking & ran.clipped)[kept].sum()),
        "stages": [_stage(stage, spiking, kept, steps) for stage in ran.stages],
        "not_replayed": dict(ran.left_out),
    }


def _stage(stage: StageRan, spiking: Bools, kept: slice, steps: int) -> dict[str, Any]:
    clipped, threshold = stage.clipped[kept], stage.threshold[kept].astype(np.float64)
    finite = threshold[np.isfinite(threshold)]
    return {
        "name": stage.name,
        "kind": stage.kind,
        "mode": "act" if stage.acts else "shadow",
        "clip_rate": _share(int(clipped.sum()), steps),
        "steps_clipped": int(clipped.sum()),
        "steps_skipped": int((stage.coefficient[kept] == 0).sum()),
        "threshold": None
        if not len(finite)
        else {"min": float(finite.min()), "median": float(np.median(finite)), "last": float(finite[-1])},
        "smallest_coefficient": float(stage.coefficient[kept].min()) if steps else None,
        "spikes_caught": int((spiking[kept] & clipped).sum()),
    }


def _share(count: int, steps: int) -> float | None:
    return count / steps if steps else None


def notes(run: Run, rans: Sequence[Ran]) -> list[str]:
    """Say what must be known to read a replay of the run."""
    said = [
        "open-loop: the norms are those of the run as it went; a policy that had acted would have changed later ones"
    ]
    if len(run) and run.steps[0]:
        said.append(
            f"the first step is {run.steps[0]}: statistics begin there as if the policy were new (--settle N leaves "
            "the first N steps out of the figures)"
        )
    changed = run.steps[1:][np.diff(run.rows["policy_revision"]) != 0].tolist()
    if changed:
        shown = ", ".join(map(str, changed[:3])) + (", …" if len(changed) > 3 else "")
        said.append(
            f"the run's policy was changed at step {shown}: what it did is by several policies, and each replay is of "
            "one over all steps"
        )
    gaps = np.diff(run.steps)
    missing = int((gaps - 1)[gaps > 1].sum()) if len(run) else 0
    if missing:
        said.append(f"{missing} steps between the first and the last are not in the ring: replayed as if not taken")
    if (gaps < 1).any():
        said.append("the steps do not rise throughout: the run went back to a checkpoint")
    if len(set(run.optimizer.tolist())) > 1:
        said.append("several optimizers step by turns: each of their steps is one here, as it was for the live policy")
    scaler = int(((run.rows["flags"] & np.uint32(Flag.SCALER)) != 0).sum())
    if scaler:
        said.append(f"a GradScaler skipped {scaler} steps itself: policies take note of them and are not asked")
    if run.own_clipping:
        said.append(f"the loop clips by itself ({', '.join(run.own_clipping)}): replayed over the norms before that")
    if any("loss" in (stage.get("on") or ()) for ran in rans for stage in _settings(ran)):
        known = int((~np.isnan(run.loss)).sum())
        said.append(
            f"a policy looks at the loss, which {known} of {len(run)} steps have; one that was logged after its step "
            "is used too, though a live policy had not seen it"
        )
        if run.manifest.world_size > 1:
            said.append("the loss is this rank's own, where a live policy was given the mean over the ranks")
    return said


def _settings(ran: Ran) -> list[Mapping[str, Any]]:
    policy = ran.policy or {}
    entries = [*policy.get("pipeline", ()), *policy.get("shadow", ())]
    return [settings for entry in entries if isinstance(entry, Mapping) for settings in entry.values() if settings]
