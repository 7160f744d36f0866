"""What a policy's decision costs the host: one unit for the model, and 300 units, a parameter each.

Nothing but ``decide`` is timed, on float32 norms that are there already, past every warm-up. "Operators" are those that
torch dispatches, which on a GPU is about the number of kernels.

    python -m benchmarks.policies [--rounds N] [--json FILE]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._measure import arguments, compare, report, write_json
from gradiometer.policy.base import Layout
from gradiometer.policy.build import build_pipeline
from gradiometer.policy.pipeline import observe
from gradiometer.policy.spec import load_policy

UNITS = 300
STEP = 1000
HISTORY = 130
"""Steps decided beforehand, so that the default window of ``skip`` is full."""
BASELINE = "global_norm"
STAGES: dict[str, dict[str, Any]] = {
    "global_norm": {"global_norm": {"max_norm": 1.0}},
    "percentile": {"percentile": {}},
    "zclip": {"zclip": {}},
    "zclip reference": {"zclip": {"compat": "reference"}},
    "adagc": {"adagc": {"scope": "model"}},
    "ema_ratio": {"ema_ratio": {"scope": "model"}},
    "skip sigma": {"skip": {}},
    "skip median_mad": {"skip": {"rule": "median_mad"}},
    "skip abs": {"skip": {"rule": "abs", "threshold": 10.0}},
}


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def decision(stage: dict[str, Any], scope: str) -> Callable[[], object]:
    """Return a call that decides about one step, with the state that a run would have by then."""
    ((kind, settings),) = stage.items()
    if scope == "parameter" and kind != "skip":
        kind, settings = ("group_norm" if kind == "global_norm" else kind), settings | {"scope": scope}
    names = [f"layer{place}.weight" for place in range(UNITS)]
    layout = Layout(names=names, layers=names, device=torch.device("cpu"))
    pipeline = build_pipeline(load_policy([{kind: settings}]), layout)
    assert pipeline is not None
    states, generator = pipeline.init(), torch.Generator().manual_seed(0)
    for step in range(HISTORY):
        observation = observe(torch.rand(UNITS, generator=generator) + 0.5)
        _, states = pipeline.decide(states, observation, step)
    (policy,) = pipeline.stages
    return partial(policy.decide, next(iter(states.values())), observation, STEP)


def operators(call: Callable[[], object]) -> int:
    """Count what one call asks of torch."""
    with Count() as count:
        call()
    calls: int = count.calls
    return calls


def main() -> None:
    """Compare every policy, for one unit and for 300."""
    options = arguments(__doc__)
    torch.set_num_threads(1)
    results, counts = {}, {}
    with torch.no_grad():
        for scope, title in (("model", "one unit"), ("parameter", f"{UNITS} units")):
            calls = {name: decision(stage, scope) for name, stage in STAGES.items()}
            results[title] = compare(calls, rounds=options.rounds, baseline=BASELINE)
            counts[title] = {name: operators(call) for name, call in calls.items()}
            report(f"decide, {title}", results[title])
            print("  operators: " + ", ".join(f"{name} {count}" for name, count in counts[title].items()))
    write_json(options.json, results, benchmark="policies", operators=counts)


if __name__ == "__main__":
    main()
