"""One rank of the trainings whose loops are asked for something; run as :mod:`tests._parallel` is."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import gradiometer
from gradiometer.live import thread
from gradiometer.live.requests import Kind, request_loop
from tests._parallel import sharded
from tests._ranks import PATIENCE_STEPS, Case, all_ranks, attach, build_model, loss_of, mine, run_cases, sgd
from tests._training import backward

__all__ = ["CASES"]


def ask(kind: Kind) -> str:
    return request_loop(Path(os.environ["CASE_DIR"]) / "run", kind)


def told(agent: gradiometer.Agent) -> list[list[Any]]:
    events = gradiometer.open_run(agent.path).events
    return [[e["kind"], e.get("step"), e.get("reasons")] for e in events if e["kind"].startswith("request_")]


def loop(model: Any, rank: int, world: int, pause: float, steps: int) -> dict[str, Any]:
    """Save as often as asked, with a collective in it that hangs if a rank is alone, and stop when asked."""
    optimizer, saved = sgd(model), []
    with attach(model, optimizer) as agent:
        for step in range(steps):
            optimizer.zero_grad()
            backward(loss_of(model(mine(step % 7, rank, world))))
            optimizer.step()
            if agent.requested("checkpoint"):
                together = torch.tensor([float(step)])
                dist.all_reduce(together)
                saved.append([step, together.item()])
                if rank == 0:
                    agent.done("checkpoint")
                    ask("stop")
            if agent.requested("stop"):
                break
            if rank == 0 and step == 2:
                ask("checkpoint")
            time.sleep(pause * (1 + rank))  # the ranks are not equally fast
    return {"saved": saved, "steps": step + 1, "told": told(agent)}


def ddp_fast(rank: int, world: int) -> dict[str, Any]:
    return loop(nn.parallel.DistributedDataParallel(build_model()), rank, world, 0.002, 5000)


def ddp_slow(rank: int, world: int) -> dict[str, Any]:
    return loop(nn.parallel.DistributedDataParallel(build_model()), rank, world, 0.3, 60)


def fsdp2(rank: int, world: int) -> dict[str, Any]:
    return loop(sharded(build_model()), rank, world, 0.004, 5000)


def deaf(rank: int, world: int) -> dict[str, Any]:
    """Only the first rank looks for a stop: if it stopped alone, the others would hang, so nobody does."""
    thread.FOLLOW_SECONDS = 1.0
    model = nn.parallel.DistributedDataParallel(build_model())
    optimizer = sgd(model)
    with attach(model, optimizer) as agent:
        for step in range(PATIENCE_STEPS):
            optimizer.zero_grad()
            backward(loss_of(model(mine(step % 7, rank, world))))
            optimizer.step()
            if rank == 0:
                assert agent.requested("stop") is None
                if step == 2:
                    ask("stop")
            if all_ranks(bool(told(agent))):
                break
            time.sleep(0.01)
    return {"told": told(agent)}


CASES: dict[str, Case] = {case.__name__: case for case in (ddp_fast, ddp_slow, fsdp2, deaf)}


if __name__ == "__main__":
    run_cases(CASES)
    sys.stdout.flush()
    os._exit(0)
