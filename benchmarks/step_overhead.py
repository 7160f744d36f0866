"""What the agent adds to a step on the CPU, against ``torch.nn.utils.clip_grad_norm_``.

Two views. *Components*: gradients are preset and the optimizer's step does nothing, so that all that is timed is the
agent's work, or the clipping, on top of a bare call. What fused kernels do with the coefficient is not in it. *Whole
steps*: forward, backward and fused AdamW of real models.

Torch runs one thread, unless ``--threads`` says otherwise: with more, threads that wait for each other are what is
timed as soon as anything else runs on the machine. Rounds are compared a few at a time, and a ratio is the median of
those of such short spells, for whatever else runs on the machine comes and goes.

    python -m benchmarks.step_overhead [--rounds N] [--json FILE] [--threads N] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks._measure import Comparison, attach, compare, write_json
from benchmarks._models import Workload, backward, mlp, tensors, transformer
from benchmarks._others import GRAD_NORM, WATCH, grad_norm, missing, wandb_watch

CLIP, BARE = "clip_grad_norm_", "bare step"
OFF, ARMED = "agent: observe, hooks off", "agent: observe, hooks armed"
SPIKE = 1000.0
NEVER, ALWAYS = 1e9, SPIKE * (1 - 1e-5)
"""Bounds that are never met, and that are met at every step while one element is :data:`SPIKE`."""
AIMS = {"agent: observe": 0.70, "agent: fused clip, inactive": 0.75, "agent: fused clip, active": 0.75}
"""At most this share of what clip_grad_norm_ costs; aims for models with at least 4 million parameters or 1000
tensors, for the agent's fixed cost outweighs the clipping of tiny ones."""
TINY = "tiny: 12 tensors"
SPELL = 3
"""Rounds that are compared at a time."""

Call = Callable[[], object]
View = Callable[[Workload, Path, contextlib.ExitStack], dict[str, Call]]
Stages = list[dict[str, dict[str, Any]]]
Policy = Stages | dict[str, Stages]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An agent to measure: its policy, the kind of optimizer, and the largest element of the gradients."""

    policy: Policy | None = None
    fused: bool = False
    spike: float = SPIKE


def _clip(bound: float) -> Stages:
    return [{"global_norm": {"max_norm": bound}}]


def _layers(bound: float) -> Stages:
    return [{"group_norm": {"max_norm": bound, "scope": "layer"}}]


def _value(bound: float) -> Stages:
    return [{"value": {"max_abs": bound}}]


def _agc(factor: float) -> Stages:
    return [{"agc": {"clip_factor": factor}}]


SKIP: Stages = [{"nonfinite": {"action": "skip"}}]
CASES = {
    "observe": Case(),
    "fused clip, inactive": Case(policy=_clip(NEVER), fused=True),
    "fused clip, active": Case(policy=_clip(ALWAYS), fused=True),
    "fused skip and clip, active": Case(policy=SKIP + _clip(ALWAYS), fused=True),
    "foreach clip, inactive": Case(policy=_clip(NEVER)),
    "foreach clip, active": Case(policy=_clip(ALWAYS)),
    "group_norm per layer, inactive": Case(policy=_layers(NEVER)),
    "group_norm per layer, active": Case(policy=_layers(ALWAYS)),
    "agc, inactive": Case(policy=_agc(NEVER)),
    "agc, active": Case(policy=_agc(1e-6)),
    "value, inactive": Case(policy=_value(NEVER)),
    "value, active": Case(policy=_value(ALWAYS)),
    "fused clip, inactive; a clip in shadow": Case(
        policy={"pipeline": _clip(NEVER), "shadow": _layers(ALWAYS)}, fused=True
    ),
    "fused clip, inactive; value in shadow": Case(
        policy={"pipeline": _clip(NEVER), "shadow": _value(ALWAYS)}, fused=True
    ),
    "skip without fused, inactive": Case(policy=SKIP),
    "skip without fused, taken": Case(policy=SKIP, spike=math.nan),
}


class _Idle(Optimizer):
    """An optimizer whose step does nothing, and which looks fused if asked to."""

    def __init__(self, parameters: list[nn.Parameter], *, fused: bool = False) -> None:
        super().__init__(parameters, {"lr": 0.1, "fused": fused})
        self._step_supports_amp_scaling = fused

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # it takes no closure
        """Do nothing; hooks run before and after."""


def naive_norms(parameters: list[nn.Parameter]) -> list[float]:
    """Read every gradient's norm back, one at a time, as logging loops do."""
    return [parameter.grad.norm().item() for parameter in parameters if parameter.grad is not None]


