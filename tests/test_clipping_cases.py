"""The classic cases of gradient clipping, as docs/clipping.md tells them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradiometer
from gradiometer.demo import CharLSTM, Text, loss_of, read_text, windows

Loss = Callable[[nn.Module], Tensor]


@pytest.fixture(scope="module")
def text() -> Text:
    """Read half a megabyte of the standard library's source."""
    return read_text(limit=2**19)


def step_with_agent(model: nn.Module, loss: Loss, policy: Any, root: Path) -> gradiometer.Run:
    """Take one SGD step of rate 1 under a policy, so that parameters move by exactly the gradient used."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with gradiometer.attach(model, optimizer, policy=policy, dir=root) as agent:
        loss(model).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return gradiometer.open_run(agent.path)


def step_by_hand(model: nn.Module, loss: Loss, clip: Callable[[nn.Module], object]) -> None:
    """Take the same step with torch's own clipping."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    loss(model).backward()  # type: ignore[no-untyped-call]
    clip(model)
    optimizer.step()


def assert_same_parameters(left: nn.Module, right: nn.Module) -> None:
    for ours, theirs in zip(left.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def steep(model: nn.Module) -> Tensor:
    """Return a loss with large gradients."""
    inputs = torch.linspace(-3, 3, 24).view(4, 6)
    loss: Tensor = (model(inputs) - 50.0).square().mean()
    return loss


@pytest.mark.parametrize("max_norm", [0.5, 5.0, 1e6])
def test_clip_by_norm_is_clip_grad_norm(max_norm: float, tmp_path: Path) -> None:
    """Clipping by global norm moves the parameters as clip_grad_norm_ does, whether it engages or not."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    twin = copy.deepcopy(model)
    run = step_with_agent(model, steep, [{"global_norm": {"max_norm": max_norm}}], tmp_path)
    step_by_hand(twin, steep, lambda m: nn.utils.clip_grad_norm_(m.parameters(), max_norm))
    assert_same_parameters(model, twin)
    assert run.clipped[0, 0] == (max_norm < 1e6)


def test_clip_by_value_is_clip_grad_value(tmp_path: Path) -> None:
    """Clipping by value moves the parameters as clip_grad_value_ does."""
    model = nn.Linear(6, 3)
    twin = copy.deepcopy(model)
    step_with_agent(model, steep, [{"value": {"max_abs": 0.5}}], tmp_path)
    step_by_hand(twin, steep, lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.5))
    assert_same_parameters(model, twin)


def test_clipping_happens_after_backward_and_before_the_update(tmp_path: Path) -> None:
    """The optimizer's own arithmetic sees the clipped gradient, with no call in the loop to misplace."""
    seen: list[Tensor] = []

    class Spy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            seen.append(torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]]).norm())
            return super().step(closure)

    model = nn.Linear(6, 1)
    optimizer = Spy(model.parameters(), lr=0.1)
    with gradiometer.attach(model, optimizer, policy=[{"global_norm": {"max_norm": 0.25}}], dir=tmp_path):
        steep(model).backward()  # type: ignore[no-untyped-call]
        before = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
        optimizer.step()
    assert before > 0.25
    assert [float(norm) for norm in seen] == pytest.approx([0.25], rel=1e-5)


@pytest.mark.parametrize(
    "policy", [{"global_norm": {"max_norm": 0.1}}, {"group_norm": {"max_norm": 0.1, "scope": "parameter"}}]
)
def test_two_input_linear_layer(policy: dict[str, Any], tmp_path: Path) -> None:
    """With max_norm 0.1 every parameter of a two-input linear layer ends with a gradient norm of at most 0.1."""
    model = nn.Linear(2, 1)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    run = step_with_agent(model, lambda m: (m(torch.tensor([[1.0, 2.0]])) - 100.0).square().mean(), [policy], tmp_path)
    moved = [(old - new.detach()).norm() for old, new in zip(before, model.parameters(), strict=True)]
    assert run.parameter_norms.min() > 0.1
    assert max(float(norm) for norm in moved) <= 0.1 * (1 + 1e-5)
    assert run.stat("grad_norm_postclip").max() <= 0.1 * (1 + 1e-6)


def test_deep_rnn(tmp_path: Path) -> None:
    """The exploded gradient of a deep RNN over a long sequence is brought to 5, and the layers compose to it."""
    torch.manual_seed(0)
    model = nn.RNN(4, 16, num_layers=5, nonlinearity="relu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "weight_hh" in name:
                parameter.mul_(2.5)
    inputs = torch.randn(40, 2, 4)
    run = step_with_agent(model, lambda m: m(inputs)[0].square().mean(), [{"global_norm": {"max_norm": 5.0}}], tmp_path)
    assert run.layers == ["l0", "l1", "l2", "l3", "l4"]
    assert 1e3 < run.grad_norm_preclip[0] < 1e15
    assert run.grad_norm_postclip[0] == pytest.approx(5.0, rel=1e-5)
    composed = (run.layer_norms("grad_norm_postclip")[0] ** 2).sum() ** 0.5
    assert composed == pytest.approx(5.0, rel=1e-5)


@pytest.mark.parametrize(("policy", "trains"), [([{"global_norm": {"max_norm": 0.2}}], True), (None, False)])
def test_exploding_run(policy: Any, trains: bool, text: Text, tmp_path: Path) -> None:
    """A deep LSTM at learning rate 20 learns real text with its gradients clipped, and diverges without."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = CharLSTM(len(text.vocabulary), width=48)
    optimizer = torch.optim.SGD(model.parameters(), lr=20.0)
    with gradiometer.attach(model, optimizer, policy=policy, dir=tmp_path) as agent:
        for _ in range(60):
            optimizer.zero_grad()
            loss = loss_of(model, windows(text.train, generator, torch.device("cpu")))
            loss.backward()  # type: ignore[no-untyped-call]
            agent.log(loss=loss)
            optimizer.step()
    losses = gradiometer.open_run(agent.path).loss
    blind = torch.tensor(float(len(text.vocabulary))).log().item()
    assert (losses[-10:].mean() < 0.8 * blind) == trains
    assert (losses.max() > 2 * blind) != trains
