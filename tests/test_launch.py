"""``gradiometer run`` on programs that know nothing of gradiometer: what stays theirs, and how it is started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gradiometer
from gradiometer import open_run
from gradiometer.launch import INJECTED
from gradiometer.records import Flag, State
from tests._launch import CLI, CLIP, PLAIN, execute, launch, numbers, recorded, script, the_run

pytestmark = pytest.mark.slow


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


STEP = "    optimizer.step()\n"
LATE = PLAIN.replace(STEP, "").replace("    if ", f"{STEP}    if ")
"""A script that clips gradients which have been used."""


@pytest.mark.parametrize("verbose", [False, True])
def test_what_a_program_does_wrong_is_in_the_record(tmp_path: Path, verbose: bool) -> None:
    """Misuse is an event of the run; the program's stderr stays its own unless more was asked for."""
    path = script(tmp_path, LATE)
    alone = execute(sys.executable, path, "--clip")
    measured = launch(tmp_path, sys.executable, path, "--clip", options=["-v"] if verbose else [])
    assert (measured.returncode, measured.stdout) == (3, alone.stdout)
    (event,) = (event for event in the_run(tmp_path).events if event["kind"] == "clip_misuse")
    assert "after optimizer.step()" in event["message"]
    assert (event["message"] in measured.stderr) is verbose
    assert verbose or measured.stderr == alone.stderr


def test_updates_and_cosines(tmp_path: Path) -> None:
    """Which steps are sampled, whether cosines are measured, and the ring's size are the user's choice here too."""
    options = ["--updates-every", "2", "--cosine", "--ring-bytes", str(2**20)]
    launch(tmp_path, sys.executable, script(tmp_path, PLAIN), options=options)
    assert the_run(tmp_path).manifest.ring.file_bytes <= 2**20 + 4096
    samples = the_run(tmp_path).samples
    assert samples is not None
    assert samples.steps.tolist() == [0, 2]
    assert np.isfinite(samples.total_cosine).tolist() == [False, True]


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
        (["--cosine", "--updates-every", "0"], ["true"], "--cosine"),
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
