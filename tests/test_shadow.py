"""Policies in shadow: they decide, are recorded, and leave training alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from gradiometer import Run, open_run
from gradiometer.exporter import collector
from gradiometer.policy.base import Layout, State
from gradiometer.policy.build import bind
from gradiometer.policy.global_norm import GlobalNorm
from gradiometer.policy.pipeline import observe
from gradiometer.policy.spec import load_policy
from gradiometer.records import Flag
from gradiometer.report import summarize
from tests._stages import STAGES, parameters, shadow_of
from tests._training import assert_same, attach, backward, loss_of, small_model, train

ACTING: list[dict[str, Any]] = [{"nonfinite": {}}, {"global_norm": {"name": "clip", "max_norm": 2.0}}]
SHADOW: list[dict[str, Any]] = [
    {"nonfinite": {"name": "guard", "action": "raise"}},
    {"global_norm": {"name": "wide", "max_norm": 15.0}},
    {"group_norm": {"max_norm": 3.0}},
    {"value": {"max_abs": 1.0}},
]
HOW: dict[str, Callable[[nn.Module], Optimizer]] = {
    "fused": lambda model: AdamW(model.parameters(), lr=0.01, fused=True),
    "foreach": lambda model: AdamW(model.parameters(), lr=0.01, foreach=True),
    "plain": lambda model: SGD(model.parameters(), lr=0.01, momentum=0.9),
}


def columns(run: Run, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return a policy's thresholds and coefficients, float32[T] each."""
    slot = run.manifest.policies.index(name)
    return run.rows["policy_threshold"][:, slot], run.rows["policy_coefficient"][:, slot]


def clipped(run: Run, name: str) -> list[bool]:
    found: list[bool] = run.clipped[:, run.manifest.policies.index(name)].tolist()
    return found


def spoil(model: nn.Module, optimizer: Optimizer) -> None:
    """Take a step whose gradients are NaN."""
    optimizer.zero_grad()
    backward(loss_of(model, 0) * math.nan)
    optimizer.step()


@pytest.mark.parametrize("pipeline", [[], ACTING], ids=["observing", "acting"])
@pytest.mark.parametrize("how", HOW)
def test_a_shadow_changes_nothing(tmp_path: Path, how: str, pipeline: list[Any]) -> None:
    """With a shadow beside it, training moves the parameters to the same bits as without."""
    model = small_model()
    twin = copy.deepcopy(model)
    for each, policy in ((twin, pipeline or None), (model, {"pipeline": pipeline, "shadow": SHADOW})):
        optimizer = HOW[how](each)
        with attach(tmp_path, each, optimizer, policy=policy) as agent:
            train(each, optimizer, range(6))
    assert_same(model, twin, exactly=True)
    run = open_run(agent.path)
    assert run.shadow.tolist() == [False] * len(pipeline) + [True] * 4
    assert any(clipped(run, "wide"))
    assert all(clipped(run, "group_norm"))
    assert agent.errors == 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_shadow_changes_nothing_under_a_scaler(tmp_path: Path, fused: bool) -> None:
    """Under a GradScaler too, whose skipped steps a shadow hears of, and whose scale it does not see."""
    model = small_model()
    twin, agents = copy.deepcopy(model), []
    for each, policy in ((twin, None), (model, {"shadow": SHADOW})):
        optimizer = AdamW(each.parameters(), lr=0.01, fused=fused)
        scaler = GradScaler("cpu", init_scale=1024.0)
        with attach(tmp_path, each, optimizer, policy=policy) as agent:
            for step in range(5):
                optimizer.zero_grad()
                backward(scaler.scale(loss_of(each, step) * (math.inf if step == 2 else 1.0)))
                scaler.step(optimizer)
                scaler.update()
        agents.append(agent)
    assert_same(model, twin, exactly=True)
    run = open_run(agents[1].path)
    assert clipped(run, "guard") == run.skipped.tolist() == [False, False, True, False, False]
    total, largest = run.grad_norm_preclip, columns(run, "value")[1]
    np.testing.assert_allclose(columns(run, "wide")[1][[0, 1, 3, 4]], (15 / (total + 1e-6))[[0, 1, 3, 4]], rtol=1e-5)
    assert ((largest[[0, 1, 3, 4]] > 0.01) & (largest[[0, 1, 3, 4]] < 1)).all()


