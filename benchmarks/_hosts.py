"""The scrapes of many hosts of a simulated fleet.

What is real: the ring of each rank of one host, written row by row, the monitor's following of them and its scrape,
compressed as the monitor does. What is simulated: the numbers in the rows, the GPUs, and the other hosts, whose scrapes
are that of the first with its ranks (one run over all hosts) or its run (a run a host) and its GPUs renamed, without
the layers where only the host of rank 0 exports them. So the norms of two hosts are the same, which is what
data-parallel hosts export.
"""

from __future__ import annotations

import multiprocessing
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import cramjam
import numpy as np

from benchmarks.ring import manifest
from gradiometer.insight import SAMPLES
from gradiometer.metrics import CATALOGUE
from gradiometer.recorder import Recorder, RowHeader
from gradiometer.records import Flag, Manifest, RingGeometry, SampleInfo
from gradiometer.tail import Sample
from gradiometer_monitor.exposition.exposition import TEXT, Exposition
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.web.scrape import GZIP_LEVEL

__all__ = ["Fleet", "Hosts", "serving"]

STEP_SECONDS = 0.25
WARM_UP = 600
"""Steps that each rank took before the first scrape: baselines, scores and noise scale are there."""
RUN = "fleet"
PARTS = {
    "ecc_errors_total": ("corrected", "uncorrected"),
    "throttled": ("power_cap", "thermal", "hardware_thermal", "hardware_power_brake", "hardware"),
}


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """How many hosts, of how many ranks, and whether they train one model of so many layers or one each."""

    hosts: int = 200
    ranks: int = 8
    layers: int = 300
    mix: Literal["one", "lead", "many"] = "one"
    """One run over all hosts, each of which exports its layers, or only that of rank 0; or a run a host."""

    def name(self, host: int) -> str:
        return f"host-{host:04d}:9477"

    @property
    def run_id(self) -> str:
        """The run, or the first of them."""
        return RUN if self.mix != "many" else f"{RUN}-0000"


