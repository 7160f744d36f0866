"""What others offer for looking at gradients, where it is installed. None of it is a dependency of the project."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["GRAD_NORM", "WATCH", "grad_norm", "missing", "wandb_watch"]

GRAD_NORM, WATCH = "Lightning grad_norm", "wandb.watch gradients"


def grad_norm() -> Callable[[nn.Module, float], object] | None:
    """Return Lightning's ``grad_norm``; None if it is not installed."""
    module = _imported("lightning.pytorch.utilities.grads") or _imported("pytorch_lightning.utilities.grads")
    return None if module is None else module.grad_norm


def wandb_watch(model: nn.Module, root: Path, stack: contextlib.ExitStack) -> Callable[[], object] | None:
    """Watch the gradients at every step, offline; return what ends a step, or None if wandb is not installed."""
    wandb = _imported("wandb")
    if wandb is None:
        return None
    run = wandb.init(mode="offline", dir=root, settings=wandb.Settings(silent=True))
    stack.callback(run.finish)
    run.watch(model, log="gradients", log_freq=1)
    return lambda: run.log({})


def missing() -> list[str]:
    """Name what is not installed."""
    found = {GRAD_NORM: grad_norm(), WATCH: _imported("wandb")}
    return [name for name, each in found.items() if each is None]


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None
