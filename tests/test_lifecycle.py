"""Attaching, detaching, checkpoints, logging: the life of an agent from outside."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW, Optimizer

import gradiometer
from gradiometer import PolicyError, open_run
from tests._training import assert_same, attach, backward, loss_of, small_model, train

CLIP: list[Any] = [{"nonfinite": {"action": "skip"}}, {"global_norm": {"max_norm": 1.0}}]


def sgd(model: nn.Module, **settings: Any) -> Optimizer:
    """Make an optimizer."""
    return SGD(model.parameters(), lr=0.01, **settings)


def traces(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """Show everything an agent could leave behind."""
    hooks = {name: dict(value) for name, value in vars(optimizer).items() if name.endswith("_hooks")}
    settings = {name: value for name, value in vars(optimizer).items() if name not in ("state", "param_groups")}
    kept = [sorted(vars(module)) for module in model.modules()]
    tensors = [
        (p._backward_hooks, p._post_accumulate_grad_hooks, sorted(vars(p)), p.requires_grad) for p in model.parameters()
    ]
    modules = [(dict(m._forward_hooks), dict(m._backward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    return [hooks, sorted(settings), kept, tensors, modules, GradScaler.step, type(optimizer).step]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", [None, CLIP, [{"value": {"max_abs": 0.1}}]])
@pytest.mark.parametrize("backward_mode", ["auto", "every", "off"])
def test_detaching_restores_everything(tmp_path: Path, fused: bool, policy: Any, backward_mode: str) -> None:
    """After detaching, model, optimizer and GradScaler are as if no agent had ever been there."""
    model = small_model()
    optimizer = sgd(model, fused=fused)
    before = traces(model, optimizer)
    with attach(tmp_path, model, optimizer, policy=policy, backward=backward_mode):
        train(model, optimizer, range(5))
        assert traces(model, optimizer) != before
    assert traces(model, optimizer) == before


def test_grad_scaler_is_wrapped_only_while_needed(tmp_path: Path) -> None:
    """``GradScaler.step`` is wrapped while any agent is attached, and its own again after the last has gone."""
    models = [small_model(), small_model()]
    first, second = (attach(tmp_path, model, sgd(model)) for model in models)
    first.detach()
    assert hasattr(GradScaler.step, "__wrapped__")
    second.detach()
    assert not hasattr(GradScaler.step, "__wrapped__")


def test_hooks_of_others_stay(tmp_path: Path) -> None:
    """Hooks that somebody else registered are there after detaching, and are called."""
    model = small_model()
    optimizer, seen = sgd(model), []
    optimizer.register_step_pre_hook(lambda *_: seen.append("step"))
    model[0].weight.register_hook(lambda _: seen.append("backward"))  # type: ignore[operator]  # a tensor
    with attach(tmp_path, model, optimizer, backward="every"):
        train(model, optimizer, [0])
    train(model, optimizer, [1])
    assert seen == ["backward", "step"] * 2


def fail(*_: Any) -> None:
    """Be a hook that raises."""
    raise ZeroDivisionError


def test_detaching_twice(tmp_path: Path) -> None:
    """Detaching is idempotent, and nothing is recorded afterwards."""
    model = small_model()
    optimizer = sgd(model)
    agent = attach(tmp_path, model, optimizer)
    train(model, optimizer, [0])
    agent.detach()
    agent.detach()
    train(model, optimizer, [1])
    agent.log(loss=1.0)
    assert len(open_run(agent.path)) == 1


def test_detaching_in_an_exception(tmp_path: Path) -> None:
    """As a context manager the agent detaches however the block is left."""
    model = small_model()
    optimizer = sgd(model)
    optimizer.register_step_post_hook(fail)
    before = traces(model, optimizer)
    with pytest.raises(ZeroDivisionError), attach(tmp_path, model, optimizer):
        train(model, optimizer, [0])
    assert traces(model, optimizer) == before


def test_attaching_twice_is_refused(tmp_path: Path) -> None:
    """A second agent on an optimizer is an error that says what to do, and the first goes on."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        with pytest.raises(RuntimeError, match=r"SGD already has a gradiometer agent: detach\(\)"):
            attach(tmp_path, model, optimizer)
        train(model, optimizer, [0])
    assert len(open_run(agent.path)) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_attaching_again_after_detaching(tmp_path: Path) -> None:
    """After detaching, a new agent is a run of its own."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as first:
        train(model, optimizer, [0])
    with attach(tmp_path, model, optimizer) as second:
        train(model, optimizer, range(2))
    assert [len(open_run(first.path)), len(open_run(second.path))] == [1, 2]
    assert first.run_id != second.run_id


BAD: dict[str, tuple[Callable[[nn.Module, Optimizer], tuple[Any, Any, Any]], type[Exception], str]] = {
    "no module": (lambda m, o: (list(m.parameters()), o, {}), TypeError, r"model is a list, expected.*Module"),
    "no optimizer": (lambda m, o: (m, [], {}), TypeError, r"optimizer is \[\], expected"),
    "not an optimizer": (lambda m, o: (m, "adam", {}), TypeError, "optimizer is 'adam', expected"),
    "one of them": (lambda m, o: (m, [o, None], {}), TypeError, r"(?s)optimizer is .*, None\], expected"),
    "backward": (lambda m, o: (m, o, {"backward": "never"}), ValueError, "backward is 'never', expected one of 'auto'"),
    "labels": (lambda m, o: (m, o, {"labels": {"a-b": "c"}}), ValueError, "label name 'a-b': expected letters"),
    "label": (lambda m, o: (m, o, {"labels": {"team": 3}}), ValueError, "label team is 3, expected a string"),
    "many labels": (
        lambda m, o: (m, o, {"labels": {f"l{place}": "" for place in range(17)}}), ValueError, "17 entries.*most 16",
    ),
    "ring_bytes": (lambda m, o: (m, o, {"ring_bytes": 1000}), ValueError, r"ring_bytes is 1000;.* pass ring_bytes=\d"),
    "run_id": (lambda m, o: (m, o, {"run_id": "../up"}), ValueError, r"run_id '\.\./up': expected up to 128 letters"),
    "policy": (lambda m, o: (m, o, {"policy": [{"clip": {}}]}), PolicyError, "policies: nonfinite, skip, global_norm"),
    "pattern": (
        lambda m, o: (m, o, {"policy": [{"global_norm": {"max_norm": 1, "match": "x.*"}}]}), PolicyError, "'x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_failing_attach_leaves_nothing_behind(tmp_path: Path, what: str) -> None:
    """A bad argument is an error that names it; no hook and no run is left, and attaching works afterwards."""
    make, error, message = BAD[what]
    model = small_model()
    optimizer = sgd(model)
    before = traces(model, optimizer)
    first, second, options = make(model, optimizer)
    with pytest.raises(error, match=message):
        attach(tmp_path, first, second, **options)
    assert traces(model, optimizer) == before
    assert list(tmp_path.iterdir()) == []
    with attach(tmp_path, model, optimizer) as agent:
        train(model, optimizer, [0])
    assert len(open_run(agent.path)) == 1


def test_a_model_without_parameters(tmp_path: Path) -> None:
    """There must be something to measure."""

    class Nothing(Optimizer):
        def __init__(self) -> None:
            super().__init__([torch.zeros(1)], {})
            self.param_groups = []

    with pytest.raises(ValueError, match="nothing to measure"):
        attach(tmp_path, nn.Identity(), Nothing())


def test_a_full_disk_fails_at_attach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the ring cannot be made, attaching raises and leaves no hook."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    model = small_model()
    optimizer = sgd(model)
    before = traces(model, optimizer)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"cannot preallocate \d+ bytes"):
        attach(tmp_path, model, optimizer)
    assert traces(model, optimizer) == before


def test_the_run_id_is_the_callers(tmp_path: Path) -> None:
    """A run id names the directory, the manifest and the agent; labels go along."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, run_id="night-7", labels={"team": "vision"}) as agent:
        assert agent.run_id == "night-7"
    run = open_run(tmp_path / "night-7")
    assert run.manifest.run_id == "night-7"
    assert run.manifest.labels == {"team": "vision"}
    assert run.manifest.optimizers == ("SGD",)


