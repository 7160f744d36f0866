"""Ranks agree on one step or on none, whoever is late, silent or gone: over a store in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import FileStore, HashStore

from gradiometer.live import accord
from gradiometer.live.accord import Accord, Verdict


@pytest.fixture(params=["hash", "file"])
def ranks(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Accord]:
    """Make three ranks of one job, who wait for each other however slow the host is."""
    monkeypatch.setattr(accord, "GATHER_SECONDS", 600.0)
    monkeypatch.setattr(accord, "DECIDE_SECONDS", 600.0)
    store: Any = HashStore() if request.param == "hash" else FileStore(str(tmp_path / "store"), 3)
    return [Accord(store, "run/0", [0, 1, 2], rank) for rank in range(3)]


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody wait."""
    monkeypatch.setattr(accord, "GATHER_SECONDS", 0.0)
    monkeypatch.setattr(accord, "DECIDE_SECONDS", 0.0)
    monkeypatch.setattr(accord, "LINGER_SECONDS", 0.0)


def test_the_latest_pledge_is_the_step(ranks: list[Accord]) -> None:
    """Nobody has a verdict before all have pledged; then all have the same, and the next proposal is another."""
    for proposal in ("one", "two"):
        ranks[0].propose(proposal)
        for rank, horizon in zip(ranks, (7, 12, 9), strict=True):
            assert rank.look() is None
            assert rank.hear() == proposal
            assert rank.hear() is None
            assert ranks[0].look() is None
            rank.pledge(horizon)
        assert [rank.look() for rank in ranks] == [Verdict(message=proposal, at=12)] * 3
        assert not any(rank.open for rank in ranks)


def test_one_refusal_is_everybodys(ranks: list[Accord]) -> None:
    """A rank that refuses is named to all, also to one that comes when all is over."""
    ranks[0].propose("one")
    for rank in ranks[:2]:
        rank.hear()
    ranks[0].pledge(2)
    ranks[1].refuse("no room")
    late = ranks[2]
    assert {rank.look().why for rank in ranks[:2] if rank.open} == {"rank 1: no room"}  # type: ignore[union-attr]
    late.hear()
    late.pledge(2)
    assert late.look() == Verdict(message="one", at=None, why="rank 1: no room")


def test_who_does_not_answer_is_named(ranks: list[Accord], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank refuses when the time is over, and the others hear of it."""
    ranks[0].propose("one")
    for rank in ranks[:2]:
        rank.hear()
        rank.pledge(5)
    assert ranks[0].look() is None
    at_once(monkeypatch)
    for rank in ranks[:2]:
        verdict = rank.look()
        assert verdict is not None
        assert verdict.at is None
        assert verdict.why.startswith("rank 2 did not answer")


def test_a_first_rank_that_is_gone(ranks: list[Accord], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first rank decides no more, the others do, once; even if it comes back it is bound by that."""
    ranks[0].propose("one")
    for rank in ranks:
        rank.hear()
        rank.pledge(5)
    at_once(monkeypatch)
    verdicts = [ranks[place].look() for place in (2, 1, 0)]
    assert verdicts[0] is not None
    assert verdicts[0].why.startswith("rank 2 waited")
    assert verdicts[1:] == verdicts[:1] * 2


def test_a_rank_that_leaves(ranks: list[Accord], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving refuses what is open, and changes nothing of what was settled."""
    at_once(monkeypatch)
    ranks[0].propose("one")
    for rank in ranks:
        rank.hear()
    left = ranks[1].leave("its agent was detached")
    assert left == Verdict(message="one", at=None, why="rank 1: its agent was detached")
    assert ranks[0].look() == left
    ranks[2].look()
    ranks[0].propose("two")
    for rank in ranks:
        rank.hear()
        rank.pledge(4)
    assert ranks[0].look() == Verdict(message="two", at=4)
    assert [rank.leave("over") for rank in ranks[1:]] == [Verdict(message="two", at=4)] * 2
