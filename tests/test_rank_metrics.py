"""What the monitor exports of ranks beside each other, of non-finite updates and of steps skipped in a row."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from gradiometer.records import Flag
from gradiometer.tail import RankTail
from gradiometer.windows import LongestStreak
from gradiometer_monitor.exposition.exposition import Exposition
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.store import Store
from tests._training import attach, batch, small_model

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, WaitUntil, WriteRun

INF, NAN = math.inf, math.nan
SECOND = 10**9
START_NS = 1_700_000_000 * SECOND
BAD, SKIPPED, ZEROED, FAILED = int(Flag.NONFINITE), int(Flag.SKIPPED), int(Flag.ZEROED), int(Flag.FAILED)
Samples = dict[tuple[str, ...], float]


class Monitored:
    """The runs below a directory, as a monitor with a store follows and exports them; may be started anew."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.start()

    def start(self) -> None:
        self._store = Store(self._root / ".monitor")
        self._runs = Runs(self._root, retention_seconds=1e12, store=self._store)
        self._exposition = Exposition(self._runs, series_budget=1000)

    def restart(self) -> None:
        """Begin anew, from what was kept."""
        self.close()
        self.start()

    def close(self) -> None:
        self._runs.close()
        self._store.close()

    def samples(self) -> Samples:
        """Read what came and scrape: values by name without its prefix and labels other than the run's."""
        while self._runs.poll():
            pass
        found = [s for f in text_string_to_metric_families(self._exposition.render().decode()) for s in f.samples]
        kept = [each for each in found if each.labels.pop("run_id", None) is not None]
        return {(each.name.removeprefix("gradiometer_"), *each.labels.values()): each.value for each in kept}

    def by_rank(self, name: str) -> dict[int, float]:
        """Map each rank that has it to its value of a metric."""
        return {int(key[1]): value for key, value in self.samples().items() if key[0] == f"rank_{name}"}


@pytest.fixture
def monitored(tmp_path: Path) -> Iterator[Monitored]:
    """Follow the runs below ``tmp_path``."""
    found = Monitored(tmp_path)
    yield found
    found.close()


@pytest.fixture
def write_rank(make_manifest: MakeManifest, write_run: WriteRun) -> Callable[..., Any]:
    """Give a function that writes one rank of four, a row for each of the ``norms`` of its first parameter."""

    def write(rank: int, norms: list[float], *, late: float = 0.0, **columns: Any) -> Any:
        manifest = make_manifest(rank=rank, world_size=4, process_start=1.0, layers=("a",))
        times = [START_NS + step * SECOND + int(late * SECOND) for step in range(len(norms))]
        return write_run(manifest, np.array(norms)[:, None], time_ns=times, **columns)

    return write


def test_ranks_are_compared_at_the_steps_that_both_have(
    monitored: Monitored, write_rank: Callable[..., Any], append: Append
) -> None:
    """A rank whose rows came late is behind, and not far off: what it has is compared, and the rest when it comes."""
    write_rank(0, [1.0, 2.0, 3.0, 4.0])
    recorder = write_rank(1, [1.0, 2.0], late=0.5)
    assert monitored.by_rank("norm_deviation") == {0: 0, 1: 0}
    assert monitored.by_rank("steps_behind") == {0: 0, 1: 2}
    assert monitored.by_rank("lag_seconds") == pytest.approx({0: 0, 1: 0.5})
    append(recorder, [[3.0], [5.0]], time_ns=[START_NS + 3 * SECOND, START_NS + 4 * SECOND])
    assert monitored.by_rank("norm_deviation") == pytest.approx({0: 0.5 / 4.5, 1: 0.5 / 4.5})
    assert monitored.by_rank("steps_behind") == {0: 0, 1: 0}
    assert monitored.by_rank("lag_seconds") == pytest.approx({0: 0, 1: (0.5 + 0.5 + 1 + 1) / 4})


def test_one_rank_is_compared_with_nobody(
    monitored: Monitored, write_rank: Callable[..., Any], wait_until: WaitUntil
) -> None:
    """Until another rank comes, late as it may be, nothing is said; then of both."""
    write_rank(0, [1.0] * 20)
    assert not [key for key in monitored.samples() if key[0].startswith("rank_")]
    write_rank(3, [1.0] * 15 + [NAN] + [1.0] * 4)
    wait_until(lambda: monitored.by_rank("norm_deviation") == {0: 0, 3: INF})