def component_calls(workload: Workload, root: Path, stack: contextlib.ExitStack) -> dict[str, Call]:
    """Return the calls of the component view; all share the model's preset gradients."""
    model, parameters = workload.model, workload.parameters
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) / math.sqrt(workload.size)
    idle = _Idle(parameters)
    with_norms = grad_norm()
    calls = {
        BARE: _idle_step(parameters, idle),
        CLIP: _idle_step(parameters, idle, lambda: nn.utils.clip_grad_norm_(parameters, ALWAYS)),
        "clip_grad_value_": _idle_step(parameters, idle, lambda: nn.utils.clip_grad_value_(parameters, ALWAYS)),
        "naive .item() loop": _idle_step(parameters, idle, lambda: naive_norms(parameters)),
    }
    if with_norms is not None:
        calls[GRAD_NORM] = _idle_step(parameters, idle, lambda: with_norms(model, 2))
    for name, case in CASES.items():
        optimizer = _Idle(parameters, fused=case.fused)
        stack.enter_context(attach(model, optimizer, policy=case.policy, dir=root, backward="off"))
        calls[f"agent: {name}"] = _idle_step(parameters, optimizer, spike=case.spike)
    return calls


def _idle_step(
    parameters: list[nn.Parameter], optimizer: Optimizer, before: Call | None = None, spike: float = SPIKE
) -> Call:
    """Return a call of ``before`` and the step, after one element is set anew that holds nearly all of the norm.

    So clipping is as strong at each call, though the gradients are not computed anew.
    """
    gradient = parameters[0].grad
    assert gradient is not None
    element: Tensor = gradient.view(-1)[:1]

    def step() -> None:
        element.fill_(spike)
        if before is not None:
            before()
        optimizer.step()

    return step


def whole_calls(workload: Workload, root: Path, stack: contextlib.ExitStack) -> dict[str, Call]:
    """Return the calls of whole steps; each has a copy of the model and a fused AdamW of its own."""

    def agent(policy: Policy | None = None, **options: Any) -> Call:
        model, optimizer = _copy(workload)
        stack.enter_context(attach(model, optimizer, policy=policy, dir=root, **options))
        return _whole_step(workload, model, optimizer)

    def other(work: Callable[[nn.Module, list[nn.Parameter]], object] | None = None) -> Call:
        model, optimizer = _copy(workload)
        parameters = list(model.parameters())
        return _whole_step(workload, model, optimizer, None if work is None else lambda: work(model, parameters))

    calls = {
        BARE: other(),
        CLIP: other(lambda _, parameters: nn.utils.clip_grad_norm_(parameters, 1e-3)),
        "naive .item() loop": other(lambda _, parameters: naive_norms(parameters)),
        "agent: observe": agent(),
        "agent: fused clip, inactive": agent(_clip(NEVER)),
        "agent: fused clip, active": agent(_clip(1e-6)),
        OFF: agent(backward="off"),
        ARMED: agent(backward="every"),
    }
    with_norms = grad_norm()
    if with_norms is not None:
        calls[GRAD_NORM] = other(lambda model, _: with_norms(model, 2))
    model, optimizer = _copy(workload)
    watching = wandb_watch(model, root, stack)
    if watching is not None:
        calls[WATCH] = _whole_step(workload, model, optimizer, watching)
    return calls


def _copy(workload: Workload) -> tuple[nn.Module, Optimizer]:
    model = copy.deepcopy(workload.model)
    return model, AdamW(model.parameters(), lr=1e-5, fused=True)


def _whole_step(workload: Workload, model: nn.Module, optimizer: Optimizer, before: Call | None = None) -> Call:
    def step() -> None:
        optimizer.zero_grad()
        backward(workload.loss(model))
        if before is not None:
            before()
        optimizer.step()

    return step


def relative_costs(spells: list[Comparison]) -> dict[str, float]:
    """Return what each callable costs beyond the bare one, as a share of what clip_grad_norm_ costs beyond it."""
    return _medians([{name: _beyond(each, name) / _beyond(each, CLIP) for name in each.seconds} for each in spells])


def _beyond(spell: Comparison, name: str) -> float:
    return spell.seconds[name] - spell.seconds[BARE]


def whole_ratios(spells: list[Comparison]) -> dict[str, float]:
    """Return how long each callable's step takes, as a multiple of the step with clip_grad_norm_."""
    return _medians([{name: 1 / ratio for name, ratio in each.ratios.items()} for each in spells])


