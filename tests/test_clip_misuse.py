"""Clipping in the wrong place is named, once, and clipping in an unusual place is not called wrong."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from gradiometer import Run, open_run
from tests._training import attach, backward, hand_norms, loss_of, small_model

STEPS, MAX_NORM, SCALE = 5, 0.5, 4096.0
Loop = Callable[[nn.Sequential, Optimizer], object]


def clip(model: nn.Module, max_norm: float = MAX_NORM) -> None:
    """Clip all gradients of a model, as loops do."""
    clip_grad_norm_(model.parameters(), max_norm)


def loop(model: nn.Sequential, optimizer: Optimizer, order: str, *, to_none: bool = True) -> list[Any]:
    """Run the named parts of a loop in the order given; return the norms before each clip."""
    norms: list[Any] = []
    parts: dict[str, Callable[[], object]] = {
        "zero": lambda: optimizer.zero_grad(set_to_none=to_none),
        "clip": lambda: clip(model),
        "tight": lambda: clip(model, MAX_NORM / 2),
        "loose": lambda: clip(model, 1e9),
        "measure": lambda: clip(model, math.inf),
        "value": lambda: clip_grad_value_(model.parameters(), 0.01),
        "step": optimizer.step,
    }
    for step in range(STEPS):
        for part in order.split():
            if part == "clip":
                norms.append(hand_norms(model))
            if part == "backward":
                backward(loss_of(model, step))
            else:
                parts[part]()
    return norms


def observed(tmp_path: Path, run_loop: Loop, **options: Any) -> Run:
    """Run a loop with an agent that must not fail; return what was recorded."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=1e-3)
    with attach(tmp_path, model, optimizer, **options) as agent:
        run_loop(model, optimizer)
    assert agent.errors == 0
    return open_run(agent.path)


def misuses(run: Run) -> list[str]:
    """Return what a run says of misuse."""
    return [event["message"] for event in run.events if event["kind"] == "clip_misuse"]


WRONG = {
    "before backward": ("zero clip backward step", "no gradient was there"),
    "before the first backward": ("clip backward step zero", "no gradient was there"),
    "after the step": ("zero backward step clip", "after optimizer.step()"),
    "after the step, zeroed last": ("backward step clip zero", "after optimizer.step()"),
    "twice": ("zero backward clip clip step", "twice in one step on the same gradients, at 0.5 and at 0.5"),
    "twice, tighter": ("zero backward clip tight step", "at 0.5 and at 0.25"),
    "twice, measured between": ("zero backward clip measure tight step", "at 0.5 and at 0.25"),
}


@pytest.mark.parametrize("backward_hooks", ["auto", "off"])
@pytest.mark.parametrize("what", WRONG)
def test_misuse_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str, backward_hooks: str) -> None:
    """What is wrong is said in one event and one warning, and what happened is recorded all the same."""
    order, words = WRONG[what]
    with caplog.at_level(logging.WARNING, "gradiometer"):
        run = observed(tmp_path, lambda m, o: loop(m, o, order), backward=backward_hooks)
    (message,) = misuses(run)
    assert words in message
    assert [record.getMessage() for record in caplog.records] == [f"gradiometer: {message}"]
    assert len(run) == STEPS
    if "twice" not in what:
        assert run.own_clipping == {}
        np.testing.assert_array_equal(run.coefficient, 1.0)
    else:
        assert run.own_clipping["clip_grad_norm_"].all()
        np.testing.assert_allclose(run.grad_norm_postclip, 0.25 if "at 0.25" in words else 0.5, rtol=1e-5)


def test_both_factors_of_two_clips(tmp_path: Path) -> None:
    """Where the loop clips twice, the norms before are those before both."""
    wanted: list[Any] = []

    def twice(model: nn.Sequential, optimizer: Optimizer) -> None:
        wanted.extend(loop(model, optimizer, "zero backward clip tight step"))

    run = observed(tmp_path, twice)
    np.testing.assert_allclose(run.parameter_norms, wanted, rtol=1e-6)


