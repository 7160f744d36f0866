"""A small GPT trained in the manner of nanoGPT: micro-steps, autocast, GradScaler, warm-up and cosine by hand.

    python examples/nanogpt_style.py [--steps N] [--dtype float16] [--device cuda] [--policy examples/policy.yaml]

It learns sums ("17+25=42") made on the fly. In such a loop clipping is two lines, ``scaler.unscale_(optimizer)`` and
``clip_grad_norm_``; here one line before the loop takes their place.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # torch's own way of writing it

import gradiometer

CLIP: Any = [{"nonfinite": {"action": "skip"}}, {"global_norm": {"max_norm": 1.0}}]
LETTERS = "0123456789+=\n"
BLOCK, WIDTH, HEADS, DEPTH = 32, 64, 4, 4
BATCH, MICRO_STEPS = 8, 4
LEARNING_RATE, WARMUP = 3e-3, 10


class Block(nn.Module):
    """Attention and MLP, each after a layer norm and beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn(self.ln_1(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT(nn.Module):
    """A decoder whose output layer is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(len(LETTERS), WIDTH), nn.Embedding(BLOCK, WIDTH)
        self.h = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.ln_f, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(LETTERS), bias=False)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy of ``targets`` after ``tokens``, both int64 [B, BLOCK]."""
        x = self.wte(tokens) + self.wpe(torch.arange(BLOCK, device=tokens.device))
        logits = self.lm_head(self.ln_f(self.h(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def get_batch(device: str) -> tuple[Tensor, Tensor]:
    """Return windows into a text of random sums, and the same one letter further on."""
    sums = torch.randint(100, (2 * BATCH, 2)).tolist()
    text = "".join(f"{a}+{b}={a + b}\n" for a, b in sums)
    tokens = torch.tensor([LETTERS.index(letter) for letter in text])
    starts = torch.randint(len(tokens) - BLOCK - 1, (BATCH, 1)) + torch.arange(BLOCK)
    return tokens[starts].to(device), tokens[starts + 1].to(device)


def learning_rate(step: int, steps: int) -> float:
    """Return the rate of a step: a linear warm-up, then half a cosine down to a tenth."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return LEARNING_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--policy", default=CLIP, help="policy file; skips NaN and clips at a norm of 1 unless given")
    options = parser.parse_args()

    torch.manual_seed(1337)
    dtype, kind = getattr(torch, options.dtype), torch.device(options.device).type
    model = GPT().to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(kind, enabled=options.dtype == "float16")

    agent = gradiometer.attach(model, optimizer, policy=options.policy)  # in place of unscale_ and clip_grad_norm_

    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps)
        for _ in range(MICRO_STEPS):
            with torch.autocast(kind, dtype=dtype, enabled=options.dtype != "float32"):
                loss = model(*get_batch(options.device)) / MICRO_STEPS
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        agent.log(loss=loss * MICRO_STEPS)

    agent.detach()
    run = gradiometer.open_run(agent.path)
    print(f"run {agent.run_id} in {agent.path}")
    clipped = int(run.clipped.any(axis=1).sum())
    print(f"loss {run.loss[0]:.2f} to {run.loss[-1]:.2f}; {clipped} of {len(run)} steps were clipped")
    print(f"gradiometer show {agent.path}")


if __name__ == "__main__":
    main()
