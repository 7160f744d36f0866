"""The interface of a policy: a pair of pure functions over tensors.

``decide`` maps ``(state, observation, step)`` to a decision and the next state. It reads nothing back to the host,
changes nothing in place and knows no model, optimizer or hook: so the same code runs on the step path, on any device,
and over recorded norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradiometer.policy.kinds import Scope

__all__ = ["Change", "Decision", "Layout", "Observation", "Piece", "Policy", "State", "Weighed"]

State = dict[str, Tensor]
"""A policy's memory, flat so that it goes into a checkpoint as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What there is to decide about: P parameters, and the layer and the named group of each."""

    names: Sequence[str]
    layers: Sequence[str]
    groups: Sequence[str | None] = ()
    """The group of each parameter that the policy file names, None where it names none; empty without groups."""
    by: Scope = "layer"
    """What is bounded by itself where a policy does not say."""
    device: torch.device
    dims: Sequence[int] = ()
    """How many dimensions each parameter has as a whole; empty where no gradients are at hand, as in a replay."""
    placements: Sequence[str] = ()
    """How each parameter lies on the ranks, as the manifest says it; empty where every rank has all of all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One step's gradients, as the earlier policies of the pipeline leave them."""

    norms: Tensor
    """L2 norm of each parameter's gradient, float32 or float64 [P]; negative zero where it has none."""
    total: Tensor
    """Global L2 norm, 0-dim, of the same dtype."""
    loss: Tensor | None = None
    """Loss of the step, 0-dim, the same on all ranks, NaN where none was logged; None where no policy asks for it."""
    skipped: Tensor | None = None
    """bool, 0-dim: an earlier stage skips the step, so there is nothing to learn from it; None: none can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """What is here of one gradient, and of the weights that it is of: dense tensors of equal shape, or rows of both."""

    gradient: Tensor
    weight: Tensor
    norms: Tensor | None = None
    """[2]: L2 norms of the whole weight and the whole gradient, where the parameter is cut within a unit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weighed:
    """A change that has been worked out, and not been made."""

    strength: Tensor
    """Smallest factor that an element here is to be scaled by, float32 0-dim in [0, 1]; 1 where none is."""
    active: Tensor
    """bool, 0-dim: making the change would do something here."""
    make: Callable[[], None]
    """Change the gradients in place."""


class Change(Protocol):
    """What the last stage does to single elements: its effect on the norms is measured after it."""

    @property
    def chosen(self) -> Sequence[bool]:
        """Which of the P parameters it is for."""
        ...

    @property
    def cut(self) -> Sequence[int]:
        """Places of the parameters whose norms must be known over all ranks; the same on each."""
        ...

    def weigh(self, pieces: Sequence[Piece], device: torch.device, scale: Tensor | None = None) -> Weighed:
        """Work out the change of what is here, on ``device``; nothing is changed, and nothing read by the host.

        ``scale`` is a loss scale that the gradients still carry, to be left out of account.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What a policy wants done; every part is optional. Tensors are on the observation's device."""

    coefficient: Tensor | None = None
    """Factor in [0, 1], never NaN: 0-dim for every gradient alike, or [P]."""
    skip: Tensor | None = None
    """bool, 0-dim: the optimizer shall not move the parameters."""
    zero: Tensor | None = None
    """bool [P]: gradients to replace by zeros."""
    change: Change | None = None
    """A change of elements, whose strength and effect on the norms are known only where the gradients are."""
    strength: Tensor | None = None
    """The smallest factor applied, 0-dim, 1 when nothing changed; None where :attr:`skip` or :attr:`zero` tells."""
    threshold: float | Tensor
    """Threshold in force, in units of what it bounds; of several, that of the unit that was scaled the most."""


class Policy(Protocol):
    """One stage of a pipeline, bound to a layout."""

    @property
    def name(self) -> str:
        """Name in metrics, records and checkpoints."""
        ...

    def init(self) -> State:
        """Return the state before the first step."""
        ...

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        """Decide about one step: the ``step``-th since the policy came into force, from 0.

        That is a host integer, so warm-up branches cost nothing.
        """
        ...
