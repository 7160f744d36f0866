"""Find, in a process that told us nothing, the optimizers that are alive and the modules whose parameters they hold.

Objects are looked up in the garbage collector's list by their type alone: asking ``isinstance`` would touch attributes
that objects make up on demand. What ``gc.freeze()`` has hidden is not found; its parameters then go by their place in
the optimizer.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Found", "enclosing_optimizers", "find_around"]

_WRAPPED = ("_orig_mod", "module", "_forward_module")
"""What torch.compile, DistributedDataParallel and its kin, and Lightning's Fabric call the model that they wrap."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What belongs to one agent: a module to take names from, and optimizers; and whether they step together."""

    model: nn.Module
    optimizers: list[Optimizer]
    together: bool


def find_around(first: Optimizer, taken: Iterable[Optimizer]) -> Found:
    """Find what trains beside ``first``, an optimizer about to step for the first time.

    ``taken`` have an agent already. An optimizer that shares parameters with one found before it is left out: it is
    either within that one, or trains another phase and will step on its own. In a thread beside the main one ``first``
    is alone: other optimizers may be other threads', and an agent is for one thread.
    """
    modules, optimizers = _alive()
    if threading.current_thread() is not threading.main_thread():
        optimizers = []
    chosen, held, gone = [first], set(map(id, _held(first))), {id(each) for each in taken}
    for each in optimizers:
        mine = set(map(id, _held(each)))
        if each is not first and id(each) not in gone and held.isdisjoint(mine):
            chosen.append(each)
            held |= mine
    roots = _cover(_roots(modules), held)
    return Found(model=_as_one(roots), optimizers=chosen, together=_step_together(chosen, roots))


def enclosing_optimizers() -> list[Optimizer]:
    """Return the optimizers in whose ``step`` this call happens, innermost first."""
    found: list[Optimizer] = []
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "wrapper" and code.co_filename == Optimizer.profile_hook_step.__code__.co_filename:
            each = frame.f_locals.get("self")
            if each is not None and all(each is not other for other in found):
                found.append(each)
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return found


def _alive() -> tuple[list[nn.Module], list[Optimizer]]:
    """Return every module and every optimizer that is whole and has hooks of its own: wrappers have not."""
    modules, optimizers = [], []
    for each in gc.get_objects():
        kind = type(each)
        if issubclass(kind, nn.Module):
            if "_modules" in each.__dict__ and "_parameters" in each.__dict__:
                modules.append(each)
        elif issubclass(kind, Optimizer) and {"param_groups", "_optimizer_step_pre_hooks"} <= each.__dict__.keys():
            optimizers.append(each)
    return modules, optimizers


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def _roots(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules that are no part of another."""
    parts = {id(part) for module in modules for part in module._modules.values()}
    return [module for module in modules if id(module) not in parts]


def _cover(roots: Sequence[nn.Module], held: set[int]) -> list[nn.Module]:
    """Choose modules that have the parameters ``held``: the one with most of them first, of equals the smallest."""
    owned = [(root, _ids(root)) for root in roots]
    left, chosen = set(held), []
    while left and owned:
        root, mine = max(owned, key=lambda each: (len(each[1] & left), -len(each[1])))
        if not mine & left:
            break
        chosen.append(root)
        left -= mine
    return [_unwrapped(root) for root in chosen]


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the model within wrappers, so that parameters have the names that its author knows."""
    for name in _WRAPPED:
        inner = getattr(module, "_modules", {}).get(name)  # a module under construction has none yet
        if inner is not None and _ids(inner) == _ids(module):
            return _unwrapped(inner)
    return module


def _ids(module: nn.Module) -> set[int]:
    """Return the ``id`` of each parameter; ``parameters()`` is not asked, for a class may have another by that name."""
    found: set[int] = set()
    seen, left = {id(module)}, [module]
    while left:
        each = left.pop()
        found.update(id(tensor) for tensor in each._parameters.values() if tensor is not None)
        parts = [part for part in each._modules.values() if part is not None and id(part) not in seen]
        seen.update(map(id, parts))
        left += parts
    return found


def _as_one(roots: Sequence[nn.Module]) -> nn.Module:
    """Return the only module, or one that holds all of them under the names that the program has for them."""
    if len(roots) == 1:
        return roots[0]
    whole, names = nn.Module(), _variables(roots)
    for root in roots:
        name = base = names.get(id(root), type(root).__name__)
        number = 1
        while name in whole._modules:
            number += 1
            name = f"{base}_{number}"
        whole._modules[name] = root  # not add_module: a variable may be called as one of its methods is
    return whole


def _variables(modules: Sequence[nn.Module]) -> dict[int, str]:
    """Return what the functions under way call the modules, by ``id``: the outermost function's names count."""
    wanted, names = {id(module) for module in modules}, {}
    frame = sys._getframe()
    while frame is not None:
        variables = dict(frame.f_locals)
        owner = variables.get("self")
        for name, value in [*getattr(owner, "__dict__", {}).items(), *variables.items()]:
            inner = _unwrapped(value) if issubclass(type(value), nn.Module) else value
            if id(inner) in wanted and str(name).isidentifier() and not name.startswith("_"):
                names[id(inner)] = name
        frame = frame.f_back  # type: ignore[assignment]  # None ends the loop
    return names


def _step_together(optimizers: Sequence[Optimizer], roots: Sequence[nn.Module]) -> bool:
    """Tell whether the optimizers use the gradients of one backward pass: of one model, and all there now."""
    if len(roots) != 1:
        return False
    model = _ids(roots[0])
    held = [_held(each) for each in optimizers]
    return all(
        any(id(tensor) in model for tensor in mine) and any(tensor.grad is not None for tensor in mine) for mine in held
    )
