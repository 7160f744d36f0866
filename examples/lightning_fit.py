"""Lightning: one callback measures every optimizer step of ``trainer.fit`` and clips by policy.

    pip install lightning
    python examples/lightning_fit.py [--steps N] [--precision bf16-mixed]

The optimizer is fused. On a GPU, ``--precision 16-mixed`` is the combination that ``gradient_clip_val`` refuses.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gradiometer
from gradiometer.integrations.lightning import GradiometerCallback

CLIP: Any = [{"nonfinite": {"action": "skip"}}, {"global_norm": {"max_norm": 1.0}}]


class Spirals(pl.LightningModule):
    """Tells the two arms of a spiral apart."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        points, arms = batch
        return nn.functional.binary_cross_entropy_with_logits(self.net(points).squeeze(1), arms)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)


def spirals(points: int = 2048) -> TensorDataset:
    """Return points [N, 2] on two arms, and which arm each is on [N]."""
    arms = torch.arange(points) % 2
    angles = 8 * torch.rand(points).sqrt()
    turned = angles + torch.pi * arms
    place = torch.stack([turned.cos(), turned.sin()], 1) * angles[:, None] / 4
    return TensorDataset(place + 0.02 * torch.randn(points, 2), arms.float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--precision", default=None)
    options = parser.parse_args()

    pl.seed_everything(0)
    callback = GradiometerCallback(policy=CLIP)  # the one line
    trainer = pl.Trainer(
        max_steps=options.steps,
        precision=options.precision,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Spirals(), DataLoader(spirals(), batch_size=64, shuffle=True))

    assert callback.path is not None
    run = gradiometer.open_run(callback.path)
    print(f"run {run.manifest.run_id} in {callback.path}")
    clipped = int(run.clipped.any(axis=1).sum())
    print(f"loss {run.loss[0]:.3f} to {run.loss[-1]:.3f}; {clipped} of {len(run)} steps were clipped")
    print(f"gradiometer show {callback.path}")


if __name__ == "__main__":
    main()
