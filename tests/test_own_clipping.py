"""A loop that clips by itself: what is recorded of it, in whichever way torch's functions are called."""

from __future__ import annotations

import copy
import gc
import math
import operator
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from gradiometer import Run, open_run, own_clipping
from gradiometer.exporter import collector
from gradiometer.records import OWN_CLIPPING
from gradiometer.report import summarize
from tests._training import assert_same, attach, backward, hand_norms, loss_of, small_model

Floats = npt.NDArray[np.float64]
Clip = Callable[[nn.Module], object]
STEPS, MAX_NORM = 6, 2.0
NORM, VALUE = OWN_CLIPPING["clip_grad_norm_"], OWN_CLIPPING["clip_grad_value_"]


def by_parts(model: nn.Module) -> Tensor:
    """Clip as torchtitan and the Hugging Face Trainer do, by the two public halves."""
    total = get_total_norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    clip_grads_with_norm_(model.parameters(), MAX_NORM, total)
    return total


CLIPS: dict[str, Clip] = {
    "as an attribute": lambda model: nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM),
    "by name": lambda model: clip_grad_norm_(model.parameters(), MAX_NORM),
    "by its halves": by_parts,
    "by its full name": lambda model: torch.nn.utils.clip_grad.clip_grad_norm_(
        [*model.parameters()], max_norm=MAX_NORM
    ),
    "without foreach": lambda model: clip_grad_norm_(model.parameters(), MAX_NORM, foreach=False),
    "with a tensor": lambda model: clip_grad_norm_(model.parameters(), torch.tensor(MAX_NORM)),  # type: ignore[arg-type]
}


def train_and_clip(model: nn.Module, optimizer: Optimizer, *clips: Clip, steps: int = STEPS) -> Floats:
    """Train in a loop that clips; return the norms before it, float64[T, P]."""
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        backward(loss_of(model, step))
        norms.append(hand_norms(model))
        for clip in clips:
            clip(model)
        optimizer.step()
    return np.stack(norms)


def record(tmp_path: Path, *clips: Clip, **options: Any) -> tuple[Run, Floats]:
    """Train and clip with an agent and without; return the run, and the norms before clipping of the run without."""
    model = small_model()
    twin = copy.deepcopy(model)
    norms = train_and_clip(twin, AdamW(twin.parameters(), lr=0.01), *clips)
    optimizer = AdamW(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, **options) as agent:
        train_and_clip(model, optimizer, *clips)
    assert agent.errors == 0
    assert_same(model, twin, exactly=True)
    return open_run(agent.path), norms


def kinds(run: Run) -> list[str]:
    """Return the kinds of a run's events that concern clipping."""
    return [event["kind"] for event in run.events if "clip" in event["kind"]]


@pytest.mark.parametrize("way", CLIPS)
def test_norms_before_and_after_however_it_is_called(tmp_path: Path, way: str) -> None:
    """The row holds the norms before the loop's clipping and after it, and training is the same to the bit."""
    run, norms = record(tmp_path, CLIPS[way])
    total = np.linalg.norm(norms, axis=1)
    coefficient = np.minimum(1.0, MAX_NORM / (total + 1e-6))
    assert (coefficient < 1).any()
    np.testing.assert_allclose(run.parameter_norms, norms, rtol=1e-6)
    np.testing.assert_allclose(run.grad_norm_preclip, total, rtol=1e-6)
    np.testing.assert_allclose(run.coefficient, coefficient, rtol=1e-6)
    np.testing.assert_allclose(run.grad_norm_postclip, total * coefficient, rtol=1e-6)
    np.testing.assert_allclose(run.stat("grad_norm_postclip"), norms * coefficient[:, None], rtol=1e-6)
    assert run.own_clipping["clip_grad_norm_"].tolist() == (coefficient < 1).tolist()
    np.testing.assert_allclose(run.rows["policy_threshold"][:, NORM], MAX_NORM)
    np.testing.assert_allclose(run.rows["policy_coefficient"][:, NORM], coefficient, rtol=1e-6)
    assert np.isnan(run.rows["policy_threshold"][:, VALUE]).all()
    assert kinds(run) == ["own_clipping"]


