"""The ways of training that the agent covers: each is checked against torch's own clipping and norms done by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.utils.checkpoint import checkpoint

from gradiometer import open_run
from gradiometer.records import Flag
from tests._training import (
    assert_same,
    attach,
    backward,
    batch,
    check_run,
    hand_norms,
    loss_of,
    small_model,
    train,
    train_by_hand,
)

CLIP = [{"global_norm": {"max_norm": 2.0}}]
MAX_NORM = 2.0
KINDS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (Adam, {"lr": 0.01}),
    "adamw": (AdamW, {"lr": 0.01}),
    "sgd": (SGD, {"lr": 0.01, "momentum": 0.9}),
    "adagrad": (Adagrad, {"lr": 0.01}),
    "rmsprop": (RMSprop, {"lr": 0.001}),
}
FUSED = ["adam", "adamw", "sgd", "adagrad"]
VARIANTS = [(kind, how) for kind in KINDS for how in ("loop", "foreach", "fused") if how != "fused" or kind in FUSED]


def make(kind: str, how: str, model: nn.Module) -> Optimizer:
    """Make an optimizer of one implementation."""
    cls, settings = KINDS[kind]
    return cls(model.parameters(), **settings | ({"foreach": False} if how == "loop" else {how: True}))


@pytest.mark.parametrize(("kind", "how"), VARIANTS)
def test_observing_changes_nothing(tmp_path: Path, kind: str, how: str) -> None:
    """Observed, every optimizer moves the parameters to the same bits as alone, and the norms are recorded."""
    model = small_model()
    twin = copy.deepcopy(model)
    norms = train_by_hand(twin, make(kind, how, twin))
    optimizer = make(kind, how, model)
    with attach(tmp_path, model, optimizer) as agent:
        train(model, optimizer)
    check_run(agent.path, norms)
    assert_same(model, twin, exactly=True)


@pytest.mark.parametrize(("kind", "how"), VARIANTS)
def test_clipping_equals_torch(tmp_path: Path, kind: str, how: str) -> None:
    """Clipped by the agent, every optimizer moves the parameters as after ``clip_grad_norm_``."""
    model = small_model()
    twin = copy.deepcopy(model)
    norms = train_by_hand(twin, make(kind, how, twin), max_norm=MAX_NORM)
    optimizer = make(kind, how, model)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        train(model, optimizer)
    run = check_run(agent.path, norms, MAX_NORM)
    assert run.clipped[:, 0].all()
    assert np.isnan(run.rows["loss_scale"]).all()
    assert_same(model, twin)


def test_a_wide_threshold_changes_nothing(tmp_path: Path) -> None:
    """Where nothing exceeds the threshold a fused step is the same to the bit, and no clip is recorded."""
    model = small_model()
    twin = copy.deepcopy(model)
    norms = train_by_hand(twin, make("adamw", "fused", twin))
    optimizer = make("adamw", "fused", model)
    with attach(tmp_path, model, optimizer, policy=[{"global_norm": {"max_norm": 1e6}}]) as agent:
        train(model, optimizer)
    assert not check_run(agent.path, norms, 1e6).clipped.any()
    assert_same(model, twin, exactly=True)


@pytest.mark.parametrize("how", ["foreach", "fused"])
@pytest.mark.parametrize("policy", [None, CLIP])
def test_accumulation_measures_the_sum(tmp_path: Path, policy: Any, how: str) -> None:
    """With accumulation the norm is that of the summed gradient, and the micro-batch column a root mean square."""
    model = small_model()
    optimizer, wanted, micro = make("sgd", how, model), [], []
    with attach(tmp_path, model, optimizer, policy=policy, backward="every") as agent:
        for step in range(4):
            optimizer.zero_grad()
            micro.append(_rms(copy.deepcopy(model), [10 * step, 10 * step + 1, 10 * step + 2]))
            for part in range(3):
                backward(loss_of(model, 10 * step + part))
            wanted.append(hand_norms(model))
            optimizer.step()
    run = check_run(agent.path, wanted, MAX_NORM if policy else math.inf)
    np.testing.assert_allclose(run.stat("microbatch_norm"), micro, rtol=1e-5)
    assert (run.rows["microbatches"] == 3).all()


def _rms(twin: nn.Module, batches: list[int]) -> npt.NDArray[np.float64]:
    """Return the root mean square of each parameter's gradient norm over batches."""
    squares = []
    for each in batches:
        twin.zero_grad()
        backward(loss_of(twin, each))
        squares.append(np.square(hand_norms(twin)))
    root: npt.NDArray[np.float64] = np.sqrt(np.mean(squares, axis=0))
    return root


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("policy", [None, CLIP])
def test_a_closure_is_measured_after_its_backward(tmp_path: Path, keyword: bool, policy: Any) -> None:
    """A step with a closure records the gradients of this step's backward pass, and clips them."""
    model = small_model()
    twin = copy.deepcopy(model)
    norms = train_by_hand(twin, Adam(twin.parameters()), max_norm=MAX_NORM if policy else math.inf)
    optimizer = Adam(model.parameters())
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        for step in range(5):
            closure = _closure(model, optimizer, step)
            loss: Any = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
            assert loss.requires_grad
    check_run(agent.path, norms, MAX_NORM if policy else math.inf)
    assert_same(model, twin)


