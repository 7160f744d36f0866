"""Remote write: what becomes of it when the receiver is in a bad mood, the ring too small or the monitor killed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradiometer_monitor.store import Store
from tests._push import OK, Push, is_stale, pushing, recent, values
from tests._receivers import Stub, Written, serve

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, Start, Train, WaitUntil, WriteRun


@pytest.fixture
def push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Push]:
    """Give a function that makes a service for a receiver's URL."""
    with pushing(tmp_path, monkeypatch) as make:
        yield make


@pytest.fixture
def taking() -> Iterator[Stub]:
    """Give a receiver that takes everything."""
    with serve(lambda _: OK) as stub:
        yield stub


def test_a_restart_goes_on_where_it_was(
    push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """Another monitor with the same store sends what is new, and nothing again."""
    store = Store(None)
    recorder = write_run(make_manifest("run"), np.ones((3, 4)), time_ns=recent(3))
    push(taking.url, store=store).work()
    append(recorder, np.ones((2, 4)), time_ns=recent(5)[3:])
    recorder.close()
    pusher = push(taking.url, store=store)
    pusher.work()
    assert values(taking, "gradiometer_step_number") == [0, 1, 2, 3, 4]


def test_a_receiver_that_closes_after_its_answer_has_taken_the_rows(
    push: Push, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """An answer is an answer, though the connection ends with it: nothing is sent twice, and the receiver is up."""
    with serve(lambda _: (204, b"", {"Connection": "close"})) as closing:
        write_run(make_manifest("run"), np.ones((3, 4)), time_ns=recent(3), close=True)
        pusher = push(closing.url)
        pusher.work()
        pusher.work()
        assert values(closing, "gradiometer_step_number") == [0, 1, 2]
        assert pusher.count("up") == 1


def test_what_was_sent_before_a_crash_is_sent_the_same(
    push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the last cursor the same samples come again, with the same timestamps, those that were moved too."""
    store = Store(None)
    write_run(make_manifest("run"), np.ones((6, 4)), time_ns=recent(6, apart_ns=100_000), close=True)
    pusher = push(taking.url, store=store)
    monkeypatch.setattr(pusher.service, "_settle", lambda _: pusher.service.stopping.set())  # killed before the note
    pusher.work()
    first = dict(taking.taken)
    taking.taken = {}
    push(taking.url, store=store).work()
    (before,), (after,) = (
        [v for k, v in each.items() if "step_number" in dict(k)["__name__"]] for each in (first, taking.taken)
    )
    assert [time for time, _ in before[:6]] == list(range(before[0][0], before[0][0] + 6))
    assert after[:6] == before[:6]


def test_rows_that_the_ring_overtook_are_counted(
    push: Push, make_manifest: MakeManifest, write_run: WriteRun, append: Append, wait_until: WaitUntil
) -> None:
    """What the ring lost while the receiver was away is counted and told once; what it holds arrives."""
    away = True
    with serve(lambda _: (503, b"", {}) if away else OK) as stub:
        recorder = write_run(make_manifest("run", capacity=64), np.ones((1, 4)), time_ns=recent(1))
        pusher = push(stub.url)
        pusher.work()
        append(recorder, np.ones((199, 4)), time_ns=recent(200)[1:])
        pusher.work()
        assert pusher.count("pending_rows") == 200
        assert pusher.count("up") == 0
        recorder.close()
        away = False
        pusher.until(wait_until, lambda: pusher.count("pending_rows") == 0)
        sent, lost = pusher.count("rows_sent_total"), pusher.count("rows_dropped_total", "overtaken")
        assert (sent, lost) == (64, 136)
        assert values(stub, "gradiometer_step_number") == [float(step) for step in range(136, 200)]
        told = [event for event in pusher.context.store.events() if event.kind == "rows_not_pushed"]
        assert ["136 rows" in event.message for event in told] == [True]


def test_torn_rows_are_counted_and_passed_over(
    push: Push, taking: Stub, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """Rows that a crash destroyed stop nothing."""
    manifest = make_manifest("run")
    write_run(manifest, np.ones((9, 4)), time_ns=recent(9), close=True)
    with (tmp_path / "run/rank-00000/steps.ring").open("r+b") as ring:
        ring.seek(4096 + 2 * manifest.ring.dtype.itemsize)
        ring.write(b"\0" * (3 * manifest.ring.dtype.itemsize))
    pusher = push(taking.url)
    pusher.work()
    assert values(taking, "gradiometer_step_number") == [0, 1, 5, 6, 7, 8]
    assert pusher.count("rows_dropped_total", "unreadable") == 3


def test_a_poisoned_sample_is_found_alone(
    push: Push, make_manifest: MakeManifest, write_run: WriteRun, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a batch that is refused for one sample the rest arrives, in order; the sample is counted and told of."""
    times = recent(300)
    bad = times[123] // 10**6

    def answer(written: Written) -> tuple[int, bytes, dict[str, str]]:
        poisoned = any(
            ("layer", "head") in labels and bad in (time for time, _ in samples) for labels, samples in written.items()
        )
        return (400, b"no\x1b[31m\nsuch sample", {}) if poisoned else OK

    with serve(answer) as stub:
        pusher = push(stub.url)
        pusher.work()
        manifest = make_manifest("run", capacity=512, created_ns=time.time_ns())
        write_run(manifest, np.ones((300, 4)), time_ns=times, close=True, step_seconds=1.0)
        for _ in range(3):
            pusher.work()
        assert pusher.count("samples_failed_total", "rejected") == 1
        assert pusher.count("rows_sent_total") == 300
        assert values(stub, "gradiometer_step_number") == list(range(300))
        for labels, samples in stub.taken.items():
            expected = 300 - (("layer", "head") in labels)
            if "probe" not in dict(labels)["__name__"]:
                assert len([each for each in samples if not is_stale(each[1])]) == expected
                assert [time for time, _ in samples] == sorted(time for time, _ in samples)
        assert len(stub.requests) < 60
    (line,) = [each.getMessage() for each in caplog.records if "refused" in each.getMessage()]
    assert f"at {bad} ms" in line
    assert "400 no [31m such sample" in line


def test_a_refused_series_does_not_make_every_batch_costly(
    push: Push, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """A series that is refused in batch after batch is left out for a while, and its samples counted."""

    def answer(written: Written) -> tuple[int, bytes, dict[str, str]]:
        return (400, b"", {}) if any(("layer", "head") in labels for labels in written) else OK

    with serve(answer) as stub:
        recorder = write_run(make_manifest("run"), np.empty((0, 4)))
        pusher = push(stub.url)
        for step, time_ns in enumerate(recent(12)):
            append(recorder, np.ones((1, 4)), time_ns=[time_ns])
            pusher.work()
            if step == 6:
                before = len(stub.requests)
        assert pusher.count("samples_failed_total", "rejected") == 3
        assert pusher.count("samples_failed_total", "quarantined") == 8
        assert len(stub.requests) - before == 5
        assert values(stub, "gradiometer_step_number") == list(range(11))


def test_a_receiver_that_refuses_everything_loses_nothing(
    push: Push, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil
) -> None:
    """While the probe is refused as well, the fault is not the samples': they wait, and arrive."""
    refusing = True
    with serve(lambda _: (500, b"disk full", {}) if refusing else OK) as stub:
        write_run(make_manifest("run"), np.ones((5, 4)), time_ns=recent(5), close=True)
        pusher = push(stub.url)
        pusher.until(wait_until, lambda: len(stub.requests) > 8)
        refusing = False
        pusher.until(wait_until, lambda: pusher.count("rows_sent_total") == 5)
        assert pusher.count("samples_failed_total", "rejected") == 0
        assert values(stub, "gradiometer_step_number") == [0, 1, 2, 3, 4]


def test_an_unanswered_batch_that_was_taken_is_not_lost(
    push: Push, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil
) -> None:
    """A receiver that keeps order refuses what it has had: that is counted as repeated, and the rest is sent."""
    newest: dict[Any, int] = {}
    lose = [False]

    def answer(written: Written) -> tuple[int, bytes, dict[str, str]] | None:
        if any(samples[0][0] < newest.get(labels, 0) for labels, samples in written.items()):
            return 400, b"out of order", {}
        newest.update({labels: samples[-1][0] for labels, samples in written.items()})
        if any(dict(labels)["__name__"] == "gradiometer_step_number" for labels in written) and not lose[0]:
            lose[0] = True
            return None
        return OK

    times = recent(20)
    with serve(answer) as stub:
        write_run(make_manifest("run"), np.ones((20, 4)), time_ns=times, close=True)
        pusher = push(stub.url)
        pusher.until(wait_until, lambda: pusher.count("rows_sent_total") == 20)
        assert pusher.count("samples_failed_total", "rejected") == 0
        assert pusher.count("samples_failed_total", "repeated") > 0
        step_number = next(each for each in newest if "step_number" in dict(each)["__name__"])
        assert newest[step_number] >= times[-1] // 10**6


@pytest.mark.parametrize(
    "answer",
    [
        (429, b"slow down", {"Retry-After": "0"}),
        (503, b"", {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        (302, b"", {"Location": "http://elsewhere.invalid/"}),
        (401, b"who are you", {}),
        (404, b"x" * 100_000, {}),
        None,
    ],
    ids=["429", "503", "redirect", "401", "404", "closes"],
)
def test_what_is_not_the_samples_fault_is_tried_again(
    push: Push, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil, answer: Any
) -> None:
    """Rows wait while the receiver is busy, misconfigured or gone, and all arrive after it."""
    failing = True
    with serve(lambda _: answer if failing else OK) as stub:
        write_run(make_manifest("run"), np.ones((5, 4)), time_ns=recent(5), close=True)
        pusher = push(stub.url)
        pusher.until(wait_until, lambda: pusher.count("requests_total", "later") >= 3)
        assert stub.taken == {}
        failing = False
        pusher.until(wait_until, lambda: pusher.count("rows_sent_total") == 5)
        assert values(stub, "gradiometer_step_number") == [0, 1, 2, 3, 4]
        assert pusher.count("up") == 1


def test_a_receiver_may_close_after_each_answer(
    push: Push, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil
) -> None:
    """What is taken is sent once, also where a receiver, or a proxy before it, keeps no connection."""
    with serve(lambda _: (200, b"", {"Connection": "close"})) as stub:
        write_run(make_manifest("run"), np.ones((5, 4)), time_ns=recent(5), close=True)
        pusher = push(stub.url)
        pusher.until(wait_until, lambda: pusher.count("rows_sent_total") == 5)
        assert pusher.count("requests_total", "later") == 0
        assert values(stub, "gradiometer_step_number") == [0, 1, 2, 3, 4]


def test_retry_after_is_honoured(push: Push, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A receiver that asks for a pause is not asked before it is over."""
    with serve(lambda _: (429, b"", {"Retry-After": "600"})) as stub:
        write_run(make_manifest("run"), np.ones((5, 4)), time_ns=recent(5))
        pusher = push(stub.url)
        for _ in range(5):
            pusher.work()
        assert len(stub.requests) == 1


@pytest.mark.parametrize("reply", [b"", b"garbage\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nxx"])
def test_a_receiver_that_hangs_or_talks_nonsense(
    push: Push, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil, reply: bytes
) -> None:
    """It costs a timeout and nothing else; another receiver gets everything meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as server, serve(lambda _: OK) as other:
        connections: list[socket.socket] = []

        def hang() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connections.append(connection)
                with suppress(ConnectionError):  # it may have been given up by now
                    connection.sendall(reply)

        thread = threading.Thread(target=hang)
        thread.start()
        write_run(make_manifest("run"), np.ones((5, 4)), time_ns=recent(5), close=True)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        stuck = push(url, timeout_seconds=0.2, name="db")
        well = push(other.url)
        stuck.service.start()
        well.until(wait_until, lambda: well.count("rows_sent_total") == 5)
        wait_until(lambda: stuck.count("requests_total", "later") >= 2)
        stuck.service.stop()
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in connections:
            connection.close()
    assert stuck.count("rows_sent_total") == 0


def test_a_clean_stop_sends_what_is_there(
    push: Push,
    taking: Stub,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    append: Append,
    wait_until: WaitUntil,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that came after the last look are sent before the end."""
    monkeypatch.setattr("gradiometer_monitor.remote_write.service.GRACE_SECONDS", 60.0)
    recorder = write_run(make_manifest("run"), np.ones((3, 4)), time_ns=recent(3))
    pusher = push(taking.url, flush_seconds=3600)
    pusher.runs.poll()
    pusher.service.start()
    wait_until(lambda: pusher.count("rows_sent_total") == 2)
    append(recorder, np.ones((2, 4)), time_ns=recent(5)[3:])
    recorder.close()
    pusher.service.stop(60)
    assert values(taking, "gradiometer_step_number") == [0, 1, 2, 3, 4]


def test_a_crash_between_answer_and_note_spoils_nothing(
    push: Push, make_manifest: MakeManifest, write_run: WriteRun, append: Append, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next monitor finds that a receiver that keeps order had those rows, and sends it the rest."""
    newest: dict[Any, int] = {}

    def answer(written: Written) -> tuple[int, bytes, dict[str, str]]:
        if any(samples[0][0] < newest.get(labels, 0) for labels, samples in written.items()):
            return 400, b"out of order", {}
        newest.update({labels: samples[-1][0] for labels, samples in written.items()})
        return OK

    with serve(answer) as stub:
        store = Store(None)
        recorder = write_run(make_manifest("run"), np.ones((30, 4)), time_ns=recent(30))
        first = push(stub.url, store=store)
        monkeypatch.setattr(first.service, "_settle", lambda _: first.service.stopping.set())
        first.work()
        append(recorder, np.ones((10, 4)), time_ns=recent(40)[30:])
        pusher = push(stub.url, store=store)
        pusher.work()
        assert values(stub, "gradiometer_step_number") == [*range(29), 28, *range(29, 39)]
        assert pusher.count("samples_failed_total", "rejected") == 0
        assert pusher.count("samples_failed_total", "repeated") > 0
        assert pusher.count("rows_sent_total") == 39


def test_the_daemon_serves_and_ends_while_the_receiver_is_away(
    start: Start, train: Train, make_manifest: MakeManifest, wait_until: WaitUntil, tmp_path: Path, free_port: int
) -> None:
    """A receiver that nobody runs costs the scrape nothing, is said once, and does not hold up the end."""
    config = tmp_path.with_name(f"{tmp_path.name}-config.yaml")
    config.write_text(f"remote_write: [{{name: away, url: 'http://127.0.0.1:{free_port}/', flush_seconds: 0.1}}]\n")
    train(make_manifest("run"), 5)
    monitor = start("--config", str(config))
    prefix, found = "gradiometer_remote_write", dict[tuple[str, tuple[str, ...]], float]()

    def refused_with_rows_in_wait() -> bool:
        found.update(monitor.samples())
        pending = found[f"{prefix}_pending_rows", ("away",)]
        return found[f"{prefix}_requests_total", ("away", "later")] >= 2 and pending == 5

    wait_until(refused_with_rows_in_wait)
    assert found[f"{prefix}_up", ("away",)] == 0
    assert found["gradiometer_collector_success", ("remote_write_away",)] == 1
    assert found["gradiometer_steps_total", ("run",)] == 5
    said = monitor.end()
    assert said.count("receiver away takes no samples") == 1
    assert "Traceback" not in said
