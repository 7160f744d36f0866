"""The policies: what they decide, against torch's own clipping and recorded vectors, and what becomes of it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from gradiometer import open_run
from gradiometer.policy.base import Layout
from gradiometer.policy.build import build_pipeline
from gradiometer.policy.pipeline import Pipeline, observe
from gradiometer.policy.spec import load_policy
from tests._training import assert_same, attach, backward, check_run, hand_norms, loss_of, small_model, train

CPU = torch.device("cpu")
VECTORS = Path(__file__).parent / "vectors"
LAYERS = {"block.weight": "block", "block.bias": "block", "head.weight": "head"}


def vectors(name: str) -> dict[str, Any]:
    """Read a file of vectors; its non-finite numbers are strings that ``float`` reads."""
    found: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text())
    return found


def bind(*stages: Any) -> Pipeline:
    """Bind stages to three parameters in two layers."""
    layout = Layout(names=list(LAYERS), layers=list(LAYERS.values()), device=CPU)
    pipeline = build_pipeline(load_policy(list(stages)), layout)
    assert pipeline is not None
    return pipeline


def decide(pipeline: Pipeline, *norms: float) -> list[float]:
    """Decide about norms in float64; return the coefficient of each parameter."""
    observation = observe(torch.tensor(norms, dtype=torch.float64))
    outcome, _ = pipeline.decide(pipeline.init(), observation, 0)
    assert outcome.coefficient is not None
    coefficients: list[float] = outcome.coefficient.expand(len(norms)).tolist()
    return coefficients


def move(gradients: list[Tensor | None], policy: Any, path: Path, *, fused: bool = False) -> list[Tensor]:
    """Take a step of SGD at rate 1 from zero with these gradients; return what they had become."""
    parameters = [nn.Parameter(torch.zeros_like(torch.tensor(0.0) if g is None else g)) for g in gradients]
    model, optimizer = nn.ParameterList(parameters), SGD(parameters, lr=1.0, fused=fused)
    with attach(path, model, optimizer, policy=policy):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [-parameter.detach() for parameter in parameters]


def tensors(lists: Any, dtype: str) -> list[Tensor | None]:
    """Make gradients of nested lists of numbers."""

    def numbers(value: Any) -> Any:
        return [numbers(each) for each in value] if isinstance(value, list) else float(value)

    return [None if each is None else torch.tensor(numbers(each), dtype=getattr(torch, dtype)) for each in lists]


def _applies(case: Any) -> bool:
    asked = case["in"]
    return (
        asked["norm_type"] == 2.0
        and 0 < float(asked["max_norm"]) < math.inf
        and not asked["error_if_nonfinite"]
        and asked["dtype"] in ("float64", "float32")
        and bool(asked["grads"])
        and math.isfinite(float(case["out"]["total_norm"]))
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", [c for c in vectors("torch_clip_grad_norm")["cases"] if _applies(c)])
def test_global_norm_vectors(tmp_path: Path, case: Any, fused: bool) -> None:
    """``global_norm`` changes gradients as ``clip_grad_norm_`` did; a fused kernel to float32's digits."""
    dtype = case["in"]["dtype"]
    policy = [{"global_norm": {"max_norm": case["in"]["max_norm"]}}]
    moved = move(tensors(case["in"]["grads"], dtype), policy, tmp_path, fused=fused)
    tolerance = 1e-12 if dtype == "float64" and not fused else 5e-7
    for mine, other in zip(moved, tensors(case["out"]["grads"], dtype), strict=True):
        if other is not None:
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=0)


@pytest.mark.parametrize("case", [c for c in vectors("torch_clip_grad_value")["cases"] if c["in"]["clip_value"] > 0])
def test_value_vectors(tmp_path: Path, case: Any) -> None:
    """``value`` clamps as ``clip_grad_value_`` did, in every dtype: NaN stays, Inf becomes the bound."""
    dtype = case["in"]["dtype"]
    moved = move(tensors(case["in"]["grads"], dtype), [{"value": {"max_abs": case["in"]["clip_value"]}}], tmp_path)
    for mine, other in zip(moved, tensors(case["out"]["grads"], dtype), strict=True):
        assert other is not None
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


