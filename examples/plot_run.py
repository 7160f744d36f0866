"""Draw a recorded run: the global norm before and after clipping, the loss, and a layer by step heat map.

    pip install matplotlib
    python examples/plot_run.py RUN_DIRECTORY picture.png

The picture at the top of README.md was drawn by this file from a run of ``gradiometer demo``.
"""

from __future__ import annotations

import sys

import matplotlib
import numpy as np

import gradiometer

matplotlib.use("agg")
from matplotlib import pyplot as plt  # the backend is chosen first


def draw(run: gradiometer.Run, path: str) -> None:
    """Write a PNG of ``run`` to ``path``."""
    figure, (norms, loss, layers) = plt.subplots(
        3, 1, figsize=(10, 7.5), sharex=True, height_ratios=[3, 1.4, 2], layout="constrained"
    )
    clipped = run.clipped[:, ~run.shadow].any(axis=1)
    norms.plot(run.steps, run.grad_norm_preclip, color="#b45309", linewidth=0.8, label="before clipping")
    norms.plot(run.steps, run.grad_norm_postclip, color="#0f766e", linewidth=1.2, label="after clipping")
    norms.plot(run.steps[clipped], np.full(clipped.sum(), 0.02), "|", color="#b91c1c", markersize=5, label="clip event")
    norms.set(yscale="log", ylabel="global gradient norm", title=f"{run.manifest.run_id}: {len(run)} steps")
    norms.legend(loc="upper right")
    loss.plot(run.steps, run.loss, color="#334155", linewidth=0.8)
    loss.set(ylabel="loss")
    values = np.log10(np.maximum(run.layer_norms().T, 1e-9))
    edges = np.append(run.steps, run.steps[-1] + 1)
    mesh = layers.pcolormesh(edges, np.arange(len(run.layers) + 1), values, cmap="viridis")
    layers.set(xlabel="optimizer step", yticks=np.arange(len(run.layers)) + 0.5, yticklabels=run.layers)
    layers.invert_yaxis()
    figure.colorbar(mesh, ax=layers, label="log10 of the layer's norm")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/plot_run.py RUN_DIRECTORY PICTURE.png")
    draw(gradiometer.open_run(sys.argv[1]), sys.argv[2])
