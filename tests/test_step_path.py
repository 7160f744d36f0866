"""The step path never waits for the device: seen from outside, by watching what is asked of tensors.

A CPU plays the part of a GPU: ``reads_are_free`` says no, and events fire when a test lets them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import SGD, AdamW, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from gradiometer import NonFiniteGradientError, open_run
from gradiometer.policy import KINDS
from gradiometer.policy.spec import load_policy
from gradiometer.transfer import SLOTS
from tests._training import attach, backward, batch, hand_norms, loss_of, small_model, train

READS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "unique", "_unique2", "unique_dim",
    "unique_consecutive", "masked_select", "allclose", "item", "argwhere", "repeat_interleave", "bincount",
}  # fmt: skip
"""Operators that make the host wait, or whose result has a shape that only the device knows."""
CLIP = [{"global_norm": {"max_norm": 1.0}}]
NONFINITE = [{"nonfinite": {"action": "skip"}}, *CLIP]


SHADOW = [
    {"nonfinite": {"name": "guard", "action": "zero"}},
    {"nonfinite": {"name": "raising", "action": "raise"}},
    {"global_norm": {"name": "wide", "max_norm": 9.0}},
    {"group_norm": {"max_norm": 1.0, "exclude": "*.bias"}},
    {"value": {"max_abs": 0.1}},
]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Counts the operators of a region, and those among them that read from the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.calls: Counter[str] = Counter()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        masked = name.startswith("index") and any(
            isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8)
            for each in (args[1] if len(args) > 1 and isinstance(args[1], list | tuple) else ())
        )
        if name in READS or masked:
            self.reads.append(name)
        return func(*args, **(kwargs or {}))


class Event:
    """A device event that fires when the test says so, or when somebody waits for it."""

    fired = True
    waits = 0

    def __init__(self, device: str) -> None:
        self.mine = False

    def record(self) -> None:
        self.mine = False

    def query(self) -> bool:
        return self.mine or Event.fired

    def synchronize(self) -> None:
        Event.waits += 1
        self.mine = True


@pytest.fixture(autouse=True)
def _like_a_gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Make the agent take the CPU for a device whose tensors it must not read."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr("gradiometer.transfer.reads_are_free", lambda device: False)
        monkeypatch.setattr(torch, "Event", Event)
        monkeypatch.setattr(Event, "fired", True)
        monkeypatch.setattr(Event, "waits", 0)


@contextmanager
def no_python_reads() -> Iterator[list[str]]:
    """Note every call of a Tensor method that hands numbers to Python."""
    seen: list[str] = []
    kept = {}
    for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__len__"):
        original: Callable[..., Any] = getattr(Tensor, name)
        kept[name] = original

        def noting(self: Tensor, *args: Any, _name: str = name, _call: Any = original, **kwargs: Any) -> Any:
            seen.append(_name)
            return _call(self, *args, **kwargs)

        setattr(Tensor, name, noting)
    try:
        yield seen
    finally:
        for name, original in kept.items():
            setattr(Tensor, name, original)


def sgd(model: nn.Module, how: str = "foreach") -> Optimizer:
    """Make an optimizer that reads nothing itself."""
    return SGD(model.parameters(), lr=0.01, momentum=0.9, **{how: True})


CASES: dict[str, tuple[Any, str]] = {
    "observe": (None, "foreach"),
    "observe fused": (None, "fused"),
    "global_norm foreach": (CLIP, "foreach"),
    "global_norm fused": (CLIP, "fused"),
    "some of them": ([{"global_norm": {"max_norm": 1.0, "exclude": "*.bias"}}], "foreach"),
    "layers": ([{"group_norm": {"max_norm": 1.0}}], "foreach"),
    "parameters": ([{"group_norm": {"max_norm": 1.0, "scope": "parameter"}}], "fused"),
    "value": ([{"value": {"max_abs": 0.1}}], "foreach"),
    "value fused": ([{"value": {"max_abs": 0.1}}], "fused"),
    "agc": ([{"agc": {}}], "foreach"),
    "agc fused": ([*CLIP, {"agc": {}}], "fused"),
    "skip fused": (NONFINITE, "fused"),
    "max_consecutive fused": ([{"nonfinite": {"max_consecutive": 9}}], "fused"),
    "zero": ([{"nonfinite": {"action": "zero"}}, *CLIP], "foreach"),
    "shadow": ({"shadow": SHADOW}, "foreach"),
    "shadow beside a skip": ({"pipeline": NONFINITE, "shadow": SHADOW}, "fused"),
    "zero fused": ([{"nonfinite": {"action": "zero"}}, *CLIP], "fused"),
    "percentile": ([{"percentile": {"window": 3}}], "fused"),
    "percentile by layer": ([{"percentile": {"window": 3, "scope": "layer", "exclude": "0.bias"}}], "foreach"),
    "zclip": ([{"zclip": {"warmup_steps": 2}}], "fused"),
    "zclip by layer": ([{"zclip": {"warmup_steps": 2, "scope": "layer"}}], "foreach"),
    "adagc": ([{"adagc": {"warmup_steps": 2}}], "foreach"),
    "adagc of some": ([{"adagc": {"warmup_steps": 2, "match": "*.weight"}}], "fused"),
    "adagc of the model": ([{"adagc": {"warmup_steps": 0, "scope": "model"}}], "fused"),
    "ema_ratio": ([{"ema_ratio": {}}], "foreach"),
    "named groups": (
        {
            "groups": {"by": {"first": "0.*", "last": "2.*"}},
            "pipeline": [{"ema_ratio": {"scope": "group"}}, {"group_norm": {"max_norm": 1.0}}],
        },
        "foreach",
    ),
    "learn after a skip": ([*NONFINITE[:1], {"adagc": {"warmup_steps": 1}}, {"zclip": {"warmup_steps": 1}}], "fused"),
    "skip sigma": ([{"skip": {"min_history": 2, "on": ["loss", "global_norm"]}}], "fused"),
    "skip median_mad": ([{"skip": {"rule": "median_mad", "min_history": 2}}], "fused"),
    "skip abs": ([{"skip": {"rule": "abs", "threshold": 1.0, "max_consecutive": 2}}], "fused"),
    "to the letter": (
        [
            {"skip": {"min_history": 2, "compat": "reference"}},
            {"percentile": {"compat": "reference"}},
            {"zclip": {"compat": "reference", "warmup_steps": 1}},
            {"adagc": {"compat": "reference", "warmup_steps": 1}},
            {"ema_ratio": {"compat": "reference"}},
        ],
        "fused",
    ),
    "learning in shadow": (
        {"pipeline": CLIP, "shadow": [{"zclip": {"warmup_steps": 1}}, {"skip": {"min_history": 2}}]},
        "fused",
    ),
}


def test_every_kind_is_watched() -> None:
    """A kind of policy that is not among the cases fails here."""
    stages = [stage for policy, _ in CASES.values() if policy is not None for stage in load_policy(policy).stages]
    assert {stage.kind for stage in stages} >= set(KINDS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bad", [False, True])
def test_nothing_is_read_from_the_device(tmp_path: Path, case: str, bad: bool) -> None:
    """Whole steps, good and bad, with hooks armed and losses logged, ask the device for nothing."""
    policy, how = CASES[case]
    model = small_model()
    optimizer = sgd(model, how)
    with attach(tmp_path, model, optimizer, policy=policy, backward="every") as agent:
        train(model, optimizer, [0])
        Event.fired = False
        with Watch() as watch, no_python_reads() as python:
            for step in range(1, 4):
                loss = loss_of(model, step) * (math.nan if bad else 1.0)
                optimizer.zero_grad()
                backward(loss)
                agent.log(loss=loss, other=loss)
                optimizer.step()
        assert (watch.reads, python) == ([], [])
    assert len(open_run(agent.path)) == 4


@pytest.mark.parametrize("bad", [False, True])
def test_sampling_reads_nothing_from_the_device(tmp_path: Path, bad: bool) -> None:
    """Updates and cosines, of a tensor read whole and of one read in part, are sent off without a look at them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3000), nn.Tanh(), nn.Linear(3000, 2))
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=CLIP, backward="off", updates_every=1, cosine=True) as agent:
        train(model, optimizer, [0])
        Event.fired = False
        for step in range(1, 4):
            optimizer.zero_grad()
            backward(loss_of(model, step) * (math.nan if bad else 1.0))
            with Watch() as watch, no_python_reads() as python:
                optimizer.step()
            assert (watch.reads, python) == ([], [])
        assert agent.errors == 0
    samples = open_run(agent.path).samples
    assert samples is not None
    assert samples.steps.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_of_a_loop_that_clips(tmp_path: Path, bad: bool, dtype: torch.dtype) -> None:
    """Following the loop's own clipping asks the device for nothing, and a bad step's culprit is found all the same."""
    model = small_model().to(dtype)
    optimizer = sgd(model)
    wanted = []
    with attach(tmp_path, model, optimizer, backward="off") as agent:
        Event.fired = False
        for step in range(1 if bad else 4):
            optimizer.zero_grad()
            backward(model(batch(step).to(dtype)).square().sum())
            gradient = model.get_parameter("2.weight").grad
            assert gradient is not None
            gradient[0, 0] = math.nan if bad else 1.0
            wanted.append(hand_norms(model))
            with Watch() as watch, no_python_reads() as python:
                clip_grad_norm_(model[0].parameters(), 1.0)
                clip_grad_norm_(model.parameters(), 0.5)
                clip_grad_value_(model.parameters(), 0.1)
                optimizer.step()
            assert (watch.reads, python) == ([], [])
            agent.log(loss=torch.ones(()))
    run = open_run(agent.path)
    np.testing.assert_allclose(run.parameter_norms, wanted, rtol=1e-6 if dtype is torch.float32 else 5e-3)
    assert run.first_nonfinite == ["2.weight" if bad else None] * len(wanted)
    assert run.loss.tolist() == [1.0] * len(wanted)
    assert run.own_clipping["clip_grad_norm_"].all()


