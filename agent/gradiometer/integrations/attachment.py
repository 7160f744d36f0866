"""What the callbacks of every framework share: one agent for the length of a training, and its state between two.

A framework calls :meth:`Attachment.start` when model and optimizers are ready and :meth:`Attachment.stop` when the
training is over, however it ends. In between, and after, :meth:`Attachment.state` is what belongs in a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradiometer.policy.kinds import NonFiniteSpec
from gradiometer.policy.spec import PolicySource, load_policy
from gradiometer.session import Agent, attach

__all__ = ["Attachment"]

logger = logging.getLogger(__name__)


class Attachment:
    """The agent of one callback. ``options`` are those of :func:`gradiometer.attach`.

    The policy is read at once: raises PolicyError if it is wrong, before any training begins.
    """

    def __init__(self, policy: PolicySource | None, **options: Any) -> None:
        self.spec = None if policy is None else load_policy(policy)
        self.options = options
        self.agent: Agent | None = None
        self.path: Path | None = None
        """Directory of the latest run, also when it is over."""
        self._kept: Mapping[str, Any] = {}

    @property
    def clips(self) -> bool:
        """Whether the policy changes finite gradients, so that a second clipper would be at work beside it."""
        return self.spec is not None and any(not isinstance(stage, NonFiniteSpec) for stage in self.spec.pipeline)

    def start(self, model: nn.Module, optimizers: Sequence[Optimizer], *, step: int) -> Agent:
        """Attach; ``step`` is how many optimizer steps the training has behind it: 0 begins a new one.

        Raises what :func:`gradiometer.attach` raises.
        """
        self.stop()
        kept, self._kept = self._kept, {}
        self.agent = agent = attach(model, optimizers, policy=self.spec, **self.options)
        self.path = agent.path
        if step > 0:
            _go_on(agent, kept, step)
        return agent

    def stop(self) -> None:
        """Detach, and keep the state for a checkpoint that is written later. Idempotent."""
        agent, self.agent = self.agent, None
        if agent is None:
            return
        try:
            self._kept = agent.state_dict()
        finally:
            agent.detach()

    @property
    def state(self) -> Mapping[str, Any]:
        """The agent's state, or what is left of the last one's; empty if there has been none."""
        return self._kept if self.agent is None else self.agent.state_dict()

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self._kept = state


def _go_on(agent: Agent, kept: Mapping[str, Any], step: int) -> None:
    """Let step numbers and policies go on from a checkpoint, as far as it tells of them."""
    nothing = {**agent.state_dict(), "states": {}}
    if not kept:
        agent.load_state_dict({**nothing, "step": step})
        return
    try:
        agent.load_state_dict(kept)
    except ValueError as error:  # on all ranks alike, which have compared notes
        logger.warning("gradiometer: what the checkpoint holds of policies cannot be used: %s", error)
        agent.load_state_dict({**nothing, "step": kept.get("step", step)})
