"""Policies that need more than norms, on two ranks over gloo, against one process that is not parallel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import _ranks
from tests._job import Ranks, check_same
from tests._policy_ranks import CASES, MEANS
from tests._training import backward
from tests.test_agc import by_hand

pytestmark = pytest.mark.slow


class PolicyRanks(Ranks):
    module = "tests._policy_ranks"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return PolicyRanks(tmp_path_factory.mktemp("policies"), 2, list(CASES))


def alone(factor: float, max_norm: float | None = None, *, vectors: bool = True) -> list[Any]:
    """Train one whole model under AGC by hand; return its weights."""
    model = _ranks.build_model()
    optimizer = _ranks.sgd(model) if max_norm is None else torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(_ranks.STEPS):
        optimizer.zero_grad()
        backward(_ranks.loss_of(model(_ranks.inputs(step))))
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        for parameter in model.parameters():
            if parameter.grad is not None and (vectors or parameter.dim() > 1):
                parameter.grad.copy_(by_hand(parameter, parameter.grad, factor))
        optimizer.step()
    return [parameter.tolist() for parameter in model.parameters()]


def assert_weights(result: Any, wanted: list[Any]) -> None:
    for mine, other in zip(result["weights"], wanted, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-9)


def test_agc_of_shards_is_that_of_the_whole(two: Ranks) -> None:
    """Rows that lie whole on a rank, and vectors that do not, are bounded as in one process; both record the same."""
    for result, run in zip(two.results("agc"), two.runs("agc"), strict=True):
        assert_weights(result, alone(0.05))
        assert result["collectives"] == 4, "norms, those of cut vectors, how strong it was, norms after it"
        assert run.clipped.all()
    check_same(two.runs("agc"))


def test_agc_after_other_stages(two: Ranks) -> None:
    """After a global norm, on a fused optimizer, without the vectors, it is that of one process too."""
    for result in two.results("agc_after_others"):
        assert_weights(result, alone(0.01, 0.5, vectors=False))


def test_agc_of_replicas_communicates_nothing(two: Ranks) -> None:
    """Under DDP every rank has all it needs."""
    for result in two.results("agc_replicated"):
        assert_weights(result, alone(0.05))
        assert result["collectives"] == 0


def test_agc_of_cut_rows_is_refused(two: Ranks) -> None:
    """FSDP1's flat parameters and column shards are refused at attach, on every rank, by name."""
    for result in two.results("agc_refused"):
        flat, columns = result["said"]
        assert "parameter '0.weight' lies on the ranks as 'flat (FSDP1)'" in flat
        assert "parameter '3.weight' lies on the ranks as 'shard(1) over dim0'" in columns


@pytest.mark.parametrize("way", ["loss_ddp", "loss_fsdp2"])
def test_ranks_decide_by_their_mean_loss(two: Ranks, way: str) -> None:
    """A spike of one rank stops both, a NaN is seen by both, and a rank without a loss does not count."""
    wanted = [not mean > 10.0 for mean in MEANS]
    for result in two.results(way):
        assert result["moved"] == wanted
        assert set(result["collectives"][1:]) == {1 if way == "loss_ddp" else 2}
        assert result["missing"] == 1


def test_nothing_is_communicated_for_a_loss_that_none_asks_for(two: Ranks) -> None:
    """A ``skip`` on the norm alone costs replicas no collective."""
    assert [result["collectives"] for result in two.results("loss_without_asking")] == [0, 0]


def test_losses_in_closures(two: Ranks) -> None:
    """Closures of several optimizers, evaluated several times a step, keep the ranks in step."""
    first, second = two.results("loss_in_closures")
    assert first["skipped"] == second["skipped"]
    assert first["skipped"][4:6] == [True, True], "rank 1 logs 100 in the third step"
    assert sum(first["skipped"]) == 2


def test_a_rank_that_fails_before_the_losses_keeps_nobody_waiting(two: Ranks) -> None:
    """It takes part without a loss, and raises; the other goes on."""
    healthy, failing = two.results("loss_and_a_failing_rank")
    assert (healthy["said"], healthy["rows"]) == ([], 3)
    assert len(failing["said"]) == 1
    assert "was given a parameter" in failing["said"][0]


def test_callbacks_run_on_every_rank(two: Ranks) -> None:
    """Each rank calls its own, for the same step; a checkpoint is asked for by either and saved at one step."""
    first, second = two.results("callbacks")
    assert (first["called"], second["called"]) == ([[0, 0]], [[1, 0]])
    assert len(first["saved"]) == 1
    assert first["saved"] == second["saved"]
