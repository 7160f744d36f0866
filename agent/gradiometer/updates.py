"""Measure, every so many steps, by how much a step moved the weights, and how alike two successive gradients are.

Both need what was there before: a copy. It is bounded: at most :data:`ELEMENTS` elements of a parameter are read, evenly
strided over its memory, and at most :data:`TOTAL` of all; norms are scaled up to the whole. A parameter of that many
elements or fewer is measured exactly; of a larger one, where n of its elements are read, an L2 norm of Gaussian
elements is off by a fraction of sqrt(1 / 2n), 1.1 % for 4096, and the cosine of unrelated gradients by sqrt(1 / n).
The two matrices of float32 samples that a sampled step holds take 32 MiB at most (twice that where a parameter is
float64), and one is kept from the step before where the cosine is on. Steps in between cost a dictionary look-up.
No host read of a device tensor; failures stop at the guard.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradiometer import transfer
from gradiometer._guard import Guard
from gradiometer.recorder import RingWriter, RowHeader
from gradiometer.records import COSINE_SAMPLES, SampleInfo
from gradiometer.rounds import Watched, gradients_of

__all__ = ["ELEMENTS", "TOTAL", "Sampler", "Updates", "local_part"]

ELEMENTS = 4096
"""Elements of a parameter that are read."""
TOTAL = 2**22
"""Elements of all parameters together that are read: beyond 1024 parameters, fewer of each."""
NAN = math.nan


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor that may be sharded."""
    part: Tensor = getattr(tensor, "_local_tensor", tensor)
    return part


class Sampler:
    """Read the same elements of P tensors again and again, as the rows of a matrix [P, width] on ``device``."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        sizes = [_values(tensor).numel() for tensor in tensors]
        self.width = max(1, min(ELEMENTS, TOTAL // len(sizes), max(sizes)))
        self._strides = [_stride(size, self.width) for size in sizes]
        self._dtype = torch.float32
        if any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors):
            self._dtype = torch.float64
        self._device = device
        read = [-(-size // stride) for size, stride in zip(sizes, self._strides, strict=True)]
        scales = [math.sqrt(size / count) if count else 1.0 for size, count in zip(sizes, read, strict=True)]
        self._scales = torch.tensor(scales, dtype=self._dtype).to(device)

    def read(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the samples [P, width], float32 or float64; zeros beyond a tensor's end.

        A tensor that is None, not strided, or large and with holes in its memory, is all zeros: nothing is known of it.
        """
        matrix = torch.zeros(len(self._strides), self.width, dtype=self._dtype, device=self._device)
        places, samples = [], []
        for row, tensor, stride in zip(matrix.unbind(), tensors, self._strides, strict=True):
            sample = None if tensor is None or tensor.layout is not torch.strided else _strided(_values(tensor), stride)
            if sample is not None:
                places.append(row[: sample.numel()])
                samples.append(sample)
        if samples:
            torch._foreach_copy_(places, samples, non_blocking=self._device.type != "cpu")
        return matrix

    def norms(self, samples: Tensor) -> Tensor:
        """Estimate the L2 norms [P] of the whole tensors from their samples."""
        norms: Tensor = torch.linalg.vector_norm(samples, dim=1) * self._scales
        return norms


