"""What is asked of the loop of several ranks arrives on all of them with the same step, or on none."""

from __future__ import annotations

import pytest

from tests._job import Ranks

pytestmark = pytest.mark.slow

SETTLED = ["ddp_fast", "ddp_slow", "fsdp2"]


class RequestRanks(Ranks):
    module = "tests._request_ranks"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> RequestRanks:
    return RequestRanks(tmp_path_factory.mktemp("two"), 2, [*SETTLED, "deaf"])


@pytest.mark.parametrize("case", SETTLED)
def test_every_rank_sees_a_request_after_the_same_step(two: RequestRanks, case: str) -> None:
    """A checkpoint with a collective in it is made by all ranks after one step, and all of them stop after another."""
    first, second = two.results(case)
    ((step, total),) = first["saved"]
    assert second["saved"] == [[step, total]]
    assert total == 2 * step > 0
    assert first["steps"] == second["steps"] > step
    taken = [event for event in first["told"] if event[0] == "request_taken"]
    assert [event[:2] for event in taken] == [["request_taken", step], ["request_taken", first["steps"] - 1]]
    assert [event for event in second["told"] if event[0] == "request_taken"] == taken
    assert [event[0] for event in first["told"]] == ["request_taken", "request_done"] * 2
    for run in two.runs(case):
        assert run.status["agent_errors"] == 0
        assert len(run) == first["steps"]


def test_ranks_that_would_not_all_stop_do_not(two: RequestRanks) -> None:
    """A stop that one rank would not see is refused on all, for the others would wait for it in vain."""
    for result in two.results("deaf"):
        ((kind, _, reasons),) = result["told"]
        assert kind == "request_refused"
        assert "rank 1: the job does not look for it" in reasons[0]
