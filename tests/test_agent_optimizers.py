"""Several optimizers on one model, and param groups that come late."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Adam, AdamW, Optimizer

from gradiometer import open_run
from tests._training import assert_same, attach, backward, batch, check_run, hand_norms, loss_of, small_model, train

MAX_NORM = 2.0
CLIP = [{"global_norm": {"max_norm": MAX_NORM}}]


def two(model: nn.Sequential, *, fused: bool = False) -> list[Optimizer]:
    """Make an optimizer for each of the two layers."""
    return [AdamW(model[0].parameters(), lr=0.01, fused=fused), SGD(model[2].parameters(), lr=0.01, fused=fused)]


def step_all(
    model: nn.Module, optimizers: list[Optimizer], step: int, *, clip: bool = False
) -> npt.NDArray[np.float64]:
    """Take a step with all optimizers on one backward pass; return the norms before clipping."""
    model.zero_grad()
    backward(loss_of(model, step))
    norms = hand_norms(model)
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    for optimizer in optimizers:
        optimizer.step()
    return norms


@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_that_step_together_share_a_norm(tmp_path: Path, fused: bool) -> None:
    """Optimizers that step one after another are one row a step, and are clipped by the norm of all gradients."""
    model = small_model()
    twin = copy.deepcopy(model)
    references = two(twin, fused=fused)
    norms = [step_all(twin, references, step, clip=True) for step in range(4)]
    optimizers = two(model, fused=fused)
    with attach(tmp_path, model, optimizers, policy=CLIP) as agent:
        for step in range(4):
            step_all(model, optimizers, step)
    check_run(agent.path, norms, MAX_NORM)
    assert_same(model, twin)


def test_one_fused_and_one_not(tmp_path: Path) -> None:
    """A fused optimizer and another share a norm, and each gradient is scaled once."""
    model = small_model()
    twin = copy.deepcopy(model)

    def mixed(each: nn.Sequential) -> list[Optimizer]:
        return [two(each, fused=True)[0], two(each)[1]]

    references = mixed(twin)
    norms = [step_all(twin, references, step, clip=True) for step in range(4)]
    optimizers = mixed(model)
    with attach(tmp_path, model, optimizers, policy=CLIP) as agent:
        for step in range(4):
            step_all(model, optimizers, step)
    check_run(agent.path, norms, MAX_NORM)
    assert_same(model, twin)


@pytest.mark.parametrize("fused", [False, True])
def test_zeroing_between_the_steps(tmp_path: Path, fused: bool) -> None:
    """``step(); zero_grad()`` for one optimizer after the other is a common round too."""
    model = small_model()
    optimizers, wanted = two(model, fused=fused), []
    with attach(tmp_path, model, optimizers, policy=CLIP) as agent:
        for step in range(3):
            backward(loss_of(model, step))
            wanted.append(hand_norms(model))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    check_run(agent.path, wanted, MAX_NORM)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_on_two_optimizers(tmp_path: Path, unscale: bool, fused: bool) -> None:
    """Under a GradScaler no norm mixes scaled and unscaled gradients, whether or not all were unscaled first."""
    model = small_model()
    optimizers, scaler, wanted = two(model, fused=fused), GradScaler("cpu", init_scale=1024.0), []
    with attach(tmp_path, model, optimizers) as agent:
        for step in range(3):
            model.zero_grad()
            backward(scaler.scale(loss_of(model, step)))
            wanted.append(hand_norms(model) / 1024)
            for optimizer in optimizers:
                if unscale:
                    scaler.unscale_(optimizer)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
    run = open_run(agent.path)
    if unscale or fused:
        np.testing.assert_allclose(run.parameter_norms, wanted, rtol=1e-5)
        assert not [event for event in run.events if event["kind"] == "optimizers_apart"]
    else:
        np.testing.assert_allclose(run.parameter_norms[0::2, :2], np.array(wanted)[:, :2], rtol=1e-5)
        np.testing.assert_allclose(run.parameter_norms[1::2, 2:], np.array(wanted)[:, 2:], rtol=1e-5)
        assert [event["kind"] for event in run.events].count("optimizers_apart") == 1


@pytest.mark.parametrize(("fused", "unscale"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize("policy", [CLIP, [{"value": {"max_abs": 0.2}}], [{"nonfinite": {}}, *CLIP]])
def test_clipping_two_optimizers_under_a_scaler(tmp_path: Path, fused: bool, unscale: bool, policy: Any) -> None:
    """Under a GradScaler the true gradients of both optimizers are clipped together."""
    model = small_model()
    twin = copy.deepcopy(model)
    references, optimizers, scaler = two(twin), two(model, fused=fused), GradScaler("cpu", init_scale=64.0)
    with attach(tmp_path, model, optimizers, policy=policy) as agent:
        for step in range(4):
            twin.zero_grad()
            backward(loss_of(twin, step))
            if "value" in policy[0]:
                nn.utils.clip_grad_value_(twin.parameters(), 0.2)
            else:
                nn.utils.clip_grad_norm_(twin.parameters(), MAX_NORM)
            model.zero_grad()
            backward(scaler.scale(loss_of(model, step)))
            for optimizer in optimizers if unscale else []:
                scaler.unscale_(optimizer)
            for optimizer, reference in zip(optimizers, references, strict=True):
                scaler.step(optimizer)
                reference.step()
            scaler.update()
    run = open_run(agent.path)
    assert len(run) == 4
    assert run.rows["loss_scale"].tolist() == [64.0] * 4
    assert_same(model, twin)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [0, 1])
def test_an_overflow_in_one_optimizer_parts_nobody(tmp_path: Path, fused: bool, bad: int) -> None:
    """After a GradScaler has skipped one of two optimizers, they share a norm again."""
    model = small_model()
    optimizers, scaler, wanted = two(model, fused=fused), GradScaler("cpu", init_scale=4.0), []
    with attach(tmp_path, model, optimizers, policy=CLIP) as agent:
        for step in range(4):
            model.zero_grad()
            backward(scaler.scale(loss_of(model, step)))
            wanted.append(hand_norms(model) / scaler.get_scale())
            if step == 1:
                (model[0], model[2])[bad].weight.grad.view(-1)[0] = float("inf")  # type: ignore[union-attr,operator]
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
    run = open_run(agent.path)
    assert not [event for event in run.events if event["kind"] == "optimizers_apart"]
    np.testing.assert_allclose(run.parameter_norms[[0, -2, -1]], [wanted[0], wanted[2], wanted[3]], rtol=1e-5)


class Gan:
    """A generator and a discriminator, each with an optimizer and a backward pass of its own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)])
        self.optimizers: list[Optimizer] = [Adam(each.parameters(), lr=0.01) for each in self.model]

    def loss(self, place: int, step: int) -> Tensor:
        """Run one player's loss: the generator's gradients flow through the discriminator too."""
        generator, discriminator = self.model
        made = generator(batch(step))
        loss: Tensor = discriminator(made).sum() if place == 0 else discriminator(made.detach()).square().sum()
        return loss

    def turn(self, place: int, step: int) -> npt.NDArray[np.float64]:
        """Let one player move, clipped by hand where ``clip`` says so; return the norms of its own gradients."""
        self.model.zero_grad()
        backward(self.loss(place, step))
        norms = hand_norms(self.model)
        norms[[2, 3] if place == 0 else [0, 1]] = -0.0
        return norms


