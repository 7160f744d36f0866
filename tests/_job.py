"""A job of several ranks, each a process of its own, and the one process that is not parallel to compare it with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import gradiometer
from gradiometer import Run
from tests import _ranks as cases
from tests._ports import free_ports
from tests._training import Floats, backward, hand_norms

__all__ = ["Ranks", "check_same", "globally", "one_process", "run_ranks"]

SECONDS = 300.0
"""How long a rank may take: all of their cases together."""


def run_ranks(command: Sequence[str], world: int, root: Path, *names: str) -> list[str]:
    """Run Python on each rank of a job until all have ended well; return what each printed.

    The last words of the command are the rank, the number of ranks, a port, the directory, and ``names``.
    """
    ended = _run(command, world, root, *names)
    assert [rank.returncode for rank in ended] == [0] * world, "\n".join(rank.stderr for rank in ended)
    return [rank.stdout for rank in ended]


def _run(
    command: Sequence[str], world: int, root: Path, *names: str, **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    (port,) = free_ports(1)
    workers = [
        subprocess.Popen(
            [sys.executable, *command, str(rank), str(world), str(port), str(root), *names],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )
        for rank in range(world)
    ]
    try:
        said = [worker.communicate(timeout=SECONDS) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [
        subprocess.CompletedProcess(worker.args, worker.returncode, *each)
        for worker, each in zip(workers, said, strict=True)
    ]


class Ranks:
    """What the ranks of one job left behind."""

    module = "tests._parallel"

    def __init__(self, root: Path, world: int, names: Sequence[str], **environment: str) -> None:
        self.root, self.world = root, world
        self.errors = [rank.stderr for rank in _run(["-m", self.module], world, root, *names, **environment)]

    def results(self, case: str) -> list[dict[str, Any]]:
        paths = [self.root / f"{case}-{rank}.json" for rank in range(self.world)]
        assert all(path.exists() for path in paths), "\n".join(self.errors)[-3000:]
        found = [json.loads(path.read_text()) for path in paths]
        assert not any("failed" in result for result in found), "\n".join(r.get("failed", "") for r in found)
        return found

    def runs(self, case: str) -> list[Run]:
        self.results(case)
        return [gradiometer.open_run(self.root / case / "run", rank) for rank in range(self.world)]


def check_same(runs: Sequence[Run]) -> None:
    """Assert that every rank recorded, and so decided, the same to the bit."""
    for run in runs[1:]:
        assert run.parameters == runs[0].parameters
        np.testing.assert_array_equal(run.parameter_norms, runs[0].parameter_norms)
        np.testing.assert_array_equal(run.coefficient, runs[0].coefficient)
        np.testing.assert_array_equal(run.stat("grad_norm_postclip"), runs[0].stat("grad_norm_postclip"))


def one_process(
    model: nn.Module,
    clip: Callable[[nn.Module], object],
    make: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
) -> Floats:
    """Train on the whole batch without an agent; return the norms before clipping, float64[T, P]."""
    optimizer = (make or cases.sgd)(model)
    norms = []
    for step in range(cases.STEPS):
        optimizer.zero_grad()
        backward(cases.loss_of(model(cases.inputs(step))))
        norms.append(hand_norms(model))
        clip(model)
        optimizer.step()
    return np.stack(norms)


def globally(model: nn.Module) -> None:
    """Clip the norm of all gradients to a half."""
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
