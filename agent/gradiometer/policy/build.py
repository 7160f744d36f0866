"""Bind a policy to a model's parameters: from what a user wrote to tensors on the gradients' device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gradiometer.policy import kinds
from gradiometer.policy.agc import Agc, RowScale, cut_within_units
from gradiometer.policy.base import Layout, Policy
from gradiometer.policy.global_norm import GlobalNorm
from gradiometer.policy.group_norm import GroupNorm
from gradiometer.policy.kinds import AnySpec, GroupsSpec, Scope, SelectingSpec
from gradiometer.policy.nonfinite import NonFinite
from gradiometer.policy.pipeline import Pipeline, Shadow
from gradiometer.policy.select import compile_pattern, select
from gradiometer.policy.spec import PolicyError, PolicySpec
from gradiometer.policy.units import Units
from gradiometer.policy.value import Clamp, Value

__all__ = ["build_pipeline", "build_shadow"]


def build_pipeline(spec: PolicySpec, layout: Layout, born: Mapping[str, int] | None = None) -> Pipeline | None:
    """Bind what acts of a policy; None if nothing does.

    ``born`` gives the steps at which stages came into force, by name, where that is not 0. Raises PolicyError for a
    pattern that covers no parameter, where a stage is left with none, and for a parameter that lies on the ranks in a
    way that a stage cannot work with.
    """
    return Pipeline(_build_all(spec.pipeline, spec.groups, layout), born) if spec.pipeline else None


def build_shadow(spec: PolicySpec, layout: Layout, born: Mapping[str, int] | None = None) -> Shadow | None:
    """Bind what only watches of a policy; None if nothing does. Raises as :func:`build_pipeline`."""
    return Shadow(_build_all(spec.shadow, spec.groups, layout), born) if spec.shadow else None


def _build_all(stages: Sequence[AnySpec], groups: GroupsSpec, layout: Layout) -> list[Policy]:
    by: Scope = "group" if isinstance(groups.by, dict) else groups.by
    grouped = replace(layout, groups=_group_of(layout.names, groups), by=by)
    return [_build(stage, groups, grouped) for stage in stages]


def _build(spec: AnySpec, groups: GroupsSpec, layout: Layout) -> Policy:
    if isinstance(spec, kinds.NonFiniteSpec):
        return NonFinite(name=spec.name, layout=layout, zero=spec.action == "zero")
    chosen = _chosen(spec, groups, layout)
    return _BUILDERS[type(spec)](spec, layout, chosen)


def _chosen(spec: SelectingSpec, groups: GroupsSpec, layout: Layout) -> tuple[bool, ...]:
    try:
        return select(layout.names, spec.match, (*spec.exclude, *groups.exclude))
    except ValueError as error:
        raise PolicyError(f"policy {spec.name}: {error}") from error


def _group_of(names: Sequence[str], groups: GroupsSpec) -> list[str | None]:
    """Return the first of the named groups that covers each parameter."""
    named = groups.by.items() if isinstance(groups.by, dict) else ()
    compiled = [(name, [compile_pattern(pattern) for pattern in patterns]) for name, patterns in named]
    return [
        next((group for group, patterns in compiled if any(p.search(name) for p in patterns)), None) for name in names
    ]


def _global_norm(spec: kinds.GlobalNormSpec, layout: Layout, chosen: tuple[bool, ...]) -> Policy:
    return GlobalNorm(name=spec.name, units=Units(layout, "model", chosen), max_norm=spec.max_norm)


def _group_norm(spec: kinds.GroupNormSpec, layout: Layout, chosen: tuple[bool, ...]) -> Policy:
    return GroupNorm(name=spec.name, units=Units(layout, spec.scope or layout.by, chosen), max_norm=spec.max_norm)


def _value(spec: kinds.ValueSpec, layout: Layout, chosen: tuple[bool, ...]) -> Policy:
    del layout
    return Value(name=spec.name, change=Clamp(max_abs=spec.max_abs, chosen=chosen), max_abs=spec.max_abs)


def _agc(spec: kinds.AgcSpec, layout: Layout, chosen: tuple[bool, ...]) -> Policy:
    try:
        cut = cut_within_units(layout, chosen)
    except ValueError as error:
        raise PolicyError(f"policy {spec.name}: {error}") from error
    change = RowScale(clip_factor=spec.clip_factor, eps=spec.eps, chosen=chosen, cut=cut)
    return Agc(name=spec.name, change=change, clip_factor=spec.clip_factor)


_BUILDERS: dict[type, Callable[[Any, Layout, tuple[bool, ...]], Policy]] = {
    kinds.GlobalNormSpec: _global_norm,
    kinds.GroupNormSpec: _group_norm,
    kinds.ValueSpec: _value,
    kinds.AgcSpec: _agc,
}
