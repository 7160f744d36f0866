"""The ``nonfinite`` policy on fused and other optimizers: skip, zero, raise, and how many in a row."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from gradiometer import NonFiniteGradientError, open_run
from gradiometer.records import Flag
from tests._training import assert_same, attach, backward, hand_norms, loss_of, small_model, train

SKIP = [{"nonfinite": {"action": "skip"}}]
KINDS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (Adam, {"lr": 0.01}),
    "adamw": (AdamW, {"lr": 0.01, "amsgrad": True}),
    "sgd": (SGD, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}),
    "adagrad": (Adagrad, {"lr": 0.01}),
}
VARIANTS = [(kind, how) for kind in KINDS for how in ("loop", "foreach", "fused")]


def make(kind: str, how: str, model: nn.Module) -> Optimizer:
    """Make an optimizer of one implementation."""
    cls, settings = KINDS[kind]
    return cls(model.parameters(), **settings | ({"foreach": False} if how == "loop" else {how: True}))


def bad_step(model: nn.Module, optimizer: Optimizer, step: int = 99, value: float = math.nan) -> None:
    """Take a step whose gradients have one bad element, in the third parameter."""
    optimizer.zero_grad()
    backward(loss_of(model, step))
    gradient = list(model.parameters())[2].grad
    assert gradient is not None
    gradient[0, 0] = value
    optimizer.step()


def same_state(mine: Any, other: Any) -> bool:
    """Tell whether two optimizer states are the same to the bit."""
    if isinstance(mine, Tensor):
        return torch.equal(mine, other)
    if isinstance(mine, Mapping):
        return mine.keys() == other.keys() and all(same_state(mine[key], other[key]) for key in mine)
    if isinstance(mine, Sequence) and not isinstance(mine, str):
        return len(mine) == len(other) and all(map(same_state, mine, other))
    return bool(mine == other)


@pytest.mark.parametrize(("kind", "how"), VARIANTS)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_skip_leaves_no_trace(tmp_path: Path, kind: str, how: str, value: float) -> None:
    """A skipped step leaves parameters and optimizer state to the bit as they were."""
    model = small_model()
    optimizer = make(kind, how, model)
    with attach(tmp_path, model, optimizer, policy=SKIP) as agent:
        train(model, optimizer, range(3))
        parameters, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
        bad_step(model, optimizer, value=value)
        assert_same(model, parameters, exactly=True)
        assert same_state(optimizer.state_dict(), state)
    run = open_run(agent.path)
    assert run.skipped.tolist() == run.nonfinite.tolist() == [False, False, False, True]
    assert run.coefficient[3] == run.grad_norm_postclip[3] == 0.0
    assert not run.stat("grad_norm_postclip")[3].any()


@pytest.mark.parametrize(("kind", "how"), VARIANTS)
@pytest.mark.parametrize("when", [0, 2])
def test_training_goes_on_as_if_the_batch_had_not_been(tmp_path: Path, kind: str, how: str, when: int) -> None:
    """After a skip, of the very first step too, training is to the bit that of a run without the bad batch."""
    model = small_model()
    twin = copy.deepcopy(model)
    train(twin, make(kind, how, twin), range(5))
    optimizer = make(kind, how, model)
    with attach(tmp_path, model, optimizer, policy=SKIP):
        train(model, optimizer, range(when))
        bad_step(model, optimizer)
        train(model, optimizer, range(when, 5))
    assert_same(model, twin, exactly=True)


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_gradients_are_given_back_after_a_skip(tmp_path: Path, how: str) -> None:
    """A skip without a fused kernel withholds the gradients during the step and puts the same tensors back."""
    model = small_model()
    optimizer = make("adam", how, model)
    with attach(tmp_path, model, optimizer, policy=SKIP):
        backward(loss_of(model, 0) * math.nan)
        gradients = [parameter.grad for parameter in model.parameters()]
        optimizer.step()
        assert all(p.grad is gradient for p, gradient in zip(model.parameters(), gradients, strict=True))


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_zero_replaces_only_what_is_bad(tmp_path: Path, how: str) -> None:
    """Action zero replaces the bad tensor by zeros and trains on with the others."""
    model = small_model()
    twin = copy.deepcopy(model)
    reference, optimizer = make("adamw", how, twin), make("adamw", how, model)
    backward(loss_of(twin, 99))
    bad = twin[2].weight.grad
    assert isinstance(bad, Tensor)
    bad.zero_()
    wanted = hand_norms(twin)
    reference.step()
    with attach(tmp_path, model, optimizer, policy=[{"nonfinite": {"action": "zero"}}]) as agent:
        bad_step(model, optimizer)
    assert_same(model, twin, exactly=True)
    run = open_run(agent.path)
    np.testing.assert_allclose(run.stat("grad_norm_postclip")[0], wanted, rtol=1e-6)
    assert run.grad_norm_postclip[0] == pytest.approx(np.linalg.norm(wanted), rel=1e-6)
    assert run.nonfinite.tolist() == [True]
    assert run.skipped.tolist() == [False]
    assert bool(run.rows["flags"][0] & Flag.ZEROED)


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_clipping_after_zeroing_sees_the_rest(tmp_path: Path, how: str) -> None:
    """After zeros have replaced the bad tensor, the others are clipped by the norm that is left."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=1.0, **{how: True})
    before = copy.deepcopy(model)
    policy = [{"nonfinite": {"action": "zero"}}, {"global_norm": {"max_norm": 0.5}}]
    with attach(tmp_path, model, optimizer, policy=policy):
        bad_step(model, optimizer)
    moved = [p - q for p, q in zip(model.parameters(), before.parameters(), strict=True)]
    assert math.hypot(*(each.norm().item() for each in moved)) == pytest.approx(0.5, rel=1e-4)
    assert not moved[2].any()


