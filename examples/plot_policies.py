"""Draw what each kind of policy does to the same recorded run: the pictures of docs/policies.md.

    pip install 'gradiometer[torch,plot]'
    python examples/plot_policies.py [FOLDER]       # default: docs/images

The run is a small classifier that really trains for 600 steps. Its learning rate warms up, its gradients shrink as it
learns, three of its batches have a loss that is scaled up (spikes), and one a loss of NaN. It is recorded with
``nonfinite`` alone in force, so that every policy is asked about the same norms.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradiometer
from gradiometer.policy.kinds import KINDS
from gradiometer.replay.driver import UNREPLAYABLE, replay
from gradiometer.replay.plot import plot_replay

STEPS, SPIKES, BAD = 600, {180: 12.0, 330: 30.0, 480: 8.0}, 400
SETTINGS: dict[str, dict[str, Any]] = {
    "global_norm": {"max_norm": 1.0},
    "group_norm": {"max_norm": 1.0, "scope": "layer"},
    "percentile": {"p": 90, "window": 100, "min_history": 20},
    "zclip": {"max_grad_norm": None},
    "adagc": {"scope": "model"},
    "ema_ratio": {"scope": "model"},
}
"""Where the defaults would show little, or there are none."""


def record(root: Path) -> gradiometer.Run:
    """Train, and return the recorded run."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    inputs = torch.randn(4096, 20)
    labels = (inputs[:, :10].sum(1) * inputs[:, 10:].sum(1) > 0).long()
    first, last = nn.Linear(20, 64), nn.Linear(64, 2)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), last)
    for layer in (first, last):
        nn.init.normal_(layer.weight, std=0.5)  # a poor start: the first gradients are large
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    with gradiometer.attach(model, optimizer, policy=["nonfinite"], run_id="small-classifier", dir=root) as agent:
        for step in range(STEPS):
            chosen = torch.randint(len(inputs), (64,))
            loss = nn.functional.cross_entropy(model(inputs[chosen]), labels[chosen])
            optimizer.zero_grad()
            scaled = loss * SPIKES.get(step, float("nan") if step == BAD else 1.0)
            agent.log(loss=scaled)
            scaled.backward()  # type: ignore[no-untyped-call]  # torch
            optimizer.step()
            warmup.step()
        path = agent.path
    return gradiometer.open_run(path)


def main() -> None:
    """Draw a picture for each kind that can be replayed."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images"
    with tempfile.TemporaryDirectory() as root:
        run = record(Path(root))
    for kind, model in KINDS.items():
        if model in UNREPLAYABLE:
            print(f"{kind}: no picture, {UNREPLAYABLE[model]}")
            continue
        settings = SETTINGS.get(kind, {})
        spec = gradiometer.load_policy([{kind: settings}])
        said = (
            ", ".join(f"{key}: {'null' if value is None else value}" for key, value in settings.items()) or "defaults"
        )
        ran = replay(run, spec, f"{kind} ({said})")
        path = folder / f"policy-{kind}.png"
        plot_replay(run, [ran], path, title=f"{kind}, replayed over a small classifier's 600 steps", dpi=72)
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
