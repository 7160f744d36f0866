"""A training loop that knows nothing of gradients, and the two lines that let gradiometer measure and clip them.

    python examples/plain_loop.py [--steps N] [--policy examples/policy.yaml]

Learns, from the names of the standard library's modules, to say whether a name's first letter comes before "m".
"""

from __future__ import annotations

import argparse
import sys

import torch
from torch import nn

import gradiometer


def letters(names: list[str], length: int = 12) -> torch.Tensor:
    """Return the characters of each name, int64 [N, length], padded with zeros."""
    rows = [[ord(letter) % 128 for letter in name[:length].ljust(length, "\0")] for name in names]
    return torch.tensor(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--policy", default=None, help="policy file; observe only unless given")
    options = parser.parse_args()

    names = sorted(sys.stdlib_module_names)
    inputs, targets = letters(names), torch.tensor([float(name.strip("_")[0] < "m") for name in names])
    model = nn.Sequential(nn.Embedding(128, 16), nn.Flatten(), nn.Linear(192, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)

    agent = gradiometer.attach(model, optimizer, policy=options.policy)  # the first line

    for _ in range(options.steps):
        batch = torch.randint(len(names), (64,))
        loss = nn.functional.binary_cross_entropy_with_logits(model(inputs[batch]).squeeze(1), targets[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch
        optimizer.step()
        agent.log(loss=loss)  # the second, and optional

    agent.detach()
    run = gradiometer.open_run(agent.path)
    print(f"run {agent.run_id}: loss {run.loss[0]:.3f} to {run.loss[-1]:.3f}, {int(run.clipped.sum())} clip events")
    for layer, norms in zip(run.layers, run.layer_norms().T, strict=True):
        print(f"  {layer:8} median norm {sorted(norms)[len(norms) // 2]:.4f}, largest {norms.max():.4f}")


if __name__ == "__main__":
    main()
