"""Observe, decide and act around optimizer steps: which gradients belong to a step, and what is done to them.

Several optimizers that step one after another on the same gradients form a round: the first one's step observes and
decides for all. Where they turn out to have backward passes of their own, or a GradScaler has unscaled only some of
them, a common norm would be wrong, and from then on each optimizer is a round by itself; that is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from gradiometer.clipping import Clamped, Undo, amp_state, change_gradients, prepare_step, takes_grad_scale, unscale
from gradiometer.hooks import current_scaler
from gradiometer.layers import Parameters
from gradiometer.norms import Meter
from gradiometer.policy.base import Observation
from gradiometer.policy.pipeline import Outcome, Pipeline, observe
from gradiometer.policy.spec import NonFiniteSpec, PolicySpec
from gradiometer.transfer import bring

__all__ = ["NonFiniteGradientError", "Stepper", "Taken"]

logger = logging.getLogger(__name__)
Watched = list[nn.Parameter | None]


class NonFiniteGradientError(RuntimeError):
    """The policy's ``nonfinite`` stage was told to stop the job; the message says what became of the bad steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """One step as it was observed and decided; tensors are on the gradients' device."""

    step: int
    optimizer: int
    outcome: Outcome
    clamped: Clamped | None = None
    skip: Tensor | None = None
    """Whether the optimizer will not move, with a GradScaler's own verdict in it."""
    consecutive: Tensor | None = None
    loss_scale: Tensor | None = None
    learning_rate: float | Tensor
    by_scaler: bool = False

    @property
    def after(self) -> Observation | None:
        """Norms of what the optimizer is given; None as in :class:`~gradiometer.policy.pipeline.Outcome`."""
        return self.outcome.after if self.clamped is None else self.clamped.after


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
class _Round:
    outcome: Outcome
    scaled: bool
    unscaled: bool
    stepped: set[int] = field(default_factory=set)
    fingerprints: list[_Fingerprint] = field(default_factory=list)


