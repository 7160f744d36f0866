"""Name the parameters of a model and the layers they belong to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

__all__ = ["Parameters", "collect_parameters", "layer_of"]

ROOT_LAYER = "(root)"
"""Layer of parameters that belong to the model itself and to no submodule."""
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.)")
_RECURRENT = re.compile(r"(?:weight|bias)_(?:ih|hh|hr)_(l\d+)(?:_reverse)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """P parameters in the model's order, tied ones once; parallel lists."""

    names: list[str]
    layers: list[str]
    tensors: list[nn.Parameter]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def index(self) -> dict[int, int]:
        """Place of each tensor, by ``id``."""
        return {id(tensor): index for index, tensor in enumerate(self.tensors)}


def collect_parameters(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> Parameters:
    """List the model's parameters, frozen ones too, then what the optimizers hold that the model does not.

    Raises ValueError if there is none, or if a parameter is sharded.
    """
    order = {id(tensor): (name, tensor) for name, tensor in model.named_parameters()}  # tied ones once
    for number, optimizer in enumerate(optimizers):
        for group_number, group in enumerate(optimizer.param_groups):
            for place, tensor in enumerate(group["params"]):
                order.setdefault(id(tensor), (f"optimizer{number}.group{group_number}.param{place}", tensor))
    if not order:
        raise ValueError("the model has no parameters and the optimizers hold none: there is nothing to measure")
    names = [clean_name(name, model) for name, _ in order.values()]
    for name, (_, tensor) in zip(names, order.values(), strict=True):
        if hasattr(tensor, "placements"):
            raise ValueError(f"parameter {name!r} is sharded (DTensor): this version measures whole parameters only")
    return Parameters(
        names=names, layers=[layer_of(name) for name in names], tensors=[tensor for _, tensor in order.values()]
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
