"""Policies in shadow at work: each decides about every step as it was measured, is recorded, and never acts.

Raises nothing. A policy that fails is dropped, which is said once, and the others go on: having missed a step it would
no longer decide what it would have decided in force, and a number that looks like that would be worse than none.

What a policy would have done to the elements of the gradients is measured at the same place in each step, whatever has
been dropped, because ranks that measure together must all be there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from gradiometer.clipping import _largest
from gradiometer.norms import Meter, _values
from gradiometer.policy.base import Decision, Observation, Policy, State
from gradiometer.policy.pipeline import Shadow
from gradiometer.policy.value import Value
from gradiometer.transfer import bring

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
        self._weighing = tuple(stage for stage in self._stages if isinstance(stage, Value))

    def listen(self, guard: AbstractContextManager[bool | None]) -> None:
        """Let failures stop at ``guard`` from now on."""
        self._guard = guard

    def weigh(self, gradients: Sequence[Tensor | None], scale: Tensor | None) -> Tensor | None:
        """Return the largest magnitude [K] that each policy which bounds elements covers; None if not known.

        ``gradients`` [P] are as yet unchanged and carry the loss ``scale``, if there is one.
        """
        if not self._weighing:
            return None
        largest = weighed = None
        with self._guard:
            largest = self._largest(gradients, scale)
        with self._guard:
            weighed = self._gather(self._nothing() if largest is None else largest)
        return None if largest is None else weighed

    def abstain(self) -> None:
        """Take part in what the others weigh in a step that this rank could not measure."""
        if self._weighing and self._meter.shared:
            with self._guard:
                self._gather(self._nothing())

    def look(self, observation: Observation, largest: Tensor | None, step: int) -> tuple[Verdict, ...]:
        """Ask every policy about a step as it was measured, and remember what they want remembered."""
        if self.shadow is None:
            return ()
        verdicts = []
        for stage in self._stages:
            verdict = None
            with self._guard:
                decision, state = self.shadow.ask(stage, self.states, observation, step)
                verdict = Verdict(
                    name=stage.name, threshold=decision.threshold, strength=self._strength(stage, decision, largest)
                )
                self.states[stage.name] = state
            if verdict is None:
                self._drop(stage, step)
            else:
                verdicts.append(verdict)
        return tuple(verdicts)

    def _largest(self, gradients: Sequence[Tensor | None], scale: Tensor | None) -> Tensor:
        device, largest = self._meter.device, []
        for stage in self._weighing:
            chosen = [g for g, mine in zip(gradients, stage.chosen, strict=True) if mine and g is not None]
            largest.append(_largest([_values(gradient) for gradient in chosen], device))
        weighed = torch.stack(largest)
        return weighed if scale is None else weighed / bring(scale, device)

    def _nothing(self) -> Tensor:
        return torch.zeros(len(self._weighing), device=self._meter.device)

    def _gather(self, largest: Tensor) -> Tensor:
        self.weighed += 1
        return self._meter.maximum(largest)

    def _strength(self, stage: Policy, decision: Decision, largest: Tensor | None) -> Tensor:
        if isinstance(stage, Value):
            if largest is None:
                raise RuntimeError("the elements of the gradients could not be weighed")
            bounded = (stage.max_abs / largest[self._weighing.index(stage)]).clamp(max=1.0)
            return bounded.nan_to_num(nan=1.0)  # a clamp leaves NaN as it is
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
