"""How long replaying takes: reading a run, and each kind of policy over all of its steps.

    python -m benchmarks.replay [--steps 100000] [--layers 300] [--json FILE]

The run is made up and written by the recorder that writes live ones.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ring import ROW, manifest
from gradiometer.policy.kinds import KINDS
from gradiometer.policy.spec import load_policy
from gradiometer.recorder import Recorder
from gradiometer.records import RingGeometry
from gradiometer.replay.driver import UNREPLAYABLE, replay
from gradiometer.run import open_run

NEEDED = {"global_norm": {"max_norm": 1.0}, "group_norm": {"max_norm": 1.0}}


def write(root: Path, steps: int, layers: int) -> Path:
    """Write a run of lognormal norms, a parameter a layer; return its directory."""
    described = manifest(layers).model_copy(update={"ring": RingGeometry(capacity=steps, parameters=layers)})
    recorder = Recorder(root, described)
    generator = np.random.default_rng(0)
    for step in range(steps):
        recorder.stats[:] = norms = generator.lognormal(-3, 0.4, layers)
        recorder.commit(ROW._replace(step=step, grad_norm_preclip=float(np.linalg.norm(norms))))
    recorder.close()
    return recorder.path


def main() -> None:
    """Time each kind of policy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--layers", type=int, default=300)
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    options = parser.parse_args()
    seconds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        path = write(Path(root), options.steps, options.layers)
        started = time.perf_counter()
        run = open_run(path)
        seconds["reading the run"] = time.perf_counter() - started
        for kind in (kind for kind, model in KINDS.items() if model not in UNREPLAYABLE):
            started = time.perf_counter()
            replay(run, load_policy([{kind: NEEDED.get(kind, {})}]), kind)
            seconds[kind] = time.perf_counter() - started
    for name, taken in seconds.items():
        print(f"{name:20} {taken:7.2f} s {taken / options.steps * 1e6:8.1f} µs a step")
    if options.json is not None:
        body = {"benchmark": "replay", "steps": options.steps, "layers": options.layers, "seconds": seconds}
        options.json.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
