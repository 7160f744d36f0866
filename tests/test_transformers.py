"""GradiometerCallback in the Hugging Face Trainer, and attach in Accelerate's loops: what docs/transformers.md says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import gradiometer
from gradiometer.integrations.transformers import GradiometerCallback
from tests._training import assert_same, attach, batch, check_run, hand_norms, small_model, train_by_hand

CLIP = [{"nonfinite": {}}, {"global_norm": {"max_norm": 0.5}}]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the libraries from the network, and give Accelerate's process-wide state back afterwards."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Tokens(Dataset[dict[str, Tensor]]):
    """64 sequences of 16 tokens, the same whenever asked."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def gpt() -> GPT2LMHeadModel:
    """Make a GPT-2 of two layers from its configuration alone."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    config.loss_type = "ForCausalLM"
    return GPT2LMHeadModel(config)


class Notes(TrainerCallback):
    """Notes every parameter's norm just before the optimizer steps, after the Trainer's own clipping."""

    def __init__(self) -> None:
        self.norms: list[Any] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.norms.append(hand_norms(kwargs["model"]))


def callback_in(tmp_path: Path, **options: Any) -> GradiometerCallback:
    return GradiometerCallback(dir=tmp_path / "runs", ring_bytes=2**21, **options)


def make_trainer(tmp_path: Path, *callbacks: TrainerCallback, **options: Any) -> Trainer:
    """Make a quiet Trainer of six steps on the CPU that logs every step."""
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"), "max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-2,
        "dataloader_pin_memory": False,
    }  # fmt: skip
    arguments = TrainingArguments(**(settings | options))
    return Trainer(model=gpt(), args=arguments, train_dataset=Tokens(), callbacks=list(callbacks))


def logged(trainer: Trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def run_of(callback: GradiometerCallback) -> gradiometer.Run:
    assert callback.path is not None
    return gradiometer.open_run(callback.path)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_the_record_is_what_the_trainer_logs(tmp_path: Path, options: dict[str, Any]) -> None:
    """Norms, losses and learning rates of the record are the Trainer's own, and each parameter's those by hand."""
    callback, notes = callback_in(tmp_path), Notes()
    trainer = make_trainer(tmp_path, callback, notes, max_grad_norm=0, **options)
    trainer.train()
    run = run_of(callback)
    np.testing.assert_allclose(run.parameter_norms, np.stack(notes.norms), rtol=1e-6)
    np.testing.assert_allclose(run.grad_norm_preclip, logged(trainer, "grad_norm"), rtol=1e-5)
    np.testing.assert_allclose(run.loss, logged(trainer, "loss"), rtol=1e-6)
    np.testing.assert_allclose(run.learning_rate, logged(trainer, "learning_rate"), rtol=1e-6)
    assert run.parameters[0] == "transformer.wte.weight"
    assert "lm_head.weight" not in run.parameters  # tied to wte, and counted once


def test_a_policy_takes_the_place_of_max_grad_norm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Under a policy that clips, the Trainer's default clipping is off, which is said, and put back."""
    callback, options = callback_in(tmp_path, policy=CLIP), {"optim": "sgd", "learning_rate": 1.0}
    trainer = make_trainer(tmp_path, callback, **options)
    twin = make_trainer(tmp_path, max_grad_norm=0.5, **options)
    with caplog.at_level(logging.WARNING, "gradiometer"):
        trainer.train()
    assert "max_grad_norm=1) is turned off" in caplog.text
    assert trainer.args.max_grad_norm == 1.0
    twin.train()
    assert isinstance(trainer.model, nn.Module)
    assert isinstance(twin.model, nn.Module)
    assert_same(trainer.model, twin.model)
    run, total = run_of(callback), np.array(logged(twin, "grad_norm"))
    np.testing.assert_allclose(run.grad_norm_preclip, total, rtol=1e-4)
    np.testing.assert_allclose(run.grad_norm_postclip, np.minimum(total, 0.5), rtol=1e-4)
    assert total.max() > 0.6


