"""Faults of published code that no vector asks about, and what stages of one policy must not mistake."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradiometer import open_run
from gradiometer.policy.base import Layout
from gradiometer.policy.build import bind as bind_all
from gradiometer.policy.build import build_pipeline
from gradiometer.policy.pipeline import Pipeline, observe
from gradiometer.policy.spec import load_policy
from tests._stages import STAGES
from tests._training import attach, small_model, train


def bind(stage: dict[str, Any]) -> Pipeline:
    layout = Layout(names=["a"], layers=["a"], device=torch.device("cpu"))
    pipeline = build_pipeline(load_policy([stage]), layout)
    assert pipeline is not None
    return pipeline


@pytest.mark.parametrize("compat", ["safe", "reference"])
def test_clipped_feedback_limits_growth(compat: str) -> None:
    """Norms that stay ten times higher double AdaGC's bound in 1733 steps, and are clipped all the while."""
    pipeline = bind({"adagc": {"warmup_steps": 1, "compat": compat}})
    states = pipeline.init()
    thresholds = []
    for step in range(1736):
        outcome, states = pipeline.decide(states, observe(torch.tensor([10.0 if step else 1.0])), step)
        thresholds.append(float(outcome.decisions[0].threshold))
        assert outcome.coefficient is not None
        assert float(outcome.coefficient) < 1 or not step
    doubled = next(step for step, each in enumerate(thresholds[1:]) if each >= 2 * thresholds[1])
    assert doubled == math.ceil(math.log(2) / math.log(1.0004)) == 1734


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("fused", [False, True])
def test_squares_that_overflow_zero_nothing_in_silence(tmp_path: Path, kind: str, fused: bool) -> None:
    """Finite elements whose float32 squares do not add up are left as they are, clamped, or said to be scaled by 0."""
    parameter = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.SGD([parameter], lr=1e-30, fused=fused)
    with attach(tmp_path, nn.ParameterList([parameter]), optimizer, policy=[{kind: STAGES[kind]}]) as agent:
        for _ in range(5):
            parameter.grad = torch.full((3, 2), 1e25)
            agent.log(loss=1.0)
            optimizer.step()
    run = open_run(agent.path)
    gradient = {"value": float(STAGES["value"]["max_abs"]), "agc": 0.0}.get(kind, 1e25)
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, torch.full((3, 2), gradient))
    assert run.nonfinite.all()
    assert run.skipped.tolist() == [kind in ("nonfinite", "skip")] * 5
    if kind in ("value", "agc"):
        assert (run.coefficients[:, 0] < 1e-20).all()


@pytest.mark.parametrize("compat", ["safe", "reference"])
@pytest.mark.parametrize("stage", [{"zclip": {}}, {"adagc": {"warmup_steps": 0}}])
def test_a_norm_at_its_bound_is_left_alone(stage: dict[str, Any], compat: str) -> None:
    """``clip_grad_norm_`` shrinks a norm that equals its bound, ZClip and AdaGC do not."""
    ((kind, settings),) = stage.items()
    outcomes = []
    for given in ({kind: settings | {"compat": compat}}, {"global_norm": {"max_norm": 1.0}}):
        pipeline = bind(given)
        states = pipeline.init()
        if kind == "adagc" and "adagc" in given and compat == "reference":
            states["adagc"]["average"].fill_(1 / 1.04)
        outcomes.append(pipeline.decide(states, observe(torch.tensor([1.0], dtype=torch.float64)), 0)[0].coefficient)
    first, torchs = outcomes
    assert first is not None
    assert torchs is not None
    assert (first.item(), torchs.item()) == (1.0, 1 / (1 + 1e-6))


def test_a_skip_is_known_to_all_stages_behind_it() -> None:
    """A step that the first stage skips teaches the last one nothing, though one between them would have taken it."""
    skips = [{"skip": {"name": name, "rule": "abs", "threshold": bound}} for name, bound in (("a", 1.0), ("b", 99.0))]
    layout = Layout(names=["a"], layers=["a"], device=torch.device("cpu"))
    pipeline = build_pipeline(load_policy([*skips, {"zclip": {}}]), layout)
    assert pipeline is not None
    states = pipeline.init()
    for step, norm in enumerate([0.5, 2.0, 0.6]):
        _, states = pipeline.decide(states, observe(torch.tensor([norm])), step)
    assert (int(states["zclip"]["count"]), int(states["zclip"]["rejected"])) == (2, 1)
    assert states["zclip"]["mean"].item() == pytest.approx(0.55)


def test_a_unit_is_there_if_any_of_its_parameters_is() -> None:
    """A layer whose bias alone has a gradient, of NaN, has a norm to reject; one without any has none."""
    layout = Layout(names=["a.weight", "a.bias", "b"], layers=["a", "a", "b"], device=torch.device("cpu"))
    pipeline = build_pipeline(load_policy([{"ema_ratio": {"scope": "layer"}}]), layout)
    assert pipeline is not None
    _, states = pipeline.decide(pipeline.init(), observe(torch.tensor([-0.0, math.nan, -0.0])), 0)
    assert states["ema_ratio"]["rejected"].tolist() == [1, 0]


def test_a_shadow_counts_its_steps_from_where_it_came_into_force() -> None:
    """A policy put in shadow at step 50 has its warm-up from there on."""
    layout = Layout(names=["a"], layers=["a"], device=torch.device("cpu"))
    shadow = bind_all(load_policy({"shadow": [{"adagc": {"warmup_steps": 2}}]}), layout, {"adagc": 50}).shadow
    assert shadow is not None
    states, thresholds = shadow.init(), []
    for step in range(50, 53):
        (decision,), states = shadow.decide(states, observe(torch.tensor([0.5])), step)
        thresholds.append(float(decision.threshold))
    assert thresholds == [1.0, 1.0, pytest.approx(0.52)]


def test_a_shadow_sees_what_was_measured(tmp_path: Path) -> None:
    """What acts on each layer by itself is nothing to a policy in shadow: it decides about the norms before that."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    tight = {"group_norm": {"max_norm": 1e-3}}
    policy = {"pipeline": [tight], "shadow": [{"global_norm": {"max_norm": 1e-2}}]}
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        train(model, optimizer)
    run = open_run(agent.path)
    wanted = 1e-2 / (run.grad_norm_preclip + 1e-6)
    assert run.coefficients[:, 1].tolist() == pytest.approx(wanted.tolist(), rel=1e-6)
