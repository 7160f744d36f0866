"""Ranks beside each other, against plain Python that walks the steps one by one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradiometer.comparison import TRAIL_STEPS, StepTrail, Trail, compare
from gradiometer.metrics import WINDOW_SECONDS
from gradiometer.records import RingGeometry, Rows

INF, NAN = math.inf, math.nan
SECOND = 10**9
WINDOW = int(WINDOW_SECONDS * SECOND)
START = 1_700_000_000 * SECOND
DTYPE = RingGeometry(capacity=2, parameters=1).dtype

Step = tuple[int, int, float]
"""Number, time in nanoseconds, norm."""


def rows_of(steps: Sequence[Step]) -> Rows:
    """Make rows, as far as a trail looks at them."""
    rows = np.zeros(len(steps), DTYPE)
    for name, column in zip(("step", "time_ns", "grad_norm_preclip"), zip(*steps, strict=True), strict=True):
        rows[name] = column
    return rows


def trail_of(steps: Sequence[Step]) -> Trail:
    trail = StepTrail()
    if steps:
        trail.add(rows_of(steps))
    return trail.newest


def every_second(norms: Sequence[float], first: int = 0, late: float = 0.0) -> list[Step]:
    """Take one step a second, each ``late`` seconds late."""
    return [(step, START + step * SECOND + round(late * SECOND), norm) for step, norm in enumerate(norms, start=first)]


def by_hand(ranks: Sequence[Sequence[Step]]) -> tuple[list[float], list[float]]:
    """Work out deviation and lag of each rank in float64, step by step; NaN where nothing can be said."""
    newest = max((steps[-1][1] for steps in ranks if steps), default=0)
    tables = [{step: (time, norm) for step, time, norm in steps if newest - time < WINDOW} for steps in ranks]
    deviations: list[list[float]] = [[] for _ in ranks]
    lags: list[list[float]] = [[] for _ in ranks]
    for step in sorted(set().union(*tables)):
        there = [rank for rank, table in enumerate(tables) if step in table]
        if len(there) < 2:
            continue
        finite = [tables[rank][step][1] for rank in there if math.isfinite(tables[rank][step][1])]
        first = min(tables[rank][step][0] for rank in there)
        for rank in there:
            time, norm = tables[rank][step]
            lags[rank].append((time - first) / SECOND)
            deviations[rank].append(_deviation(norm, finite))
    return [max(each, default=NAN) for each in deviations], [statistics.fmean(each) if each else NAN for each in lags]


def _deviation(norm: float, finite: list[float]) -> float:
    if not math.isfinite(norm):
        return INF if finite else 0.0
    middle = statistics.median(finite)
    if norm == middle:
        return 0.0
    return abs(norm - middle) / middle if middle else INF


@st.composite
def ranks_of_a_run(draw: st.DrawFn) -> list[list[Step]]:
    """Draw ranks that begin and end at different steps, lose some, drift apart in time, and disagree here and there."""
    ranks = []
    apart = draw(st.sampled_from([SECOND // 20, 3 * SECOND]))
    for _ in range(draw(st.integers(1, 5))):
        steps = sorted(draw(st.sets(st.integers(0, 40), max_size=40)))
        late = draw(st.integers(0, 5 * SECOND))
        norms = st.floats(0, 1e300, allow_subnormal=False) | st.sampled_from([1.0, 0.0, NAN, INF])
        ranks.append([(step, START + step * apart + late, draw(norms)) for step in steps])
    return ranks


@given(ranks=ranks_of_a_run())
def test_ranks_are_compared_like_by_hand(ranks: list[list[Step]]) -> None:
    """Deviation and lag are those of a walk over the steps, whichever ranks have them."""
    found = compare([trail_of(steps) for steps in ranks])
    deviation, lag = by_hand(ranks)
    assert found.deviation.tolist() == pytest.approx(deviation, rel=1e-12, nan_ok=True)
    assert found.lag_seconds.tolist() == pytest.approx(lag, abs=1e-6, nan_ok=True)


@given(
    steps=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), min_size=1, max_size=80),
    cuts=st.lists(st.integers(0, 80), max_size=4),
)
def test_a_trail_does_not_depend_on_the_batches(steps: list[tuple[int, int]], cuts: list[int]) -> None:
    """Rows in one batch or in several leave the same trail: rising numbers, no older than the window."""
    times = np.cumsum([seconds for _, seconds in steps]).tolist()
    given_steps = [(step, START + time * SECOND, 1.0) for (step, _), time in zip(steps, times, strict=True)]
    whole, cut = StepTrail(), StepTrail()
    whole.add(rows_of(given_steps))
    edges = [0, *sorted(min(edge, len(steps)) for edge in cuts), len(steps)]
    for start, end in pairwise(edges):
        if start < end:
            cut.add(rows_of(given_steps[start:end]))
    found = whole.newest
    assert found.steps.tolist() == cut.newest.steps.tolist()
    assert found.time_ns.tolist() == cut.newest.time_ns.tolist()
    assert (np.diff(found.steps) > 0).all()
    assert found.time_ns[0] > found.time_ns[-1] - WINDOW
    assert found.steps[-1] == steps[-1][0]


def test_a_trail_is_bounded() -> None:
    """However fast the steps, no more than so many are kept, the newest."""
    trail = StepTrail()
    for first in range(0, 3 * TRAIL_STEPS, 5000):
        trail.add(rows_of([(step, START + step, 1.0) for step in range(first, first + 5000)]))
    last = int(trail.newest.steps[-1])
    assert trail.newest.steps.tolist() == list(range(last + 1 - TRAIL_STEPS, last + 1))


def test_the_rank_that_differs_stands_out() -> None:
    """Of four ranks the one whose norm is a tenth off once has a deviation of a tenth, the others none."""
    others = [2.0] * 20
    ranks = [every_second(others) for _ in range(3)] + [every_second([*others[:10], 2.2, *others[11:]])]
    assert compare([trail_of(steps) for steps in ranks]).deviation.tolist() == pytest.approx([0, 0, 0, 0.1])


@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_is_not_finite_on_one_rank_alone_is_infinitely_far(bad: float) -> None:
    """One rank's NaN is Inf on that rank; a NaN of all ranks is no difference."""
    fine, alone, together = every_second([1.0, 1.0, 1.0]), every_second([1.0, bad, 1.0]), every_second([bad] * 3)
    assert compare([trail_of(fine), trail_of(alone), trail_of(fine)]).deviation.tolist() == [0, INF, 0]
    assert compare([trail_of(together)] * 2).deviation.tolist() == [0, 0]


