"""Parallel training in real processes over gloo, each way compared with one process that is not parallel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gradiometer
from gradiometer import Run
from tests import _ranks as cases
from tests._job import Ranks, check_same, globally, one_process
from tests._parallel import CASES, build_experts
from tests._training import check_run

pytestmark = pytest.mark.slow
"""All of them together take long: the wheel's tests leave them out."""

ON_TWO = [name for name in CASES if name not in ("hsdp", "fsdp_tp", "ddp_tp", "dies")]
ON_FOUR = ["ddp", "fsdp2", "fsdp1_full", "hsdp", "tp", "fsdp_tp", "ddp_tp", "experts"]
SAME_AS_ONE_PROCESS = [
    "ddp",
    "zero",
    "fsdp2",
    "fsdp2_offload",
    "fsdp2_accumulate",
    "fsdp1_full",
    "fsdp1_grad_op",
    "fsdp1_no_shard",
    "tp",
    "tp_sequence",
]
COLLECTIVES = {"ddp": 0, "groups_of_their_own": 0, "fsdp2": 1, "fsdp2_fused": 1, "tp": 1, "hsdp": 1, "fsdp_tp": 1}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("two"), 2, ON_TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(tmp_path_factory.mktemp("four"), 4, ON_FOUR)


@pytest.mark.parametrize("case", SAME_AS_ONE_PROCESS)
def test_two_ranks_are_as_one(two: Ranks, case: str) -> None:
    """Norms, coefficients and the clipped training itself are those of one process on the whole batch."""
    wanted = one_process(cases.build_model(), globally)
    for run in two.runs(case):
        check_run(run.path, wanted, 0.5)
        if case != "fsdp2_accumulate":
            logged = np.isfinite(run.loss).tolist(), run.loss[1::2].tolist()
            assert logged == ([False, True] * 2, [1.0, 3.0]), "logged before the step, and kept with it"
    check_same(two.runs(case))


@pytest.mark.parametrize("case", ["ddp", "fsdp2", "fsdp1_full", "hsdp", "tp", "fsdp_tp", "ddp_tp"])
def test_four_ranks_are_as_one(four: Ranks, case: str) -> None:
    """So are they with four ranks: uneven and empty shards, replicas of shards, meshes of two dimensions."""
    wanted = one_process(cases.build_model(), globally)
    for run in four.runs(case):
        check_run(run.path, wanted, 0.5)
    check_same(four.runs(case))


@pytest.mark.parametrize(("world", "case"), [(2, case) for case in COLLECTIVES if case in ON_TWO] + [
    (4, case) for case in COLLECTIVES if case in ON_FOUR
])  # fmt: skip
def test_collectives_of_a_step(two: Ranks, four: Ranks, world: int, case: str) -> None:
    """A step with telemetry and clipping is one all-reduce where parameters are sharded, none where they are whole."""
    ranks = two if world == 2 else four
    assert [result["collectives"] for result in ranks.results(case)] == [COLLECTIVES[case]] * world


def test_a_fused_optimizer_on_shards(two: Ranks) -> None:
    """Coefficient and skip go into the fused kernel of a sharded AdamW as well."""
    wanted = one_process(
        cases.build_model(), globally, lambda model: torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    )
    for run in two.runs("fsdp2_fused"):
        check_run(run.path, wanted, 0.5)


def test_own_clipping_of_shards(two: Ranks) -> None:
    """Where the loop itself clips sharded gradients, the norms before it are those of one process."""
    wanted = one_process(cases.build_model(), globally)
    for run in two.runs("fsdp2_own_clip"):
        check_run(run.path, wanted, 0.5)
        assert [event["kind"] for event in run.events].count("own_clipping") == 1


def test_mixed_precision(two: Ranks) -> None:
    """Under bfloat16 compute the norms are those of the gradients that torch puts together from the shards."""
    for run, result in zip(two.runs("fsdp2_bf16"), two.results("fsdp2_bf16"), strict=True):
        check_run(run.path, result["norms"], 0.5)


def test_a_flat_parameter_is_one(two: Ranks) -> None:
    """FSDP1 without ``use_orig_params`` has one flat parameter a module; the global norm is still that of the model."""
    wanted = np.sqrt(np.square(one_process(cases.build_model(), globally)).sum(axis=1))
    for run in two.runs("fsdp1_flat"):
        np.testing.assert_allclose(run.grad_norm_preclip, wanted, rtol=1e-6)
    check_same(two.runs("fsdp1_flat"))


