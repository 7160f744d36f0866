"""One rank of the trainings in which ranks differ, or one fails alone; run as :mod:`tests._parallel` is."""

from __future__ import annotations

import os
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests._parallel import refused, sharded
from tests._ranks import (
    BATCH,
    STEPS,
    Case,
    attach,
    build_model,
    inputs,
    loss_of,
    mine,
    run_cases,
    sgd,
    train,
)
from tests._training import backward

__all__ = ["CASES"]


def mesh_of_one(rank: int, world: int) -> dict[str, Any]:
    """Two pipeline stages, each under FSDP2 over the one rank that is left to it."""
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("pp", "dp"))
    whole = build_model()
    module = sharded(whole[:3] if rank == 0 else nn.Sequential(*list(whole)[3:]), mesh=mesh["dp"])
    schedule = ScheduleGPipe(
        PipelineStage(module, rank, 2, torch.device("cpu")), 2, loss_fn=lambda output, target: loss_of(output)
    )
    optimizer = sgd(module)
    with attach(module, optimizer, parts=f"stage{rank}"):
        for step in range(STEPS):
            optimizer.zero_grad()
            if rank == 0:
                schedule.step(inputs(step))
            else:
                schedule.step(target=torch.zeros(BATCH))
            optimizer.step()
    return {}


def after_evaluation(rank: int, world: int) -> dict[str, Any]:
    """FSDP2 leaves the root's parameters whole after a forward pass that no backward pass follows."""
    model = sharded(build_model())
    optimizer = sgd(model)
    with torch.no_grad():
        model(mine(0, rank, world))
    with attach(model, optimizer) as agent:
        train(agent, model, optimizer, lambda step: mine(step, rank, world))
    return {}


class Adapted(nn.Module):
    """A frozen linear layer with an adapter beside it, as LoRA has."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(12, 2, bias=False, dtype=torch.float64)
        self.up = nn.Linear(2, 12, bias=False, dtype=torch.float64)

    def forward(self, values: torch.Tensor) -> Any:
        return self.base(values) + self.up(self.down(values))


def adapters(rank: int, world: int) -> dict[str, Any]:
    """Frozen parameters and trainable ones share what FSDP2 gathers."""
    model = build_model().requires_grad_(False)
    model[3] = Adapted(model[3])
    model = sharded(model)
    optimizer, norms = sgd(model), list[list[float]]()
    with attach(model, optimizer) as agent:
        train(agent, model, optimizer, lambda step: mine(step, rank, world), norms=norms)
    return {"norms": norms}


def given_another(rank: int, world: int) -> dict[str, Any]:
    """One rank's optimizer holds, for two steps, a parameter that the agent does not know."""
    model = sharded(build_model())
    optimizer = sgd(model)
    with attach(model, optimizer, policy=None, updates_every=2) as agent:
        for step in range(6):
            if rank == 1 and step == 2:
                optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
            if rank == 1 and step == 4:
                optimizer.param_groups.pop()
            train(agent, model, optimizer, lambda step: mine(step, rank, world), steps=[step])
        return {"errors": agent.errors}


def unlike_optimizers(rank: int, world: int) -> dict[str, Any]:
    """As many all-reduces a step as optimizers on one rank, another number on the other."""
    model = sharded(build_model())
    parameters = list(model.parameters())
    halves = [torch.optim.SGD(part) for part in (parameters[:4], parameters[4:])]
    return {
        "together": refused(model, halves, together=rank == 0),  # type: ignore[arg-type]  # a list
        "number": refused(model, halves if rank else [sgd(model)], together=False),  # type: ignore[arg-type]  # a list
    }


def no_room_on_one_rank(rank: int, world: int) -> dict[str, Any]:
    """One rank cannot make its run directory; the training goes on, and a second attempt succeeds."""
    model = sharded(build_model())
    optimizer, home = sgd(model), os.environ["CASE_DIR"]
    error = refused(model, optimizer, dir=home if rank == 0 else "/dev/null/runs", policy=None)
    for step in range(2):
        backward(loss_of(model(mine(step, rank, world))))
        optimizer.step()
    with attach(model, optimizer) as agent:
        train(agent, model, optimizer, lambda step: mine(step, rank, world))
    return {"error": error}


