"""One rank of the trainings with policies in shadow: ``python -m tests._shadow_ranks RANK WORLD PORT ROOT CASE…``."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import gradiometer.shadows
from tests._ranks import POLICY, Case, attach, build_model, mine, run_cases, sgd, train

SHADOW: list[dict[str, Any]] = [
    {"nonfinite": {"name": "guard"}},
    {"group_norm": {"max_norm": 0.3, "scope": "parameter"}},
    {"value": {"max_abs": 0.05}},
    {"value": {"name": "weights", "max_abs": 0.1, "match": "*weight"}},
]


def parallel(way: str) -> nn.Module:
    model = build_model()
    if way == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for layer in model.children():
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(model)
    return model


def moved(model: nn.Module) -> list[list[float]]:
    """Return every number of the parameters' parts that are here."""
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [tensor.detach().flatten().tolist() for tensor in local]


def case(way: str, pipeline: list[dict[str, Any]]) -> Case:
    def run(rank: int, world: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, shadow in (("without", []), ("with", SHADOW)):
            model = parallel(way)
            optimizer = sgd(model)
            policy = {"pipeline": pipeline, "shadow": shadow} if pipeline or shadow else None
            with attach(model, optimizer, policy=policy, run_id=name) as agent:
                collectives = train(agent, model, optimizer, lambda step: mine(step, rank, world))
            found[name] = {"moved": moved(model), "collectives": collectives, "errors": agent.errors}
        return found

    return run


def failing(rank: int, world: int) -> dict[str, Any]:
    """On one rank the elements cannot be weighed: it stays in phase with the others."""
    model = parallel("fsdp2")
    module: Any = gradiometer.shadows
    optimizer, original = sgd(model), module.weigh
    if rank == 1:

        def fail(*_: Any) -> torch.Tensor:
            raise ZeroDivisionError

        module.weigh = fail
    try:
        with attach(model, optimizer, policy={"shadow": SHADOW}) as agent:
            train(agent, model, optimizer, lambda step: mine(step, rank, world))
    finally:
        module.weigh = original
    return {"errors": agent.errors}


def restoring(rank: int, world: int) -> dict[str, Any]:
    """Ranks go on from different checkpoints, from one that only one can use, from the same, or not all of them."""
    model = parallel("ddp")
    optimizer, said = sgd(model), list[str]()
    with attach(model, optimizer, patience=8.0) as agent:
        train(agent, model, optimizer, lambda step: mine(step, rank, world), steps=range(2))
        state = agent.state_dict()
        for given in ({**state, "step": rank}, {**state, "version": 2 + rank}):
            try:
                agent.load_state_dict(given)
            except ValueError as error:
                said.append(str(error))
        unchanged = agent.step
        agent.load_state_dict({**state, "step": 7})
        same = agent.step
        if rank == 0:
            try:
                agent.load_state_dict({**state, "step": 9})
            except RuntimeError as error:
                said.append(str(error))
        return {"said": said, "unchanged": unchanged, "same": same, "step": agent.step}


CASES: dict[str, Case] = {
    "ddp": case("ddp", []),
    "ddp_acting": case("ddp", POLICY),
    "fsdp2": case("fsdp2", []),
    "fsdp2_acting": case("fsdp2", POLICY),
    "failing": failing,
    "restoring": restoring,
}

if __name__ == "__main__":
    run_cases(CASES)
    sys.stdout.flush()
    os._exit(0)
