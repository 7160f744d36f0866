"""Saved, killed and resumed in real processes: to the bit what an unbroken run would have been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from gradiometer import open_run
from tests._ports import free_ports
from tests._resume import HALF, STEPS
from tests._stages import STAGES

pytestmark = pytest.mark.slow
KINDS = list(STAGES)
WAYS = {"alone": (1, "plain"), "under a scaler": (1, "scaled"), "two ranks": (2, "plain")}


def run_ranks(root: Path, mode: str, world: int, scaled: str) -> None:
    """Train on every rank; those to be killed get SIGKILL in mid-training, when all have written their checkpoints."""
    (port,) = free_ports(1)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    logs = [(root / f"{mode}-{rank}.log").open("w") for rank in range(world)]
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests._resume", str(rank), str(world), str(port), str(root), mode, scaled, *KINDS],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        if mode == "killed":
            for worker in workers:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "saved\n", said(root)
            # Stopped first: a rank that sees the other die may end by itself before it is killed.
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for worker in workers:
                    worker.send_signal(number)
        codes = [worker.wait(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
        for log in logs:
            log.close()
    expected = -signal.SIGKILL if mode == "killed" else 0
    assert codes == [expected] * world, said(root)


def said(root: Path) -> str:
    """Return what the processes have written on stderr."""
    return "\n".join(log.read_text() for log in root.glob("*.log"))


@pytest.fixture(scope="module", params=WAYS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Train unbroken, and killed half way and resumed; give the directory of what is left, and the number of ranks."""
    root, (world, scaled) = tmp_path_factory.mktemp("resume"), WAYS[request.param]
    for mode in ("whole", "killed", "resumed"):
        run_ranks(root, mode, world, scaled)
    return root, world


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_to_the_bit(trained: tuple[Path, int], kind: str) -> None:
    """Coefficients, thresholds and clips after the restart, and the parameters in the end, are an unbroken run's."""
    root, world = trained
    for rank in range(world):
        whole, resumed = (open_run(root / f"{kind}-{mode}", rank) for mode in ("whole", "resumed"))
        assert whole.steps.tolist() == list(range(STEPS))
        assert resumed.steps.tolist() == list(range(HALF, STEPS))
        names = ("policy_threshold", "policy_coefficient", "coefficient", "clipped", "grad_norm_preclip", "loss_scale")
        for name in (*names, "parameters"):
            np.testing.assert_array_equal(whole.rows[name][HALF:, ...], resumed.rows[name], name)
        assert not [event for event in resumed.events if event["kind"] == "policy_state"]
        for mine, other in zip(
            *(torch.load(root / f"{kind}-{mode}-{rank}.pt", weights_only=False) for mode in ("whole", "resumed")),
            strict=True,
        ):
            assert torch.equal(mine, other)
