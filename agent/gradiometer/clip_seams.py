"""Hear every call of torch's own clipping functions, whoever makes it and by whatever name it was imported.

Each of these functions is a wrapper (torch's ``_no_grad``) that finds the function which does the work in its closure,
anew at each call. There is where ours stand in: a loop that did ``from torch.nn.utils import clip_grad_norm_`` long
ago holds the same wrapper, and whoever imports it now gets no function of ours. Guarantees: gradients, return values
and errors are torch's own to the bit; a closure that looks otherwise is left alone, with one message; the last
listener to leave, or to be collected, puts back what was there. What torch.compile traces is passed through unheard.
"""

from __future__ import annotations

import inspect
import logging
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any, Protocol
from weakref import WeakSet, finalize

import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from gradiometer.records import CLIP_GRAD_NORM, CLIP_GRAD_VALUE

__all__ = ["ClipListener", "Heard", "TorchNorms", "forget", "listen"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchNorms:
    """The L2 norms of the single gradients, which torch works out for the total and throws away."""

    total: Tensor
    norms: Tensor
    """[n], in the gradients' dtype."""
    order: tuple[int, ...] | None
    """``id`` of the gradient of each; None where they are in the order in which they were given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Heard:
    """One call: its function by torch's public name, and what it was given."""

    function: str
    parameters: Sequence[Tensor]
    limit: float
    total: Tensor | None = None
    torch_norms: TorchNorms | None = None


class ClipListener(Protocol):
    """What wants to hear of clipping. Must not raise."""

    def begin(self, heard: Heard) -> Any:
        """The gradients are about to be clipped."""

    def end(self, token: Any) -> None:
        """They have been; ``token`` is what :meth:`begin` returned. Not called if clipping raised."""

    def refused(self, gradients: Sequence[Tensor], norms: Tensor | None) -> None:
        """Gradients, of these norms if they are known, were not finite, and torch raises for it, as it was told to."""


_listeners: WeakSet[ClipListener] = WeakSet()
_newest = threading.local()
"""The :class:`TorchNorms` of this thread's newest total norm, until its gradients are clipped by it."""


def listen(listener: ClipListener) -> None:
    """Tell the listener, which is held weakly, of every call from now on."""
    _listeners.add(listener)
    # After that: one that is collected at any moment takes ours away if none is left.
    finalize(listener, _restore).atexit = False
    refused = [seam.name for seam in _SEAMS if not seam.install()]
    if refused and not _told:
        _told.append(True)
        logger.warning(
            "gradiometer: torch %s has no %s as it is known here: of the clipping that a loop does by itself, what "
            "goes through there is not seen",
            torch.__version__,
            " and no ".join(f"torch.nn.utils.clip_grad.{name}" for name in refused),
        )


def forget(listener: ClipListener) -> None:
    """Tell the listener no more. Idempotent."""
    _listeners.discard(listener)
    _restore()


def _restore() -> None:
    if not any(True for _ in _listeners):
        for seam in _SEAMS:
            seam.remove()


class _Seam:
    """One function of ``torch.nn.utils.clip_grad``, and the function of ours that stands in for its inner one."""

    def __init__(
        self, name: str, arguments: tuple[str, ...], stand_in: Callable[[FunctionType], Callable[..., Any]]
    ) -> None:
        self.name, self._arguments, self._make = name, arguments, stand_in
        self._cell: CellType | None = None
        self._original: Any = None
        self._ours: Any = None

    def install(self) -> bool:
        """Put ours in place; return False if torch is not built as expected."""
        if self._cell is None:
            found = self._find()
            if found is None:
                return False
            self._cell, self._original = found, found.cell_contents
            self._ours = self._make(self._original)
        if self._cell.cell_contents is self._original:  # else somebody has wrapped ours since, who passes all on
            self._cell.cell_contents = self._ours
        return True

    def remove(self) -> None:
        """Put the original back, unless somebody has wrapped ours since: then it passes all on."""
        if self._cell is not None and self._cell.cell_contents is self._ours:
            self._cell.cell_contents = self._original
            self._cell = self._original = self._ours = None

    def _find(self) -> CellType | None:
        wrapper = getattr(clip_grad, self.name, None)
        if not isinstance(wrapper, FunctionType):
            return None
        cell = dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__ or (), strict=True)).get("func")
        if cell is None or not isinstance(cell.cell_contents, FunctionType):
            return None
        return cell if tuple(inspect.signature(cell.cell_contents).parameters) == self._arguments else None


