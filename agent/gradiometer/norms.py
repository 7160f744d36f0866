"""L2 norms of many tensors: pure tensor code, no host read of a device tensor.

Guarantees: norms are accumulated in float32 (float64 for float64 gradients) whatever the gradients' dtype, within 1e-6
relative of a float64 computation (3e-6 on the CPU for thousands of equal elements in a tensor of up to 4096, whose
roundings all go one way); a NaN or Inf anywhere in a tensor makes its norm non-finite. Limit: the
squares are float32, so a finite element beyond 1.8e19 in magnitude overflows its tensor's norm to Inf.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from gradiometer.transfer import bring

__all__ = ["LARGE", "Meter", "tensor_norm", "total_norm"]

ROW = 1024
LARGE = 4096
"""On the CPU a float32 norm loses 7e-4 at 16M elements, so tensors beyond this size are summed row by row."""


def tensor_norm(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the L2 norm of one tensor, of any layout and dtype, as a 0-dim tensor of ``dtype`` on its device."""
    values = _values(tensor)
    wide = torch.promote_types(dtype, values.dtype)  # a norm cannot be narrower than what it measures
    if values.device.type == "cpu" and values.numel() > LARGE:
        return _large_norms([values], wide)[0].to(dtype)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=wide)
    return norm.to(dtype)


def total_norm(norms: Tensor) -> Tensor:
    """Compose L2 norms [P] into the norm of the whole: 0-dim, of the same dtype, accumulated in float64.

    Norms beyond 1.8e19, whose float32 squares overflow, stay finite so.
    """
    total: Tensor = torch.linalg.vector_norm(norms, dtype=torch.float64)
    return total.to(norms.dtype)


class Meter:
    """Measure the same parameters' gradients again and again, into one vector of norms.

    ``device`` is where the vector lives. A gradient that is None is measured as negative zero. How the gradients are
    bucketed is worked out once and again whenever the set of gradients or a dtype changes.
    """

    shared = False
    """Whether others measure together with this one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._signature: list[torch.dtype | None] = []
        self._buckets: list[list[int]] = []
        self._large: list[int] = []
        self._single: list[int] = []
        self._heads: list[int] = []
        """One of every bucket: enough to tell whether all norms are where they should be."""
        self.dtype = torch.float32
        self.calls = 0
        """How often this rank has told the others what it measured, if there are others."""

    def __call__(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return the norms [P], float32 (float64 if any gradient is), in the order of ``gradients``."""
        signature = [None if gradient is None else gradient.dtype for gradient in gradients]
        if signature != self._signature:
            self._plan(gradients, signature)
        try:
            return self._measure(gradients)
        except NotImplementedError:  # a gradient turned sparse since the plan was made
            self._plan(gradients, signature)
            return self._measure(gradients)

    def add(self, values: Tensor) -> Tensor:
        """Return the sums [K, P] of what all who measure together have of each parameter; here those are ``values``."""
        return values

    def abstain(self) -> None:
        """Tell all who measure together that there is nothing to hear from here; here that is nobody."""

    def maximum(self, value: Tensor) -> Tensor:
        """Return the largest of what all who measure together have, by element; here that is the value itself."""
        return value

    def _plan(self, gradients: Sequence[Tensor | None], signature: list[torch.dtype | None]) -> None:
        buckets: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        self._large, self._single = [], []
        for index, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if gradient.layout is not torch.strided or gradient.is_complex():
                self._single.append(index)
            elif gradient.device.type == "cpu" and gradient.numel() > LARGE:
                self._large.append(index)
            else:
                buckets[gradient.device, gradient.dtype].append(index)
        self._buckets, self._signature = list(buckets.values()), signature
        self._heads = [bucket[0] for bucket in self._buckets] + self._large[:1] + self._single
        wide = {torch.float64, torch.complex128}
        self.dtype = torch.float64 if wide.intersection(signature) else torch.float32
        self._absent = torch.full((), -0.0, dtype=self.dtype, device=self.device)  # a fill: no copy to wait for

    def _measure(self, gradients: Sequence[Tensor | None]) -> Tensor:
        norms = [self._absent] * len(gradients)
        for bucket in self._buckets:
            measured = torch._foreach_norm(_chosen(gradients, bucket), 2, dtype=self.dtype)
            _place(norms, bucket, measured)
        if self._large:
            _place(norms, self._large, _large_norms(_chosen(gradients, self._large), self.dtype))
        for index in self._single:
            gradient = gradients[index]
            assert gradient is not None
            norms[index] = tensor_norm(gradient, self.dtype)
        if any(norms[index].device != self.device for index in self._heads):
            norms = [bring(norm, self.device) for norm in norms]
        return torch.stack(norms)


def _chosen(gradients: Sequence[Tensor | None], indices: list[int]) -> list[Tensor]:
    return [gradients[index] for index in indices]  # type: ignore[misc]  # a plan skips None


def _place(norms: list[Tensor], indices: list[int], measured: Sequence[Tensor]) -> None:
    for index, norm in zip(indices, measured, strict=True):
        norms[index] = norm


def _values(tensor: Tensor) -> Tensor:
    """Return the stored numbers: duplicates of a sparse tensor are added up, a complex one is seen as pairs."""
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout is not torch.strided:
        tensor = tensor.values()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _large_norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Measure row by row, and compose the rows of every tensor in one call."""
    rows = [_row_norms(_values(tensor), dtype) for tensor in tensors]
    return torch.stack(torch._foreach_norm(rows, 2, dtype=torch.float64)).to(dtype).unbind()


def _row_norms(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    dense, rest = tensor if tensor.is_contiguous() else _flat(tensor), tensor.numel() % ROW
    if not rest:
        return _norms_of_rows(dense, dtype)
    flat = dense.view(-1)
    tail = torch.linalg.vector_norm(flat[-rest:], dtype=dtype)
    return torch.cat([_norms_of_rows(flat[:-rest], dtype), tail.unsqueeze(0)])


def _norms_of_rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(tensor.view(-1, ROW), dim=1, dtype=dtype)
    return norms


def _flat(tensor: Tensor) -> Tensor:
    """View a dense tensor as one dimension in the order of its memory; copy only if its memory has holes."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)
