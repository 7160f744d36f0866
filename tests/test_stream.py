"""Server-sent events over a real connection: what is new arrives, a reconnect loses nothing, the end is an end."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradiometer_monitor.web.stream import HEARTBEAT_SECONDS, MAX_STREAMS
from tests._monitor import Monitor
from tests._web import AS_READER, AS_WRITER, WRITE, with_tokens, write_tokens

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, Start, WaitUntil, WriteRun

Listen = Callable[..., "Stream"]


@dataclass
class Stream:
    """One connection that is open, read line by line."""

    connection: http.client.HTTPConnection
    response: http.client.HTTPResponse
    last_id: str = ""

    def lines(self) -> Iterator[str]:
        while line := self.response.readline():
            yield line.decode().rstrip("\n")

    def next(self, kind: str) -> Any:
        """Read up to the next event of a kind, and give what it says."""
        found, event = "", ""
        for line in self.lines():
            name, _, value = line.partition(": ")
            if name == "id":
                self.last_id = value
            elif name == "event":
                event = value
            elif name == "data":
                found = value
            elif not line and event == kind:
                return json.loads(found)
            elif not line:
                event = ""
        pytest.fail(f"the stream ended before an event {kind}")


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Give a function that opens a stream, and close what it opened."""
    opened: list[Stream] = []

    def connect(monitor: Monitor, query: str = "", **headers: str) -> Stream:
        connection = http.client.HTTPConnection(monitor.url.removeprefix("http://"), timeout=60)
        connection.request("GET", f"/api/v1/stream?{query}", headers=headers)
        opened.append(stream := Stream(connection, connection.getresponse()))
        return stream

    yield connect
    for stream in opened:
        stream.response.close()
        stream.connection.close()


def test_new_rows_events_and_runs_arrive(
    start: Start,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    append: Append,
    listen: Listen,
    wait_until: WaitUntil,
) -> None:
    """The list comes first and when it changes; rows and events come as they are written."""
    recorder = write_run(make_manifest(created_ns=time.time_ns()), np.ones((5, 4)))
    monitor = start()
    stream = listen(monitor, "run_id=run")
    assert stream.response.headers["content-type"].startswith("text/event-stream")
    assert [run["run_id"] for run in stream.next("runs")["runs"]] == ["run"]
    append(recorder, 3 * np.ones((2, 4)))
    rows = stream.next("rows")
    assert rows["steps"][0] == 5
    assert rows["columns"]["grad_norm_preclip"][0] == 6.0
    recorder.event("nonfinite", "a message", step=6)
    event = stream.next("event")
    assert (event["kind"], event["step"], event["message"]) == ("nonfinite", 6, "a message")
    everything = listen(monitor)
    recorder.event("finite_again", "of all runs")
    assert everything.next("event")["kind"] == "finite_again"


def test_a_reconnect_goes_on_where_it_was(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, append: Append, listen: Listen
) -> None:
    """With Last-Event-ID come all rows and events since, also after the monitor was another process."""
    recorder = write_run(make_manifest(capacity=512, created_ns=time.time_ns()), np.ones((5, 4)))
    monitor = start()
    stream = listen(monitor, "run_id=run")
    stream.next("runs")
    append(recorder, np.ones((1, 4)))
    assert stream.next("rows")["last_step"] == 5
    last_id = stream.last_id
    stream.connection.close()
    append(recorder, np.ones((300, 4)))
    recorder.event("finite_again", "while nobody listened")
    again = listen(monitor, "run_id=run", **{"Last-Event-ID": last_id})
    assert again.next("event")["message"] == "while nobody listened"
    rows = listen(monitor, "run_id=run", **{"Last-Event-ID": last_id}).next("rows")
    assert rows["steps"] == list(range(6, 306))
    other = listen(monitor, "run_id=run", **{"Last-Event-ID": "no cursor"})
    append(recorder, np.ones((1, 4)))
    assert other.next("rows")["steps"] == [306]


