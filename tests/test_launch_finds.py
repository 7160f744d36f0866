"""What ``gradiometer run`` finds in programs: models, optimizers, wrappers, ranks, processes and threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from gradiometer import open_run
from gradiometer.records import State, find_runs
from tests._launch import CLI, CLIP, execute, launch, numbers, recorded, script, the_run, train

pytestmark = pytest.mark.slow
"""All of them together take long: the wheel's tests leave them out."""

if TYPE_CHECKING:
    from tests.conftest import Spawn

GAN = """
def step(net, optimizer, loss):
    G.zero_grad(); D.zero_grad()
    loss().backward()
    print(norm(net))
    optimizer.step()

G, D, D_ema = net(), nn.Sequential(nn.Linear(2, 1)), None
g_opt, d_opt = torch.optim.Adam(G.parameters()), torch.optim.SGD(D.parameters(), lr=0.1)
D_ema = copy.deepcopy(D)
for _ in range(3):
    step(D, d_opt, lambda: D(G(torch.randn(8, 4)).detach()).square().sum())
    step(G, g_opt, lambda: D(G(torch.randn(8, 4))).square().sum())
"""


def test_two_models_with_losses_of_their_own(tmp_path: Path) -> None:
    """A GAN is one run: its models go by the script's names, copies are left out, each step is a row by itself."""
    done = train(tmp_path, GAN)
    run = the_run(tmp_path)
    assert sorted({name.split(".")[0] for name in run.parameters}) == ["D", "G"]
    assert len(run.parameters) == 6
    assert len(set(run.optimizer[::2])) == len(set(run.optimizer[1::2])) == 1
    np.testing.assert_allclose(run.grad_norm_preclip, numbers(done.stdout), rtol=1e-6)
    assert "do not step together" not in done.stderr


TOGETHER = """
model = net()
optimizers = [torch.optim.SGD([p for p in model.parameters() if p.dim() == n], lr=0.1) for n in (2, 1)]
for _ in range(3):
    model.zero_grad()
    loss_of(model).backward()
    print(norm(model))
    for each in optimizers:
        each.step()
late = torch.optim.SGD(net().parameters(), lr=0.1)
late.step()
second = torch.optim.LBFGS(model.parameters(), max_iter=2)
def closure():
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return loss
second.step(closure)
"""


def test_two_optimizers_of_one_model_and_two_later_ones(tmp_path: Path) -> None:
    """Optimizers that share a model's backward pass share its rows; one that steps later has a run of its own."""
    done = train(tmp_path, TOGETHER)
    runs = recorded(tmp_path)
    assert sorted(runs) == ["job", "job-2", "job-3"]
    np.testing.assert_allclose(runs["job"].grad_norm_preclip, numbers(done.stdout), rtol=1e-6)
    assert len(runs["job"].manifest.optimizers) == 2
    assert runs["job-3"].manifest.optimizers == ("LBFGS",)
    assert runs["job-3"].parameters == runs["job"].parameters
    assert [len(runs[name]) for name in ("job-2", "job-3")] == [1, 1]


WRAPPED = """
from torch.optim import Optimizer

class Outer(Optimizer):  # as Lookahead, SAM and their kin do
    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})
    def step(self, closure=None):
        return self.inner.step(closure)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = net()
        self.head = nn.Linear(2, 1)
    def forward(self, inputs):
        return self.head(self.body(inputs))

class Lazy:  # what it is, and what it has, is found out when it is asked for: as in packages that load late
    @property
    def __class__(self):
        print("asked")
        return int
    def __getattr__(self, name):
        print("asked")

lazy, model = Lazy(), Model()
twin = torch.optim.swa_utils.AveragedModel(model)
peek = nn.Sequential(model.body)
compiled = torch.compile(model, backend="eager")
optimizer = Outer(torch.optim.Adam(model.parameters()))
schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
def closure():
    optimizer.zero_grad()
    loss = loss_of(compiled)
    loss.backward()
    print(norm(model))
    return loss
for _ in range(3):
    optimizer.step(closure)
    schedule.step()
"""


@pytest.mark.parametrize("policy", [False, True])
def test_wrappers_copies_and_closures(tmp_path: Path, policy: bool) -> None:
    """A compiled model has its plain names, an optimizer within another is not counted again, a closure is awaited."""
    (tmp_path / "policy.yaml").write_text(CLIP)
    done = train(tmp_path, WRAPPED, *(["--policy", str(tmp_path / "policy.yaml")] if policy else []))
    run = the_run(tmp_path)
    assert run.parameters[-2:] == ["head.weight", "head.bias"]
    assert len(run.parameters) == 6
    assert run.parameters[0] == "body.0.weight"
    np.testing.assert_allclose(run.grad_norm_preclip, numbers(done.stdout), rtol=1e-6)
    assert run.clipped.any() == policy
    assert "asked" not in done.stdout


COMPILED = """
class Own(torch.optim.Optimizer):  # of those whose step can be compiled whole
    def __init__(self, parameters):
        super().__init__(parameters, {})
    def step(self, closure=None):
        with torch.no_grad():
            for each in self.param_groups[0]["params"]:
                each.sub_(each.grad * 0.1)

whole = "whole" in sys.argv
model = net()
optimizer = Own(model.parameters()) if whole else torch.optim.SGD(model.parameters(), lr=0.1)
step = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=whole)
for _ in range(3):
    optimizer.zero_grad()
    loss_of(model).backward()
    print(norm(model))
    step()
"""


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_step(tmp_path: Path, whole: bool) -> None:
    """The first step is measured though it is being compiled; one that may not leave its graph is left alone."""
    words = [sys.executable, script(tmp_path, COMPILED), *(["whole"] if whole else [])]
    done = launch(tmp_path, *words)
    assert (done.returncode, done.stdout) == (0, execute(*words).stdout), done.stderr
    if whole:
        assert recorded(tmp_path) == {}
    else:
        np.testing.assert_allclose(the_run(tmp_path).grad_norm_preclip, numbers(done.stdout), rtol=1e-6)


