"""Carry out what a policy decided: scale, zero, change elements, or keep the optimizer from moving.

On a fused optimizer the coefficient goes in as ``grad_scale`` and the skip as ``found_inf``: no pass over the
gradients, no host read. Elsewhere gradients are multiplied in place; whether that can be left out is only asked where
the host can know it for nothing. A true skip without a fused optimizer is a decision of the host, and so the one place
where the step path waits for the device: the gradients are withheld for the length of the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradiometer import transfer
from gradiometer.norms import Meter, tensor_norm, total_norm
from gradiometer.policy.base import Change, Observation, Piece
from gradiometer.policy.pipeline import Outcome
from gradiometer.shards import gradients_of, local_part, settle

__all__ = [
    "Changed",
    "Undo",
    "amp_state",
    "change_gradients",
    "prepare_step",
    "takes_grad_scale",
    "unscale",
    "weigh",
]

_MISSING = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Changed:
    """What a change of elements did: the norms measured again after it, and the smallest factor (1 for nothing)."""

    after: Observation
    strength: Tensor


@dataclass(kw_only=True, slots=True)
class Undo:
    """What to put back on one optimizer after its step."""

    attributes: dict[str, Any] = field(default_factory=dict)
    withheld: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)
    fresh_momentum: list[nn.Parameter] = field(default_factory=list)

    def __call__(self, optimizer: Optimizer) -> None:
        """Restore the attributes and gradients that were there before; idempotent."""
        self._clean_momentum(optimizer)
        for name, value in self.attributes.items():
            if value is _MISSING:
                optimizer.__dict__.pop(name, None)
            else:
                setattr(optimizer, name, value)
        for parameter, gradient in self.withheld:
            if parameter.grad is None:
                parameter.grad = gradient
        self.attributes, self.withheld, self.fresh_momentum = {}, [], []

    def _clean_momentum(self, optimizer: Optimizer) -> None:
        """Zero the buffers that fused SGD allocates, and never writes, when the very first step is skipped."""
        if not self.fresh_momentum:
            return
        found_inf = getattr(optimizer, "found_inf", None)
        for parameter in self.fresh_momentum:
            buffer = optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None and found_inf is not None:
                buffer = local_part(buffer)
                skipped = transfer.bring(found_inf, buffer.device) > 0
                buffer.copy_(torch.where(skipped, torch.zeros_like(buffer), buffer))


def takes_grad_scale(optimizer: Optimizer) -> bool:
    """Tell whether every group of the optimizer now runs a fused kernel that reads ``grad_scale`` and ``found_inf``.

    Asked anew at each step: loading a checkpoint can turn a fused optimizer into another.
    """
    supported = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
    return supported and all(group.get("fused") for group in optimizer.param_groups)


def amp_state(optimizer: Optimizer) -> tuple[Tensor | None, Tensor | None]:
    """Return the loss scale that the gradients still carry, and ``found_inf``, as a GradScaler left them; or None."""
    if not takes_grad_scale(optimizer):
        return None, None
    return getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)


def unscale(parameters: Sequence[nn.Parameter | None], scale: Tensor) -> None:
    """Divide the gradients of ``parameters`` in place by the loss scale they carry."""
    _multiply(_holding(parameters), scale.reciprocal())


def prepare_step(optimizer: Optimizer, outcome: Outcome, *, scaled: bool, unscaled: bool) -> Undo:
    """Arrange for one optimizer's step to use the outcome; call the result when the step is over.

    ``scaled``: the coefficient has been multiplied into the gradients already; ``unscaled``: the loss scale has been
    divided out of them.
    """
    undo = Undo()
    if takes_grad_scale(optimizer):
        _set_fused(optimizer, outcome, undo, scaled=scaled, unscaled=unscaled)
    elif outcome.skip is not None and bool(outcome.skip):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        undo.withheld = [(p, p.grad) for p in parameters if p.grad is not None]
        for parameter, _ in undo.withheld:
            parameter.grad = None
    return undo


def _set_fused(optimizer: Optimizer, outcome: Outcome, undo: Undo, *, scaled: bool, unscaled: bool) -> None:
    scale, found_inf = amp_state(optimizer)
    if unscaled and scale is not None:
        scale = torch.ones_like(scale)
        _set(optimizer, "grad_scale", scale, undo)
    if outcome.coefficient is not None and not scaled:
        inverse = outcome.coefficient.reciprocal()
        _set(optimizer, "grad_scale", (inverse if scale is None else scale * inverse).float(), undo)
    if outcome.skip is not None:
        skip = (
            outcome.skip if found_inf is None else outcome.skip | (transfer.bring(found_inf, outcome.skip.device) > 0)
        )
        undo.fresh_momentum = _without_momentum(optimizer)
        _set(optimizer, "found_inf", skip.float(), undo)


def _set(optimizer: Optimizer, name: str, value: Tensor, undo: Undo) -> None:
    undo.attributes.setdefault(name, optimizer.__dict__.get(name, _MISSING))
    setattr(optimizer, name, value)


def _without_momentum(optimizer: Optimizer) -> list[nn.Parameter]:
    if not isinstance(optimizer, torch.optim.SGD):
        return []
    return [
        parameter
        for group in optimizer.param_groups
        if group["momentum"]
        for parameter in group["params"]
        if parameter.grad is not None and optimizer.state.get(parameter, {}).get("momentum_buffer") is None
    ]


def change_gradients(
    parameters: Sequence[nn.Parameter | None], outcome: Outcome, meter: Meter, *, multiply: bool
) -> Changed | None:
    """Zero, multiply and change the gradients in place; ``parameters`` [P] holds None where one is not ours.

    ``multiply`` leaves the coefficient to a fused optimizer when False. Gradients must not carry a loss scale if the
    outcome has a change of elements. Returns what that did, if there was one.
    """
    factor = outcome.coefficient if multiply and not _known_as_one(outcome.coefficient) else None
    if factor is None and outcome.zero is None and outcome.change is None:
        return None
    if outcome.change is not None:
        settle(parameters)
    held = _holding(parameters)
    if outcome.zero is not None:
        _zero(held, outcome.zero)
    if factor is not None:
        _multiply(held, factor)
    return None if outcome.change is None else _carry_out(outcome.change, outcome, parameters, meter)


def weigh(
    change: Change, parameters: Sequence[nn.Parameter | None], meter: Meter, norms: Tensor | None, scale: Tensor | None
) -> Tensor:
    """Return the smallest factor that a change of elements would apply to what is here, float32 0-dim.

    It changes nothing, and is no collective. ``norms`` is what :meth:`Meter.add` made of :func:`cut_squares`, for a
    change that is ``cut``; ``scale`` is a loss scale that the gradients carry.
    """
    return change.weigh(_pieces(change, parameters, norms), meter.device, scale).strength


def cut_squares(change: Change, parameters: Sequence[nn.Parameter | None], device: torch.device) -> Tensor:
    """Return the squared norms of what is here of weights and gradients that are cut, float64 [2, P], 0 elsewhere."""
    squares = torch.zeros((2, len(parameters)), dtype=torch.float64, device=device)
    for index in change.cut:
        parameter = parameters[index]
        if parameter is not None and parameter.grad is not None:
            piece = _piece(parameter)
            for side, values in enumerate((piece.weight, piece.gradient)):
                squares[side, index].copy_(tensor_norm(values, torch.float64).square(), non_blocking=True)
    return squares


Held = list[tuple[int, Tensor]]
"""Places and gradients; of a sharded one the part that is here, in its own memory."""


def _holding(parameters: Sequence[nn.Parameter | None]) -> Held:
    return [(i, local_part(p.grad)) for i, p in enumerate(parameters) if p is not None and p.grad is not None]


def _zero(held: Held, zero: Tensor) -> None:
    if transfer.reads_are_free(zero.device):
        flags = zero.tolist()
        for index, gradient in held:
            if flags[index]:
                gradient.zero_()
        return
    for index, gradient in held:
        _strided(gradient).masked_fill_(transfer.bring(zero[index], gradient.device), 0.0)


def _strided(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout is torch.strided else gradient._values()


def _known_as_one(coefficient: Tensor | None) -> bool:
    """Tell whether multiplying would change nothing, where the host can know that for nothing."""
    if coefficient is None or not transfer.reads_are_free(coefficient.device):
        return False
    return coefficient.min().item() == 1.0


def _multiply(held: Held, coefficient: Tensor) -> None:
    by_device: defaultdict[torch.device, Held] = defaultdict(list)
    for index, gradient in held:
        by_device[gradient.device].append((index, gradient))
    for device, local in by_device.items():
        gradients = [_strided(gradient) for _, gradient in local]
        if coefficient.dim() == 0:
            torch._foreach_mul_(gradients, transfer.bring(coefficient, device))
        else:
            factors = transfer.bring(coefficient, device).unbind()
            torch._foreach_mul_(gradients, [factors[index] for index, _ in local])


def _carry_out(change: Change, outcome: Outcome, parameters: Sequence[nn.Parameter | None], meter: Meter) -> Changed:
    assert outcome.after is not None  # a pipeline with a change of elements works it out
    for parameter in parameters:
        if parameter is not None and parameter.grad is not None and parameter.grad.layout is torch.sparse_coo:
            parameter.grad = parameter.grad.coalesce()  # duplicates add up before they are bounded
    norms = meter.add(cut_squares(change, parameters, meter.device)) if change.cut else None
    weighed = change.weigh(_pieces(change, parameters, norms), meter.device)
    told = meter.maximum(torch.stack([-weighed.strength, weighed.active.to(weighed.strength.dtype)]))
    if transfer.reads_are_free(told.device) and not told[1].item():
        return Changed(after=outcome.after, strength=-told[0])
    weighed.make()
    after = meter(gradients_of(parameters))
    return Changed(after=Observation(norms=after, total=total_norm(after)), strength=-told[0])


def _pieces(change: Change, parameters: Sequence[nn.Parameter | None], squares: Tensor | None) -> list[Piece]:
    """Return what is here of the gradients that a change is for, with the weights that they are of.

    ``squares`` [2, P] are the squared norms of the weights and gradients that are cut, as wholes.
    """
    pieces: dict[int, Piece] = {}
    for index, parameter in enumerate(parameters):
        if parameter is not None and parameter.grad is not None and change.chosen[index]:
            pieces[index] = _piece(parameter)
    for index in change.cut if squares is not None else ():
        if index in pieces and squares is not None:
            dtype = torch.promote_types(pieces[index].gradient.dtype, torch.float32)
            pieces[index] = replace(pieces[index], norms=squares[:, index].sqrt().to(dtype))
    return list(pieces.values())


def _piece(parameter: nn.Parameter) -> Piece:
    assert parameter.grad is not None
    whole = parameter.grad
    if whole.layout is torch.sparse_coo and not whole.is_coalesced():
        whole = whole.coalesce()
    gradient, weight = local_part(whole), local_part(parameter)
    if gradient.layout is torch.strided:
        return Piece(gradient=gradient, weight=weight)
    if gradient.layout is torch.sparse_coo and gradient.sparse_dim() == 1:
        weight = weight.index_select(0, gradient._indices()[0])
    return Piece(gradient=gradient._values(), weight=weight)
