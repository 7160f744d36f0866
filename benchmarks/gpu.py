"""What the agent adds to a step on a GPU: transformers of 100M, 300M and 1B parameters, bf16, fused AdamW.

For each model: the time of whole steps (CUDA events, interleaved variants, the baseline twice), how many times a step
makes the host wait for the device (torch's own sync debug mode), and the kernel time of the norm pass and of the
clipping (torch.profiler) against a device-to-device copy's bandwidth. Aim: the step with telemetry and clipping takes
no longer than the step with ``torch.nn.utils.clip_grad_norm_``.

    python -m benchmarks.gpu [--rounds N] [--json FILE] [--dry-run]

``--dry-run`` runs the same code on the CPU with a tiny model; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile

from benchmarks._measure import Comparison, attach, write_json
from benchmarks._models import Workload, backward, transformer
from gradiometer.norms import Meter

CLIP, TWIN = "clip_grad_norm_", "clip_grad_norm_ again (A/A)"
AIM = 1.00
AIMED = ("agent: clip, inactive", "agent: clip, active")
NEVER, ALWAYS = 1e9, 1e-6
"""Bounds that are never met, and that are met at every step."""
WARM_UP = 8
"""Steps before anything is timed: the backward hooks of the first ones are gone by then."""
STEPS = 5
"""Steps between two events, and steps over which synchronisations are counted."""
REPEATS = 10

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A transformer and its batch; heads are 64 wide."""

    width: int
    depth: int
    vocabulary: int = 32_000
    batch: int = 4
    length: int = 1024


SHAPES = {
    "100M": Shape(width=640, depth=12),
    "300M": Shape(width=1024, depth=20),
    "1B": Shape(width=2048, depth=18),
}
DRY = {"dry run": Shape(width=64, depth=2, vocabulary=64, batch=1, length=8)}
VARIANTS = 6
BYTES = 1.25 * 2 * (3 * VARIANTS + 2)
"""Bytes a parameter: weights and two moments for each variant, the original, gradients (one variant at a time holds
some), and a quarter more for activations."""


class Device:
    """The device that is measured, and its clock: CUDA events, or the host's clock in a dry run."""

    def __init__(self, *, dry_run: bool) -> None:
        self.cuda = not dry_run
        self.device = torch.device("cpu" if dry_run else "cuda")
        self.name = "CPU (dry run)" if dry_run else torch.cuda.get_device_name()

    def timed(self, call: Call, steps: int) -> Callable[[], float]:
        """Run ``call`` several times; return what tells, once all is done, the seconds that each took."""
        if not self.cuda:
            began = time.perf_counter()
            _repeat(call, steps)
            seconds = time.perf_counter() - began
            return lambda: seconds / steps
        first, last = torch.Event(self.device, enable_timing=True), torch.Event(self.device, enable_timing=True)
        first.record()
        _repeat(call, steps)
        last.record()
        return lambda: first.elapsed_time(last) / 1e3 / steps

    def wait(self) -> None:
        """Wait for all queued work."""
        if self.cuda:
            torch.cuda.synchronize()

    def lacks(self, need: float) -> str:
        """Return what to say if less than ``need`` bytes are free on the device, else nothing."""
        gc.collect()
        torch.cuda.empty_cache()  # what the last model held counts as taken until then
        free = torch.cuda.mem_get_info()[0] if self.cuda else need
        return f"needs {need / 2**30:.0f} GiB, {free / 2**30:.0f} are free" if free < need else ""

    @contextlib.contextmanager
    def counting_syncs(self) -> Iterator[list[warnings.WarningMessage]]:
        """Collect a warning for every operation that makes the host wait for the device."""
        self.wait()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if self.cuda:
                torch.cuda.set_sync_debug_mode("warn")
            try:
                yield caught
            finally:
                if self.cuda:
                    torch.cuda.set_sync_debug_mode("default")

    def kernel_seconds(self, call: Call) -> float:
        """Return the time that the kernels of one ``call`` take on the device, without the gaps between them."""
        call()
        self.wait()
        # Without CPU activity, operators are not recorded, so that a kernel's time is not counted for its caller too.
        with profile(activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU]) as profiler:
            _repeat(call, REPEATS)
            self.wait()
        rows = profiler.key_averages()
        micros = sum(row.self_device_time_total if self.cuda else row.self_cpu_time_total for row in rows)
        return float(micros) / 1e6 / REPEATS


