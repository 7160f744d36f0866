"""The demo, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import gradiometer
from gradiometer.demo import DemoError, read_text
from gradiometer.records import State

if TYPE_CHECKING:
    from tests.conftest import WaitUntil

CLI = (sys.executable, "-m", "gradiometer.cli")
ENVIRONMENT = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}


def demo(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``gradiometer demo`` to its end."""
    return run("demo", "--dir", str(root), "--run-id", "demo", *arguments)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=300, env=ENVIRONMENT, check=False)


def test_demo_trains_records_and_serves(tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short demo leaves a finished run, and its own monitor, though it looks seldom, has served its last counters."""
    monkeypatch.setitem(ENVIRONMENT, "GRADIOMETER_MONITOR_POLL_SECONDS", "5")
    done = demo(tmp_path, "--steps", "30", "--port", str(free_port))
    assert done.returncode == 0, done.stderr
    recorded = gradiometer.open_run(tmp_path / "demo")
    assert recorded.steps.tolist() == list(range(30))
    assert recorded.status["state"] == State.FINISHED
    assert np.isfinite(recorded.loss).all()
    assert recorded.layers == ["embed", "lstm.l0", "lstm.l1", "lstm.l2", "head"]
    clips = int(recorded.clipped[:, 1].sum())
    assert 'gradiometer_steps_total{run_id="demo"} 30' in done.stdout
    assert f'gradiometer_clip_events_total{{run_id="demo",policy="global_norm",mode="act"}} {clips}' in done.stdout
    assert clips > 0
    assert "held-out loss" in done.stdout


def test_demo_is_repeatable(tmp_path: Path) -> None:
    """The same seed gives the same losses and norms."""
    for name in ("a", "b"):
        assert demo(tmp_path / name, "--steps", "5", "--no-serve", "--seed", "7").returncode == 0
    first, second = (gradiometer.open_run(tmp_path / name / "demo") for name in ("a", "b"))
    np.testing.assert_allclose(first.loss, second.loss, rtol=1e-6)
    np.testing.assert_allclose(first.grad_norm_preclip, second.grad_norm_preclip, rtol=1e-5)


def test_demo_without_a_policy_diverges(tmp_path: Path) -> None:
    """``--policy none`` observes only, and the loss leaves the range of a blind guess."""
    done = demo(tmp_path, "--steps", "12", "--no-serve", "--policy", "none")
    recorded = gradiometer.open_run(tmp_path / "demo")
    assert done.returncode == 0
    assert recorded.manifest.policy is None
    assert recorded.loss.max() > 10
    assert "diverged" in done.stdout


def test_demo_takes_a_policy_file(tmp_path: Path) -> None:
    """The policy of a YAML file is in force and in the manifest."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\npipeline:\n  - group_norm: {max_norm: 0.05, scope: layer}\n")
    assert demo(tmp_path, "--steps", "5", "--no-serve", "--policy", str(policy)).returncode == 0
    recorded = gradiometer.open_run(tmp_path / "demo")
    assert recorded.manifest.policies == ("group_norm",)
    assert recorded.layer_norms("grad_norm_postclip").max() <= 0.05 * (1 + 1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--policy", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--run-id", "../up"], "run_id '../up'"),
        (["--device", "tpu"], "tpu"),
        (["--steps", "0"], "steps"),
    ],
)
def test_bad_options_are_one_clear_error(arguments: Sequence[str], said: str, tmp_path: Path) -> None:
    """A wrong option is named on stderr with exit status 2, without a traceback, and nothing is recorded."""
    done = demo(tmp_path, "--no-serve", *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bad_policy_names_the_place(tmp_path: Path) -> None:
    """An error in a policy file names the file, the path in it, the value and what was expected."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("pipeline:\n  - global_norm: {max_norm: -1}\n")
    done = demo(tmp_path, "--no-serve", "--policy", str(policy))
    assert done.returncode == 2
    assert f"{policy}:2:29: pipeline[0].global_norm.max_norm is -1: Input should be greater than 0" in done.stderr


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    """A port that was asked for and is taken is an error that names it."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        done = demo(tmp_path, "--steps", "2", "--port", str(port))
    assert done.returncode == 2
    assert str(port) in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_it_cleanly(tmp_path: Path, free_port: int, wait_until: WaitUntil) -> None:
    """After Ctrl-C the run is finished, summed up, and the monitor is gone."""
    command = [*CLI, "demo", "--dir", str(tmp_path), "--run-id", "demo", "--steps", "100000", "--port", str(free_port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        wait_until(lambda: _steps(tmp_path / "demo") >= 3, 120)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "stopped by Ctrl-C" in output
    assert "Traceback" not in errors
    assert gradiometer.open_run(tmp_path / "demo").status["state"] == State.FINISHED
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", free_port)) != 0


def test_sigterm_stops_the_monitor_too(tmp_path: Path, free_port: int, wait_until: WaitUntil) -> None:
    """After SIGTERM the run is finished, the status is 143, and the monitor is gone."""
    command = [*CLI, "demo", "--dir", str(tmp_path), "--run-id", "demo", "--steps", "100000", "--port", str(free_port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        wait_until(lambda: _steps(tmp_path / "demo") >= 3, 120)
        process.terminate()
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (process.returncode, errors) == (143, "")
    assert gradiometer.open_run(tmp_path / "demo").status["state"] == State.FINISHED
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", free_port)) != 0


def _steps(path: Path) -> int:
    """Count the steps that a run has so far."""
    return len(gradiometer.open_run(path)) if (path / "rank-00000" / "manifest.json").exists() else 0


def test_no_sources_is_said(tmp_path: Path) -> None:
    """A Python without its sources cannot run the demo, and the error says so."""
    with pytest.raises(DemoError, match="too few to train on"):
        read_text(tmp_path)


def test_runs_and_show_read_it_back(tmp_path: Path) -> None:
    """``runs`` lists the run, ``show`` sums it up, as tables and as JSON."""
    assert demo(tmp_path, "--steps", "5", "--no-serve").returncode == 0
    listed = json.loads(run("runs", "--dir", str(tmp_path), "--json").stdout)
    assert [(each["run_id"], each["state"], each["steps"]) for each in listed] == [("demo", "finished", 5)]
    assert "demo" in run("runs", "--dir", str(tmp_path)).stdout
    shown = json.loads(run("show", "demo", "--dir", str(tmp_path), "--json").stdout)
    recorded = gradiometer.open_run(tmp_path / "demo")
    assert shown["steps"] == 5
    assert shown["grad_norm_max"] == pytest.approx(recorded.grad_norm_preclip.max())
    assert [layer["layer"] for layer in shown["layers"]] == recorded.layers
    assert sum(layer["share"] for layer in shown["layers"]) == pytest.approx(1.0)
    table = run("show", str(tmp_path / "demo")).stdout
    assert str(tmp_path / "demo" / "rank-00000") in table.splitlines()
    assert "lstm.l2" in table
    assert "attached to 15 parameters" in table


def test_show_of_an_unknown_run_lists_the_known(tmp_path: Path) -> None:
    """A run that is not there is one line, with those that are."""
    assert demo(tmp_path, "--steps", "1", "--no-serve").returncode == 0
    done = run("show", "other", "--dir", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [f"gradiometer: no run 'other' (rank 0) in {tmp_path}; the newest there: demo"]


def test_an_unreadable_run_does_not_hide_the_others(tmp_path: Path) -> None:
    """``runs`` says which run cannot be read, and lists the rest."""
    assert demo(tmp_path, "--steps", "1", "--no-serve").returncode == 0
    broken = tmp_path / "broken" / "rank-00000"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{")
    listed = json.loads(run("runs", "--dir", str(tmp_path), "--json").stdout)
    assert [(each["run_id"], each["state"]) for each in listed] == [("broken", "unreadable"), ("demo", "finished")]


def test_a_pipe_gets_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``runs`` writes to no terminal, its table is not cut to the width of one."""
    monkeypatch.setitem(ENVIRONMENT, "COLUMNS", "40")
    name = "a-run-of-a-name-that-is-longer-than-the-terminal-is-wide"
    assert run("demo", "--dir", str(tmp_path), "--run-id", name, "--steps", "1", "--no-serve").returncode == 0
    (line,) = [line for line in run("runs", "--dir", str(tmp_path)).stdout.splitlines() if name in line]
    assert "finished" in line
    assert "…" not in line


def test_help_shows_the_defaults() -> None:
    """What is in brackets in a help text is in the help."""
    demo_says, monitor_says = (" ".join(run(command, "--help").stdout.split()) for command in ("demo", "monitor"))
    assert "[default: 9477]" in demo_says
    assert "[default: norm 0.2]" in demo_says
    assert "[default: 9477]" in monitor_says
    assert "[env: GRADIOMETER_DIR]" in monitor_says


def test_version_and_help() -> None:
    """The command says its version, and help lists the commands."""
    assert run("--version").stdout.startswith("gradiometer ")
    listed = run("--help").stdout
    assert all(command in listed for command in ("demo", "monitor", "runs", "show"))
