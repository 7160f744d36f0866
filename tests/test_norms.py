"""Norms of single and many tensors, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradiometer.norms import Meter, tensor_norm, total_norm

CPU = torch.device("cpu")
Numbers = Sequence[float]


def exact(tensor: Tensor) -> float:
    """Return the norm as float64 has it."""
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    norm: Tensor = torch.linalg.vector_norm(tensor.detach().to_dense().to(wide))
    return norm.item()


def measure(*gradients: Tensor | None) -> list[float]:
    """Measure gradients with a new meter."""
    norms: list[float] = Meter(CPU)(gradients).tolist()
    return norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_tensor(dtype: torch.dtype) -> None:
    """The norm of 40 million elements, where a plain float32 norm is off by 0.3 %, is right to 1e-6."""
    tensor = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)).to(dtype).repeat(40)
    wanted = math.sqrt(40) * exact(tensor[:1_000_000])
    assert measure(tensor) == pytest.approx([wanted], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("elements", [1000, 4096, 4097, 65_537, 300_001])
def test_sizes_around_every_boundary(dtype: torch.dtype, elements: int) -> None:
    """Norms are right whether a tensor is measured whole or row by row."""
    tensor = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert measure(tensor) == pytest.approx([exact(tensor)], rel=1e-6)


@pytest.mark.parametrize(("elements", "relative"), [(4096, 3e-6), (4097, 1e-6), (65_537, 1e-6)])
def test_equal_elements_round_one_way(elements: int, relative: float) -> None:
    """The worst case of float32, thousands of equal elements, stays within the documented bounds."""
    tensor = torch.full((elements,), 1.7)
    assert measure(tensor) == pytest.approx([exact(tensor)], rel=relative)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, 2),
    "strided": lambda t: t[:, ::2],
    "expanded": lambda t: t[:1].expand(50, -1, -1, -1),
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", [4, 20])
def test_memory_layouts(layout: str, side: int) -> None:
    """Tensors that are not contiguous, small and large, are measured as what they show."""
    tensor = LAYOUTS[layout](torch.randn(20, 20, side, 20, generator=torch.Generator().manual_seed(0)))
    assert measure(tensor) == pytest.approx([exact(tensor)], rel=1e-6)


@pytest.mark.parametrize("elements", [10, 100_000])
def test_complex_tensors(elements: int) -> None:
    """A complex gradient counts with its real and its imaginary parts."""
    tensor = torch.randn(elements, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    assert measure(tensor) == pytest.approx([exact(tensor)], rel=1e-6)


def test_float64_stays_float64() -> None:
    """Among float64 gradients the norms have the digits of float64."""
    tensors = [torch.tensor([1e-200, 1e-200], dtype=torch.float64), torch.tensor([1e200], dtype=torch.float64)]
    norms = Meter(CPU)(tensors)
    assert norms.dtype == torch.float64
    assert norms.tolist() == pytest.approx([math.sqrt(2) * 1e-200, 1e200], rel=1e-15)


def test_sparse_duplicates_add_up() -> None:
    """A sparse gradient that names an element twice is measured by the sum, 3 + 1, and not by root 10."""
    tensor = torch.sparse_coo_tensor(torch.tensor([[2, 2]]), torch.tensor([3.0, 1.0]), (5,), check_invariants=True)
    assert measure(tensor) == [4.0]


def test_empty_tensors_have_norm_zero() -> None:
    """A tensor without elements has norm 0, positive: it is there."""
    norms = measure(torch.empty(0), torch.empty(0, 3), torch.ones(1))
    assert norms == [0.0, 0.0, 1.0]
    assert [math.copysign(1, norm) for norm in norms] == [1, 1, 1]


def test_missing_gradients_are_negative_zero() -> None:
    """None is measured as negative zero, which no real gradient is."""
    norms = measure(None, torch.zeros(2), None)
    assert [math.copysign(1, norm) for norm in norms] == [-1, 1, -1]


def test_mixed_dtypes_and_layouts() -> None:
    """Gradients of several dtypes and layouts keep their places."""
    sparse = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([5.0]), (3,), check_invariants=True)
    gradients = [torch.tensor([3.0]).half(), sparse, torch.tensor([-7.0]), None, torch.tensor([2.0]).bfloat16()]
    assert measure(*gradients) == [3.0, 5.0, 7.0, 0.0, 2.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("elements", [10, 100_000])
def test_non_finite_elements_show(bad: float, dtype: torch.dtype, elements: int) -> None:
    """One NaN or Inf anywhere makes the norm non-finite, and no other tensor's."""
    tensor = torch.ones(elements, dtype=dtype)
    tensor[elements // 3] = bad
    first, second = measure(tensor, torch.ones(1, dtype=dtype))
    assert not math.isfinite(first)
    assert second == 1


@pytest.mark.parametrize("value", [1e-18, 1e18])
def test_extreme_values(value: float) -> None:
    """Values whose squares are near the ends of float32 are measured."""
    assert measure(torch.tensor([value, value])) == pytest.approx([math.sqrt(2) * value], rel=1e-6)


def test_values_whose_squares_underflow() -> None:
    """Values of 1e-30 have squares below float32 and measure as 0, as documented, never as NaN."""
    assert measure(torch.full((4,), 1e-30))[0] == pytest.approx(0.0, abs=2e-30)


def test_the_limit_of_float32() -> None:
    """Beyond 1.8e19 the norm of a finite float32 tensor is Inf, and just below it is not."""
    assert math.isfinite(measure(torch.tensor([1.8e19, 1.0]))[0])
    assert measure(torch.tensor([1.9e19, 1.0]))[0] == math.inf


def test_large_norms_compose() -> None:
    """The norm of the whole is accumulated in float64: norms of 1e30 do not overflow it."""
    assert total_norm(torch.tensor([3e30, 4e30])).item() == pytest.approx(5e30, rel=1e-6)


def test_total_norm_keeps_nan() -> None:
    """One NaN among the norms makes the whole NaN."""
    assert math.isnan(total_norm(torch.tensor([1.0, math.nan])).item())


def test_a_gradient_that_turns_sparse() -> None:
    """A meter that has planned for dense gradients measures a sparse one of the same dtype too."""
    meter, dense = Meter(CPU), torch.tensor([3.0, 4.0])
    assert meter([dense, dense]).tolist() == [5.0, 5.0]
    assert meter([dense.to_sparse(), dense]).tolist() == [5.0, 5.0]
    assert meter([dense, dense]).tolist() == [5.0, 5.0]


FINITE = st.floats(-(2.0**50), 2.0**50, allow_subnormal=False, width=32)


@settings(max_examples=60)
@given(st.lists(st.lists(FINITE, max_size=20), min_size=1, max_size=5))
def test_any_gradients_agree_with_float64(gradients: list[Numbers]) -> None:
    """Whatever the values, each norm and their composition agree with float64."""
    tensors = [torch.tensor(values) for values in gradients]
    norms = Meter(CPU)(tensors)
    assert norms.tolist() == pytest.approx([exact(tensor) for tensor in tensors], rel=1e-6, abs=1e-20)
    whole = math.sqrt(math.fsum(exact(tensor) ** 2 for tensor in tensors))
    assert total_norm(norms).item() == pytest.approx(whole, rel=1e-6, abs=1e-20)


@settings(max_examples=40)
@given(st.lists(FINITE, min_size=1, max_size=20), st.sampled_from(["float32", "float64"]))
def test_one_tensor_agrees_with_float64(values: Numbers, dtype: str) -> None:
    """The norm used in backward hooks agrees with float64, in the dtype asked for."""
    tensor = torch.tensor(values)
    norm = tensor_norm(tensor, getattr(torch, dtype))
    assert norm.dtype == getattr(torch, dtype)
    assert norm.item() == pytest.approx(exact(tensor), rel=1e-6, abs=1e-20)


@pytest.mark.parametrize("elements", [10, 100_000])
def test_a_float64_tensor_measured_in_float32(elements: int) -> None:
    """A tensor wider than the dtype asked for is measured in its own, and rounded."""
    norm = tensor_norm(torch.full((elements,), 0.1, dtype=torch.float64))
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(0.1 * math.sqrt(elements), rel=1e-6)
