"""Two real processes over gloo: what docs/attach.md says of DistributedDataParallel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import gradiometer
from tests._job import run_ranks

WORKER = """
import os, sys, torch, gradiometer
from torch import nn
rank, port, root = int(sys.argv[1]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
policy = [{"nonfinite": {}}, {"global_norm": {"max_norm": 0.5}}]
with gradiometer.attach(model, optimizer, policy=policy, dir=root, backward="every") as agent:
    for step in range(4):
        inputs = torch.linspace(-1, 1, 32).view(2, 4, 4)[rank] * (step + 1)
        if step == 2 and rank == 1:
            inputs = inputs * float("nan")
        optimizer.zero_grad()
        (model(inputs) - 3.0).square().mean().backward()
        optimizer.step()
torch.distributed.barrier()
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads abort one Python of some forty that ends by itself, with or without an agent
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[gradiometer.Run]:
    """Train on two ranks, with NaN in one rank's third batch, and read both records."""
    root = tmp_path_factory.mktemp("ddp")
    run_ranks(["-c", WORKER], 2, root)
    (run,) = root.iterdir()
    return [gradiometer.open_run(run, rank) for rank in range(2)]


def whole_batch_norms(steps: int) -> list[float]:
    """Compute the clipped training's norms in one process, over both ranks' batches at once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer, norms = torch.optim.SGD(model.parameters(), lr=0.1), []
    for step in range(steps):
        inputs = torch.linspace(-1, 1, 32).view(8, 4) * (step + 1)
        optimizer.zero_grad()
        (model(inputs) - 3.0).square().mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
    return norms


def test_every_rank_records_the_reduced_norms(ranks: list[gradiometer.Run]) -> None:
    """Both ranks have one run id and the norms of the whole batch, though each saw half of it."""
    assert ranks[0].manifest.run_id == ranks[1].manifest.run_id
    assert [run.manifest.rank for run in ranks] == [0, 1]
    np.testing.assert_array_equal(ranks[0].grad_norm_preclip, ranks[1].grad_norm_preclip)
    np.testing.assert_allclose(ranks[0].grad_norm_preclip[:2], whole_batch_norms(2), rtol=1e-5)


def test_a_bad_batch_on_one_rank_skips_the_step_on_both(ranks: list[gradiometer.Run]) -> None:
    """NaN spreads by the reduction, both ranks skip, and both go on alike."""
    assert [run.skipped.tolist() for run in ranks] == [[False, False, True, False]] * 2
    assert np.isfinite(ranks[0].grad_norm_preclip[3])


def test_micro_batch_norms_are_each_ranks_own(ranks: list[gradiometer.Run]) -> None:
    """Before the reduction the ranks' gradients differ, and the one that was not finite is told apart."""
    first, second = (run.stat("microbatch_norm") for run in ranks)
    assert not np.allclose(first[0], second[0])
    assert np.isfinite(first[2]).all()
    assert not np.isfinite(second[2]).any()


def test_names_have_no_wrapper_in_them(ranks: list[gradiometer.Run]) -> None:
    """Parameters are called what the model calls them, without DDP's prefix."""
    assert ranks[0].parameters == ["0.weight", "0.bias", "2.weight", "2.bias"]
