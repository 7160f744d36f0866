"""The backward hooks: arrival order, when they are armed, and which gradient went non-finite first."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from gradiometer import Run, open_run
from gradiometer.backward import BURST, EVERY, FIRST_STEPS, MICROBATCHES
from gradiometer.records import Flag
from gradiometer.tail import RankTail, frame
from tests._training import assert_same, attach, backward, batch, hand_norms, loss_of, small_model, train


def hooked(run: Run) -> list[int]:
    """List the steps whose backward hooks were armed."""
    steps: list[int] = run.steps[(run.rows["flags"] & Flag.HOOKED) != 0].tolist()
    return steps


def sgd(model: nn.Module) -> Optimizer:
    """Make a plain optimizer."""
    return SGD(model.parameters(), lr=0.001)


class Poison(torch.autograd.Function):
    """Passes its input on; in the backward pass, the gradient is turned to NaN."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * math.nan


class Deep(nn.Module):
    """Four layers called in an order of its own; one of them may be poisoned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.poisoned: int | None = None

    def forward(self, values: Tensor) -> Tensor:
        for place in (2, 0, 3, 1):
            values = self.layers[place](values).tanh()
            if place == self.poisoned:
                values = Poison.apply(values)  # type: ignore[no-untyped-call]  # torch
        return values


def test_the_order_of_arrival(tmp_path: Path) -> None:
    """The order announced is that in which another hook sees the gradients arrive."""
    model = Deep()
    optimizer, seen = sgd(model), []
    for name, parameter in model.named_parameters():
        hook = functools.partial(lambda name, _: seen.append(name), name)
        parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch
    with attach(tmp_path, model, optimizer) as agent:
        train(model, optimizer, [0])
    (event,) = [event for event in open_run(agent.path).events if event["kind"] == "backward_order"]
    assert event["parameters"] == seen
    assert len(seen) == 8


def test_auto_arms_at_the_start_and_every_hundredth(tmp_path: Path) -> None:
    """Mode auto watches the first steps and every hundredth, and no other."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        train(model, optimizer, range(2 * EVERY + 2))
    assert (FIRST_STEPS, EVERY) == (3, 100)
    assert hooked(open_run(agent.path)) == [0, 1, 2, 100, 200]


def test_every_arms_always(tmp_path: Path) -> None:
    """Mode every watches each step."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, backward="every") as agent:
        train(model, optimizer, range(7))
    assert hooked(open_run(agent.path)) == list(range(7))


def test_layers_that_are_unfrozen_are_watched_from_the_next_step_on(tmp_path: Path) -> None:
    """A layer that is unfrozen in mid-training has its hooks too, though those of the others were armed already."""
    model = small_model()
    model[0].requires_grad_(requires_grad=False)
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, backward="every") as agent:
        train(model, optimizer, range(2))
        model[0].requires_grad_(requires_grad=True)
        train(model, optimizer, range(2))
        model[2].requires_grad_(requires_grad=False)
        train(model, optimizer, range(2))
    assert agent.errors == 0
    norms = open_run(agent.path).stat("microbatch_norm")
    assert (norms[:, 0] > 0).tolist() == [False, False, False, True, True, True]
    assert (norms[:, 2] > 0).tolist() == [True, True, True, True, False, False]
    np.testing.assert_allclose(norms[3], open_run(agent.path).parameter_norms[3], rtol=1e-6)
    assert all(parameter._backward_hooks is None for parameter in model.parameters())


def test_off_registers_nothing(tmp_path: Path) -> None:
    """Mode off registers no hook on any parameter, and the micro-batch column is negative zero."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, backward="off") as agent:
        assert all(parameter._backward_hooks is None for parameter in model.parameters())
        train(model, optimizer, range(3))
    run = open_run(agent.path)
    assert hooked(run) == []
    assert np.signbit(run.stat("microbatch_norm")).all()


