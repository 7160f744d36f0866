"""Bind a policy to a model's parameters: from what a user wrote to tensors on the gradients' device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gradiometer.policy import kinds
from gradiometer.policy.adagc import AdaGC
from gradiometer.policy.agc import Agc, RowScale, cut_within_units
from gradiometer.policy.base import Layout, Policy, State
from gradiometer.policy.coverage import group_of
from gradiometer.policy.ema_ratio import EmaRatio
from gradiometer.policy.global_norm import GlobalNorm
from gradiometer.policy.group_norm import GroupNorm
from gradiometer.policy.kinds import AnySpec, GroupsSpec, Scope, SelectingSpec
from gradiometer.policy.learning import state_dtype
from gradiometer.policy.nonfinite import NonFinite
from gradiometer.policy.percentile import Percentile
from gradiometer.policy.pipeline import Pipeline, Shadow
from gradiometer.policy.select import select
from gradiometer.policy.skip import Skip
from gradiometer.policy.spec import PolicyError, PolicySpec
from gradiometer.policy.units import Units
from gradiometer.policy.value import Clamp, Value
from gradiometer.policy.window import MAX_VALUES, Window
from gradiometer.policy.zclip import ZClip

__all__ = ["Binding", "bind", "build_pipeline", "build_shadow"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """A whole policy bound to a model: what acts of it, and what only watches."""

    spec: PolicySpec | None
    pipeline: Pipeline | None
    shadow: Shadow | None

    def init(self) -> dict[str, State]:
        """Return the first states of all stages, by name."""
        return {name: state for part in (self.pipeline, self.shadow) if part for name, state in part.init().items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of what acts, then of what watches."""
        return () if self.spec is None else self.spec.names

    def units(self, name: str) -> tuple[str, ...]:
        """Return what the stage of that name remembers something of each for; empty where its memory is of the whole.

        Two memories of equal shape are of the same things only if these are equal.
        """
        stages = [stage for part in (self.pipeline, self.shadow) if part for stage in part.stages]
        units = next((getattr(stage, "units", None) for stage in stages if stage.name == name), None)
        return units.names if units is not None and units.shape else ()

    @property
    def born(self) -> dict[str, int]:
        """Step at which each stage came into force."""
        return {name: part.born[name] for part in (self.pipeline, self.shadow) if part for name in part.names}


def bind(spec: PolicySpec | None, layout: Layout, born: Mapping[str, int] | None = None) -> Binding:
    """Bind a policy; None binds to nothing. Raises as :func:`build_pipeline`."""
    if spec is None:
        return Binding(spec=None, pipeline=None, shadow=None)
    return Binding(spec=spec, pipeline=build_pipeline(spec, layout, born), shadow=build_shadow(spec, layout, born))


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
    grouped = replace(layout, groups=group_of(layout.names, groups), by=by)
    return [_build(stage, groups, grouped) for stage in stages]


def _build(spec: AnySpec, groups: GroupsSpec, layout: Layout) -> Policy:
    if isinstance(spec, kinds.NonFiniteSpec):
        return NonFinite(name=spec.name, layout=layout, zero=spec.action == "zero")
    chosen = _chosen(spec, groups, layout)
    try:
        return _BUILDERS[type(spec)](spec, layout, chosen)
    except PolicyError:
        raise
    except ValueError as error:
        raise PolicyError(f"policy {spec.name}: {error}") from error


def _chosen(spec: SelectingSpec, groups: GroupsSpec, layout: Layout) -> tuple[bool, ...]:
    try:
        return select(layout.names, spec.match, (*spec.exclude, *groups.exclude))
    except ValueError as error:
        raise PolicyError(f"policy {spec.name}: {error}") from error


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


def _percentile(spec: kinds.PercentileSpec, layout: Layout, chosen: tuple[bool, ...]) -> Policy:
    units = Units(layout, spec.scope, chosen)
    return Percentile(
        name=spec.name,
        units=units,
        window=_window(spec, units.shape, layout),
        p=spec.p,
        min_history=spec.min_history,
        safe=spec.compat == "safe",
    )


def _zclip(spec: kinds.ZClipSpec, layout: Layout, chosen: tuple[bool, ...]) -> Policy:
    settings = spec.model_dump(exclude={"kind", "match", "exclude", "compat", "scope"})
    return ZClip(units=Units(layout, spec.scope, chosen), safe=spec.compat == "safe", **settings)


def _adagc(spec: kinds.AdaGCSpec, layout: Layout, chosen: tuple[bool, ...]) -> Policy:
    settings = spec.model_dump(exclude={"kind", "match", "exclude", "compat", "scope"})
    return AdaGC(units=Units(layout, spec.scope, chosen), safe=spec.compat == "safe", **settings)


def _ema_ratio(spec: kinds.EmaRatioSpec, layout: Layout, chosen: tuple[bool, ...]) -> Policy:
    settings = spec.model_dump(exclude={"kind", "match", "exclude", "compat", "scope"})
    return EmaRatio(units=Units(layout, spec.scope, chosen), safe=spec.compat == "safe", **settings)


def _skip(spec: kinds.SkipSpec, layout: Layout, chosen: tuple[bool, ...]) -> Policy:
    factors = {"sigma": spec.sigma, "abs": spec.threshold, "median_mad": spec.k}
    factor = factors[spec.rule]
    assert factor is not None  # the spec sees to it
    return Skip(
        name=spec.name,
        units=Units(layout, "model", chosen),
        on=spec.on,
        window=None if spec.rule == "abs" else _window(spec, torch.Size([len(spec.on)]), layout),
        rule=spec.rule,
        factor=factor,
        floor=spec.floor,
        min_history=spec.min_history,
        accept_after=spec.max_consecutive if spec.then == "accept" else None,
        safe=spec.compat == "safe",
    )


def _window(spec: kinds.PercentileSpec | kinds.SkipSpec, shape: torch.Size, layout: Layout) -> Window:
    values = spec.window * shape.numel()
    if values > MAX_VALUES:
        raise PolicyError(
            f"policy {spec.name}: window is {spec.window} for each of {shape.numel()} units, {values} values, expected "
            f"at most {MAX_VALUES} together: give it a smaller window or a wider scope"
        )
    return Window(spec.window, shape, state_dtype(layout.device), layout.device)


_BUILDERS: dict[type, Callable[[Any, Layout, tuple[bool, ...]], Policy]] = {
    kinds.GlobalNormSpec: _global_norm,
    kinds.GroupNormSpec: _group_norm,
    kinds.ValueSpec: _value,
    kinds.PercentileSpec: _percentile,
    kinds.ZClipSpec: _zclip,
    kinds.AdaGCSpec: _adagc,
    kinds.EmaRatioSpec: _ema_ratio,
    kinds.SkipSpec: _skip,
    kinds.AgcSpec: _agc,
}