def test_a_run_id_in_use_is_refused(tmp_path: Path) -> None:
    """Two live agents cannot write the same run, and the refused one leaves no hook."""
    models = [small_model(), small_model()]
    optimizers = [sgd(model) for model in models]
    before = traces(models[1], optimizers[1])
    with attach(tmp_path, models[0], optimizers[0], run_id="same"):
        with pytest.raises(gradiometer.RunInUseError, match="choose another run_id"):
            attach(tmp_path, models[1], optimizers[1], run_id="same")
        assert [traces(models[1], optimizers[1])[place] for place in (0, 1, 2, 3)] == before[:4]


def test_the_environment_names_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``GRADIOMETER_DIR`` says where runs are kept, unless the argument does."""
    monkeypatch.setenv("GRADIOMETER_DIR", str(tmp_path / "environment"))
    model = small_model()
    optimizer = sgd(model)
    with gradiometer.attach(model, optimizer, ring_bytes=2**20) as agent:
        assert Path(agent.path).parent.parent == tmp_path / "environment"
    with attach(tmp_path / "argument", model, optimizer) as agent:
        assert Path(agent.path).parent.parent == tmp_path / "argument"


def test_a_checkpoint_goes_round(tmp_path: Path) -> None:
    """Step number and policy state go through ``torch.save`` and a new agent goes on from there."""
    model = small_model()
    optimizer = sgd(model)
    policy = [{"nonfinite": {"action": "skip", "max_consecutive": 4}}]
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        train(model, optimizer, range(3))
        for _ in range(2):
            backward(loss_of(model, 0) * float("nan"))
            optimizer.step()
        torch.save(agent.state_dict(), tmp_path / "agent.pt")
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        agent.load_state_dict(torch.load(tmp_path / "agent.pt"))
        assert agent.step == 5
        optimizer.step()
        with pytest.raises(gradiometer.NonFiniteGradientError, match=r"4 step\(s\) in a row, up to step 6"):
            optimizer.step()
    assert open_run(agent.path).steps.tolist() == [5, 6]


def test_a_state_dict_is_a_copy(tmp_path: Path) -> None:
    """A state that was taken does not change with later steps."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        backward(loss_of(model, 0) * float("nan"))
        optimizer.step()
        state = agent.state_dict()
        kept = copy.deepcopy(state)
        optimizer.step()
    assert state == kept


