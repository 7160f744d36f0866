"""A small Llama-like model trained in the manner of torchtitan: FSDP2 when there are several processes.

    python examples/torchtitan_style.py [--steps N]
    torchrun --nproc-per-node 2 examples/torchtitan_style.py [--steps N]

Every block and then the model go through ``fully_shard``, in bfloat16 with reduction in float32. Where torchtitan calls
its own clipping for sharded gradients, one line before the loop takes its place, the same for one process and many.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F  # noqa: N812  # torch's own way of writing it

import gradiometer

CLIP: Any = [{"nonfinite": {"action": "skip"}}, {"global_norm": {"max_norm": 1.0}}]
VOCABULARY, WIDTH, HEADS, DEPTH, LENGTH, BATCH = 64, 64, 4, 3, 32, 8


def rotate(x: Tensor) -> Tensor:
    """Turn pairs of features by their position's angle; x is [B, H, T, D]."""
    half = x.shape[-1] // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies
    cos, sin, first, second = angles.cos(), angles.sin(), x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, first * sin + second * cos], -1).type_as(x)


class Block(nn.Module):
    """Attention with rotary positions and a gated feed-forward, each after an RMS norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.wqkv, self.wo = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.w1, self.w3 = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.w2 = nn.Linear(3 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.wqkv(self.attention_norm(x)).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.wo(mixed.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        out: Tensor = x + self.w2(F.silu(self.w1(y)) * self.w3(y))
        return out


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleDict({str(depth): Block() for depth in range(DEPTH)})
        self.norm, self.output = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for block in self.layers.values():
            x = block(x)
        logits: Tensor = self.output(self.norm(x))
        return logits


def parallelize(model: Llama, device: torch.device, world_size: int) -> None:
    """Shard every block and then the model over all processes."""
    mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("dp_shard",))
    precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.layers.values():
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)


def batch(step: int, rank: int, device: torch.device) -> Tensor:
    """Return sequences to learn, each counting up by a number of its own: int64 [BATCH, LENGTH + 1]."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    start, stride = torch.randint(VOCABULARY, (2, BATCH, 1), generator=generator)
    counted: Tensor = (start + stride * torch.arange(LENGTH + 1)) % VOCABULARY
    return counted.to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None
    device = device or torch.device("cpu")
    torch.manual_seed(0)
    model = Llama().to(device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        parallelize(model, device, world_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))

    agent = gradiometer.attach(model, optimizer, policy=CLIP)  # in place of clipping after each backward pass

    for step in range(options.steps):
        tokens = batch(step, rank, device)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        optimizer.step()
        warmup.step()
        agent.log(loss=loss)

    agent.detach()
    if rank == 0:
        run = gradiometer.open_run(agent.path)
        print(f"run {agent.run_id} in {agent.path}; {world_size} process(es)")
        print(
            f"loss {run.loss[0]:.2f} to {run.loss[-1]:.2f}; {int(run.clipped.sum())} of {len(run)} steps were clipped"
        )
        print(f"gradiometer show {agent.path}")
    if world_size > 1:
        dist.barrier()  # gloo's threads must have let go of the last gradients before Python ends
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