class Hosts:
    """The scrapes of a fleet, of runs below ``root`` that make a step whenever :meth:`step` is called."""

    def __init__(self, root: Path, fleet: Fleet) -> None:
        self.fleet, self._rng = fleet, np.random.default_rng(0)
        self._norms = self._rng.lognormal(-2, 1, fleet.layers).astype(np.float32)
        self._steps, self._lock = 0, threading.Lock()
        self._recorders = [Recorder(root, self._manifest(rank)) for rank in range(fleet.ranks)]
        self._runs = Runs(root, retention_seconds=1e12)
        make = partial(Exposition, self._runs, series_budget=10_000_000, total_series=10_000_000)
        self._lead = make()
        self._other = make(layers="none") if fleet.mix == "lead" else self._lead
        for exposition in {self._lead, self._other}:
            exposition.watch("gpu", lambda: list(self._gpus()))
        first = time.time() - WARM_UP * STEP_SECONDS
        for step in range(WARM_UP):
            self.step(first + step * STEP_SECONDS)
        while self._runs.poll():
            pass
        self._bodies: dict[Exposition, tuple[bytes, float]] = {}

    def _manifest(self, rank: int) -> Manifest:
        described, layers = manifest(self.fleet.layers), self.fleet.layers
        ring = RingGeometry(capacity=1024, parameters=layers, stats=len(SAMPLES))
        many = self.fleet.hosts if self.fleet.mix != "many" else 1
        more: dict[str, Any] = {
            "run_id": RUN, "rank": rank, "world_size": self.fleet.ranks * many, "created_ns": time.time_ns(),
            "policies": ("nonfinite", "clip"), "data_parallel": self.fleet.ranks * many,
            "ring": described.ring.model_copy(update={"capacity": 1024}),
            "samples": SampleInfo(every=50, columns=SAMPLES, ring=ring), "device": "NVIDIA H100 80GB HBM3",
        }  # fmt: skip
        return described.model_copy(update=more)

    def step(self, now: float) -> None:
        """Make a step in every rank: a norm that wanders, now and then one that is clipped or not finite."""
        with self._lock:
            self._norms *= self._rng.lognormal(0, 0.02, len(self._norms)).astype(np.float32)
            self._norms = np.clip(self._norms, 1e-4, 1e2)
            norm, bad = float(np.linalg.norm(self._norms)), self._rng.random() < 0.001
            clipped = norm > 10
            flags = Flag.LOSS | Flag.HOOKED | Flag.OWN_WATCHED | (Flag.NONFINITE | Flag.SKIPPED) * bad
            for recorder in self._recorders:
                recorder.stats[:] = self._norms
                recorder.stats[2] *= np.float32(self._rng.lognormal(1, 0.1))
                recorder.policies[:] = np.nan
                recorder.policies[:, 1] = 10.0, min(1.0, 10 / norm)
                recorder.commit(self._row(now, norm, int(flags), int(bad) + 2 * clipped))
                self._sample(recorder, now)
            self._steps += 1

    def _row(self, now: float, norm: float, flags: int, clipped: int) -> RowHeader:
        numbers = (norm, min(norm, 10.0), min(1.0, 10 / norm), 3e-4, 2.5 / (1 + self._steps / 1e4), 65536.0)
        seconds = STEP_SECONDS * float(self._rng.lognormal(0, 0.05))
        return RowHeader(self._steps, int(now * 1e9), flags, clipped, 0, 4, -1, 0, *numbers, seconds, 2e-4)

    def _sample(self, recorder: Recorder, now: float) -> None:
        if recorder.samples is not None and self._steps % 50 == 0:
            recorder.samples.stats[0], recorder.samples.stats[1] = 10.0, 0.01 * self._norms
            recorder.samples.commit(self._row(now, 1.0, 0, 0))

    def _gpus(self) -> Iterator[Sample]:
        for gpu in range(self.fleet.ranks):
            own = (str(gpu), f"GPU-{gpu}")
            for metric in CATALOGUE.values():
                if metric.labels == ("gpu", "uuid"):
                    yield metric.name, own, float(self._steps + gpu)
            for name, parts in PARTS.items():
                yield from ((f"gradiometer_gpu_{name}", (*own, part), 0.0) for part in parts)
            yield "gradiometer_gpu_info", (*own, "NVIDIA H100 80GB HBM3", "550.54"), 1
            yield "gradiometer_gpu_run_info", (*own, RUN, str(gpu)), 1

    def scrape(self, host: int) -> bytes:
        """Return the text that this host would serve, at most a second old."""
        exposition = self._lead if host == 0 else self._other
        with self._lock:
            body, rendered = self._bodies.get(exposition, (b"", 0.0))
            if time.monotonic() - rendered > 1:
                self._runs.poll()
                body = exposition.render(TEXT)
                self._bodies[exposition] = body, time.monotonic()
        body = re.sub(rb'uuid="GPU-', b'uuid="GPU-%d-' % host, body)
        if self.fleet.mix == "many":
            return body.replace(b'run_id="%s"' % RUN.encode(), b'run_id="%s-%04d"' % (RUN.encode(), host))
        first = host * self.fleet.ranks
        return re.sub(rb'rank="(\d+)"', lambda found: b'rank="%d"' % (first + int(found[1])), body)


def _serve(listener: socket.socket, fleet: Fleet) -> None:
    """Serve the scrape of host N at ``/N``, compressed, and make steps all the while."""
    with tempfile.TemporaryDirectory() as root:
        hosts = Hosts(Path(root), fleet)

        class Handler(BaseHTTPRequestHandler):
            protocol_version, wbufsize = "HTTP/1.1", 1 << 16

            def do_GET(self) -> None:
                body = bytes(cramjam.gzip.compress(hosts.scrape(int(self.path[1:])), level=GZIP_LEVEL))
                self.send_response(200)
                for name, value in (("Content-Type", TEXT), ("Content-Encoding", "gzip")):
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def server_bind(self) -> None:
                self.socket.close()
                self.socket = listener

            def server_activate(self) -> None:
                """The socket listens already."""

        threading.Thread(target=Server(("127.0.0.1", 0), Handler).serve_forever, daemon=True).start()
        while True:
            started = time.monotonic()
            hosts.step(time.time())
            time.sleep(max(0.0, STEP_SECONDS - (time.monotonic() - started)))


@contextmanager
def serving(fleet: Fleet) -> Iterator[tuple[int, BaseProcess]]:
    """Serve the hosts of a fleet from a process of their own; give its port on loopback, and the process."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        process = multiprocessing.get_context("fork").Process(target=_serve, args=(listener, fleet), daemon=True)
        process.start()
        try:
            yield listener.getsockname()[1], process
        finally:
            process.kill()
            process.join()