def test_placements_are_told(two: Ranks, four: Ranks) -> None:
    """The manifest says how each parameter is spread, with the shape of the whole."""
    infos = four.runs("fsdp_tp")[0].manifest.parameters
    told = {info.name: (info.placement, info.shape) for info in infos}
    assert told["0.weight"] == ("shard(0) over dp", (12, 6))
    assert told["3.weight"] == ("shard(0) over dp, shard(0) over tp", (12, 12))
    assert told["4.weight"] == ("shard(0) over dp, shard(1) over tp", (3, 12))
    assert {info.placement for info in two.runs("fsdp1_full")[0].manifest.parameters} == {"flat (FSDP1)"}
    assert {info.placement for info in two.runs("ddp")[0].manifest.parameters} == {"local"}


def test_partial_sums_are_added_up_first(two: Ranks) -> None:
    """Sequence parallelism leaves gradients as partial sums, and their norm is that of the sum."""
    assert two.results("tp_sequence")[0]["gradients"] == ["(Partial(sum),)"] * 2


def test_pipeline_stages_are_one_model(two: Ranks) -> None:
    """Each stage knows all norms, and clips its own gradients by the norm of the whole model."""
    names = [f"stage{stage}.{name}" for stage in (0, 1) for name in ("0.weight", "0.bias", "1.weight", "1.bias")]
    wanted = one_process(cases.build_model(), globally)
    for run, result in zip(two.runs("pipeline"), two.results("pipeline"), strict=True):
        assert result["parameters"] == names
        assert [info.placement for info in run.manifest.parameters] == ["rank 0"] * 4 + ["rank 1"] * 4
        check_run(run.path, wanted, 0.5)
    check_same(two.runs("pipeline"))


@pytest.mark.parametrize("world", [2, 4])
def test_uneven_experts(two: Ranks, four: Ranks, world: int) -> None:
    """Three experts over two ranks are two and one, over four one has none; their norm is that of the three."""
    ranks = two if world == 2 else four
    wanted = one_process(build_experts(), globally)
    for run in ranks.runs("experts"):
        assert run.manifest.parameters[0].placement == "shard(0) over ep"
        check_run(run.path, wanted, 0.5)
    assert [result["here"][0] for result in ranks.results("experts")] == [[2, 1], [1, 1, 1, 0]][world == 4]


