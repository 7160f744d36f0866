"""Clip the norm of each layer's, or each parameter's, gradients by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gradiometer.policy.base import Decision, Layout, Observation, State
from gradiometer.policy.global_norm import clip_coefficient

__all__ = ["GroupNorm"]


@dataclass(frozen=True, kw_only=True)
class GroupNorm:
    """Scale each group's gradients so that their L2 norm is at most ``max_norm``.

    The same as ``torch.nn.utils.clip_grad_norm_`` called once for the parameters of every group. Stateless.
    """

    name: str
    layout: Layout
    max_norm: float
    scope: Literal["layer", "parameter"]
    chosen: Sequence[bool]
    _mask: Tensor = field(init=False)
    _group: Tensor | None = field(init=False, default=None)
    _members: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        device = self.layout.device
        object.__setattr__(self, "_mask", torch.tensor(self.chosen, device=device))
        if self.scope == "layer":
            group, members = _groups(self.layout.layers)
            object.__setattr__(self, "_group", torch.tensor(group, device=device))
            object.__setattr__(self, "_members", torch.tensor(members, device=device))

    def init(self) -> State:
        return {}

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        """Decide a coefficient a parameter, [P]; parameters of one group share theirs."""
        del step
        norms = torch.where(self._mask, observation.norms, 0.0)
        coefficient = clip_coefficient(self._group_norms(norms), self.max_norm)
        coefficient = torch.where(self._mask, coefficient, 1.0)
        return Decision(coefficient=coefficient, strength=coefficient.min(), threshold=self.max_norm), state

    def _group_norms(self, norms: Tensor) -> Tensor:
        """Return for each parameter the norm of its group, [P].

        Gathered and reduced row by row, never scattered: atomic adds would make ranks decide differently.
        """
        if self._members is None or self._group is None:
            return norms
        members = torch.nn.functional.pad(norms, (0, 1))[self._members]
        groups: Tensor = torch.linalg.vector_norm(members, dim=1, dtype=torch.float64).to(norms.dtype)
        return groups[self._group]


def _groups(layers: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """Return each parameter's group and each group's parameters, padded with the index P to equal length."""
    place = {layer: index for index, layer in enumerate(dict.fromkeys(layers))}
    group = [place[layer] for layer in layers]
    members: list[list[int]] = [[] for _ in place]
    for parameter, index in enumerate(group):
        members[index].append(parameter)
    longest = max(map(len, members))
    return group, [row + [len(layers)] * (longest - len(row)) for row in members]
