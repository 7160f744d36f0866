"""Adaptive gradient clipping, against timm's numbers and its formula in float64, and what becomes of it on the step."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from gradiometer import PolicyError, open_run
from gradiometer.clipping import weigh
from gradiometer.norms import Meter
from gradiometer.policy.agc import unit_coefficients, unit_norms
from gradiometer.policy.base import Change, Layout
from gradiometer.policy.build import build_pipeline
from gradiometer.policy.pipeline import observe
from gradiometer.policy.spec import load_policy
from tests._training import assert_same, attach, backward, batch, hand_norms, loss_of, small_model, train

AGC: list[dict[str, Any]] = [{"agc": {}}]
VECTORS = json.loads((Path(__file__).parent / "vectors" / "agc_timm.json").read_text())["cases"]


def tensor(numbers: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """Make a tensor of nested lists, whose non-finite numbers are strings."""

    def read(value: Any) -> Any:
        return [read(each) for each in value] if isinstance(value, list) else float(value)

    return torch.tensor(read(numbers), dtype=dtype)


def by_hand(parameter: Tensor, gradient: Tensor, factor: float = 0.01, eps: float = 1e-3) -> Tensor:
    """Clip as the published formula says, one row at a time, in float64."""
    weights, gradients = parameter.detach().double(), gradient.double().clone()
    rows = list(zip(weights, gradients, strict=True)) if weights.dim() > 1 else [(weights, gradients)]
    for weight, row in rows:
        bound, norm = factor * max(float(weight.norm()), eps), float(row.norm())
        if not norm < bound:
            row *= bound / max(norm, 1e-6)
    return gradients


def step_by_hand(model: nn.Module, optimizer: Optimizer, **settings: float) -> None:
    """Clip every gradient by hand and step."""
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.copy_(by_hand(parameter, parameter.grad, **settings))
    optimizer.step()


def adamw(model: nn.Module, how: str) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01, fused=how == "fused", foreach=how == "foreach")


def change_of(policy: Any, count: int = 1) -> Change:
    """Return the change of elements that a policy asks for."""
    names = [str(number) for number in range(count)]
    pipeline = build_pipeline(load_policy(policy), Layout(names=names, layers=names, device=torch.device("cpu")))
    assert pipeline is not None
    outcome, _ = pipeline.decide(pipeline.init(), observe(torch.ones(count)), 0)
    assert outcome.change is not None
    return outcome.change


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["in"]["name"])
def test_unit_coefficients_are_timms(case: Any) -> None:
    """From a weight and a gradient come the norms, bounds and clipped gradients of the reference, NaN included."""
    weight, gradient = tensor(case["in"]["param"]), tensor(case["in"]["grad"])
    factor, eps = case["in"]["clip_factor"], case["in"]["eps"]
    norms = unit_norms(gradient)
    torch.testing.assert_close(norms, tensor(case["out"]["unit_grad_norm"]), rtol=1e-12, atol=0, equal_nan=True)
    factors = unit_coefficients(unit_norms(weight), norms, factor, eps)
    shape = (-1, *[1] * (gradient.dim() - 1)) if gradient.dim() > 1 else ()
    clipped = gradient * factors.reshape(shape)
    torch.testing.assert_close(clipped, tensor(case["out"]["grad"]), rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["in"]["name"])
def test_a_step_is_timms(tmp_path: Path, case: Any) -> None:
    """An optimizer is given the gradients that the reference leaves."""
    parameter = nn.Parameter(tensor(case["in"]["param"]))
    model, optimizer = nn.ParameterList([parameter]), SGD([parameter], lr=0.1)
    settings = {name: case["in"][name] for name in ("clip_factor", "eps")}
    with attach(tmp_path, model, optimizer, policy=[{"agc": settings}]):
        parameter.grad = tensor(case["in"]["grad"])
        optimizer.step()
        torch.testing.assert_close(parameter.grad, tensor(case["out"]["grad"]), rtol=1e-12, atol=0, equal_nan=True)


def test_a_norm_at_the_bound_is_not_below_it() -> None:
    """The comparison is strict: at the bound, below 1e-6, the reference divides by 1e-6 and not by the norm."""
    bound = 1e-3 * 1e-4
    factors = unit_coefficients(
        torch.zeros(3, dtype=torch.float64),
        torch.tensor([bound, math.nextafter(bound, 0), 2 * bound], dtype=torch.float64),
        clip_factor=1e-3,
        eps=1e-4,
    )
    assert factors.tolist() == pytest.approx([0.1, 1.0, 0.1], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """Half-precision rows whose squares overflow their dtype are bounded as float64 has it, to that dtype's digits."""
    torch.manual_seed(0)
    shapes = [(3, 40), (7,), (), (2, 3, 3, 3)]
    parameters = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    model, optimizer = nn.ParameterList(parameters), SGD(parameters, lr=0.0)
    with attach(tmp_path, model, optimizer, policy=[{"agc": {"clip_factor": 0.5}}]):
        for parameter in parameters:
            parameter.grad = (torch.randn(parameter.shape) * 2000).to(dtype)
        wanted = [by_hand(p, p.grad, 0.5) for p in parameters if p.grad is not None]
        optimizer.step()
    for parameter, other in zip(parameters, wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.double(), other, rtol=torch.finfo(dtype).eps * 2, atol=1e-6)


