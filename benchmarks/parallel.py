"""What the agent adds to a step of parallel training: time and collectives, on two processes over gloo.

Gradients are preset and the optimizer's step does nothing, so that what is timed is the agent's work, or the clipping,
and the waiting of the ranks for each other in it. All ranks take turns through the same calls; times are rank 0's.

    python -m benchmarks.parallel [--rounds N] [--json FILE] [--ranks N] [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks._measure import Comparison, attach, report, write_json
from benchmarks._models import Workload, backward, tensors, transformer
from benchmarks.step_overhead import _Idle

CLIP, BARE, TWIN = "clip_grad_norm_", "bare step", "clip_grad_norm_ again (A/A)"
BOUND = 1e-3
"""A norm that no gradient here stays under, so that all who clip do."""
REPEATS = 3
Call = Callable[[], object]


def full_norms(parameters: list[nn.Parameter]) -> list[float]:
    """Put every gradient together and read its norm, as logging loops do."""
    gradients: list[Any] = [parameter.grad for parameter in parameters]
    whole: list[Tensor] = [each.full_tensor() if isinstance(each, DTensor) else each for each in gradients]
    return [float(each.norm()) for each in whole]


def replicated(workload: Workload) -> nn.Module:
    return nn.parallel.DistributedDataParallel(workload.model)


def sharded(workload: Workload) -> nn.Module:
    model = workload.model
    for block in getattr(model, "blocks", []):
        fully_shard(block)
    fully_shard(model)
    return model


def replicated_shards(workload: Workload) -> nn.Module:
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("replicate", "shard"))
    fully_shard(workload.model, mesh=mesh)
    return workload.model


WAYS = {"DDP": replicated, "FSDP2": sharded, "HSDP": replicated_shards}


def workloads(*, quick: bool) -> dict[str, Callable[[], Workload]]:
    """Return the models by name."""
    if quick:
        return {"3 tensors": functools.partial(tensors, count=3)}
    wide = functools.partial(transformer, width=256, depth=8, vocabulary=2048, batch=2, length=32)
    return {"transformer": wide, "200 tensors": functools.partial(tensors, count=200)}


def calls_of(model: nn.Module, root: Path, stack: contextlib.ExitStack) -> dict[str, Call]:
    """Return what is timed; all share the model's gradients, which no call may leave much changed."""
    parameters = list(model.parameters())
    idle = _Idle(parameters)

    def clip() -> None:
        nn.utils.clip_grad_norm_(parameters, BOUND)
        idle.step()

    def read() -> None:
        full_norms(parameters)
        idle.step()

    calls: dict[str, Call] = {BARE: idle.step, CLIP: clip, TWIN: clip, "naive full_tensor().norm()": read}
    policies: dict[str, Any] = {
        "agent: observe": None,
        "agent: fused skip and clip": [{"nonfinite": {}}, {"global_norm": {"max_norm": BOUND}}],
    }
    for name, policy in policies.items():
        optimizer = _Idle(parameters, fused=True)
        stack.enter_context(attach(model, optimizer, policy=policy, dir=root))
        calls[name] = optimizer.step
    return calls


def measure(calls: dict[str, Call], rounds: int) -> tuple[Comparison, dict[str, int]]:
    """Time the calls in turns, and count the collectives of one of each."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    collectives = {}
    for name, call in calls.items():
        call()
        with CommDebugMode() as counter:  # type: ignore[no-untyped-call]  # torch
            call()
        collectives[name] = counter.get_total_counts()
    names = list(calls)
    for place in range(rounds):
        turn = place % len(names)
        for name in names[turn:] + names[:turn]:
            dist.barrier()
            began = time.perf_counter()
            for _ in range(REPEATS):
                calls[name]()
            samples[name].append((time.perf_counter() - began) / REPEATS)
    seconds = {name: statistics.median(values) for name, values in samples.items()}
    noise = abs(seconds.pop(TWIN) / seconds[CLIP] - 1)
    ratios = {name: seconds[CLIP] / each for name, each in seconds.items()}
    del collectives[TWIN]
    return Comparison(baseline=CLIP, rounds=rounds, seconds=seconds, ratios=ratios, noise=noise), collectives


def work(rank: int, options: argparse.Namespace) -> None:
    """Measure as one rank; rank 0 reports."""
    torch.set_num_threads(1)
    store = f"file://{options.store}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.ranks)
    results, collectives = {}, {}
    with tempfile.TemporaryDirectory() as root:
        for name, make in workloads(quick=options.quick).items():
            for way, parallelize in WAYS.items():
                torch.manual_seed(0)
                workload = make()
                model = parallelize(workload)
                backward(workload.loss(model))
                with contextlib.ExitStack() as stack:
                    title = f"{name}, {way}"
                    results[title], collectives[title] = measure(
                        calls_of(model, Path(root), stack), 1 if options.quick else options.rounds
                    )
                if rank == 0:
                    report(title, results[title])
                    print("  collectives a step:", json.dumps(collectives[title]), flush=True)
    if rank == 0:
        write_json(
            options.json,
            results,
            benchmark="parallel",
            torch=torch.__version__,
            ranks=options.ranks,
            collectives=collectives,
        )
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    """Start the ranks, or be one; return the first exit code that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--quick", action="store_true", help="one round, a small model: only to see that it runs")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        work(options.rank, options)
        sys.stdout.flush()
        os._exit(0)  # gloo's threads abort the interpreter's end now and then
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.parallel", *sys.argv[1:], "--store", f"{folder}/store"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ranks = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(options.ranks)]
        return next(filter(None, [rank.wait() for rank in ranks]), 0)


if __name__ == "__main__":
    sys.exit(main())