def _repeat(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def naive_norms(parameters: list[nn.Parameter]) -> list[float]:
    """Read every gradient's norm back, one at a time, as logging loops do."""
    return [parameter.grad.norm().item() for parameter in parameters if parameter.grad is not None]


def step_calls(workload: Workload, root: Path, stack: contextlib.ExitStack) -> dict[str, Call]:
    """Return one whole step for each variant, on a copy of the model with an optimizer of its own."""

    def plain(work: Callable[[list[nn.Parameter]], object] | None = None) -> Call:
        model, optimizer = _copy(workload)
        parameters = list(model.parameters())
        return _step(workload, model, optimizer, None if work is None else lambda: work(parameters))

    def agent(max_norm: float | None = None) -> Call:
        model, optimizer = _copy(workload)
        policy: list[Any] = [{"nonfinite": {"action": "skip"}}, {"global_norm": {"max_norm": max_norm}}]
        attached = attach(model, optimizer, policy=policy if max_norm else None, dir=root)
        stack.enter_context(attached)
        return _step(workload, model, optimizer)

    return {
        "bare step": plain(),
        CLIP: plain(lambda parameters: nn.utils.clip_grad_norm_(parameters, ALWAYS)),
        "agent: observe": agent(),
        "agent: clip, inactive": agent(NEVER),
        "agent: clip, active": agent(ALWAYS),
        "naive .item() loop": plain(naive_norms),
    }


def _copy(workload: Workload) -> tuple[nn.Module, Optimizer]:
    model = copy.deepcopy(workload.model)
    return model, AdamW(model.parameters(), lr=1e-5, fused=True)


def _step(workload: Workload, model: nn.Module, optimizer: Optimizer, before: Call | None = None) -> Call:
    def step() -> None:
        backward(workload.loss(model))
        if before is not None:
            before()
        optimizer.step()
        optimizer.zero_grad()  # now, so that no other variant finds its memory taken

    return step


def compare_steps(device: Device, calls: dict[str, Call], rounds: int) -> Comparison:
    """Time the calls in interleaved rounds, clip_grad_norm_ twice in each."""
    for call in calls.values():
        _repeat(call, WARM_UP)
    timed = {**calls, TWIN: calls[CLIP]}
    names, samples = list(timed), {name: list[float]() for name in timed}
    for place in range(rounds):
        turn = place % len(names)
        for name in names[turn:] + names[:turn]:
            device.wait()
            seconds = device.timed(timed[name], STEPS)
            device.wait()
            samples[name].append(seconds())
    medians = {name: statistics.median(values) for name, values in samples.items()}
    noise = abs(medians.pop(TWIN) / medians[CLIP] - 1)
    ratios = {name: medians[CLIP] / seconds for name, seconds in medians.items()}
    return Comparison(baseline=CLIP, rounds=rounds, seconds=medians, ratios=ratios, noise=noise)


def count_syncs(device: Device, call: Call) -> float:
    """Return how many times a step makes the host wait for the device, on average."""
    with device.counting_syncs() as caught:
        _repeat(call, STEPS)
    return sum("synchronizing" in str(warning.message) for warning in caught) / STEPS


def measure_kernels(device: Device, workload: Workload) -> dict[str, dict[str, float]]:
    """Return seconds and bytes a second of the norm pass and the clipping, ours and torch's, and of a copy."""
    gradients: list[Tensor | None] = [torch.randn_like(parameter) for parameter in workload.parameters]
    tensors = [gradient for gradient in gradients if gradient is not None]
    size = sum(tensor.nbytes for tensor in tensors)
    meter, one = Meter(device.device), torch.ones((), device=device.device)
    source = torch.empty(size, dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    work: dict[str, tuple[Call, int]] = {
        "copy, device to device": (lambda: target.copy_(source), 2 * size),
        "agent: norm of every parameter": (lambda: meter(gradients), size),
        "agent: multiply, if not fused": (lambda: torch._foreach_mul_(tensors, one), 2 * size),
        "torch: get_total_norm": (lambda: nn.utils.get_total_norm(tensors), size),
        CLIP: (lambda: _clip(workload, tensors), 3 * size),
    }
    seconds = {name: device.kernel_seconds(call) for name, (call, _) in work.items()}
    return {name: {"seconds": each, "bytes_per_second": work[name][1] / each} for name, each in seconds.items()}


def _clip(workload: Workload, gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(workload.parameters, gradients, strict=True):
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(workload.parameters, NEVER)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was measured of one model."""

    steps: Comparison
    syncs: dict[str, float]
    kernels: dict[str, dict[str, float]]


def measure(device: Device, shape: Shape, rounds: int, dtype: torch.dtype = torch.bfloat16) -> Result | str:
    """Measure one model; a string says why not."""
    workload = transformer(**vars(shape), device=device.device, dtype=dtype)
    lacking = device.lacks(workload.size * BYTES)
    if lacking:
        return lacking
    kernels = measure_kernels(device, workload)
    workload.model.zero_grad()
    with tempfile.TemporaryDirectory() as root, contextlib.ExitStack() as stack:
        calls = step_calls(workload, Path(root), stack)
        steps = compare_steps(device, calls, rounds)
        syncs = {name: count_syncs(device, call) for name, call in calls.items()}
    return Result(steps=steps, syncs=syncs, kernels=kernels)


def print_result(model: str, result: Result) -> None:
    """Print one model's tables, with the aim beside what it is about."""
    steps = result.steps
    print(f"\n{model}: whole step, bf16, fused AdamW ({steps.rounds} rounds, A/A noise {steps.noise:.1%})")
    print(f"  {'':32} {'ms':>9}  {'÷ with clip_grad_norm_':>22}  {'host waits a step':>17}  aim")
    for name, seconds in steps.seconds.items():
        aim = f"≤ {AIM:.2f}" if name in AIMED else ""
        ratio = seconds / steps.seconds[CLIP]
        print(f"  {name:32} {seconds * 1e3:9.3f}  {ratio:22.4f}  {result.syncs[name]:17.1f}  {aim}")
    copied = next(iter(result.kernels.values()))["bytes_per_second"]
    print(f"  {'kernels alone':32} {'ms':>9}  {'GB/s':>22}  {'of the copy':>17}")
    for name, kernel in result.kernels.items():
        rate = kernel["bytes_per_second"]
        print(f"  {name:32} {kernel['seconds'] * 1e3:9.3f}  {rate / 1e9:22.0f}  {rate / copied:17.0%}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 15; with --dry-run 2)")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the CPU: only to see that it runs")
    options = parser.parse_args()
    options.rounds = options.rounds or (2 if options.dry_run else 15)
    return options


def main() -> int:
    """Measure every model; return 2 where there is no CUDA device."""
    options = _options()
    if not options.dry_run and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and torch sees none (--dry-run runs on the CPU)", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = Device(dry_run=options.dry_run)
    print(f"{device.name}, torch {torch.__version__}")
    results: dict[str, Result] = {}
    for model, shape in (DRY if options.dry_run else SHAPES).items():
        result = measure(device, shape, options.rounds)
        if isinstance(result, str):
            print(f"\n{model}: left out, it {result}")
            continue
        results[model] = result
        print_result(model, result)
    more = {name: {"host_waits_a_step": each.syncs, "kernels": each.kernels} for name, each in results.items()}
    about = {"benchmark": "gpu", "device": device.name, "torch": torch.__version__, "aim": AIM}
    write_json(options.json, {name: each.steps for name, each in results.items()}, **about, details=more)
    return 0


if __name__ == "__main__":
    sys.exit(main())
