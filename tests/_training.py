"""Small models, and norms worked out by hand in float64, that the tests of the agent share."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradiometer
from gradiometer import Agent, Run

__all__ = [
    "ABORTED",
    "PATIENCE_SECONDS",
    "ROWS",
    "assert_same",
    "attach",
    "backward",
    "batch",
    "check_run",
    "hand_norms",
    "loss_of",
    "small_model",
    "train",
    "train_by_hand",
    "train_until",
]

Floats = npt.NDArray[np.float64]
RING_BYTES = 2**20
"""A small ring: hundreds of tests make one each."""
ABORTED = "terminate called without an active exception"
"""What gloo's threads say when they abort a Python that ends: one of some forty, with or without an agent."""
PATIENCE_SECONDS = 60.0
"""How long training goes on, at most, until what it waits for has happened: a busy host is slow."""
ROWS = 16
"""Rows of a batch."""


def attach(tmp_path: Path, model: nn.Module, optimizer: Optimizer | list[Optimizer], **options: Any) -> Agent:
    """Attach an agent whose runs are kept in ``tmp_path``."""
    settings: dict[str, Any] = {"dir": tmp_path, "ring_bytes": RING_BYTES} | options
    return gradiometer.attach(model, optimizer, **settings)


def small_model(seed: int = 0) -> nn.Sequential:
    """Make a model of two layers and four parameters, the same for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def batch(step: int) -> Tensor:
    """Make the inputs of one step, the same whenever asked."""
    return torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Run the model forward on the inputs of one step."""
    loss: Tensor = model(batch(step)).square().sum()
    return loss


def backward(loss: Tensor, **options: Any) -> None:
    """Run the backward pass, which torch leaves untyped."""
    loss.backward(**options)  # type: ignore[no-untyped-call]  # torch


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int] = range(5)) -> None:
    """Train in the plainest of loops."""
    for step in steps:
        optimizer.zero_grad()
        backward(loss_of(model, step))
        optimizer.step()


def train_until(model: nn.Module, optimizer: Optimizer, check: Callable[[], Any]) -> Any:
    """Train until a check finds something after a step, for ``PATIENCE_SECONDS`` at most; return what it found."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        train(model, optimizer, [0])
        if found := check():
            return found
        assert time.monotonic() < end, f"still {found!r}"


def train_by_hand(
    model: nn.Module, optimizer: Optimizer, steps: Iterable[int] = range(5), max_norm: float = math.inf
) -> Floats:
    """Train in the same loop with torch's own clipping; return the norms before it, float64[T, P]."""
    norms = []
    for step in steps:
        optimizer.zero_grad()
        backward(loss_of(model, step))
        norms.append(hand_norms(model))
        if math.isfinite(max_norm):
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
    return np.stack(norms)


def hand_norms(model: nn.Module) -> Floats:
    """Return the L2 norm of every parameter's gradient as float64 has it; negative zero where there is none."""
    return np.array([_hand_norm(parameter.grad) for parameter in model.parameters()])


def _hand_norm(gradient: Tensor | None) -> float:
    if gradient is None:
        return -0.0
    values = gradient.detach().to_dense().flatten().tolist()
    return math.sqrt(math.fsum(abs(value) ** 2 for value in values))


def check_run(path: str | os.PathLike[str], norms: npt.ArrayLike, max_norm: float = math.inf) -> Run:
    """Assert that a run recorded the norms [T, P], clipped together at ``max_norm``; return the run."""
    run, wanted = gradiometer.open_run(path), np.asarray(norms)
    total = np.sqrt(np.square(wanted).sum(axis=1))
    coefficient = np.minimum(1.0, max_norm / (total + 1e-6))
    np.testing.assert_allclose(run.parameter_norms, wanted, rtol=1e-6)
    np.testing.assert_array_equal(np.signbit(run.parameter_norms), np.signbit(wanted))
    np.testing.assert_allclose(run.grad_norm_preclip, total, rtol=1e-6)
    np.testing.assert_allclose(run.coefficient, coefficient, rtol=1e-6)
    np.testing.assert_allclose(run.grad_norm_postclip, total * coefficient, rtol=1e-6)
    np.testing.assert_allclose(run.stat("grad_norm_postclip"), wanted * coefficient[:, None], rtol=1e-6)
    return run


def assert_same(model: nn.Module, twin: nn.Module, *, exactly: bool = False) -> None:
    """Assert that the parameters of a model are those of its twin, to float32's last digits or to the bit."""
    tolerance: dict[str, Any] = {"rtol": 0, "atol": 0} if exactly else {"rtol": 1e-5, "atol": 1e-6}
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, **tolerance)