@pytest.mark.parametrize("policy", [None, CLIP, [{"value": {"max_abs": 0.1}}], NONFINITE])
def test_nothing_is_read_under_a_fused_scaler(tmp_path: Path, policy: Any) -> None:
    """Under a GradScaler and a fused optimizer the agent asks the device for nothing."""
    model = small_model()
    optimizer, scaler = sgd(model, "fused"), GradScaler("cpu")
    with attach(tmp_path, model, optimizer, policy=policy):
        backward(scaler.scale(loss_of(model, 0)))
        scaler.step(optimizer)
        scaler.update()
        Event.fired = False
        backward(scaler.scale(loss_of(model, 1)))
        with Watch() as watch, no_python_reads() as python:
            scaler.step(optimizer)
        assert (watch.reads, python) == ([], [])


@pytest.mark.parametrize("bad", [False, True])
def test_a_skip_without_a_fused_kernel_reads_once(tmp_path: Path, bad: bool) -> None:
    """A true skip without a fused kernel is a decision of the host: exactly one read a step."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=NONFINITE):
        train(model, optimizer, [0])
        backward(loss_of(model, 1) * (math.nan if bad else 1.0))
        with Watch() as watch:
            optimizer.step()
        assert len(watch.reads) == 1


def count(tmp_path: Path, parameters: int, policy: Any, how: str) -> Counter[str]:
    """Count what the agent adds to a step of a model of so many parameters, list operators left out."""
    model = nn.ParameterList([nn.Parameter(torch.ones(3)) for _ in range(parameters)])

    def take(optimizer: Optimizer) -> Counter[str]:
        for parameter in model:
            parameter.grad = torch.full_like(parameter, 2.0)
        with Watch() as watch:
            optimizer.step()
        return Counter({name: calls for name, calls in watch.calls.items() if not name.startswith("_foreach")})

    optimizer = sgd(model, how)
    take(optimizer)
    alone = take(optimizer)
    with attach(tmp_path, model, optimizer, policy=policy, backward="off"):
        take(optimizer)
        return take(optimizer) - alone


@pytest.mark.parametrize(
    ("case", "bound"), [("observe", 10), ("global_norm fused", 30), ("skip fused", 40), ("adagc", 60), ("zclip", 80)]
)
def test_the_work_of_a_step_is_bounded(tmp_path: Path, case: str, bound: int) -> None:
    """The agent runs as many operators for 200 parameters as for 10, and few of them."""
    policy, how = CASES[case]
    few, many = (count(tmp_path, number, policy, how) for number in (10, 200))
    assert few == many
    assert few.total() <= bound


@pytest.mark.parametrize("policy", [None, CLIP, NONFINITE])
def test_rows_that_arrive_late_are_whole(tmp_path: Path, policy: Any) -> None:
    """Rows held up on the device are written when they arrive, in order, with their own numbers."""
    model = small_model()
    optimizer, wanted = sgd(model, "fused"), []
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        Event.fired = False
        for step in range(6):
            optimizer.zero_grad()
            backward(loss_of(model, step))
            wanted.append(hand_norms(model))
            agent.log(loss=torch.tensor(float(step)))
            optimizer.step()
        assert len(open_run(agent.path)) == 0
        Event.fired = True
        train(model, optimizer, [6])
        wanted.append(hand_norms(model))
    run = open_run(agent.path)
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert run.loss.tolist()[:6] == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(run.parameter_norms[:6], wanted[:6], rtol=1e-6)
    assert run.status["rows_dropped"] == 0


def test_flush_waits_for_the_rows_under_way(tmp_path: Path) -> None:
    """``flush`` writes what is still on the device."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        Event.fired = False
        train(model, optimizer, range(3))
        agent.flush()
        assert open_run(agent.path).steps.tolist() == [0, 1, 2]


