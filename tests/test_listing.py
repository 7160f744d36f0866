"""``gradiometer runs``, and what the command line says of runs and directories that are not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD

import gradiometer
from tests.conftest import START_NS, MakeManifest, WriteRun
from tests.test_demo import run

ROW = np.ones((1, 4))


def listed(root: Path) -> list[dict[str, object]]:
    """Return what ``gradiometer runs`` lists."""
    done = run("runs", "--json", "--dir", str(root))
    assert done.returncode == 0, done.stderr
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


def test_runs_are_listed_newest_last(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """The order is that of time, whatever the runs are called; so it is where a run is not found."""
    for place, name in enumerate(("zebra", "20260101-101500-3f9a", "ant")):
        write_run(make_manifest(name, created_ns=START_NS + place * 10**9), ROW, close=True)
    assert [row["run_id"] for row in listed(tmp_path)] == ["zebra", "20260101-101500-3f9a", "ant"]
    complaint = run("show", "bee", "--dir", str(tmp_path)).stderr
    assert complaint.strip().endswith("the newest there: zebra, 20260101-101500-3f9a, ant")


@pytest.mark.parametrize(("rank", "state"), [(1, "lost"), (2, "finished")])
def test_a_rank_that_was_killed(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, rank: int, state: str
) -> None:
    """A run is lost if one of its ranks is; what an earlier, larger start left is not one of them."""
    write_run(make_manifest(rank=0, world_size=2), ROW, close=True)
    write_run(make_manifest(rank=1, world_size=2), ROW, close=rank != 1)
    write_run(make_manifest(rank=2, world_size=3), ROW, close=rank != 2)
    path = tmp_path / "run" / f"rank-{rank:05d}" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"process_start": 1.0}))  # a process that is gone
    assert [row["state"] for row in listed(tmp_path)] == [state]


def test_a_rank_that_a_run_has_not(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """To ask for it names those that the run has."""
    write_run(make_manifest(), ROW, close=True)
    done = run("show", "run", "--rank", "3", "--dir", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == f"gradiometer: run 'run' has no rank 3: in {tmp_path / 'run'} there are rank-00000\n"


def test_a_directory_that_cannot_be_made_names_the_remedy(tmp_path: Path) -> None:
    """``run`` and ``attach`` say what they could not make, and what to give instead."""
    (tmp_path / "file").touch()
    root = tmp_path / "file" / "runs"
    done = run("run", "--dir", str(root), "--", sys.executable, "-c", "")
    assert done.returncode == 2
    assert str(root) in done.stderr
    assert "pass another --dir, or set GRADIOMETER_DIR" in done.stderr
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(NotADirectoryError, match="choose another dir, or set GRADIOMETER_DIR") as caught:
        gradiometer.attach(model, optimizer, dir=root)
    assert caught.value.filename.startswith(str(root))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
