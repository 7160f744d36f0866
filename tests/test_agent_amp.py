"""Mixed precision: GradScaler with every kind of optimizer, autocast, and gradients of half precision."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from gradiometer import NonFiniteGradientError, Run, open_run
from gradiometer.records import Flag
from tests._training import assert_same, attach, backward, batch, check_run, hand_norms, loss_of, small_model

MAX_NORM, SCALE, STEPS = 2.0, 1024.0, 6
CLIP = [{"global_norm": {"max_norm": MAX_NORM}}]
VALUE = [{"value": {"max_abs": 0.5}}]
LAYERS = [{"group_norm": {"max_norm": MAX_NORM}}]
Clip = Callable[[nn.Sequential], object]


def make(model: nn.Module, *, fused: bool) -> Optimizer:
    """Make an AdamW of either kind."""
    return AdamW(model.parameters(), lr=0.01, fused=fused)


def train_scaled(model: nn.Sequential, optimizer: Optimizer, *, unscale: bool, clip: Clip | None = None) -> None:
    """Train with a GradScaler, whose loss is Inf in step 2."""
    scaler = GradScaler("cpu", init_scale=SCALE)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, step) * (math.inf if step == 2 else 1.0)
        backward(scaler.scale(loss))
        if unscale:
            scaler.unscale_(optimizer)
        if clip:
            clip(model)
        scaler.step(optimizer)
        scaler.update()


def true_norms(model: nn.Sequential, optimizer: Optimizer, clip: Clip | None = None) -> list[list[float]]:
    """Train without a scaler, leaving step 2 out; return the norms before clipping of the other steps."""
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(loss_of(model, step))
        if step != 2:
            norms.append(hand_norms(model).tolist())
            if clip:
                clip(model)
            optimizer.step()
    return norms


def check_scaled(run: Run, norms: list[list[float]], *, fused: bool) -> None:
    """Assert that the five good steps have their true norms, and that step 2 is recorded as skipped."""
    good = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(run.parameter_norms[good], norms, rtol=1e-5)
    np.testing.assert_allclose(run.grad_norm_preclip[good], np.linalg.norm(norms, axis=1), rtol=1e-5)
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert run.rows["loss_scale"].tolist() == [SCALE] * 3 + [SCALE / 2] * 3
    assert run.skipped.tolist() == run.nonfinite.tolist() == [False, False, True, False, False, False]
    assert bool(run.rows["flags"][2] & Flag.SCALER) is not fused
    assert run.status["skipped_steps"] == 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_the_loss_scale_is_divided_out(tmp_path: Path, fused: bool, unscale: bool) -> None:
    """Under a GradScaler the norms are the true ones, and a step that it skips is recorded as skipped."""
    model = small_model()
    plain, scaled = copy.deepcopy(model), copy.deepcopy(model)
    norms = true_norms(plain, make(plain, fused=fused))
    train_scaled(scaled, make(scaled, fused=fused), unscale=unscale)
    optimizer = make(model, fused=fused)
    with attach(tmp_path, model, optimizer, backward="every") as agent:
        train_scaled(model, optimizer, unscale=unscale)
    run = open_run(agent.path)
    check_scaled(run, norms, fused=fused)
    np.testing.assert_allclose(run.stat("microbatch_norm")[[0, 1, 3, 4, 5]], norms, rtol=1e-5)
    assert_same(model, scaled, exactly=True)


CASES: dict[str, tuple[Any, Clip]] = {
    "global_norm": (CLIP, lambda model: nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)),
    "value": (VALUE, lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.5)),
    "group_norm": (
        LAYERS,
        lambda model: [nn.utils.clip_grad_norm_(m.parameters(), MAX_NORM) for m in (model[0], model[2])],
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_clipping_under_a_scaler(tmp_path: Path, case: str, fused: bool, unscale: bool) -> None:
    """Every policy clips the true gradients under a GradScaler, whether or not ``unscale_`` was called."""
    policy, clip = CASES[case]
    model = small_model()
    plain = copy.deepcopy(model)
    norms = true_norms(plain, make(plain, fused=fused), clip)
    optimizer = make(model, fused=fused)
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        train_scaled(model, optimizer, unscale=unscale)
    run = open_run(agent.path)
    check_scaled(run, norms, fused=fused)
    assert run.clipped[[0, 1, 3, 4, 5], 0].all()
    assert_same(model, plain)


@pytest.mark.parametrize("case", CASES)
def test_clipped_norms_have_no_loss_scale(tmp_path: Path, case: str) -> None:
    """The norms after clipping are true ones too, also on a fused optimizer that still holds scaled gradients."""
    policy, clip = CASES[case]
    model = small_model()
    plain = copy.deepcopy(model)
    backward(loss_of(plain, 0))
    clip(plain)
    optimizer = make(model, fused=True)
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        train_scaled(model, optimizer, unscale=False)
    np.testing.assert_allclose(open_run(agent.path).stat("grad_norm_postclip")[0], hand_norms(plain), rtol=1e-5)


@pytest.mark.parametrize("policy", [CLIP, VALUE, [{"nonfinite": {"action": "skip"}}, *CLIP]])
def test_a_scalers_attributes_are_given_back(tmp_path: Path, policy: Any) -> None:
    """A fused optimizer is left without ``grad_scale`` and ``found_inf``, as the scaler leaves it."""
    model = small_model()
    optimizer = make(model, fused=True)
    with attach(tmp_path, model, optimizer, policy=policy):
        train_scaled(model, optimizer, unscale=False)
        assert {"grad_scale", "found_inf"}.isdisjoint(optimizer.__dict__)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_and_a_nonfinite_policy(tmp_path: Path, fused: bool) -> None:
    """With both a scaler and a ``nonfinite`` policy a bad step is skipped once, and the scale is lowered once."""
    model = small_model()
    plain = copy.deepcopy(model)
    norms = true_norms(plain, make(plain, fused=fused))
    optimizer = make(model, fused=fused)
    with attach(tmp_path, model, optimizer, policy=[{"nonfinite": {"action": "skip"}}]) as agent:
        train_scaled(model, optimizer, unscale=False)
    check_scaled(open_run(agent.path), norms, fused=fused)
    assert_same(model, plain)


def test_raising_under_a_scaler_leaves_no_scale(tmp_path: Path) -> None:
    """A policy that raises within a scaler's step leaves no loss scale on the optimizer for the next one to trip on."""
    model = small_model()
    optimizer, scaler = make(model, fused=True), GradScaler("cpu", init_scale=SCALE)
    with attach(tmp_path, model, optimizer, policy=[{"nonfinite": {"action": "raise"}}]):
        backward(scaler.scale(loss_of(model, 0) * math.inf))
        with pytest.raises(NonFiniteGradientError):
            scaler.step(optimizer)
        assert {"grad_scale", "found_inf"}.isdisjoint(optimizer.__dict__)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_scaler_that_skips_the_first_step(tmp_path: Path, momentum: float) -> None:
    """Fused SGD with momentum survives a first step that the scaler skips, if a ``nonfinite`` policy is there."""
    model = small_model()
    twin = copy.deepcopy(model)
    reference = SGD(twin.parameters(), lr=0.01, momentum=momentum)
    optimizer = SGD(model.parameters(), lr=0.01, momentum=momentum, fused=True)
    scaler = GradScaler("cpu", init_scale=SCALE)
    with attach(tmp_path, model, optimizer, policy=[{"nonfinite": {"action": "skip"}}]):
        for step in range(4):
            optimizer.zero_grad()
            backward(scaler.scale(loss_of(model, step) * (math.nan if step == 0 else 1)))
            scaler.step(optimizer)
            scaler.update()
            if step:
                reference.zero_grad()
                backward(loss_of(twin, step))
                reference.step()
    assert_same(model, twin)


