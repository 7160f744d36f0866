"""Every example trains for a few steps in a process of its own, and leaves the run that it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gradiometer
from tests._training import ABORTED

ROOT = Path(__file__).parent.parent
if not (ROOT / "examples").is_dir():
    pytest.skip("the examples are not beside the tests", allow_module_level=True)

STEPS = 8


def run_example(root: Path, *command: str) -> Path:
    """Run a Python command from the top of the repository, without a network; return the one run that it left."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    for attempt in range(3):
        environment["GRADIOMETER_DIR"] = str(root := root / str(attempt))
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        if ABORTED not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    (recorded,) = root.iterdir()
    assert f"run {recorded.name}" in done.stdout
    assert f"gradiometer show {recorded}" in done.stdout
    return recorded


def check(run: gradiometer.Run, max_norm: float = 1.0) -> None:
    """Assert that every step was recorded, with a loss, and was clipped as the examples' policy says."""
    taken = ~run.skipped
    assert run.steps.tolist() == list(range(STEPS))
    assert np.isfinite(run.loss).all()
    total = run.grad_norm_preclip[taken]
    np.testing.assert_allclose(run.grad_norm_postclip[taken], np.minimum(total, max_norm), rtol=1e-4)
    assert taken.any()


@pytest.mark.parametrize(
    "command",
    [
        "nanogpt_style.py",
        "nanogpt_style.py --dtype float16",
        "torchtitan_style.py",
        "lightning_fit.py",
        "transformers_trainer.py",
        "accelerate_loop.py",
    ],
)
def test_an_example_trains_and_leaves_its_run(tmp_path: Path, command: str) -> None:
    """The run that an example prints holds every step, clipped at a norm of 1."""
    name, *options = command.split()
    check(gradiometer.open_run(run_example(tmp_path, f"examples/{name}", "--steps", str(STEPS), *options)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchtitan_style.py", "transformers_trainer.py", "accelerate_loop.py"])
def test_an_example_in_two_processes(tmp_path: Path, name: str) -> None:
    """Under torchrun, sharded by FSDP2 or replicated by DDP, both ranks record the same norms of the whole model."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = run_example(tmp_path, *launch, f"examples/{name}", "--steps", str(STEPS))
    first, second = (gradiometer.open_run(path, rank) for rank in range(2))
    check(first)
    assert first.manifest.world_size == 2
    np.testing.assert_array_equal(first.grad_norm_preclip, second.grad_norm_preclip)
    np.testing.assert_array_equal(first.parameter_norms, second.parameter_norms)