@pytest.mark.parametrize(
    "state",
    [
        {"version": 3, "step": 7, "policy": {}},
        {"version": 2, "step": 7, "states": {}},
        {"version": 2, "step": 7, "policy": {}},
        {"version": 1, "step": -7, "policy": {}},
        {"version": 1, "step": 7, "policy": {"nonfinite": {"consecutive": 1.0}}},
        [],
    ],
)
def test_a_foreign_state_is_refused(tmp_path: Path, state: Any) -> None:
    """What is not the state of an agent, or is of a later version, is an error, and changes nothing."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        with pytest.raises(ValueError, match="agent state"):
            agent.load_state_dict(state)
        assert agent.step == 0


@pytest.mark.parametrize(
    ("mode", "after", "every"),
    [(m, a, e) for m in ("auto", "every", "off") for a in (False, True) for e in (1, 10) if m != "off" or a or e == 1],
)
def test_a_loss_goes_with_its_step(tmp_path: Path, mode: str, after: bool, every: int) -> None:
    """Logged before the step or after it, at every step or every tenth, a loss is in the row of its step."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, backward=mode) as agent:
        for step in range(25):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            backward(loss)
            if not after and step % every == 0:
                agent.log(loss=float(step))
            optimizer.step()
            if after and step % every == 0:
                agent.log(loss=float(step))
    losses = open_run(agent.path).loss
    logged = np.flatnonzero(~np.isnan(losses))
    assert losses[logged].tolist() == logged.tolist() == list(range(0, 25, every))


def test_a_loss_goes_with_its_step_though_the_last_layer_is_unused(tmp_path: Path) -> None:
    """Which step a loss belongs to does not depend on the last parameter having a gradient."""
    model = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        for step in range(15):
            optimizer.zero_grad()
            backward(model[0](torch.ones(1, 4)).sum())
            if step % 5 == 0:
                agent.log(loss=float(step))
            optimizer.step()
    losses = open_run(agent.path).loss
    assert np.flatnonzero(~np.isnan(losses)).tolist() == [0, 5, 10]