def test_a_disabled_scaler(tmp_path: Path) -> None:
    """A disabled GradScaler is as if it were not there."""
    model = small_model()
    optimizer, wanted = make(model, fused=False), []
    scaler = GradScaler("cpu", enabled=False)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        for step in range(3):
            optimizer.zero_grad()
            backward(scaler.scale(loss_of(model, step)))
            wanted.append(hand_norms(model))
            scaler.step(optimizer)
            scaler.update()
    assert np.isnan(check_run(agent.path, wanted, MAX_NORM).rows["loss_scale"]).all()


def test_autocast(tmp_path: Path) -> None:
    """Under bfloat16 autocast the float32 gradients are measured."""
    model = small_model()
    optimizer, wanted = make(model, fused=True), []
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, step)
            backward(loss)
            wanted.append(hand_norms(model))
            optimizer.step()
    check_run(agent.path, wanted, MAX_NORM)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_beyond_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """The norm of half-precision gradients is right beyond what the dtype can hold (65504 for float16)."""
    model = nn.Linear(100, 100, bias=False).to(dtype)
    optimizer = SGD(model.parameters(), lr=1e-6)
    with attach(tmp_path, model, optimizer) as agent:
        model.weight.grad = torch.linspace(-6e4, 6e4, 10_000).reshape(100, 100).to(dtype)
        wanted = hand_norms(model)
        optimizer.step()
    assert wanted.item() > 1e6
    np.testing.assert_allclose(open_run(agent.path).parameter_norms, [wanted], rtol=5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_clipping_half_precision(tmp_path: Path, dtype: torch.dtype, fused: bool) -> None:
    """Half-precision gradients are clipped to the threshold, as far as the dtype can say."""
    model = nn.Linear(4, 2, bias=False).to(dtype)
    optimizer = SGD(model.parameters(), lr=1.0, fused=fused)
    with attach(tmp_path, model, optimizer, policy=CLIP):
        before = model.weight.detach().double()
        optimizer.zero_grad()
        backward(model(batch(0).to(dtype)).float().square().sum())
        optimizer.step()
    moved = (before - model.weight.detach().double()).norm().item()
    assert moved == pytest.approx(MAX_NORM, rel=0.02)


@pytest.mark.parametrize("fused", [False, True])
def test_a_float64_model(tmp_path: Path, fused: bool) -> None:
    """A model in float64 is measured and clipped, and its micro-batches too."""
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 300, bias=False)).double()
    optimizer, wanted = make(model, fused=fused), []
    with attach(tmp_path, model, optimizer, policy=CLIP, backward="every") as agent:
        for step in range(3):
            optimizer.zero_grad()
            backward(model(batch(step).double()).square().sum())
            wanted.append(hand_norms(model))
            optimizer.step()
        assert agent.errors == 0
    np.testing.assert_allclose(check_run(agent.path, wanted, MAX_NORM).stat("microbatch_norm"), wanted, rtol=1e-6)
