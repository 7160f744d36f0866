"""Clip the norm of each layer's, parameter's or group's gradients by itself."""

from __future__ import annotations

from dataclasses import dataclass

from gradiometer.policy.global_norm import GlobalNorm

__all__ = ["GroupNorm"]


@dataclass(frozen=True, kw_only=True)
class GroupNorm(GlobalNorm):
    """Scale each unit's gradients so that their L2 norm is at most ``max_norm``.

    The same as ``torch.nn.utils.clip_grad_norm_`` called once for the parameters of every unit. Stateless.
    """
