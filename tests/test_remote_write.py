"""Remote write: what is sent of a run, when, and what becomes of it when the receiver is in a bad mood."""

from __future__ import annotations

import base64
import math
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import trustme

from gradiometer.live.revisions import History, Revision, Slot, write_history
from gradiometer.metrics import CATALOGUE, PUSHED
from gradiometer.records import Flag
from gradiometer.run import open_run
from gradiometer_monitor.events import Events
from gradiometer_monitor.remote_write.clock import MAX_SHIFT_MS, place
from gradiometer_monitor.remote_write.protocol import MAX_VALUE_BYTES, LabelError, make_series
from gradiometer_monitor.remote_write.service import RemoteWrite
from gradiometer_monitor.remote_write.settings import RemoteWriteSettings
from gradiometer_monitor.runs import Runs
from gradiometer_monitor.services import Context
from gradiometer_monitor.settings import SettingsError, resolve
from gradiometer_monitor.store import Store
from tests._receivers import Stub, Written, serve

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, Start, Train, WaitUntil, WriteRun

NAN = float("nan")
STALE = 0x7FF0000000000002
OK = (204, b"", dict[str, str]())
Push = Callable[..., "Pusher"]


class Pusher:
    """A service that is worked by hand, over the runs of a directory."""

    def __init__(self, root: Path, store: Store, url: str, **settings: Any) -> None:
        self.runs = Runs(root, retention_seconds=900)
        self.context = Context(runs=self.runs, events=Events(self.runs, store), store=store)
        chosen = {"name": "db", "url": url, "timeout_seconds": 5, "backoff_max_seconds": 0.1} | settings
        self.service = RemoteWrite(RemoteWriteSettings.model_validate(chosen), self.context)

    def work(self) -> None:
        """Look at the runs and send what there is."""
        self.runs.poll()
        self.service.work()

    def count(self, name: str, *labels: str) -> float:
        """Return a metric of the service."""
        found = {(each, values): value for each, values, value in self.service.samples()}
        return found[f"gradiometer_remote_write_{name}", ("db", *labels)]

    def until(self, wait_until: WaitUntil, check: Callable[[], Any]) -> None:
        """Work until that is so."""

        def worked() -> Any:
            self.work()
            return check()

        wait_until(worked)

    def close(self) -> None:
        self.service.stopping.set()
        self.service.close()
        self.runs.close()


@pytest.fixture
def push(tmp_path: Path) -> Iterator[Push]:
    """Give a function that makes a service for a receiver's URL."""
    made: list[Pusher] = []

    def make(url: str, *, store: Store | None = None, **settings: Any) -> Pusher:
        made.append(Pusher(tmp_path, store or Store(None), url, **settings))
        return made[-1]

    yield make
    for pusher in made:
        pusher.close()


@pytest.fixture
def taking() -> Iterator[Stub]:
    """Give a receiver that takes everything."""
    with serve(lambda _: OK) as stub:
        yield stub


def recent(count: int, *, apart_ns: int = 10**9, ago: float = 600.0) -> list[int]:
    """Return times of rows, in nanoseconds, evenly spaced and on whole milliseconds."""
    first = int((time.time() - ago) * 1000) * 10**6
    return [first + place * apart_ns for place in range(count)]


def values(stub: Stub, name: str) -> list[float]:
    """Return the values of the only series of a metric, without stale markers."""
    (samples,) = stub.named(name)
    return [value for _, value in samples if not _stale(value)]


def _stale(value: float) -> bool:
    return struct.pack("<d", value) == struct.pack("<Q", STALE)


