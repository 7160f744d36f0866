"""Hugging Face Trainer: one callback measures every optimizer step of ``trainer.train`` and clips by policy.

    pip install transformers accelerate
    python examples/transformers_trainer.py [--steps N]       (or torchrun, for several processes)

The model is a GPT-2 of two layers made from its configuration, and learns to count: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import gradiometer
from gradiometer.integrations.transformers import GradiometerCallback

CLIP: Any = [{"nonfinite": {"action": "skip"}}, {"global_norm": {"max_norm": 1.0}}]


class Counting(Dataset[dict[str, Tensor]]):
    """Sequences of 32 numbers below 64, each counting up by a stride of its own."""

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (index % 64 + (1 + index // 64) * torch.arange(32)) % 64
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    callback = GradiometerCallback(policy=CLIP)  # the one line
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            logging_steps=1,
            max_grad_norm=0,  # the policy clips
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=Counting(), callbacks=[callback])
        trainer.train()

    if trainer.is_world_process_zero():
        assert callback.path is not None
        run = gradiometer.open_run(callback.path)
        clipped = int(run.clipped.any(axis=1).sum())
        print(f"run {run.manifest.run_id} in {callback.path}")
        print(f"loss {run.loss[0]:.2f} to {run.loss[-1]:.2f}; {clipped} of {len(run)} steps were clipped")
        print(f"gradiometer show {callback.path}")


if __name__ == "__main__":
    main()
