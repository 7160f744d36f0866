"""``gradiometer run`` on programs that know nothing of gradiometer: real processes, started as a user starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import gradiometer
from gradiometer import Run, open_run
from gradiometer.launch import INJECTED
from gradiometer.records import Flag, State, find_runs

if TYPE_CHECKING:
    from tests.conftest import Spawn

CLI = (sys.executable, "-m", "gradiometer.cli", "run")
Done = subprocess.CompletedProcess[str]
HEAD = """
import json, math, os, sys, copy, torch
from torch import nn
torch.manual_seed(0)

def norm(*models):
    return math.sqrt(math.fsum(g.double().square().sum().item() for m in models for p in m.parameters()
                               if (g := p.grad) is not None))

def net():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

def loss_of(model):
    return model(torch.randn(16, 4)).square().sum()
"""
PLAIN = """
from torch.nn.utils import clip_grad_norm_
model = net()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for step in range(4):
    optimizer.zero_grad()
    loss_of(model).backward()
    print(norm(model))
    if "--clip" in sys.argv:
        clip_grad_norm_(model.parameters(), 2.0)
    optimizer.step()
print(sys.stdin.read(), [round(p.double().sum().item(), 6) for p in model.parameters()])
print("done", file=sys.stderr)
sys.exit(3)
"""
CLIP = "version: 1\npipeline:\n  - global_norm: {max_norm: 2.0}\n"


def script(tmp_path: Path, body: str) -> str:
    """Write a training script, and return its path."""
    path = tmp_path / "train.py"
    path.write_text(HEAD + textwrap.dedent(body))
    return str(path)


def execute(*words: str | Path, **environment: str) -> Done:
    """Run a command to its end, with something to read on stdin."""
    return subprocess.run(
        [str(word) for word in words],
        input="typed",
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
        check=False,
    )


def launch(tmp_path: Path, *command: str, options: Sequence[str] = (), **environment: str) -> Done:
    """Run a command below ``gradiometer run``, with the run id ``job``."""
    return execute(*CLI, "--dir", tmp_path / "runs", "--run-id", "job", *options, "--", *command, **environment)


def train(tmp_path: Path, body: str, *options: str, **environment: str) -> Done:
    """Run a script below ``gradiometer run``, and see it succeed."""
    done = launch(tmp_path, sys.executable, script(tmp_path, body), options=options, **environment)
    assert done.returncode == 0, done.stderr
    return done


def recorded(tmp_path: Path) -> dict[str, Run]:
    """Open the runs that were recorded, by id."""
    return {path.name: open_run(path) for path in find_runs(tmp_path / "runs")}


def the_run(tmp_path: Path) -> Run:
    """Open the one run that was recorded, under the id that was asked for."""
    runs = recorded(tmp_path)
    assert list(runs) == ["job"]
    return runs["job"]


def numbers(text: str) -> list[float]:
    """Read the lines of a program's output that are a number."""
    return [float(line) for line in text.splitlines() if line.replace(".", "").replace("e-", "").isdigit()]


def test_a_program_runs_as_it_would_alone(tmp_path: Path) -> None:
    """Output, errors, input and exit status are the program's own, and every step is recorded from the first on."""
    path = script(tmp_path, PLAIN)
    alone = execute(sys.executable, path)
    measured = launch(tmp_path, sys.executable, path)
    assert (measured.returncode, measured.stdout, measured.stderr) == (3, alone.stdout, alone.stderr)
    assert alone.stderr == "done\n"
    run = the_run(tmp_path)
    np.testing.assert_allclose(run.grad_norm_preclip, numbers(alone.stdout), rtol=1e-6)
    assert len(run) == 4
    assert run.parameters == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert run.status["state"] == State.FINISHED
    assert run.manifest.job == "train.py"


def test_a_policy_clips_as_torch_does(tmp_path: Path) -> None:
    """With a policy the program moves its parameters as if it clipped by itself; labels and modes are passed on."""
    path, policy = script(tmp_path, PLAIN), tmp_path / "policy.yaml"
    policy.write_text(CLIP)
    clipping = execute(sys.executable, path, "--clip")
    options = ["--policy", str(policy), "--label", "team=speech", "--label", "try=a=b", "--backward", "every"]
    clipped = launch(tmp_path, sys.executable, path, options=options)
    assert clipped.stdout == clipping.stdout
    assert clipped.stdout != execute(sys.executable, path).stdout
    run = the_run(tmp_path)
    assert run.clipped[:, 0].all()
    assert run.manifest.labels == {"team": "speech", "try": "a=b"}
    assert [bool(flags & Flag.HOOKED) for flags in run.rows["flags"]] == [False, True, True, True]