def test_every_step_with_its_own_time(
    push: Push, taking: Stub, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """Scalars, flags and norms of layers of each step arrive with the step's millisecond, once, with all labels."""
    times = recent(5)
    norms = np.random.default_rng(0).random((5, 4))
    norms[3, 0] = NAN
    write_run(make_manifest("run"), norms, close=True, time_ns=times, loss=[1.0, 2.0, NAN, 4.0, math.inf])
    pusher = push(taking.url, labels={"cluster": "a", "instance": "here"})
    pusher.work()
    pusher.work()
    run, ms = open_run(tmp_path / "run"), [each // 10**6 for each in times]
    assert values(taking, "gradiometer_step_number") == run.steps.tolist()
    assert values(taking, "gradiometer_step_grad_norm") == pytest.approx(run.grad_norm_preclip.tolist(), nan_ok=True)
    assert values(taking, "gradiometer_step_nonfinite") == [0, 0, 0, 1, 0]
    assert values(taking, "gradiometer_step_loss") == [1.0, 2.0, 4.0, math.inf]
    layers = {dict(labels)["layer"]: samples for labels, samples in taking.taken.items() if "layer" in dict(labels)}
    assert layers.keys() == set(run.layers)
    for place_of, layer in enumerate(run.layers):
        assert [time for time, _ in layers[layer][:5]] == ms
        expected = run.layer_norms()[:, place_of].tolist()
        assert [value for _, value in layers[layer][:5]] == pytest.approx(expected, rel=0, nan_ok=True)
    (labels,) = [dict(each) for each in taking.taken if ("__name__", "gradiometer_step_loss") in each]
    assert labels == {
        "__name__": "gradiometer_step_loss", "cluster": "a", "instance": "here", "job": "gradiometer", "rank": "0",
        "run_id": "run",
    }  # fmt: skip
    assert pusher.count("rows_sent_total") == 5


def test_what_is_sent_is_in_the_catalogue(
    push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """Every name and label that is sent is declared, and no name is one that is scraped."""
    manifest = make_manifest("run", policies=("clip",), policy={"pipeline": [{"global_norm": {"max_norm": 1.0}}]})
    recorder = write_run(manifest, np.empty((0, 4)))
    recorder.policies[:, 0] = 1.0, 0.5
    recorder.policies[:, 14] = 3.0, 0.25
    more = {"loss_scale": 8.0, "flags": int(Flag.CLIPPED | Flag.HOOKED)}
    append(recorder, np.ones((1, 4)), time_ns=recent(1), step_seconds=0.1, **more)
    recorder.close()
    stats = ("grad_norm_preclip", "grad_norm_postclip", "microbatch_norm")
    push(taking.url, layer_stats=stats, labels={"job": "", "instance": ""}).work()
    sent = {dict(labels)["__name__"]: set(dict(labels)) - {"__name__"} for labels in taking.taken}
    assert sent == {name: set(metric.labels) for name, metric in PUSHED.items()}
    families = {metric.family for metric in CATALOGUE.values()}
    assert not families & PUSHED.keys()


def test_a_run_that_is_over_is_marked_stale_once(
    push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """After its last sample every series gets the one NaN that ends it, and no other NaN has these bits."""
    loss = struct.unpack("<d", struct.pack("<Q", STALE))[0]
    write_run(make_manifest("run"), np.ones((3, 4)), close=True, time_ns=recent(3), loss=loss, flags=int(Flag.LOSS))
    pusher = push(taking.url)
    for _ in range(3):
        pusher.work()
    probe = taking.taken.pop(next(each for each in taking.taken if "probe" in dict(each)["__name__"]))
    assert [value for _, value in probe] == [1.0]
    for samples in taking.taken.values():
        assert [_stale(value) for _, value in samples] == [False] * (len(samples) - 1) + [True]
        assert samples[-1][0] - samples[-2][0] == 15_000
    assert [math.isnan(value) for _, value in taking.named("gradiometer_step_loss")[0]] == [True] * 4


def test_the_newest_row_waits_for_its_loss(
    push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """A row that its job may still amend is held back, and is sent with what came late."""
    recorder = write_run(make_manifest("run"), np.ones((2, 4)), time_ns=recent(2), loss=NAN)
    pusher = push(taking.url)
    pusher.work()
    assert values(taking, "gradiometer_step_number") == [0]
    recorder.amend(7.0)
    append(recorder, np.ones((1, 4)), time_ns=recent(3)[2:], loss=NAN)
    pusher.work()
    assert values(taking, "gradiometer_step_number") == [0, 1]
    assert values(taking, "gradiometer_step_loss") == [7.0]


def test_a_quiet_runs_newest_row_is_sent_and_again_if_amended(
    push: Push,
    taking: Stub,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    append: Append,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A job that pauses shows its last step; a loss that comes after that is not lost."""
    monkeypatch.setattr("gradiometer_monitor.remote_write.feed.SETTLE_SECONDS", 0.0)
    recorder = write_run(make_manifest("run"), np.ones((1, 4)), time_ns=recent(1), loss=NAN)
    pusher = push(taking.url)
    for _ in range(3):
        pusher.work()
    assert values(taking, "gradiometer_step_number") == [0]
    assert pusher.count("pending_rows") == 0
    recorder.amend(7.0)
    append(recorder, np.ones((1, 4)), time_ns=recent(2)[1:], loss=NAN)
    pusher.work()
    assert values(taking, "gradiometer_step_number") == [0, 0, 1]
    assert values(taking, "gradiometer_step_loss") == [7.0]
    assert pusher.count("rows_sent_total") == 1


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


@pytest.mark.parametrize(("backfill", "expected"), [(True, [2, 3, 4]), (False, [4])])
def test_where_a_run_that_was_there_begins(
    push: Push,
    taking: Stub,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    append: Append,
    backfill: bool,
    expected: list[int],
) -> None:
    """With what the ring holds, as far as the receiver takes it; or with now. History is not counted as lost."""
    old = recent(2, ago=7200.0)
    recorder = write_run(make_manifest("run"), np.ones((4, 4)), time_ns=[*old, *recent(2)])
    pusher = push(taking.url, backfill=backfill)
    pusher.work()
    append(recorder, np.ones((1, 4)), time_ns=recent(3)[2:])
    recorder.close()
    pusher.work()
    assert values(taking, "gradiometer_step_number") == expected
    assert pusher.count("rows_dropped_total", "too_old") == 0


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
                assert len([each for each in samples if not _stale(each[1])]) == expected
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

    with serve(answer) as stub:
        write_run(make_manifest("run"), np.ones((20, 4)), time_ns=recent(20), close=True)
        pusher = push(stub.url)
        pusher.until(wait_until, lambda: pusher.count("rows_sent_total") == 20)
        assert pusher.count("samples_failed_total", "rejected") == 0
        assert pusher.count("samples_failed_total", "repeated") > 0
        assert (
            newest[next(each for each in newest if "step_number" in dict(each)["__name__"])] >= recent(20)[0] // 10**6
        )


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
    push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun, append: Append, wait_until: WaitUntil
) -> None:
    """Rows that came after the last look are sent before the end."""
    recorder = write_run(make_manifest("run"), np.ones((3, 4)), time_ns=recent(3))
    pusher = push(taking.url, flush_seconds=3600)
    pusher.runs.poll()
    pusher.service.start()
    wait_until(lambda: pusher.count("rows_sent_total") == 2)
    append(recorder, np.ones((2, 4)), time_ns=recent(5)[3:])
    recorder.close()
    pusher.service.stop()
    assert values(taking, "gradiometer_step_number") == [0, 1, 2, 3, 4]


def test_a_run_started_again_goes_on_in_its_series(
    push: Push, taking: Stub, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """The rows of the earlier start come first, though its directory was moved aside before they were sent."""
    now = time.time_ns()
    write_run(make_manifest("run", created_ns=now), np.ones((3, 4)), time_ns=recent(3), close=True)
    pusher = push(taking.url)
    pusher.runs.poll()
    pusher.service._discover()
    write_run(make_manifest("run", created_ns=now + 1), np.ones((3, 4)), time_ns=recent(9)[6:], close=True)
    for _ in range(3):
        pusher.work()
    assert values(taking, "gradiometer_step_number") == [0, 1, 2, 0, 1, 2]
    (samples,) = taking.named("gradiometer_step_number")
    assert [time for time, _ in samples] == sorted(time for time, _ in samples)


def test_a_clock_that_is_ahead(push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A step of next year is counted and not sent, and those after it are not held up by it."""
    times = recent(5)
    times[2] += 365 * 86400 * 10**9
    write_run(make_manifest("run"), np.ones((5, 4)), time_ns=times, close=True)
    pusher = push(taking.url, backfill=True)
    pusher.work()
    assert values(taking, "gradiometer_step_number") == [0, 1, 3, 4]
    assert pusher.count("rows_dropped_total", "future") == 1


def test_layers_come_from_the_lowest_rank(
    push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """What all ranks know alike is sent by one, what each has of its own by each."""
    for rank in (1, 3):
        write_run(make_manifest("run", rank=rank, world_size=4), np.ones((2, 4)), time_ns=recent(2), close=True)
    push(taking.url).work()
    ranks = {
        name: {dict(labels)["rank"] for labels in taking.taken if dict(labels)["__name__"] == name}
        for name in ("gradiometer_step_layer_grad_norm", "gradiometer_step_loss")
    }
    assert ranks == {"gradiometer_step_layer_grad_norm": {"1"}, "gradiometer_step_loss": {"1", "3"}}


def test_a_policy_that_is_taken_out_ends(
    push: Push, taking: Stub, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """Its series gets a staleness marker where the first step without it is; the policy after it begins there."""
    recorder = write_run(make_manifest("run"), np.empty((0, 4)))
    slots: list[tuple[Slot | None, ...]] = [(Slot(name="old"), None), (None, Slot(name="new"))]
    revisions = [
        Revision(revision=place, step=3 * place, time_ns=0, policy=None, slots=slot, source="attach")
        for place, slot in enumerate(slots)
    ]
    write_history(tmp_path / "run" / "rank-00000", History(revisions=tuple(revisions)))
    times = recent(5)
    for revision, chosen in ((0, times[:3]), (1, times[3:])):
        recorder.policies[:] = NAN
        recorder.policies[:, revision] = 1.0 + revision, 0.5
        append(recorder, np.ones((len(chosen), 4)), time_ns=chosen, policy_revision=revision)
    pusher = push(taking.url)
    pusher.work()
    found = {
        dict(labels)["policy"]: samples
        for labels, samples in taking.taken.items()
        if dict(labels)["__name__"] == "gradiometer_step_clip_threshold"
    }
    ms = [time_ns // 10**6 for time_ns in times]
    assert found["old"][:3] == [(time, 1.0) for time in ms[:3]]
    assert [(time, _stale(value)) for time, value in found["old"][3:]] == [(ms[3], True)]
    assert found["new"] == [(ms[3], 2.0)]


def test_tls_is_verified(
    push: Push, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil
) -> None:
    """A certificate of an authority that the settings name is believed, and no other."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusted = tmp_path.with_name(f"{tmp_path.name}-ca.pem")
    authority.cert_pem.write_to_path(str(trusted))
    write_run(make_manifest("run"), np.ones((3, 4)), time_ns=recent(3), close=True)
    with serve(lambda _: OK, context) as stub:
        stranger = push(stub.url)
        stranger.work()
        assert (stranger.count("up"), stub.requests) == (0, [])
        pusher = push(stub.url, name="db", ca_file=trusted)
        pusher.work()
        assert values(stub, "gradiometer_step_number") == [0, 1, 2]


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


def test_layers_that_are_chosen_and_the_budget(
    push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """A pattern chooses layers; what the budget or the labels do not allow is counted and told."""
    layers = [f"block.{place}" for place in range(100)] + ["head", "block.\u00e9" + "x" * MAX_VALUE_BYTES]
    write_run(make_manifest("run", layers=layers), np.ones((2, 102)), time_ns=recent(2), close=True)
    pusher = push(taking.url, layers=r"block\..*", series_budget=144)
    pusher.work()
    sent = [dict(labels)["layer"] for labels in taking.taken if "layer" in dict(labels)]
    assert sorted(sent) == sorted(layers[:100])
    assert pusher.count("samples_failed_total", "invalid") == 2
    (event,) = [event for event in pusher.context.store.events() if event.kind == "series_not_pushed"]
    assert "series_budget" in event.message
    push(taking.url, store=Store(None), name="other", layers="none").work()


@pytest.mark.parametrize(
    ("name", "labels"),
    [("0up", {}), ("up", {"a-b": "x"}), ("up", {"__x": "x"}), ("up", {"a": "\ud800"}), ("up", {"a": "x" * 3000})],
)
def test_labels_that_no_receiver_takes_as_they_are(name: str, labels: dict[str, str]) -> None:
    """They are refused here, where it can be said why."""
    with pytest.raises(LabelError):
        make_series(name, labels)
    with pytest.raises(LabelError, match="labels, receivers take"):
        make_series("up", {f"l{place}": "x" for place in range(40)})


def test_steps_of_one_millisecond() -> None:
    """They are moved to the next free one, by a second at most; what finds none is counted."""
    start = 1_000_000 * 10**6
    few = place(np.array([start, start + 1, start + 2]), 0)
    assert few.ms.tolist() == [1_000_000, 1_000_001, 1_000_002]
    many = place(start + np.arange(3000, dtype=np.int64) * 100, 0)
    assert many.kept.sum() == MAX_SHIFT_MS + 1
    assert many.dropped == {"same_millisecond": 3000 - MAX_SHIFT_MS - 1}
    assert (np.diff(many.ms[many.kept]) > 0).all()


def test_a_clock_that_is_set_back() -> None:
    """By little, rows are moved behind the newest; by more, they keep their time where the receiver takes it."""
    back = np.array([10**6 * 1_000_500, 10**6 * 900_000])
    refused = place(back, 1_001_000)
    assert (int(refused.ms[0]), refused.kept.tolist(), refused.dropped) == (
        1_001_001,
        [True, False],
        {"out_of_order": 1},
    )
    taken = place(back, 1_001_000, window_ms=200_000)
    assert (taken.ms.tolist(), taken.kept.tolist(), taken.newest) == ([1_001_001, 900_000], [True, True], 1_001_001)


def test_credentials_come_from_files_that_may_change(
    push: Push, taking: Stub, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """Each request carries what the files hold then; none of it is in what the settings print."""
    secrets = tmp_path.with_name(f"{tmp_path.name}-secrets")
    secrets.mkdir()
    for name in ("token", "key"):
        (secrets / name).write_text("first-secret\n")
    recorder = write_run(make_manifest("run"), np.ones((2, 4)), time_ns=recent(2))
    files = {"bearer_token_file": secrets / "token", "header_files": {"X-Key": secrets / "key"}, "tenant": "team"}
    pusher = push(taking.url, **files)
    pusher.work()
    (secrets / "token").write_text("second-secret")
    append(recorder, np.ones((1, 4)), time_ns=recent(3)[2:])
    pusher.work()
    first, last = taking.headers[0], taking.headers[-1]
    assert (first["Authorization"], last["Authorization"]) == ("Bearer first-secret", "Bearer second-secret")
    assert (last["X-Key"], last["X-Scope-OrgID"]) == ("first-secret", "team")
    assert last["X-Prometheus-Remote-Write-Version"] == "0.1.0"
    (secrets / "token").write_text("two\nlines")
    append(recorder, np.ones((1, 4)), time_ns=recent(4)[3:])
    pusher.work()
    assert pusher.count("up") == 0
    basic = push(taking.url, name="other", username="me", password_file=secrets / "key")
    basic.work()
    assert taking.headers[-1]["Authorization"] == "Basic " + base64.b64encode(b"me:first-secret").decode()


def test_the_daemon_serves_and_ends_while_the_receiver_is_away(
    start: Start, train: Train, make_manifest: MakeManifest, wait_until: WaitUntil, tmp_path: Path, free_port: int
) -> None:
    """A receiver that nobody runs costs the scrape nothing, is said once, and does not hold up the end."""
    config = tmp_path.with_name(f"{tmp_path.name}-config.yaml")
    config.write_text(f"remote_write: [{{name: away, url: 'http://127.0.0.1:{free_port}/', flush_seconds: 0.1}}]\n")
    train(make_manifest("run"), 5)
    monitor = start("--config", str(config))
    prefix = "gradiometer_remote_write"
    wait_until(lambda: monitor.samples()[f"{prefix}_requests_total", ("away", "later")] >= 2)
    found = monitor.samples()
    assert found[f"{prefix}_up", ("away",)] == 0
    assert found[f"{prefix}_pending_rows", ("away",)] == 5
    assert found["gradiometer_collector_success", ("remote_write_away",)] == 1
    assert found["gradiometer_steps_total", ("run",)] == 5
    monitor.process.terminate()
    said = monitor.process.communicate(timeout=30)[1]
    assert monitor.process.returncode == 0
    assert said.count("receiver away takes no samples") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("receiver", "said"),
    [
        ({"url": "ftp://x"}, "expected a URL"),
        ({"url": "http://u:p@x/"}, "holds credentials"),
        ({"labels": {"rank": "1"}}, "label of gradiometer's own"),
        ({"labels": {"a-b": "1"}}, "cannot be a label"),
        ({"layers": "("}, "regular expression"),
        ({"username": "me"}, "need each other"),
        ({"url": "http://db.example/", "bearer_token_file": "token"}, "plain http"),
        ({"header_files": {"Host": "file"}}, "header"),
        ({"batch_samples": 1}, "expected a number from 100"),
        ({"name": "Not good"}, "name"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, receiver: dict[str, Any], said: str) -> None:
    """Each is refused with its reason."""
    with pytest.raises(SettingsError, match=said):
        resolve(tmp_path, remote_write=[{"name": "db", "url": "http://127.0.0.1/"} | receiver])


def test_receivers_have_names_of_their_own(tmp_path: Path) -> None:
    """Two of one name would share their cursors."""
    one = {"name": "db", "url": "http://127.0.0.1/"}
    with pytest.raises(SettingsError, match="receivers of one name: db"):
        resolve(tmp_path, remote_write=[one, one])