class Stepper:
    """The step path of one agent; ``step`` is the number of the next step."""

    def __init__(
        self,
        parameters: Parameters,
        optimizers: Sequence[Optimizer],
        pipeline: Pipeline | None,
        spec: PolicySpec | None,
        device: torch.device,
        *,
        together: bool,
    ) -> None:
        self.pipeline, self.step = pipeline, 0
        self.notices: list[tuple[str, str]] = []
        """Kind and message of what should be told the user, to be taken by whoever records."""
        self._parameters, self._optimizers, self._together = parameters, list(optimizers), together
        self._meter = Meter(device)
        self._states = pipeline.init() if pipeline else {}
        self._limit, self._guardian, self._excuse = _raise_limit(spec)
        self._round: _Round | None = None
        self._active: int | None = None
        self._acted_on: _Fingerprint | None = None
        self._undo: dict[int, Undo] = {}
        self._held: list[list[nn.Parameter]] = []
        """What each optimizer held when it was last looked through."""
        self._watched: list[Watched] = []
        self._watch()

    def before_update(self, optimizer: Optimizer) -> Taken | None:
        """Observe, decide and act for a step that is about to be taken.

        Returns what the step was, or None if it is part of a step returned already. Raises RuntimeError if the
        optimizer has been given parameters that were not there at attach.
        """
        index = self._index(optimizer)
        self.restore(optimizer)
        held = _held(optimizer)
        if len(held) != len(self._held[index]) or not all(map(is_, held, self._held[index])):
            self._watch()
        with torch.no_grad():
            again, self._active = self._active == index, index
            taken = None
            if not again and self._joins(index):
                self._prepare(index)
            else:
                taken = self._take(index, again=again)
            self._acted_on = _Fingerprint(self._watched[index])
            return taken

    def within(self, optimizer: Optimizer) -> bool:
        """Tell whether the optimizer is in a step on the gradients it has now: the step calls its parent's."""
        index = self._index(optimizer)
        return self._active == index and self._acted_on is not None and self._acted_on.matches(self._watched[index])

    def observe_skipped(self, optimizer: Optimizer) -> Taken | None:
        """Observe a step that a GradScaler has decided not to take: policies take note of it, and are not asked."""
        index = self._index(optimizer)
        with torch.no_grad():
            observation = observe(self._meter(_gradients(self._watched[index])))
            if self.pipeline is not None:
                _, self._states = self.pipeline.decide(self._states, observation, self.step)
        self._round = None
        return self._taken(index, Outcome(before=observation), by_scaler=True)

    def restore(self, optimizer: Optimizer) -> None:
        """Put back what acting changed on the optimizer; idempotent."""
        undo = self._undo.pop(id(optimizer), None)
        if undo is not None:
            undo(optimizer)

    def finished(self) -> None:
        """Note that the step in progress is over, or failed; nothing is kept that refers to a gradient."""
        self._active = self._acted_on = None
        if self._round is not None and len(self._round.stepped) == len(self._optimizers):
            self._round = None

    def restore_all(self) -> None:
        """Put back what acting changed, on every optimizer."""
        for optimizer in self._optimizers:
            self.restore(optimizer)

    def check(self, scalars: Mapping[str, float]) -> None:
        """Raise NonFiniteGradientError if the newest row that reached the host says that the policy wants it."""
        consecutive = scalars.get("consecutive", 0.0)
        if self._limit is not None and consecutive >= self._limit:
            raise NonFiniteGradientError(
                f"gradients were NaN or Inf in {consecutive:g} step(s) in a row, up to step {scalars['step']:g}; "
                f"policy {self._guardian!r} allows {self._limit - 1}. {self._excuse}"
            )

    def state_dict(self) -> dict[str, Any]:
        policy = {name: {key: t.detach().cpu().clone() for key, t in s.items()} for name, s in self._states.items()}
        return {"version": 1, "step": self.step, "policy": policy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore; raises ValueError, having changed nothing, if the state is of another policy."""
        if state.get("version") != 1:
            raise ValueError(f"agent state has version {state.get('version')!r}, expected 1")
        expected = {name: set(tensors) for name, tensors in self._states.items()}
        found = {name: set(tensors) for name, tensors in state["policy"].items()}
        if found != expected:
            raise ValueError(
                f"agent state is of a policy with {found}, this agent has {expected}: load it before changing"
            )
        self._states = {
            name: {key: tensor.to(self._states[name][key]) for key, tensor in tensors.items()}
            for name, tensors in state["policy"].items()
        }
        self.step = int(state["step"])

    def _index(self, optimizer: Optimizer) -> int:
        return next(index for index, each in enumerate(self._optimizers) if each is optimizer)

    def _watch(self) -> None:
        """Find for each optimizer which of the P parameters it holds now."""
        places = self._parameters.index
        watched = []
        for optimizer in self._optimizers:
            mine: Watched = [None] * len(self._parameters)
            for tensor in _held(optimizer):
                if id(tensor) not in places:
                    raise RuntimeError(
                        f"{type(optimizer).__name__} was given a parameter of shape {tuple(tensor.shape)} that neither "
                        "it nor the model had at attach: detach() and attach again"
                    )
                mine[places[id(tensor)]] = tensor
            watched.append(mine)
        self._watched, self._held = watched, [_held(optimizer) for optimizer in self._optimizers]

    def _members(self, index: int) -> list[int]:
        """Return the optimizers of the round that ``index`` opens: those whose turn a GradScaler has not ended."""
        if not self._together:
            return [index]
        scaler = current_scaler()
        done = [_stage(scaler, each) is OptState.STEPPED for each in self._optimizers]
        return [place for place in range(len(done)) if place == index or not done[place]]

    def _joins(self, index: int) -> bool:
        """Tell whether this step belongs to the open round; notice optimizers that do not step together."""
        current = self._round
        if current is None or not self._together or index in current.stepped:
            return False
        if current.fingerprints[index].matches(self._watched[index]):
            return True
        self._part("their gradients changed between the steps")
        return False

    def _part(self, reason: str) -> None:
        self._together, self._round = False, None
        message = (
            f"the {len(self._optimizers)} optimizers do not step together ({reason}): from step {self.step} on, norms "
            "and clipping are each optimizer's own; pass together=False to say so from the start"
        )
        logger.warning("gradiometer: %s", message)
        self.notices.append(("optimizers_apart", message))

    def _take(self, index: int, *, again: bool) -> Taken | None:
        scale, found_inf = amp_state(self._optimizers[index])
        others = [self._optimizers[member] for member in self._members(index) if member != index]
        if not _scaled_alike(current_scaler(), scale, others):
            self._part("a GradScaler has unscaled only some of them: call scaler.unscale_() on each before stepping")
        watched = _union([self._watched[member] for member in self._members(index)])
        norms = self._meter(_gradients(watched))
        observation = observe(norms if scale is None else norms / bring(scale, norms.device))
        outcome, states = Outcome(before=observation), self._states
        if self.pipeline is not None:
            outcome, states = self.pipeline.decide(self._states, observation, self.step)
        clamped = self._act(index, watched, outcome, scale)
        if again:
            return None
        self._states = states
        skip = outcome.skip
        if found_inf is not None:
            stopped = bring(found_inf, norms.device) > 0
            skip = stopped if skip is None else skip | stopped
        return self._taken(index, outcome, clamped=clamped, skip=skip, scale=scale)

    def _act(self, index: int, watched: Watched, outcome: Outcome, scale: Tensor | None) -> Clamped | None:
        members = self._members(index)
        if self.pipeline is None and len(members) == 1:
            return None
        kernel = outcome.coefficient is not None and outcome.coefficient.dim() == 0 and outcome.clamp is None
        scaled = not (kernel and all(takes_grad_scale(self._optimizers[member]) for member in members))
        unscaled = False
        if outcome.clamp is not None and scale is not None:
            unscaled = True
            unscale(watched, scale)
        clamped = change_gradients(watched, outcome, self._meter, multiply=scaled)
        prints = [_Fingerprint(mine) for mine in self._watched] if len(self._watched) > 1 else []
        done = set(range(len(self._optimizers))).difference(members)
        self._round = _Round(outcome=outcome, scaled=scaled, unscaled=unscaled, stepped=done, fingerprints=prints)
        self._prepare(index)
        return clamped

    def _prepare(self, index: int) -> None:
        assert self._round is not None
        optimizer, current = self._optimizers[index], self._round
        current.stepped.add(index)
        if self.pipeline is not None:
            self._undo[id(optimizer)] = prepare_step(
                optimizer, current.outcome, scaled=current.scaled, unscaled=current.unscaled
            )

    def _taken(
        self,
        index: int,
        outcome: Outcome,
        *,
        clamped: Clamped | None = None,
        skip: Tensor | None = None,
        scale: Tensor | None = None,
        by_scaler: bool = False,
    ) -> Taken:
        scaler = current_scaler()
        scale = scale if scaler is None else scaler._get_scale_async()
        state = self._states.get(self._guardian, {})
        taken = Taken(
            step=self.step,
            optimizer=index,
            outcome=outcome,
            clamped=clamped,
            skip=skip,
            consecutive=state.get("consecutive"),
            loss_scale=scale,
            learning_rate=self._optimizers[index].param_groups[0]["lr"],
            by_scaler=by_scaler,
        )
        self.step += 1
        return taken


def _raise_limit(spec: PolicySpec | None) -> tuple[int | None, str, str]:
    """Return after how many non-finite steps in a row to raise, the stage that says so, and what became of them."""
    for stage in spec.pipeline if spec else ():
        if isinstance(stage, NonFiniteSpec):
            became = "They were taken with zeros" if stage.action == "zero" else "No parameter was moved by them"
            return (1 if stage.action == "raise" else stage.max_consecutive), stage.name, became
    return None, "", ""


def _held(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _gradients(watched: Watched) -> list[Tensor | None]:
    return [None if parameter is None else parameter.grad for parameter in watched]


def _union(watched: list[Watched]) -> Watched:
    if len(watched) == 1:
        return watched[0]
    return [next((parameter for parameter in row if parameter is not None), None) for row in zip(*watched, strict=True)]


def _first_gradient(watched: Watched) -> Tensor | None:
    return next((each.grad for each in watched if each is not None and each.grad is not None), None)


def _scaled_alike(scaler: GradScaler | None, scale: Tensor | None, others: list[Optimizer]) -> bool:
    """Tell whether the other optimizers' gradients carry the same loss scale as those about to be used."""
    if scaler is None:
        return True
    wanted = OptState.READY if scale is not None else OptState.UNSCALED
    return all(_stage(scaler, other) is wanted for other in others)


def _stage(scaler: GradScaler | None, optimizer: Optimizer) -> OptState:
    """Tell how far a GradScaler is with an optimizer since its last update."""
    state = {} if scaler is None else scaler._per_optimizer_states.get(id(optimizer), {})
    stage: OptState = state.get("stage", OptState.READY)
    return stage
