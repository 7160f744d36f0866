"""Ranks that differ, or fail alone, in real processes over gloo: nobody waits in vain, norms are of the whole."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from torch.distributed import FileStore  # type: ignore[attr-defined]  # torch does not say that it exports it

from gradiometer.rendezvous import AbsentError, meet
from tests import _ranks as cases
from tests._job import Ranks, check_same, globally, one_process
from tests._parallel_faults import CASES
from tests._training import check_run

pytestmark = pytest.mark.slow
"""All of them together take long: the wheel's tests leave them out."""

ON_THREE = ["mesh_of_some", "mesh_outside_the_group"]


class Faults(Ranks):
    """The ranks of a job that runs the cases of this file."""

    module = "tests._parallel_faults"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Faults(tmp_path_factory.mktemp("two"), 2, [name for name in CASES if name not in ON_THREE])


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Faults(tmp_path_factory.mktemp("three"), 3, ON_THREE)


@pytest.mark.parametrize("case", ["mesh_of_one", "after_evaluation"])
def test_norms_are_as_one(two: Ranks, case: str) -> None:
    """FSDP2 over one rank is a whole parameter, and one that has just evaluated is as sharded as ever."""
    wanted = one_process(cases.build_model(), globally)
    for run in two.runs(case):
        check_run(run.path, wanted, 0.5)
    check_same(two.runs(case))
    if case == "after_evaluation":
        assert {info.placement for info in two.runs(case)[0].manifest.parameters} == {"shard(0) over dim0"}


def test_adapters_of_a_frozen_model(two: Ranks) -> None:
    """Frozen shards have no gradient, and the norms of the others are those that torch puts together."""
    for run, result in zip(two.runs("adapters"), two.results("adapters"), strict=True):
        check_run(run.path, result["norms"], 0.5)
        assert sum(info.trainable for info in run.manifest.parameters) == 2


def test_a_parameter_that_one_rank_alone_is_given(two: Ranks) -> None:
    """That rank counts errors and the other records unknown norms, while it lasts; neither waits, both sample on."""
    healthy, failing = two.runs("given_another")
    assert [result["errors"] for result in two.results("given_another")] == [0, 2]
    assert np.isfinite(healthy.grad_norm_preclip).tolist() == [True, True, False, False, True, True]
    assert failing.rows["step"].tolist() == [0, 1, 4, 5], "its steps keep the numbers that they have on the other rank"
    assert np.isfinite(failing.grad_norm_preclip).all()
    np.testing.assert_array_equal(healthy.grad_norm_preclip[4:], failing.grad_norm_preclip[2:])
    assert healthy.samples is not None
    assert failing.samples is not None
    assert healthy.samples.steps.tolist() == [0, 2, 4]
    assert failing.samples.steps.tolist() == [0, 4]


def test_what_would_part_the_ranks_is_refused_on_all(two: Ranks, three: Ranks) -> None:
    """Whatever one rank lacks to attach, none does; a training whose optimizers differ is refused beforehand."""
    for result in two.results("unlike_optimizers"):
        assert result["together"].startswith("ValueError: ranks were given different settings")
        assert result["number"].startswith("ValueError: ranks were given different settings")
    said = {
        "no_room_on_one_rank": "NotADirectoryError: ",
        "bad_labels_on_one_rank": "ValueError: label name '0'",
        "no_values_on_one_rank": "NotImplementedError: Cannot copy out of meta tensor",
    }
    for case, error in said.items():
        healthy, failing = (result["error"] for result in two.results(case))
        assert failing.startswith(error)
        assert healthy.startswith(f"RuntimeError: rank 1 could not attach, so no rank does: {error}")
    outside = [result["error"] for result in three.results("mesh_outside_the_group")]
    assert outside[0].startswith("ValueError: parameter 'weight' is sharded over ranks [0, 2]")
    assert outside[1].startswith("RuntimeError: rank 0 could not attach")


def test_a_second_attempt_to_attach(two: Ranks) -> None:
    """After one rank had no room for its run, and the training went on without, all attach to the same run."""
    check_same(two.runs("no_room_on_one_rank"))
    assert [len(run) for run in two.runs("no_room_on_one_rank")] == [4, 4]


def test_a_parameter_that_only_some_ranks_hold(three: Ranks) -> None:
    """Every rank knows the norm of what two of three hold; there is no gradient of the rest of the model."""
    wanted = np.linalg.norm(2 * np.arange(16) / 16)
    for run in three.runs("mesh_of_some"):
        place = run.parameters.index("table")
        assert run.manifest.parameters[place].placement == "shard(0) over dim0"
        assert run.parameter_norms[0, place] == pytest.approx(wanted, rel=1e-6)
        assert np.signbit(np.delete(run.parameter_norms, place, axis=1)).all()
    check_same(three.runs("mesh_of_some"))


def test_closures_evaluated_unlike(two: Ranks) -> None:
    """Without a policy only the first evaluation of a step is measured, which every rank makes."""
    first, second = (result["evaluations"] for result in two.results("line_searches"))
    assert first != second
    check_same(two.runs("line_searches"))
    assert len(two.runs("line_searches")[0]) == cases.STEPS


def test_a_grad_scaler_that_skips_on_one_rank(two: Ranks) -> None:
    """Where each rank has a GradScaler for what it holds, a step that one skips is skipped by all, and counted once."""
    for run, result in zip(two.runs("scaler_skips_on_one_rank"), two.results("scaler_skips_on_one_rank"), strict=True):
        assert run.rows["step"].tolist() == list(range(6))
        assert run.nonfinite.tolist() == run.skipped.tolist() == [False, False, True, True, False, False]
        assert result["moved"] == [[True] * 2] * 2 + [[False] * 2] * 2 + [[True] * 2] * 2
        assert run.samples is not None
        assert run.samples.steps.tolist() == [0, 2, 4]
    check_same(two.runs("scaler_skips_on_one_rank"))


def test_a_store_that_is_a_file(tmp_path: Path) -> None:
    """A rank that does not come is named whatever store the job has; the kinds of their errors differ."""
    store = FileStore(str(tmp_path / "store"), 2)
    with pytest.raises(AbsentError, match=r"rank 1 did not call attach\(\) within 0.2 s"):
        meet(store, [0, 1], 0, "here", timedelta(seconds=0.2))