SCALED = """
model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
for step in range(4):
    optimizer.zero_grad()
    scaler.scale(loss_of(model) * (math.inf if step == 0 else 1.0)).backward()
    print(norm(model) / scaler.get_scale())
    scaler.step(optimizer)
    scaler.update()
"""


def test_a_grad_scaler_that_skips_the_first_step(tmp_path: Path) -> None:
    """What a GradScaler skips is recorded from the very first step, which no optimizer is told of."""
    done = train(tmp_path, SCALED)
    run = the_run(tmp_path)
    assert run.skipped.tolist() == [True, False, False, False]
    np.testing.assert_allclose(run.grad_norm_preclip[1:], numbers(done.stdout)[-3:], rtol=1e-6)
    assert run.rows["loss_scale"].tolist() == [8.0, 4.0, 4.0, 4.0]


RANKS = """
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
dist.init_process_group("gloo")
rank = dist.get_rank()
model = nn.parallel.DistributedDataParallel(net())
optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.SGD, lr=0.1)
for step in range(3):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()
if rank == 1:  # the other rank does not train this one
    import gradiometer.automatic
    patience, gradiometer.automatic.PATIENCE = gradiometer.automatic.PATIENCE, 1.0
    torch.optim.SGD(net().parameters(), lr=0.1).step()
    gradiometer.automatic.PATIENCE = patience
dist.barrier()
late = torch.optim.SGD(nn.parallel.DistributedDataParallel(nn.Linear(4, 4)).parameters(), lr=0.1)
late.step()
dist.barrier()
dist.destroy_process_group()
import atexit, os, sys
atexit._run_exitfuncs()  # the end of a program, but for the end of Python: gloo's threads abort one of some forty there
sys.stderr.flush()
os._exit(0)
"""


def test_every_rank_of_torchrun_attaches(tmp_path: Path, free_port: int) -> None:
    """The ranks of a job are of one run; an optimizer that one rank has to itself hangs none, and is warned of."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port}"]
    done = launch(tmp_path, *command, script(tmp_path, RANKS), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("SGD is not measured: rank 0 did not call attach() within 1 s") == 1
    assert sorted(path.name for path in find_runs(tmp_path / "runs")) == ["job", "job-2"]
    first, second = (open_run(tmp_path / "runs" / "job", rank) for rank in range(2))
    assert (first.manifest.world_size, len(first), len(second)) == (2, 3, 3)
    assert first.manifest.optimizers == ("ZeroRedundancyOptimizer",)
    assert first.parameters == second.parameters == ["0.weight", "0.bias", "2.weight", "2.bias"]
    np.testing.assert_array_equal(first.grad_norm_preclip, second.grad_norm_preclip)
    assert len(open_run(tmp_path / "runs" / "job-2", 1)) == 1


def test_launches_on_two_hosts_are_one_run(tmp_path: Path, free_port: int, spawn: Spawn) -> None:
    """Ranks that were launched apart, each with a run id of its own making, agree on one."""
    words = [*CLI, "--dir", tmp_path / "runs", "--", sys.executable, script(tmp_path, RANKS)]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    ranks = [spawn(*words, env=os.environ | job | {"RANK": str(rank)}, stderr=subprocess.PIPE) for rank in range(2)]
    errors = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    run, _ = find_runs(tmp_path / "runs")
    assert [len(open_run(run, rank)) for rank in range(2)] == [3, 3]


SWEEP = """
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, TensorDataset

def work(index, lr):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for (inputs,) in DataLoader(TensorDataset(torch.randn(6, 4)), batch_size=2, num_workers=1):
        model(inputs).sum().backward()
        optimizer.step()

if __name__ == "__main__":
    workers = [mp.get_context(how).Process(target=work, args=(0, 0.1)) for how in ("fork", "fork", "spawn")]
    for each in workers: each.start()
    for each in workers: each.join(); assert each.exitcode == 0
"""


def test_processes_of_a_sweep_have_runs_of_their_own(tmp_path: Path) -> None:
    """Workers that train, forked or spawned, write a finished run each; those that load data write none."""
    train(tmp_path, SWEEP)
    runs = recorded(tmp_path)
    assert sorted(runs) == ["job", "job-2", "job-3"]
    assert {len(run) for run in runs.values()} == {3}
    assert {run.status["state"] for run in runs.values()} == {State.FINISHED}
    assert len({run.manifest.pid for run in runs.values()}) == 3


THREADS = """
import threading

def work():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ready.wait()  # all optimizers are there when the first of them steps
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()

ready = threading.Barrier(4)
threads = [threading.Thread(target=work) for _ in range(4)]
for each in threads: each.start()
for each in threads: each.join()
"""


def test_threads_that_train_have_runs_of_their_own(tmp_path: Path) -> None:
    """Models that are trained in threads side by side are recorded apart: an agent is for one thread."""
    train(tmp_path, THREADS)
    runs = recorded(tmp_path)
    assert sorted(runs) == ["job", "job-2", "job-3", "job-4"]
    assert {len(run) for run in runs.values()} == {20}