def _clip_by_norm(original: FunctionType) -> Callable[..., None]:
    def clip_grads_with_norm(
        parameters: Tensor | Iterable[Tensor], max_norm: float, total_norm: Tensor, foreach: bool | None = None
    ) -> None:
        if torch.compiler.is_compiling():
            original(parameters, max_norm, total_norm, foreach)
            return
        norms: TorchNorms | None = getattr(_newest, "norms", None)
        _newest.norms = None
        if norms is not None and norms.total is not total_norm:
            norms = None
        parameters, total_norm, limit = _listed(parameters), _replicated(total_norm), _number(max_norm)
        told = _begin(
            Heard(
                function=CLIP_GRAD_NORM,
                parameters=parameters,
                limit=limit,
                total=_local(total_norm),
                torch_norms=norms,
            )
        )
        original(parameters, max_norm if math.isnan(limit) else limit, total_norm, foreach)
        _end(told)

    return clip_grads_with_norm


def _clip_by_value(original: FunctionType) -> Callable[..., None]:
    def clip_grad_value(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
        if torch.compiler.is_compiling():
            original(parameters, clip_value, foreach)
            return
        parameters, limit = _listed(parameters), _number(clip_value)
        told = _begin(Heard(function=CLIP_GRAD_VALUE, parameters=parameters, limit=limit))
        original(parameters, clip_value if math.isnan(limit) else limit, foreach)
        _end(told)

    return clip_grad_value


def _total_norm(original: FunctionType) -> Callable[..., Tensor]:
    def get_total_norm(
        tensors: Tensor | Iterable[Tensor],
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            total: Tensor = original(tensors, norm_type, error_if_nonfinite, foreach)
            return total
        tensors, spy = _listed(tensors), _Torch()
        try:
            # The same code over the same torch, but for a note of what it works out on the way: once clipping has
            # spread a NaN to every gradient, nothing else could tell which one had it.
            watched = FunctionType(original.__code__, {**original.__globals__, "torch": spy})
            total = watched(tensors, norm_type, error_if_nonfinite, foreach)
        except Exception:  # torch's own error comes again from torch's own function
            if error_if_nonfinite:
                for listener in list(_listeners):
                    listener.refused(*spy.measured)
            total = original(tensors, norm_type, error_if_nonfinite, foreach)
        else:
            _newest.norms = spy.norms_of(total) if norm_type == 2 else None
        return total

    return get_total_norm


class _Torch:
    """The module torch as one call of ``_get_total_norm`` sees it."""

    def __init__(self) -> None:
        self._groups: list[list[Tensor]] = []
        self._norms: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def _foreach_norm(self, tensors: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        self._groups.append(tensors)
        return torch._foreach_norm(tensors, *args, **kwargs)

    def stack(self, tensors: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self._norms = torch.stack(tensors, *args, **kwargs)
        return self._norms

    @property
    def measured(self) -> tuple[list[Tensor], Tensor | None]:
        """What was measured, and its norms."""
        return [tensor for group in self._groups for tensor in group], self._norms

    def norms_of(self, total: Tensor) -> TorchNorms | None:
        """Return what was worked out, with no reference to a gradient; None if it is not known of which."""
        if type(self._norms) is not Tensor or self._norms.numel() != sum(map(len, self._groups)):
            return None
        several = len(self._groups) > 1  # torch has sorted them by device and dtype
        order = tuple(id(tensor) for group in self._groups for tensor in group) if several else None
        return TorchNorms(total=total, norms=self._norms, order=order)


_SEAMS = (
    _Seam("_get_total_norm", ("tensors", "norm_type", "error_if_nonfinite", "foreach"), _total_norm),
    _Seam("_clip_grads_with_norm_", ("parameters", "max_norm", "total_norm", "foreach"), _clip_by_norm),
    _Seam("clip_grad_value_", ("parameters", "clip_value", "foreach"), _clip_by_value),
)
_told: list[bool] = []


def _listed(tensors: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Return what torch makes of its argument; a generator can be used up only once."""
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _number(limit: object) -> float:
    """Return the limit as torch reads it, NaN where it cannot; a tensor is read here so that torch need not."""
    try:
        return float(limit)  # type: ignore[arg-type]  # whatever it is, torch would call float() too
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _replicated(total: Any) -> Any:
    """Reduce the norm of a sharded model here, once, so that torch need not when it divides by it."""
    if all(placement.is_replicate() for placement in getattr(total, "placements", ())):
        return total
    from torch.distributed.tensor import Replicate

    return total.redistribute(placements=[Replicate()] * total.device_mesh.ndim)


def _local(total: Any) -> Tensor | None:
    whole = total.to_local() if hasattr(total, "placements") else total
    return whole.detach() if isinstance(whole, Tensor) else None


def _begin(heard: Heard) -> list[tuple[ClipListener, Any]]:
    return [(listener, listener.begin(heard)) for listener in list(_listeners)]


def _end(told: list[tuple[ClipListener, Any]]) -> None:
    for listener, token in told:
        listener.end(token)