def test_updates_and_cosines(tmp_path: Path) -> None:
    """Which steps are sampled, and whether cosines are measured, is the user's choice here too."""
    callback = callback_in(tmp_path, updates_every=2, cosine=True, data_parallel=1)
    make_trainer(tmp_path, callback).train()
    samples = run_of(callback).samples
    assert samples is not None
    assert samples.steps.tolist() == [0, 2, 4]
    assert np.isfinite(samples.total_cosine[1:]).all()


def test_max_grad_norm_stays_without_a_policy_that_clips(tmp_path: Path) -> None:
    """The Trainer then clips as before, and the norms before and after its clipping are recorded."""
    callback, notes = callback_in(tmp_path, policy=[{"nonfinite": {}}]), Notes()
    trainer = make_trainer(tmp_path, callback, notes, max_grad_norm=0.1)
    trainer.train()
    run = run_of(callback)
    np.testing.assert_allclose(run.grad_norm_preclip, logged(trainer, "grad_norm"), rtol=1e-4)
    np.testing.assert_allclose(run.grad_norm_postclip, 0.1, rtol=1e-4)
    np.testing.assert_allclose(run.stat("grad_norm_postclip"), np.stack(notes.norms), rtol=1e-4, atol=1e-9)
    assert run.own_clipping["clip_grad_norm_"].all()


def test_the_parameter_that_was_infinite_first(tmp_path: Path) -> None:
    """The Trainer's own norm makes every gradient NaN; hooks on each backward pass still tell where it began."""
    runs = []
    for mode in ("every", "off"):
        callback = callback_in(tmp_path, backward=mode, policy=[{"nonfinite": {}}])
        trainer = make_trainer(tmp_path, callback, max_grad_norm=0, max_steps=1)
        assert isinstance(trainer.model, nn.Module)
        weight = trainer.model.get_parameter("transformer.h.0.mlp.c_fc.weight")
        weight.register_hook(lambda gradient: gradient + float("inf"))  # type: ignore[no-untyped-call]  # torch
        trainer.train()
        runs.append(run_of(callback))
    assert np.isnan(runs[0].parameter_norms[0]).all()
    assert runs[0].first_nonfinite == ["transformer.h.0.mlp.c_fc.weight"]
    assert runs[1].first_nonfinite != runs[0].first_nonfinite
    assert [run.skipped.tolist() for run in runs] == [[True], [True]]


class Poison(Trainer):
    """Multiplies the loss of chosen steps by NaN."""

    bad: tuple[int, ...] = ()

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step in self.bad else loss


def test_a_resumed_training_goes_on(tmp_path: Path) -> None:
    """Two bad steps before a checkpoint and one after it are three in a row to a policy that allows two."""
    policy = [{"nonfinite": {"max_consecutive": 3}}]
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "max_grad_norm": 0}
    first = _poisoned(tmp_path, callback_in(tmp_path, policy=policy), bad=(2, 3), **options)
    first.train()
    callback = callback_in(tmp_path, policy=policy)
    second = _poisoned(tmp_path, callback, bad=(4,), **options)
    with pytest.raises(gradiometer.NonFiniteGradientError, match="3 step"):
        second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert run_of(callback).steps.tolist() == [4]
    assert run_of(callback).skipped.tolist() == [True]


def _poisoned(tmp_path: Path, callback: TrainerCallback, *, bad: tuple[int, ...], **options: Any) -> Poison:
    plain = make_trainer(tmp_path, **options)
    trainer = Poison(model=gpt(), args=plain.args, train_dataset=Tokens(), callbacks=[callback])
    trainer.bad = bad
    return trainer


