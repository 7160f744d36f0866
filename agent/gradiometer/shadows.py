"""Policies in shadow at work: each decides about every step as it was measured, is recorded, and never acts.

Raises nothing. A policy that fails is dropped, which is said once, and the others go on: having missed a step it would
no longer decide what it would have decided in force, and a number that looks like that would be worse than none.

What a policy would have done to the elements of the gradients is measured at the same place in each step, whatever has
been dropped, because ranks that measure together must all be there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gradiometer.clipping import cut_squares, weigh
from gradiometer.norms import Meter
from gradiometer.policy.base import Change, Decision, Observation, Policy, State
from gradiometer.policy.pipeline import Shadow
from gradiometer.rounds import Watched

__all__ = ["Shadows", "Verdict"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What one policy would have done in a step; tensors are on the gradients' device."""

    name: str
    threshold: float | Tensor
    strength: Tensor
    """The smallest factor it would have applied, 0-dim; 0 for a step that it would have skipped, or for zeros."""


class Shadows:
    """The policies in shadow of one agent, and what they remember.

    ``notices`` takes the kind and message of what should be told the user.
    """

    def __init__(self, meter: Meter, notices: list[tuple[str, str]]) -> None:
        self._meter, self._notices = meter, notices
        self._guard: AbstractContextManager[bool | None] = nullcontext()
        self.weighed = 0
        """How often the elements of a step's gradients were looked at, by all who measure together."""
        self.put(None, {})

    def put(self, shadow: Shadow | None, states: Mapping[str, State]) -> None:
        """Let these policies watch from now on; ``states`` holds what they remember, by name, and may hold more."""
        self.shadow = shadow
        self._stages: tuple[Policy, ...] = () if shadow is None else shadow.stages
        self.states = {stage.name: states[stage.name] for stage in self._stages}
        changes = {stage.name: getattr(stage, "change", None) for stage in self._stages}
        self._changes: dict[str, Change] = {name: change for name, change in changes.items() if change is not None}

    def listen(self, guard: AbstractContextManager[bool | None]) -> None:
        """Let failures stop at ``guard`` from now on."""
        self._guard = guard

    def weigh(self, watched: Watched, scale: Tensor | None) -> dict[str, Tensor] | None:
        """Return the strength, 0-dim, of each policy that would change elements, by name; None if not known.

        The gradients of ``watched`` [P] are as yet unchanged and carry the loss ``scale``, if there is one.
        """
        if not self._changes:
            return None
        norms = self._cut_norms(watched)
        told = weighed = None
        with self._guard:
            told = torch.stack(
                [-weigh(change, watched, self._meter, norms.get(name), scale) for name, change in self._changes.items()]
            )
        with self._guard:
            weighed = self._gather(self._nothing() if told is None else told)
        return None if told is None or weighed is None else dict(zip(self._changes, (-weighed).unbind(), strict=True))

    def abstain(self) -> None:
        """Take part in what the others weigh in a step that this rank could not measure."""
        if self._changes and self._meter.shared:
            self._cut_norms(None)
            with self._guard:
                self._gather(self._nothing())

    def look(self, observation: Observation, weighed: Mapping[str, Tensor] | None, step: int) -> tuple[Verdict, ...]:
        """Ask every policy about a step as it was measured, and remember what they want remembered."""
        if self.shadow is None:
            return ()
        verdicts = []
        for stage in self._stages:
            verdict = None
            with self._guard:
                decision, state = self.shadow.ask(stage, self.states, observation, step)
                verdict = Verdict(
                    name=stage.name, threshold=decision.threshold, strength=self._strength(stage, decision, weighed)
                )
                self.states[stage.name] = state
            if verdict is None:
                self._drop(stage, step)
            else:
                verdicts.append(verdict)
        return tuple(verdicts)

    def _cut_norms(self, watched: Watched | None) -> dict[str, Tensor]:
        """Return the squared norms [2, P] that changes need of parameters which are cut, by policy: an all-reduce each.

        ``watched`` is None where this rank has nothing to tell.
        """
        norms = {}
        for name, change in self._changes.items():
            if change.cut:
                device = self._meter.device
                squares = torch.zeros((2, len(change.chosen)), dtype=torch.float64, device=device)
                with self._guard:
                    squares = squares if watched is None else cut_squares(change, watched, device)
                with self._guard:
                    norms[name] = self._meter.add(squares)
        return norms

    def _nothing(self) -> Tensor:
        return torch.full((len(self._changes),), -1.0, device=self._meter.device)

    def _gather(self, told: Tensor) -> Tensor:
        self.weighed += 1
        return self._meter.maximum(told)

    def _strength(self, stage: Policy, decision: Decision, weighed: Mapping[str, Tensor] | None) -> Tensor:
        if decision.change is not None:
            if weighed is None:
                raise RuntimeError("the elements of the gradients could not be weighed")
            return weighed[stage.name]
        if decision.strength is not None:
            return decision.strength
        done = decision.skip if decision.zero is None else decision.zero.any()
        return torch.ones((), device=self._meter.device) if done is None else (~done).float()

    def _drop(self, stage: Policy, step: int) -> None:
        self._stages = tuple(each for each in self._stages if each is not stage)
        self.states.pop(stage.name, None)
        message = f"policy {stage.name} in shadow failed at step {step} and is dropped: it decides about no later step"
        logger.warning("gradiometer: %s", message)
        self._notices.append(("shadow_dropped", message))
