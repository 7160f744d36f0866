"""What it costs to turn rows into requests of remote write, against building the same messages label by label.

Both sides read the same rows of a ring and end with the same compressed bytes. The naïve side makes each message with
the library, as examples do; ours serialises labels once and fills one message of samples again and again. Then a whole
service pushes to a receiver of another process that answers at once: samples a second, CPU for 1000 samples, memory.

    python -m benchmarks.remote_write [--rounds N] [--json FILE]
"""

from __future__ import annotations

import multiprocessing
import resource
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cramjam
import numpy as np

from benchmarks._measure import arguments, compare, report, write_json
from benchmarks.ring import ROW, manifest
from gradiometer.recorder import Recorder
from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.remote_write.feed import Cursor, Feed
from gradiometer_monitor.remote_write.protocol import Block, encode, message
from gradiometer_monitor.remote_write.service import RemoteWrite
from gradiometer_monitor.remote_write.settings import RemoteWriteSettings
from gradiometer_monitor.services import Context
from gradiometer_monitor.store import Store

LAYERS = (10, 100, 1000)
SAMPLES_PER_ROUND, MAX_SAMPLES = 150_000, 2_000_000
"""About how many a whole service pushes: so many for each round, up to a bound."""


def write_run(root: Path, layers: int, steps: int) -> Path:
    """Write a run of as many steps, a millisecond apart and all of the last minutes."""
    described = manifest(layers)
    ring = described.ring.model_copy(update={"capacity": steps + 1})
    recorder = Recorder(root, described.model_copy(update={"ring": ring, "run_id": f"bench-{layers}-{steps}"}))
    rng, first = np.random.default_rng(0), time.time_ns() - 600 * 10**9
    for step in range(steps):
        recorder.stats[:] = rng.random(recorder.stats.shape, np.float32)
        recorder.commit(ROW._replace(step=step, time_ns=first + step * 10**6, flags=128))
    recorder.close()
    return recorder.path


def naive(blocks: tuple[Block, ...]) -> bytes:
    """Encode blocks by building every message anew."""
    request = message("WriteRequest")()
    for block in blocks:
        for column, series in enumerate(block.series):
            made = request.timeseries.add()
            for name, value in series.labels:
                made.labels.add(name=name, value=value)
            for row, time_ms in enumerate(block.times):
                if block.present[row, column]:
                    made.samples.add(value=block.values[row, column], timestamp=int(time_ms))
    return bytes(cramjam.snappy.compress_raw(request.SerializeToString()))


def encoders(root: Path, layers: int) -> tuple[dict[str, Callable[[], object]], int]:
    """Return what encodes one batch both ways, what reads and encodes it, and the batch's number of samples."""
    path = write_run(root, layers, 400)
    settings = RemoteWriteSettings(name="bench", url="http://127.0.0.1/")
    feed = Feed(path, manifest(layers).model_copy(update={"ring": _ring(path)}), settings, Cursor())
    reading = feed.read(settings.batch_samples, time.time())
    assert reading is not None
    assert naive(reading.blocks) == encode(reading.blocks)

    def read_and_encode() -> bytes:
        again = feed.read(settings.batch_samples, time.time())
        assert again is not None
        return encode(again.blocks)

    calls: dict[str, Callable[[], object]] = {
        "naive": lambda: naive(reading.blocks),
        "serialised labels": lambda: encode(reading.blocks),
        "read and encode": read_and_encode,
    }
    return calls, sum(block.samples for block in reading.blocks)


def _ring(path: Path) -> Any:
    from gradiometer.records import read_manifest

    return read_manifest(path / "manifest.json").ring


def swallow(listener: socket.socket) -> None:
    """Take requests on one connection after the other and answer each with 204."""
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as stream:
            while stream.readline():
                size = 0
                while line := stream.readline().strip():
                    if line.lower().startswith(b"content-length:"):
                        size = int(line.split(b":")[1])
                stream.read(size)
                connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")


def push(root: Path, layers: int, rounds: int) -> dict[str, float]:
    """Push a run as the monitor does; return samples a second, CPU for 1000 samples, and peak memory."""
    steps = min(SAMPLES_PER_ROUND * rounds, MAX_SAMPLES) // (layers + 13)
    write_run(root, layers, min(steps, 50_000))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = multiprocessing.get_context("fork").Process(target=swallow, args=(listener,), daemon=True)
        process.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        runs, store = Runs(root, retention_seconds=3600), Store(None)
        context = Context(runs=runs, events=Events(runs, store), store=store)
        service = RemoteWrite(RemoteWriteSettings(name="bench", url=url), context)
        while runs.poll():
            pass
        wall, cpu = time.perf_counter(), time.process_time()
        service.work()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        sent = {name: value for name, labels, value in service.samples() if len(labels) == 1}
        samples = sent["gradiometer_remote_write_samples_sent_total"]
        service.close()
        runs.close()
        process.kill()
        process.join()
    return {
        "samples": samples,
        "samples_per_second": samples / wall,
        "cpu_seconds_per_1000_samples": 1000 * cpu / samples,
        "bytes_per_sample": sent["gradiometer_remote_write_bytes_total"] / samples,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    """Compare at each number of layers, then push."""
    options = arguments(__doc__)
    results, pushed = {}, {}
    for layers in LAYERS:
        with tempfile.TemporaryDirectory() as root:
            calls, samples = encoders(Path(root), layers)
            results[str(layers)] = found = compare(calls, rounds=options.rounds, baseline="naive")
        report(f"{layers} layers, a batch of {samples} samples", found)
        print("  ns a sample:", ", ".join(f"{name} {s / samples * 1e9:.0f}" for name, s in found.seconds.items()))
        with tempfile.TemporaryDirectory() as root:
            pushed[str(layers)] = measured = push(Path(root), layers, options.rounds)
        print("  pushed:", ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
    write_json(options.json, results, benchmark="remote_write", pushed=pushed)


if __name__ == "__main__":
    main()
