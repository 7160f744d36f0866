"""One rank of trainings under policies that need more than norms: ``python -m tests._policy_ranks RANK WORLD …``."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

import gradiometer
from tests._ranks import (
    PATIENCE_STEPS,
    STEPS,
    Case,
    all_ranks,
    attach,
    build_model,
    loss_of,
    mine,
    run_cases,
    sgd,
    train,
)
from tests._training import backward

AGC: list[dict[str, Any]] = [{"agc": {"clip_factor": 0.05}}]
ON_LOSS: list[dict[str, Any]] = [{"skip": {"rule": "abs", "on": "loss", "threshold": 10.0}}]
LOSSES: dict[int, list[float | None]] = {
    0: [1.0, 1.0, 1.0, None, 1.0, 2.0, None],
    1: [1.0, 40.0, math.nan, 3.0, None, 2.0, None],
}
"""What each rank logs at each step: fine, a spike on one, NaN on one, none on one, on the other, fine, none at all."""
MEANS = [1.0, 20.5, math.nan, 3.0, 1.0, 2.0, math.nan]


def sharded(model: nn.Module) -> Any:
    for layer in model.children():
        if list(layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


def whole_weights(model: nn.Module) -> list[Any]:
    return [parameter.full_tensor().tolist() for parameter in model.parameters()]  # type: ignore[attr-defined]


def agc(rank: int, world: int) -> dict[str, Any]:
    """Rows are whole on a rank; vectors and their weights are spread."""
    model = sharded(build_model())
    optimizer = sgd(model)
    with attach(model, optimizer, policy=AGC) as agent:
        counted = train(agent, model, optimizer, lambda step: mine(step, rank, world))
    return {"weights": whole_weights(model), "collectives": counted}


def agc_after_others(rank: int, world: int) -> dict[str, Any]:
    """A global norm comes first, and vectors are left out, so nothing is spread."""
    model = sharded(build_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    policy = [{"nonfinite": {}}, {"global_norm": {"max_norm": 0.5}}, {"agc": {"exclude": ["*.bias", "1.weight"]}}]
    with attach(model, optimizer, policy=policy) as agent:
        train(agent, model, optimizer, lambda step: mine(step, rank, world))
    return {"weights": whole_weights(model)}


def agc_replicated(rank: int, world: int) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(build_model())
    optimizer = sgd(model)
    with attach(model, optimizer, policy=AGC) as agent:
        counted = train(agent, model, optimizer, lambda step: mine(step, rank, world))
    return {"weights": [p.tolist() for p in model.parameters()], "collectives": counted}


def agc_refused(rank: int, world: int) -> dict[str, Any]:
    """FSDP1's flat parameters, and columns spread by tensor parallelism."""
    flat = FullyShardedDataParallel(build_model(), use_orig_params=True, device_id=torch.device("cpu"))
    tp = parallelize_module(build_model(), init_device_mesh("cpu", (world,)), {"3": RowwiseParallel()})
    said = []
    for model in (flat, tp):
        try:
            attach(model, sgd(model), policy=AGC)
        except ValueError as error:
            said.append(f"{type(error).__name__}: {error}")
    return {"said": said}


def logged(agent: gradiometer.Agent, rank: int, step: int) -> None:
    value = LOSSES[rank % 2][step]
    if value is not None:
        agent.log(loss=value if step % 2 else torch.tensor(value))


def loss(way: str) -> Case:
    """Log losses of one's own before each step, and step by their mean."""

    def case(rank: int, world: int) -> dict[str, Any]:
        model: Any = build_model()
        model = nn.parallel.DistributedDataParallel(model) if way == "ddp" else sharded(model)
        optimizer = sgd(model)
        moved, counts = [], []
        with attach(model, optimizer, policy=ON_LOSS) as agent:
            for step in range(len(MEANS)):
                optimizer.zero_grad()
                backward(loss_of(model(mine(step, rank, world))))
                before = [p.detach().clone() for p in model.parameters()]
                logged(agent, rank, step)
                with CommDebugMode() as collectives:  # type: ignore[no-untyped-call]  # torch
                    optimizer.step()
                counts.append(collectives.get_total_counts())
                now = zip(before, model.parameters(), strict=True)
                moved.append(any(not _equal(old, new) for old, new in now))
        events = [event["kind"] for event in gradiometer.open_run(agent.path).events]
        return {"moved": moved, "collectives": counts, "missing": events.count("policy_loss_missing")}

    return case