class Convolutions(nn.Module):
    """Two- and four-dimensional weights, vectors and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(1, 3, 2)
        self.norm = nn.GroupNorm(1, 3)
        self.head = nn.Linear(3, 2)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, values: Tensor) -> Tensor:
        seen = self.norm(self.conv(values.reshape(-1, 1, 2, 2)))
        out: Tensor = self.head(seen.flatten(1)) * self.gain
        return out


@pytest.mark.parametrize("how", ["foreach", "fused"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_training_is_that_by_hand(tmp_path: Path, how: str, layout: torch.memory_format) -> None:
    """Convolutions, vectors and a scalar train as under the formula, and the recorded norms are those after it."""
    model = Convolutions().to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
    twin = copy.deepcopy(model)
    optimizer, reference = (adamw(each, how) for each in (model, twin))
    after = []
    with attach(tmp_path, model, optimizer, policy=["nonfinite", *AGC]) as agent:
        for step in range(4):
            for each in (model, twin):
                each.zero_grad()
                backward(each(batch(step)).square().sum())
            step_by_hand(twin, reference)
            after.append(hand_norms(twin))
            optimizer.step()
    run = open_run(agent.path)
    np.testing.assert_allclose(run.stat("grad_norm_postclip"), after, rtol=1e-4, atol=1e-12)
    assert run.clipped[:, 1].all()
    assert_same(model, twin)


def test_the_smallest_factor_is_recorded(tmp_path: Path) -> None:
    """The coefficient of a step is that of the row which was scaled the most; the threshold is the share allowed."""
    parameter = nn.Parameter(torch.tensor([[3.0, 4.0], [30.0, 40.0]]))
    optimizer = SGD([parameter], lr=0.0)
    with attach(tmp_path, nn.ParameterList([parameter]), optimizer, policy=AGC) as agent:
        for rows in ([[1.0, 0.0], [1.0, 0.0]], [[0.01, 0.0], [0.01, 0.0]], [[0.01, 0.0], [0.0, 5.0]]):
            parameter.grad = torch.tensor(rows)
            optimizer.step()
    run = open_run(agent.path)
    assert run.rows["policy_coefficient"][:, 0].tolist() == pytest.approx([0.05, 1.0, 0.1], rel=1e-5)
    assert run.rows["policy_threshold"][:, 0].tolist() == pytest.approx([0.01] * 3)
    assert run.clipped[:, 0].tolist() == [True, False, True]
    assert run.status["clip_events"][0] == 2


def test_what_reaches_no_bound_is_left_to_the_bit(tmp_path: Path) -> None:
    """A factor so large that no row exceeds it changes nothing and is no clip event."""
    model = small_model()
    twin = copy.deepcopy(model)
    train(twin, SGD(twin.parameters(), lr=0.01))
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy=[{"agc": {"clip_factor": 1e9}}]) as agent:
        train(model, optimizer)
    assert not open_run(agent.path).clipped.any()
    assert_same(model, twin, exactly=True)


def test_excluded_parameters_are_left_alone(tmp_path: Path) -> None:
    """NFNets leave the head out: what a pattern excludes is neither scaled nor counted in the strength."""
    parameters = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))]
    optimizer = SGD(parameters, lr=0.0)
    with attach(tmp_path, nn.ParameterList(parameters), optimizer, policy=[{"agc": {"exclude": "1"}}]) as agent:
        for parameter in parameters:
            parameter.grad = torch.full((2, 2), 100.0)
        optimizer.step()
    norms = [float(p.grad.norm()) for p in parameters if p.grad is not None]
    assert norms == pytest.approx([0.02, 200.0], rel=1e-5)
    assert open_run(agent.path).rows["policy_coefficient"][0, 0] == pytest.approx(1e-4, rel=1e-5)


def test_earlier_stages_come_first(tmp_path: Path) -> None:
    """After a global norm the rows are bounded as that left them."""
    model = small_model()
    twin = copy.deepcopy(model)
    optimizer, reference = (SGD(each.parameters(), lr=0.1, foreach=True) for each in (model, twin))
    policy = [{"global_norm": {"max_norm": 0.5}}, {"agc": {"clip_factor": 0.2}}]
    with attach(tmp_path, model, optimizer, policy=policy):
        for step in range(3):
            train(model, optimizer, [step])
            reference.zero_grad()
            backward(loss_of(twin, step))
            nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
            step_by_hand(twin, reference, factor=0.2)
    assert_same(model, twin)


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_a_loss_scale_is_divided_out_first(tmp_path: Path, how: str) -> None:
    """Under a GradScaler, with two micro-batches a step, training is that by hand without one."""
    model = small_model()
    twin = copy.deepcopy(model)
    optimizer, reference = (adamw(each, how) for each in (model, twin))
    scaler = GradScaler("cpu", init_scale=1024.0)
    with attach(tmp_path, model, optimizer, policy=AGC) as agent:
        for step in range(3):
            optimizer.zero_grad()
            reference.zero_grad()
            for micro in (2 * step, 2 * step + 1):
                backward(scaler.scale(loss_of(model, micro)))
                backward(loss_of(twin, micro))
            step_by_hand(twin, reference)
            if how == "foreach":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert open_run(agent.path).clipped[:, 0].all()
    assert_same(model, twin)


def test_rows_of_a_sparse_gradient(tmp_path: Path) -> None:
    """Of a sparse gradient the rows that are there are bounded by those rows of the weights, duplicates added up."""
    model = nn.Embedding(5, 3, sparse=True)
    dense = nn.Embedding(5, 3)
    dense.load_state_dict(model.state_dict())
    optimizer, reference = SGD(model.parameters(), lr=0.1), SGD(dense.parameters(), lr=0.1)
    with attach(tmp_path, model, optimizer, policy=AGC):
        for each in (model, dense):
            backward(each(torch.tensor([4, 1, 4])).square().sum())
        step_by_hand(dense, reference)
        optimizer.step()
    assert_same(model, dense)


@pytest.mark.parametrize("policy", [{"agc": {}}, {"value": {"max_abs": 0.5}}], ids=["agc", "value"])
@pytest.mark.parametrize("scale", [None, 64.0])
def test_weighing_changes_nothing(policy: Any, scale: float | None) -> None:
    """What a change would do can be told without doing it, with a loss scale in the gradients too."""
    parameter = nn.Parameter(torch.tensor([[3.0, 4.0], [30.0, 40.0]]))
    parameter.grad = torch.tensor([[1.0, 0.0], [0.5, 0.0]]) * (scale or 1.0)
    before = parameter.grad.clone()
    change = change_of([policy])
    factor = None if scale is None else torch.tensor(scale)
    strength = weigh(change, [parameter], Meter(torch.device("cpu")), None, factor)
    assert strength.item() == pytest.approx(0.05 if "agc" in policy else 0.5)
    assert strength.dtype == torch.float32
    assert torch.equal(parameter.grad, before)


def test_what_acts_has_the_strength_that_was_weighed(tmp_path: Path) -> None:
    """A ``value`` or ``agc`` that acts records the very factor that weighing it tells."""
    for number, policy in enumerate(({"agc": {}}, {"value": {"max_abs": 0.5}})):
        model = small_model()
        optimizer = SGD(model.parameters(), lr=0.0)
        with attach(tmp_path / str(number), model, optimizer, policy=[policy]) as agent:
            backward(loss_of(model, 0))
            wanted = weigh(
                change_of([policy], 4), list(model.parameters()), Meter(torch.device("cpu")), None, None
            ).item()
            optimizer.step()
        recorded = open_run(agent.path).rows["policy_coefficient"][0, 0]
        assert 0 < wanted < 1
        assert recorded == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("placement", "dims", "cut"),
    [("local", 2, ()), ("replicate over tp", 2, ()), ("shard(0) over dp", 4, ()), ("shard(0) over dp", 1, (0,))],
)
def test_rows_that_are_whole_are_taken(placement: str, dims: int, cut: tuple[int, ...]) -> None:
    """What is whole, replicated or sharded along its rows is fine; a vector's norm has to be known over ranks."""
    layout = Layout(names=["w"], layers=["w"], device=torch.device("cpu"), dims=[dims], placements=[placement])
    pipeline = build_pipeline(load_policy(AGC), layout)
    assert pipeline is not None
    outcome, _ = pipeline.decide(pipeline.init(), observe(torch.ones(1)), 0)
    assert outcome.change is not None
    assert outcome.change.cut == cut


@pytest.mark.parametrize("placement", ["shard(1) over tp", "flat (FSDP1)", "shard(0) over dp, shard(1) over tp"])
def test_rows_that_are_cut_are_refused(placement: str) -> None:
    """A parameter whose rows no rank has whole is refused by name, unless it is excluded."""
    layout = Layout(
        names=["a", "b"],
        layers=["a", "b"],
        device=torch.device("cpu"),
        dims=[2, 2],
        placements=["local", placement],
    )
    with pytest.raises(PolicyError, match=r"policy agc: parameter 'b' lies on the ranks as .* no rank has a row"):
        build_pipeline(load_policy(AGC), layout)
    assert build_pipeline(load_policy([{"agc": {"exclude": "b"}}]), layout) is not None
