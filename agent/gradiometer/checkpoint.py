"""What of an agent goes into a checkpoint, and what an agent takes from one.

    {"version": 2, "step": 1200, "parameters": 148,
     "attached": {...}, "in_force": {...},      the policy given to attach, and the one that acted; None: none
     "born": {"zclip": 0},                      the step at which each of its stages came into force
     "states": {"zclip": {"mean": tensor}}}     what each stage remembers, by its name

A checkpoint that was made under the policy which is attached now restores the one that was in force then. Under another
policy, the one attached stays; each of its stages that has the name, kind, shapes and units of one in the checkpoint
takes over its memory, from shadow to pipeline and back too. Nothing here touches an agent: it makes a plan, or raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from gradiometer.policy.base import State
from gradiometer.policy.build import Binding
from gradiometer.policy.spec import PolicyError, PolicySpec, load_policy

__all__ = ["Plan", "plan", "save"]

VERSION = 2


class Bind(Protocol):
    """Binds a policy to the agent's model."""

    def __call__(self, spec: PolicySpec | None, *, born: Mapping[str, int] | None = None) -> Binding: ...


_NOTHING: dict[str, Any] = {"pipeline": []}


@dataclass(kw_only=True)
class Plan:
    """What an agent shall be when it goes on from a checkpoint."""

    step: int
    binding: Binding
    states: dict[str, State]
    """Of every stage, on its device."""
    anew: list[str] = field(default_factory=list)
    """Stages with a memory that the checkpoint has none for."""
    left: list[str] = field(default_factory=list)
    """Stages whose memory in the checkpoint nobody takes over."""
    reasons: list[str] = field(default_factory=list)
    """Why anything is not as it was."""

    @property
    def said(self) -> str:
        """Put in words what is not as it was when the checkpoint was made; empty if all is."""
        parts = [*self.reasons]
        if self.anew:
            parts.append(f"policies begin anew at step {self.step}: {', '.join(self.anew)}")
        if self.left:
            parts.append(f"what the checkpoint remembers of {', '.join(self.left)} is not used")
        return "; ".join(parts)

    @property
    def outline(self) -> object:
        """Return what must be alike on all ranks."""
        shapes = {name: {key: list(t.shape) for key, t in state.items()} for name, state in self.states.items()}
        return [self.step, _written(self.binding.spec), self.binding.born, shapes, self.anew]


def save(
    *, step: int, parameters: int, attached: PolicySpec | None, binding: Binding, states: Mapping[str, State]
) -> dict[str, Any]:
    """Return the state of an agent: plain values, and tensors that are copies on the host."""
    return {
        "version": VERSION,
        "step": step,
        "parameters": parameters,
        "attached": _written(attached),
        "in_force": _written(binding.spec),
        "born": binding.born,
        "states": {name: {key: t.detach().cpu().clone() for key, t in state.items()} for name, state in states.items()},
    }


def plan(
    saved: Mapping[str, Any],
    *,
    parameters: int,
    attached: PolicySpec | None,
    bind: Bind,
    check: Callable[[PolicySpec], None],
) -> Plan:
    """Work out how an agent with the policy ``attached`` goes on from ``saved``; ``check`` says what it cannot do.

    Raises ValueError if that is not the state of an agent, or if what it remembers does not fit this model.
    """
    saved = _check(saved)
    step, reasons = int(saved["step"]), []
    spec = attached
    if saved["attached"] == _written(attached) and saved["in_force"] != saved["attached"]:
        spec, reason = _in_force(saved["in_force"], attached, bind, check)
        reasons += [reason] if reason else []
    elif saved["attached"] not in (None, _written(attached)) and attached is not None:
        reasons.append("the policy is not the one that the checkpoint was made under")
    now = bind(spec)
    fresh, then = now.init(), _then(saved, now, bind)
    kept = {
        name for name in fresh if _fits(name, fresh, saved, spec, parameters) and now.units(name) == then.units(name)
    }
    born = {name: int(saved["born"].get(name, 0)) if name in kept else step for name in fresh}
    states = {
        name: {key: saved["states"][name][key].to(state[key].device) for key in state} if name in kept else state
        for name, state in fresh.items()
    }
    left = [name for name, state in saved["states"].items() if state and name not in kept]
    anew = [name for name, state in fresh.items() if state and name not in kept]
    return Plan(step=step, binding=bind(spec, born=born), states=states, anew=anew, left=left, reasons=reasons)


