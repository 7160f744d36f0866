"""Register on optimizers and GradScaler, and dispatch to an agent. No arithmetic here.

The step pre-hook is the one place where gradients are final under accumulation, DDP and AMP alike. A step given a
closure computes its gradients inside the step, so the closure is wrapped. A GradScaler that finds Inf does not call an
optimizer that is not fused, so its ``step`` is wrapped too, while any agent is attached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["StepHooks", "StepListener", "check_free", "current_scaler"]


class StepListener(Protocol):
    """What an agent is to its hooks."""

    def within_step(self, optimizer: Optimizer) -> bool:
        """Tell whether the step that begins is part of one under way: a subclass's step calls its parent's."""

    def before_update(self, optimizer: Optimizer) -> None:
        """Gradients are final; the optimizer is about to use them."""

    def after_step(self, optimizer: Optimizer) -> None:
        """The optimizer has moved the parameters, or skipped."""

    def step_failed(self, optimizer: Optimizer) -> None:
        """The step raised: put back what was changed on the optimizer. Safe to call at any time."""

    def scaler_skipped(self, optimizer: Optimizer) -> None:
        """A GradScaler found Inf or NaN and did not call the optimizer."""


_listeners: WeakKeyDictionary[Optimizer, tuple[StepListener, list[int]]] = WeakKeyDictionary()
_scalers: list[GradScaler] = []
_original_scaler_step: list[Any] = []


def current_scaler() -> GradScaler | None:
    """Return the GradScaler whose ``step`` is running, if any."""
    return _scalers[-1] if _scalers else None


def check_free(optimizers: list[Optimizer]) -> None:
    """Raise RuntimeError if one of the optimizers has a listener already, ValueError if one is given twice."""
    for place, optimizer in enumerate(optimizers):
        if optimizer in _listeners:
            raise RuntimeError(
                f"this {type(optimizer).__name__} already has a gradiometer agent: detach() that one first"
            )
        if any(optimizer is other for other in optimizers[:place]):
            raise ValueError(f"this {type(optimizer).__name__} is given twice: list every optimizer once")


class StepHooks:
    """The step hooks of one listener on its optimizers. Raises as :func:`check_free` does."""

    def __init__(self, optimizers: list[Optimizer], listener: StepListener) -> None:
        check_free(optimizers)
        self._optimizers, self._listener = optimizers, listener
        self._handles: list[RemovableHandle] = []
        _wrap_scaler()
        for optimizer in optimizers:
            _listeners[optimizer] = (listener, [0])
            self._handles += [
                optimizer.register_step_pre_hook(_eager(self._before)),
                optimizer.register_step_post_hook(_eager(self._after)),
            ]

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        _listeners[optimizer][1][0] += 1
        if self._listener.within_step(optimizer):
            return None
        self._listener.step_failed(optimizer)  # what a step that raised has left behind
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._listener.before_update(optimizer)
            return None
        wrapped = self._wrap_closure(optimizer, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _wrap_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(closure)
        def wrapped() -> Any:
            loss = closure()
            self._listener.before_update(optimizer)
            return loss

        return wrapped

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args, kwargs
        self._listener.after_step(optimizer)

    def remove(self) -> None:
        """Remove every hook, leaving no trace. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for optimizer in self._optimizers:
            if _listeners.get(optimizer, (None,))[0] is self._listener:
                del _listeners[optimizer]
        if not _listeners:
            _unwrap_scaler()


def _eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile from tracing a hook of a compiled step."""
    eager: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]  # torch
    return eager


def _wrap_scaler() -> None:
    if _original_scaler_step:
        return
    original = GradScaler.step
    _original_scaler_step.append(original)

    @functools.wraps(original)
    def step(self: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        entry = _listeners.get(optimizer)
        if entry is None or not self.is_enabled():
            return original(self, optimizer, *args, **kwargs)
        listener, calls = entry
        before, unset = calls[0], {"grad_scale", "found_inf"}.difference(optimizer.__dict__)
        _scalers.append(self)
        try:
            result = original(self, optimizer, *args, **kwargs)
        except BaseException:
            listener.step_failed(optimizer)
            for name in unset:  # the scaler deletes them only after a step that returns
                optimizer.__dict__.pop(name, None)
            raise
        else:
            if calls[0] == before:
                listener.scaler_skipped(optimizer)
            return result
        finally:
            _scalers.pop()

    GradScaler.step = step  # type: ignore[method-assign]  # restored by the last detach


def _unwrap_scaler() -> None:
    if _original_scaler_step:
        GradScaler.step = _original_scaler_step.pop()  # type: ignore[method-assign]  # the original goes back
