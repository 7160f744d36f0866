"""What ``gradiometer run`` brings into every Python process below it, through PYTHONPATH.

Guarantees: a process that imports no torch runs a few lines at its start and one look-up an import, and nothing else;
torch is never imported from here, and gradiometer not before an optimizer steps. Another ``sitecustomize`` that would
have been found runs as if this one were not there. Needs no gradiometer, for the interpreter may be one that has none,
and at its start nothing that ``site`` has not imported.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing's own would have to be imported
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120  # pathlib would have to be imported
_MARK = "gradiometer_run_watch"
_REASON = "gradiometer run measures and clips at optimizer steps, outside of compiled graphs"
_said: set[str] = set()
_eager: list[Callable[[Any], bool]] = []
"""What :func:`_announce` calls, once there is a torch to wrap it."""


class _ImportWatch:
    """A finder that finds nothing itself: it calls back once a module that it waits for has been executed."""

    mark = _MARK

    def __init__(self, awaited: dict[str, Callable[[Any], None]]) -> None:
        self._awaited = awaited

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._awaited:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                _guarded(_call_after, spec.loader, self._awaited.pop(name))
                return spec
        return None


def _call_after(loader: Any, callback: Callable[[Any], None]) -> None:
    def exec_module(module: Any) -> None:
        del loader.exec_module
        loader.exec_module(module)
        _guarded(callback, module)

    loader.exec_module = exec_module  # of this one loader: every module has its own


def _guarded(function: Callable[..., None], *arguments: Any) -> None:
    try:
        function(*arguments)
    except Exception as error:
        _refuse(f"this torch cannot be watched ({error!r})")


def _watch_steps(module: Any) -> None:
    """Have every optimizer's step announced; torch calls this hook before the optimizer's own hooks."""

    must_act = _must_act()

    def before_step(optimizer: Any, *_: Any) -> None:
        import torch

        # Compiled with fullgraph=True, only a step of somebody else's optimizer works: torch's own break the graph too.
        if must_act or not torch.compiler.is_compiling() or type(optimizer).__module__.startswith("torch.optim."):
            _announce(optimizer)

    module.register_optimizer_step_pre_hook(before_step)


def _watch_scaler(module: Any) -> None:
    """Have steps announced before a GradScaler decides to skip them, which no optimizer is told of."""
    import functools

    scaler = module.GradScaler
    original = scaler.step

    @functools.wraps(original)
    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_enabled() and _announce(optimizer):
            return scaler.step(self, optimizer, *args, **kwargs)  # wrapped by the new agent, and it comes back here
        return original(self, optimizer, *args, **kwargs)

    scaler.step = step


def _announce(optimizer: Any) -> bool:
    """Return whether the step of this optimizer has led to an agent being attached. Never part of a compiled graph."""
    if not _eager:
        import torch

        _eager.append(torch.compiler.disable(_announce_now))  # type: ignore[no-untyped-call]  # torch
    done: bool = _eager[0](optimizer)
    return done


# The mark that torch.compiler.disable sets on what it returns; calling it before now would have imported all of dynamo.
_announce._torchdynamo_disable = True  # type: ignore[attr-defined]  # torch's own
_announce._torchdynamo_disable_msg = _REASON  # type: ignore[attr-defined]  # torch's own


def _announce_now(optimizer: Any) -> bool:
    try:
        from gradiometer.automatic import before_step
    except (ImportError, SyntaxError) as error:  # a Python too old for it gives the latter
        _refuse(f"{sys.executable} cannot import gradiometer ({error}): install it there")
        return False
    return before_step(optimizer)


def _must_act() -> bool:
    """Tell whether there is a policy; settings that cannot be read are for gradiometer to complain of."""
    import json

    try:
        settings = json.loads(os.environ.get("GRADIOMETER_RUN", ""))
    except ValueError:
        return False
    return isinstance(settings, dict) and bool(settings.get("policy"))


def _refuse(reason: str) -> None:
    """Say once that nothing is measured here; with a policy, stop."""
    import logging

    message = f"gradiometer run: nothing is measured in process {os.getpid()}: {reason}"
    if _must_act():
        raise RuntimeError(f"{message}. The policy cannot be applied")
    if message not in _said:
        _said.add(message)
        logging.getLogger("gradiometer").warning(message)


def _install() -> None:
    if not os.environ.get("GRADIOMETER_RUN") or any(getattr(each, "mark", "") == _MARK for each in sys.meta_path):
        return
    awaited = {"torch.optim.optimizer": _watch_steps, "torch.amp.grad_scaler": _watch_scaler}
    for name in [name for name in awaited if name in sys.modules]:
        _guarded(awaited.pop(name), sys.modules[name])
    sys.meta_path.insert(0, _ImportWatch(awaited))  # type: ignore[arg-type]  # a finder by its one method


def _run_the_other() -> None:
    """Run the ``sitecustomize`` that this one hides, if there is one."""
    sys.path[:] = [entry for entry in sys.path if entry != _HERE]
    mine = sys.modules.pop(__name__)
    try:
        __import__(__name__)
    except ImportError as error:
        if error.name != __name__:
            raise
    finally:
        sys.modules.setdefault(__name__, mine)  # the import that is under way expects one


if __name__ == "sitecustomize":
    _install()
    _run_the_other()