def _values(tensor: Tensor) -> Tensor:
    tensor = local_part(tensor.detach())
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _stride(size: int, width: int) -> int:
    """Return a stride at which at most ``width`` of ``size`` elements are met, and all columns of a matrix."""
    stride = max(1, -(-size // width))
    while stride > 1 and math.gcd(stride, size) > 1:  # a divisor of a trailing dimension walks down few columns
        stride += 1
    return stride


def _strided(tensor: Tensor, stride: int) -> Tensor | None:
    """View every ``stride``-th element in the order of memory, [n]; None for a large tensor whose memory has holes."""
    if not tensor.is_contiguous():
        tensor = tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
    if stride > 1 and not tensor.is_contiguous():
        return None  # it cannot be flattened without copying it all
    return tensor.reshape(-1)[::stride]


@dataclass(frozen=True, slots=True)
class _Begun:
    """A sampled step whose weights have not moved yet."""

    header: RowHeader
    watched: Watched
    weights: Tensor
    columns: list[Tensor]


class Updates:
    """The sampled measurements of one agent, written to ``samples.ring`` as they reach the host.

    A step is taken once it is over for all optimizers that share it. In a job whose parameters are sharded, what is
    written is of this rank's shards.
    """

    def __init__(
        self, parameters: Sequence[Tensor], device: torch.device, info: SampleInfo, ring: RingWriter, guard: Guard
    ) -> None:
        self._sampler = Sampler(parameters, device)
        self._every, self._columns, self._ring, self._guard = info.every, len(info.columns), ring, guard
        self._cosine = set(COSINE_SAMPLES) <= set(info.columns)
        self._steps: dict[int, int] = {}
        """Steps so far of each optimizer, or of all that step together."""
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        """Samples and norms of the gradients of the step before a sampled one."""
        self._begun: _Begun | None = None
        self._transfer: transfer.Transfer[RowHeader] = transfer.Transfer(len(parameters) * self._columns, device)
        self._pid = os.getpid()

    def begin(self, step: int, optimizer: int, watched: Watched, norms: Tensor) -> None:
        """Take note of a step whose gradients, of ``norms`` [P], are final and not yet clipped."""
        count = self._steps[optimizer] = self._steps.get(optimizer, -1) + 1
        due, next_due = count % self._every == 0, self._cosine and (count + 1) % self._every == 0
        if not due and not next_due and self._begun is None:
            return
        with self._guard:
            self.finish()  # a step that not all its optimizers have taken
            gradients = self._sampler.read(gradients_of(watched)) if self._cosine and (due or next_due) else None
            before = self._before.pop(optimizer, None)
            if gradients is not None and next_due:
                self._before[optimizer] = gradients, norms
            if due:
                columns = [] if gradients is None else _alike(gradients, norms, before)
                self._begin(_header(step, optimizer), watched, columns)

    def _begin(self, header: RowHeader, watched: Watched, columns: list[Tensor]) -> None:
        weights = self._sampler.read(watched)
        self._begun = _Begun(header, watched, weights, [self._sampler.norms(weights), *columns])

    def finish(self) -> None:
        """Measure what the step has done to the weights, if it is a sampled one."""
        begun, self._begun = self._begun, None
        if begun is None or os.getpid() != self._pid:
            return
        with self._guard:
            moved = self._sampler.norms(begun.weights.sub_(self._sampler.read(begun.watched)))
            # Where parameters are sharded, the squares of the first two rows [2, P] are what to sum over the ranks.
            rows = torch.stack([begun.columns[0], moved, *begun.columns[1:]])
            if not self._transfer.send(rows.to(torch.float32).flatten(), begun.header):
                self._ring.status.rows_dropped += 1

    def drop(self) -> None:
        """Forget the step in progress: it raised."""
        self._begun = None

    def write(self, *, wait: bool = False) -> None:
        """Write what has reached the host, or ``wait`` for all that is under way."""
        if self._transfer.newest is None or os.getpid() != self._pid:
            return
        with self._guard:
            for header, values in self._transfer.arrived(wait=wait):
                self._ring.stats[:] = values.reshape(self._columns, -1)
                self._ring.commit(header)


def _alike(gradients: Tensor, norms: Tensor, before: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """Return the columns of :data:`COSINE_SAMPLES`: NaN where either gradient is zero, missing or not finite."""
    if before is None:
        unknown = torch.full_like(norms, NAN)
        return [norms, unknown, unknown]
    earlier, norms_before = before
    lengths = torch.linalg.vector_norm(gradients, dim=1) * torch.linalg.vector_norm(earlier, dim=1)
    return [norms, norms_before, earlier.mul_(gradients).sum(dim=1) / lengths]


def _header(step: int, optimizer: int) -> RowHeader:
    return RowHeader(step, time.time_ns(), 0, 0, optimizer, 0, -1, NAN, NAN, NAN, NAN, NAN, NAN, NAN, 0.0)
