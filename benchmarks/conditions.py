"""What the conditions of a policy's ``actions`` cost the host a row, one by one and together, against writing the row.

python -m benchmarks.conditions [--rounds N] [--json FILE]
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._measure import arguments, compare, report, write_json
from benchmarks.ring import ROW, manifest
from gradiometer.actions import Actions
from gradiometer.policy.actions import ActionSpec
from gradiometer.recorder import Recorder

CONDITIONS: dict[str, Any] = {
    "consecutive_skips": 1000,
    "consecutive_nonfinite": 1000,
    "norm_above": 1e9,
    "clip_rate": {"policy": "global_norm", "above": 0.99},
    "skip_rate": {"above": 0.99},
    "delayed_mean": {"ratio": 1e9},
    "max_ratio": {"ratio": 1e9},
}
"""None of them is met."""
PARAMETERS = 300


def main() -> None:
    """Compare every condition, and all of them, with the writing of a row."""
    options = arguments(__doc__)
    with tempfile.TemporaryDirectory() as root:
        recorder = Recorder(Path(root), manifest(PARAMETERS))
        stats = np.ones((3, PARAMETERS), np.float32)

        def write() -> None:
            recorder.stats[:] = stats
            recorder.commit(ROW)

        calls: dict[str, Callable[[], object]] = {"ring row": write}
        specs = {
            name: ActionSpec.model_validate({"when": {name: setting}, "do": "event"})
            for name, setting in CONDITIONS.items()
        }
        for name, chosen in {**{name: [spec] for name, spec in specs.items()}, "all": list(specs.values())}.items():
            actions = Actions(recorder, "bench", 0)
            actions.replace(chosen, {"global_norm": 0})
            for _ in range(1200):  # windows are full
                actions.see(ROW)
            calls[name] = lambda actions=actions: actions.see(ROW)  # type: ignore[misc]  # bound here
        results = {"conditions": compare(calls, rounds=options.rounds, baseline="ring row")}
        report("conditions, a row", results["conditions"])
        recorder.close()
    write_json(options.json, results, benchmark="conditions")


if __name__ == "__main__":
    main()