def _equal(old: Any, new: Any) -> bool:
    old, new = (getattr(each, "_local_tensor", each) for each in (old, new.detach()))
    return bool(torch.equal(old, new))


def loss_without_asking(rank: int, world: int) -> dict[str, Any]:
    """No policy asks for the loss: nothing is communicated for it."""
    model = nn.parallel.DistributedDataParallel(build_model())
    optimizer = sgd(model)
    with attach(model, optimizer, policy=[{"skip": {"rule": "abs", "on": "global_norm", "threshold": 1e6}}]) as agent:
        return {"collectives": train(agent, model, optimizer, lambda step: mine(step, rank, world))}


def loss_in_closures(rank: int, world: int) -> dict[str, Any]:
    """Two optimizers, each with closures, the first of which evaluates its own twice."""
    model = nn.parallel.DistributedDataParallel(build_model())
    halves = [list(model.parameters())[:4], list(model.parameters())[4:]]
    optimizers: Any = [torch.optim.LBFGS(halves[0], lr=0.01, max_iter=2), torch.optim.SGD(halves[1], lr=0.05)]
    steps = 0
    with attach(model, optimizers, policy=ON_LOSS, together=False) as agent:
        for step in range(STEPS):
            for optimizer in optimizers:

                def closure(step: int = step) -> torch.Tensor:
                    model.zero_grad()
                    value = loss_of(model(mine(step, rank, world)))
                    backward(value)
                    agent.log(loss=100.0 if rank and step == 2 else value)
                    return value

                optimizer.step(closure)
                steps += 1
    run = gradiometer.open_run(agent.path)
    return {"skipped": run.skipped.tolist(), "steps": steps}


def loss_and_a_failing_rank(rank: int, world: int) -> dict[str, Any]:
    """One rank fails before it has measured; the other must not wait for it."""
    model = sharded(build_model())
    optimizer, said = sgd(model), []
    with attach(model, optimizer, policy=ON_LOSS) as agent:
        for step in range(3):
            optimizer.zero_grad()
            backward(loss_of(model(mine(step, rank, world))))
            agent.log(loss=1.0)
            if rank == 1 and step == 1:
                optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
            try:
                optimizer.step()
            except RuntimeError as error:
                said.append(str(error))
                del optimizer.param_groups[1]
    return {"said": said, "rows": len(gradiometer.open_run(agent.path))}


def callbacks(rank: int, world: int) -> dict[str, Any]:
    """Every rank's callback asks for a checkpoint, and the ranks agree on the step to save it at."""
    model = nn.parallel.DistributedDataParallel(build_model())
    optimizer, wanted = sgd(model), threading.Event()
    called, saved = list[list[int]](), list[int]()

    def save(call: gradiometer.ActionCall) -> None:
        called.append([call.rank, call.step])
        time.sleep(0.2 * rank)  # the ranks ask at different times
        wanted.set()

    policy = {"actions": [{"when": {"norm_above": 1e-9}, "do": {"callback": "save"}, "cooldown": 1000}]}
    with attach(model, optimizer, policy=policy, callbacks={"save": save}) as agent:
        for step in range(PATIENCE_STEPS):
            train(agent, model, optimizer, lambda step: mine(step % 40, rank, world), steps=[step])
            flag = torch.tensor(float(wanted.is_set()))
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            if flag.item() and not saved:
                saved.append(step)
            if all_ranks(wanted.is_set()):
                break
            time.sleep(0.005)
    return {"called": called, "saved": saved}


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        agc,
        agc_after_others,
        agc_replicated,
        agc_refused,
        callbacks,
        loss_without_asking,
        loss_in_closures,
        loss_and_a_failing_rank,
    )
}
CASES["loss_ddp"] = loss("ddp")
CASES["loss_fsdp2"] = loss("fsdp2")

if __name__ == "__main__":
    run_cases(CASES)
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort a Python that ends now and then