def test_experts_of_ones_own(two: Ranks) -> None:
    """Plain tensors that share but the name are told apart by ``parts``; a bad one on one rank skips on both."""
    check_own_experts(two.runs("own_experts"), two.results("own_experts"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_ranks_on_a_gpu(tmp_path: Path) -> None:
    """So it is where the gradients, and the one all-reduce, are on a GPU."""
    ranks = Ranks(tmp_path, 2, ["own_experts"], DEVICE="cuda")
    check_own_experts(ranks.runs("own_experts"), ranks.results("own_experts"))


def check_own_experts(runs: list[Run], results: list[dict[str, Any]]) -> None:
    """Assert that both ranks know all experts' norms, and that neither moved in the third step."""
    check_same(runs)
    for rank, result in enumerate(results):
        squares = np.square(runs[0].parameter_norms.astype(np.float64))
        mine = [name.startswith(f"rank{rank}.experts") for name in runs[0].parameters]
        np.testing.assert_allclose(squares[:, mine].sum(axis=1), result["norms"][::2], rtol=1e-6)
        assert result["norms"][1::2] == [1.0, 1.0, 0.0, 1.0], "moved in all steps but the third"
    for run in runs:
        assert run.skipped.tolist() == [False, False, True, False]
        assert run.first_nonfinite[2] == "rank1.experts.weight"


def test_one_bad_shard_skips_the_step_everywhere(two: Ranks) -> None:
    """An Inf in one rank's shard stops every rank's optimizer, in that step and no other."""
    for run, result in zip(two.runs("nan_on_one_rank"), two.results("nan_on_one_rank"), strict=True):
        assert result["moved"] == [True, True, False, True]
        assert run.skipped.tolist() == [False, False, True, False]


def test_clamped_shards(two: Ranks) -> None:
    """Elements are clamped in their shards, and the norms after it are those of the whole."""
    wanted = one_process(cases.build_model(), lambda model: nn.utils.clip_grad_value_(model.parameters(), 0.1))
    for run in two.runs("value"):
        np.testing.assert_allclose(run.parameter_norms, wanted, rtol=1e-6)
        assert (run.grad_norm_postclip < run.grad_norm_preclip).all()
    check_same(two.runs("value"))


def test_layers_of_shards_are_clipped_by_themselves(two: Ranks) -> None:
    """The norm of a layer's group is that of the whole layer."""

    def each_layer(model: nn.Module) -> None:
        for layer in model.children():
            nn.utils.clip_grad_norm_(list(layer.parameters()), 0.1)

    wanted = one_process(cases.build_model(), each_layer)
    for run in two.runs("group_norm"):
        np.testing.assert_allclose(run.parameter_norms, wanted, rtol=1e-6)


def test_a_rank_that_cannot_measure_keeps_nobody_waiting(two: Ranks) -> None:
    """It counts an error and records nothing; the others record a norm that is not a number, and go on."""
    healthy, failing = two.runs("measuring_fails")
    assert [result["errors"] for result in two.results("measuring_fails")] == [0, 1]
    assert np.isfinite(healthy.grad_norm_preclip).tolist() == [True, False, True]
    assert len(failing) == 2
    assert np.isfinite(failing.grad_norm_preclip).all()


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_a_dead_rank_hangs_nobody(tmp_path: Path, way: str) -> None:
    """When a rank is killed the other fails in the training's own collective, long before any timeout of ours."""
    ranks = Ranks(tmp_path, 2, ["dies"], WAY=way)
    told = tmp_path / "dies-0.json"
    died_at = gradiometer.open_run(tmp_path / "dies" / "run", 1).time[-1]
    assert told.stat().st_mtime - died_at < 45, "the process group's timeout is 60 s"
    failure = json.loads(told.read_text())["failed"]
    assert "gradiometer/" not in failure, "the training's error, not ours"
    assert not (tmp_path / "dies-1.json").exists()
    assert [len(gradiometer.open_run(tmp_path / "dies" / "run", rank)) for rank in range(2)] == [2, 2]
    del ranks


@pytest.mark.parametrize("case", ["scaler", "scaler_fused"])
def test_a_grad_scaler_over_shards(two: Ranks, case: str) -> None:
    """Norms have the loss scale divided out, and a shard that overflows is a skipped step on every rank."""
    wanted = one_process(cases.build_model(), globally, lambda model: torch.optim.AdamW(model.parameters(), lr=0.05))
    for run, result in zip(two.runs(case), two.results(case), strict=True):
        np.testing.assert_allclose(run.parameter_norms[:2], wanted[:2], rtol=1e-6)
        assert result["moved"] == [True, True, False, True]
        assert run.skipped.tolist() == run.nonfinite.tolist() == [False, False, True, False]
        assert run.loss_scale.tolist() == [8.0, 8.0, 8.0, 4.0]


def test_what_does_not_go_together_is_refused_on_every_rank(two: Ranks) -> None:
    """Unlike models, policies, or a bad argument on one rank: all ranks raise, none waits for the others."""
    said = {
        "other_values": ["ValueError: parameter '0.weight' has other values on rank 1 than on rank 0"] * 2,
        "other_policies": ["ValueError: ranks 0 and 1 were given different policies"] * 2,
        "one_stays_away": [f"AbsentError: rank {rank} did not call attach() within 1 s" for rank in (1, 0)],
        "bad_arguments_on_one_rank": ["RuntimeError: rank 1 could not attach", "PolicyError: policy: pipeline[0]"],
    }
    for case, beginnings in said.items():
        for result, beginning in zip(two.results(case), beginnings, strict=True):
            assert result["error"].startswith(beginning)
    assert [result["then"] for result in two.results("one_stays_away")] == ["none", "none"], "a failure passes"
    assert "parts='stage1'" in two.results("other_values")[0]["error"]


def test_independent_trainings_in_one_job(two: Ranks) -> None:
    """With a group of its own each rank is a run by itself, whatever the others hold."""
    two.results("groups_of_their_own")
    runs = [gradiometer.open_run(two.root / "groups_of_their_own" / f"alone{rank}", rank) for rank in range(2)]
    assert not np.allclose(runs[0].grad_norm_preclip, runs[1].grad_norm_preclip)
