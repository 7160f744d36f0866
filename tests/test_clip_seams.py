"""Where calls of torch's clipping functions are heard: put there and taken away without a trace."""

from __future__ import annotations

import gc
import logging
import math
import operator
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad, clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import SGD

from gradiometer import open_run
from tests._training import attach, small_model
from tests.test_own_clipping import CLIPS, MAX_NORM, STEPS, record, train_and_clip


def cells() -> list[object]:
    """Return what stands for torch's functions now: the functions, and those that their wrappers call."""
    functions: list[Any] = [clip_grad_norm_, clip_grad_value_, get_total_norm, clip_grads_with_norm_]
    names = [vars(clip_grad)[name] for name in ("_get_total_norm", "_clip_grads_with_norm_", "clip_grad_value_")]
    inner = [function.__closure__[0].cell_contents for function in functions]
    return [*functions, *names, *inner, *vars(nn.utils).values()]


def test_detaching_restores_torch(tmp_path: Path) -> None:
    """Two agents, detached in the order in which they came: torch is as it was, and until then both see."""
    before = cells()
    models = [small_model(), small_model()]
    optimizers = [SGD(model.parameters(), lr=0.01) for model in models]
    agents = [attach(tmp_path, model, optimizer) for model, optimizer in zip(models, optimizers, strict=True)]
    assert not all(map(operator.is_, cells(), before))
    for model, optimizer in zip(models, optimizers, strict=True):
        train_and_clip(model, optimizer, CLIPS["by name"])
    agents[0].detach()
    train_and_clip(models[1], optimizers[1], CLIPS["by name"])
    agents[1].detach()
    agents[1].detach()
    assert all(map(operator.is_, cells(), before))
    counts = [open_run(agent.path).own_clipping["clip_grad_norm_"].sum() for agent in agents]
    assert 0 < counts[0] < counts[1]


def test_an_agent_that_is_forgotten_restores_torch(tmp_path: Path) -> None:
    """An agent that is collected with its optimizer takes what it put into torch along."""
    before = cells()
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    gone = weakref.ref(attach(tmp_path, model, optimizer))
    train_and_clip(model, optimizer, CLIPS["by name"])
    del optimizer
    gc.collect()
    assert gone() is None
    assert all(map(operator.is_, cells(), before))


@contextmanager
def wrapped_by_somebody(cell: Any) -> Iterator[list[int]]:
    """Wrap what is in a cell as another library might, and unwrap it."""
    inner, calls = cell.cell_contents, [0]

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return inner(*args, **kwargs)

    cell.cell_contents = wrapper
    yield calls
    cell.cell_contents = inner


def test_somebody_has_wrapped_ours_since(tmp_path: Path) -> None:
    """What another has put over ours is left there, and ours is put back as soon as it is on top again."""
    before = cells()
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    agent = attach(tmp_path, model, optimizer)
    function: Any = clip_grads_with_norm_
    with wrapped_by_somebody(function.__closure__[0]) as calls:
        train_and_clip(model, optimizer, CLIPS["by name"])
        agent.detach()
        train_and_clip(model, optimizer, CLIPS["by name"])
        again = attach(tmp_path, model, optimizer)
        train_and_clip(model, optimizer, CLIPS["by name"])
    assert calls == [3 * STEPS]
    again.detach()
    assert all(map(operator.is_, cells(), before))
    for each in (agent, again):
        assert open_run(each.path).own_clipping["clip_grad_norm_"].any()


def test_a_torch_that_is_built_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where torch's functions are not as expected, that is said once, and everything else is recorded."""

    def clip(parameters: Any, max_norm: float, total_norm: Tensor, foreach: bool | None = None) -> None:
        clip_grads_with_norm_(parameters, max_norm, total_norm, foreach)

    monkeypatch.setattr("gradiometer.clip_seams._told", [])
    monkeypatch.setattr(clip_grad, "_clip_grads_with_norm_", clip)
    with caplog.at_level(logging.WARNING, "gradiometer"):
        for _ in range(2):
            run, norms = record(tmp_path, CLIPS["by name"])
    np.testing.assert_allclose(run.grad_norm_preclip, np.minimum(np.linalg.norm(norms, axis=1), MAX_NORM), rtol=1e-5)
    assert run.own_clipping == {}
    said = [message for message in caplog.messages if "_clip_grads_with_norm_" in message]
    assert len(said) == 1


def test_inside_a_compiled_function(tmp_path: Path) -> None:
    """A clip that torch.compile traces is not seen, and breaks no graph."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)

    @torch.compile(backend="eager", fullgraph=True)
    def clip(gradients: list[Tensor]) -> Tensor:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return clip_grad_norm_(parameters, 0.5)

    parameters = [torch.zeros(3, requires_grad=True) for _ in range(2)]
    with attach(tmp_path, model, optimizer):
        total = clip([torch.ones(3), torch.ones(3)])
        assert total.item() == pytest.approx(math.sqrt(6))
