"""Name the parameters of a model and the layers they belong to."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from gradiometer.records import ParameterInfo
from gradiometer.shards import Holding, holdings

__all__ = ["Parameters", "collect_parameters", "layer_of"]

ROOT_LAYER = "(root)"
"""Layer of parameters that belong to the model itself and to no submodule."""
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)(?=\.)")
_RECURRENT = re.compile(r"(?:weight|bias)_(?:ih|hh|hr)_(l\d+)(?:_reverse)?")


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """P parameters in the model's order, tied ones once; parallel lists.

    Where the ranks of a job hold different parameters, these are all of them, on every rank alike.
    """

    infos: list[ParameterInfo]
    tensors: list[nn.Parameter | None]
    """None where another rank holds the parameter."""
    holdings: list[Holding | None]

    def __len__(self) -> int:
        return len(self.infos)

    @cached_property
    def names(self) -> list[str]:
        return [info.name for info in self.infos]

    @cached_property
    def layers(self) -> list[str]:
        return [info.layer for info in self.infos]

    @cached_property
    def index(self) -> dict[int, int]:
        """Place of each tensor that is here, by ``id``."""
        return {id(tensor): index for index, tensor in enumerate(self.tensors) if tensor is not None}

    @property
    def here(self) -> list[nn.Parameter]:
        """The parameters that this rank holds, or holds a shard of."""
        return [tensor for tensor in self.tensors if tensor is not None]


def collect_parameters(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Parameters:
    """List this rank's parameters of the model, frozen ones too, then what the optimizers hold that it does not.

    Raises ValueError if there is none.
    """
    _reshard(model)
    order = {id(tensor): (name, tensor) for name, tensor in model.named_parameters()}  # tied ones once
    for number, optimizer in enumerate(optimizers):
        for group_number, group in enumerate(optimizer.param_groups):
            for place, tensor in enumerate(group["params"]):
                order.setdefault(id(tensor), (f"optimizer{number}.group{group_number}.param{place}", tensor))
    if not order:
        raise ValueError("the model has no parameters and the optimizers hold none: there is nothing to measure")
    tensors = [tensor for _, tensor in order.values()]
    held = holdings(model, tensors)
    infos = [
        _describe(clean_name(name, model), tensor, holding)
        for (name, tensor), holding in zip(order.values(), held, strict=True)
    ]
    return Parameters(infos=infos, tensors=list(tensors), holdings=list(held))


def _reshard(model: nn.Module) -> None:
    """Have FSDP2 modules show their shards: after a forward pass without a backward one the root shows the whole."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported: then no module is of its making
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def _describe(name: str, tensor: nn.Parameter, holding: Holding) -> ParameterInfo:
    return ParameterInfo(
        name=name,
        layer=layer_of(name),
        shape=holding.shape,
        dtype=str(tensor.dtype).removeprefix("torch."),
        numel=math.prod(holding.shape),
        trainable=tensor.requires_grad,
        placement=holding.placement,
    )


def clean_name(name: str, model: nn.Module) -> str:
    """Remove what wrappers (torch.compile, DDP, checkpointing) put into a parameter's name."""
    name = _WRAPPERS.sub(r"\1", name)
    while ".." in name:
        name = name.replace("..", ".")
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        name = name.lstrip(".").removeprefix("module.")
    return name.lstrip(".")


def layer_of(name: str) -> str:
    """Return the layer of a parameter: the module that owns it; for ``nn.LSTM`` and its kin, each depth by itself."""
    module, _, parameter = name.rpartition(".")
    recurrent = _RECURRENT.fullmatch(parameter)
    if recurrent:
        return f"{module}.{recurrent[1]}".lstrip(".")
    return module or ROOT_LAYER