@pytest.mark.parametrize(
    ("options", "command", "complaint"),
    [
        (["--policy", "nowhere.yaml"], ["true"], "nowhere.yaml"),
        (["--dir", __file__], ["true"], Path(__file__).name),
        (["--run-id", "a/b"], ["true"], "run_id 'a/b'"),
        (["--label", "team"], ["true"], "--label 'team'"),
        (["--label", "no-name=1"], ["true"], "no-name"),
        ([], ["no-such-program"], "no-such-program"),
        ([], ["no-such-script.py"], "no-such-script.py"),
        ([], [sys.executable, "-uI", "train.py"], "-uI"),
        ([], [], "nothing to run"),
    ],
)
def test_what_cannot_be_started_is_one_line(
    tmp_path: Path, options: list[str], command: list[str], complaint: str
) -> None:
    """A wrong setting or command is one line on stderr and status 2, before anything is started or recorded."""
    done = execute(*CLI, "--dir", tmp_path, *options, "--", *command)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_script_or_a_module_is_for_this_python(tmp_path: Path) -> None:
    """``-- train.py``, ``-- -m module`` and ``-- -c code`` run under the Python of gradiometer, without torch too."""
    (tmp_path / "hello.py").write_text("import sys; print(sys.argv[1:], 'torch' in sys.modules)")
    for command in (["hello.py"], ["-m", "hello"]):
        done = subprocess.run(
            [*CLI, "--dir", tmp_path, "--", *command, "--", "-v", "--dir"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == "['--', '-v', '--dir'] False\n"


def test_a_policy_that_fits_nothing_stops_the_program(tmp_path: Path) -> None:
    """A pattern that covers no parameter is found out at the first step, which is not taken."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\npipeline:\n  - global_norm: {max_norm: 1.0, match: 'decoder.*'}\n")
    done = launch(tmp_path, sys.executable, script(tmp_path, PLAIN), options=["--policy", str(policy)])
    assert done.returncode == 1
    assert len(numbers(done.stdout)) == 1
    assert "gradiometer run: the policy cannot be applied" in done.stderr.splitlines()[-1]
    assert "decoder.*" in done.stderr.splitlines()[-1]
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_cannot_be_measured_is_warned_of_once(tmp_path: Path) -> None:
    """Without a policy, a failure to attach is one warning, and the program goes on as if it were alone."""
    body = "import shutil; shutil.rmtree(sys.argv[1]); open(sys.argv[1], 'w').close()\n" + PLAIN
    path = script(tmp_path, body)
    done = launch(tmp_path, sys.executable, path, str(tmp_path / "runs"))
    assert done.returncode == 3
    assert len(numbers(done.stdout)) == 4
    assert done.stderr.count("gradiometer run: Adam is not measured") == 1
    assert "Traceback" not in done.stderr


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
    gradiometer.automatic.PATIENCE = 1.0
    torch.optim.SGD(net().parameters(), lr=0.1).step()
dist.barrier()
late = torch.optim.SGD(nn.parallel.DistributedDataParallel(nn.Linear(4, 4)).parameters(), lr=0.1)
late.step()
dist.barrier()
dist.destroy_process_group()
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


OWN = """
import gradiometer
model, other = net(), net()
optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, other)]
if "late" in sys.argv:
    for each in optimizers: each.step()
agent = gradiometer.attach(model, optimizers[0], dir=sys.argv[1], run_id="own")
for step in range(3):
    for each in optimizers: each.step()
