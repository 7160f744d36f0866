"""What it costs the monitor to follow runs: CPU time of polling while other processes write real rings.

Each rank is a directory whose ring a writer fills at a steady rate. The thread that polls is measured by its own CPU
time, so the writers do not count; each figure is taken twice, and their difference is the A/A noise. Memory is what the
monitor's process holds in RAM after each size, beyond what it held before.

    python -m benchmarks.ingest [--rounds N] [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from benchmarks.ring import manifest
from gradiometer_monitor.following.runs import Runs

RANKS, PARAMETERS, STEPS_PER_SECOND = 8, 1000, 20.0
AIM = 0.10
"""Share of one core that polling may take at RANKS, PARAMETERS and STEPS_PER_SECOND."""
SIZES = (1000, 10_000, 100_000)
"""Parameters of one rank at one step a second, to see whether the cost is linear."""
WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from gradiometer.recorder import Recorder
from gradiometer.records import Manifest
from benchmarks.ring import ROW

described = [Manifest.model_validate_json(line) for line in sys.stdin]
recorders = [Recorder(Path(sys.argv[1]), each) for each in described]
pause, rng, step = 1 / float(sys.argv[2]), np.random.default_rng(0), 0
noise = [rng.lognormal(0, 0.3, recorders[0].stats.shape).astype(np.float32) for _ in range(8)]
for _ in range(int(sys.argv[3])):  # history, so that baselines are known
    for recorder in recorders:
        recorder.stats[:] = noise[step % 8]
        recorder.commit(ROW._replace(step=step, time_ns=time.time_ns()))
    step += 1
print("ready", flush=True)
due = time.monotonic()
while True:
    for recorder in recorders:
        recorder.stats[:] = noise[step % 8]
        recorder.commit(ROW._replace(step=step, time_ns=time.time_ns()))
    step += 1
    due += pause
    time.sleep(max(0, due - time.monotonic()))
"""


@dataclass(frozen=True, kw_only=True)
class Ingest:
    """What following cost at one size."""

    ranks: int
    parameters: int
    steps_per_second: float
    share: float
    """Of one core, the mean of two measurements."""
    noise: float
    """Difference of the two, over their mean."""
    lock_seconds: float
    """Longest that a scrape waited for the lock, from another thread that asked for it all the time."""
    catch_up_lock_seconds: float
    """The same while the history was read."""
    rows: int
    memory_bytes: int
    """Resident memory that following took."""


@contextmanager
def writing(root: Path, ranks: int, parameters: int, rate: float, history: int) -> Iterator[None]:
    """Fill ``ranks`` rings of ``parameters`` at ``rate`` steps a second, in another process."""
    described = [
        manifest(parameters).model_copy(update={"rank": rank, "world_size": ranks, "created_ns": time.time_ns()})
        for rank in range(ranks)
    ]
    ring = described[0].ring.model_copy(update={"capacity": 512})
    command = (sys.executable, "-c", WRITER, str(root), str(rate), str(history))
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert writer.stdin is not None
    assert writer.stdout is not None
    try:
        for each in described:
            writer.stdin.write(each.model_copy(update={"ring": ring}).model_dump_json() + "\n")
        writer.stdin.close()
        if writer.stdout.readline() != "ready\n":
            raise RuntimeError("the writer ended before it had written its history")
        yield
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()


class Waits:
    """A thread that takes the lock again and again, as scrapes do, and notes how long it waited at worst."""

    def __init__(self, runs: Runs) -> None:
        self.worst, self._runs, self._stop = 0.0, runs, threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        while not self._stop.wait(0.002):
            started = time.perf_counter()
            with self._runs.snapshot():
                self.worst = max(self.worst, time.perf_counter() - started)

    def close(self) -> float:
        """Stop and return the longest wait."""
        self._stop.set()
        self._thread.join()
        return self.worst


def poll_for(runs: Runs, seconds: float) -> float:
    """Poll once a second and return the share of one core that it took."""
    started, used = time.perf_counter(), 0.0
    while time.perf_counter() - started < seconds:
        before = time.thread_time()
        runs.poll()
        used += time.thread_time() - before
        time.sleep(1 - (time.perf_counter() - started) % 1)
    return used / (time.perf_counter() - started)


def measure(ranks: int, parameters: int, rate: float, *, rounds: int, seconds: float) -> Ingest:
    """Follow ``ranks`` for ``rounds`` pairs of ``seconds``."""
    with tempfile.TemporaryDirectory() as root, writing(Path(root), ranks, parameters, rate, history=256):
        held = psutil.Process().memory_info().rss
        runs = Runs(Path(root), retention_seconds=1e9)
        waits = Waits(runs)
        while runs.poll() or not runs.ready.is_set():
            pass
        catch_up = waits.close()
        shares: list[list[float]] = [[], []]
        for _ in range(rounds):
            for place in range(2):
                shares[place].append(poll_for(runs, seconds))
        waits = Waits(runs)
        poll_for(runs, seconds)
        locked = waits.close()
        with runs.snapshot() as found:
            rows = sum(tail.summary.last_seen for run in found for tail in run.ranks)
        memory = psutil.Process().memory_info().rss - held
        runs.close()
    one, other = (statistics.median(each) for each in shares)
    share = (one + other) / 2
    return Ingest(
        ranks=ranks,
        parameters=parameters,
        steps_per_second=rate,
        share=share,
        noise=abs(one - other) / share,
        lock_seconds=locked,
        catch_up_lock_seconds=catch_up,
        rows=rows,
        memory_bytes=memory,
    )


def main() -> None:
    """Measure the aim's size, then sizes whose cost should be linear."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of measurements (default 3)")
    parser.add_argument("--quick", action="store_true", help="short and small, only to see that it runs")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    seconds = 1.0 if options.quick else 10.0
    sizes = SIZES[:1] if options.quick else SIZES
    asked = [(RANKS, PARAMETERS, STEPS_PER_SECOND), *((1, size, 1.0) for size in sizes)]
    found = []
    for ranks, parameters, rate in asked:
        each = measure(ranks, parameters, rate, rounds=options.rounds, seconds=seconds)
        found.append(each)
        print(
            f"{ranks} ranks x {parameters} parameters x {rate:g} steps/s: {each.share:.2%} of one core "
            f"(A/A noise {each.noise:.1%}), {each.share / (ranks * parameters * rate) * 1e9:.0f} ns a norm, "
            f"{each.memory_bytes / 2**20:.1f} MiB; a scrape waited {each.lock_seconds * 1e3:.1f} ms at worst, "
            f"{each.catch_up_lock_seconds * 1e3:.1f} ms while history was read",
            flush=True,
        )
    print(f"aim: {found[0].share:.2%} of {AIM:.0%}: {'met' if found[0].share <= AIM else 'missed'}")
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB")
    if options.json:
        machine = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
        body = {"machine": machine, "benchmark": "ingest", "aim": AIM, "results": [asdict(each) for each in found]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
