"""One rank of the training that the dashboards are proved with: ``python -m tests._dashboard_job RANK PORT ROOT``.

It begins when it is told to, and trains until it is killed. What happens, and when, is known: spikes of one layer, a
step that one rank's batch makes non-finite, and from some step on a layer that vanishes and one that explodes.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests._training import attach, backward

__all__ = ["LAYERS", "POLICY", "RUN", "SICK_FROM", "SPIKED_LAYER", "SPIKES", "WORLD", "go"]

RUN, WORLD = "job", 2
LAYERS = ("embed", "middle", "late", "head")
SPIKED_LAYER, SPIKES, NONFINITE = "middle", (60, 140, 220), 180
SICK_FROM = 260
"""From this step on ``late`` vanishes and ``embed`` explodes."""
PAUSE_SECONDS = 0.01
POLICY: dict[str, Any] = {
    "pipeline": [{"nonfinite": {}}, {"global_norm": {"max_norm": 0.5}}],
    "shadow": [{"global_norm": {"name": "tighter", "max_norm": 0.1}}],
    "actions": [{"when": {"norm_above": 100.0}, "do": "event", "cooldown": 50}],
}


def go(root: Path) -> None:
    """Let the training begin; before, it has attached and waits: counters are to be seen at zero."""
    Path(f"{root}-go").touch()


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = zip(LAYERS, (nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)), strict=True)
    return nn.Sequential(OrderedDict(layers))


def _disturb(model: nn.Sequential, step: list[int]) -> None:
    """Scale the gradients of some layers in some steps, before the ranks reduce them."""

    def scale(layer: str) -> float:
        if layer == SPIKED_LAYER and step[0] in SPIKES:
            return 1e4
        sick = {"late": 1e-12, "embed": 100.0} if step[0] >= SICK_FROM else {}
        return sick.get(layer, 1.0)

    def hook(layer: str) -> Any:
        return lambda gradient: gradient * scale(layer)

    for name, layer in model.named_children():
        for parameter in layer.parameters():
            parameter.register_hook(hook(name))  # type: ignore[no-untyped-call]  # torch


def _batch(step: int, rank: int) -> Tensor:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(2 * step + rank))
    return inputs * torch.nan if (step, rank) == (NONFINITE, 1) else inputs


def main(rank: int, port: str, root: str) -> None:
    """Train until killed."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    model, step = _model(), [0]
    _disturb(model, step)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-4)
    options: dict[str, Any] = {"backward": "every", "updates_every": 20, "cosine": True, "labels": {"team": "proof"}}
    with attach(Path(root), parallel, optimizer, policy=POLICY, run_id=RUN, **options) as agent:
        while not Path(f"{root}-go").exists():
            time.sleep(0.05)
        while True:
            optimizer.zero_grad()
            for part in range(2):
                loss = (parallel(_batch(step[0], rank) + part) - 1.0).square().mean()
                backward(loss)
            optimizer.step()
            agent.log(loss=loss.detach())
            step[0] += 1
            time.sleep(PAUSE_SECONDS)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
