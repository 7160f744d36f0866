"""Telemetry that fails harms nothing: training goes on, bit for bit, and the failure is counted and told of once."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import AdamW

from gradiometer import Agent, open_run
from gradiometer.exporter import collector
from gradiometer.recorder import Recorder
from tests._training import assert_same, attach, backward, loss_of, small_model, train

Break = Callable[[pytest.MonkeyPatch, Agent], None]


def fail(*_: Any, **__: Any) -> None:
    """Be a disk that is full."""
    raise OSError(errno.ENOSPC, "No space left on device")


def trained(policy: Any = None) -> nn.Module:
    """Return the model as eight steps leave it without an agent."""
    model = small_model()
    train(model, AdamW(model.parameters(), lr=0.01), range(8))
    return model


def commit_fails(monkeypatch: pytest.MonkeyPatch, agent: Agent) -> None:
    """Let the recorder raise on every row."""
    monkeypatch.setattr(Recorder, "commit", fail)


def journal_fails(monkeypatch: pytest.MonkeyPatch, agent: Agent) -> None:
    """Let the journal raise something nobody thought of."""

    def surprise(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("gradiometer.journal.Journal.write", surprise)


def meter_fails(monkeypatch: pytest.MonkeyPatch, agent: Agent) -> None:
    """Let measuring raise."""
    monkeypatch.setattr("gradiometer.norms.Meter.__call__", fail)


def hooks_fail(monkeypatch: pytest.MonkeyPatch, agent: Agent) -> None:
    """Let the backward hooks raise, inside the backward pass."""
    monkeypatch.setattr("gradiometer.backward.tensor_norm", fail)


def sending_fails(monkeypatch: pytest.MonkeyPatch, agent: Agent) -> None:
    """Let the copy to the host raise."""
    monkeypatch.setattr("gradiometer.transfer.Transfer.send", fail)


def everything_is_full(monkeypatch: pytest.MonkeyPatch, agent: Agent) -> None:
    """Let every write to the run directory fail, that of the error counter too."""
    monkeypatch.setattr(os, "pwrite", fail)
    monkeypatch.setattr(os, "write", fail)


def directory_goes(monkeypatch: pytest.MonkeyPatch, agent: Agent) -> None:
    """Remove the run directory, and let the next step look for it."""
    shutil.rmtree(agent.path)
    monkeypatch.setattr("gradiometer.telemetry.CHECK_SECONDS", 0.0)
    agent._telemetry._next_check = 0.0


FAILURES: list[Break] = [
    commit_fails, journal_fails, meter_fails, hooks_fail, sending_fails, everything_is_full, directory_goes,
]  # fmt: skip


@pytest.mark.parametrize("breaks", FAILURES)
def test_training_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, breaks: Break
) -> None:
    """Whatever part of the telemetry fails, the parameters are to the bit those of a run without an agent."""
    model = small_model()
    optimizer = AdamW(model.parameters(), lr=0.01)
    with caplog.at_level(logging.WARNING), attach(tmp_path, model, optimizer, backward="every") as agent:
        train(model, optimizer, range(3))
        with monkeypatch.context() as patch:
            breaks(patch, agent)
            train(model, optimizer, range(3, 8))
            agent.log(loss=1.0)
        assert agent.errors >= 1
    assert_same(model, trained(), exactly=True)
    told = [record for record in caplog.records if "training goes on" in record.getMessage()]
    assert len(told) == 1
    assert told[0].name.startswith("gradiometer")
    assert told[0].exc_info is not None


def test_errors_are_counted_where_monitors_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caught failure is in ``agent.errors``, in the ring's status, and in the metrics."""
    model = small_model()
    optimizer = AdamW(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer) as agent:
        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "commit", fail)
            train(model, optimizer, range(4))
        assert agent.errors == 4
        assert open_run(agent.path).status["agent_errors"] == 4
        exported = collector(agent.path)
        samples = {sample.name: sample.value for family in exported.collect() for sample in family.samples}
        exported.close()
        assert samples["gradiometer_agent_errors_total"] == 4


def test_recording_goes_on_when_the_failure_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that could not be written are missing, and those after them are there."""
    model = small_model()
    optimizer = AdamW(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer) as agent:
        train(model, optimizer, range(2))
        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "commit", fail)
            train(model, optimizer, range(2))
            agent.log(loss=9.0)
        train(model, optimizer, range(2))
    run = open_run(agent.path)
    assert run.steps.tolist() == [0, 1, 4, 5]
    assert 9.0 not in run.loss


def test_events_on_a_full_disk(tmp_path: Path) -> None:
    """When incidents cannot be written, the rows still are."""
    model = small_model()
    optimizer = AdamW(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy=["nonfinite"]) as agent:
        train(model, optimizer, [0])
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, agent._telemetry.recorder._events)
        os.close(full)
        backward(loss_of(model, 1) * float("nan"))
        optimizer.step()
        train(model, optimizer, [2])
        assert agent.errors >= 1
    assert open_run(agent.path).nonfinite.tolist() == [False, True, False]


def test_logging_to_a_broken_recorder_raises_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that cannot be written after its step is an error that is counted."""
    model = small_model()
    optimizer = AdamW(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer) as agent:
        train(model, optimizer, [0])
        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "amend", fail)
            agent.log(loss=1.0)
        assert agent.errors == 1


def test_detaching_from_a_removed_directory(tmp_path: Path) -> None:
    """Detaching works when the run directory is gone."""
    model = small_model()
    optimizer = AdamW(model.parameters(), lr=0.01)
    agent = attach(tmp_path, model, optimizer)
    shutil.rmtree(tmp_path)
    train(model, optimizer, [0])
    agent.detach()
    assert agent.errors >= 1
    assert not tmp_path.exists()


def test_a_failure_in_acting_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When clipping that the user asked for fails, the step raises."""
    model = small_model()
    optimizer = AdamW(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy=[{"global_norm": {"max_norm": 1.0}}]) as agent:
        backward(loss_of(model, 0))
        with monkeypatch.context() as patch:
            patch.setattr("gradiometer.norms.Meter.__call__", fail)
            with pytest.raises(OSError, match="No space"):
                optimizer.step()
        assert agent.errors == 0


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_interruptions_pass_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    """Ctrl-C within the telemetry stops the job as anywhere else."""

    def interrupt(*_: Any) -> None:
        raise interruption

    model = small_model()
    optimizer = AdamW(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer) as agent:
        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "commit", interrupt)
            with pytest.raises(interruption):
                train(model, optimizer, [0])
        assert agent.errors == 0


SCRIPT = """
import resource, signal, sys, torch, gradiometer
from torch import nn
torch.set_num_threads(1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def trained(agent):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if agent:
        agent = gradiometer.attach(model, optimizer, dir=sys.argv[1], run_id="full", ring_bytes=2**20)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))
    for step in range(300):
        optimizer.zero_grad()
        model(torch.ones(3, 4)).square().sum().backward()
        optimizer.step()
    if agent:
        assert agent.errors > 100, agent.errors
        agent.detach()
    return model.weight
assert torch.equal(trained(False), trained(True))
"""


def test_a_ring_that_cannot_be_written(tmp_path: Path) -> None:
    """When the file system refuses the ring's rows in mid-run, training goes on bit for bit in the whole process."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("training goes on") == 1
    assert open_run(tmp_path / "full").status["agent_errors"] > 100
