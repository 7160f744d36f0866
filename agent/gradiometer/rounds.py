"""Which gradients belong to a step, where a model has several optimizers.

Optimizers that step one after another on the same gradients form a round: the first one's step observes and decides
for all. Where they turn out to have backward passes of their own, or a GradScaler has unscaled only some of them, a
common norm would be wrong, and from then on each optimizer is a round by itself; that is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from gradiometer.hooks import current_scaler
from gradiometer.layers import Parameters
from gradiometer.policy.pipeline import Outcome
from gradiometer.shards import local_part

__all__ = ["Round", "Rounds", "Watched"]

logger = logging.getLogger(__name__)
Watched = list[nn.Parameter | None]
"""The P parameters, None where one is not meant."""


class _Fingerprint:
    """Which gradients an optimizer would use: the first one's identity and version.

    Held weakly: the ``id`` of a gradient that was freed is soon that of another.
    """

    __slots__ = ("_gradient", "_version")

    def __init__(self, watched: Watched) -> None:
        gradient = _first_gradient(watched)
        self._gradient = None if gradient is None else TensorWeakRef(gradient)
        self._version = 0 if gradient is None else gradient._version

    def matches(self, watched: Watched) -> bool:
        gradient = _first_gradient(watched)
        if gradient is None or self._gradient is None:
            return gradient is None and self._gradient is None
        return self._gradient() is gradient and gradient._version == self._version


@dataclass(kw_only=True, slots=True)
class Round:
    """A decision, and which optimizers have stepped by it."""

    outcome: Outcome
    scaled: bool
    """Whether the coefficient has been multiplied into the gradients."""
    unscaled: bool
    """Whether the loss scale has been divided out of them."""
    stepped: set[int] = field(default_factory=set)
    fingerprints: list[_Fingerprint] = field(default_factory=list)


class Rounds:
    """The rounds of one agent's optimizers, which are called by their place in the list."""

    def __init__(self, parameters: Parameters, optimizers: Sequence[Optimizer], *, together: bool) -> None:
        self.optimizers, self.together = list(optimizers), together
        self.current: Round | None = None
        self.watched: list[Watched] = []
        """The parameters that each optimizer holds."""
        self._parameters = parameters
        self._held: list[list[nn.Parameter]] = []
        """What each optimizer held when it was last looked through."""
        self._active: int | None = None
        self._acted_on: _Fingerprint | None = None
        self._watch()

    def index(self, optimizer: Optimizer) -> int:
        if optimizer is self.optimizers[0]:
            return 0
        return next(index for index, each in enumerate(self.optimizers) if each is optimizer)

    def refresh(self, index: int) -> None:
        """Look through the optimizers again if this one holds other parameters than it did.

        Raises RuntimeError if it has been given parameters that were not there at attach.
        """
        held = _held(self.optimizers[index])
        if len(held) != len(self._held[index]) or not all(map(is_, held, self._held[index])):
            self._watch()

    def within(self, index: int) -> bool:
        """Tell whether the optimizer is in a step on the gradients it has now: the step calls its parent's."""
        return self._active == index and self._acted_on is not None and self._acted_on.matches(self.watched[index])

    def active(self, index: int) -> bool:
        """Tell whether the optimizer has used gradients in this very step before."""
        return self._active == index

    def enter(self, index: int) -> bool:
        """Note that the optimizer is about to use gradients; tell whether it did so in this very step before."""
        again, self._active = self._active == index, index
        return again

    def acted(self, index: int) -> None:
        """Note that the gradients are now as the optimizer shall have them."""
        self._acted_on = _Fingerprint(self.watched[index])

    def joins(self, index: int) -> bool:
        """Tell whether this step belongs to the open round."""
        return (
            self.current is not None
            and self.awaits(index)
            and self.current.fingerprints[index].matches(self.watched[index])
        )

    def awaits(self, index: int) -> bool:
        """Tell whether the open round was opened for this optimizer too, and has not seen it step."""
        return self.current is not None and self.together and index not in self.current.stepped

    def scaled_alike(self, index: int, scale: Tensor | None) -> bool:
        """Tell whether those that step with ``index`` have gradients that carry the same loss scale as its own."""
        scaler = current_scaler()
        if scaler is None or len(self.optimizers) == 1:
            return True
        others = [self.optimizers[member] for member in self.members(index) if member != index]
        wanted = OptState.READY if scale is not None else OptState.UNSCALED
        return all(_stage(scaler, other) is wanted for other in others)

    def part(self, reason: str, step: int) -> str:
        """Let every optimizer be a round by itself from ``step`` on; say so and return what was said."""
        self.together, self.current = False, None
        message = (
            f"the {len(self.optimizers)} optimizers do not step together ({reason}): from step {step} on, norms "
            "and clipping are each optimizer's own; pass together=False to say so from the start"
        )
        logger.warning("gradiometer: %s", message)
        return message

    def still_scaled(self, index: int, scaler: GradScaler) -> bool:
        """Tell whether the scaler has yet to divide the loss scale out of the optimizer's gradients."""
        return _stage(scaler, self.optimizers[index]) is OptState.READY

    def members(self, index: int) -> list[int]:
        """Return the optimizers of the round that ``index`` opens: those whose turn a GradScaler has not ended."""
        if not self.together or len(self.optimizers) == 1:
            return [index]
        scaler = current_scaler()
        done = [_stage(scaler, each) is OptState.STEPPED for each in self.optimizers]
        return [place for place in range(len(done)) if place == index or not done[place]]

    def union(self, members: list[int]) -> Watched:
        """Return the parameters of several optimizers."""
        if len(members) == 1:
            return self.watched[members[0]]
        rows = zip(*(self.watched[member] for member in members), strict=True)
        return [next((parameter for parameter in row if parameter is not None), None) for row in rows]

    def open(self, members: list[int], outcome: Outcome, *, scaled: bool, unscaled: bool) -> None:
        """Open a round; the gradients have been changed as far as they shall be."""
        prints = [_Fingerprint(mine) for mine in self.watched] if len(self.watched) > 1 else []
        done = set(range(len(self.optimizers))).difference(members)
        self.current = Round(outcome=outcome, scaled=scaled, unscaled=unscaled, stepped=done, fingerprints=prints)

    def finished(self) -> None:
        """Note that the step in progress is over, or failed; nothing is kept that refers to a gradient."""
        self._active = self._acted_on = None
        if self.current is not None and len(self.current.stepped) == len(self.optimizers):
            self.current = None

    def _watch(self) -> None:
        """Find for each optimizer which of the P parameters it holds now."""
        places = self._parameters.index
        watched = []
        for optimizer in self.optimizers:
            mine: Watched = [None] * len(self._parameters)
            for tensor in _held(optimizer):
                if id(tensor) not in places:
                    raise RuntimeError(
                        f"{type(optimizer).__name__} was given a parameter of shape {tuple(tensor.shape)} that neither "
                        "it nor the model had at attach: detach() and attach again"
                    )
                mine[places[id(tensor)]] = tensor
            watched.append(mine)
        self.watched, self._held = watched, [_held(optimizer) for optimizer in self.optimizers]


def _held(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _first_gradient(watched: Watched) -> Tensor | None:
    first = next((each.grad for each in watched if each is not None and each.grad is not None), None)
    return None if first is None else local_part(first)  # a change in place is counted there


def _stage(scaler: GradScaler | None, optimizer: Optimizer) -> OptState:
    """Tell how far a GradScaler is with an optimizer since its last update."""
    state = {} if scaler is None else scaler._per_optimizer_states.get(id(optimizer), {})
    stage: OptState = state.get("stage", OptState.READY)
    return stage
