"""What one rank holds of a parameter: all of it, a shard of a DTensor, or a piece of an FSDP1 flat parameter.

Nothing here communicates. A *copy* of a parameter is spread over the ranks that hold its shards; what is replicated
has several copies, and a copy is called by the lowest rank that holds a shard of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Holding", "gradients_of", "holdings", "local_part", "settle"]

Watched = Sequence[nn.Parameter | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Holding:
    """One parameter as this rank holds it."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    placement: str
    ranks: tuple[int, ...]
    """Global ranks that hold the same mesh or process group; this one alone for a whole tensor."""
    copy: int
    """Lowest global rank of those that hold the copy this rank has a shard of."""
    leaf: Tensor | None = None
    """What autograd accumulates into instead of the parameter: the flat parameter of FSDP1."""

    @property
    def sharded(self) -> bool:
        return len(self.ranks) > 1


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank stores of a DTensor, sharing its memory; any other tensor as it is.

    ``DTensor.to_local()`` is the public way, and makes another tensor each time while gradients are recorded.
    """
    if type(tensor) is Tensor:  # at each step, for every gradient: a failing getattr takes a microsecond
        return tensor
    local: Tensor | None = getattr(tensor, "_local_tensor", None)
    return tensor if local is None else local


def gradients_of(parameters: Watched) -> list[Tensor | None]:
    """Return this rank's part of the gradients [P]; None where there is none, or no parameter.

    A gradient that lies otherwise than its parameter (sums that are still partial, under tensor parallelism) is
    redistributed, which is a collective: all ranks must ask alike.
    """
    gradients = [None if parameter is None else parameter.grad for parameter in parameters]
    return [
        gradient if gradient is None or type(gradient) is Tensor else _measurable(parameter)
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]


def settle(parameters: Watched) -> None:
    """Redistribute the gradients that lie otherwise than their parameters, in place: partial sums cannot be clamped."""
    for parameter in parameters:
        if parameter is not None and isinstance(parameter.grad, Tensor) and _astray(parameter):
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]


def _astray(parameter: Any) -> bool:
    return getattr(parameter.grad, "placements", None) != getattr(parameter, "placements", None)


def _measurable(parameter: Any) -> Tensor:
    gradient = parameter.grad
    if hasattr(gradient, "placements") and _astray(parameter):
        gradient = gradient.redistribute(placements=parameter.placements)
    return local_part(gradient)


def holdings(model: nn.Module, tensors: Sequence[Tensor]) -> list[Holding]:
    """Tell what this rank holds of each parameter."""
    flat = _flat_holdings(model)
    return [flat.get(id(tensor)) or _holding(tensor) for tensor in tensors]


def _own_rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _holding(tensor: Any) -> Holding:
    shape = tuple(tensor.shape)
    if not hasattr(tensor, "placements"):
        return Holding(shape=shape, placement="local", ranks=(_own_rank(),), copy=_own_rank())
    mesh, placements, coordinate = tensor.device_mesh, tensor.placements, tensor.device_mesh.get_coordinate()
    dims = mesh.mesh_dim_names or tuple(f"dim{number}" for number in range(mesh.ndim))
    index = tuple(
        place if placement.is_replicate() else slice(None)
        for place, placement in zip(coordinate or [0] * mesh.ndim, placements, strict=True)  # no place: nothing here
    )
    return Holding(
        shape=shape,
        placement=", ".join(f"{_shown(placement)} over {dim}" for dim, placement in zip(dims, placements, strict=True)),
        ranks=tuple(mesh.mesh.flatten().tolist()),
        copy=int(mesh.mesh[index].min()),
    )


def _shown(placement: Any) -> str:
    return f"shard({placement.dim})" if hasattr(placement, "dim") else "replicate"


def _flat_holdings(model: nn.Module) -> dict[int, Holding]:
    """Describe, by ``id``, the parameters that FSDP1 keeps as pieces of one flat parameter a module."""
    found: dict[int, Holding] = {}
    for module in model.modules():
        flat = getattr(getattr(module, "_handle", None), "flat_param", None)
        if flat is None or type(module).__name__ != "FullyShardedDataParallel":
            continue
        ranks, copy = _group_ranks(module)
        placement = "flat (FSDP1)" if len(ranks) > 1 else "local"
        for tensor, shape in zip(flat._params or (), flat._shapes, strict=False):
            found[id(tensor)] = Holding(shape=tuple(shape), placement=placement, ranks=ranks, copy=copy, leaf=flat)
        whole = tuple(flat._unpadded_unsharded_size)
        found[id(flat)] = Holding(shape=whole, placement="flat (FSDP1)", ranks=ranks, copy=copy, leaf=flat)
    return found


def _group_ranks(module: Any) -> tuple[tuple[int, ...], int]:
    """Return the ranks that share an FSDP1 module, replicas included, and the lowest that share its copy."""
    if module.sharding_strategy.name == "NO_SHARD":
        return (_own_rank(),), _own_rank()
    copy = torch.distributed.get_process_group_ranks(module.process_group)
    return tuple(copy), min(copy)
