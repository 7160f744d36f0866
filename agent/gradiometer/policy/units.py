"""What a policy bounds by itself: the whole model, each layer, each parameter, or each named group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gradiometer.norms import total_norm
from gradiometer.policy.base import Decision, Layout, Observation
from gradiometer.policy.kinds import Scope

__all__ = ["Units"]


class Units:
    """The units of one policy, U of them, made of the parameters it has chosen.

    Values of units are 0-dim for the model as a whole and [U] else, in the order of the first parameter of each. A
    parameter that is not chosen, or is in no named group where those are the units, belongs to none.
    """

    def __init__(self, layout: Layout, scope: Scope, chosen: Sequence[bool]) -> None:
        self.scope, device = scope, layout.device
        owners = _owners(layout, scope, chosen)
        self.names = tuple(dict.fromkeys(owner for owner in owners if owner is not None))
        """What each unit is called, U of them."""
        if not self.names:
            raise ValueError(f"no parameter it covers is in any {scope}, so there is nothing to bound")
        place = {name: index for index, name in enumerate(self.names)}
        self._covered = None if None not in owners else torch.tensor([o is not None for o in owners], device=device)
        self._whole = scope == "model"
        self._identity = not self._whole and owners == list(layout.names)
        if not self._whole and not self._identity:
            self._unit = torch.tensor([0 if owner is None else place[owner] for owner in owners], device=device)
            self._members = torch.tensor(_members(owners, place), device=device)
            self._nothing = torch.full((1,), -0.0, device=device)
            self._absent = torch.ones(1, dtype=torch.bool, device=device)
        self.shape = torch.Size(() if self._whole else (len(self.names),))
        self.device = device

    def fill(self, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor with ``value`` for every unit."""
        return torch.full(self.shape, value, dtype=dtype, device=self.device)

    def norms(self, observation: Observation) -> Tensor:
        """Return the L2 norm of each unit, of the observation's dtype; zero where it has no gradient.

        Gathered and reduced row by row, never scattered: atomic adds would make ranks decide differently.
        """
        if self._whole:
            if self._covered is None:
                return observation.total
            return total_norm(torch.where(self._covered, observation.norms, 0.0))
        if self._identity:
            return observation.norms
        members = torch.cat([observation.norms, self._nothing])[self._members]
        norms: Tensor = torch.linalg.vector_norm(members, dim=1, dtype=torch.float64).to(observation.norms.dtype)
        return norms

    def present(self, observation: Observation) -> Tensor | None:
        """Return, bool [U], which units have a gradient; None for the model as a whole, which is taken to have one."""
        if self._whole:
            return None
        absent = torch.signbit(observation.norms) & (observation.norms == 0)
        if self._identity:
            return ~absent
        return ~torch.cat([absent, self._absent])[self._members].all(dim=1)

    def spread(self, values: Tensor) -> Tensor:
        """Return the units' factors as the parameters': 0-dim where it is one for all, else [P], 1 outside of units."""
        if self._whole:
            return values if self._covered is None else torch.where(self._covered, values, 1.0)
        if self._identity:
            return values
        spread = values[self._unit]
        return spread if self._covered is None else torch.where(self._covered, spread, 1.0)

    def scale(self, coefficient: Tensor, threshold: float | Tensor, observation: Observation) -> Decision:
        """Decide to scale each unit by its ``coefficient``, which its ``threshold`` has brought about."""
        strength = coefficient = coefficient.to(observation.norms.dtype)
        if not self._whole:
            strength, strongest = coefficient.min(dim=0)
            if isinstance(threshold, Tensor) and threshold.dim():
                threshold = threshold.gather(0, strongest.unsqueeze(0)).squeeze(0)
        return Decision(coefficient=self.spread(coefficient), strength=strength, threshold=threshold)

    def scale_together(self, coefficient: Tensor, threshold: float, observation: Observation) -> Decision:
        """Decide to scale all units by one ``coefficient``, 0-dim, which one ``threshold`` has brought about."""
        strength = coefficient = coefficient.to(observation.norms.dtype)
        if self._covered is not None:
            coefficient = torch.where(self._covered, coefficient, 1.0)
        return Decision(coefficient=coefficient, strength=strength, threshold=threshold)


def _owners(layout: Layout, scope: Scope, chosen: Sequence[bool]) -> list[str | None]:
    """Return the unit of each parameter, None where it has none."""
    of_scope: dict[str, Sequence[str | None]] = {
        "model": ["model"] * len(layout.names),
        "layer": layout.layers,
        "parameter": layout.names,
        "group": layout.groups,
    }
    return [owner if mine else None for owner, mine in zip(of_scope[scope], chosen, strict=True)]


def _members(owners: Sequence[str | None], place: dict[str, int]) -> list[list[int]]:
    """Return the parameters of each unit, padded to equal length with the index P."""
    members: list[list[int]] = [[] for _ in place]
    for parameter, owner in enumerate(owners):
        if owner is not None:
            members[place[owner]].append(parameter)
    longest = max(map(len, members))
    return [row + [len(owners)] * (longest - len(row)) for row in members]
