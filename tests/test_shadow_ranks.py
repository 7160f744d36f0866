"""Policies in shadow, and ranks that restore a checkpoint, in real processes over gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradiometer
from tests._job import run_ranks
from tests._shadow_ranks import CASES

pytestmark = pytest.mark.slow
WORLD = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run every case on two ranks, and give the directory of what they left."""
    root = tmp_path_factory.mktemp("ranks")
    run_ranks(["-m", "tests._shadow_ranks"], WORLD, root, *CASES)
    return root


def result(root: Path, case: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / f"{case}-{rank}.json").read_text())
    return found


@pytest.mark.parametrize("case", ["ddp", "ddp_acting", "fsdp2", "fsdp2_acting"])
def test_a_shadow_changes_nothing(root: Path, case: str) -> None:
    """Parameters move to the same bits, and the ranks record the same; sharded clamps cost one collective a step."""
    runs = [gradiometer.open_run(root / case / "with", rank) for rank in range(WORLD)]
    for rank in range(WORLD):
        found = result(root, case, rank)
        assert found["with"]["moved"] == found["without"]["moved"]
        more = found["with"]["collectives"] - found["without"]["collectives"]
        assert more == (1 if case.startswith("fsdp2") else 0)
        assert found["with"]["errors"] == 0
    for name in ("policy_threshold", "policy_coefficient", "clipped"):
        np.testing.assert_array_equal(runs[0].rows[name], runs[1].rows[name])
    assert runs[0].clipped[:, runs[0].shadow].any()


def test_sharded_shadows_see_the_whole(root: Path) -> None:
    """What shards show of a clamp is what whole gradients show, and each parameter's bound likewise."""
    whole, parts = (gradiometer.open_run(root / way / "with") for way in ("ddp", "fsdp2"))
    assert len(whole) == len(parts) > 0
    np.testing.assert_allclose(
        whole.rows["policy_coefficient"][:, :4], parts.rows["policy_coefficient"][:, :4], rtol=1e-5
    )


def test_a_rank_that_cannot_weigh_stays_in_phase(root: Path) -> None:
    """Where one rank fails to look at its elements, it drops those policies, and all go on to the end."""
    good, bad = (result(root, "failing", rank) for rank in range(WORLD))
    assert good["errors"] == 0
    assert bad["errors"] > 0
    run = gradiometer.open_run(root / "failing" / "run", 1)
    dropped = [event["message"] for event in run.events if event["kind"] == "shadow_dropped"]
    assert [message.split()[1] for message in dropped] == ["value", "weights"]
    assert len(run) == len(gradiometer.open_run(root / "failing" / "run", 0))


def test_ranks_restore_alike_or_not_at_all(root: Path) -> None:
    """Other checkpoints, one that a rank cannot use, and a rank that stays away are errors that change nothing."""
    first, second = (result(root, "restoring", rank) for rank in range(WORLD))
    assert [found["unchanged"] for found in (first, second)] == [2, 2]
    assert [found["same"] for found in (first, second)] == [7, 7]
    assert [found["step"] for found in (first, second)] == [7, 7]
    differ = "ranks 0 and 1 did not call load_state_dict() with the same: they would differ"
    assert first["said"][0] == second["said"][0] == differ
    assert first["said"][1].startswith("rank 1 could not load_state_dict(), so no rank does: ValueError: agent state")
    assert second["said"][1].startswith("agent state has version 3")
    assert first["said"][2].startswith("rank 1 did not call load_state_dict() within 8 s of this one")