@pytest.mark.parametrize(("kind", "how"), VARIANTS)
def test_raise_stops_before_anything_moves(tmp_path: Path, kind: str, how: str) -> None:
    """Action raise raises from the step, with parameters and state as before it."""
    model = small_model()
    optimizer = make(kind, how, model)
    with attach(tmp_path, model, optimizer, policy=[{"nonfinite": {"action": "raise"}}]) as agent:
        train(model, optimizer, range(2))
        before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
        with pytest.raises(NonFiniteGradientError, match=r"1 step\(s\) in a row, up to step 2.*'nonfinite'"):
            bad_step(model, optimizer)
        assert_same(model, before, exactly=True)
        assert same_state(optimizer.state_dict(), state)
    assert open_run(agent.path).skipped.tolist() == [False, False, True]


@pytest.mark.parametrize("action", ["skip", "zero"])
@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_max_consecutive(tmp_path: Path, action: str, how: str) -> None:
    """The third bad step in a row raises where two are allowed, as an event says; a good one starts the count again."""
    model = small_model()
    optimizer = make("adam", how, model)
    policy = [{"nonfinite": {"action": action, "max_consecutive": 3}}]
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        for _ in range(2):
            bad_step(model, optimizer)
        train(model, optimizer, [0])
        for _ in range(2):
            bad_step(model, optimizer)
        with pytest.raises(NonFiniteGradientError, match="allows 2"):
            bad_step(model, optimizer)
    run = open_run(agent.path)
    assert len(run) == 6
    (raised,) = [event["message"] for event in run.events if event["kind"] == "policy_raised"]
    assert "allows 2" in raised  # whoever finds the run over learns why


def test_training_can_go_on_after_the_error(tmp_path: Path) -> None:
    """Who catches the error can train on: a good step raises nothing."""
    model = small_model()
    optimizer = make("adam", "fused", model)
    with attach(tmp_path, model, optimizer, policy=[{"nonfinite": {"action": "raise"}}]):
        with pytest.raises(NonFiniteGradientError):
            bad_step(model, optimizer)
        train(model, optimizer, range(2))


class Failing(SGD):
    """Raises in its step while ``fails``."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise MemoryError("no room for the step")
        return super().step(closure)


def test_a_bad_step_is_not_overlooked(tmp_path: Path) -> None:
    """A bad step whose row reaches the host together with that of a good one, as rows do on a GPU, raises as well."""
    model = small_model()
    optimizer = Failing(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy=[{"nonfinite": {"action": "raise"}}]):
        train(model, optimizer, range(2))
        optimizer.fails = True
        with pytest.raises(MemoryError):
            bad_step(model, optimizer)
        optimizer.fails = False
        with pytest.raises(NonFiniteGradientError, match=r"1 step\(s\) in a row, up to step 2"):
            train(model, optimizer, [3])
        train(model, optimizer, [4])


def test_an_episode_is_two_events(tmp_path: Path) -> None:
    """Bad steps in a row are one incident that names step and parameter, and one when it is over."""
    model = small_model()
    optimizer = make("sgd", "foreach", model)
    with attach(tmp_path, model, optimizer, policy=SKIP) as agent:
        train(model, optimizer, [0])
        for _ in range(3):
            bad_step(model, optimizer)
        train(model, optimizer, [1, 2])
    events = [event for event in open_run(agent.path).events if event["kind"] in ("nonfinite", "finite_again")]
    assert [(event["kind"], event["step"]) for event in events] == [("nonfinite", 1), ("finite_again", 4)]
    assert events[0]["parameter"] == "2.weight"
    assert events[0]["skipped"] is True
    assert events[1]["steps"] == 3


def test_observing_does_not_skip(tmp_path: Path) -> None:
    """Without a policy a bad step is recorded, and taken as it would have been."""
    model = small_model()
    optimizer = make("sgd", "foreach", model)
    with attach(tmp_path, model, optimizer) as agent:
        bad_step(model, optimizer)
    assert math.isnan(next(iter(model[2].parameters())).sum().item())
    run = open_run(agent.path)
    assert run.nonfinite.tolist() == [True]
    assert run.skipped.tolist() == [False]


def test_optimizers_skip_together(tmp_path: Path) -> None:
    """A bad gradient in one optimizer's layer keeps every optimizer of the step from moving."""
    model = small_model()
    optimizers = [AdamW(model[0].parameters(), fused=True), SGD(model[2].parameters(), lr=0.1)]
    before = copy.deepcopy(model)
    with attach(tmp_path, model, optimizers, policy=SKIP):
        backward(loss_of(model, 0))
        gradient = model[2].bias.grad
        assert isinstance(gradient, Tensor)
        gradient[0] = math.nan
        for optimizer in optimizers:
            optimizer.step()
    assert_same(model, before, exactly=True)