def test_between_watched_steps_no_parameter_has_a_hook(tmp_path: Path) -> None:
    """While not armed, mode auto leaves at most one hook, which tells that a backward pass has begun."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer):
        train(model, optimizer, range(10))
        assert sum(len(parameter._backward_hooks or ()) for parameter in model.parameters()) <= 1


def test_an_incident_arms_for_a_few_steps(tmp_path: Path) -> None:
    """After a non-finite step mode auto watches the next few, and then lets go again."""
    model = Deep()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=["nonfinite"]) as agent:
        train(model, optimizer, range(6))
        model.poisoned = 3
        train(model, optimizer, [6])
        model.poisoned = None
        train(model, optimizer, range(6))
    run = open_run(agent.path)
    assert BURST == 3
    assert np.flatnonzero(run.nonfinite).tolist() == [6]
    assert hooked(run) == [0, 1, 2, 7, 8, 9]


@pytest.mark.parametrize(("mode", "wanted"), [("auto", "layers.0"), ("every", "layers.0"), ("off", "layers.2")])
def test_the_first_bad_gradient_in_backward_order_is_named(tmp_path: Path, mode: str, wanted: str) -> None:
    """Of the layers NaN reaches, that where it began is named, on a watched step or not; unwatched, the last one."""
    model = Deep()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=["nonfinite"], backward=mode) as agent:
        train(model, optimizer, range(5))
        model.poisoned = 0
        train(model, optimizer, [5])
    run = open_run(agent.path)
    place = run.rows["first_nonfinite"][5]
    bad = [name for name, norm in zip(run.parameters, run.parameter_norms[5], strict=True) if not math.isfinite(norm)]
    assert {name.split(".")[1] for name in bad} == {"0", "2"}
    assert run.rows["first_nonfinite"][:5].tolist() == [-1] * 5
    assert run.parameters[place].rpartition(".")[0] == wanted
    (event,) = [event for event in run.events if event["kind"] == "nonfinite"]
    assert event["parameter"] == run.parameters[place]


def test_with_nan_in_the_weights_every_step_begins_at_the_last_layer(tmp_path: Path) -> None:
    """Of the layers in which steps began, the one with a single step is then where NaN came from."""
    model = Deep()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        train(model, optimizer, range(5))
        model.poisoned = 0
        train(model, optimizer, [5])
        model.poisoned = None
        train(model, optimizer, range(6, 12))
    tail = RankTail(agent.path)
    tail.poll()
    found = [sample[1:] for sample in frame([tail], "finished").samples if "nonfinite_origin" in sample[0]]
    tail.close()
    assert [(labels[1], value) for labels, value in found] == [("layers.0", 1), ("layers.1", 6)]


def test_a_bad_micro_batch_is_named_though_others_came_first(tmp_path: Path) -> None:
    """With accumulation, it is the micro-batch's own gradient that tells which was first."""
    model = Deep()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=["nonfinite"], backward="every") as agent:
        for poisoned in (None, 0, 1):
            model.poisoned = poisoned
            backward(model(batch(0)).sum())
        optimizer.step()
    run = open_run(agent.path)
    assert run.parameters[run.rows["first_nonfinite"][0]].startswith("layers.0.")
    assert run.rows["microbatches"].tolist() == [3]


def test_micro_batches_beyond_the_limit_cost_nothing(tmp_path: Path) -> None:
    """More micro-batches than are kept are still summed into the norm, and counted, and lose no row."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, backward="every") as agent:
        for part in range(MICROBATCHES + 4):
            backward(loss_of(model, part))
        wanted = hand_norms(model)
        optimizer.step()
        assert agent.errors == 0
    run = open_run(agent.path)
    np.testing.assert_allclose(run.parameter_norms, [wanted], rtol=1e-6)
    assert run.rows["microbatches"].tolist() == [MICROBATCHES + 4]


def test_a_tied_parameter_arrives_once(tmp_path: Path) -> None:
    """A tensor used twice in the forward pass arrives once, with the sum of both uses."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, backward="every") as agent:
        backward(loss_of(model, 0))
        wanted = hand_norms(model)
        optimizer.step()
    run = open_run(agent.path)
    assert run.rows["microbatches"].tolist() == [1]
    np.testing.assert_allclose(run.stat("microbatch_norm"), [wanted], rtol=1e-6)


def test_second_derivatives_are_left_alone(tmp_path: Path) -> None:
    """A gradient penalty, whose gradients are differentiated again, trains as without the agent."""

    def step(model: nn.Module, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        inputs = batch(0).requires_grad_()
        (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
        backward(slope.square().sum())
        optimizer.step()

    model, twin = small_model(), small_model()
    optimizer, reference = sgd(model), sgd(twin)
    with attach(tmp_path, model, optimizer, backward="every") as agent:
        for _ in range(3):
            step(model, optimizer)
            step(twin, reference)
        assert agent.errors == 0
    assert_same(model, twin, exactly=True)


def test_players_that_are_frozen_in_turn(tmp_path: Path) -> None:
    """A GAN that freezes its discriminator has each loss with its own step, though it is logged before the step."""
    torch.manual_seed(0)
    players = nn.ModuleDict({"g": nn.Linear(4, 2), "d": nn.Linear(2, 1)})
    optimizers = {name: sgd(player) for name, player in players.items()}
    with attach(tmp_path, players, list(optimizers.values()), together=False) as agent:
        for step in range(20):
            name = "dg"[step % 2]
            players["d"].requires_grad_(name == "d")
            optimizers[name].zero_grad()
            made = players["g"](torch.randn(8, 4))
            players["d"](made if name == "g" else made.detach()).square().mean().backward()
            agent.log(loss=float(step))
            optimizers[name].step()
        assert agent.errors == 0
    run = open_run(agent.path)
    assert run.loss.tolist() == [float(step) for step in range(20)]
    assert run.optimizer.tolist() == [1, 0] * 10


@pytest.mark.parametrize("frozen", ["0", "2"])
def test_a_layer_that_thaws_is_watched(tmp_path: Path, frozen: str) -> None:
    """What is frozen at attach and thaws later is watched from the next step on, as the others are."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = sgd(model)
    model.get_submodule(frozen).requires_grad_(False)
    with attach(tmp_path, model, optimizer, backward="every") as agent:
        for step in range(6):
            model.get_submodule(frozen).requires_grad_(step >= 3)
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        assert agent.errors == 0
    assert all(not parameter._backward_hooks for parameter in model.parameters())
    run = open_run(agent.path)
    thawed = [place for place, name in enumerate(run.parameters) if name.startswith(frozen)]
    watched, used = run.stat("microbatch_norm")[:, thawed], run.parameter_norms[:, thawed]
    assert np.signbit(watched[:4]).all()
    np.testing.assert_allclose(watched[4:], used[4:], rtol=1e-6)