def test_a_rank_that_died_is_behind_and_no_longer_compared(
    monitored: Monitored, write_rank: Callable[..., Any], append: Append
) -> None:
    """It stays as far behind as it is, while its norms leave the window with the steps of the others."""
    living = [write_rank(rank, [1.0] * 30) for rank in (0, 1)]
    write_rank(2, [1.0] * 10 + [7.0])
    assert monitored.by_rank("norm_deviation") == {0: 0, 1: 0, 2: 6}
    for recorder in living:
        append(recorder, [[1.0]] * 60)
    assert monitored.by_rank("norm_deviation") == {0: 0, 1: 0}
    assert monitored.by_rank("steps_behind") == {0: 0, 1: 0, 2: 79}


def test_a_rank_of_an_earlier_start_is_left_out(
    monitored: Monitored, make_manifest: MakeManifest, write_run: WriteRun, write_rank: Callable[..., Any]
) -> None:
    """What a run that was started again has left has steps of the same numbers, and they are others."""
    write_rank(2, [9.0] * 20)
    later: dict[str, Any] = {"created_ns": START_NS + 40 * SECOND, "world_size": 4, "layers": ("a",)}
    times = [START_NS + (41 + step) * SECOND for step in range(5)]
    for rank in (0, 1):
        write_run(make_manifest(rank=rank, **later), [[1.0]] * 5, time_ns=times)
    assert monitored.by_rank("norm_deviation") == {0: 0, 1: 0}
    assert monitored.by_rank("steps_behind") == {0: 0, 1: 0}


def test_a_restart_of_the_monitor_changes_nothing(monitored: Monitored, write_rank: Callable[..., Any]) -> None:
    """Windows are read from the rings again, and what was counted is kept."""
    flags = [BAD, 0, SKIPPED, SKIPPED, BAD | SKIPPED, 0]
    for rank in range(3):
        write_rank(rank, [NAN, 1.0, 2.0, 1.0 + rank, INF, 1.0], late=rank / 8, flags=flags)
    before = monitored.samples()
    assert before["nonfinite_updates_total",] == 1
    assert before["skipped_steps_in_a_row",] == 3
    monitored.restart()
    after = monitored.samples()
    assert {key: value for key, value in after.items() if key in before} == before
    assert before.keys() == after.keys()


