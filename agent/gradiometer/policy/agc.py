"""Adaptive gradient clipping: bound the gradient of each row of weights by a share of the row's own norm."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gradiometer.norms import LARGE, tensor_norm
from gradiometer.policy.base import Change, Decision, Layout, Observation, Piece, State, Weighed
from gradiometer.policy.value import ROUNDING
from gradiometer.transfer import bring

__all__ = ["Agc", "RowScale", "cut_within_units", "unit_coefficients", "unit_norms"]

LEAST_NORM = 1e-6
"""Gradient norms below this count as this in the division, in the published code and so here."""


def unit_norms(tensor: Tensor) -> Tensor:
    """Return the L2 norm of each unit: of each row [R], or of the whole [1] where there is one dimension or none.

    Accumulated in float32, or float64 for float64, whatever the dtype.
    """
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    dtype = torch.promote_types(values.dtype, torch.float32)
    if tensor.dim() <= 1:
        return tensor_norm(tensor, dtype).reshape(1)
    rows: Tensor = torch.linalg.vector_norm(values, dim=tuple(range(1, values.dim())), dtype=dtype)
    return rows


def unit_coefficients(
    weight_norms: Tensor, gradient_norms: Tensor, clip_factor: float = 0.01, eps: float = 1e-3
) -> Tensor:
    """Return the factor of each unit [U], from the norms [U] of its weights and of its gradient.

    1 where ‖g‖ < M, else M / max(‖g‖, 1e-6), with M = ``clip_factor`` · max(‖w‖, ``eps``). A unit that holds NaN in
    its gradient or its weights has NaN, as in the published code: Brock, De, Smith and Simonyan, "High-Performance
    Large-Scale Image Recognition Without Normalization", ICML 2021; timm's ``adaptive_clip_grad``.
    """
    bound = clip_factor * weight_norms.clamp(min=eps)
    return torch.where(gradient_norms < bound, 1.0, bound / gradient_norms.clamp(min=LEAST_NORM))


@dataclass(frozen=True, kw_only=True)
class RowScale:
    """Scale each row of the ``chosen`` gradients so that its norm is at most a share of its weights' norm."""

    clip_factor: float
    eps: float
    chosen: Sequence[bool]
    cut: Sequence[int] = ()

    def weigh(self, pieces: Sequence[Piece], device: torch.device, scale: Tensor | None = None) -> Weighed:
        """Work out every unit's factor, all units of a device and a dtype in one go."""
        gradients, factors = [], []
        for group in _alike(pieces):
            norms = _norms(group)
            at = norms.device
            seen = norms[1] if scale is None else norms[1] / bring(scale, at)
            every = unit_coefficients(norms[0], seen, self.clip_factor, self.eps)
            factors.append(every)
            gradients += list(
                zip((p.gradient for p in group), torch.split(every, [_units(p) for p in group]), strict=True)
            )
        smallest = [_smallest(each, device) for each in factors if each.numel()]
        strength = torch.stack(smallest).min() if smallest else torch.ones((), device=device)
        changed = [bring((each != 1.0).any(), device) for each in factors]  # NaN differs too: it spreads over its row
        active = torch.stack(changed).any() if changed else torch.zeros((), dtype=torch.bool, device=device)
        return Weighed(strength=strength, active=active, make=partial(_multiply_rows, gradients))


@dataclass(frozen=True, kw_only=True)
class Agc:
    """Bound each row's gradient norm by ``clip_factor`` times its weights' norm: NFNets' and timm's AGC.

    A row is what one output unit of a layer has; a parameter of one dimension or none is one unit. It needs gradients
    and weights, not only norms, so it is the last stage and its effect is measured after it. Stateless.
    """

    name: str
    change: Change
    clip_factor: float

    def init(self) -> State:
        return {}

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        """Ask for the scaling; the threshold is in norms of a row's weights."""
        del observation, step
        return Decision(change=self.change, threshold=self.clip_factor), state


def cut_within_units(layout: Layout, chosen: Sequence[bool]) -> tuple[int, ...]:
    """Return the places of the chosen parameters whose only unit, the whole, is spread over ranks.

    Raises ValueError for a parameter that is cut through its rows, naming it.
    """
    cut = []
    for place, placement in enumerate(layout.placements):
        if not chosen[place]:
            continue
        sharded = re.findall(r"shard\((-?\d+)\)", placement)
        if "flat" in placement or any(dim != "0" for dim in sharded):
            raise ValueError(
                f"parameter {layout.names[place]!r} lies on the ranks as {placement!r}, so that no rank has a row of "
                "it whole: shard it along dimension 0 (FSDP2's fully_shard does), exclude it, or use adagc or "
                "group_norm, which need norms only"
            )
        if sharded and layout.dims[place] <= 1:
            cut.append(place)
    return tuple(cut)


def _alike(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Group the pieces by device and by the dtype that their norms have."""
    groups: defaultdict[tuple[torch.device, bool], list[Piece]] = defaultdict(list)
    for piece in pieces:
        wide = torch.float64 in (piece.gradient.dtype.to_real(), piece.weight.dtype.to_real())
        groups[piece.gradient.device, wide].append(piece)
    return list(groups.values())


def _norms(pieces: Sequence[Piece]) -> Tensor:
    """Return the norms of the weights and of the gradients of every unit, [2, U]."""
    whole = [place for place, piece in enumerate(pieces) if _fits_foreach(piece)]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    if whole:
        weights = _foreach_norms([pieces[place].weight for place in whole])
        gradients = _foreach_norms([pieces[place].gradient for place in whole])
        found = dict(zip(whole, zip(weights, gradients, strict=True), strict=True))
    for place, piece in enumerate(pieces):
        if piece.norms is not None:
            found[place] = (piece.norms[:1], piece.norms[1:])
        elif place not in found:
            found[place] = (unit_norms(piece.weight), unit_norms(piece.gradient))
    at = pieces[0].gradient.device
    return torch.stack([torch.cat([bring(found[place][side], at) for place in range(len(pieces))]) for side in (0, 1)])


def _fits_foreach(piece: Piece) -> bool:
    small = piece.gradient.numel() <= LARGE or piece.gradient.device.type != "cpu"
    return piece.norms is None and piece.gradient.dim() <= 1 and small and not piece.gradient.is_complex()


def _foreach_norms(tensors: list[Tensor]) -> list[Tensor]:
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    same = all(tensor.dtype == tensors[0].dtype and tensor.device == tensors[0].device for tensor in tensors)
    if not same:
        return [unit_norms(tensor) for tensor in tensors]
    return [norm.reshape(1) for norm in torch._foreach_norm(tensors, 2, dtype=dtype)]


def _units(piece: Piece) -> int:
    return piece.gradient.shape[0] if piece.gradient.dim() > 1 else 1


def _smallest(factors: Tensor, device: torch.device) -> Tensor:
    """Return the smallest factor that is a number, float32; what is below 1 stays so."""
    numbers = torch.where(factors.isnan(), 1.0, factors)
    smallest = numbers.min()
    return bring(torch.where(smallest < 1.0, smallest.clamp(max=1 - ROUNDING), 1.0).float(), device)


def _multiply_rows(gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
    by_device: defaultdict[torch.device, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for gradient, factors in gradients:
        if gradient.numel():
            shape = (-1, *[1] * (gradient.dim() - 1)) if gradient.dim() > 1 else ()
            by_device[gradient.device].append((gradient, factors.reshape(shape)))
    for alike in by_device.values():
        torch._foreach_mul_([gradient for gradient, _ in alike], [factors for _, factors in alike])
