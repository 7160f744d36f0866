"""Follow the clipping that a loop does by itself: what was done to the gradients of a step, and what was done in vain.

Norms are measured at the optimizer's step, after the loop has clipped; the total norm that torch worked out gives the
factor, and the factor the norms before. So nothing is measured twice, nothing is read from a device, and a gradient
that something else has changed since is seen: that clip is then no longer part of the step. Only a clamp is measured
before it, because it has no factor. Guarantees: no gradient is kept alive, and nothing of training is changed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.utils.weak import TensorWeakRef

from gradiometer import clip_seams, transfer
from gradiometer._guard import Guard
from gradiometer.clip_calls import ClipCall, Places
from gradiometer.clip_seams import Heard, TorchNorms
from gradiometer.hooks import current_scaler
from gradiometer.layers import Parameters
from gradiometer.norms import Meter
from gradiometer.records import CLIP_GRAD_NORM, OWN_CLIPPING
from gradiometer.rounds import Rounds, Watched

__all__ = ["OwnClip", "OwnClipping", "row_width"]

logger = logging.getLogger(__name__)

MAX_COVERED = 2**17
"""Parameters in all sets together that are remembered, some 150 bytes each; a loop clips the same few sets again and
again, but one that leaves out what had no gradient may never clip the same set twice."""
NORMS = 3
"""Norms from before a clip that a row has room for, for each parameter: by layer, by the whole, and before a clamp."""
MORE_CALLS = 8
"""Calls beyond one for each parameter that a row has room for."""
HALVES = (torch.float16, torch.bfloat16)


class _Mark:
    """Which gradient it was, and of which version. Held weakly: the ``id`` of one that was freed is soon another's."""

    __slots__ = ("gradient", "version")

    def __init__(self, gradient: Tensor) -> None:
        self.gradient, self.version = TensorWeakRef(gradient), gradient._version

    def is_of(self, gradient: Tensor | None) -> bool:
        return gradient is not None and self.gradient() is gradient

    def matches(self, gradient: Tensor | None) -> bool:
        return gradient is not None and gradient._version == self.version and self.gradient() is gradient


class _Coverage:
    """The parameters of a call, and what has to be known of them."""

    def __init__(self, given: Places, watched: Sequence[Watched]) -> None:
        self.given = given
        """For each parameter that was given its place among those watched, or -1; intp[n]."""
        self.places: Places = np.unique(given[given >= 0])
        places = self.places.tolist()
        held = {owner: [place for place in places if mine[place] is not None] for owner, mine in enumerate(watched)}
        self.owned = {owner: mine for owner, mine in held.items() if mine}
        """The covered parameters of each optimizer that holds any."""
        self.members = set(places)
        self.meter: Meter | None = None
        self.waiting: set[int] = set()
        """Optimizers whose steps the newest call by norm awaits: that call's own set, and not the call, which refers
        to this object and to tensors."""


@dataclass(kw_only=True, slots=True)
class OwnClip:
    """One call, and the optimizers whose steps it awaits."""

    call: ClipCall
    coverage: _Coverage
    firsts: dict[int, int]
    """For each optimizer the first covered parameter that had a gradient, by which the others are known."""
    total: float | Tensor | None = None
    coefficient: Tensor | None = None
    norms: Tensor | None = None
    """Norms before the call, of ``call.measured``."""
    used: bool = False
    """Whether an optimizer had used the gradients already."""
    waiting: set[int] = field(default_factory=set)

    def scalars(self, number: int) -> dict[str, float | Tensor]:
        """Name what must travel for this call to be undone on the host."""
        named = {"total": self.total, "coefficient": self.coefficient}
        return {f"own{number}.{name}": value for name, value in named.items() if value is not None}