@pytest.mark.parametrize("norm_type", [1.0, math.inf])
def test_a_norm_of_another_kind(tmp_path: Path, norm_type: float) -> None:
    """Whatever norm the loop clips by, the row holds L2 norms, before and after."""
    run, norms = record(tmp_path, lambda model: clip_grad_norm_(model.parameters(), 1.0, norm_type=norm_type))
    np.testing.assert_allclose(run.parameter_norms, norms, rtol=1e-5)
    assert run.own_clipping["clip_grad_norm_"].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """With gradients of half precision, torch's factor has its rounding, and the norms before are still right."""
    model = small_model().to(dtype)
    optimizer = SGD(model.parameters(), lr=1e-3)
    norms = []
    with attach(tmp_path, model, optimizer) as agent:
        for step in range(STEPS):
            optimizer.zero_grad()
            torch.manual_seed(step)
            backward(model(torch.randn(64, 4, dtype=dtype)).square().sum())
            norms.append(hand_norms(model))
            clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
    run = open_run(agent.path)
    # What is left is the rounding of the single products, which averages out over the elements of a tensor.
    np.testing.assert_allclose(run.parameter_norms, norms, rtol=4e-3 if dtype is torch.bfloat16 else 5e-4)
    assert run.own_clipping["clip_grad_norm_"].all()


def test_layer_by_layer(tmp_path: Path) -> None:
    """A loop that clips every layer by itself is no misuse, and each layer has its own factor."""

    def clip(model: nn.Module) -> None:
        for layer in model.children():
            clip_grad_norm_([*layer.parameters()], 0.5)

    run, norms = record(tmp_path, clip)
    np.testing.assert_allclose(run.parameter_norms, norms, rtol=1e-6)
    layers = np.sqrt(np.square(norms.reshape(STEPS, 2, 2)).sum(axis=2))
    coefficients = np.minimum(1.0, 0.5 / (layers + 1e-6))
    after = np.linalg.norm(layers * coefficients, axis=1)
    np.testing.assert_allclose(run.grad_norm_postclip, after, rtol=1e-6)
    np.testing.assert_allclose(run.coefficient, after / np.linalg.norm(norms, axis=1), rtol=1e-6)
    np.testing.assert_allclose(run.rows["policy_coefficient"][:, NORM], coefficients.min(axis=1), rtol=1e-6)
    assert kinds(run) == ["own_clipping"]


def test_layers_and_then_the_whole(tmp_path: Path) -> None:
    """What is clipped by two calls of different extent has both factors, and is no misuse."""

    def clip(model: nn.Module) -> None:
        clip_grad_norm_(model[0].parameters(), 0.5)  # type: ignore[index]
        clip_grad_norm_(model.parameters(), 0.25)

    run, norms = record(tmp_path, clip)
    np.testing.assert_allclose(run.parameter_norms, norms, rtol=1e-6)
    np.testing.assert_allclose(run.grad_norm_postclip, 0.25, rtol=1e-5)
    assert kinds(run) == ["own_clipping"]


@pytest.mark.parametrize("way", ["by name", "as an attribute"])
def test_clipping_by_value(tmp_path: Path, way: str) -> None:
    """A clamp is measured before it, also where the function was imported by name long before."""
    function = clip_grad_value_ if way == "by name" else operator.attrgetter("clip_grad_value_")(nn.utils)
    run, norms = record(tmp_path, lambda model: function(model.parameters(), 0.1))
    np.testing.assert_allclose(run.parameter_norms, norms, rtol=1e-6)
    assert (run.grad_norm_postclip < run.grad_norm_preclip).all()
    np.testing.assert_allclose(run.coefficient, run.grad_norm_postclip / run.grad_norm_preclip)
    assert run.own_clipping["clip_grad_value_"].all()
    assert set(run.own_clipping) == {"clip_grad_value_"}
    np.testing.assert_allclose(run.rows["policy_threshold"][:, VALUE], 0.1)