def test_rows_are_dropped_when_every_slot_is_busy(tmp_path: Path) -> None:
    """When the device does not keep up, rows are dropped and counted, and nobody waits."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        Event.fired = False
        train(model, optimizer, range(SLOTS + 5))
        assert Event.waits == 0
        assert agent.errors == 0
    run = open_run(agent.path)
    assert run.steps.tolist() == list(range(SLOTS))
    assert run.status["rows_dropped"] == 5


def test_rows_follow_after_a_jam(tmp_path: Path) -> None:
    """After rows had to be dropped, later ones are recorded again."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        Event.fired = False
        train(model, optimizer, range(SLOTS + 2))
        Event.fired = True
        train(model, optimizer, range(3))
    assert open_run(agent.path).steps.tolist()[-2:] == [SLOTS + 3, SLOTS + 4]


def test_detaching_waits_for_the_rows_under_way(tmp_path: Path) -> None:
    """Detaching writes what is still on the device: there, waiting is right."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        Event.fired = False
        train(model, optimizer, range(3))
        assert len(open_run(agent.path)) == 0
    assert len(open_run(agent.path)) == 3


@pytest.mark.parametrize("fired", [False, True])
@pytest.mark.parametrize("tensor", [False, True])
def test_a_loss_logged_after_the_step_joins_its_row(tmp_path: Path, fired: bool, tensor: bool) -> None:
    """A loss logged after the step goes with that step, whether or not its row has arrived already."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        Event.fired = fired
        for step in range(4):
            train(model, optimizer, [step])
            agent.log(loss=torch.tensor(step + 0.5) if tensor else step + 0.5)
    assert open_run(agent.path).loss.tolist() == [0.5, 1.5, 2.5, 3.5]