RIGHT = {
    "the plain loop": "zero backward clip step",
    "zeroed last": "backward clip step zero",
    "accumulation": "zero backward backward clip step",
    "never zeroed": "backward clip step",
    "clipped each micro-batch": "zero backward clip backward clip step",
    "measured before and after": "zero backward measure clip measure step measure",
    "measured after the step only": "zero backward step measure",
    "measured before backward": "zero measure backward clip step",
    "measured with a large limit": "zero backward loose clip loose step loose",
    "measured after the step with a limit": "zero backward clip step clip",
    "an early clip too many": "zero clip backward clip step",
    "by value and by norm": "zero backward value clip step",
    "the same gradients stepped twice": "zero backward clip step clip step",
}


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("what", RIGHT)
def test_what_is_no_misuse(tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str, to_none: bool) -> None:
    """Unusual places of a clip are not called wrong."""
    with caplog.at_level(logging.WARNING, "gradiometer"):
        run = observed(tmp_path, lambda m, o: loop(m, o, RIGHT[what], to_none=to_none))
    assert misuses(run) == []
    assert caplog.messages == []
    assert ("clip" in RIGHT[what].split()) is bool(run.own_clipping)


def test_clipping_each_micro_batch(tmp_path: Path) -> None:
    """Where each micro-batch is clipped, the row holds what there was before the last clip, which shaped the step."""
    wanted: list[Any] = []

    def micro(model: nn.Sequential, optimizer: Optimizer) -> None:
        wanted.extend(loop(model, optimizer, "zero backward clip backward clip step")[1::2])

    run = observed(tmp_path, micro)
    np.testing.assert_allclose(run.parameter_norms, wanted, rtol=1e-6)
    np.testing.assert_allclose(run.grad_norm_postclip, MAX_NORM, rtol=1e-5)


def test_a_clip_that_something_else_undid(tmp_path: Path) -> None:
    """Gradients that the loop writes anew after its clip are recorded as the step finds them."""

    def overwrite(model: nn.Sequential, optimizer: Optimizer) -> None:
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(loss_of(model, step))
            clip(model)
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(1.0)
            optimizer.step()

    run = observed(tmp_path, overwrite)
    np.testing.assert_allclose(run.grad_norm_preclip, math.sqrt(58), rtol=1e-6)
    assert run.own_clipping == {}


def test_gradients_that_are_kept_after_the_step(tmp_path: Path) -> None:
    """A loop that never zeroes, and clips what it has accumulated after the step, is not told that it is in vain."""
    run = observed(tmp_path, lambda m, o: loop(m, o, "backward step clip"))
    assert misuses(run) == []


def test_a_bad_batch_that_the_loop_leaves_out(tmp_path: Path) -> None:
    """A loop that throws the gradients of a batch away after having clipped them does no wrong."""

    def picky(model: nn.Sequential, optimizer: Optimizer) -> None:
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(loss_of(model, step))
            clip(model)
            if step % 2 == 0:
                optimizer.step()

    run = observed(tmp_path, picky)
    assert misuses(run) == []
    assert len(run) == 3
    assert run.own_clipping["clip_grad_norm_"].all()


def test_frozen_and_unused_layers(tmp_path: Path) -> None:
    """A layer without gradients that the loop would clip as well is no misuse."""

    def by_layer(model: nn.Sequential, optimizer: Optimizer) -> None:
        model[0].requires_grad_(requires_grad=False)
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(loss_of(model, step))
            for layer in (model[0], model[2]):
                clip(layer)
            optimizer.step()

    run = observed(tmp_path, by_layer)
    assert misuses(run) == []
    assert run.own_clipping["clip_grad_norm_"].all()


def test_two_players(tmp_path: Path) -> None:
    """Two optimizers with backward passes of their own, each clipped before its step, or both before each."""
    for both in (False, True):
        players = nn.ModuleDict({"g": small_model(0), "d": small_model(1)})
        optimizers = {name: SGD(player.parameters(), lr=1e-3) for name, player in players.items()}
        wanted = []
        with attach(tmp_path, players, [*optimizers.values()], together=False) as agent:
            for step in range(STEPS):
                for name, player in players.items():
                    optimizers[name].zero_grad()
                    backward(loss_of(player, step))
                    wanted.append(np.linalg.norm(hand_norms(player)))
                    clip(players if both else player)
                    optimizers[name].step()
        run = open_run(agent.path)
        assert misuses(run) == []
        assert agent.errors == 0
        np.testing.assert_allclose(run.grad_norm_preclip, wanted, rtol=1e-5)
        assert run.own_clipping["clip_grad_norm_"].all()


