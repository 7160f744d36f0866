"""Accelerate: attach after ``prepare``, to what it returns; the loop stays as it is.

    pip install accelerate
    python examples/accelerate_loop.py [--steps N]
    accelerate launch examples/accelerate_loop.py

Each batch is half of a step. The model learns the length of vectors.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradiometer

CLIP: Any = [{"nonfinite": {"action": "skip"}}, {"global_norm": {"max_norm": 1.0}}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)
    inputs = torch.randn(2 * options.steps * 32 * accelerator.num_processes, 16)
    targets = inputs.square().sum(1, keepdim=True).sqrt()
    model: Any = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    loader: Any = DataLoader(TensorDataset(inputs, targets), batch_size=32)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    agent = gradiometer.attach(model, optimizer, policy=CLIP)  # in place of accelerator.clip_grad_norm_

    for points, wanted in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.mse_loss(model(points), wanted)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            agent.log(loss=loss)

    agent.detach()
    if accelerator.is_main_process:
        run = gradiometer.open_run(agent.path)
        print(f"run {agent.run_id} in {agent.path}")
        print(
            f"loss {run.loss[0]:.2f} to {run.loss[-1]:.2f}; {int(run.clipped.sum())} of {len(run)} steps were clipped"
        )
        print(f"gradiometer show {agent.path}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
