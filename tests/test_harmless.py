"""What an agent must not do to the process it lives in: keep things alive, break conversions, write from a child."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from weakref import finalize, ref

import numpy as np
import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD

from gradiometer import NonFiniteGradientError, Run, RunInUseError, attach, open_run
from gradiometer.records import State
from gradiometer.transfer import Transfer
from tests._training import attach as attach_small
from tests._training import backward, loss_of, small_model, train


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Let go of the agents that a test did not detach."""
    yield
    gc.collect()


CLIP: list[Any] = [{"global_norm": {"max_norm": 1e-3}}]


def _open_below(folder: Path) -> list[Path]:
    """List the files below ``folder`` that this process has open."""
    files = [each.readlink() for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
    return [file for file in files if file.is_relative_to(folder)]


def test_a_forgotten_agent_goes_with_its_optimizer(tmp_path: Path) -> None:
    """Without a handle the agent works on; when model and optimizer go, so does it, and its run is finished."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    path = attach_small(tmp_path, model, optimizer).path
    train(model, optimizer, range(3))
    assert len(open_run(path)) == 3
    kept: list[ref[Any]] = [ref(model), ref(optimizer)]
    assert len(_open_below(tmp_path)) == 3  # two rings and the events
    del model, optimizer
    gc.collect()
    assert [each() for each in kept] == [None, None]
    assert open_run(path).status["state"] == State.FINISHED
    assert _open_below(tmp_path) == []


def test_parameters_put_in_the_place_of_others_are_seen(tmp_path: Path) -> None:
    """An optimizer whose parameters were replaced, as many by as many, cannot be clipped, and that is raised."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    attach_small(tmp_path, model, optimizer, policy=CLIP)
    train(model, optimizer, range(2))
    model[2] = nn.Linear(8, 2)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    optimizer.zero_grad()
    backward(loss_of(model, 2))
    with pytest.raises(RuntimeError, match="that neither it nor the model had at attach"):
        optimizer.step()


def test_a_transfer_that_fails_reaches_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A device that answers with an error ends neither a step nor detach, and the run is finished all the same."""

    def fail(self: object, **_: object) -> Any:
        raise RuntimeError("the device is gone")

    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    agent = attach_small(tmp_path, model, optimizer)
    monkeypatch.setattr(Transfer, "arrived", fail)
    with caplog.at_level(logging.WARNING):
        train(model, optimizer, range(3))
        agent.detach()
    assert agent.errors >= 3
    assert open_run(agent.path).status["state"] == State.FINISHED
    assert sum("the device is gone" in (record.exc_text or "") for record in caplog.records) == 1


def test_a_model_is_converted_as_without_an_agent(tmp_path: Path) -> None:
    """Between steps nothing refers to a gradient, so ``Module.to`` may swap tensors."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    attach_small(tmp_path, model, optimizer, backward="off")
    train(model, optimizer, range(2))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_a_scaler_wrapped_by_another_stays_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What somebody else put around GradScaler.step while the agent was there is not taken away by detach."""
    monkeypatch.setattr(GradScaler, "step", GradScaler.step)  # put back whatever this test leaves
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    agent = attach_small(tmp_path, model, optimizer)
    ours, calls = GradScaler.step, []

    def theirs(self: GradScaler, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return ours(self, *args, **kwargs)

    monkeypatch.setattr(GradScaler, "step", theirs)
    agent.detach()
    scaler = GradScaler("cpu", init_scale=2.0)
    backward(scaler.scale(loss_of(model, 0)))
    scaler.step(optimizer)
    assert calls == [1]


def scaled(tmp_path: Path, *, fused: bool, policy: list[Any], overflows: int) -> Run:
    """Train five steps under a GradScaler, of which the first ``overflows`` hold an Inf."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01, fused=fused)
    scaler = GradScaler("cpu", init_scale=4.0)
    with attach_small(tmp_path, model, optimizer, policy=policy) as agent:
        for step in range(5):
            optimizer.zero_grad()
            backward(scaler.scale(loss_of(model, step)))
            if step < overflows:
                next(model.parameters()).grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
            scaler.step(optimizer)
            scaler.update()
    return open_run(agent.path)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_the_scaler_skips_is_no_clip_event(tmp_path: Path, fused: bool) -> None:
    """What a GradScaler skips was changed by no policy, whichever the optimizer."""
    run = scaled(tmp_path, fused=fused, policy=[{"global_norm": {"max_norm": 1e9}}], overflows=2)
    assert run.skipped.tolist() == [True, True, False, False, False]
    assert run.clipped.sum() == 0
    assert run.status["clip_events"].sum() == 0


@pytest.mark.parametrize("fused", [False, True])
def test_scaler_skips_count_as_steps_in_a_row(tmp_path: Path, fused: bool) -> None:
    """``max_consecutive`` counts steps that the GradScaler skipped, alike for every optimizer."""
    policy = [{"nonfinite": {"max_consecutive": 3}}]
    assert scaled(tmp_path / "a", fused=fused, policy=policy, overflows=2).skipped.sum() == 2
    with pytest.raises(NonFiniteGradientError, match="3 step"):
        scaled(tmp_path / "b", fused=fused, policy=policy, overflows=3)


def test_a_forgotten_agent_may_be_collected_while_another_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the garbage collector runs in the middle of ``attach``, GradScaler is still wrapped once that returns."""

    def collect_and_finalize(*arguments: Any) -> Any:
        gc.collect()
        return finalize(*arguments)

    gc.disable()
    try:
        forgotten = small_model()
        attach_small(tmp_path, forgotten, SGD(forgotten.parameters(), lr=0.1))
        del forgotten
        monkeypatch.setattr("gradiometer.hooks.finalize", collect_and_finalize)
        model = small_model()
        with attach_small(tmp_path, model, SGD(model.parameters(), lr=0.1)):
            assert hasattr(GradScaler.step, "__wrapped__")
    finally:
        gc.enable()


@pytest.mark.parametrize("first", [0, 2])
def test_an_optimizer_that_takes_anothers_place_is_noticed(
    tmp_path: Path, first: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where backward passes go by and the optimizer that was given does not step, that is said once."""
    monkeypatch.setattr("gradiometer.backward.UNSTEPPED", 5)
    model = small_model()
    given = SGD(model.parameters(), lr=0.1)
    with attach_small(tmp_path, model, given, policy=CLIP) as agent, caplog.at_level(logging.WARNING, "gradiometer"):
        train(model, given, range(first))
        train(model, SGD(model.parameters(), lr=0.1), range(4 + 4 * (first > 0)))
    assert caplog.text.count("without a step of the optimizer") == 1
    assert [event["kind"] for event in open_run(agent.path).events].count("no_step") == 1


def test_a_forked_child_writes_nothing(tmp_path: Path) -> None:
    """Steps of a child made by fork are clipped, and leave no row in the parent's run."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=1.0)
    agent = attach_small(tmp_path, model, optimizer, policy=CLIP)
    train(model, optimizer, range(2))
    child = os.fork()
    if child == 0:
        before = [parameter.detach().clone() for parameter in model.parameters()]
        train(model, optimizer, range(1))
        moved = sum(float((a - b.detach()).square().sum()) for a, b in zip(before, model.parameters(), strict=True))
        os._exit(0 if moved**0.5 < 2e-3 else 1)
    assert os.waitpid(child, 0)[1] == 0
    agent.detach()
    assert len(open_run(agent.path)) == 2


def test_zeros_are_not_called_a_skip(tmp_path: Path) -> None:
    """The error of a policy that zeroes does not claim that nothing moved."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    attach_small(tmp_path, model, optimizer, policy=[{"nonfinite": {"action": "zero", "max_consecutive": 1}}])
    backward(loss_of(model, 0))
    next(model.parameters()).grad.view(-1)[0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(NonFiniteGradientError, match="taken with zeros"):
        optimizer.step()


def test_plain_mistakes_are_named(tmp_path: Path) -> None:
    """Swapped arguments, None and settings of a wrong type are errors that say what was expected."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    mistakes: list[tuple[tuple[Any, Any], dict[str, Any], str]] = [
        ((optimizer, model), {}, "expected a torch.nn.Module; the optimizer comes second"),
        ((model, None), {}, "expected a torch.optim.Optimizer"),
        ((model, optimizer), {"labels": ["a"]}, "labels is a list"),
        ((model, optimizer), {"ring_bytes": "1M"}, "ring_bytes is '1M'"),
        ((model, optimizer), {"parts": 3}, "parts is 3, expected a name"),
    ]
    for arguments, options, said in mistakes:
        with pytest.raises(TypeError, match=said):
            attach(*arguments, dir=tmp_path, **options)
    with pytest.raises(ValueError, match="patience is 0, expected a positive number"):
        attach(model, optimizer, dir=tmp_path, patience=0)
    with pytest.raises(ValueError, match="run_id 3"):
        attach(model, optimizer, dir=tmp_path, run_id=3)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


SOCKETS = """
import os, sys, torch, gradiometer

def open_sockets():
    links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith("socket:") for link in links if os.path.islink(link))

model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
before, made = open_sockets(), []
sys.addaudithook(lambda event, _: made.append(event) if event in ("socket.__new__", "socket.connect") else None)
policy = {"pipeline": [{"nonfinite": {}}, {"global_norm": {"max_norm": 0.1}}], "shadow": [{"zclip": {}}]}
with gradiometer.attach(model, optimizer, policy=policy, dir=sys.argv[1], updates_every=10, cosine=True) as agent:
    for step in range(300):
        optimizer.zero_grad()
        loss = model(torch.ones(3, 4)).square().sum() * (float("nan") if step == 50 else 1.0)
        loss.backward()
        optimizer.step()
        agent.log(loss=loss)
        agent.requested("stop")
    within = open_sockets()
import socket
assert not made and within == before, (made, within, before)
socket.socket().close()
print(made)
"""


def test_the_agent_opens_no_socket(tmp_path: Path) -> None:
    """A whole run, from attach to detach, with a policy, a shadow and NaN, makes none; the watch would see one."""
    done = subprocess.run(
        [sys.executable, "-c", SOCKETS, tmp_path], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "['socket.__new__']\n"), done.stderr


def test_numpy_scalars_are_numbers(tmp_path: Path) -> None:
    """A loss that is a NumPy number or an array of one is recorded; a Run shows itself in one line."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach_small(tmp_path, model, optimizer) as agent:
        losses: list[Any] = [np.float32(1.5), np.array([2.5])]
        for loss in losses:
            agent.log(loss=loss)
            train(model, optimizer, range(1))
    run = open_run(agent.path)
    assert run.loss.tolist() == [1.5, 2.5]
    assert repr(run) == f"Run({str(agent.path)!r}: 2 steps, 4 parameters)"


def test_a_writer_that_cannot_be_looked_up_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run id of a writer in another container or host is free only after a quarter of an hour of silence."""
    model = small_model()
    attach_small(tmp_path, model, SGD(model.parameters(), lr=0.1), run_id="shared")
    monkeypatch.setattr("gradiometer.process.pid_namespace", lambda: "pid:[another]")
    other = small_model()
    optimizer = SGD(other.parameters(), lr=0.1)
    with pytest.raises(RunInUseError, match="'shared', rank 0, is being written by process"):
        attach_small(tmp_path, other, optimizer, run_id="shared")
    monkeypatch.setattr("gradiometer.recorder.UNKNOWN_SECONDS", 0.0)
    with attach_small(tmp_path, other, optimizer, run_id="shared") as agent:
        train(other, optimizer, range(2))
    assert len(open_run(agent.path)) == 2
    assert (tmp_path / "shared" / "rank-00000.1").is_dir()
