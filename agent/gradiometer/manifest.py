"""Describe the process, the model and the policy in a manifest."""

from __future__ import annotations

import os
import platform
import secrets
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.optim import Optimizer

from gradiometer.insight import COSINE_SAMPLES, SAMPLES
from gradiometer.layers import Parameters
from gradiometer.policy.spec import PolicySpec
from gradiometer.process import pid_namespace
from gradiometer.recorder import check_labels, check_run_id
from gradiometer.records import (
    FORMAT_VERSION,
    Manifest,
    RingGeometry,
    SampleInfo,
    installed_version,
)

__all__ = [
    "check_sampling",
    "choose_run_id",
    "data_parallel_size",
    "describe",
    "rank_and_world",
    "ring_geometry",
    "sample_info",
]

MAX_ROWS, MIN_ROWS, MIN_SAMPLES = 100_000, 256, 64


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of processes: (0, 1) unless torch.distributed is initialised."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def choose_run_id(run_id: str | None) -> str:
    """Return the id given, or a new one from the clock."""
    if run_id is not None:
        return check_run_id(run_id)
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def ring_geometry(parameters: int, ring_bytes: int) -> RingGeometry:
    """Choose how many rows fit into ``ring_bytes``: at most 100 000. Raises ValueError if it is fewer than 256."""
    if not isinstance(ring_bytes, int):
        raise TypeError(f"ring_bytes is {ring_bytes!r}, expected a number of bytes")
    row = RingGeometry(capacity=2, parameters=parameters).dtype.itemsize
    if ring_bytes < MIN_ROWS * row:
        raise ValueError(
            f"ring_bytes is {ring_bytes}; {parameters} parameters need {row} bytes a step, "
            f"and a ring of at least {MIN_ROWS} steps: pass ring_bytes={MIN_ROWS * row} or more"
        )
    return RingGeometry(capacity=min(MAX_ROWS, ring_bytes // row), parameters=parameters)


def check_sampling(every: int, *, cosine: bool) -> str:
    """Put in words what is sampled; raises TypeError or ValueError for an interval that is none."""
    if not isinstance(every, int):
        raise TypeError(f"updates_every is {every!r}, expected a number of steps")
    if every < 0:
        raise ValueError(f"updates_every is {every}, expected a number of steps, or 0 to measure no updates")
    if not every and cosine:
        raise ValueError("cosine is measured in the steps that updates_every names, which is 0: give it a number")
    return f"updates_every={every}, cosine={cosine}"


def sample_info(ring: RingGeometry, every: int, *, cosine: bool) -> SampleInfo | None:
    """Plan the ring of what is measured every so many steps, if any: it reaches as far back as the ring of steps."""
    if not every:
        return None
    columns = (*SAMPLES, *COSINE_SAMPLES) if cosine else SAMPLES
    capacity = max(MIN_SAMPLES, ring.capacity // every)
    return SampleInfo(
        every=every,
        columns=columns,
        ring=RingGeometry(capacity=capacity, parameters=ring.parameters, stats=len(columns)),
    )


def data_parallel_size(model: nn.Module, members: int, given: int | None) -> int | None:
    """Return how many of the job's ``members`` average their gradients: the size of DistributedDataParallel's group.

    ``given`` goes before. None where it cannot be seen: in a distributed job whose model is not wrapped, or is wrapped
    by something else. Raises ValueError for a number that cannot be.
    """
    if given is not None:
        if not isinstance(given, int) or not 1 <= given <= members:
            raise ValueError(f"data_parallel is {given!r}, expected a number of ranks from 1 to {members}")
        return given
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            size: int = module.process_group.size()
            return size
    return 1 if members == 1 else None


def describe(
    *,
    run_id: str,
    parameters: Parameters,
    optimizers: Sequence[Optimizer],
    device: torch.device,
    ring_bytes: int,
    policy: PolicySpec | None,
    labels: Mapping[str, str] | None,
    data_parallel: int | None = None,
    updates_every: int = 0,
    cosine: bool = False,
) -> Manifest:
    """Build the manifest of this process's part in the run."""
    rank, world_size = rank_and_world()
    ring = ring_geometry(len(parameters), ring_bytes)
    return Manifest(
        format_version=FORMAT_VERSION,
        run_id=run_id,
        job=Path(sys.argv[0] or "python").name,
        rank=rank,
        world_size=world_size,
        pid=os.getpid(),
        process_start=psutil.Process().create_time(),
        host=socket.gethostname(),
        pid_namespace=pid_namespace(),
        created_ns=time.time_ns(),
        gradiometer_version=installed_version(),
        torch_version=torch.__version__,
        python_version=platform.python_version(),
        device=_device_name(device),
        optimizers=tuple(type(optimizer).__name__ for optimizer in optimizers),
        parameters=tuple(parameters.infos),
        ring=ring,
        policy=policy.to_dict() if policy else None,
        policies=policy.names if policy else (),
        shadow=tuple(spec.name for spec in policy.shadow) if policy else (),
        labels=check_labels(labels),
        data_parallel=data_parallel,
        samples=sample_info(ring, updates_every, cosine=cosine),
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
