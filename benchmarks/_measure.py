"""Compare callables by time: interleaved rounds, medians, and the noise that an A/A comparison shows.

The callables of a round run one after the other, in an order that turns from round to round, so that a slow spell of
the machine hits all of them. The baseline runs twice in each round: the ratio of its two medians should be 1, and how
far it is from 1 is the noise below which no other ratio says anything.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gradiometer

__all__ = ["Comparison", "arguments", "attach", "compare", "report", "write_json"]

Call = Callable[[], object]
_TWIN = "baseline again (A/A)"
TARGET_SECONDS = 0.01
"""A callable is repeated within a round until it takes about this long."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Medians over the rounds, in seconds a call, and each one's share of the baseline's."""

    baseline: str
    rounds: int
    seconds: dict[str, float]
    ratios: dict[str, float]
    """Baseline's median over the callable's: above 1, the callable is that many times faster."""
    noise: float
    """Distance from 1 of the ratio of two identical measurements of the baseline."""


def compare(
    callables: Mapping[str, Call], *, rounds: int = 15, baseline: str, before: Mapping[str, Call] | None = None
) -> Comparison:
    """Time ``callables``, of which ``baseline`` names one, in ``rounds`` interleaved rounds after one to warm up.

    ``before`` maps some of the names to what is done before each of their calls, which is not counted.
    """
    timed = {**callables, _TWIN: callables[baseline]}
    prepare = {name: (before or {}).get(baseline if name == _TWIN else name) for name in timed}
    repeats = {name: _repeats(call, prepare[name]) for name, call in timed.items()}
    samples: dict[str, list[float]] = {name: [] for name in timed}
    names = list(timed)
    for place in range(rounds):
        turn = place % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(_time(timed[name], repeats[name], prepare[name]))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    noise = abs(medians.pop(_TWIN) / medians[baseline] - 1)
    ratios = {name: medians[baseline] / seconds for name, seconds in medians.items()}
    return Comparison(baseline=baseline, rounds=rounds, seconds=medians, ratios=ratios, noise=noise)


def _repeats(call: Call, prepare: Call | None) -> int:
    _time(call, 1, prepare)
    return max(1, min(1000, round(TARGET_SECONDS / max(_time(call, 1, prepare), 1e-9))))


def _time(call: Call, repeats: int, prepare: Call | None) -> float:
    """Return the seconds a call takes, averaged over ``repeats``."""
    gc.collect()
    if prepare is not None:
        return sum(_time_prepared(call, prepare) for _ in range(repeats)) / repeats
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats


def _time_prepared(call: Call, prepare: Call) -> float:
    prepare()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def attach(*arguments: Any, **options: Any) -> gradiometer.Agent:
    """Attach an agent that does not follow the clipping of the calls it is compared with: they are torch's own."""
    agent = gradiometer.attach(*arguments, ring_bytes=2**24, **options)
    agent._stepper.own.close()
    return agent


def report(title: str, comparison: Comparison) -> None:
    """Print a comparison as a small table."""
    print(f"{title} (median of {comparison.rounds} rounds, A/A noise {comparison.noise:.1%})")
    for name, seconds in comparison.seconds.items():
        print(f"  {name:32} {seconds * 1e3:10.4f} ms   {comparison.ratios[name]:8.1f} x")


def write_json(path: Path | None, results: Mapping[str, Comparison], **more: Any) -> None:
    """Write results and what they were measured with to ``path``; None writes nothing."""
    if path is None:
        return
    machine = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    body = {"machine": machine, **more, "results": {name: asdict(result) for name, result in results.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1) + "\n")


def arguments(description: str | None, *, quick: bool = False) -> argparse.Namespace:
    """Parse ``--rounds``, ``--json FILE`` and, for a benchmark that has it, ``--quick``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    if quick:
        parser.add_argument("--quick", action="store_true", help="the smallest sizes: only to see that it runs")
    return parser.parse_args()