def test_a_difference_is_forgotten_after_the_window() -> None:
    """What lies further back than the window before the newest step of any rank says nothing of now."""
    one, other = [1.0] * 100, [9.0] + [1.0] * 99
    for length, deviation in ((60, pytest.approx([0.8, 0.8])), (61, [0, 0])):
        found = compare([trail_of(every_second(norms[:length])) for norms in (one, other)])
        assert found.deviation.tolist() == deviation


def test_a_rank_alone_is_compared_with_nothing() -> None:
    """One rank, ranks without a step, and ranks without a common one have neither deviation nor lag."""
    apart = [every_second([1.0] * 5), every_second([1.0] * 5, first=5)]
    cases: list[list[list[Step]]] = [[apart[0]], [[], []], apart]
    for ranks in cases:
        found = compare([trail_of(steps) for steps in ranks])
        assert np.isnan(found.deviation).all()
        assert np.isnan(found.lag_seconds).all()
    assert len(compare([]).deviation) == 0


def test_the_late_rank_is_told_from_the_first() -> None:
    """Lag is the mean time after whoever ended the step first, which need not be the same rank each time."""
    found = compare([trail_of(every_second([1.0] * 10, late=late)) for late in (0.25, 0.0, 0.5)])
    assert found.lag_seconds.tolist() == pytest.approx([0.25, 0, 0.5])
    turns = [[(step, START + step * SECOND + (step % 2 == rank) * 10**8, 1.0) for step in range(10)] for rank in (0, 1)]
    assert compare([trail_of(steps) for steps in turns]).lag_seconds.tolist() == pytest.approx([0.05, 0.05])


def test_steps_that_were_taken_again_are_not_compared_with_the_first_time() -> None:
    """Where a checkpoint was loaded, the same numbers of before are forgotten."""
    before, after = every_second([9.0] * 20), [(step, START + (30 + step) * SECOND, 1.0) for step in range(10, 15)]
    found = compare([trail_of([*before, *after]), trail_of([*every_second([3.0] * 20), *after])])
    assert found.deviation.tolist() == [0, 0]
