"""Measure, every so many steps, by how much a step moved the weights, and how alike two successive gradients are.

Both need a copy of what was there before. It is bounded: at most :data:`ELEMENTS` elements of a parameter are read,
evenly strided over its memory, and at most :data:`TOTAL` of all; norms are scaled up to the whole. A parameter of that
many elements or fewer is measured exactly; of a larger one, where n of its elements are read, an L2 norm of Gaussian
elements is off by a fraction of sqrt(1 / 2n), 1.1 % for 4096, and the cosine of unrelated gradients by sqrt(1 / n).
Two matrices of float32 samples at a time take 32 MiB at most (twice that where a parameter is float64); with the cosine
it is three, one of which is kept from the step before. Steps in between cost a dictionary look-up.
No host read of a device tensor; failures stop at the guard.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradiometer import transfer
from gradiometer._guard import Guard
from gradiometer.insight import COSINE_SAMPLES
from gradiometer.norms import Meter
from gradiometer.recorder import RingWriter, RowHeader
from gradiometer.records import SampleInfo
from gradiometer.rounds import Watched
from gradiometer.shards import local_part

__all__ = ["ELEMENTS", "TOTAL", "Sampler", "Updates"]

ELEMENTS = 4096
"""Elements of a parameter that are read."""
TOTAL = 2**22
"""Elements of all parameters together that are read: beyond 1024 parameters, fewer of each."""
NAN = math.nan


class Sampler:
    """Read the same elements of P tensors again and again, as the rows of a matrix [P, width] on ``device``."""

    def __init__(self, tensors: Sequence[Tensor | None], device: torch.device) -> None:
        sizes = [0 if tensor is None else _values(tensor).numel() for tensor in tensors]
        self.width = max(1, min(ELEMENTS, TOTAL // len(sizes), max(sizes)))
        self._strides = [_stride(size, self.width) for size in sizes]
        self._dtype = torch.float32
        if any(tensor is not None and tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors):
            self._dtype = torch.float64
        self._device = device
        read = [-(-size // stride) for size, stride in zip(sizes, self._strides, strict=True)]
        scales = [size / count if count else 1.0 for size, count in zip(sizes, read, strict=True)]
        self._scales = torch.tensor(scales, dtype=torch.float64).to(device)

    def read(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the samples [P, width], float32 or float64; zeros beyond a tensor's end.

        A tensor that is None, not strided, or large and with holes in its memory, is all zeros: nothing is known of it.
        """
        matrix = torch.zeros(len(self._strides), self.width, dtype=self._dtype, device=self._device)
        places, samples = [], []
        for row, tensor, stride in zip(matrix.unbind(), tensors, self._strides, strict=True):
            sample = None if tensor is None or tensor.layout is not torch.strided else _strided(_values(tensor), stride)
            if sample is not None and sample.numel() <= self.width:
                places.append(row[: sample.numel()])
                samples.append(sample)
        if samples:
            torch._foreach_copy_(places, samples, non_blocking=self._device.type != "cpu")
        return matrix

    def squares(self, samples: Tensor) -> Tensor:
        """Estimate the squared L2 norms [P] of whole tensors from their samples, float64."""
        norms: Tensor = torch.linalg.vector_norm(samples, dim=1)
        return norms.double().square() * self._scales

    def products(self, samples: Tensor, other: Tensor) -> Tensor:
        """Estimate the inner products [P] of whole tensors from the samples of both, float64."""
        products: Tensor = torch.linalg.vecdot(samples, other)
        return products.double() * self._scales


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


@dataclass(slots=True)
class _Begun:
    """A sampled step whose weights have not moved yet."""

    header: RowHeader
    watched: Watched = field(default_factory=list)
    weights: Tensor | None = None
    """Samples of them; None where they could not be taken."""
    whole: Sequence[Tensor] = ()
    """Norms [P] of the whole gradients, in this step and in the one before."""
    own: Sequence[Tensor] = ()
    """What this rank has of the squares of both, and of their product."""