def _closure(model: nn.Module, optimizer: Optimizer, step: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        backward(loss)
        return loss

    return closure


class Searching(LBFGS):
    """LBFGS with types, and few evaluations in a step."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1, max_iter=4)

    def search(self, closure: Callable[[], Tensor]) -> None:
        self.step(closure)  # type: ignore[no-untyped-call]  # torch


def test_lbfgs_is_one_row_a_step(tmp_path: Path) -> None:
    """LBFGS calls its closure many times in a step; the row is that of the first, and the search is not disturbed."""
    model = small_model()
    twin = copy.deepcopy(model)
    reference, norms = Searching(twin), []
    for step in range(3):
        backward(_zeroed(twin, step))
        norms.append(hand_norms(twin))
        reference.search(_closure(twin, reference, step))
    optimizer = Searching(model)
    with attach(tmp_path, model, optimizer) as agent:
        for step in range(3):
            optimizer.search(_closure(model, optimizer, step))
    check_run(agent.path, norms)
    assert next(iter(optimizer.state.values()))["func_evals"] == 12
    assert_same(model, twin, exactly=True)


def _zeroed(model: nn.Module, step: int) -> Tensor:
    model.zero_grad()
    return loss_of(model, step)


def test_lbfgs_is_clipped_at_every_evaluation(tmp_path: Path) -> None:
    """LBFGS is given clipped gradients whenever it asks for them."""
    model = small_model()
    twin = copy.deepcopy(model)
    reference, optimizer = Searching(twin), Searching(model)
    plain = _closure(twin, reference, 0)

    def clipped() -> Tensor:
        loss = plain()
        nn.utils.clip_grad_norm_(twin.parameters(), MAX_NORM)
        return loss

    reference.search(clipped)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        optimizer.search(_closure(model, optimizer, 0))
    assert len(open_run(agent.path)) == 1
    assert_same(model, twin)


def test_param_groups_are_clipped_together(tmp_path: Path) -> None:
    """Groups with settings of their own share one norm, and the learning rate recorded is the first group's."""
    model = small_model()
    twin = copy.deepcopy(model)
    norms = train_by_hand(twin, _two_groups(twin), max_norm=MAX_NORM)
    optimizer = _two_groups(model)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        train(model, optimizer)
    assert check_run(agent.path, norms, MAX_NORM).learning_rate.tolist() == [0.01] * 5
    assert_same(model, twin)


def _two_groups(model: nn.Module) -> Optimizer:
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": biases, "lr": 0.01, "weight_decay": 0}, {"params": weights}]
    return AdamW(groups, lr=0.02)


def test_the_learning_rate_follows_a_scheduler(tmp_path: Path) -> None:
    """The learning rate recorded is the one that the step used."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(tmp_path, model, optimizer) as agent:
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        for step in range(3):
            train(model, optimizer, [step])
            scheduler.step()
    np.testing.assert_allclose(open_run(agent.path).learning_rate, [0.1, 0.05, 0.025], rtol=1e-6)


def test_frozen_and_unused_parameters_are_negative_zero(tmp_path: Path) -> None:
    """A parameter without a gradient, frozen or unused, is recorded as negative zero and disturbs no norm."""
    model = nn.ModuleDict({"used": nn.Linear(4, 2), "frozen": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    wanted = []
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        for step in range(3):
            optimizer.zero_grad()
            backward(model["frozen"](model["used"](batch(step))).square().sum())
            wanted.append(hand_norms(model))
            optimizer.step()
    run = check_run(agent.path, wanted, MAX_NORM)
    assert np.signbit(run.parameter_norms)[:, 2:].all()
    assert [p.trainable for p in run.manifest.parameters] == [True, True, False, False, True, True]


def test_a_zero_gradient_is_positive_zero(tmp_path: Path) -> None:
    """``zero_grad(set_to_none=False)`` leaves gradients of zero, which are recorded as such and not as missing."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    train(model, optimizer, [0])
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        backward(loss_of(model, 1))
        wanted = hand_norms(model)
        optimizer.step()
    check_run(agent.path, [np.zeros(4), wanted], MAX_NORM)


def test_tied_parameters_count_once(tmp_path: Path) -> None:
    """A tensor that two modules share is one parameter, under its first name, and clipped once."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    twin = copy.deepcopy(model)
    norms = train_by_hand(twin, SGD(twin.parameters(), lr=0.01), max_norm=MAX_NORM)
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        train(model, optimizer)
    assert check_run(agent.path, norms, MAX_NORM).parameters == ["0.weight"]
    assert_same(model, twin)


@pytest.mark.parametrize("policy", [None, CLIP, [{"value": {"max_abs": 0.1}}]])
def test_sparse_gradients_add_up_duplicates(tmp_path: Path, policy: Any) -> None:
    """A sparse gradient with a row twice in the batch is measured, and bounded, as the dense one it stands for."""
    model = nn.Sequential(nn.Embedding(10, 3, sparse=True), nn.Linear(3, 2))
    optimizer, places, wanted = SGD(model.parameters(), lr=0.05), torch.tensor([1, 1, 1, 7]), []
    twin = copy.deepcopy(model)
    vars(twin[0])["sparse"] = False
    reference = SGD(twin.parameters(), lr=0.05)
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        for _ in range(3):
            for each, its_optimizer in ((twin, reference), (model, optimizer)):
                its_optimizer.zero_grad()
                backward(each(places).square().sum() * 5)
            wanted.append(hand_norms(twin))
            _clip_like(policy, twin)
            reference.step()
            optimizer.step()
    np.testing.assert_allclose(open_run(agent.path).parameter_norms, wanted, rtol=1e-5)
    assert_same(model, twin)


def _clip_like(policy: Any, model: nn.Module) -> None:
    if policy == CLIP:
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
    elif policy:
        nn.utils.clip_grad_value_(model.parameters(), 0.1)


def test_gradients_may_change_from_step_to_step(tmp_path: Path) -> None:
    """Which parameters have a gradient may differ at every step, as in a mixture of experts."""
    model = nn.ModuleList([nn.Linear(4, 2) for _ in range(3)])
    twin = copy.deepcopy(model)
    optimizer, reference, wanted = Adam(model.parameters()), Adam(twin.parameters()), []
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        for step, expert in enumerate([0, 2, 1, 1, 0]):
            for each, its_optimizer in ((twin, reference), (model, optimizer)):
                its_optimizer.zero_grad()
                backward(each[expert](batch(step)).square().sum())
            wanted.append(hand_norms(twin))
            nn.utils.clip_grad_norm_(twin.parameters(), MAX_NORM)
            reference.step()
            optimizer.step()
    check_run(agent.path, wanted, MAX_NORM)
    assert_same(model, twin)


def test_a_loaded_state_can_end_fused_steps(tmp_path: Path) -> None:
    """A checkpoint that turns a fused optimizer into another in mid-training changes the way of clipping with it."""
    model = small_model()
    twin = copy.deepcopy(model)
    reference, optimizer = Adam(twin.parameters(), fused=True), Adam(model.parameters(), fused=True)
    first = train_by_hand(twin, reference, range(2), MAX_NORM)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        train(model, optimizer, range(2))
        for each in (reference, optimizer):
            state = each.state_dict()
            state["param_groups"][0]["fused"] = None
            each.load_state_dict(state)
        second = train_by_hand(twin, reference, range(2, 5), MAX_NORM)
        train(model, optimizer, range(2, 5))
    check_run(agent.path, np.concatenate([first, second]), MAX_NORM)
    assert_same(model, twin)


def test_a_loaded_state_can_begin_fused_steps(tmp_path: Path) -> None:
    """A checkpoint of a fused optimizer makes a plain one fused, and it is still clipped once."""
    model = small_model()
    twin = copy.deepcopy(model)
    reference, optimizer = Adam(twin.parameters()), Adam(model.parameters())
    for each in (reference, optimizer):
        state = each.state_dict()
        state["param_groups"][0]["fused"] = True
        each.load_state_dict(state)
    norms = train_by_hand(twin, reference, max_norm=MAX_NORM)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        train(model, optimizer)
    check_run(agent.path, norms, MAX_NORM)
    assert_same(model, twin)


def test_attaching_in_mid_training(tmp_path: Path) -> None:
    """An agent that comes late counts its own steps from 0 and clips from then on."""
    model = small_model()
    twin = copy.deepcopy(model)
    reference, optimizer = AdamW(twin.parameters(), fused=True), AdamW(model.parameters(), fused=True)
    train(twin, reference, range(3))
    train(model, optimizer, range(3))
    norms = train_by_hand(twin, reference, range(3, 6), MAX_NORM)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        train(model, optimizer, range(3, 6))
    assert check_run(agent.path, norms, MAX_NORM).steps.tolist() == [0, 1, 2]
    assert_same(model, twin)


def test_two_agents_in_one_process(tmp_path: Path) -> None:
    """Two models, each with its agent, are recorded and clipped apart."""
    models = [small_model(0), small_model(1)]
    twins = copy.deepcopy(models)
    norms = [train_by_hand(twins[0], SGD(twins[0].parameters(), lr=0.01), max_norm=MAX_NORM)]
    norms.append(train_by_hand(twins[1], SGD(twins[1].parameters(), lr=0.01)))
    optimizers = [SGD(model.parameters(), lr=0.01) for model in models]
    with (
        attach(tmp_path, models[0], optimizers[0], policy=CLIP) as first,
        attach(tmp_path, models[1], optimizers[1]) as second,
    ):
        for step in range(5):
            for model, optimizer in zip(models, optimizers, strict=True):
                train(model, optimizer, [step])
    check_run(first.path, norms[0], MAX_NORM)
    check_run(second.path, norms[1])
    assert_same(models[0], twins[0])
    assert_same(models[1], twins[1], exactly=True)


@pytest.mark.parametrize("how", ["loop", "fused"])
def test_a_compiled_model(tmp_path: Path, how: str) -> None:
    """A compiled model is measured under its plain names, and arming the backward hooks recompiles nothing."""
    torch.compiler.reset()
    model = small_model()
    twin = copy.deepcopy(model)
    norms = train_by_hand(twin, make("adam", how, twin), range(8), MAX_NORM)
    compiled: Any = torch.compile(model, backend="aot_eager")
    optimizer = make("adam", how, model)
    with attach(tmp_path, compiled, optimizer, policy=CLIP) as agent:
        train(compiled, optimizer, [0])
        graphs = counters["stats"]["unique_graphs"]
        train(compiled, optimizer, range(1, 8))
    hooked = check_run(agent.path, norms, MAX_NORM).rows["flags"] & Flag.HOOKED
    assert hooked.any()
    assert not hooked.all()
    assert counters["stats"]["unique_graphs"] == graphs
    assert open_run(agent.path).parameters == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert_same(model, twin)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(("kind", "how"), [("sgd", "foreach"), ("adam", "fused")])
def test_a_compiled_step(tmp_path: Path, kind: str, how: str) -> None:
    """A step under torch.compile is measured and clipped like any other."""
    torch.compiler.reset()
    model = small_model()
    twin = copy.deepcopy(model)
    norms = train_by_hand(twin, make(kind, how, twin), max_norm=MAX_NORM)
    optimizer = make(kind, how, model)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        step = torch.compile(lambda: optimizer.step(), backend="eager")
        for each in range(5):
            optimizer.zero_grad()
            backward(loss_of(model, each))
            step()
    check_run(agent.path, norms, MAX_NORM)
    assert_same(model, twin)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    """Activation checkpointing, of either kind, is measured as if it were not there."""

    class Checkpointed(nn.Sequential):
        def forward(self, inputs: Tensor) -> Any:
            return checkpoint(super().forward, inputs.requires_grad_(), use_reentrant=reentrant)

    model = small_model()
    twin = copy.deepcopy(model)
    norms = train_by_hand(twin, SGD(twin.parameters(), lr=0.01))
    wrapped = Checkpointed(*model)
    optimizer = SGD(wrapped.parameters(), lr=0.01)
    with attach(tmp_path, wrapped, optimizer, backward="every") as agent:
        train(wrapped, optimizer)
    run = check_run(agent.path, norms)
    np.testing.assert_allclose(run.stat("microbatch_norm"), norms, rtol=1e-6)


def test_a_step_that_raises_is_flagged(tmp_path: Path) -> None:
    """A step that raises after its gradients were measured is flagged as failed; the next one is as usual."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01, fused=True)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        failing = optimizer.register_step_pre_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            train(model, optimizer, [0])
        failing.remove()
        train(model, optimizer, [1])
        assert "grad_scale" not in optimizer.__dict__
    flags = open_run(agent.path).rows["flags"]
    assert [bool(each & Flag.FAILED) for each in flags] == [True, False]


def _fail(*_: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_a_subclass_that_calls_its_parents_step(tmp_path: Path, how: str) -> None:
    """An optimizer whose step wraps its parent's, and so runs the hooks twice, is one row a step, clipped once."""

    class Wrapping(AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    model = small_model()
    twin = copy.deepcopy(model)
    norms = train_by_hand(twin, make("adamw", how, twin), max_norm=MAX_NORM)
    chosen: dict[str, Any] = {how: True}
    optimizer = Wrapping(model.parameters(), lr=0.01, **chosen)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        train(model, optimizer)
    run = check_run(agent.path, norms, MAX_NORM)
    assert not (run.rows["flags"] & Flag.FAILED).any()
    assert_same(model, twin)
