"""One rank of a training under every kind of policy: ``python -m tests._kind_ranks RANK WORLD PORT ROOT CASE…``."""

from __future__ import annotations

import math
import os
import sys
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests._ranks import BATCH, Case, attach, build_model, inputs, loss_of, run_cases, sgd
from tests._training import backward

__all__ = ["BAD", "CASES", "POLICIES", "STEPS", "take_steps"]

STEPS, BAD, SPIKE = 12, 6, 9
"""A NaN in one rank's half of the batch, and a loss that is a spike."""
STAGES: dict[str, dict[str, Any]] = {
    "nonfinite": {},
    "zeros": {"nonfinite": {"action": "zero"}},
    "skip": {"skip": {"on": ["loss", "global_norm"], "window": 4, "min_history": 3, "sigma": 2.0}},
    "skip_median": {"skip": {"rule": "median_mad", "window": 4, "min_history": 3}},
    "global_norm": {"global_norm": {"max_norm": 0.5}},
    "group_norm": {"group_norm": {"max_norm": 0.1, "scope": "layer"}},
    "percentile": {"percentile": {"p": 50, "window": 4, "scope": "layer"}},
    "zclip": {"zclip": {"warmup_steps": 3, "max_grad_norm": None, "z": 1.0}},
    "zclip_parameter": {"zclip": {"warmup_steps": 3, "max_grad_norm": None, "z": 1.0, "scope": "parameter"}},
    "adagc": {"adagc": {"warmup_steps": 3}},
    "ema_ratio": {"ema_ratio": {"ratio": 1.01, "scope": "layer"}},
    "agc": {"agc": {"clip_factor": 0.05}},
    "value": {"value": {"max_abs": 0.05}},
}


def _policy(stage: dict[str, Any]) -> dict[str, Any]:
    """Return a policy in which the stage acts behind ``nonfinite``, and watches; it may be ``nonfinite`` itself."""
    if not stage or "nonfinite" in stage:
        return {"pipeline": [stage or "nonfinite"]}
    ((kind, settings),) = stage.items()
    return {"pipeline": ["nonfinite", stage], "shadow": [{kind: settings | {"name": "watching"}}]}


POLICIES = {name: _policy(stage) for name, stage in STAGES.items()}


def part(step: int, rank: int, world: int) -> Tensor:
    """Return this rank's part of a batch, calmer than the other tests' and with one row that is NaN in step 6."""
    batch = inputs(step) / (step + 1) * (1.0 + 0.1 * math.sin(step))
    if step == BAD:
        batch[BATCH - 1] = math.nan
    return batch.chunk(world)[rank]


def take_steps(model: nn.Module, name: str, rank: int = 0, world: int = 1) -> list[Any]:
    """Train a model under one of the policies; return the numbers of its parameters, put together."""
    optimizer = sgd(model)
    with attach(model, optimizer, policy=POLICIES[name]) as agent:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model(part(step, rank, world))) * (20.0 if step == SPIKE else 1.0)
            agent.log(loss=loss)
            backward(loss)
            optimizer.step()
    assert agent.errors == 0
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [tensor.tolist() for tensor in whole]


def case(way: str, name: str) -> Case:
    def run(rank: int, world: int) -> dict[str, Any]:
        model: nn.Module = build_model()
        if way == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            for layer in model.children():
                if list(layer.parameters()):
                    fully_shard(layer)
            fully_shard(model)
        return {"weights": take_steps(model, name, rank, world)}

    return run


CASES: dict[str, Case] = {f"{way}-{name}": case(way, name) for way in ("ddp", "fsdp2") for name in STAGES}

if __name__ == "__main__":
    run_cases(CASES)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort a Python that ends now and then