def test_callbacks_restored_by_the_trainer(tmp_path: Path) -> None:
    """With restore_callback_states_from_checkpoint the Trainer makes the callback anew, with its policy and step."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, callback_in(tmp_path, policy=CLIP, labels={"team": "a"}), **options).train()
    trainer = make_trainer(tmp_path, callback_in(tmp_path), restore_callback_states_from_checkpoint=True, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    (callback,) = [each for each in trainer.callback_handler.callbacks if isinstance(each, GradiometerCallback)]
    run = run_of(callback)
    assert run.steps.tolist() == [4, 5]
    assert run.manifest.policies == ("nonfinite", "global_norm")
    assert run.manifest.labels == {"team": "a"}


def test_resuming_a_checkpoint_made_without_us(tmp_path: Path) -> None:
    """Steps are numbered as the Trainer numbers them, and the next checkpoint can be written."""
    make_trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    callback = callback_in(tmp_path)
    trainer = make_trainer(tmp_path, callback, save_strategy="steps", save_steps=4, max_steps=8)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert run_of(callback).steps.tolist() == [4, 5, 6, 7]
    assert (tmp_path / "out" / "checkpoint-8").is_dir()


def test_training_again_is_a_new_run(tmp_path: Path) -> None:
    """After a training that raised, another begins at step 0 with nothing left of the first."""
    callback = callback_in(tmp_path, policy=CLIP)
    trainer = _poisoned(tmp_path, callback, bad=(3,))
    with pytest.raises(ZeroDivisionError):
        _raise_at(trainer, 2)
    assert run_of(callback).steps.tolist() == [0, 1]
    trainer.train()
    assert run_of(callback).steps.tolist() == list(range(6))
    assert run_of(callback).skipped.tolist() == [False, False, False, True, False, False]
    assert trainer.args.max_grad_norm == 1.0
    assert callback.agent is None


def _raise_at(trainer: Trainer, step: int) -> None:
    class Raise(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise ZeroDivisionError

    trainer.add_callback(Raise)
    try:
        trainer.train()
    finally:
        trainer.remove_callback(Raise)


def test_accelerate_with_accumulation(tmp_path: Path) -> None:
    """In Accelerate's loop each real step is one row, with the norms of the accumulated gradient."""
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader: DataLoader[Tensor] = DataLoader([batch(step) for step in range(8)], batch_size=None)  # type: ignore[arg-type]  # a list
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    noted = []
    with attach(tmp_path, model, optimizer, policy=[{"global_norm": {"max_norm": 3.0}}]) as agent:
        for inputs in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(inputs).square().sum())
                if accelerator.sync_gradients:
                    noted.append(hand_norms(model))
                optimizer.step()
                optimizer.zero_grad()
    check_run(agent.path, np.stack(noted), max_norm=3.0)
    assert len(noted) == 4
    assert agent.errors == 0


def test_accelerates_optimizer_is_looked_through(tmp_path: Path) -> None:
    """The wrapper and what it wraps are one optimizer: attaching to both is attaching twice."""
    model, twin = small_model(), small_model()
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = Accelerator(cpu=True).prepare(inner)
    with attach(tmp_path, model, optimizer) as agent:
        with pytest.raises(RuntimeError, match="already has a gradiometer agent"):
            attach(tmp_path, model, inner)
        for step in range(3):
            optimizer.zero_grad()
            model(batch(step)).square().sum().backward()
            optimizer.step()
    check_run(agent.path, train_by_hand(twin, torch.optim.SGD(twin.parameters(), lr=0.01), range(3)))


def test_an_optimizer_that_owns_another_is_left_as_it_is(tmp_path: Path) -> None:
    """Only wrappers without hooks of their own are looked through: one that steps by itself is attached to."""

    class Lookahead(torch.optim.SGD):
        optimizer: torch.optim.Optimizer

    model = small_model()
    outer = Lookahead(model.parameters(), lr=0.01)
    outer.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, outer) as agent:
        model(batch(0)).square().sum().backward()
        outer.step()
        assert agent.step == 1