class OwnClipping:
    """The loop's own clipping, as it concerns one agent's parameters."""

    def __init__(
        self,
        parameters: Parameters,
        rounds: Rounds,
        device: torch.device,
        notices: list[tuple[str, str]],
    ) -> None:
        self.spent = 0.0
        """Host seconds that following the loop's clipping has cost; whoever records them sets this back."""
        self._notices = notices
        self._names, self._tensors, self._index = parameters.names, parameters.tensors, parameters.index
        self._rounds, self._device = rounds, device
        self._policy_clips = False
        """Whether a policy clips as well."""
        self._guard: Guard | None = None
        self._watched: list[Watched] = []
        self._coverages: dict[tuple[int, ...], _Coverage] = {}
        self._covering = 0
        """Parameters in the coverages, those in several counted several times."""
        self._clips: list[OwnClip] = []
        self._held = 0
        """Norms that are to travel with them."""
        self._marks: dict[int, _Mark] = {}
        """For each first parameter of a clip, its gradient as clipping left it."""
        self._used: dict[int, tuple[int, int, int]] = {}
        """For each optimizer the place, ``id`` and version of its first gradient, as its last step left it. No mark: a
        gradient that is referred to, be it weakly, cannot be converted along with its module between two steps."""
        self._in_vain: dict[int, str] = {}
        """Optimizers none of whose parameters had a gradient when something was to clip them."""
        self._scaler: ref[GradScaler] | None = None
        self._announced: set[str] = set()

    def listen(self, guard: Guard) -> None:
        """Hear of clipping from now on; ``guard`` is where failures stop."""
        self._guard = guard
        clip_seams.listen(self)

    def close(self) -> None:
        """Hear no more, and forget what was heard. Idempotent."""
        clip_seams.forget(self)
        self._guard = None
        self._clips, self._marks, self._used, self._coverages = [], {}, {}, {}

    def policy_changed(self, *, clips: bool) -> None:
        """Note that another policy is in force, and whether it clips."""
        self._policy_clips = clips
        self._announce_two()

    def begin(self, heard: Heard) -> Any:
        """Note a call that is about to be carried out."""
        if self._guard is None:
            return None
        began, token = time.perf_counter(), None
        with self._guard:
            coverage = self._covered(heard.parameters)
            if coverage.owned:
                token = self._begin(heard, coverage)
        self.spent += time.perf_counter() - began
        return token

    def end(self, token: tuple[list[int], OwnClip | None] | None) -> None:
        """Note that it was: the gradients it has changed are still those that were clipped before."""
        if token is None or self._guard is None:
            return
        unchanged, clip = token
        began = time.perf_counter()
        with self._guard:
            for place in {*unchanged, *(clip.firsts.values() if clip is not None else ())}:
                gradient = self._gradient(place)
                if gradient is not None:
                    self._marks[place] = _Mark(gradient)
            if clip is not None:
                if len(self._clips) >= len(self._tensors) + MORE_CALLS:
                    raise RuntimeError(f"more than {len(self._clips)} calls clip in one step: this one is not recorded")
                self._clips.append(clip)
                self._held += 0 if clip.norms is None else clip.norms.numel()
                if clip.call.function == CLIP_GRAD_NORM:
                    clip.coverage.waiting = clip.waiting
        self.spent += time.perf_counter() - began

    def refused(self, gradients: Sequence[Tensor], norms: Tensor | None) -> None:
        """Name the gradients for which torch is about to raise; it has waited for their norms, so they can be read."""
        if self._guard is None or norms is None:
            return
        with self._guard:
            bad = {id(gradients[at]) for at in torch.nonzero(~torch.isfinite(norms)).flatten().tolist()}
            tensors = zip(self._names, self._tensors, strict=True)
            names = [name for name, each in tensors if each is not None and id(each.grad) in bad]
            if names and "refused" not in self._announced:
                self._announced.add("refused")
                more = f" and {len(names) - 1} more" * (len(names) > 1)
                message = f"the gradient of {names[0]}{more} went non-finite; clip_grad_norm_ was told to raise for it"
                self._notices.append(("nonfinite", message))

    def take(self, members: Iterable[int], *, again: bool = False) -> tuple[OwnClip, ...]:
        """Return what was done to the gradients that these optimizers are about to use, oldest first; forget it.

        ``again`` says that they have begun this step before.
        """
        if self._guard is None:
            return ()
        with self._guard:
            return self._take(set(members), again=again)
        return ()

    def stepped(self, owner: int) -> None:
        """Note that an optimizer has used its gradients."""
        first = _first(self._rounds.watched[owner])
        if first is not None:
            gradient = self._gradient(first)
            assert gradient is not None
            self._used[owner] = first, id(gradient), gradient._version

    def _covered(self, parameters: Sequence[Tensor]) -> _Coverage:
        if self._watched is not self._rounds.watched or self._covering > MAX_COVERED:
            self._watched, self._coverages, self._covering = self._rounds.watched, {}, 0
        key = tuple(map(id, parameters))  # those watched live as long as the agent, so no other has their id
        coverage = self._coverages.get(key)
        if coverage is None:
            given = np.array([self._index.get(each, -1) for each in key], np.intp)
            coverage = self._coverages[key] = _Coverage(given, self._watched)
            self._covering += len(key)
        return coverage

    def _begin(self, heard: Heard, coverage: _Coverage) -> tuple[list[int], OwnClip | None]:
        firsts = {owner: place for owner, mine in coverage.owned.items() if (place := self._first_of(mine)) is not None}
        if not firsts:
            self._note_in_vain(heard, coverage)
            return [], None
        marked = self._marks.keys() & coverage.members
        unchanged = [place for place in marked if self._marks[place].matches(self._gradient(place))]
        if len(unchanged) < len(marked):
            self._drop(marked.difference(unchanged))
        if not math.isfinite(heard.limit):
            return unchanged, None  # torch has no other function that only measures
        return unchanged, self._clip(heard, coverage, firsts)

    def _clip(self, heard: Heard, coverage: _Coverage, firsts: dict[int, int]) -> OwnClip:
        by_norm = heard.function == CLIP_GRAD_NORM
        clip = OwnClip(
            call=ClipCall(
                function=heard.function,
                limit=heard.limit,
                places=coverage.places,
                scaled=self._still_scaled(firsts),
                again=by_norm and bool(coverage.waiting),
            ),
            coverage=coverage,
            firsts=firsts,
            used=any(self._is_used(owner) for owner in firsts),
            waiting=set(firsts),
        )
        if by_norm:
            self._keep_total(clip, heard)
        else:
            self._measure(clip)
        return clip

    def _keep_total(self, clip: OwnClip, heard: Heard) -> None:
        if heard.total is None:
            raise TypeError("the total norm is no tensor: torch takes no other")
        total = clip.total = heard.total.reshape(())
        norms = heard.torch_norms
        if transfer.reads_are_free(total.device):
            clip.total = float(total)
            if math.isfinite(clip.total):
                norms = None
        if total.dtype in HALVES:  # torch's factor has the rounding of its dtype
            clip.coefficient = torch.clamp(heard.limit / (total + 1e-6), max=1.0)
        if norms is not None:
            self._keep_norms(clip, heard.parameters, norms)

    def _keep_norms(self, clip: OwnClip, parameters: Sequence[Tensor], found: TorchNorms) -> None:
        measured = clip.coverage.given
        if found.order is not None or found.norms.numel() != len(measured):
            order = found.order
            place = {id(p.grad): at for p, at in zip(parameters, measured.tolist(), strict=True) if p.grad is not None}
            measured = np.array([place[each] for each in order] if order else list(place.values()), np.intp)
        if len(measured) == found.norms.numel() <= self._room():
            clip.norms, clip.call.measured = found.norms, measured

    def _measure(self, clip: OwnClip) -> None:
        coverage = clip.coverage
        if len(coverage.places) > self._room():
            raise RuntimeError("gradients were clamped again and again in one step: this clamp is not recorded")
        gradients = [self._gradient(place) for place in coverage.places.tolist()]
        if any(hasattr(gradient, "placements") for gradient in gradients):
            return  # the norm of a shard is not the norm, and the ranks should not have to talk for a clamp
        coverage.meter = coverage.meter or Meter(self._device)
        with torch.no_grad():
            clip.norms = coverage.meter(gradients)
        clip.call.measured = coverage.places

    def _room(self) -> int:
        """Return how many norms may still travel with the row."""
        return NORMS * len(self._tensors) - self._held

    def _note_in_vain(self, heard: Heard, coverage: _Coverage) -> None:
        for owner in coverage.owned:
            if _first(self._rounds.watched[owner]) is None:
                self._in_vain[owner] = heard.function

    def _take(self, members: set[int], *, again: bool) -> tuple[OwnClip, ...]:
        scaler = current_scaler()
        self._scaler = None if scaler is None else ref(scaler)
        clips = [clip for clip in self._clips if not members.isdisjoint(clip.waiting)]
        valid = [clip for clip in clips if self._holds(clip, members)]
        if scaler is None:  # what looked like it was for another optimizer, or of a scaler that is gone
            for clip in valid:
                clip.call.scaled = False
        if not again:
            self._tell(clips, valid, members)
        for clip in clips:
            clip.waiting -= members
        for member in members:
            self._in_vain.pop(member, None)
        self._keep_waiting()
        if not self._clips:
            self._marks = {}
        return () if again else tuple(valid)

    def _holds(self, clip: OwnClip, members: set[int]) -> bool:
        """Tell whether the gradients are still as clipping left them, or have only lost the loss scale since."""
        for owner in members.intersection(clip.waiting):
            mark, gradient = self._marks[clip.firsts[owner]], self._gradient(clip.firsts[owner])
            if mark.matches(gradient) or (clip.call.scaled and mark.is_of(gradient)):
                return True
        return False

    def _tell(self, clips: list[OwnClip], valid: list[OwnClip], members: set[int]) -> None:
        for clip in valid:
            self._announce(clip.call)
        if valid or all(_first(self._rounds.watched[member]) is None for member in members):
            return
        late = [clip for clip in clips if clip.used and not self._is_there(clip, members)]
        in_vain = [self._in_vain[member] for member in members if member in self._in_vain]
        if late:
            message = "was called after optimizer.step(), on gradients already used: it had no effect"
            self._misused("after_step", late[0].call.function, message)
        elif in_vain:
            self._misused("no_gradient", in_vain[0], "was called when no gradient was there: it had no effect")

    def _is_there(self, clip: OwnClip, members: set[int]) -> bool:
        """Tell whether a gradient that was clipped is one that will be used, whatever was done to it since."""
        places = [clip.firsts[owner] for owner in members.intersection(clip.waiting)]
        return any(self._marks[place].is_of(self._gradient(place)) for place in places)

    def _announce(self, call: ClipCall) -> None:
        if call.function in self._announced:
            return
        self._announced.add(call.function)
        self._notices.append(("own_clipping", f"the loop clips by itself: {call.function} at {call.limit:g}"))
        self._announce_two()

    def _announce_two(self) -> None:
        own = [function for function in OWN_CLIPPING if function in self._announced]
        if own and self._policy_clips and "policy" not in self._announced:
            self._announced.add("policy")
            message = f"two clippers are at work: the loop's own {own[-1]}, and then the policy"
            logger.warning("gradiometer: %s", message)
            self._notices.append(("two_clippers", message))

    def _misused(self, misuse: str, function: str, message: str) -> None:
        if misuse not in self._announced:
            self._announced.add(misuse)
            message = f"{function} {message}; call it between backward() and optimizer.step()"
            logger.warning("gradiometer: %s", message)
            self._notices.append(("clip_misuse", message))

    def _drop(self, changed: set[int]) -> None:
        """Forget the clips of gradients that something else has changed since."""
        for clip in self._clips:
            clip.waiting -= {owner for owner, place in clip.firsts.items() if place in changed}
        self._keep_waiting()
        for place in changed:
            del self._marks[place]

    def _keep_waiting(self) -> None:
        self._clips = [clip for clip in self._clips if clip.waiting]
        self._held = sum(clip.norms.numel() for clip in self._clips if clip.norms is not None)

    def _gradient(self, place: int) -> Tensor | None:
        tensor = self._tensors[place]
        return None if tensor is None else tensor.grad

    def _first_of(self, places: list[int]) -> int | None:
        return next((place for place in places if self._gradient(place) is not None), None)

    def _is_used(self, owner: int) -> bool:
        """Tell whether the optimizer's gradients are those of its last step.

        Another may have the ``id`` of one that was freed: a good clip is then taken for late, and nothing is said of
        that unless its gradients are thrown away, too.
        """
        if owner not in self._used:
            return False
        first, identity, version = self._used[owner]
        gradient = self._gradient(first)
        return gradient is not None and id(gradient) == identity and gradient._version == version

    def _still_scaled(self, owners: Iterable[int]) -> bool:
        scaler = None if self._scaler is None else self._scaler()
        return scaler is not None and any(self._rounds.still_scaled(owner, scaler) for owner in owners)


def row_width(parameters: int) -> int:
    """Return how many values may travel with a row: the norms, and a total and a factor for every call."""
    return NORMS * parameters + 2 * (parameters + MORE_CALLS)


def _first(watched: Watched) -> int | None:
    """Return the first parameter that has a gradient."""
    return next((place for place, each in enumerate(watched) if each is not None and each.grad is not None), None)
