"""What a step's numbers cost: one row of the ring, against client gauges that hold the same numbers.

Both sides start from a float32 array [3 stats, P] in host memory. The gauges' children are looked up beforehand, which
is the best that a client library can do.

    python -m benchmarks.ring [--rounds N] [--json FILE]
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
from prometheus_client import CollectorRegistry, Gauge

from benchmarks._measure import arguments, compare, report, write_json
from gradiometer.recorder import Recorder, RowHeader
from gradiometer.records import STATS, Manifest, ParameterInfo, RingGeometry

PARAMETERS = (100, 1000, 10_000)
ROW = RowHeader(
    step=1, time_ns=1, flags=0, clipped=0, optimizer=0, microbatches=1, first_nonfinite=-1, policy_revision=0,
    grad_norm_preclip=1.0, grad_norm_postclip=1.0, coefficient=1.0, learning_rate=0.1, loss=1.0, loss_scale=1.0,
    step_seconds=0.1, agent_seconds=0.001,
)  # fmt: skip


def manifest(parameters: int) -> Manifest:
    """Make the manifest of a run of this process."""
    described = tuple(
        ParameterInfo(name=f"blocks.{place}.weight", layer=f"blocks.{place}", shape=(1,), dtype="float32", numel=1)
        for place in range(parameters)
    )
    return Manifest(
        format_version=1,
        run_id=f"bench-{parameters}",
        pid=os.getpid(),
        process_start=psutil.Process().create_time(),
        host=socket.gethostname(),
        created_ns=1,
        gradiometer_version="0",
        torch_version="0",
        python_version="0",
        device="cpu",
        parameters=described,
        ring=RingGeometry(capacity=64, parameters=parameters),
    )


def ring_row(root: Path, stats: np.ndarray) -> Callable[[], object]:
    """Return a call that writes one row."""
    recorder = Recorder(root, manifest(stats.shape[1]))

    def write() -> None:
        recorder.stats[:] = stats
        recorder.commit(ROW)

    return write


def gauges(stats: np.ndarray) -> Callable[[], object]:
    """Return a call that sets one gauge for each number."""
    registry = CollectorRegistry()
    families = [Gauge(name, name, ["run_id", "parameter"], registry=registry) for name in STATS]
    children = [[f.labels("bench", f"blocks.{p}.weight") for p in range(stats.shape[1])] for f in families]

    def write() -> None:
        for row, values in zip(children, stats.tolist(), strict=True):
            for child, value in zip(row, values, strict=True):
                child.set(value)

    return write


def main() -> None:
    """Compare at each number of parameters."""
    options = arguments(__doc__)
    results = {}
    with tempfile.TemporaryDirectory() as root:
        for count in PARAMETERS:
            stats = np.random.default_rng(0).random((len(STATS), count), np.float32)
            calls = {"client gauges": gauges(stats), "ring row": ring_row(Path(root), stats)}
            results[str(count)] = compare(calls, rounds=options.rounds, baseline="client gauges")
            report(f"{count} parameters", results[str(count)])
    write_json(options.json, results, benchmark="ring")


if __name__ == "__main__":
    main()