def test_a_loss_that_came_after_a_dropped_row_spoils_no_other(tmp_path: Path) -> None:
    """The loss of a step whose row was dropped is not written into another step's row."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        train(model, optimizer, [0])
        agent.log(loss=0.0)
        Event.fired = False
        for step in range(1, SLOTS + 2):
            train(model, optimizer, [step])
            agent.log(loss=float(step))
    run = open_run(agent.path)
    assert run.loss.tolist() == run.steps.tolist()


def test_a_tensor_is_copied_when_it_is_logged(tmp_path: Path) -> None:
    """A logged tensor that is changed in place afterwards was recorded as it was."""
    model, running = small_model(), torch.tensor(1.0)
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        agent.log(loss=running)
        running.add_(100)
        train(model, optimizer, [0])
    assert open_run(agent.path).loss.tolist() == [1.0]


def test_too_many_scalars_lose_no_row(tmp_path: Path) -> None:
    """More scalars than a run can hold, as tensors, cost neither the row nor one of the slots."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        for step in range(SLOTS + 2):
            agent.log(loss=1.0, **{f"s{place}": torch.tensor(float(place)) for place in range(200)})
            train(model, optimizer, [step])
        assert agent.errors == 0
    run = open_run(agent.path)
    assert len(run) == SLOTS + 2
    assert len(run.scalars) == 16