def _written(spec: PolicySpec | None) -> dict[str, Any] | None:
    return None if spec is None else spec.to_dict()


def _check(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state in its newest version; raises ValueError if it is none."""
    version = saved.get("version") if isinstance(saved, Mapping) else None
    if version not in (1, VERSION):
        raise ValueError(
            f"agent state has version {version!r}, expected 1 or {VERSION}: pass what Agent.state_dict() returned"
        )
    found: dict[str, Any] = {"parameters": None, "attached": None, "in_force": None, "born": {}} if version == 1 else {}
    found |= dict(saved)
    if version == 1:
        found["states"] = found.pop("policy", None)
    states, step = found.get("states"), found.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"agent state has step {step!r}, expected the number of a step")
    if not _are_states(states):
        raise ValueError("agent state has no tensors by policy and name under 'states': it was cut or edited")
    missing = {"attached", "in_force", "born"}.difference(found)
    if missing:
        raise ValueError(f"agent state lacks {', '.join(sorted(missing))}: it was cut or edited")
    return found


def _are_states(states: object) -> bool:
    return isinstance(states, Mapping) and all(
        isinstance(state, Mapping) and all(isinstance(each, Tensor) for each in state.values())
        for state in states.values()
    )


def _in_force(
    written: Mapping[str, Any] | None,
    attached: PolicySpec | None,
    bind: Bind,
    check: Callable[[PolicySpec], None],
) -> tuple[PolicySpec | None, str]:
    """Return the policy that was in force, or the one attached and why that one is no longer possible."""
    if written is None:
        return None, ""
    try:
        spec = load_policy(written)
        bind(spec)
        check(spec)
    except PolicyError as error:
        return attached, f"the policy that was in force cannot be restored, so the one attached is ({error})"
    return spec, ""


def _then(saved: Mapping[str, Any], now: Binding, bind: Bind) -> Binding:
    """Return what the policy of the checkpoint is on this model; that of now where it is the same, or not known."""
    if saved["in_force"] in (None, _written(now.spec)):
        return now
    try:
        return bind(load_policy(saved["in_force"]))
    except PolicyError:  # of another model, or of a version that had other settings
        return bind(None)


def _fits(
    name: str, fresh: Mapping[str, State], saved: Mapping[str, Any], spec: PolicySpec | None, parameters: int
) -> bool:
    """Tell whether a stage can take over what the checkpoint remembers under its name.

    Raises ValueError if the stage is the same as then and the model is not: its memory has other shapes.
    """
    if name not in saved["states"]:
        return False
    old, new = _entry(saved["in_force"], name), _entry(_written(spec), name)
    unknown = saved["in_force"] is None
    if not unknown and (old is None or new is None or old[0] != new[0]):
        return False
    wanted, found = _shapes(fresh[name]), _shapes(saved["states"][name])
    if wanted == found:
        return True
    if wanted.keys() == found.keys() and (unknown or old == new):
        raise ValueError(
            f"agent state of policy {name!r} has tensors of shapes {found}, expected {wanted}: this model has "
            f"{parameters} parameters, the checkpoint's had {saved['parameters'] or 'others'}"
        )
    return False


def _entry(written: Mapping[str, Any] | None, name: str) -> tuple[str, object] | None:
    """Return the kind of the stage of that name, and all that shapes its memory; None if there is none."""
    whole = written or _NOTHING
    stages: Sequence[Mapping[str, Any]] = [*whole.get("pipeline", ()), *whole.get("shadow", ())]
    for stage in stages:
        for kind, settings in stage.items():
            if (settings or {}).get("name", kind) == name:
                return kind, (settings, whole.get("groups"))
    return None


def _shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in sorted(state.items())}