@pytest.mark.parametrize("kind", parameters("value", "agc"))
def test_a_shadow_decides_as_if_it_were_in_force(tmp_path: Path, kind: str) -> None:
    """Up to its first clip, thresholds and coefficients are those of the same policy run for real."""
    stage = {kind: STAGES[kind]}
    runs = []
    for policy in ({"pipeline": [stage]}, {"shadow": [stage]}):
        model = small_model()
        optimizer = SGD(model.parameters(), lr=0.0)
        with attach(tmp_path, model, optimizer, policy=policy) as agent:
            train(model, optimizer, range(12))
        runs.append(open_run(agent.path))
    real, shadow = runs
    first = int(np.argmax(real.clipped[:, 0])) if real.clipped.any() else len(real) - 1
    for name in ("policy_threshold", "policy_coefficient"):
        np.testing.assert_array_equal(real.rows[name][: first + 1, 0], shadow.rows[name][: first + 1, 0])
    assert real.clipped[first, 0] == shadow.clipped[first, 0]


@pytest.mark.parametrize("kind", parameters("value", "agc"))
def test_the_record_is_what_deciding_again_gives(tmp_path: Path, kind: str) -> None:
    """Asked again about the recorded norms, a policy gives the thresholds and coefficients that were recorded."""
    model = small_model()
    optimizer, spec = SGD(model.parameters(), lr=0.01), load_policy(shadow_of(kind))
    with attach(tmp_path, model, optimizer, policy=spec) as agent:
        train(model, optimizer, range(12))
        spoil(model, optimizer)
    run = open_run(agent.path)
    layers = [parameter.layer for parameter in run.manifest.parameters]
    shadow = bind(spec, Layout(names=run.parameters, layers=layers, device=torch.device("cpu"))).shadow
    assert shadow is not None
    states, wanted = shadow.init(), []
    for step, norms in enumerate(run.parameter_norms):
        (decision,), states = shadow.decide(states, observe(torch.from_numpy(norms.copy())), step)
        strength = 0.0 if decision.skip is not None and bool(decision.skip) else 1.0
        strength = strength if decision.strength is None else float(decision.strength)
        wanted.append((float(decision.threshold), strength))
    np.testing.assert_array_equal(np.stack(columns(run, kind), axis=1), np.array(wanted, np.float32))


def test_a_policy_file_that_only_watches(tmp_path: Path) -> None:
    """With nothing but a shadow the agent observes: no step is skipped or counted as clipped, nothing raises."""
    model = small_model()
    twin = copy.deepcopy(model)
    optimizer, reference = SGD(model.parameters(), lr=0.01), SGD(twin.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy={"shadow": SHADOW}) as agent:
        for each, its in ((model, optimizer), (twin, reference)):
            train(each, its, range(2))
            spoil(each, its)
    run = open_run(agent.path)
    assert [torch.isnan(p).all() for p in model.parameters()] == [torch.isnan(p).all() for p in twin.parameters()]
    assert not run.skipped.any()
    assert not (run.rows["flags"] & Flag.CLIPPED).any()
    assert run.coefficient.tolist()[:2] == [1.0, 1.0]
    assert clipped(run, "guard") == [False, False, True]
    assert clipped(run, "wide") == (run.grad_norm_preclip > 15).tolist() == [True, False, False]


def test_a_skipped_step_masks_no_shadow(tmp_path: Path) -> None:
    """What a policy in force skips, one in shadow is asked about all the same; zeros count as clipped."""
    shadow: list[Any] = [
        {"nonfinite": {"name": "zeros", "action": "zero"}},
        {"skip": {"rule": "abs", "threshold": 1e-3}},
    ]
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy={"pipeline": ACTING, "shadow": shadow}) as agent:
        train(model, optimizer, range(2))
        spoil(model, optimizer)
    run = open_run(agent.path)
    assert run.skipped.tolist() == [False, False, True]
    assert clipped(run, "zeros") == [False, False, True]
    assert columns(run, "zeros")[1].tolist() == [1.0, 1.0, 0.0]
    assert run.status["skipped_steps"] == 1
    assert columns(run, "skip")[1].tolist()[:2] == [0.0, 0.0]


def test_the_largest_element_is_weighed_against_a_clamp(tmp_path: Path) -> None:
    """A clamp in shadow is recorded by what it would do to the largest element that it covers."""
    model = small_model()
    optimizer, wanted = SGD(model.parameters(), lr=0.01), []
    policy = {"shadow": [{"value": {"max_abs": 5.0, "match": "2.*"}}]}
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        for step in range(4):
            optimizer.zero_grad()
            backward(loss_of(model, step))
            gradients = [p.grad for name, p in model.named_parameters() if name.startswith("2.") and p.grad is not None]
            wanted.append(min(1.0, 5.0 / max(float(g.abs().max()) for g in gradients)))
            optimizer.step()
    found = columns(open_run(agent.path), "value")[1]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert (found < 1).any()


