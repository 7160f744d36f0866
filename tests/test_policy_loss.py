"""The loss as an input of a policy: what is logged before a step is what the step is decided by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, SGD, Optimizer

from gradiometer import open_run
from gradiometer.policy import build, kinds
from gradiometer.policy.base import Decision, Layout, Observation, Policy, State
from tests._training import attach, backward, loss_of, small_model
from tests.test_step_path import Event, Watch, no_python_reads

ON_LOSS: list[dict[str, Any]] = [{"skip": {"rule": "abs", "on": ["loss"], "threshold": 10.0}}]


class Noting:
    """A policy that keeps what it was shown."""

    name = "skip"

    def __init__(self) -> None:
        self.seen: list[Tensor | None] = []

    def init(self) -> State:
        return {}

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        del step
        self.seen.append(observation.loss)
        return Decision(threshold=1.0), state


@pytest.fixture
def noting(monkeypatch: pytest.MonkeyPatch) -> Noting:
    """Let ``skip`` be a policy that only takes notes."""
    found = Noting()

    def bind(spec: Any, layout: Layout, chosen: tuple[bool, ...]) -> Policy:
        del spec, layout, chosen
        return found

    monkeypatch.setitem(build._BUILDERS, kinds.SkipSpec, bind)
    return found


def values(noted: Noting) -> list[float]:
    """Return the losses that a policy was shown, as numbers."""
    assert all(isinstance(loss, Tensor) and loss.dim() == 0 for loss in noted.seen)
    return [float(loss) for loss in noted.seen if loss is not None]


def missing(path: Path) -> list[str]:
    return [event["message"] for event in open_run(path).events if event["kind"] == "policy_loss_missing"]


def step_with(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, step)
    backward(loss)
    return loss.detach()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_decided_by_its_own_loss(tmp_path: Path, fused: bool) -> None:
    """A loss that is an outlier skips the step it was logged before, whether it is a number or a tensor."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01, fused=fused)
    losses: list[float | Tensor] = [1.0, 20.0, torch.tensor(30.0), 5, torch.tensor([2.0], dtype=torch.float64)]
    with attach(tmp_path, model, optimizer, policy=ON_LOSS) as agent:
        for step, loss in enumerate(losses):
            step_with(model, optimizer, step)
            agent.log(loss=loss)
            optimizer.step()
    run = open_run(agent.path)
    assert run.skipped.tolist() == [False, True, True, False, False]
    assert run.loss.tolist() == [1.0, 20.0, 30.0, 5.0, 2.0]
    assert missing(agent.path) == []


def test_what_was_not_logged_in_time_is_nan_and_said_once(tmp_path: Path, noting: Noting) -> None:
    """Without a loss a policy sees NaN; the run says once what to do, and is decided by no loss of another step."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy=ON_LOSS) as agent:
        for step in range(4):
            step_with(model, optimizer, step)
            if step == 1:
                agent.log(loss=7.0)
            optimizer.step()
            if step == 2:
                agent.log(loss=8.0)  # too late for its step, and not of the next
    assert values(noting) == pytest.approx([math.nan, 7.0, math.nan, math.nan], nan_ok=True)
    (message,) = missing(agent.path)
    assert "policy 'skip' looks at the loss" in message
    assert "before optimizer.step()" in message


@pytest.mark.parametrize("backward_mode", ["auto", "off"])
def test_a_loss_logged_before_every_step_is_never_late(tmp_path: Path, noting: Noting, backward_mode: Any) -> None:
    """Also where nothing tells of backward passes."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy=ON_LOSS, backward=backward_mode) as agent:
        for step in range(4):
            step_with(model, optimizer, step)
            agent.log(loss=float(step))
            optimizer.step()
    assert values(noting) == [0.0, 1.0, 2.0, 3.0]


def test_nobody_asks_nobody_is_told(tmp_path: Path, noting: Noting) -> None:
    """A policy on the norm alone sees None, logged or not, and nothing is said."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    policy = [{"skip": {"rule": "abs", "on": "global_norm", "threshold": 10.0}}]
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        for step in range(2):
            step_with(model, optimizer, step)
            agent.log(loss=1.0)
            optimizer.step()
    assert noting.seen == [None, None]
    assert missing(agent.path) == []


def test_a_closure_that_is_evaluated_again_keeps_its_loss(tmp_path: Path, noting: Noting) -> None:
    """Every evaluation of a step is decided by the loss of the step, logged within or before the closure."""
    model = small_model()
    optimizer: Any = LBFGS(model.parameters(), lr=0.01, max_iter=3)
    with attach(tmp_path, model, optimizer, policy=ON_LOSS) as agent:
        for step in range(2):
            agent.log(loss=float(step + 1))
            optimizer.step(lambda step=step: step_with(model, optimizer, step))
    assert sorted(set(values(noting))) == [1.0, 2.0]
    assert len(noting.seen) > 2
    assert missing(agent.path) == []


def test_steps_that_a_scaler_skips_have_a_loss_too(tmp_path: Path, noting: Noting) -> None:
    """Policies take note of the loss of a step that a GradScaler does not take."""
    model = small_model()
    optimizer, scaler = SGD(model.parameters(), lr=0.01), GradScaler("cpu", init_scale=4.0)
    with attach(tmp_path, model, optimizer, policy=ON_LOSS) as agent:
        for step in range(3):
            optimizer.zero_grad()
            backward(scaler.scale(loss_of(model, step) * (math.inf if step == 1 else 1.0)))
            agent.log(loss=float(step))
            scaler.step(optimizer)
            scaler.update()
    assert values(noting) == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("tensor", [False, True])
def test_a_loss_is_not_read_from_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noting: Noting, tensor: bool
) -> None:
    """Numbers become tensors by a fill, and tensors stay where they are."""
    monkeypatch.setattr("gradiometer.transfer.reads_are_free", lambda device: False)
    monkeypatch.setattr(torch, "Event", Event)
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01, fused=True)
    with attach(tmp_path, model, optimizer, policy=ON_LOSS) as agent:
        with Watch() as watch, no_python_reads() as python:
            for step in range(3):
                loss = step_with(model, optimizer, step)
                agent.log(loss=loss if tensor else 3.0)
                optimizer.step()
        assert (watch.reads, python) == ([], [])
    assert len(values(noting)) == 3


def test_a_loss_that_comes_too_late_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever reads the log, and not the run's events, learns that a policy is blind, and what to do."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy=ON_LOSS) as agent:
        for step in range(3):
            loss = step_with(model, optimizer, step)
            optimizer.step()
            agent.log(loss=loss)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == len(missing(agent.path)) == 1
    assert "before optimizer.step()" in warnings[0]
