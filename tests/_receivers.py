"""Receivers of remote write: Debian's Prometheus and VictoriaMetrics, and one that answers as it is told."""

from __future__ import annotations

import json
import math
import ssl
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cramjam

from gradiometer_monitor.remote_write.protocol import message

if TYPE_CHECKING:
    from tests.conftest import Spawn, WaitUntil

Points = dict[int, float]
"""Milliseconds since the epoch to value."""


@dataclass(kw_only=True)
class Database:
    """A receiver that keeps what it gets, started as a process that can be killed and started again."""

    command: list[str]
    url: str
    write_path: str
    spawn: Spawn
    wait_until: WaitUntil
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it over the data it has, and wait until it answers."""
        self.process = self.spawn(*self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.wait_until(lambda: self.get("/-/ready" if "prometheus" in self.command[0] else "/health") is not None)

    def kill(self) -> None:
        """End it as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def write_url(self) -> str:
        return self.url + self.write_path

    def get(self, path: str, **query: str) -> bytes | None:
        """Ask for a path; None if nobody answers, or not with 200."""
        try:
            with urllib.request.urlopen(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=30) as response:
                body: bytes = response.read()
                return body
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None

    def series(self, selector: str) -> list[tuple[dict[str, str], Points]]:
        """Return labels and all samples of the series that are selected; stale markers are left out."""
        if "prometheus" in self.command[0]:
            body = self.get("/api/v1/query", query=f"{selector}[2d]")
            found = json.loads(body)["data"]["result"] if body else []
            return [(each["metric"], {round(t * 1000): float(v) for t, v in each["values"]}) for each in found]
        self.get("/internal/force_flush")
        body = self.get("/api/v1/export", **{"match[]": selector, "reduce_mem_usage": "1"})
        merged: dict[str, tuple[dict[str, str], Points]] = {}
        for line in (body or b"").splitlines():
            each = json.loads(line)
            points = merged.setdefault(json.dumps(each["metric"], sort_keys=True), (each["metric"], {}))[1]
            values = (math.nan if v is None else float(v) for v in each["values"])
            points.update({t: v for t, v in zip(each["timestamps"], values, strict=True) if not math.isnan(v)})
        return list(merged.values())

    def points(self, selector: str) -> Points:
        """Return the samples of the one series that is selected, none if it is not there."""
        found = self.series(selector)
        assert len(found) <= 1, [labels for labels, _ in found]
        return found[0][1] if found else {}


def prometheus(program: str, data: Path, port: int, spawn: Spawn, wait_until: WaitUntil, window: str = "") -> Database:
    """Describe a Prometheus; ``window`` is how far back it takes samples out of order."""
    lines = ["global: {}", *([f"storage: {{tsdb: {{out_of_order_time_window: {window}}}}}"] if window else [])]
    (data / "prometheus.yml").write_text("\n".join(lines) + "\n")
    command = [
        program, f"--config.file={data}/prometheus.yml", f"--storage.tsdb.path={data}/tsdb",
        f"--web.listen-address=127.0.0.1:{port}", "--web.enable-remote-write-receiver",
    ]  # fmt: skip
    return Database(
        command=command, url=f"http://127.0.0.1:{port}", write_path="/api/v1/write", spawn=spawn, wait_until=wait_until
    )


def victoria(program: str, data: Path, port: int, spawn: Spawn, wait_until: WaitUntil) -> Database:
    """Describe a VictoriaMetrics."""
    command = [
        program, f"-storageDataPath={data}/vm", f"-httpListenAddr=127.0.0.1:{port}", "-retentionPeriod=100y",
    ]  # fmt: skip
    return Database(
        command=command, url=f"http://127.0.0.1:{port}", write_path="/api/v1/write", spawn=spawn, wait_until=wait_until
    )


Written = dict[tuple[tuple[str, str], ...], list[tuple[int, float]]]
"""Sorted labels of a series to its samples, in the order in which they came."""


@dataclass
class Stub:
    """Answers each request as ``answer`` says, and keeps what it said yes to."""

    answer: Callable[[Written], tuple[int, bytes, dict[str, str]] | None]
    """Is given what a request holds; returns status, body and headers, or None to close without an answer."""
    url: str = ""
    requests: list[Written] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    taken: Written = field(default_factory=dict)

    def named(self, name: str) -> list[list[tuple[int, float]]]:
        """Return the samples of the series of a metric."""
        return [samples for labels, samples in self.taken.items() if ("__name__", name) in labels]


def read_request(body: bytes) -> Written:
    """Read a request as the specification has it."""
    request = message("WriteRequest").FromString(bytes(cramjam.snappy.decompress_raw(body)))
    found: Written = {}
    for series in request.timeseries:
        labels = tuple((label.name, label.value) for label in series.labels)
        assert list(labels) == sorted(labels)
        assert labels not in found
        found[labels] = [(sample.timestamp, sample.value) for sample in series.samples]
    return found


@contextmanager
def serve(
    answer: Callable[[Written], tuple[int, bytes, dict[str, str]] | None], tls: ssl.SSLContext | None = None
) -> Iterator[Stub]:
    """Serve a stub on loopback."""
    stub = Stub(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 8192  # an answer in one packet

        def do_POST(self) -> None:
            written = read_request(self.rfile.read(int(self.headers["Content-Length"])))
            stub.requests.append(written)
            stub.headers.append(dict(self.headers))
            given = stub.answer(written)
            if given is None:
                self.close_connection = True
                return
            status, body, headers = given
            if 200 <= status < 300:
                for labels, samples in written.items():
                    stub.taken.setdefault(labels, []).extend(samples)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign] # a client that turns away is expected
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    stub.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_address[1]}/api/v1/write"
    try:
        yield stub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
