"""The callbacks of Lightning and the Hugging Face Trainer do what a job is asked, in the way of each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from gradiometer import Agent, LoopRequest, open_run
from gradiometer.integrations.lightning import GradiometerCallback as LightningCallback
from gradiometer.integrations.transformers import GradiometerCallback as TrainerAgent
from gradiometer.live.control import Answer, await_answer
from gradiometer.live.requests import Kind, request_loop
from tests._training import batch, small_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning's use of torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the libraries from the network, and give Accelerate's process-wide state back afterwards."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


class Asks:
    """Asks a run for something after its third step, and for a stop once that is done."""

    def __init__(self) -> None:
        self.asked: dict[Kind, str] = {}
        self.path = Path()

    def look(self, agent: Agent | None) -> None:
        if agent is None:
            return
        self.path = agent.path
        if not self.asked and agent.step == 3:
            self.asked["checkpoint"] = request_loop(agent.path, "checkpoint", by="me")
        kinds = [event["kind"] for event in open_run(agent.path).events]
        if "stop" not in self.asked and {"request_done", "request_failed"} & {*kinds}:
            self.asked["stop"] = request_loop(agent.path, "stop")

    def answer(self, kind: Kind) -> Answer:
        return await_answer(self.path, self.asked[kind], 1, of_policy=False)


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = small_model()

    def training_step(self, inputs: Tensor, index: int) -> Tensor:
        loss: Tensor = self.net(inputs).square().sum()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class LightningAsks(pl.Callback):
    def __init__(self, callback: LightningCallback) -> None:
        self.callback, self.asks = callback, Asks()

    def on_train_batch_end(self, *_: Any) -> None:
        self.asks.look(self.callback.agent)


def fit(tmp_path: Path, callback: LightningCallback, accumulate: int = 1) -> tuple[pl.Trainer, Asks]:
    asks = LightningAsks(callback)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=20_000, max_epochs=-1, default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback, asks], accumulate_grad_batches=accumulate,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader([batch(step) for step in range(64)], batch_size=None))  # type: ignore[arg-type]  # a list is a dataset
    return trainer, asks.asks


@pytest.mark.parametrize("accumulate", [1, 2])
def test_lightning_saves_and_stops(tmp_path: Path, accumulate: int) -> None:
    """A checkpoint that can be loaded is saved after the step that was agreed on, and fit returns when asked."""
    callback = LightningCallback(dir=tmp_path / "runs", ring_bytes=2**20, run_id="run")
    trainer, asks = fit(tmp_path, callback, accumulate)
    saved = asks.answer("checkpoint")
    assert saved.applied
    assert Path(saved.note).parent == tmp_path
    state = torch.load(saved.note, weights_only=False)
    assert state["global_step"] == (saved.step or 0) + 1
    stopped = asks.answer("stop")
    assert stopped.applied
    assert trainer.global_step == len(open_run(asks.path)) == (stopped.step or 0) + 1 < 20_000


def test_a_function_takes_the_place_of_lightnings(tmp_path: Path) -> None:
    """What on_request gives is called, and nothing is saved beside it; its failure is told."""
    seen: list[LoopRequest] = []

    def save(request: LoopRequest) -> None:
        seen.append(request)
        raise OSError("no space")

    callback = LightningCallback(dir=tmp_path / "runs", ring_bytes=2**20, run_id="run", on_request={"checkpoint": save})
    _, asks = fit(tmp_path, callback)
    assert [request.by for request in seen] == ["me"]
    assert asks.answer("checkpoint").reasons == ("OSError: no space",)
    assert not list(tmp_path.glob("*.ckpt"))


class Tokens(Dataset[dict[str, Tensor]]):
    """Sequences of 16 tokens."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


class TrainerAsks(TrainerCallback):
    def __init__(self, callback: TrainerAgent) -> None:
        self.callback, self.asks = callback, Asks()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.asks.look(self.callback.agent)


def test_the_trainer_saves_and_stops(tmp_path: Path) -> None:
    """The Trainer saves a checkpoint of its own, though its strategy is to save none, and trains no further."""
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    config.loss_type = "ForCausalLM"
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=20_000, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", learning_rate=1e-4, dataloader_pin_memory=False, logging_steps=10_000,
    )  # fmt: skip
    callback = TrainerAgent(dir=tmp_path / "runs", ring_bytes=2**21, run_id="run")
    asks = TrainerAsks(callback)
    trainer = Trainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=Tokens(), callbacks=[callback, asks])
    trainer.train()
    saved, stopped = asks.asks.answer("checkpoint"), asks.asks.answer("stop")
    assert saved.applied
    assert saved.note == str(tmp_path / "out" / f"checkpoint-{(saved.step or 0) + 1}")
    assert (Path(saved.note) / "trainer_state.json").exists()
    assert stopped.applied
    assert trainer.state.global_step == (stopped.step or 0) + 1 < 20_000