@pytest.mark.parametrize("policy", [None, CLIP])
@pytest.mark.parametrize("together", [True, False])
def test_optimizers_with_backward_passes_of_their_own(tmp_path: Path, together: bool, policy: Any) -> None:
    """In a GAN every player's step is measured, and clipped, by its own gradients, whether said or found out."""
    gan, twin = Gan(), Gan()
    wanted = []
    with attach(tmp_path, gan.model, gan.optimizers, policy=policy, together=together) as agent:
        for step in range(20):
            for place in (0, 1):
                gan.turn(place, step)
                gan.optimizers[place].step()
                wanted.append(twin.turn(place, step))
                if policy:
                    own: nn.Module = twin.model if step + place == 0 and together else twin.model[place]
                    nn.utils.clip_grad_norm_(own.parameters(), MAX_NORM)
                twin.optimizers[place].step()
    run = open_run(agent.path)
    first = 1 if together else 0  # nobody can know at the very first step
    np.testing.assert_allclose(run.parameter_norms[first:], wanted[first:], rtol=1e-5, atol=1e-6)
    assert run.rows["optimizer"].tolist() == [0, 1] * 20
    apart = [event for event in run.events if event["kind"] == "optimizers_apart"]
    assert len(apart) == together
    assert_same(gan.model, twin.model)


