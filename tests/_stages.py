"""Every kind of policy with settings that make it act within a few steps, for tests that hold for all of them."""

from __future__ import annotations

from typing import Any

__all__ = ["STAGES", "parameters", "shadow_of"]

STAGES: dict[str, dict[str, Any]] = {
    "nonfinite": {},
    "global_norm": {"max_norm": 20.0},
    "group_norm": {"max_norm": 15.0, "scope": "layer"},
    "value": {"max_abs": 5.0},
    "agc": {"clip_factor": 0.5},
    "percentile": {"p": 50, "window": 4},
    "zclip": {"warmup_steps": 3, "max_grad_norm": None},
    "adagc": {"warmup_steps": 3, "warmup_max_norm": 50.0},
    "ema_ratio": {"ratio": 1.01},
    "skip": {"window": 4, "min_history": 2, "sigma": 1.5},
}


def parameters(*without: str) -> list[str]:
    """Return every kind of policy as a parameter of a test."""
    return [kind for kind in STAGES if kind not in without]


def shadow_of(*kinds: str) -> dict[str, Any]:
    """Return a policy that has these kinds in shadow and nothing in force."""
    return {"shadow": [{kind: STAGES[kind]} for kind in kinds]}
