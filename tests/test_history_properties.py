"""Down-sampled rows against a loop over what was written, however it wrapped, was torn, and was asked for."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradiometer.recorder import Recorder
from gradiometer.records import HEADER_BYTES, Manifest, RingGeometry, RingReader, Rows
from gradiometer_monitor.web import history
from gradiometer_monitor.web.history import History, Selection, Source, Window

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, WriteRun

NAN, INF = math.nan, math.inf
STAT = "grad_norm_preclip"
norm = st.sampled_from([NAN, INF, 0.0, -0.0]) | st.floats(2**-10, 2**10, width=32)
batches = st.lists(
    st.tuples(st.lists(st.tuples(norm, norm), min_size=1, max_size=60), st.sets(st.integers(0, 59), max_size=4)),
    min_size=1,
    max_size=5,
)
questions = st.builds(
    Selection,
    from_step=st.none() | st.integers(0, 200),
    to_step=st.none() | st.integers(0, 200),
    after_sequence=st.none() | st.integers(0, 200),
    points=st.integers(1, 80),
    level=st.integers(0, 5),
)


@contextmanager
def _recorder(manifest: Manifest) -> Iterator[Recorder]:
    with tempfile.TemporaryDirectory() as root:
        recorder = Recorder(Path(root), manifest)
        try:
            yield recorder
        finally:
            recorder.close()


def _history(recorder: Recorder, manifest: Manifest) -> History:
    return History(Source(path=recorder.path, identity=(0, 0), manifest=manifest), STAT)


def _tear(recorder: Recorder, ring: RingGeometry, sequence: int) -> None:
    """Spoil a row, as a crash does that loses a page of it."""
    with (recorder.path / "steps.ring").open("r+b") as file:
        os.pwrite(file.fileno(), b"\xff" * 8, HEADER_BYTES + (sequence - 1) % ring.capacity * ring.dtype.itemsize + 40)


def _peak(values: list[float]) -> float:
    return max((value for value in values if math.isfinite(value)), default=NAN)


def _assert_bucket(window: Window, place: int, held: dict[int, tuple[float, float]]) -> None:
    """Compare a bucket with the rows that it says it holds, by sequence."""
    scalars, size = window.buckets.scalars[place], 2**window.level
    aligned = (int(scalars["first"]) - 1) // size * size
    rows = [row for sequence in range(aligned + 1, aligned + size + 1) if (row := held.get(sequence)) is not None]
    totals = [math.sqrt(row[0] ** 2 + row[1] ** 2) for row in rows]
    assert scalars["rows"] == len(rows)
    np.testing.assert_equal(float(scalars[STAT]), _peak(totals))
    assert scalars["nonfinite_steps"] == sum(not math.isfinite(total) for total in totals)
    for layer in range(2):
        norms = [row[layer] for row in rows]
        found = float(window.buckets.layers[place, layer])
        there = [value for value in norms if value != 0 or math.copysign(1, value) > 0]
        np.testing.assert_equal(found, _peak(there) if there else -0.0)
        assert window.buckets.bad[place, layer] == any(not math.isfinite(value) for value in norms)


@settings(max_examples=60)
@given(
    batches=batches,
    asked=st.lists(questions, min_size=5, max_size=5),
    capacity=st.integers(2, 96),
    base=st.integers(1, 64),
)
def test_any_question_between_any_writes(
    make_manifest: MakeManifest, append: Append, batches: list[Any], asked: list[Selection], capacity: int, base: int
) -> None:
    """Whatever was kept of earlier answers, each bucket of what the ring holds is that of its rows, and none misses."""
    manifest = make_manifest(layers=("a", "b"), capacity=capacity)
    with pytest.MonkeyPatch.context() as patch, _recorder(manifest) as recorder:
        patch.setattr(history, "BASE_BUCKETS", base)
        patch.setattr(history, "BASE_BUCKETS_LEAST", 1)
        patch.setattr(history, "CHUNK_BYTES", 7 * manifest.ring.dtype.itemsize)
        known, held = _history(recorder, manifest), dict[int, tuple[float, float]]()
        for (norms, torn), question in zip(batches, asked, strict=False):
            before = recorder.status.head
            append(recorder, np.array(norms, np.float32), loss=NAN)
            held |= {before + 1 + place: row for place, row in enumerate(norms)}
            for sequence in {before + 1 + place for place in torn if place < len(norms) - 1}:
                if sequence > recorder.status.head - capacity:
                    _tear(recorder, manifest.ring, sequence)
                    del held[sequence]
            oldest = max(1, recorder.status.head + 1 - capacity)
            window = known.select(question)
            assert window.head == recorder.status.head
            _assert_answer(window, question, oldest, held)


def _assert_answer(window: Window, asked: Selection, oldest: int, held: dict[int, tuple[float, float]]) -> None:
    size, scalars = 2**window.level, window.buckets.scalars
    assert len(scalars) <= asked.points
    assert window.level >= asked.level
    wanted = [
        sequence
        for sequence in held
        if sequence >= oldest
        and (asked.after_sequence is None or sequence > asked.after_sequence)
        and (asked.from_step is None or sequence - 1 >= asked.from_step)
        and (asked.to_step is None or sequence - 1 <= asked.to_step)
    ]
    answered = ((scalars["first"] - 1) // size).tolist()
    assert answered == sorted(set(answered))
    assert {(sequence - 1) // size for sequence in wanted} <= set(answered)
    for place, number in enumerate(answered):
        if number * size + 1 >= oldest:
            _assert_bucket(window, place, held)


def test_a_writer_that_laps_a_reader_doubles_no_row(
    make_manifest: MakeManifest, write_run: WriteRun, append: Append, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that the ring gives up while it is read are missed, and those after them counted once."""
    manifest = make_manifest(capacity=64)
    recorder = write_run(manifest, np.ones((100, 4)))
    monkeypatch.setattr(history, "CHUNK_BYTES", 16 * manifest.ring.dtype.itemsize)
    read = RingReader.read

    def late(reader: RingReader, after: int = 0, limit: int | None = None) -> Rows:
        append(recorder, np.ones((5, 4)))
        return read(reader, after, limit)

    monkeypatch.setattr(RingReader, "read", late)
    window = _history(recorder, manifest).select(Selection())
    firsts = window.buckets.scalars["first"].tolist()
    assert firsts == sorted(set(firsts))
    assert window.buckets.scalars["rows"].tolist() == [1] * len(firsts)
