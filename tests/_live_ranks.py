"""One rank of the trainings whose policy is changed while they run; run as :mod:`tests._parallel` is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import gradiometer
from gradiometer.live import thread as live
from gradiometer.live.control import Answer, await_answer, request_policy
from tests._parallel import sharded
from tests._ranks import PATIENCE_STEPS, Case, all_ranks, attach, build_model, loss_of, mine, run_cases, sgd
from tests._training import backward

__all__ = ["CASES", "OTHER"]

PATIENCE_SECONDS = 120.0
"""How long ranks train on, at most, until each has been told what became of the request: a busy host is slow."""
OTHER: list[dict[str, Any]] = [{"nonfinite": {}}, {"global_norm": {"max_norm": 0.05}}, {"value": {"max_abs": 0.01}}]


def ask(policy: Any) -> str:
    return request_policy(Path(os.environ["CASE_DIR"]) / "run", policy)


def answer(request: str, seconds: float = 20.0) -> Answer:
    return await_answer(Path(os.environ["CASE_DIR"]) / "run" / "rank-00000", request, seconds)


def shown(model: nn.Module) -> list[Any]:
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [each.detach().flatten().tolist() for each in whole]


def changes(agent: gradiometer.Agent) -> list[list[Any]]:
    events = gradiometer.open_run(agent.path).events
    return [[e["kind"], e.get("step"), e.get("reasons")] for e in events if e["kind"].startswith("policy_")]


def train_until(
    model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, world: int, steps: int, pause: float, first: int = 0
) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        backward(loss_of(model(mine(step % 7, rank, world))))
        optimizer.step()
        time.sleep(pause * (1 + rank))  # the ranks are not equally fast


def train_until_told(
    agent: gradiometer.Agent | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    world: int,
    pause: float,
    first: int = 0,
) -> None:
    """Train until each rank that has an agent was told what became of the request, and a few steps more."""
    for step in range(first, PATIENCE_STEPS):
        train_until(model, optimizer, rank, world, 1, pause, first=step)
        if all_ranks(agent is None or bool(changes(agent))):
            break
    train_until(model, optimizer, rank, world, 3, pause, first=step + 1)


def change(model: Any, rank: int, world: int, pause: float) -> dict[str, Any]:
    """Train until the policy was changed, and on; the first rank asks for another at the start."""
    optimizer = sgd(model)
    with attach(model, optimizer) as agent:
        if rank == 0:
            ask(OTHER)
        train_until_told(agent, model, optimizer, rank, world, pause)
        found = changes(agent)
    return {"changes": found, "weights": shown(model)}


def ddp_fast(rank: int, world: int) -> dict[str, Any]:
    return change(nn.parallel.DistributedDataParallel(build_model()), rank, world, 0.002)


def ddp_slow(rank: int, world: int) -> dict[str, Any]:
    return change(nn.parallel.DistributedDataParallel(build_model()), rank, world, 0.4)


def fsdp2(rank: int, world: int) -> dict[str, Any]:
    return change(sharded(build_model()), rank, world, 0.004)


def refused_by_one(rank: int, world: int) -> dict[str, Any]:
    """The second rank captures its steps, so no policy can act there, and none acts anywhere."""
    model = nn.parallel.DistributedDataParallel(build_model())
    optimizer = sgd(model)
    with attach(model, optimizer) as agent:
        if rank:
            agent._live.obstacle = "the job captures steps into CUDA graphs, in which no policy can act"
        else:
            ask(OTHER)
        train_until_told(agent, model, optimizer, rank, world, 0.005)
        found = changes(agent)
    return {"changes": found}


def ends_before(rank: int, world: int) -> dict[str, Any]:
    """The training ends while the policy is being settled; nobody waits for long."""
    model = nn.parallel.DistributedDataParallel(build_model())
    optimizer = sgd(model)
    agent = attach(model, optimizer)
    if rank == 0:
        ask(OTHER)
    train_until(model, optimizer, rank, world, 3, 0.2)
    began = time.monotonic()
    agent.detach()
    return {"seconds": time.monotonic() - began, "changes": changes(agent)}


def detached_on_one(rank: int, world: int) -> dict[str, Any]:
    """One rank has no agent any more; the others learn that it does not answer, and go on."""
    model = nn.parallel.DistributedDataParallel(build_model())
    optimizer = sgd(model)
    agent = attach(model, optimizer)
    train_until(model, optimizer, rank, world, 1, 0.0)
    if rank:
        agent.detach()
    else:
        ask(OTHER)
    train_until_told(None if rank else agent, model, optimizer, rank, world, 0.05, first=1)
    agent.detach()
    return {"changes": changes(agent)}


def dies(rank: int, world: int) -> dict[str, Any]:
    """The last rank is killed as soon as it has pledged; the first sees the request through alone."""
    model = build_model()  # independent gradients: the others can go on
    optimizer = sgd(model)
    agent = attach(model, optimizer)
    if rank == 0:
        ask(OTHER)
        end = time.monotonic() + PATIENCE_SECONDS
        while not changes(agent) and time.monotonic() < end:
            train_until(model, optimizer, rank, world, 1, 0.01)
        train_until(model, optimizer, rank, world, 3, 0.01)
        agent.detach()
        path = Path(os.environ["CASE_DIR"]).parent / f"dies-{rank}.json"
        path.write_text(json.dumps({"changes": changes(agent), "step": agent.step}))
        sys.stdout.flush()
        os._exit(0)
    os.kill(os.getpid(), 9)
    return {}


def pledged_then(agent: gradiometer.Agent, signal_number: int) -> None:
    """Signal this process as soon as it has told the others what it is bound to."""
    while agent._live._accord is None or not agent._live._accord.open or not agent._live._accord._pledged:
        time.sleep(0.0005)
    os.kill(os.getpid(), signal_number)


def alone(rank: int, world: int, case: str, seconds: float, signal_number: int) -> None:
    """Train with no collective, so that nothing but the change holds anyone up; the last rank is signalled."""
    live.WAIT_SECONDS = 8.0
    model = build_model()
    optimizer = sgd(model)
    agent = attach(model, optimizer)
    if rank == 0:
        ask(OTHER)
    if rank == world - 1:
        if signal_number == signal.SIGSTOP:
            subprocess.Popen(["/bin/sh", "-c", f"sleep 13; kill -CONT {os.getpid()}"])
        threading.Thread(target=pledged_then, args=(agent, signal_number), daemon=True).start()
    end, root = time.monotonic() + seconds, Path(os.environ["CASE_DIR"]).parent
    others = [root / f"{case}-{other}.json" for other in range(1, world - (signal_number == signal.SIGKILL))]

    def over() -> bool:
        """Tell whether this rank was told; the first stays for the others, because the store is in its process."""
        told = bool(changes(agent)) and agent.step > 100 and (rank > 0 or all(path.exists() for path in others))
        return told or time.monotonic() > end + PATIENCE_SECONDS

    while time.monotonic() < end or not over():
        train_until(model, optimizer, rank, world, 1, 0.002)
    found = {"changes": changes(agent), "step": agent.step}
    agent.detach()
    (root / f"{case}-{rank}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


def killed(rank: int, world: int) -> dict[str, Any]:
    """The last rank is killed between its pledge and the verdict."""
    alone(rank, world, "killed", 14.0, signal.SIGKILL)
    return {}


def stopped(rank: int, world: int) -> dict[str, Any]:
    """The last rank is stopped after its pledge, for longer than a rank waits for a verdict."""
    alone(rank, world, "stopped", 18.0, signal.SIGSTOP)
    return {}


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (ddp_fast, ddp_slow, fsdp2, refused_by_one, ends_before, detached_on_one, dies, killed, stopped)
}


if __name__ == "__main__":
    run_cases(CASES)
    sys.stdout.flush()
    os._exit(0)
