"""Watch gradients arrive during the backward pass: their order, and each micro-batch's norm before any reduction.

What a sharded parameter is given in a backward pass is reduced already, or never reaches a hook of its own (FSDP2 works
on tensors of its own making), so only whole parameters are watched.

A hook on every parameter costs a Python call a parameter a backward pass, so in mode ``auto`` the hooks are registered
only for the first steps, for every hundredth, and for the few after an incident. One hook stays: it tells that a
backward pass has happened, so that a loss is logged with the step it belongs to. Where steps are of different
parameters in turn, as in a GAN that freezes its discriminator, a few such hooks stay. In a distributed job another one
stays: it looks, at every step, at one small gradient of this rank's own before the ranks' gradients are reduced. NaN
that the loss or a layer sends backwards reaches the layers before it, so it is put where gradients arrive last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, get_args

from torch import Tensor
from torch.utils.hooks import RemovableHandle, unserializable_hook

from gradiometer import transfer
from gradiometer._guard import Guard
from gradiometer.layers import Parameters
from gradiometer.norms import tensor_norm

__all__ = ["MICROBATCHES", "BackwardMode", "BackwardWatch", "check_mode"]

BackwardMode = Literal["auto", "every", "off"]
Hook = TypeVar("Hook", bound=Callable[..., Any])
MICROBATCHES = 8
"""Micro-batches of a step whose norms are kept; the arrivals of later ones are not recorded."""
FIRST_STEPS, EVERY, BURST = 3, 100, 3
SENTINELS = 4
"""Parameters that are watched for backward passes at once, at most."""
UNSTEPPED = 1000
"""More backward passes than anybody accumulates in one step."""
PROBE_ELEMENTS = 65_536
"""A parameter with more elements is not looked at in every step."""


def _left_behind(hook: Hook) -> Hook:
    """Mark a hook as one that does not go along, for torch not to warn when a parameter is sent to another process."""
    unserializable_hook(hook)  # type: ignore[no-untyped-call]  # torch
    return hook


def check_mode(mode: BackwardMode) -> BackwardMode:
    """Return the mode; raises ValueError if it is none."""
    if mode not in get_args(BackwardMode):
        raise ValueError(f"backward is {mode!r}, expected one of {', '.join(map(repr, get_args(BackwardMode)))}")
    return mode


class BackwardWatch:
    """The backward hooks of one agent. Hooks may run in autograd's own threads; lists take appends from any of them."""

    def __init__(
        self,
        parameters: Parameters,
        mode: BackwardMode,
        guard: Guard,
        *,
        distributed: bool = False,
        unstepped: Callable[[], None] | None = None,
    ) -> None:
        """``unstepped`` is called when :data:`UNSTEPPED` backward passes went by without a step."""
        self._unstepped = unstepped
        self._mode, self._guard, self._limit = mode, guard, MICROBATCHES * len(parameters)
        held = [
            (index, parameter, holding)
            for index, (parameter, holding) in enumerate(zip(parameters.tensors, parameters.holdings, strict=True))
            if parameter is not None and holding is not None
        ]
        self._parameters = [(i, p) for i, p, holding in held if not holding.sharded and holding.leaf is None]
        self._leaves: list[tuple[Tensor, Any]] = [
            (p, p if holding.leaf is None else holding.leaf) for _, p, holding in held
        ]
        """Parameters, frozen ones too for they may thaw, and the tensor that tells of a backward pass of each."""
        self._handles: list[RemovableHandle] = []
        self._frozen: list[tuple[int, Tensor]] = []
        """What was frozen when the hooks were armed, and has none."""
        self._sentinels: dict[int, RemovableHandle] = {}
        """Hooks that tell of a backward pass, by their place in the leaves, oldest first."""
        self._counts: dict[int, int] = {}
        self._probe: RemovableHandle | None = None
        self._probed = -1
        self._probing = distributed and mode != "off"
        self._bare = [parameter for _, parameter in self._parameters if parameter._backward_hooks is None]
        self._arrivals: list[tuple[int, Tensor]] = []
        self._burst = FIRST_STEPS + 1
        self.own: Tensor | None = None
        """Sum over this step's backward passes of one small gradient's norm before any reduction, 0-dim; None where it
        was not looked at, as in a process that trains by itself."""
        self.order: tuple[int, ...] = ()
        """Parameters in the order in which their gradients last arrived."""
        self._watch_for_backward()
        self._place_probe()

    @property
    def armed(self) -> bool:
        return bool(self._handles)

    @property
    def seen(self) -> bool:
        """Whether a backward pass has reached the agent since the last :meth:`prepare`."""
        return bool(self._counts)

    @property
    def passes(self) -> int:
        """Backward passes of this step, as those parameters have seen them that are always watched."""
        return max(self._counts.values(), default=0)

    def prepare(self, step: int, *, incident: bool) -> None:
        """Get ready for the backward passes of ``step``: arm or disarm, as the mode says."""
        if not self.seen:
            self._watch_for_backward()  # what was watched had no gradient
        self._arrivals, self._counts, self.own = [], {}, None
        self._burst = BURST if incident else max(0, self._burst - 1)
        wanted = self._mode == "every" or (self._mode == "auto" and (self._burst > 0 or step % EVERY == 0))
        if wanted and not self._handles:
            self._arm(self._parameters)
        elif wanted and self._frozen:
            self._arm(self._frozen)
        elif not wanted and self._handles:
            self._disarm()

    def take(self) -> list[tuple[int, Tensor]]:
        """Return (parameter, norm 0-dim) of this step's gradients in arrival order, and remember that order."""
        arrivals, self._arrivals = self._arrivals, []
        if arrivals:
            self.order = tuple(dict.fromkeys(index for index, _ in arrivals))
            self._place_probe()
        return arrivals

    def remove(self) -> None:
        """Remove every hook and leave the parameters as they were found."""
        while self._sentinels:
            self._sentinels.popitem()[1].remove()
        if self._probe is not None:
            self._probe.remove()
            self._probe = None
        self._disarm()

    def _arm(self, parameters: Sequence[tuple[int, Tensor]]) -> None:
        self._frozen = [each for each in parameters if not each[1].requires_grad]
        for index, parameter in parameters:
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(self._hook(index)))  # type: ignore[no-untyped-call]  # torch

    def _disarm(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._frozen = [], []
        for parameter in self._bare:
            if not parameter._backward_hooks:
                parameter._backward_hooks = None  # autograd would go on calling into an empty table

    def _watch_for_backward(self) -> None:
        """Watch the last trainable parameter that has a gradient; drop the oldest hook where there are many."""
        if self._mode == "off":
            return
        trainable = [i for i, (p, leaf) in enumerate(self._leaves) if p.requires_grad and leaf.requires_grad]
        if not trainable:
            return
        used = [place for place in trainable if self._leaves[place][0].grad is not None]
        place = (used or trainable)[-1]
        if place in self._sentinels:
            return
        if len(self._sentinels) == SENTINELS:
            self._sentinels.pop(next(iter(self._sentinels))).remove()
        mark, watched = _left_behind(partial(self._mark, place)), self._leaves[place][1]
        if hasattr(watched, "placements"):  # a Tensor hook of a parameter that FSDP2 shards never fires
            self._sentinels[place] = watched.register_post_accumulate_grad_hook(mark)
        else:
            self._sentinels[place] = watched.register_hook(mark)

    def _mark(self, place: int, gradient: Tensor) -> None:
        del gradient
        count = self._counts[place] = self._counts.get(place, 0) + 1
        if count == UNSTEPPED and self._unstepped is not None:
            with self._guard:
                self._unstepped()

    def _place_probe(self) -> None:
        """Look at the last small gradient to arrive; until that is known, at the model's first small parameter."""
        if not self._probing:
            return
        small = {i: p for i, p in self._parameters if p.requires_grad and p.numel() <= PROBE_ELEMENTS}
        index = next((place for place in (*reversed(self.order), *small) if place in small), self._probed)
        if index == self._probed:
            return
        if self._probe is not None:
            self._probe.remove()
        self._probed, self._probe = index, small[index].register_hook(self._look)  # type: ignore[no-untyped-call]  # torch

    @_left_behind
    def _look(self, gradient: Tensor) -> None:
        with self._guard:
            norm = tensor_norm(gradient.detach())
            self.own = norm if self.own is None else self.own + norm

    def _hook(self, index: int) -> _ArrivalHook:
        return _ArrivalHook(self, index)

    def record(self, index: int, gradient: Tensor) -> None:
        """Note the arrival of one gradient; never raises into the backward pass."""
        with self._guard:
            if transfer.capturing():
                return
            if len(self._arrivals) < self._limit:
                self._arrivals.append((index, tensor_norm(gradient.detach())))


@_left_behind
class _ArrivalHook:
    """A callable with a slot, not a closure: a thousand of them are registered at once."""

    __slots__ = ("_index", "_watch")

    def __init__(self, watch: BackwardWatch, index: int) -> None:
        self._watch, self._index = watch, index

    def __call__(self, gradient: Tensor) -> None:
        self._watch.record(self._index, gradient)
