"""The policy of a job of several ranks is changed on all of them at the same step, or on none."""

from __future__ import annotations

import json

import pytest

from tests._job import Ranks, check_same

pytestmark = pytest.mark.slow

SETTLED = ["ddp_fast", "ddp_slow", "fsdp2"]


class LiveRanks(Ranks):
    module = "tests._live_ranks"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    names = [*SETTLED, "refused_by_one", "ends_before", "detached_on_one"]
    return LiveRanks(tmp_path_factory.mktemp("two"), 2, names)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> LiveRanks:
    return LiveRanks(tmp_path_factory.mktemp("four"), 4, ["ddp_fast", "fsdp2"])


def check_changed(job: LiveRanks, case: str) -> None:
    """Assert that every rank took the new policy up at one step, in whose midst nobody was, and trained alike."""
    results, runs = job.results(case), job.runs(case)
    ((kind, step, _),) = results[0]["changes"]
    assert (kind, step > 0) == ("policy_changed", True)
    for result, run in zip(results, runs, strict=True):
        assert result["changes"] == results[0]["changes"]
        assert result["weights"] == results[0]["weights"]
        assert run.rows["policy_revision"].tolist() == (run.steps >= step).astype(int).tolist()
        assert run.status["policy_changes"] == run.status["policy_revision"] == 1
        assert run.status["agent_errors"] == 0
        assert run.policies == ["nonfinite", "global_norm", "value"]
    check_same(runs)


@pytest.mark.parametrize("case", SETTLED)
def test_two_ranks_change_at_the_same_step(two: LiveRanks, case: str) -> None:
    """Fast, slow and sharded: one step for all, and weights alike to the bit after it."""
    check_changed(two, case)


@pytest.mark.parametrize("case", ["ddp_fast", "fsdp2"])
def test_four_ranks_change_at_the_same_step(four: LiveRanks, case: str) -> None:
    """Four ranks do as two."""
    check_changed(four, case)


def test_what_one_rank_cannot_do_none_does(two: LiveRanks) -> None:
    """A policy that one rank refuses is refused on all, with its reason, and the old one stays."""
    for result, run in zip(two.results("refused_by_one"), two.runs("refused_by_one"), strict=True):
        ((kind, _, reasons),) = result["changes"]
        assert kind == "policy_rejected"
        assert "rank 1: the job captures steps" in reasons[0]
        assert not run.rows["policy_revision"].any()
        assert run.status["policy_rejections"] == 1


def test_a_training_that_ends_first(two: LiveRanks) -> None:
    """Ranks that end before the step that was settled leave in good time, and say that nothing was changed."""
    for result in two.results("ends_before"):
        assert result["seconds"] < 30
        assert [change[0] for change in result["changes"]] in ([], ["policy_rejected"])


def test_a_rank_without_an_agent(two: LiveRanks) -> None:
    """A rank that has detached does not answer: the others say so, and go on under the old policy."""
    first, _ = two.results("detached_on_one")
    ((kind, _, reasons),) = first["changes"]
    assert kind == "policy_rejected"
    assert "rank 1 did not answer within" in reasons[0]


def test_a_rank_that_dies(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The leader goes on stepping under the old policy when another rank was killed."""
    job = LiveRanks(tmp_path_factory.mktemp("dies"), 2, ["dies"])
    found = json.loads((job.root / "dies-0.json").read_text())
    ((kind, _, reasons),) = found["changes"]
    assert kind == "policy_rejected"
    assert "rank 1 did not answer within" in reasons[0]
    assert found["step"] > 10


@pytest.mark.parametrize(("case", "survivors"), [("killed", 3), ("stopped", 4)])
def test_a_rank_that_is_gone_between_pledge_and_verdict(
    tmp_path_factory: pytest.TempPathFactory, case: str, survivors: int
) -> None:
    """Killed, or stopped for longer than a rank waits: the ranks that are left all do the same at the same step."""
    job = LiveRanks(tmp_path_factory.mktemp(case), 4, [case])
    paths = [job.root / f"{case}-{rank}.json" for rank in range(survivors)]
    assert all(path.exists() for path in paths), "\n".join(job.errors)[-3000:]
    found = [json.loads(path.read_text()) for path in paths]
    assert all(each["step"] > 100 for each in found)
    told = [[change[:2] for change in each["changes"]] for each in found]
    assert len(told[0]) == 1
    assert told == [told[0]] * survivors