class Updates:
    """The sampled measurements of one agent, written to ``samples.ring`` as they reach the host.

    A step is taken once it is over for all optimizers that share it. Where ``meter`` adds up what the ranks hold, so it
    does here, in one all-reduce a sampled step, which every rank joins, whatever fails.
    """

    def __init__(
        self, parameters: Sequence[Tensor | None], meter: Meter, info: SampleInfo, ring: RingWriter, guard: Guard
    ) -> None:
        self._sampler, self._meter = Sampler(parameters, meter.device), meter
        self._every, self._ring, self._guard = info.every, ring, guard
        self._shape = len(info.columns), len(parameters)
        self._cosine = set(COSINE_SAMPLES) <= set(info.columns)
        self._steps: dict[int, int] = {}
        """Steps so far of each optimizer, or of all that step together."""
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        """Samples and norms of the gradients of the step before a sampled one."""
        self._begun: _Begun | None = None
        self.step = -1
        """The newest step that was begun."""
        self._keep = False
        """Whether the step in progress is the one before a sampled one."""
        self._transfer: transfer.Transfer[RowHeader] = transfer.Transfer(math.prod(self._shape), meter.device)
        self._pid = os.getpid()

    def begin(self, step: int, optimizer: int) -> None:
        """Note that a step begins, before anything of it is measured: what may fail must not put ranks out of phase."""
        self.finish()  # a step that not all its optimizers have taken
        self.step = step
        count = self._steps[optimizer] = self._steps.get(optimizer, -1) + 1
        self._keep = self._cosine and (count + 1) % self._every == 0
        if count % self._every == 0:
            self._begun = _Begun(_header(step, optimizer))

    def look(self, optimizer: int, watched: Watched, gradients: Sequence[Tensor | None], norms: Tensor) -> None:
        """Take the samples of a step whose gradients, of ``norms`` [P], are final and not yet clipped."""
        if self._begun is None and not self._keep:
            return
        with self._guard:
            if self._cosine:
                self._compare(self._begun, optimizer, self._sampler.read(gradients), norms)
            if self._begun is not None:
                self._begun.watched, self._begun.weights = watched, self._sampler.read(watched)

    def _compare(self, begun: _Begun | None, optimizer: int, gradients: Tensor, norms: Tensor) -> None:
        """Compare samples of the gradients with those of the step before, and keep them for the next, as wanted."""
        before = self._before.pop(optimizer, None)
        if self._keep:
            self._before[optimizer] = gradients, norms
        if begun is not None:
            earlier, norms_before = before or (torch.full_like(gradients, NAN), torch.full_like(norms, NAN))
            begun.whole = norms, norms_before
            lengths = self._sampler.squares(gradients), self._sampler.squares(earlier)
            begun.own = [*lengths, self._sampler.products(gradients, earlier)]

    def finish(self) -> None:
        """Measure what the step has done to the weights, if it is a sampled one."""
        begun, self._begun = self._begun, None
        if begun is None or os.getpid() != self._pid:
            return
        own = None
        with self._guard:
            own = self._own(begun)
        with self._guard:
            unknown = torch.full((self._shape[0], self._shape[1]), NAN, dtype=torch.float64, device=self._meter.device)
            sums = self._meter.add(unknown if own is None else own)
            rows = [*sums[:2].sqrt().unbind(), *begun.whole]
            if self._cosine:
                rows.append(sums[4] / (sums[2] * sums[3]).sqrt())
            if own is None:
                return
            if not self._transfer.send(torch.stack([row.to(torch.float32) for row in rows]).flatten(), begun.header):
                self._ring.status.rows_dropped += 1

    def _own(self, begun: _Begun) -> Tensor | None:
        """Return the squares of weights and update, and what else there is, that this rank has, float64 [K, P]."""
        if begun.weights is None:
            return None
        weights = self._sampler.squares(begun.weights)
        moved = begun.weights.sub_(self._sampler.read(begun.watched))
        return torch.stack([weights, self._sampler.squares(moved), *begun.own])

    def drop(self) -> None:
        """Forget the step in progress, which raised; the other ranks are told when the next one begins."""
        if self._begun is not None:
            self._begun.weights = None

    def write(self, *, wait: bool = False) -> None:
        """Write what has reached the host, or ``wait`` for all that is under way."""
        if self._transfer.newest is None or os.getpid() != self._pid:
            return
        with self._guard:
            for header, values in self._transfer.arrived(wait=wait):
                self._ring.stats[:] = values.reshape(self._shape)
                self._ring.commit(header)


def _header(step: int, optimizer: int) -> RowHeader:
    return RowHeader(step, time.time_ns(), 0, 0, optimizer, 0, -1, 0, NAN, NAN, NAN, NAN, NAN, NAN, NAN, 0.0)