"""


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_program_with_an_agent_of_its_own_is_left_to_it(tmp_path: Path, when: str) -> None:
    """A program that attaches has its way, and what was attached for it before ends there."""
    done = launch(tmp_path, sys.executable, script(tmp_path, OWN), str(tmp_path / "runs"), when)
    assert done.returncode == 0, done.stderr
    runs = recorded(tmp_path)
    assert len(runs["own"]) == 3
    assert sorted(runs) == (["job", "own"] if when == "late" else ["own"])
    if when == "late":
        assert len(runs["job"]) == 2


def test_the_inner_of_two_launches_counts(tmp_path: Path) -> None:
    """A launch within a launch takes its own settings, and the program is measured once."""
    inner = [*CLI, "--dir", str(tmp_path / "inner"), "--run-id", "inner", "--", sys.executable]
    done = launch(tmp_path, *inner, script(tmp_path, PLAIN))
    assert done.returncode == 3, done.stderr
    assert [path.name for path in tmp_path.glob("*/*/rank-00000")] == ["rank-00000"]
    assert len(open_run(tmp_path / "inner" / "inner")) == 4


LOOK = """
import json, os, sys
marks = [type(each).__name__ for each in sys.meta_path]
print(json.dumps({"path": sys.path, "modules": sorted(sys.modules), "said": os.environ.get("SAID"), "marks": marks}))
"""


def test_other_processes_are_hardly_touched(tmp_path: Path) -> None:
    """A Python without torch has its path and its modules, and the sitecustomize and PYTHONPATH that it had."""
    (tmp_path / "sitecustomize.py").write_text("import os; os.environ['SAID'] = 'hello'")
    (tmp_path / "look.py").write_text(LOOK)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    for environment in ({}, {"PYTHONPATH": path}, {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}):
        alone = json.loads(execute(sys.executable, tmp_path / "look.py", **environment).stdout)
        below = json.loads(launch(tmp_path, sys.executable, str(tmp_path / "look.py"), **environment).stdout)
        assert below["path"] == alone["path"]
        assert below["said"] == alone["said"] == ("hello" if environment else None)
        assert set(below["modules"]) - set(alone["modules"]) <= {"sitecustomize", "__future__"}
        assert below["marks"] == ["_ImportWatch", *alone["marks"]]


def test_a_sitecustomize_that_fails_says_what_it_said(tmp_path: Path) -> None:
    """The error of somebody else's sitecustomize is told as it would be without us."""
    (tmp_path / "sitecustomize.py").write_text("raise ZeroDivisionError('theirs')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    alone = execute(sys.executable, "-c", "", PYTHONPATH=path)
    below = launch(tmp_path, sys.executable, "-c", "", PYTHONPATH=path)
    assert "theirs" in alone.stderr
    assert below.stderr == 2 * alone.stderr  # our command is a Python too


def test_an_interpreter_without_gradiometer_is_warned_of(tmp_path: Path) -> None:
    """Where the program's Python has no gradiometer, it runs unharmed and one warning says so; a policy stops it."""
    libraries = Path(torch.__file__).parents[1]
    if (libraries / "gradiometer").exists():
        pytest.skip("gradiometer is installed beside torch: no environment has the one without the other")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=60)
    (site_packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site_packages / "torch.pth").write_text(str(libraries))
    python = str(tmp_path / "venv" / "bin" / "python")
    starter = "import os, sys; os.environ['PYTHONPATH'] = sys.argv[1]; os.execv(sys.argv[2], sys.argv[2:])"
    command = [sys.executable, "-c", starter, str(INJECTED), python, script(tmp_path, PLAIN)]
    done = launch(tmp_path, *command)
    assert done.returncode == 3
    assert len(numbers(done.stdout)) == 4
    assert done.stderr.count("No module named 'gradiometer'") == 1
    (tmp_path / "policy.yaml").write_text(CLIP)
    stopped = launch(tmp_path, *command, options=["--policy", str(tmp_path / "policy.yaml")])
    assert stopped.returncode == 1
    assert "The policy cannot be applied" in stopped.stderr.splitlines()[-1]


def test_settings_that_cannot_be_read_are_warned_of(tmp_path: Path) -> None:
    """A program whose settings are another version's, or no settings at all, runs unharmed and unmeasured."""
    path = os.pathsep.join([str(INJECTED), os.environ.get("PYTHONPATH", "")])
    done = execute(sys.executable, script(tmp_path, PLAIN), PYTHONPATH=path, GRADIOMETER_RUN="1")
    assert done.returncode == 3
    assert len(numbers(done.stdout)) == 4
    assert done.stderr.count("Adam is not measured: GRADIOMETER_RUN is '1'") == 1


WAIT = """
import signal, time
model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer.step()
print("ready", signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "status", "state"),
    [(signal.SIGTERM, -signal.SIGTERM, State.RUNNING), (signal.SIGINT, -signal.SIGINT, State.FINISHED)],
)
def test_signals_reach_the_program(tmp_path: Path, number: signal.Signals, status: int, state: State) -> None:
    """A signal finds the program itself, which dies of it as it would; only Python's own exit finishes the run."""
    command = [*CLI, "--dir", tmp_path / "runs", "--run-id", "job", "--", sys.executable, script(tmp_path, WAIT)]
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready True\n"
        process.send_signal(number)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status
    assert the_run(tmp_path).status["state"] == state


def test_signals_are_ignored_or_not_as_before(tmp_path: Path) -> None:
    """A program that is no Python finds the signals that Python ignores at their defaults."""
    look = ["grep", "SigIgn", "/proc/self/status"]
    assert launch(tmp_path, *look).stdout == execute(*look).stdout


def test_verbose_tells_where(tmp_path: Path) -> None:
    """``--verbose`` tells the run at the start and its directory at the first step, on stderr alone."""
    done = launch(tmp_path, sys.executable, script(tmp_path, PLAIN), options=["--verbose"])
    assert "gradiometer" not in done.stdout
    assert done.stderr.splitlines()[0] == f"gradiometer: run job in {tmp_path / 'runs'}"
    assert str(tmp_path / "runs" / "job" / "rank-00000") in done.stderr


def test_the_package_has_what_is_injected() -> None:
    """The file that the environment leads to comes with the package."""
    assert INJECTED.parent == Path(gradiometer.__file__).parent
    assert [path.name for path in INJECTED.glob("*.py")] == ["sitecustomize.py"]
