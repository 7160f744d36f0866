"""Two real processes over gloo that clip by themselves: replicated parameters, and sharded ones of another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradiometer
from tests._job import run_ranks

WORKER = """
import json, os, sys, torch, gradiometer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.utils import clip_grad_norm_
rank, port, root = int(sys.argv[1]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

def clip_sharded():
    model = make()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    torch.manual_seed(rank)
    model(torch.randn(8, 4)).square().sum().backward()
    with CommDebugMode() as talk:
        total = clip_grad_norm_(model.parameters(), 0.5)
        whole = total.full_tensor()
    gradients = [parameter.grad.full_tensor().flatten() for parameter in model.parameters()]
    return [talk.get_total_counts(), whole.item(), torch.cat(gradients).tolist()]

bare = clip_sharded()
model = nn.parallel.DistributedDataParallel(make())
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
totals = []
with gradiometer.attach(model, optimizer, dir=root, ring_bytes=2**20) as agent:
    for step in range(4):
        torch.manual_seed(2 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().sum().backward()
        totals.append(clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
    heard = clip_sharded()
print(json.dumps({"bare": bare, "heard": heard, "totals": totals, "errors": agent.errors}))
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads abort one Python of some forty that ends by itself, with or without an agent
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Train on two ranks and return what each said, with the run that it recorded."""
    root: Path = tmp_path_factory.mktemp("ranks")
    said = run_ranks(["-c", WORKER], 2, root)
    (run,) = root.iterdir()
    return [json.loads(each) | {"run": gradiometer.open_run(run, rank)} for rank, each in enumerate(said)]


def test_replicated_parameters(ranks: list[dict[str, Any]]) -> None:
    """Under DistributedDataParallel every rank records the same norms before the clip, those that torch returned."""
    for rank in ranks:
        run = rank["run"]
        np.testing.assert_allclose(run.grad_norm_preclip, rank["totals"], rtol=1e-6)
        np.testing.assert_allclose(run.grad_norm_postclip, 0.5, rtol=1e-5)
        assert run.own_clipping["clip_grad_norm_"].all()
        assert rank["errors"] == 0
    assert ranks[0]["totals"] == ranks[1]["totals"]


def test_sharded_parameters_of_another_model(ranks: list[dict[str, Any]]) -> None:
    """Gradients that are DTensors are clipped as without an agent, to the bit and with not one collective more."""
    for rank in ranks:
        assert rank["heard"] == rank["bare"]
    assert ranks[0]["bare"][0] == 1