def bad_labels_on_one_rank(rank: int, world: int) -> dict[str, Any]:
    model = build_model()
    return {"error": refused(model, sgd(model), labels={} if rank == 0 else {"0": ""})}


def no_values_on_one_rank(rank: int, world: int) -> dict[str, Any]:
    """One rank's model is not materialised yet."""
    model = build_model().to("cpu" if rank == 0 else "meta")
    return {"error": refused(model, sgd(model))}


def mesh_of_some(rank: int, world: int) -> dict[str, Any]:
    """A parameter is sharded over two of three ranks; the third has a DTensor of it that holds nothing."""
    model = build_model()
    whole = torch.arange(16, dtype=torch.float64).reshape(4, 4) / 16
    mesh = DeviceMesh("cpu", [0, 1])
    model.table = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    optimizer: Any = torch.optim.SGD([model.table], lr=0.1)
    with attach(model, optimizer):
        for _ in range(STEPS):
            model.table.grad = model.table.detach() * 2  # as of the sum of its squares
            optimizer.step()
    return {}


def mesh_outside_the_group(rank: int, world: int) -> dict[str, Any]:
    """Only one rank of the agent's group knows that its parameter is sharded over another that is not in it."""
    group = dist.new_group([0, 1])
    model = nn.Linear(2, 2)
    nn.init.ones_(model.weight)
    nn.init.ones_(model.bias)
    if rank != 1:
        mesh = DeviceMesh("cpu", [0, 2])
        model.weight = nn.Parameter(DTensor.from_local(torch.ones(1, 2), mesh, [Shard(0)]))
    return {"error": refused(model, sgd(model), group=group) if rank < 2 else "none"}


def line_searches(rank: int, world: int) -> dict[str, Any]:
    """Each rank's optimizer evaluates its closure as often as it needs to for what that rank holds."""
    torch.manual_seed(10 + rank)
    model, evaluations = nn.Linear(6, 3, dtype=torch.float64), 0
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        optimizer.zero_grad()
        loss = loss_of(model(inputs(0)) * 10**rank)
        backward(loss)
        return loss

    with attach(model, optimizer, policy=None, parts=f"rank{rank}"):
        for _ in range(STEPS):
            optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch
    return {"evaluations": evaluations}


def scaler_skips_on_one_rank(rank: int, world: int) -> dict[str, Any]:
    """Plain experts, of which a GradScaler knows its own rank's only; the first of two optimizers, then the second."""
    torch.manual_seed(10 + rank)
    layers = [nn.Linear(6, 6, dtype=torch.float64), nn.Linear(6, 3, dtype=torch.float64)]
    model, weights = nn.Sequential(*layers), []
    optimizers = [sgd(layer) for layer in layers]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=10**6)
    with attach(model, optimizers, parts=f"rank{rank}", updates_every=2):  # type: ignore[arg-type]  # a list
        for step in range(6):
            model.zero_grad()
            backward(scaler.scale(loss_of(model(inputs(0)))))
            if rank == 1 and step in (2, 3):
                layers[step - 2].weight.grad[0, 0] = torch.inf  # type: ignore[index]  # it is there
            weights.append([layer.weight.detach().clone() for layer in layers])
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
    weights.append([layer.weight.detach() for layer in layers])
    moved = [[not torch.equal(*pair) for pair in zip(*two, strict=True)] for two in pairwise(weights)]
    return {"moved": moved}


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        mesh_of_one,
        after_evaluation,
        adapters,
        given_another,
        unlike_optimizers,
        no_room_on_one_rank,
        bad_labels_on_one_rank,
        no_values_on_one_rank,
        line_searches,
        scaler_skips_on_one_rank,
        mesh_of_some,
        mesh_outside_the_group,
    )
}


if __name__ == "__main__":
    run_cases(CASES)
