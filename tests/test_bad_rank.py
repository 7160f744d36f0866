"""Real processes over gloo: whose batch was bad, whose gradients are large, and the noise scale of all ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gradiometer
from gradiometer.insight import bad_episodes, rank_ratios, replicas
from gradiometer.records import Flag
from gradiometer.report import summarize
from gradiometer_monitor.exposition.exposition import Exposition
from gradiometer_monitor.following.runs import Runs
from tests._job import run_ranks
from tests.test_insight import SCALE

pytestmark = pytest.mark.slow
"""All of them together take long: the wheel's tests leave them out."""

PREAMBLE = """
import math, os, sys, torch, gradiometer, gradiometer.updates
from torch import nn
rank, world, port, root = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
torch.manual_seed(0)
"""
EPILOGUE = """
torch.distributed.barrier()
torch.distributed.destroy_process_group()
sys.stdout.flush()
os._exit(0)  # gloo's threads abort one Python of some forty that ends by itself, with or without an agent
"""
BAD_BATCHES = """
BAD = {5: [2], 12: [0, 1], 20: [1]}
class Poison(torch.autograd.Function):
    forward = staticmethod(lambda ctx, values: values.clone())
    backward = staticmethod(lambda ctx, gradient: gradient * math.nan)
model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.poisoned = model, False
    def forward(self, values):
        for place, layer in enumerate(self.layers):
            values = layer(values)
            if place == 2 and self.poisoned:
                values = Poison.apply(values)
        return values
model = Model()
wrapped = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
with gradiometer.attach(wrapped, optimizer, policy=["nonfinite"], dir=root) as agent:
    for step in range(24):
        tokens = torch.randint(9, (8,), generator=torch.Generator().manual_seed(step * world + rank))
        model.poisoned = step == 20 and rank in BAD[20]
        loss = wrapped(tokens).square().mean() * (100.0 if rank == 1 else 1.0)
        if step in (5, 12) and rank in BAD[step]:
            loss = loss * math.nan
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert agent.errors == 0
"""
REGRESSION = """
from tests.test_insight import Regression
case = Regression(seed=rank)
wrapped = nn.parallel.DistributedDataParallel(case.model)
case.model = wrapped
with gradiometer.attach(wrapped, case.optimizer, dir=root, backward="every") as agent:
    for step in range(400):
        case.optimizer.zero_grad()
        with wrapped.no_sync():
            (case.loss() / 2).backward()
        (case.loss() / 2).backward()
        case.optimizer.step()
"""
UNWRAPPED = """
model = nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with gradiometer.attach(model, optimizer, dir=root, backward="off") as agent:
    model(torch.ones(2, 4)).sum().mul(math.nan if rank else 1.0).backward()
    for parameter in model.parameters():
        torch.distributed.all_reduce(parameter.grad)
    optimizer.step()
"""


def launch(tmp_path: Path, body: str, world: int) -> Path:
    """Run a script on ranks of their own, wait for them, and return the directory of their run."""
    run_ranks(["-c", PREAMBLE + body + EPILOGUE], world, tmp_path)
    (run,) = tmp_path.iterdir()
    return run


@pytest.fixture(scope="module")
def bad_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on three ranks in mode auto, with three bad steps, none of them armed, and one rank with a large loss."""
    return launch(tmp_path_factory.mktemp("bad"), BAD_BATCHES, 3)


def flagged(run: Path, flag: Flag) -> dict[int, list[int]]:
    """Map each rank to the steps that have a flag."""
    found = {}
    for rank in range(3):
        rows = gradiometer.open_run(run, rank).rows
        found[rank] = rows["step"][(rows["flags"] & flag) != 0].tolist()
    return found


def test_the_bad_steps_were_not_armed(bad_run: Path) -> None:
    """The steps in question are seen on every rank as non-finite, and had no backward hooks but the ones that stay."""
    for rank in range(3):
        run = gradiometer.open_run(bad_run, rank)
        assert np.flatnonzero(run.nonfinite).tolist() == [5, 12, 20]
        assert set(flagged(bad_run, Flag.HOOKED)[rank]).isdisjoint([5, 12, 20])
        assert run.manifest.data_parallel == 3


def test_each_rank_knows_whether_it_was_its_own_batch(bad_run: Path) -> None:
    """The flag is on the very steps and ranks whose batch was bad, and every step was looked at on every rank."""
    assert flagged(bad_run, Flag.OWN_NONFINITE) == {0: [12], 1: [12, 20], 2: [5]}
    assert flagged(bad_run, Flag.OWN_WATCHED) == {rank: list(range(24)) for rank in range(3)}


def test_the_events_say_whose_it_was(bad_run: Path) -> None:
    """Each rank's incident says in words whether the batch was its own."""
    said = {}
    for rank in range(3):
        events = [event for event in gradiometer.open_run(bad_run, rank).events if event["kind"] == "nonfinite"]
        said[rank] = [event["own"] for event in events]
        for event in events:
            assert ("came from this rank's own batch" in event["message"]) == event["own"]
            assert ("look at the other ranks" in event["message"]) != event["own"]
    assert said == {0: [False, True, False], 1: [False, True, True], 2: [True, False, False]}