def test_a_clamp_that_changes_nothing(tmp_path: Path) -> None:
    """A clamp whose limit no element reaches is not counted as a clip event."""
    run, norms = record(tmp_path, lambda model: clip_grad_value_(model.parameters(), 1e6))
    np.testing.assert_allclose(run.parameter_norms, norms, rtol=1e-6)
    assert not run.own_clipping["clip_grad_value_"].any()
    assert (run.coefficient == 1).all()


@pytest.mark.parametrize("first", ["norm", "value"])
def test_by_value_and_by_norm(tmp_path: Path, first: str) -> None:
    """Both functions in one step, in either order: the norms before are those before both."""
    clips: list[Clip] = [
        lambda model: clip_grad_norm_(model.parameters(), MAX_NORM),
        lambda model: clip_grad_value_(model.parameters(), 0.2),
    ]
    run, norms = record(tmp_path, *(clips if first == "norm" else reversed(clips)))
    np.testing.assert_allclose(run.parameter_norms, norms, rtol=1e-6)
    assert run.own_clipping["clip_grad_value_"].any()
    assert kinds(run) == ["own_clipping", "own_clipping"]


def test_measuring_is_not_clipping(tmp_path: Path) -> None:
    """A loop that calls clip_grad_norm_ with an infinite limit only wants to know the norm."""
    run, norms = record(
        tmp_path,
        lambda model: clip_grad_norm_(model.parameters(), math.inf),
        CLIPS["by name"],
        lambda model: clip_grad_norm_(model.parameters(), float("inf")),
    )
    np.testing.assert_allclose(run.parameter_norms, norms, rtol=1e-6)
    assert run.own_clipping["clip_grad_norm_"].any()
    assert kinds(run) == ["own_clipping"]
    alone, _ = record(tmp_path, lambda model: clip_grad_norm_(model.parameters(), math.inf))
    assert alone.own_clipping == {}
    assert kinds(alone) == []


def test_with_a_policy_as_well(tmp_path: Path) -> None:
    """Policies see the gradients as the loop left them, the row what there was before both; and it is said once."""
    run, norms = record_policy(tmp_path, [{"global_norm": {"max_norm": 0.5}}])
    total = np.linalg.norm(norms, axis=1)
    np.testing.assert_allclose(run.parameter_norms[0], norms[0], rtol=1e-6)
    np.testing.assert_allclose(run.grad_norm_preclip[0], total[0], rtol=1e-6)
    np.testing.assert_allclose(run.grad_norm_postclip, 0.5, rtol=1e-5)
    np.testing.assert_allclose(run.coefficient[0], 0.5 / total[0], rtol=1e-5)
    np.testing.assert_allclose(run.rows["policy_coefficient"][0, 0], 0.5 / min(MAX_NORM, total[0]), rtol=1e-5)
    assert run.clipped.shape == (STEPS, 1)
    assert kinds(run) == ["own_clipping", "two_clippers"]
    other, _ = record_policy(tmp_path, [{"nonfinite": {}}])
    assert kinds(other) == ["own_clipping"]


def record_policy(tmp_path: Path, policy: list[dict[str, Any]]) -> tuple[Run, Floats]:
    """Train and clip under a policy; return the run, and the norms of the loop as it is without the policy."""
    model = small_model()
    twin = copy.deepcopy(model)
    norms = train_and_clip(twin, SGD(twin.parameters(), lr=0.01), CLIPS["by name"])
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        train_and_clip(model, optimizer, CLIPS["by name"])
    return open_run(agent.path), norms


