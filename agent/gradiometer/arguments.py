"""What :func:`gradiometer.attach` is given: looked through, and refused with the remedy where it is something else."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from gradiometer.layers import Parameters

__all__ = ["as_list", "check_model", "home_of"]


def check_model(model: object) -> None:
    """Raise TypeError for what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module; the optimizer comes second")


def as_list(optimizer: object) -> list[Optimizer]:
    """Return the optimizers that step, of one or several that were given; raises TypeError for anything else."""
    given: list[object] = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    optimizers = [_unwrap(each) for each in given if isinstance(each, Optimizer)]
    if not optimizers or len(optimizers) < len(given):
        raise TypeError(f"optimizer is {optimizer!r}, expected a torch.optim.Optimizer or a non-empty list of them")
    return optimizers


def _unwrap(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that steps: Accelerate and Lightning wrap it in one whose hooks never run, or run as its."""
    inner = getattr(optimizer, "optimizer", None)
    if not isinstance(inner, Optimizer):
        return optimizer
    own = vars(optimizer).get("_optimizer_step_pre_hooks")
    return _unwrap(inner) if own is None or own is inner._optimizer_step_pre_hooks else optimizer


def home_of(parameters: Parameters) -> torch.device:
    """Return the device where decisions are made: that of the first trainable parameter on an accelerator, if any."""
    devices = [tensor.device for tensor in parameters.here if tensor.requires_grad]
    devices = devices or [tensor.device for tensor in parameters.here]
    return next((device for device in devices if device.type != "cpu"), devices[0])