@pytest.mark.parametrize(
    "value", [2, 2.0, np.float32(2), np.int64(2), torch.tensor(2), torch.tensor([[2.0]], requires_grad=True)]
)
def test_numbers_of_every_kind_are_logged(tmp_path: Path, value: Any) -> None:
    """Numbers of Python, NumPy and torch are logged, beside the loss under their names."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        train(model, optimizer, [0])
        agent.log(loss=value, accuracy=value)
    run = open_run(agent.path)
    assert run.loss.tolist() == [2.0]
    assert {name: column.tolist() for name, column in run.scalars.items()} == {"accuracy": [2.0]}


@pytest.mark.parametrize("value", ["2", None, [2.0], torch.ones(2), np.ones(2), torch.tensor(2j), object()])
def test_what_is_no_number_is_refused_by_name(tmp_path: Path, value: Any) -> None:
    """Anything else is a TypeError that names the scalar, and nothing of the call is recorded."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        train(model, optimizer, [0])
        with pytest.raises(TypeError, match="accuracy"):
            agent.log(loss=1.0, accuracy=value)
    assert np.isnan(open_run(agent.path).loss).all()


def test_a_run_holds_sixteen_scalars(tmp_path: Path) -> None:
    """The seventeenth scalar is refused with an event that names it, once, and costs nothing else."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        for step in range(3):
            train(model, optimizer, [step])
            agent.log(loss=1.0, **{f"s{place}": place for place in range(20)})
        assert agent.errors == 0
    run = open_run(agent.path)
    assert {name: column.tolist() for name, column in run.scalars.items()} == {f"s{n}": [n] * 3 for n in range(16)}
    (event,) = [event for event in run.events if event["kind"] == "scalar_refused"]
    assert event["name"] == "s16"


def run_script(script: str, path: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a Python of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


TRAIN = """
import os, sys, torch, gradiometer
torch.set_num_threads(1)
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
agent = gradiometer.attach(model, optimizer, dir=sys.argv[1], run_id="script", ring_bytes=2**20)
def step():
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
for _ in range(3):
    step()
"""


def test_a_script_that_just_ends(tmp_path: Path) -> None:
    """A script that never detaches leaves a finished run."""
    done = run_script(TRAIN, tmp_path)
    assert done.returncode == 0, done.stderr
    run = open_run(tmp_path / "script")
    assert len(run) == 3
    assert run.status["state"] == 2


def test_a_forked_child_does_not_finish_its_parents_run(tmp_path: Path) -> None:
    """A child made by fork that exits leaves the run of its parent running."""
    script = TRAIN + textwrap.dedent("""
        child = os.fork()
        if child == 0:
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert gradiometer.open_run(agent.path).status["state"] == 1
        step()
    """)
    done = run_script(script, tmp_path)
    assert done.returncode == 0, done.stderr
    run = open_run(tmp_path / "script")
    assert len(run) == 4
    assert run.status["state"] == 2


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    """Importing gradiometer and opening a run loads neither torch nor pandas."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        train(model, optimizer, range(2))
    done = run_script(
        "import sys, gradiometer\n"
        "assert len(gradiometer.open_run(sys.argv[1])) == 2\n"
        "assert not {'torch', 'pandas'}.intersection(sys.modules), sorted(sys.modules)\n",
        Path(agent.path),
    )
    assert done.returncode == 0, done.stderr


def test_a_deep_copy_of_the_model_is_free(tmp_path: Path) -> None:
    """A copy of a model under observation, as an average of weights needs it, trains unobserved."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, backward="every") as agent:
        other = copy.deepcopy(model)
        train(other, sgd(other), range(3))
        assert len(open_run(agent.path)) == 0
        copied: Tensor = other[0].weight  # type: ignore[assignment]  # a tensor
        assert copied._backward_hooks is None
    assert isinstance(AdamW(other.parameters()), Optimizer)


@pytest.mark.parametrize("mode", ["auto", "every", "off"])
def test_a_model_is_sent_to_another_process_without_a_warning(tmp_path: Path, mode: str) -> None:
    """What torch.multiprocessing sends of a model in training holds nothing of the agent's, and torch says nothing."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, backward=mode):
        train(model, optimizer, range(1))
        sent = ForkingPickler.loads(ForkingPickler.dumps(model))  # warnings are errors here
    assert_same(sent, model, exactly=True)
    assert all(not parameter._backward_hooks for parameter in sent.parameters())