def test_updates_outlive_the_ring(
    monitored: Monitored, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """What was counted and has left the ring while no monitor ran is still counted."""
    recorder = write_run(make_manifest(capacity=8, layers=("a",)), [[NAN]] * 3, flags=BAD)
    assert monitored.samples()["nonfinite_updates_total",] == 3
    monitored.close()
    append(recorder, [[1.0]] * 20)
    append(recorder, [[NAN]], flags=BAD)
    monitored.start()
    assert monitored.samples()["nonfinite_updates_total",] == 4


def test_origins_are_the_lowest_ranks_and_outlive_the_ring(
    monitored: Monitored, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """Where NaN began is counted by layer, sparsely, and not lost when the ring turns while no monitor runs."""

    def origins() -> dict[str, float]:
        return {key[1]: value for key, value in monitored.samples().items() if key[0] == "nonfinite_origin_total"}

    layers = ("a", "b", "b", "c")
    first = {0: [2, -1, 1, 0], 1: [3, 3, 3, 3]}
    recorders = [
        write_run(make_manifest(rank=rank, world_size=2, capacity=8, layers=layers), [[1.0] * 4], first_nonfinite=-1)
        for rank in first
    ]
    assert origins() == {}
    for rank, recorder in enumerate(recorders):
        append(recorder, [[NAN] * 4] * 4, first_nonfinite=first[rank])
    assert origins() == {"b": 2, "a": 1}
    monitored.close()
    append(recorders[0], [[1.0] * 4] * 20)
    append(recorders[0], [[NAN] * 4], first_nonfinite=1)
    monitored.start()
    assert origins() == {"b": 3, "a": 1}
    monitored.restart()
    assert origins() == {"b": 3, "a": 1}


def test_counts_of_an_earlier_version_are_gone_on_from(make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A monitor that did not count updates or origins has left counts without; nothing else of them is lost."""
    recorder = write_run(make_manifest(layers=("a",)), [[1.0], [NAN]], flags=[0, BAD], first_nonfinite=[-1, 0])
    tail = RankTail(recorder.path)
    tail.poll()
    counts = json.loads(json.dumps(tail.summary.counts()))
    tail.close()
    assert counts.pop("nonfinite_updates") == 1
    assert counts.pop("origins") == {"0": 1}
    later = RankTail(recorder.path, lambda _: counts)
    later.poll()
    later.close()
    assert later.summary.nonfinite_updates == 0
    assert later.summary.layers.origins.newest(1) == []
    assert later.summary.grad_norm.cumulative[-1] == 2


@pytest.mark.parametrize(
    ("flags", "postclip", "used"),
    [
        (0, 1.0, 0),
        (BAD, NAN, 1),
        (BAD, INF, 1),
        (BAD | SKIPPED, 0.0, 0),
        (BAD | ZEROED, 0.5, 0),
        (BAD, 0.5, 0),
        (BAD | FAILED, NAN, 0),
        (0, INF, 0),
    ],
)
def test_an_update_is_non_finite_by_what_was_applied(
    monitored: Monitored, write_rank: Callable[..., Any], flags: int, postclip: float, used: int
) -> None:
    """Neither a skipped step counts, nor one whose gradients were replaced, nor a norm that overflowed by itself."""
    write_rank(0, [1.0, 1.0], flags=[0, flags], grad_norm_postclip=[1.0, postclip])
    assert monitored.samples()["nonfinite_updates_total",] == used


@pytest.mark.parametrize(
    ("policy", "clips", "used"),
    [(None, False, 2), (["nonfinite"], False, 0), ([{"nonfinite": {"action": "zero"}}], False, 0), (None, True, 2)],
)
def test_updates_of_a_real_training(monitored: Monitored, tmp_path: Path, policy: Any, clips: bool, used: int) -> None:
    """Two bad steps of five moved the parameters unless a policy kept them from it; the parameters say so too."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy=policy):
        for step in range(5):
            optimizer.zero_grad()
            (model(batch(step)).square().mean() * (NAN if step > 2 else 1.0)).backward()
            if clips:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    assert monitored.samples()["nonfinite_updates_total",] == used
    assert all(bool(p.isfinite().all()) for p in model.parameters()) == (used == 0)


@given(
    steps=st.lists(st.tuples(st.integers(0, 40), st.booleans(), st.integers(0, 2)), min_size=1, max_size=60),
    cut=st.integers(0, 60),
)
def test_the_longest_streak_like_a_loop(steps: list[tuple[int, bool, int]], cut: int) -> None:
    """Of each optimizer by itself, whichever way the rows were cut, and no older than the window and a bucket."""
    times = np.cumsum([seconds for seconds, _, _ in steps]).astype(np.int64) * SECOND
    so, optimizers = np.array([each for _, each, _ in steps]), np.array([each for _, _, each in steps])
    streak = LongestStreak()
    for part in (slice(cut), slice(cut, None)):
        if len(times[part]):
            streak.add(times[part], so[part], optimizers[part])
    lengths, found = [0, 0, 0], []
    for (_, each, optimizer), time in zip(steps, times.tolist(), strict=True):
        lengths[optimizer] = lengths[optimizer] + 1 if each else 0
        found.append((time, lengths[optimizer]))

    def longest(reach: int) -> int:
        return max(length for time, length in found if times[-1] - time < reach)

    assert longest(60 * SECOND) <= streak.rows <= longest(62 * SECOND)


def test_skipped_steps_in_a_row_are_seen_until_the_window_has_passed(
    monitored: Monitored, write_rank: Callable[..., Any], append: Append
) -> None:
    """A streak that goes on counts as it grows; when it is over, its length stays for a minute."""
    recorder = write_rank(0, [1.0] * 4, flags=[0, SKIPPED, SKIPPED, SKIPPED])
    assert monitored.samples()["skipped_steps_in_a_row",] == 3
    append(recorder, [[1.0]] * 2, flags=[SKIPPED, 0])
    assert monitored.samples()["skipped_steps_in_a_row",] == 4
    append(recorder, [[1.0]] * 57)
    assert monitored.samples()["skipped_steps_in_a_row",] == 4
    append(recorder, [[1.0]] * 6)
    assert monitored.samples()["skipped_steps_in_a_row",] == 0
