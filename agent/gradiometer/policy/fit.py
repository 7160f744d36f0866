"""Whether a policy fits a model of which only the names of the parameters are known. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from gradiometer.policy.kinds import SelectingSpec
from gradiometer.policy.select import select
from gradiometer.policy.spec import PolicySpec

__all__ = ["misfits"]


def misfits(spec: PolicySpec, names: Sequence[str]) -> list[str]:
    """Return a line for each stage whose patterns cover no parameter, or leave it none."""
    found = []
    for stage in spec.stages:
        if isinstance(stage, SelectingSpec):
            try:
                select(names, stage.match, (*stage.exclude, *spec.groups.exclude))
            except ValueError as error:
                found.append(f"policy {stage.name}: {error}")
    return found