def together(spells: list[Comparison]) -> Comparison:
    """Compose the comparisons of short spells into one of their medians."""
    return Comparison(
        baseline=CLIP,
        rounds=sum(each.rounds for each in spells),
        seconds=_medians([each.seconds for each in spells]),
        ratios=_medians([each.ratios for each in spells]),
        noise=statistics.median(each.noise for each in spells),
    )


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def print_components(model: str, spells: list[Comparison]) -> None:
    """Print costs beyond a bare step, their ratios and the aims."""
    whole = together(spells)
    print(f"\n{model}: cost beyond a bare step ({whole.rounds} rounds, A/A noise {whole.noise:.1%})")
    print(f"  {'':38} {'µs':>9}  {'÷ clip_grad_norm_':>17}  aim")
    micros = _medians([{name: _beyond(each, name) * 1e6 for name in each.seconds} for each in spells])
    for name, ratio in relative_costs(spells).items():
        aim = f"≤ {AIMS[name]:.2f}" if name in AIMS and model != TINY else ""
        print(f"  {name:38} {micros[name]:9.1f}  {ratio:17.2f}  {aim}".rstrip())


def print_whole(model: str, spells: list[Comparison]) -> None:
    """Print whole steps' times and their ratios."""
    whole, ratios = together(spells), whole_ratios(spells)
    print(f"\n{model}: whole step, fused AdamW ({whole.rounds} rounds, A/A noise {whole.noise:.1%})")
    print(f"  {'':38} {'ms':>9}  {'÷ with clip_grad_norm_':>22}")
    for name, ratio in ratios.items():
        print(f"  {name:38} {whole.seconds[name] * 1e3:9.3f}  {ratio:22.3f}")
    print(f"  backward hooks armed ÷ off: {ratios[ARMED] / ratios[OFF]:.3f}")


def workloads(*, quick: bool) -> dict[str, Workload]:
    """Make the models, or stand-ins that are quick to run and whose figures mean nothing."""
    if quick:
        return {
            "mlp: 4 layers of 64 by 64": mlp(width=64, depth=4),
            "transformer: 2 layers": transformer(width=32, depth=2, vocabulary=32, batch=1, length=8),
            "tensors: 50 of 32 by 32": tensors(count=50),
            TINY: mlp(width=16, depth=6),
        }
    return {
        "mlp: 4 layers of 1024 by 1024": mlp(width=1024, depth=4),
        "transformer: 12 layers": transformer(width=256, depth=12, vocabulary=256, batch=2, length=64),
        "tensors: 1000 of 32 by 32": tensors(count=1000),
        TINY: mlp(width=16, depth=6),
    }


def measure(view: View, workload: Workload, rounds: int) -> list[Comparison]:
    """Compare the calls of one view of one model, a few rounds at a time."""
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        calls = view(workload, Path(root), stack)
        gc.collect()
        gc.freeze()  # the collections between timings would take longer than what is timed
        stack.callback(gc.unfreeze)
        names, spells = list(calls), []
        for spell in range(max(1, rounds // SPELL)):
            turn = spell * SPELL % len(names)
            turned = {name: calls[name] for name in names[turn:] + names[:turn]}
            spells.append(compare(turned, rounds=SPELL, baseline=CLIP))
    return [dataclasses.replace(each, seconds={name: each.seconds[name] for name in names}) for each in spells]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 45; with --quick 3)")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    parser.add_argument("--quick", action="store_true", help="small models and few rounds: only to see that it runs")
    options = parser.parse_args()
    options.rounds = options.rounds or (SPELL if options.quick else 45)
    return options


def main() -> None:
    """Measure every model in both views."""
    options = _options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for name in missing():
        print(f"{name}: not installed")
    results: dict[str, Comparison] = {}
    ratios: dict[str, Mapping[str, float]] = {}
    for model, workload in workloads(quick=options.quick).items():
        components = measure(component_calls, workload, options.rounds)
        workload.model.zero_grad()
        whole = measure(whole_calls, workload, options.rounds)
        print_components(model, components)
        print_whole(model, whole)
        results |= {f"{model}, components": together(components), f"{model}, whole step": together(whole)}
        ratios |= {f"{model}, components": relative_costs(components), f"{model}, whole step": whole_ratios(whole)}
    about = {"torch": torch.__version__, "threads": options.threads, "aims": AIMS, "not_installed": missing()}
    write_json(options.json, results, benchmark="step_overhead", **about, ratios=ratios)


if __name__ == "__main__":
    main()