def test_per_parameter_vectors() -> None:
    """``group_norm`` of scope parameter clips each tensor as ``clip_grad_norm_``, called for it alone, did."""
    found = vectors("per_parameter_norm")
    pipeline = bind({"group_norm": {"max_norm": found["parameters"]["max_norm"], "scope": "parameter"}})
    for step in (step for case in found["cases"] for step in case["steps"]):
        norms = [float(each) for each in step["in"]]
        coefficients = decide(pipeline, *norms)
        for norm, coefficient, wanted in zip(norms, coefficients, step["out"], strict=True):
            if math.isfinite(norm):
                assert norm * coefficient == pytest.approx(wanted, rel=1e-12)
            else:
                assert coefficient == 1.0  # scaling cannot mend it: that is for nonfinite


@pytest.mark.parametrize("case", vectors("nonfinite_through_clip")["cases"])
def test_nonfinite_comes_before_clipping(tmp_path: Path, case: Any) -> None:
    """Where clipping spread NaN over all parameters, ``nonfinite`` in front of it leaves them unmoved."""
    gradients = tensors([case["in"]["grad_a"], case["in"]["grad_b"]], "float32")
    assert any(math.isnan(float(value)) for value in case["out"]["adamw_param_a"])
    moved = move(gradients, ["nonfinite", {"global_norm": {"max_norm": case["in"]["max_norm"]}}], tmp_path)
    assert [each.tolist() for each in moved] == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", vectors("gradscaler")["cases"])
def test_gradscaler_vectors(tmp_path: Path, case: Any, fused: bool) -> None:
    """Under a GradScaler the scale, the gradient, the skip and the parameter of each step are as the vectors say."""
    model = nn.ParameterList([nn.Parameter(torch.ones(()))])
    (parameter,) = model.parameters()
    optimizer, scaler = SGD(model.parameters(), lr=0.1, fused=fused), GradScaler("cpu", **case["parameters"])
    with attach(tmp_path, model, optimizer) as agent:
        for step in case["steps"]:
            optimizer.zero_grad()
            scaler.scale(parameter.detach())  # makes the scaler's own tensor
            parameter.grad = torch.tensor(float(step["in"]) * scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
            assert scaler.get_scale() == step["out"][3]
            assert parameter.item() == pytest.approx(step["out"][5], rel=1e-6)
    run = open_run(agent.path)
    assert run.rows["loss_scale"].tolist() == [step["out"][0] for step in case["steps"]]
    assert run.grad_norm_preclip.tolist() == pytest.approx(
        [abs(float(s["out"][1])) for s in case["steps"]], nan_ok=True
    )
    assert run.skipped.tolist() == [step["out"][2] for step in case["steps"]]


@pytest.mark.parametrize("fused", [False, True])
def test_group_norm_by_layer(tmp_path: Path, fused: bool) -> None:
    """``group_norm`` of scope layer is ``clip_grad_norm_`` called once for each layer."""
    model = small_model()
    twin = copy.deepcopy(model)
    optimizer, reference = _adamw(model, fused), _adamw(twin, fused)
    with attach(tmp_path, model, optimizer, policy=[{"group_norm": {"max_norm": 5.0}}]) as agent:
        for step in range(4):
            reference.zero_grad()
            backward(loss_of(twin, step))
            for layer in (twin[0], twin[2]):
                nn.utils.clip_grad_norm_(layer.parameters(), 5.0)
            after = hand_norms(twin)
            reference.step()
            train(model, optimizer, [step])
            np.testing.assert_allclose(open_run(agent.path).stat("grad_norm_postclip")[-1], after, rtol=1e-5)
    run = open_run(agent.path)
    np.testing.assert_allclose(run.coefficient, run.grad_norm_postclip / run.grad_norm_preclip, rtol=1e-6)
    assert_same(model, twin)


def _adamw(model: nn.Module, fused: bool) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01, fused=fused)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"match": "block.*"}, [0.5, 0.5, 1.0]),
        ({"match": ["*.bias", "head.*"]}, [1.0, 0.5, 0.5]),
        ({"exclude": "*.weight"}, [1.0, 0.5, 1.0]),
        ({"match": "block.*", "exclude": "*.bias"}, [0.5, 1.0, 1.0]),
        ({"match": "re:weight$"}, [0.5, 1.0, 0.5]),
        ({"match": "re:bl.ck"}, [0.5, 0.5, 1.0]),
    ],
)
def test_patterns_choose_parameters(settings: Any, wanted: list[float]) -> None:
    """Globs match whole names and ``re:`` any part; what is not chosen is left alone."""
    pipeline = bind({"group_norm": {"max_norm": 1.0, "scope": "parameter", **settings}})
    assert decide(pipeline, 2.0, 2.0, 2.0) == pytest.approx(wanted, rel=1e-5)


