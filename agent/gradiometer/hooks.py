"""Register on optimizers and GradScaler, and dispatch to an agent. No arithmetic here.

The step pre-hook is the one place where gradients are final under accumulation, DDP and AMP alike. A step given a
closure computes its gradients inside the step, so the closure is wrapped. A GradScaler that finds Inf does not call an
optimizer that is not fused, so its ``step`` is wrapped too, while any agent is attached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakKeyDictionary, finalize, ref

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradiometer import transfer

__all__ = ["StepHooks", "StepListener", "attached_optimizers", "check_free", "current_scaler", "listener_of"]


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

    def captured(self, optimizer: Optimizer) -> None:
        """The step is being captured into a CUDA graph, of whose replays nothing will be told."""

    def scaler_skipped(self, optimizer: Optimizer) -> None:
        """A GradScaler found Inf or NaN and did not call the optimizer."""


_attached: WeakKeyDictionary[Optimizer, ref[StepHooks]] = WeakKeyDictionary()
"""Weak both ways: an optimizer holds its hooks, and so its agent, and nothing here keeps either alive."""
_scalers: list[GradScaler] = []
_scaler_steps: list[tuple[Any, Any]] = []
"""GradScaler's own ``step``, and ours in its place."""


def _hooks_of(optimizer: Optimizer) -> StepHooks | None:
    found = _attached.get(optimizer)
    return None if found is None else found()


def listener_of(optimizer: Optimizer) -> StepListener | None:
    """Return the agent that is attached to an optimizer, if any."""
    hooks = _hooks_of(optimizer)
    return None if hooks is None else hooks.listener


def attached_optimizers() -> list[Optimizer]:
    """Return the optimizers that have an agent."""
    return [optimizer for optimizer, hooks in list(_attached.items()) if hooks() is not None]


def current_scaler() -> GradScaler | None:
    """Return the GradScaler whose ``step`` is running, if any."""
    return _scalers[-1] if _scalers else None


def check_free(optimizers: list[Optimizer]) -> None:
    """Raise RuntimeError if one of the optimizers has a listener already, ValueError if one is given twice."""
    for place, optimizer in enumerate(optimizers):
        if _hooks_of(optimizer) is not None:
            raise RuntimeError(
                f"this {type(optimizer).__name__} already has a gradiometer agent: detach() that one first"
            )
        if any(optimizer is other for other in optimizers[:place]):
            raise ValueError(f"this {type(optimizer).__name__} is given twice: list every optimizer once")


class StepHooks:
    """The step hooks of one listener on its optimizers. Raises as :func:`check_free` does."""

    def __init__(self, optimizers: list[Optimizer], listener: StepListener) -> None:
        check_free(optimizers)
        self._optimizers, self.listener, self.calls = optimizers, listener, 0
        self._handles: list[RemovableHandle] = []
        for optimizer in optimizers:
            _attached[optimizer] = ref(self)
        # After that: a forgotten agent that is collected at any moment takes GradScaler's wrapper off if none is left.
        _wrap_scaler()
        finalize(self, _unwrap_scaler).atexit = False
        for optimizer in optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(_eager(self._before)),
                optimizer.register_step_post_hook(_eager(self._after)),
            ]

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.calls += 1
        if transfer.capturing():
            self.listener.captured(optimizer)
            return None
        if self.listener.within_step(optimizer):
            return None
        self.listener.step_failed(optimizer)  # what a step that raised has left behind
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self.listener.before_update(optimizer)
            return None
        wrapped = self._wrap_closure(optimizer, closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _wrap_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        @functools.wraps(closure)
        def wrapped() -> Any:
            loss = closure()
            self.listener.before_update(optimizer)
            return loss

        return wrapped

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args, kwargs
        if not transfer.capturing():
            self.listener.after_step(optimizer)

    def remove(self) -> None:
        """Remove every hook, leaving no trace. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for optimizer in self._optimizers:
            if _hooks_of(optimizer) is self:
                del _attached[optimizer]
        self._optimizers = []
        _unwrap_scaler()


def _eager(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile from tracing a hook of a compiled step."""
    eager: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]  # torch
    return eager


def _wrap_scaler() -> None:
    if _scaler_steps:  # left in somebody's chain of wrappers, or taken out of it since
        if GradScaler.step is _scaler_steps[0][0]:
            GradScaler.step = _scaler_steps[0][1]  # type: ignore[method-assign]  # restored by the last detach
        return
    original = GradScaler.step

    @functools.wraps(original)
    def step(self: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        hooks = _hooks_of(optimizer)
        if hooks is None or not self.is_enabled():
            return original(self, optimizer, *args, **kwargs)
        before, unset = hooks.calls, {"grad_scale", "found_inf"}.difference(optimizer.__dict__)
        _scalers.append(self)
        try:
            result = original(self, optimizer, *args, **kwargs)
        except BaseException:
            hooks.listener.step_failed(optimizer)
            for name in unset:  # the scaler deletes them only after a step that returns
                optimizer.__dict__.pop(name, None)
            raise
        else:
            if hooks.calls == before:
                hooks.listener.scaler_skipped(optimizer)
            return result
        finally:
            _scalers.pop()

    _scaler_steps.append((original, step))
    GradScaler.step = step  # type: ignore[method-assign]  # restored by the last detach


def _unwrap_scaler() -> None:
    """Put the original back if no agent is left, unless somebody has wrapped ours since: then it passes all on."""
    attached = any(hooks() is not None for hooks in _attached.values())
    if _scaler_steps and not attached and GradScaler.step is _scaler_steps[0][1]:
        GradScaler.step = _scaler_steps.pop()[0]  # type: ignore[method-assign]  # the original goes back