def test_the_bad_ranks_are_named(bad_run: Path) -> None:
    """Over all ranks every episode has exactly its ranks, also where NaN began in the middle of a backward pass."""
    episodes = bad_episodes(bad_run)
    assert [(episode.step, episode.ranks, episode.unknown) for episode in episodes] == [
        (5, (2,), ()),
        (12, (0, 1), ()),
        (20, (1,), ()),
    ]


def test_the_large_rank_is_named(bad_run: Path) -> None:
    """The rank whose loss is a hundred times the others' has a gradient to match, and no other stands out."""
    ratios = rank_ratios(bad_run)
    assert 20 < ratios[1] < 500
    assert max(ratios[0], ratios[2]) < 3


def test_show_names_them(bad_run: Path) -> None:
    """``gradiometer show`` says it in words, and as JSON."""
    command = [sys.executable, "-m", "gradiometer.cli", "show", str(bad_run)]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "step 5: rank 2; step 12: rank 0, rank 1; step 20: rank 1" in text
    assert "large gradients on" in text
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60, check=True)
    found = json.loads(done.stdout)
    assert [episode["ranks"] for episode in found["bad_ranks"]] == [[2], [0, 1], [1]]
    assert list(found["large_ranks"]) == ["1"]


def test_the_monitor_counts_them(bad_run: Path) -> None:
    """Each rank has a counter of its own bad steps, and the norm of its own gradients."""
    runs = Runs(bad_run.parent, retention_seconds=1e12)
    runs.poll()
    text = Exposition(runs, series_budget=1000).render().decode()
    runs.close()
    for rank, steps in ((0, 1), (1, 2), (2, 1)):
        assert f'gradiometer_rank_nonfinite_total{{run_id="{bad_run.name}",rank="{rank}"}} {steps}\n' in text
    assert text.count("gradiometer_rank_microbatch_norm_last{") == 3


def test_the_monitor_sees_that_the_ranks_agree(bad_run: Path) -> None:
    """After the reduction a NaN is every rank's: none is apart or behind, and what was skipped moved no parameter."""
    runs = Runs(bad_run.parent, retention_seconds=1e12)
    runs.poll()
    text = Exposition(runs, series_budget=1000).render().decode()
    runs.close()
    for rank in range(3):
        labels = f'{{run_id="{bad_run.name}",rank="{rank}"}}'
        assert f"gradiometer_rank_norm_deviation{labels} 0.0\n" in text
        assert f"gradiometer_rank_steps_behind{labels} 0\n" in text
        assert f"gradiometer_rank_lag_seconds{labels} " in text
    assert f'gradiometer_nonfinite_updates_total{{run_id="{bad_run.name}"}} 0\n' in text
    assert f'gradiometer_skipped_steps_in_a_row{{run_id="{bad_run.name}"}} 1\n' in text


def test_the_noise_scale_of_two_ranks(tmp_path: Path) -> None:
    """With two ranks of two micro-batches each, N is 4, and each rank and both together give the known scale."""
    run = launch(tmp_path, REGRESSION, 2)
    for rank in range(2):
        opened = gradiometer.open_run(run, rank)
        assert (opened.manifest.data_parallel, set(opened.rows["microbatches"])) == (2, {2})
        assert opened.noise_scale().scale == pytest.approx(SCALE, rel=0.12)


def test_what_was_not_looked_at_is_unknown(tmp_path: Path) -> None:
    """Without hooks no rank claims to know, and without DistributedDataParallel the number of replicas is unknown."""
    run = launch(tmp_path, UNWRAPPED, 2)
    opened = gradiometer.open_run(run)
    assert replicas(opened.manifest) is None
    (episode,) = bad_episodes(run)
    assert (episode.ranks, episode.unknown) == ((), (0, 1))
    assert summarize(opened)["bad_ranks"] == [{"step": 0, "parameter": episode.parameter, "ranks": []}]
    assert "batch" not in opened.events[-1]["message"]
