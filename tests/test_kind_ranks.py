"""Every kind of policy on two ranks over gloo, replicated and sharded, against one process that has it all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gradiometer import open_run
from gradiometer.policy import KINDS
from gradiometer.policy.spec import load_policy
from tests._job import Ranks
from tests._kind_ranks import BAD, CASES, POLICIES, STEPS, take_steps
from tests._ranks import build_model

pytestmark = pytest.mark.slow
DECIDED = ("policy_threshold", "policy_coefficient", "clipped", "coefficient", "grad_norm_postclip")


class KindRanks(Ranks):
    module = "tests._kind_ranks"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return KindRanks(tmp_path_factory.mktemp("kinds"), 2, list(CASES))


def test_every_kind_is_on_ranks() -> None:
    """A kind that is added without a case here fails."""
    assert {stage.kind for policy in POLICIES.values() for stage in load_policy(policy).stages} == set(KINDS)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_ranks_decide_as_one_process(
    two: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, name: str
) -> None:
    """Ranks decide the same to the bit, in force and in shadow, and what one process decides to float32's digits."""
    monkeypatch.setenv("CASE_DIR", str(tmp_path))
    wanted = take_steps(build_model(), name)
    alone, runs = open_run(tmp_path / "run"), two.runs(f"{way}-{name}")
    assert len(alone) == STEPS
    assert alone.clipped[[*range(BAD), *range(BAD + 1, STEPS)], -1].any() or "nonfinite" in alone.policies[-1:]
    for field in DECIDED:
        np.testing.assert_array_equal(runs[0].rows[field], runs[1].rows[field], field)
    for field in ("policy_threshold", "policy_coefficient", "coefficient"):
        np.testing.assert_allclose(runs[0].rows[field], alone.rows[field], rtol=1e-6, err_msg=field)
    np.testing.assert_array_equal(runs[0].clipped, alone.clipped)
    for run in runs:
        np.testing.assert_array_equal(run.skipped, alone.skipped)
    for result in two.results(f"{way}-{name}"):
        for mine, other in zip(result["weights"], wanted, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-6, atol=1e-9)
