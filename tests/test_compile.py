"""What docs/compile.md says of torch.compile, compiled autograd and CUDA graphs; more is in test_agent_loops.py."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters
from torch.optim import SGD, Adam, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from gradiometer import open_run, transfer
from gradiometer.session import CapturedStepError
from tests._training import (
    assert_same,
    attach,
    backward,
    batch,
    check_run,
    loss_of,
    small_model,
    train,
    train_by_hand,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]
CLIP = [{"global_norm": {"max_norm": 2.0}}]
MAX_NORM = 2.0
STEPS = range(10)
WHAT = ["model", "step", "model and step", "all of it"]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++ on a CPU")
CASES = [
    *(
        pytest.param("eager", what, how, policy)
        for what in WHAT
        for how in ("foreach", "fused")
        for policy in (None, CLIP)
    ),
    *(pytest.param("inductor", what, "foreach", CLIP, marks=needs_compiler) for what in ("model", "all of it")),
    pytest.param("inductor", "model and step", "fused", CLIP, marks=needs_compiler),
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile anew in each test, and arm backward hooks at every fourth step instead of every hundredth."""
    monkeypatch.setattr("gradiometer.backward.EVERY", 4)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def make(how: str, model: nn.Module) -> Optimizer:
    """Make an optimizer; SGD where numbers are compared with those of a step that is not compiled."""
    if how == "fused":
        return Adam(model.parameters(), lr=0.01, fused=True)
    return SGD(model.parameters(), lr=0.01, momentum=0.9, foreach=True)


def step_function(model: nn.Module, optimizer: Optimizer, what: str, backend: str) -> Callable[[Tensor], None]:
    """Make the function of one training step, of which ``what`` is compiled."""
    compiled: Any = torch.compile(model, backend=backend) if what in ("model", "model and step") else model

    def update() -> None:
        optimizer.step()

    if what in ("step", "model and step"):
        update = torch.compile(update, backend=backend)

    def whole(inputs: Tensor) -> None:
        optimizer.zero_grad()
        backward(compiled(inputs).square().sum())
        update()

    return torch.compile(whole, backend=backend) if what == "all of it" else whole


@pytest.mark.parametrize(("backend", "what", "how", "policy"), CASES)
def test_compiled_training(tmp_path: Path, backend: str, what: str, how: str, policy: Any) -> None:
    """Whatever is compiled, the numbers are those of a loop that is not, and no step but the first two compiles."""
    model = small_model()
    twin = copy.deepcopy(model)
    norms = train_by_hand(twin, make(how, twin), STEPS, MAX_NORM if policy else math.inf)
    optimizer = make(how, model)
    step = step_function(model, optimizer, what, backend)
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        for number in STEPS:
            with torch._dynamo.config.patch(error_on_recompile=number > 1):
                step(batch(number))
    assert agent.errors == 0
    check_run(agent.path, norms, MAX_NORM if policy else math.inf)
    assert_same(model, twin)


def test_a_compiled_step_stays_compiled(tmp_path: Path) -> None:
    """The agent's hooks are outside of the graph: it holds as many operations as without them."""
    calls = []
    for attached in (False, True):
        torch.compiler.reset()
        counters.clear()
        model = small_model()
        optimizer = make("foreach", model)
        step = step_function(model, optimizer, "step", "eager")
        agent = attach(tmp_path, model, optimizer, policy=CLIP) if attached else None
        for number in range(3):
            step(batch(number))
        if agent is not None:
            agent.detach()
        calls.append((counters["stats"]["unique_graphs"], counters["stats"]["calls_captured"]))
    assert calls[0] == calls[1]
    assert calls[0][1] > 0


def test_attaching_and_detaching_in_between(tmp_path: Path) -> None:
    """Attached to a step that is compiled already, the agent measures and clips; detached, it is gone."""
    model = small_model()
    twin = copy.deepcopy(model)
    reference, optimizer = make("foreach", twin), make("foreach", model)
    step = step_function(model, optimizer, "model and step", "eager")
    for number in range(3):
        step(batch(number))
    train_by_hand(twin, reference, range(3))
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        for number in range(3, 6):
            step(batch(number))
    norms = train_by_hand(twin, reference, range(3, 6), MAX_NORM)
    step(batch(6))
    train_by_hand(twin, reference, [6])
    check_run(agent.path, norms, MAX_NORM)
    assert_same(model, twin)


