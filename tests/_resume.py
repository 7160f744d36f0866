"""One rank of trainings that are killed and go on: ``python -m tests._resume RANK WORLD PORT ROOT MODE SCALED KIND…``.

``whole`` trains to the end, ``killed`` writes checkpoints half way and trains on until it is killed, ``resumed`` goes
on from these.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

import gradiometer
from tests._stages import STAGES
from tests._training import backward, batch, small_model

STEPS, HALF = 16, 8
BAD = (3, 7, 8, 12)
"""Steps whose gradients are not finite, two of them on either side of the checkpoint."""


def policy_of(kind: str) -> dict[str, Any]:
    """Return a policy in which one kind of stage acts, and watches."""
    guard: list[dict[str, Any]] = [] if kind == "nonfinite" else [{"nonfinite": {"max_consecutive": 5}}]
    shadow: list[dict[str, Any]] = [{"nonfinite": {"name": "watching_bad"}}] if kind == "agc" else []
    shadow += [{kind: {**STAGES[kind], "name": "watching"}}]
    return {"pipeline": [*guard, {kind: STAGES[kind]}], "shadow": shadow}


class Training:
    """A model in training under one kind of policy."""

    def __init__(self, root: Path, kind: str, mode: str, rank: int, world: int, scaled: bool) -> None:
        model: nn.Module = small_model()
        self.rank, self.world = rank, world
        self.model = nn.parallel.DistributedDataParallel(model) if world > 1 else model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=not scaled)
        self.scaler = GradScaler("cpu", enabled=scaled, init_scale=1024.0, growth_interval=3)
        self.agent = gradiometer.attach(
            self.model, self.optimizer, policy=policy_of(kind), dir=root, run_id=f"{kind}-{mode}", ring_bytes=2**20
        )

    def train(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            inputs = batch(step).chunk(self.world)[self.rank] * (1.0 + step % 5)
            loss = self.model(inputs).square().sum() * (float("nan") if step in BAD else 1.0)
            self.agent.log(loss=1.0 + step)
            backward(self.scaler.scale(loss))
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "agent": self.agent,
        }
        return {name: part.state_dict() for name, part in parts.items()}

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.agent.load_state_dict(state["agent"])


def main() -> None:
    rank, world, port, root = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    mode, scaled, kinds = sys.argv[5], sys.argv[6] == "scaled", sys.argv[7:]
    if world > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    trainings = [Training(root, kind, mode, rank, world, scaled) for kind in kinds]
    for kind, training in zip(kinds, trainings, strict=True):
        checkpoint = root / f"{kind}-{rank}.pt"
        if mode == "resumed":
            training.load(checkpoint)
            training.train(range(HALF, STEPS))
        else:
            training.train(range(HALF if mode == "killed" else STEPS))
        if mode == "killed":
            torch.save(training.state_dict(), checkpoint)
        else:
            training.agent.detach()
            torch.save(list(training.model.parameters()), root / f"{kind}-{mode}-{rank}.pt")
    if mode == "killed":
        sys.stdout.write("saved\n")
        sys.stdout.flush()
        trainings[0].train(itertools.cycle((1, 2, 4, 5)))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