class Broken(GlobalNorm):
    """A policy that fails in its third step."""

    def decide(self, state: State, observation: Any, step: int) -> Any:
        if step == 2:
            raise ZeroDivisionError
        return super().decide(state, observation, step)


def test_a_shadow_that_fails_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A policy in shadow that raises is counted, said and asked no more; training and the others go on."""
    monkeypatch.setattr("gradiometer.policy.build.GlobalNorm", Broken)
    model = small_model()
    twin = copy.deepcopy(model)
    policy: Any = {"pipeline": [{"nonfinite": {}}], "shadow": SHADOW}
    for each, given in ((twin, [{"nonfinite": {}}]), (model, policy)):
        optimizer = SGD(each.parameters(), lr=0.01)
        with attach(tmp_path, each, optimizer, policy=given) as agent:
            train(each, optimizer, range(6))
            state = agent.state_dict()
    assert_same(model, twin, exactly=True)
    assert agent.errors == 1
    assert "wide" not in state["states"]
    run = open_run(agent.path)
    assert np.isfinite(columns(run, "wide")[0]).tolist() == [True, True, False, False, False, False]
    assert np.isfinite(columns(run, "group_norm")[0]).all()
    (event,) = [event for event in run.events if event["kind"] == "shadow_dropped"]
    assert "policy wide in shadow failed at step 2" in event["message"]
    assert caplog.text.count("is dropped") == 1


@pytest.mark.parametrize("together", [True, False])
def test_a_shadow_of_several_optimizers(tmp_path: Path, together: bool) -> None:
    """A shadow is asked once a row: for both optimizers together, or for each."""
    model = small_model()
    optimizers: list[Optimizer] = [SGD(model[0].parameters(), lr=0.01), SGD(model[2].parameters(), lr=0.01)]
    policy: Any = {"shadow": [{"nonfinite": {}}]}
    with attach(tmp_path, model, optimizers, policy=policy, together=together) as agent:
        for _ in range(3):
            for each in optimizers:
                each.zero_grad()
            backward(loss_of(model, 0) * math.nan)
            for each in optimizers:
                each.step()
        state = agent.state_dict()
    rows = 3 if together else 6
    assert clipped(open_run(agent.path), "nonfinite") == [True] * rows
    assert state["states"]["nonfinite"]["consecutive"] == rows


def test_a_closure_advances_a_shadow_once(tmp_path: Path) -> None:
    """However often a closure is evaluated in a step, a policy in shadow is asked about the first evaluation only."""
    model = small_model()
    optimizer = LBFGS(model.parameters(), lr=0.01, max_iter=4)
    calls: list[int] = []

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model, len(calls)) * (math.nan if not calls else 1.0)
        calls.append(1)
        backward(loss)
        return loss

    with attach(tmp_path, model, optimizer, policy={"shadow": SHADOW}) as agent:
        optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch
        state = agent.state_dict()
        assert len(open_run(agent.path)) == 1
    assert len(calls) >= 1
    assert state["states"]["guard"]["consecutive"] == 1


def test_what_is_said_of_a_shadow(tmp_path: Path) -> None:
    """Manifest, event, report and metrics tell what acts from what only watches."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    policy = {"pipeline": ACTING, "shadow": SHADOW[1:2]}
    with attach(tmp_path, model, optimizer, policy=policy, run_id="run") as agent:
        registry = CollectorRegistry()
        metrics = collector(agent)
        registry.register(metrics)
        train(model, optimizer, range(4))
        agent.flush()
        names: dict[str, Any] = {
            "act": {"run_id": "run", "policy": "clip", "mode": "act"},
            "shadow": {"run_id": "run", "policy": "wide", "mode": "shadow"},
        }
        for mode, threshold in (("act", 2.0), ("shadow", 15.0)):
            assert registry.get_sample_value("gradiometer_clip_events_total", names[mode]) == 4
            assert registry.get_sample_value("gradiometer_clip_threshold", names[mode]) == threshold
        assert registry.get_sample_value("gradiometer_clip_events_total", names["act"] | {"mode": "shadow"}) is None
        metrics.close()
    run = open_run(agent.path)
    assert run.manifest.policies == ("nonfinite", "clip", "wide")
    assert run.manifest.shadow == ("wide",)
    assert run.events[0]["message"].endswith("policy: nonfinite, clip; in shadow, never acting: wide")
    assert summarize(run)["clip_events"] == {"nonfinite": 0, "clip": 4}
    assert summarize(run)["shadow_events"] == {"wide": 4}
