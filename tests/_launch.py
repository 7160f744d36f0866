"""Run training scripts below ``gradiometer run``, as a user starts them, and read what was recorded."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from gradiometer import Run, open_run
from gradiometer.records import find_runs

__all__ = ["CLI", "CLIP", "PLAIN", "execute", "launch", "numbers", "recorded", "script", "the_run", "train"]

CLI = (sys.executable, "-m", "gradiometer.cli", "run")
Done = subprocess.CompletedProcess[str]
HEAD = """
import json, math, os, sys, copy, torch
from torch import nn
torch.manual_seed(0)

def norm(*models):
    return math.sqrt(math.fsum(g.double().square().sum().item() for m in models for p in m.parameters()
                               if (g := p.grad) is not None))

def net():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

def loss_of(model):
    return model(torch.randn(16, 4)).square().sum()
"""
PLAIN = """
from torch.nn.utils import clip_grad_norm_
model = net()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for step in range(4):
    optimizer.zero_grad()
    loss_of(model).backward()
    print(norm(model))
    if "--clip" in sys.argv:
        clip_grad_norm_(model.parameters(), 2.0)
    optimizer.step()
print(sys.stdin.read(), [round(p.double().sum().item(), 6) for p in model.parameters()])
print("done", file=sys.stderr)
sys.exit(3)
"""
CLIP = "version: 1\npipeline:\n  - global_norm: {max_norm: 2.0}\n"


def script(tmp_path: Path, body: str) -> str:
    """Write a training script, and return its path."""
    path = tmp_path / "train.py"
    path.write_text(HEAD + textwrap.dedent(body))
    return str(path)


def execute(*words: str | Path, **environment: str) -> Done:
    """Run a command to its end, with something to read on stdin."""
    return subprocess.run(
        [str(word) for word in words],
        input="typed",
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | environment,
        check=False,
    )


def launch(tmp_path: Path, *command: str, options: Sequence[str] = (), **environment: str) -> Done:
    """Run a command below ``gradiometer run``, with the run id ``job``."""
    return execute(*CLI, "--dir", tmp_path / "runs", "--run-id", "job", *options, "--", *command, **environment)


def train(tmp_path: Path, body: str, *options: str, **environment: str) -> Done:
    """Run a script below ``gradiometer run``, and see it succeed."""
    done = launch(tmp_path, sys.executable, script(tmp_path, body), options=options, **environment)
    assert done.returncode == 0, done.stderr
    return done


def recorded(tmp_path: Path) -> dict[str, Run]:
    """Open the runs that were recorded, by id."""
    return {path.name: open_run(path) for path in find_runs(tmp_path / "runs")}


def the_run(tmp_path: Path) -> Run:
    """Open the one run that was recorded, under the id that was asked for."""
    runs = recorded(tmp_path)
    assert list(runs) == ["job"]
    return runs["job"]


def numbers(text: str) -> list[float]:
    """Read the lines of a program's output that are a number."""
    return [float(line) for line in text.splitlines() if line.replace(".", "").replace("e-", "").isdigit()]
