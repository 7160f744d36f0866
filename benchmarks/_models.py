"""The models that the benchmarks train, each with a loss on data that is the same at every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Transformer", "Workload", "backward", "mlp", "tensors", "transformer"]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and how its loss is computed; ``loss`` takes the model, so that it serves copies of it too."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        """How many numbers the model holds."""
        return sum(parameter.numel() for parameter in self.parameters)


def backward(loss: Tensor) -> None:
    """Run the backward pass, which torch leaves untyped."""
    loss.backward()  # type: ignore[no-untyped-call]  # torch


def mlp(*, width: int, depth: int, rows: int = 32) -> Workload:
    """Make ``depth`` linear layers of ``width`` by ``width``, with ReLU between them."""
    layers = [nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(depth)]
    data = torch.randn(rows, width)
    return Workload(model=nn.Sequential(*layers), loss=lambda model: model(data).square().mean())


class _Chain(nn.Module):
    def __init__(self, count: int, side: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(side, side) / side) for _ in range(count))

    def forward(self, hidden: Tensor) -> Tensor:
        for weight in self.weights:
            hidden = hidden + 0.01 * (hidden @ weight)
        return hidden


def tensors(*, count: int, side: int = 32) -> Workload:
    """Make ``count`` parameters of ``side`` by ``side``: nearly all that such a step costs is calls."""
    data = torch.randn(8, side)
    return Workload(model=_Chain(count, side), loss=lambda model: model(data).square().mean())


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        projected: Tensor = self.qkv(self.norm_attention(hidden))
        query, key, value = projected.view(*hidden.shape[:2], 3, self.heads, -1).transpose(1, 3).unbind(2)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = self.down(functional.gelu(self.up(self.norm_mlp(hidden))))
        return hidden + mixed


class Transformer(nn.Module):
    """A decoder of plain PyTorch modules: tokens [B, T] to logits [B, T, vocabulary]."""

    def __init__(self, *, width: int, depth: int, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(_Block(width, max(1, width // 64)) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def transformer(
    *,
    width: int,
    depth: int,
    vocabulary: int,
    batch: int,
    length: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """Make a :class:`Transformer` that predicts random tokens, on ``device`` and in ``dtype``."""
    with torch.device(device or "cpu"):
        model = Transformer(width=width, depth=depth, vocabulary=vocabulary).to(dtype)
        tokens = torch.randint(vocabulary, (batch, length + 1))

    def loss(model: nn.Module) -> Tensor:
        logits: Tensor = model(tokens[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    return Workload(model=model, loss=loss)