def test_raise_comes_when_the_row_arrives(tmp_path: Path) -> None:
    """Action raise skips on the device at once, and raises when the host learns of it."""
    model = small_model()
    optimizer = sgd(model, "fused")
    with attach(tmp_path, model, optimizer, policy=[{"nonfinite": {"action": "raise"}}]):
        Event.fired = False
        before = [parameter.clone() for parameter in model.parameters()]
        backward(loss_of(model, 0) * math.nan)
        optimizer.step()
        optimizer.step()
        Event.fired = True
        with pytest.raises(NonFiniteGradientError):
            optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@contextmanager
def no_syncs() -> Iterator[None]:
    """Make every synchronisation with the GPU an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("case", CASES)
def test_no_synchronisation_on_cuda(tmp_path: Path, case: str) -> None:
    """On a GPU no step synchronises, and the norms recorded are those of float64."""
    policy, how = CASES[case]
    model = small_model().cuda()
    chosen: dict[str, Any] = {how: True}
    optimizer, wanted = AdamW(model.parameters(), **chosen), []
    inputs = [torch.randn(16, 4, device="cuda") for _ in range(6)]
    with attach(tmp_path, model, optimizer, policy=policy, backward="every") as agent:
        for step, values in enumerate(inputs):
            optimizer.zero_grad()
            loss = model(values).square().sum()
            backward(loss)
            wanted.append(torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]))
            torch.cuda.synchronize()
            with no_syncs() if step else nullcontext():
                agent.log(loss=loss)
                optimizer.step()
    run = open_run(agent.path)
    np.testing.assert_allclose(run.parameter_norms, torch.stack(wanted).cpu().numpy(), rtol=1e-6)


@pytest.mark.gpu
@needs_cuda
def test_a_changing_set_of_gradients_on_cuda(tmp_path: Path) -> None:
    """On a GPU, steps whose parameters have gradients by turns, as experts have, do not synchronise either."""
    model = nn.ModuleList([nn.Linear(4, 2) for _ in range(3)]).cuda()
    optimizer = AdamW(model.parameters(), fused=True)
    with attach(tmp_path, model, optimizer, policy=CLIP):
        for step in range(9):
            optimizer.zero_grad()
            backward(model[step % 3](torch.ones(1, 4, device="cuda")).sum())
            torch.cuda.synchronize()
            with no_syncs() if step >= 3 else nullcontext():
                optimizer.step()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("policy", [None, CLIP, [{"value": {"max_abs": 0.1}}], NONFINITE])
def test_fused_amp_on_cuda(tmp_path: Path, policy: Any) -> None:
    """On a GPU, under autocast and a GradScaler, a fused step does not synchronise and true norms are recorded."""
    model = small_model().cuda()
    optimizer, scaler, wanted = AdamW(model.parameters(), fused=True), GradScaler("cuda", init_scale=256.0), []
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        for step in range(4):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = model(torch.randn(16, 4, device="cuda")).square().sum()
            backward(scaler.scale(loss))
            wanted.append(torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]) / 256)
            torch.cuda.synchronize()
            with no_syncs() if step else nullcontext():
                scaler.step(optimizer)
            scaler.update()
    np.testing.assert_allclose(open_run(agent.path).parameter_norms, torch.stack(wanted).cpu().numpy(), rtol=1e-5)