@pytest.mark.parametrize("function", [clip_grad_norm_, clip_grad_value_])
@pytest.mark.parametrize("together", [True, False])
def test_several_optimizers(tmp_path: Path, together: bool, function: Callable[..., object]) -> None:
    """One clip over the parameters of two optimizers is in the row, or the rows, of both."""
    model = small_model()
    optimizers: list[Optimizer] = [SGD(layer.parameters(), lr=0.01) for layer in (model[0], model[2])]
    norms = []
    with attach(tmp_path, model, optimizers, together=together) as agent:
        for step in range(STEPS):
            for optimizer in optimizers:
                optimizer.zero_grad()
            backward(loss_of(model, step))
            norms.append(hand_norms(model))
            function(model.parameters(), 0.1)
            for optimizer in optimizers:
                optimizer.step()
    run = open_run(agent.path)
    wanted = np.stack(norms)
    if together:
        np.testing.assert_allclose(run.parameter_norms, wanted, rtol=1e-6)
    else:
        np.testing.assert_allclose(run.parameter_norms[0::2, :2], wanted[:, :2], rtol=1e-6)
        np.testing.assert_allclose(run.parameter_norms[1::2, 2:], wanted[:, 2:], rtol=1e-6)
        assert np.signbit(run.parameter_norms[0::2, 2:]).all()
        assert np.signbit(run.parameter_norms[1::2, :2]).all()
    assert run.own_clipping[function.__name__].all()
    assert kinds(run) == ["own_clipping"]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("halves", [False, True])
def test_the_culprit_of_a_non_finite_step(tmp_path: Path, bad: float, halves: bool) -> None:
    """Clipping spreads a NaN to every gradient; the row still names the one that had it, without backward hooks."""
    model = small_model()
    if halves:  # gradients of two dtypes, which torch sorts before it measures them
        model[0].weight.data = model[0].weight.data.double()
        model[2].weight.data = model[2].weight.data.double()
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, backward="off") as agent:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        gradient = model.get_parameter("2.weight").grad
        assert gradient is not None
        gradient[0, 0] = bad
        clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
    run = open_run(agent.path)
    assert run.first_nonfinite == ["2.weight"]
    assert run.nonfinite.tolist() == [True]
    assert np.isfinite(run.parameter_norms[0]).tolist() == [True, True, False, True]
    np.testing.assert_allclose(run.parameter_norms[0, [0, 1, 3]], np.sqrt([32, 8, 2]), rtol=1e-6)
    assert np.isnan(run.stat("grad_norm_postclip")[0, 2])
    assert not run.own_clipping["clip_grad_norm_"].any()


def test_a_norm_that_overflows_in_half_precision(tmp_path: Path) -> None:
    """Torch's norm of large float16 gradients is Inf, and its clip makes zeros of all: the row says what happened."""
    model = nn.Linear(4, 2, dtype=torch.float16)
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, backward="off") as agent:
        model.weight.grad = torch.full_like(model.weight, 6e4)
        model.bias.grad = torch.ones_like(model.bias)
        clip_grad_norm_(model.parameters(), MAX_NORM)
        assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)
        optimizer.step()
    run = open_run(agent.path)
    assert run.nonfinite.tolist() == [True]
    assert run.first_nonfinite == ["weight"]
    assert run.grad_norm_postclip.tolist() == [0.0]


