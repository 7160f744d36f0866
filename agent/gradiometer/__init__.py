"""gradiometer: an instrument that measures gradients.

Every name is loaded on first use, so that reading runs and serving metrics need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradiometer.actions import PolicyActionError
    from gradiometer.callbacks import ActionCall
    from gradiometer.live.loop import StopTraining
    from gradiometer.live.requests import LoopRequest
    from gradiometer.policy.spec import PolicyError, PolicySpec, load_policy
    from gradiometer.recorder import RunInUseError
    from gradiometer.records import RunFormatError
    from gradiometer.run import Run, open_run
    from gradiometer.session import Agent, attach
    from gradiometer.stepper import NonFiniteGradientError

__all__ = [
    "ActionCall",
    "Agent",
    "LoopRequest",
    "NonFiniteGradientError",
    "PolicyActionError",
    "PolicyError",
    "PolicySpec",
    "Run",
    "RunFormatError",
    "RunInUseError",
    "StopTraining",
    "attach",
    "load_policy",
    "open_run",
]

_HOMES = {
    "ActionCall": "callbacks",
    "Agent": "session",
    "LoopRequest": "live.requests",
    "NonFiniteGradientError": "stepper",
    "PolicyActionError": "actions",
    "PolicyError": "policy.spec",
    "PolicySpec": "policy.spec",
    "Run": "run",
    "RunFormatError": "records",
    "RunInUseError": "recorder",
    "StopTraining": "live.loop",
    "attach": "session",
    "load_policy": "policy.spec",
    "open_run": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gradiometer' has no attribute {name!r}")
    try:
        home = import_module(f"gradiometer.{_HOMES[name]}")
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise ImportError(f"gradiometer.{name} needs torch: pip install 'gradiometer[torch]'") from error
        raise
    return getattr(home, name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