@pytest.mark.parametrize("mode", ["off", "auto", "every"])
def test_compiled_autograd(tmp_path: Path, mode: str) -> None:
    """Backward hooks that come and go cost compiled autograd one more capture, once; numbers stay what they are."""
    model = small_model()
    twin = copy.deepcopy(model)
    norms = train_by_hand(twin, make("fused", twin), STEPS, MAX_NORM)
    optimizer, captures = make("fused", model), []
    compiled: Any = torch.compile(model, backend="eager")
    with attach(tmp_path, model, optimizer, policy=CLIP, backward=mode) as agent:
        for number in STEPS:
            optimizer.zero_grad()
            with compiled_autograd._enable(torch.compile(backend="eager")):
                backward(loss_of(compiled, number))
            optimizer.step()
            captures.append(counters["compiled_autograd"]["captures"])
    run = check_run(agent.path, norms, MAX_NORM)
    assert captures[-1] == (2 if mode == "auto" else 1)
    assert captures[5] == captures[-1]
    hooked = ~np.signbit(run.stat("microbatch_norm")).any(axis=1)
    assert hooked.any() == (mode != "off")
    np.testing.assert_allclose(run.stat("microbatch_norm")[hooked], norms[hooked], rtol=1e-5)


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Note every operation on tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def operations_of(step: Callable[[], Any]) -> list[str]:
    """Return the operations that a call does."""
    seen = Operations()
    with seen:
        step()
    return seen.names


def test_a_captured_step_is_stood_aside_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While a CUDA graph is captured the agent adds no operation; that is told once, and later steps are measured."""
    model = small_model()
    optimizer = make("foreach", model)
    train(model, optimizer, [0])
    backward(loss_of(model, 1))
    alone = operations_of(optimizer.step)
    with attach(tmp_path, model, optimizer, backward="every") as agent:
        train(model, optimizer, [2])
        monkeypatch.setattr(transfer, "capturing", lambda: True)  # no graph can be captured on a CPU
        for number in (3, 4):
            optimizer.zero_grad()
            backward(loss_of(model, number))
            agent.log(loss=1.0)
            assert operations_of(optimizer.step) == alone
        monkeypatch.undo()
        train(model, optimizer, [5])
        assert agent.errors == 0
    run = open_run(agent.path)
    assert run.rows["microbatches"].tolist() == [1, 1]
    assert [event["kind"] for event in run.events].count("step_captured") == 1
    assert sum("neither measured nor clipped" in record.message for record in caplog.records) == 1


def test_a_policy_refuses_to_be_captured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy would act while the graph is captured and never again, so the step raises, and has moved nothing."""
    model = small_model()
    twin, optimizer = copy.deepcopy(model), make("fused", model)
    with attach(tmp_path, model, optimizer, policy=CLIP):
        backward(loss_of(model, 0))
        monkeypatch.setattr(transfer, "capturing", lambda: True)  # no graph can be captured on a CPU
        with pytest.raises(CapturedStepError, match="Step outside of the graph"):
            optimizer.step()
    assert_same(model, twin, exactly=True)
    assert "grad_scale" not in vars(optimizer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_graph_of_a_whole_step(tmp_path: Path) -> None:
    """On a GPU a whole step is captured and replayed with an agent attached, which measures the steps around it."""
    model = small_model().cuda()
    optimizer = Adam(model.parameters(), capturable=True)
    inputs, side = batch(0).cuda(), torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        backward(model(inputs).square().sum())
        optimizer.step()

    with attach(tmp_path, model, optimizer, backward="every") as agent:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        graph.replay()
        step()
        assert agent.errors == 0
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(open_run(agent.path)) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", [None, CLIP])
def test_cuda_graphs_of_the_model_alone(tmp_path: Path, policy: Any) -> None:
    """On a GPU, ``mode="reduce-overhead"`` captures forward and backward passes; every step is measured and clipped."""
    model = small_model().cuda()
    twin = copy.deepcopy(model)
    compiled: Any = torch.compile(model, mode="reduce-overhead")
    optimizer, reference, wanted = SGD(model.parameters(), lr=0.01), SGD(twin.parameters(), lr=0.01), []
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        for number in range(8):
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # torch
            for each, its_optimizer in ((twin, reference), (compiled, optimizer)):
                its_optimizer.zero_grad()
                backward(each(batch(number).cuda()).square().sum())
            wanted.append(nn.utils.clip_grad_norm_(twin.parameters(), MAX_NORM if policy else math.inf).item())
            reference.step()
            optimizer.step()
    np.testing.assert_allclose(open_run(agent.path).grad_norm_preclip, wanted, rtol=1e-4)
