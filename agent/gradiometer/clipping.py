"""Carry out what a policy decided: scale, zero, clamp, or keep the optimizer from moving.

On a fused optimizer the coefficient goes in as ``grad_scale`` and the skip as ``found_inf``: no pass over the
gradients, no host read. Elsewhere gradients are multiplied in place; whether that can be left out is only asked where
the host can know it for nothing. A true skip without a fused optimizer is a decision of the host, and so the one place
where the step path waits for the device: the gradients are withheld for the length of the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradiometer import transfer
from gradiometer.norms import Meter, total_norm
from gradiometer.policy.base import Observation
from gradiometer.policy.pipeline import Clamp, Outcome
from gradiometer.shards import gradients_of, local_part, settle

__all__ = ["Clamped", "Undo", "amp_state", "change_gradients", "prepare_step", "takes_grad_scale", "unscale"]

_MISSING = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Clamped:
    """What a clamp did: the norms measured again after it, and how strong it was (1 when it changed nothing)."""

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
) -> Clamped | None:
    """Zero, multiply and clamp the gradients in place; ``parameters`` [P] holds None where one is not ours.

    ``multiply`` leaves the coefficient to a fused optimizer when False. Gradients must not carry a loss scale if the
    outcome has a clamp. Returns what the clamp did, if there was one.
    """
    factor = outcome.coefficient if multiply and not _known_as_one(outcome.coefficient) else None
    if factor is None and outcome.zero is None and outcome.clamp is None:
        return None
    if outcome.clamp is not None:
        settle(parameters)
    held = _holding(parameters)
    if outcome.zero is not None:
        _zero(held, outcome.zero)
    if factor is not None:
        _multiply(held, factor)
    if outcome.clamp is None:
        return None
    return _clamp(held, parameters, outcome, outcome.clamp, meter)


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


def _clamp(
    held: Held, parameters: Sequence[nn.Parameter | None], outcome: Outcome, clamp: Clamp, meter: Meter
) -> Clamped:
    values = []
    for index, gradient in held:
        if clamp.chosen[index]:
            parameter = parameters[index]
            if gradient.layout is torch.sparse_coo and parameter is not None:
                parameter.grad = gradient = gradient.coalesce()  # duplicates add up before they are bounded
            values.append(_strided(gradient))
    assert outcome.after is not None  # a pipeline with a clamp works it out
    before = outcome.after.total
    largest = meter.maximum(_largest(values, before.device))
    if transfer.reads_are_free(before.device) and largest.item() <= clamp.max_abs:  # NaN compares false
        return Clamped(after=outcome.after, strength=torch.ones_like(before))
    exceeded = largest > clamp.max_abs
    if values:
        torch._foreach_clamp_min_(values, -clamp.max_abs)
        torch._foreach_clamp_max_(values, clamp.max_abs)
    norms = meter(gradients_of(parameters))
    total = total_norm(norms)
    ratio = (total / before).nan_to_num(nan=0.0).clamp(max=1 - 1e-7)
    return Clamped(
        after=Observation(norms=norms, total=total), strength=torch.where(exceeded, ratio, torch.ones_like(ratio))
    )


def _largest(values: list[Tensor], device: torch.device) -> Tensor:
    """Return the largest magnitude of any element, 0-dim. Infinity norms are slow on the CPU, extrema are not."""
    values = [value for value in values if value.numel()]
    if not values:
        return torch.zeros((), device=device)
    if values[0].device.type == "cpu":
        extrema = [extremum.abs() for value in values for extremum in torch.aminmax(value)]
    else:
        extrema = list(torch._foreach_norm(values, float("inf")))
    return torch.stack([transfer.bring(extremum, device).float() for extremum in extrema]).max()