def test_what_is_excluded_does_not_count_in_the_global_norm() -> None:
    """A parameter that ``global_norm`` leaves out neither counts in the norm nor is scaled."""
    pipeline = bind({"global_norm": {"max_norm": 1.0, "exclude": "head.*"}})
    assert decide(pipeline, 3.0, 4.0, 100.0) == pytest.approx([0.2, 0.2, 1.0], rel=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_value_leaves_others_alone(tmp_path: Path, fused: bool) -> None:
    """Only the parameters that ``value`` covers are clamped."""
    gradients = [torch.tensor([3.0, -4.0]), torch.tensor([5.0])]
    moved = move([*gradients], [{"value": {"max_abs": 1.0, "match": "1"}}], tmp_path, fused=fused)
    assert [each.tolist() for each in moved] == [[3.0, -4.0], [1.0]]


def test_a_layer_counts_only_its_chosen_parameters() -> None:
    """Within a layer, a parameter that ``group_norm`` leaves out does not count in the layer's norm."""
    pipeline = bind({"group_norm": {"max_norm": 1.0, "exclude": "*.bias"}})
    assert decide(pipeline, 4.0, 100.0, 2.0) == pytest.approx([0.25, 1.0, 0.5], rel=1e-6)


def test_later_stages_see_what_earlier_ones_leave() -> None:
    """After a stage has brought every tensor down to 1, the global norm is root 3 and not that of the raw ones."""
    each = {"group_norm": {"max_norm": 1.0, "scope": "parameter"}}
    both = decide(bind(each, {"global_norm": {"max_norm": 1.0}}), 10.0, 20.0, 30.0)
    wanted = [1 / (norm * math.sqrt(3)) for norm in (10.0, 20.0, 30.0)]
    assert both == pytest.approx(wanted, rel=1e-5)


def test_the_order_of_stages_matters() -> None:
    """The same two stages the other way round: the global norm first, after which no tensor exceeds 1."""
    each = {"group_norm": {"max_norm": 1.0, "scope": "parameter"}}
    both = decide(bind({"global_norm": {"max_norm": 1.0}}, each), 3.0, 4.0, 0.0)
    assert both == pytest.approx([0.2, 0.2, 0.2], rel=1e-5)


def test_three_stages_act_as_torch_called_thrice(tmp_path: Path) -> None:
    """A pipeline of layer, global and value clipping equals torch's functions called one after another."""
    model = small_model()
    twin = copy.deepcopy(model)
    optimizer, reference = _adamw(model, True), _adamw(twin, True)
    policy = [{"group_norm": {"max_norm": 5.0}}, {"global_norm": {"max_norm": 3.0}}, {"value": {"max_abs": 0.5}}]
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        for step in range(4):
            reference.zero_grad()
            backward(loss_of(twin, step))
            for layer in (twin[0], twin[2]):
                nn.utils.clip_grad_norm_(layer.parameters(), 5.0)
            nn.utils.clip_grad_norm_(twin.parameters(), 3.0)
            nn.utils.clip_grad_value_(twin.parameters(), 0.5)
            after = hand_norms(twin)
            reference.step()
            train(model, optimizer, [step])
    run = open_run(agent.path)
    assert run.clipped.all()
    np.testing.assert_allclose(run.stat("grad_norm_postclip")[-1], after, rtol=1e-4)
    np.testing.assert_allclose(run.grad_norm_postclip[-1], np.linalg.norm(after), rtol=1e-4)
    assert_same(model, twin)


def test_a_clamp_that_reaches_nothing_is_no_clip(tmp_path: Path) -> None:
    """A ``value`` that no element exceeds changes no bit and is not recorded as a clip."""
    model = small_model()
    twin = copy.deepcopy(model)
    train(twin, SGD(twin.parameters(), lr=0.01))
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy=[{"value": {"max_abs": 1e6}}]) as agent:
        train(model, optimizer)
    run = open_run(agent.path)
    assert not run.clipped.any()
    assert run.coefficient.tolist() == [1.0] * 5
    assert_same(model, twin, exactly=True)