def test_a_change_of_mind_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """That optimizers do not step together is logged once, with the remedy."""
    gan = Gan()
    with attach(tmp_path, gan.model, gan.optimizers), caplog.at_level(logging.WARNING):
        for step in range(5):
            for place in (0, 1):
                gan.turn(place, step)
                gan.optimizers[place].step()
    said = [record.getMessage() for record in caplog.records if "together" in record.getMessage()]
    assert len(said) == 1
    assert "together=False" in said[0]


def test_a_freed_gradient_is_not_mistaken_for_the_next(tmp_path: Path) -> None:
    """A new gradient, even where Python puts it at the address of the one before, is not taken for that one."""
    model = small_model()
    optimizers = two(model)
    with attach(tmp_path, model, optimizers) as agent:
        backward(loss_of(model, 0))
        optimizers[0].step()
        for parameter in model[2].parameters():
            parameter.grad = None
            parameter.grad = torch.full_like(parameter, 3.0)
        optimizers[1].step()
    run = open_run(agent.path)
    np.testing.assert_allclose(run.parameter_norms[1, 2:], [3 * np.sqrt(16), 3 * np.sqrt(2)], rtol=1e-6)


def test_one_optimizer_that_steps_less_often(tmp_path: Path) -> None:
    """An optimizer that joins only every second step is part of the round when it does."""
    model = small_model()
    optimizers, wanted = two(model), []
    with attach(tmp_path, model, optimizers, policy=CLIP) as agent:
        for step in range(4):
            wanted.append(step_all(model, optimizers if step % 2 else optimizers[:1], step))
    check_run(agent.path, wanted, MAX_NORM)


def test_a_known_parameter_may_join_later(tmp_path: Path) -> None:
    """A layer that was frozen at attach and is added to the optimizer later is measured and clipped from then on."""
    model = small_model()
    model[0].requires_grad_(False)
    twin = copy.deepcopy(model)
    optimizer, reference = SGD(model[2].parameters(), lr=0.01), SGD(twin[2].parameters(), lr=0.01)
    wanted = []
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        for step in range(4):
            for each, its_optimizer in ((twin, reference), (model, optimizer)):
                if step == 2:
                    each[0].requires_grad_(True)
                    its_optimizer.add_param_group({"params": list(each[0].parameters())})
            wanted.append(step_all(twin, [reference], step, clip=True))
            train(model, optimizer, [step])
    check_run(agent.path, wanted, MAX_NORM)
    assert_same(model, twin)


def test_an_unknown_parameter_stops_clipping_loudly(tmp_path: Path) -> None:
    """A parameter that nobody knew at attach cannot be clipped: the step raises, and says what to do."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy=CLIP):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 5))]})
        backward(loss_of(model, 0))
        with pytest.raises(RuntimeError, match=r"\(3, 5\).*detach\(\) and attach again"):
            optimizer.step()


def test_an_unknown_parameter_does_not_stop_observing(tmp_path: Path) -> None:
    """When nothing is clipped, an unknown parameter is an error that is counted, and training goes on."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    twin = copy.deepcopy(model)
    train(twin, SGD(twin.parameters(), lr=0.01), range(3))
    with attach(tmp_path, model, optimizer) as agent:
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, 5))]})
        train(model, optimizer, range(3))
        assert agent.errors == 3
    assert_same(model, twin, exactly=True)


def test_parameters_outside_the_model_are_measured(tmp_path: Path) -> None:
    """What an optimizer holds beside the model's parameters has a name of its own."""
    model, extra = small_model(), nn.Parameter(torch.ones(2))
    optimizer = SGD([*model.parameters(), extra], lr=0.01)
    with attach(tmp_path, model, optimizer) as agent:
        backward((extra * 3).sum())
        optimizer.step()
    run = open_run(agent.path)
    assert run.parameters[-1] == "optimizer0.group0.param4"
    np.testing.assert_allclose(run.parameter_norms[0, -1], np.sqrt(18), rtol=1e-6)


def test_the_same_optimizer_twice_is_refused(tmp_path: Path) -> None:
    """An optimizer given twice would be clipped twice, so it is an error."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="twice"):
        attach(tmp_path, model, [optimizer, optimizer])