def test_in_a_closure(tmp_path: Path) -> None:
    """LBFGS evaluates its closure several times a step, and the loop clips in each: the first is recorded."""
    model = small_model()
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=4)
    wanted: list[Any] = []
    with attach(tmp_path, model, optimizer) as agent:
        for step in range(STEPS):
            evaluations: list[Any] = []

            def closure(step: int = step, evaluations: list[Any] = evaluations) -> float:
                optimizer.zero_grad()
                loss = loss_of(model, step)
                backward(loss)
                evaluations.append(hand_norms(model))
                clip(model)
                return loss.item()

            optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch
            wanted.append(evaluations[0])
            assert len(evaluations) > 1
    run = open_run(agent.path)
    assert misuses(run) == []
    np.testing.assert_allclose(run.parameter_norms, wanted, rtol=1e-5)


def scaled(tmp_path: Path, order: str, *, fused: bool = False, max_norm: float = MAX_NORM) -> tuple[Run, list[Any]]:
    """Train under a GradScaler with the parts of a step in the order given; return the run and the true norms."""
    model, scaler, norms = small_model(), GradScaler("cpu", init_scale=SCALE), []
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=fused)
    parts: dict[str, Callable[[], object]] = {
        "unscale": lambda: scaler.unscale_(optimizer),
        "clip": lambda: clip(model, max_norm),
    }
    with attach(tmp_path, model, optimizer) as agent:
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(scaler.scale(loss_of(model, step)))
            norms.append(hand_norms(model) / SCALE)
            for part in order.split():
                parts[part]()
            scaler.step(optimizer)
            scaler.update()
    assert agent.errors == 0
    return open_run(agent.path), norms


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_scaler(tmp_path: Path, fused: bool) -> None:
    """A clip after ``unscale_`` is recorded with the true norms before it."""
    run, norms = scaled(tmp_path, "unscale clip", fused=fused)
    assert misuses(run) == []
    np.testing.assert_allclose(run.parameter_norms, norms, rtol=1e-5)
    np.testing.assert_allclose(run.grad_norm_postclip, MAX_NORM, rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("order", ["clip", "clip unscale"])
def test_before_unscale(tmp_path: Path, order: str, fused: bool) -> None:
    """A clip of gradients that carry the loss scale is named, and its rows are true once a scaler was seen."""
    run, norms = scaled(tmp_path, order, fused=fused)
    (message,) = misuses(run)
    assert "scaler.unscale_(optimizer)" in message
    np.testing.assert_allclose(run.parameter_norms[1:], norms[1:], rtol=1e-5)
    np.testing.assert_allclose(run.grad_norm_postclip[1:], MAX_NORM / SCALE, rtol=1e-4)


def test_a_limit_that_carries_the_scale_too(tmp_path: Path) -> None:
    """A loop that multiplies its limit by the loss scale instead of unscaling does no wrong."""
    run, norms = scaled(tmp_path, "clip", max_norm=MAX_NORM * SCALE)
    assert misuses(run) == []
    np.testing.assert_allclose(run.parameter_norms[1:], norms[1:], rtol=1e-5)
    np.testing.assert_allclose(run.grad_norm_postclip, MAX_NORM, rtol=1e-5)


def test_a_step_that_the_scaler_skips(tmp_path: Path) -> None:
    """A step with an Inf, clipped and skipped, is recorded as both non-finite and skipped, with its culprit."""
    model, scaler = small_model(), GradScaler("cpu", init_scale=SCALE)
    optimizer = SGD(model.parameters(), lr=1e-3)
    with attach(tmp_path, model, optimizer, backward="off") as agent:
        backward(scaler.scale(loss_of(model, 0)))
        gradient = model.get_parameter("0.bias").grad
        assert gradient is not None
        gradient[3] = math.inf
        scaler.unscale_(optimizer)
        clip(model)
        scaler.step(optimizer)
        scaler.update()
    run = open_run(agent.path)
    assert run.skipped.tolist() == run.nonfinite.tolist() == [True]
    assert run.first_nonfinite == ["0.bias"]
    assert np.isfinite(run.parameter_norms[0]).tolist() == [True, False, True, True]


def test_more_calls_than_parameters(tmp_path: Path) -> None:
    """A step with more clips than a row can tell of is counted as a telemetry failure, and training goes on."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=1e-3)
    with attach(tmp_path, model, optimizer) as agent:
        backward(loss_of(model, 0))
        for _ in range(14):
            clip(model)
        optimizer.step()
    assert agent.errors == 2
    assert len(open_run(agent.path)) == 1
    assert torch.isfinite(torch.cat([parameter.flatten() for parameter in model.parameters()])).all()