def test_the_policy_columns_hold_thresholds_and_factors(tmp_path: Path) -> None:
    """A row names for each stage the threshold in force and the smallest factor that it applied."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    policy = ["nonfinite", {"global_norm": {"max_norm": 1e6, "name": "wide"}}, {"global_norm": {"max_norm": 1.0}}]
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        backward(loss_of(model, 0))
        norms = hand_norms(model)
        optimizer.step()
    run = check_run(agent.path, [norms], 1.0)
    assert run.manifest.policies == ("nonfinite", "wide", "global_norm")
    assert run.rows["policy_threshold"][0, :3].tolist() == [math.inf, 1e6, 1.0]
    assert run.rows["policy_coefficient"][0, :3].tolist() == pytest.approx(
        [1.0, 1.0, 1 / np.linalg.norm(norms)], rel=1e-5
    )
    assert run.clipped.tolist() == [[False, False, True]]
    assert run.status["clip_events"][:3].tolist() == [0, 0, 1]


STAGES = [
    {"nonfinite": {"action": "skip"}},
    {"group_norm": {"max_norm": 1.0}},
    {"group_norm": {"max_norm": 0.5, "scope": "parameter", "name": "each"}},
    {"global_norm": {"max_norm": 1.0}},
    {"value": {"max_abs": 0.1}},
]
ANY = st.floats(min_value=0, width=32, allow_subnormal=False) | st.just(math.nan)


@settings(max_examples=100)
@given(st.lists(ANY, min_size=3, max_size=3), st.sampled_from([torch.float32, torch.float64]))
def test_coefficients_are_factors(norms: list[float], dtype: torch.dtype) -> None:
    """Whatever the norms, NaN and Inf among them, every coefficient and strength is in [0, 1] and never NaN."""
    for stages in [*([stage] for stage in STAGES), STAGES]:
        pipeline = bind(*stages)
        outcome, _ = pipeline.decide(pipeline.init(), observe(torch.tensor(norms, dtype=dtype)), 0)
        parts = [outcome.coefficient, *(decision.strength for decision in outcome.decisions)]
        for part in (part for part in parts if part is not None):
            assert bool(((part >= 0) & (part <= 1)).all())


@settings(max_examples=50)
@given(st.lists(st.floats(0, 1e6), min_size=3, max_size=3))
def test_the_norm_is_bounded_afterwards(norms: list[float]) -> None:
    """After ``global_norm`` the norm of all is at most the threshold."""
    coefficients = decide(bind({"global_norm": {"max_norm": 0.5}}), *norms)
    after = [norm * coefficient for norm, coefficient in zip(norms, coefficients, strict=True)]
    assert math.hypot(*after) <= 0.5 * (1 + 1e-12)


def test_deciding_is_pure() -> None:
    """``decide`` changes neither the state nor the observation it is given, and says the same when asked again."""
    pipeline = bind(*STAGES)
    states, observation = pipeline.init(), observe(torch.tensor([3.0, math.nan, 1.0]))
    kept = copy.deepcopy((states, observation.norms, observation.total))
    first, following = pipeline.decide(states, observation, 0)
    second, again = pipeline.decide(states, observation, 0)
    torch.testing.assert_close((states, observation.norms, observation.total), kept, equal_nan=True)
    torch.testing.assert_close(following, again)
    torch.testing.assert_close(first.coefficient, second.coefficient)
    assert following["nonfinite"]["consecutive"].item() == 1


MIXED: dict[str, list[Any]] = {
    "skip, layers, global": [
        {"nonfinite": {}}, {"group_norm": {"max_norm": 1.0}}, {"global_norm": {"max_norm": 0.5}},
    ],
    "zero, global": [{"nonfinite": {"action": "zero"}}, {"global_norm": {"max_norm": 0.1}}],
    "some, global": [
        {"global_norm": {"name": "first", "max_norm": 1.0, "match": "0.*"}}, {"global_norm": {"max_norm": 0.5}},
    ],
    "global, layers": [{"global_norm": {"max_norm": 1.0}}, {"group_norm": {"max_norm": 0.3}}],
    "layers, value": [{"group_norm": {"max_norm": 1.0}}, {"value": {"max_abs": 0.01}}],
}  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", MIXED)
def test_what_is_recorded_is_what_was_used(tmp_path: Path, name: str, fused: bool) -> None:
    """Whatever the mix of stages, the post-clip norms in the record are those of what moved the parameters."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=1.0, fused=fused)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with attach(tmp_path, model, optimizer, policy=MIXED[name]) as agent:
        (loss_of(model, 0) * 50).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    moved = [(old - new.detach()).double().norm().item() for old, new in zip(before, model.parameters(), strict=True)]
    run = open_run(agent.path)
    np.testing.assert_allclose(run.stat("grad_norm_postclip")[0], moved, rtol=1e-4, atol=1e-6)
    assert run.grad_norm_postclip[0] == pytest.approx(math.hypot(*moved), rel=1e-4)
    assert run.coefficient[0] == pytest.approx(run.grad_norm_postclip[0] / run.grad_norm_preclip[0], rel=1e-4)
