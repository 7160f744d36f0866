"""What a policy does, in words, and which parameters of a model each stage covers. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gradiometer.policy import kinds
from gradiometer.policy.coverage import group_of
from gradiometer.policy.kinds import AnySpec, GroupsSpec, SelectingSpec
from gradiometer.policy.problems import Path, Problem
from gradiometer.policy.select import compile_pattern
from gradiometer.policy.spec import PolicySpec

__all__ = ["Coverage", "cover", "describe", "scope_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """What of a model one stage covers."""

    parameters: tuple[bool, ...]
    """For each parameter of the model, whether it is covered."""
    units: int
    """How many units are bounded, each by itself."""


def scope_of(spec: AnySpec, groups: GroupsSpec) -> str:
    """Return what a stage bounds by itself: a scope of :data:`kinds.Scope`, or what else it looks at."""
    if isinstance(spec, kinds.ValueSpec):
        return "element"
    if isinstance(spec, kinds.AgcSpec):
        return "row"
    if isinstance(spec, kinds.GroupNormSpec) and spec.scope is None:
        return "group" if isinstance(groups.by, dict) else groups.by
    return str(getattr(spec, "scope", "model"))


def describe(spec: AnySpec) -> str:
    """Say in one line what a stage does."""
    said = _SAYINGS[spec.kind](spec)
    return f"{said}; to the letter of the reference" if getattr(spec, "compat", "safe") == "reference" else said


def cover(
    spec: PolicySpec, source: str, names: Sequence[str], layers: Sequence[str]
) -> tuple[list[Coverage], list[Problem]]:
    """Match the patterns of every stage with the parameters of a model.

    Returns what each stage covers, in the order of :attr:`PolicySpec.stages`, and the patterns that cover nothing.
    """
    problems = list(_idle(source, ("groups", "exclude"), spec.groups.exclude, names))
    groups = group_of(names, spec.groups)
    for group, patterns in spec.groups.by.items() if isinstance(spec.groups.by, dict) else ():
        problems += _idle(source, ("groups", "by", group), patterns, names)
    covered = []
    for place, stage in enumerate(spec.stages):
        section, index = ("pipeline", place) if place < len(spec.pipeline) else ("shadow", place - len(spec.pipeline))
        path: Path = (section, index, stage.kind)
        chosen = [True] * len(names)
        if isinstance(stage, SelectingSpec):
            problems += _idle(source, (*path, "match"), stage.match, names)
            problems += _idle(source, (*path, "exclude"), stage.exclude, names)
            chosen = [
                (not stage.match or _any(stage.match, name)) and not _any((*stage.exclude, *spec.groups.exclude), name)
                for name in names
            ]
        owners: dict[str, Sequence[str | None]] = {
            "model": ["model"] * len(names), "layer": layers, "group": groups, "parameter": names,
        }  # fmt: skip
        owner = owners.get(scope_of(stage, spec.groups), names)
        parameters = tuple(mine and whose is not None for mine, whose in zip(chosen, owner, strict=True))
        units = len({whose for mine, whose in zip(parameters, owner, strict=True) if mine})
        covered.append(Coverage(parameters=parameters, units=units))
        if not any(parameters):
            problems.append(Problem(source=source, path=path, expected="covers no parameter, expected at least one"))
    return covered, problems


def _any(patterns: Sequence[str], name: str) -> bool:
    return any(compile_pattern(pattern).search(name) for pattern in patterns)


def _idle(source: str, path: Path, patterns: Sequence[str], names: Sequence[str]) -> Iterator[Problem]:
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    for place, pattern in enumerate(patterns):
        if not any(compile_pattern(pattern).search(name) for name in names):
            said = f"a pattern that matches no parameter; the model has {shown}"
            yield Problem(source=source, path=(*path, place), value=repr(pattern), expected=said)


def _nonfinite(spec: kinds.NonFiniteSpec) -> str:
    done = {
        "skip": "skip a step with NaN or Inf",
        "zero": "zero the tensors with NaN or Inf",
        "raise": "skip a step with NaN or Inf, and stop the job",
    }[spec.action]
    return done + (f"; stop the job after {spec.max_consecutive} in a row" if spec.max_consecutive else "")


def _skip(spec: kinds.SkipSpec) -> str:
    beyond = {
        "sigma": f"{spec.sigma:g} deviations above its mean",
        "median_mad": f"{spec.k:g} robust deviations above its median",
        "abs": f"{spec.threshold or 0:g}",
    }[spec.rule]
    what = " or ".join(each.replace("_", " ") for each in spec.on)
    over = "" if spec.rule == "abs" else f", over {spec.window} steps, from the {spec.min_history}th on"
    then = "" if spec.max_consecutive is None else f"; after {spec.max_consecutive} in a row {spec.then}"
    return f"skip a step whose {what} is beyond {beyond}{over}{then}"


def _zclip(spec: kinds.ZClipSpec) -> str:
    most = "" if spec.max_grad_norm is None else f", and to {spec.max_grad_norm:g} at most"
    return f"clip norms more than {spec.z:g} deviations above their running mean{most}"


_SAYINGS: dict[str, Callable[..., str]] = {
    "nonfinite": _nonfinite,
    "skip": _skip,
    "global_norm": lambda spec: f"clip to a norm of {spec.max_norm:g}",
    "group_norm": lambda spec: f"clip each to a norm of {spec.max_norm:g}",
    "percentile": lambda spec: f"clip to the {spec.p:g}th percentile of the last {spec.window} norms",
    "zclip": _zclip,
    "adagc": lambda spec: (
        f"clip to {spec.ratio:g} running averages; in the first {spec.warmup_steps} steps to a norm "
        f"of {spec.warmup_max_norm:g}"
    ),
    "ema_ratio": lambda spec: f"clip to {spec.ratio:g} running averages",
    "agc": lambda spec: f"clip to {spec.clip_factor:g} of the weights' norm",
    "value": lambda spec: f"clamp to ±{spec.max_abs:g}",
}
