"""The clipping that frameworks do for their users, seen through their real packages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradiometer import Run, open_run
from tests._training import attach, small_model

pytestmark = pytest.mark.slow
"""All of them together take long: the wheel's tests leave them out."""

STEPS, MAX_NORM = 4, 0.5


def check(run: Run, function: str, limit: float) -> None:
    """Assert that every step of the run was clipped by the framework."""
    assert len(run) == STEPS
    assert run.own_clipping[function].all()
    said = [event["message"] for event in run.events if event["kind"] == "own_clipping"]
    assert said == [f"the loop clips by itself: {function} at {limit:g}"]
    assert [event for event in run.events if event["kind"] == "clip_misuse"] == []


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.filterwarnings("ignore")  # Lightning's own, on its loaders and on what others deprecate
def test_lightning(tmp_path: Path, algorithm: str) -> None:
    """``Trainer(gradient_clip_val=…)`` clips within the optimizer's closure, and its norms before it are recorded."""
    lightning = pytest.importorskip("lightning")
    wanted = []

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]  # the package may be missing
        def __init__(self) -> None:
            super().__init__()
            self.net = small_model()

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            del index
            loss: Tensor = self.net(batch[0]).square().sum()
            return loss

        def on_after_backward(self) -> None:
            wanted.append([p.grad.double().norm().item() for p in self.parameters() if p.grad is not None])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
            agents.append(attach(tmp_path, self.net, optimizer))
            return optimizer

    agents: list[Any] = []
    data = torch.utils.data.TensorDataset(torch.randn(STEPS * 8, 4))
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=MAX_NORM if algorithm == "norm" else 0.01,
        gradient_clip_algorithm=algorithm,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=8))
    agents[0].detach()
    run = open_run(agents[0].path)
    np.testing.assert_allclose(run.parameter_norms, wanted, rtol=1e-5)
    check(run, f"clip_grad_{algorithm}_", MAX_NORM if algorithm == "norm" else 0.01)


def test_accelerate(tmp_path: Path) -> None:
    """``accelerator.clip_grad_norm_`` is torch's own, under accumulation once a step, and returns the norm before."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    totals = []
    with attach(tmp_path, model, optimizer) as agent:
        for number in range(2 * STEPS):
            torch.manual_seed(number)
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(torch.randn(8, 4)).square().sum())
                if accelerator.sync_gradients:
                    totals.append(accelerator.clip_grad_norm_(prepared.parameters(), MAX_NORM).item())
                wrapped.step()
                wrapped.zero_grad()
    run = open_run(agent.path)
    np.testing.assert_allclose(run.grad_norm_preclip, totals, rtol=1e-6)
    np.testing.assert_allclose(run.grad_norm_postclip, MAX_NORM, rtol=1e-5)
    check(run, "clip_grad_norm_", MAX_NORM)


@pytest.mark.filterwarnings("ignore")  # the Trainer's own
def test_transformers(tmp_path: Path) -> None:
    """``TrainingArguments(max_grad_norm=…)`` is seen, and its own log of ``grad_norm`` is the norm before it."""
    transformers = pytest.importorskip("transformers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_model()

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            del labels
            return {"loss": self.net(inputs).square().sum()}

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    data = [{"inputs": torch.randn(4, generator=generator), "labels": torch.zeros(1)} for _ in range(STEPS * 8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=8,
        max_steps=STEPS,
        max_grad_norm=MAX_NORM,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None))
    with attach(tmp_path, model, optimizer) as agent:
        trainer.train()
    run = open_run(agent.path)
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    np.testing.assert_allclose(run.grad_norm_preclip, logged, rtol=1e-6)
    check(run, "clip_grad_norm_", MAX_NORM)
