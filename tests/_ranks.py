"""The model and the loop that every parallel training of the tests shares, and how a rank runs its cases."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

import gradiometer
from tests._training import backward

__all__ = [
    "BATCH",
    "FEATURES",
    "OUTPUTS",
    "PATIENCE_STEPS",
    "POLICY",
    "STEPS",
    "WIDTH",
    "Case",
    "all_ranks",
    "attach",
    "build_model",
    "full_norms",
    "inputs",
    "loss_of",
    "mine",
    "run_cases",
    "sgd",
    "train",
]

Case = Callable[[int, int], dict[str, Any]]
"""What one rank does, given its rank and the number of ranks; the result goes into a file for the tests."""
BATCH, FEATURES, WIDTH, OUTPUTS, STEPS = 8, 6, 12, 3, 4
PATIENCE_STEPS = 20_000
"""For how many steps ranks train on, at most, until something has happened, and all end after the same one."""
POLICY: list[dict[str, Any]] = [{"nonfinite": {}}, {"global_norm": {"max_norm": 0.5}}]
RING_BYTES = 2**20


def build_model() -> nn.Sequential:
    """Make the model of every case, float64: two ranks' rounding shall not be what the tests see."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Linear(FEATURES, WIDTH), nn.LayerNorm(WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, OUTPUTS)
    )
    return layers.double()


def inputs(step: int) -> Tensor:
    """Make the whole batch of one step [8, 6]."""
    return torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(step), dtype=torch.float64) * (step + 1)


def loss_of(output: Tensor) -> Tensor:
    return (output - 1.0).square().mean()


def mine(step: int, rank: int, world: int) -> Tensor:
    return inputs(step).chunk(world)[rank]


def attach(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> gradiometer.Agent:
    settings: dict[str, Any] = {
        "policy": POLICY,
        "ring_bytes": RING_BYTES,
        "dir": os.environ["CASE_DIR"],
        "run_id": "run",
    } | options
    return gradiometer.attach(model, optimizer, **settings)


def full_norms(model: nn.Module) -> list[float]:
    """Return the norm of every gradient, put together from its shards by torch itself; -0 for none."""
    norms = []
    for parameter in model.parameters():
        gradient: Any = parameter.grad
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        norms.append(float(whole.double().norm()) if whole is not None else -0.0)
    return norms


def train(
    agent: gradiometer.Agent,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[int], Tensor],
    *,
    norms: list[list[float]] | None = None,
    steps: Sequence[int] = range(STEPS),
) -> int:
    """Train, and return how many collectives the last ``optimizer.step`` made."""
    counted = 0
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model(batches(step)))
        backward(loss)
        if norms is not None:
            norms.append(full_norms(model))
        if step % 2:
            agent.log(loss=float(step))
        with CommDebugMode() as collectives:  # type: ignore[no-untyped-call]  # torch
            optimizer.step()
        counted = collectives.get_total_counts()
    return counted


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def all_ranks(mine: bool) -> bool:
    """Tell whether something is so on every rank; a collective, for all ranks after the same step."""
    flag = torch.tensor(float(mine))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag.item())


def run_cases(cases: Mapping[str, Case]) -> None:
    """Run the cases that the command line names, and leave in a file what each returned."""
    rank, world, port, root = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    for name in sys.argv[5:]:
        os.environ["CASE_DIR"] = str(root / name)
        try:
            result: dict[str, Any] = cases[name](rank, world)
        except Exception:
            result = {"failed": traceback.format_exc()}
        (root / f"{name}-{rank}.json").write_text(json.dumps(result))
        if "failed" in result:
            os._exit(1)  # the ranks are out of step with one another
        dist.barrier()
    dist.destroy_process_group()