def test_torch_raises_as_it_does(tmp_path: Path) -> None:
    """With error_if_nonfinite torch's own error is raised, and an event names the gradient that it is about."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer) as agent:
        for name, parameter in model.named_parameters():
            parameter.grad = torch.full_like(parameter, math.nan if name == "2.weight" else 1.0)
        with pytest.raises(RuntimeError, match="is non-finite, so it cannot be clipped"):
            clip_grad_norm_(model.parameters(), MAX_NORM, error_if_nonfinite=True)
        with pytest.raises(ValueError, match="abc"):
            clip_grad_norm_(model.parameters(), "abc")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="clamp"):
            clip_grads_with_norm_(model.parameters(), 1.0, 2.0)  # type: ignore[arg-type]
    run = open_run(agent.path)
    (event,) = [event for event in run.events if event["kind"] == "nonfinite"]
    assert event["message"] == "the gradient of 2.weight went non-finite; clip_grad_norm_ was told to raise for it"
    assert agent.errors == 1  # a total that is no tensor


def test_other_models_are_none_of_its_business(tmp_path: Path) -> None:
    """Clipping another model leaves no trace, and a generator of parameters is used up by torch alone."""
    model, other = small_model(), small_model(1)
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer) as agent:
        backward(loss_of(other, 0))
        wanted = hand_norms(other)
        total = clip_grad_norm_((parameter for parameter in other.parameters()), 0.5)
        clip_grad_value_((parameter for parameter in other.parameters()), 0.01)
        train_and_clip(model, optimizer)
    assert total.item() == pytest.approx(np.linalg.norm(wanted), rel=1e-6)
    assert all(parameter.grad.abs().max() <= 0.01 for parameter in other.parameters() if parameter.grad is not None)
    assert open_run(agent.path).own_clipping == {}


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Count the operators that measure norms, however they are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.calls[func.__name__] = self.calls.get(func.__name__, 0) + 1
        return func(*args, **kwargs or {})


def test_no_second_pass(tmp_path: Path) -> None:
    """A step that clips by norm runs torch's operators and the agent's, and not one more over the gradients."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01, foreach=True)
    with Count() as bare:
        train_and_clip(model, optimizer, CLIPS["by name"])
    with attach(tmp_path, model, optimizer, backward="off", updates_every=0):
        with Count() as observed:
            train_and_clip(model, optimizer)
        with Count() as both:
            train_and_clip(model, optimizer, CLIPS["by name"])
    clips = Count()
    with clips:
        train_and_clip(model, optimizer)
    passes = ("_foreach_norm.Scalar", "_foreach_mul_.Tensor", "linalg_vector_norm.default", "stack.default")
    assert bare.calls["_foreach_norm.Scalar"] == STEPS
    for name in passes:
        counts = [counter.calls.get(name, 0) for counter in (bare, observed, clips, both)]
        assert counts[3] == counts[0] + counts[1] - counts[2], (name, counts)


def test_a_loop_that_never_clips_the_same_set_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of the sets that were clipped is bounded by their sizes, and needs no garbage collector."""
    monkeypatch.setattr(own_clipping, "MAX_COVERED", 2_000)
    model = nn.ModuleList([nn.Linear(1, 1) for _ in range(50)])
    optimizer = SGD(model.parameters(), lr=0.01)
    parameters, choose, held = list(model.parameters()), random.Random(0), []
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with attach(tmp_path, model, optimizer, backward="off", updates_every=0) as agent:
        gc.disable()
        tracemalloc.start()
        try:
            for _ in range(10):
                for _ in range(20):
                    clip_grad_norm_(choose.sample(parameters, 80), 1.0)
                    optimizer.step()
                held.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
            gc.enable()
    assert agent.errors == 0
    assert max(held) < 1_000_000, held


def test_metrics_and_reports(tmp_path: Path) -> None:
    """The two functions have series of their own as soon as they were seen, and not before."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, run_id="run") as agent:
        registry = CollectorRegistry()
        metrics = collector(agent)
        registry.register(metrics)
        labels = {"run_id": "run", "policy": "clip_grad_norm_", "mode": "act"}
        train_and_clip(model, optimizer)
        assert registry.get_sample_value("gradiometer_clip_events_total", labels) is None
        train_and_clip(model, optimizer, CLIPS["by name"])
        agent.flush()
        run = open_run(agent.path)
        count = int(run.own_clipping["clip_grad_norm_"].sum())
        assert count > 0
        assert registry.get_sample_value("gradiometer_clip_events_total", labels) == count
        assert registry.get_sample_value("gradiometer_clip_threshold", labels) == MAX_NORM
        shown = registry.get_sample_value("gradiometer_clip_coefficient", labels)
        assert shown == pytest.approx(run.rows["policy_coefficient"][-1, NORM])
        metrics.close()
    assert summarize(run)["clip_events"] == {"clip_grad_norm_": count}
