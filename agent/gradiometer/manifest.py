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
from torch.optim import Optimizer

from gradiometer.labels import check_labels
from gradiometer.layers import Parameters
from gradiometer.policy.spec import PolicySpec
from gradiometer.recorder import check_run_id
from gradiometer.records import FORMAT_VERSION, Manifest, RingGeometry, installed_version, pid_namespace

__all__ = ["choose_run_id", "describe", "rank_and_world", "ring_geometry"]

MAX_ROWS, MIN_ROWS = 100_000, 256


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


def describe(
    *,
    run_id: str,
    parameters: Parameters,
    optimizers: Sequence[Optimizer],
    device: torch.device,
    ring_bytes: int,
    policy: PolicySpec | None,
    labels: Mapping[str, str] | None,
) -> Manifest:
    """Build the manifest of this process's part in the run."""
    rank, world_size = rank_and_world()
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
        ring=ring_geometry(len(parameters), ring_bytes),
        policy=policy.to_dict() if policy else None,
        policies=policy.names if policy else (),
        labels=check_labels(labels),
    )


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