def test_a_run_that_begins_anew_is_followed_from_its_first_row(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, append: Append, listen: Listen
) -> None:
    """A cursor of the run's earlier start does not hide the rows of the new one."""
    recorder = write_run(make_manifest(pid=2**22 - 1, created_ns=time.time_ns()), np.ones((50, 4)))
    monitor = start()
    stream = listen(monitor, "run_id=run")
    stream.next("runs")
    append(recorder, np.ones((1, 4)))
    stream.next("rows")
    recorder.close()
    write_run(make_manifest(created_ns=time.time_ns()), 2 * np.ones((3, 4)))
    steps, norms = list[int](), list[float]()
    while len(steps) < 3:  # which may be seen one by one
        rows = stream.next("rows")
        steps += rows["steps"]
        norms += rows["columns"]["grad_norm_preclip"]
    assert (steps, norms) == ([0, 1, 2], [4.0] * 3)


def test_silence_is_broken_by_a_comment(start: Start, listen: Listen) -> None:
    """A client hears of the monitor though nothing happens, well before it would take it for gone."""
    stream = listen(start())
    stream.next("runs")
    comment = next(line for line in stream.lines() if line.startswith(":"))
    assert comment
    assert HEARTBEAT_SECONDS < 10


def test_streams_are_bounded_and_given_back(start: Start, listen: Listen, wait_until: WaitUntil) -> None:
    """One more than the limit is refused with a sentence; when a client goes there is room again."""
    monitor = start()
    opened = [listen(monitor) for _ in range(MAX_STREAMS)]
    assert [stream.response.status for stream in opened] == [200] * MAX_STREAMS
    refused = listen(monitor)
    assert refused.response.status == 503
    assert f"{MAX_STREAMS} streams are open" in json.loads(refused.response.read())["detail"]
    assert monitor.get("/-/healthy")[0] == 200
    for stream in opened:
        stream.response.close()
        stream.connection.close()
    wait_until(lambda: listen(monitor).response.status == 200)


def test_a_client_that_takes_nothing_holds_up_nobody(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, append: Append, listen: Listen
) -> None:
    """While one client never reads, another gets every row."""
    recorder = write_run(make_manifest(capacity=4096, created_ns=time.time_ns()), np.ones((5, 4)))
    monitor = start()
    host, port = monitor.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.sendall(f"GET /api/v1/stream?run_id=run HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        stream, seen = listen(monitor, "run_id=run"), list[int]()
        stream.next("runs")
        for _ in range(4):
            append(recorder, np.ones((300, 4)))
            seen += stream.next("rows")["steps"]
        while seen[-1] < 1204:
            seen += stream.next("rows")["steps"]
        assert seen == list(range(5, 1205))


def test_a_reload_ends_the_stream_of_a_token_that_was_taken_away(
    start: Start, listen: Listen, wait_until: WaitUntil, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Though no setting has changed; who still has a token comes again, and his stream lasts."""
    directory = tmp_path_factory.mktemp("config")
    monitor = start(*with_tokens(directory))
    reader = listen(monitor, **AS_READER)
    reader.next("runs")
    write_tokens(directory / "tokens", f"write oncall {WRITE}")
    wait_until(lambda: monitor.get("/api/v1/runs", **AS_READER)[0] == 401)
    monitor.process.send_signal(signal.SIGHUP)
    asked_at = time.monotonic()
    for _ in reader.lines():  # up to the end of the stream
        assert time.monotonic() - asked_at < 30
    assert listen(monitor, **AS_READER).response.status == 401
    again = listen(monitor, **AS_WRITER)
    again.next("runs")
    assert next(line for line in again.lines() if line.startswith(":"))


def test_what_is_not_there_is_told_at_once(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, listen: Listen
) -> None:
    """A run or rank that is not followed is no stream that stays silent."""
    write_run(make_manifest(created_ns=time.time_ns()), np.ones((2, 4)))
    monitor = start()
    for query, status in (("run_id=other", 404), ("run_id=run&rank=3", 404), ("rank=-1", 422)):
        assert listen(monitor, query).response.status == status


def test_the_end_is_clean_with_streams_open(start: Start, listen: Listen) -> None:
    """SIGTERM ends the streams in order and the process with 0, without a word of error."""
    monitor = start()
    stream = listen(monitor)
    stream.next("runs")
    monitor.process.send_signal(signal.SIGTERM)
    assert list(stream.lines())[-1:] in ([], [""])
    log = monitor.process.communicate(timeout=60)[1]
    assert monitor.process.returncode == 0
    assert "ERROR" not in log
    assert "Traceback" not in log
