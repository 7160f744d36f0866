"""Undo on the host, in numbers, what the loop's own clipping did to a step's norms: NumPy only, no tensor.

The norms that a row brings are of the gradients as the user left them. Clipping by norm divides out again; clipping by
value was measured before it happened; what a non-finite total has spread to every gradient is told by the norms that
torch had before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gradiometer.records import CLIP_GRAD_NORM, CLIP_GRAD_VALUE, OWN_CLIPPING

__all__ = ["ClipCall", "Undone", "undo"]

Norms = npt.NDArray[np.float32]
Places = npt.NDArray[np.intp]
UNCHANGED = 1 - 1e-6
"""A clamp that leaves more than this of the norm is within the rounding of norms, and taken to have done nothing."""
SCALED = 1e-3
"""A threshold below this fraction of the loss scale cannot have been meant for gradients that carry it."""


@dataclass(kw_only=True, slots=True)
class ClipCall:
    """What the host knows of one call; ``total`` and ``coefficient`` travel as scalars ``own<number>.…``."""

    function: str
    limit: float
    places: Places
    """The parameters that were clipped."""
    measured: Places | None = None
    """The parameter of each norm before the call that travels with the row, -1 for one that is not watched."""
    scaled: bool = False
    """Whether the gradients carried the loss scale."""
    again: bool = False
    """Whether the same gradients had been clipped by norm before, and not changed since."""


@dataclass(kw_only=True, slots=True)
class Undone:
    """What there was before the calls, and what they did."""

    norms: Norms
    total: float
    nonfinite: bool = False
    """Whether a total norm was NaN or Inf."""
    columns: dict[int, tuple[float, float]] = field(default_factory=dict)
    """For the slot of each function that was called: the smallest threshold, and the smallest factor."""
    misuses: dict[str, str] = field(default_factory=dict)
    """What was wrong, and how to say so."""


def undo(calls: Sequence[ClipCall], seen: Norms, scalars: Mapping[str, float], travelled: Norms) -> Undone:
    """Work out the norms before ``calls``, oldest first, from those ``seen`` after them, [P].

    ``scalars`` are the row's; ``travelled`` ends with the norms of all calls' ``measured``, one after another.
    """
    norms, nonfinite, strengths = seen.astype(np.float64), False, []
    absent = (seen == 0) & np.signbit(seen)  # of an optimizer whose step is another row
    scale = scalars.get("loss_scale", math.nan)
    for number in range(len(calls) - 1, -1, -1):
        call = calls[number]
        count = 0 if call.measured is None else len(call.measured)
        before, travelled = travelled[len(travelled) - count :], travelled[: len(travelled) - count]
        if call.scaled:
            before = before / np.float32(scale)
        if call.function == CLIP_GRAD_VALUE:
            strengths.append(_unclamp(norms, call, before, absent))
        else:
            strengths.append(_unscale(norms, call, before, _coefficient(call, scalars, number)))
            nonfinite |= math.isnan(strengths[-1])
    norms[absent] = -0.0
    changed = any(strength != 1.0 for strength in strengths)
    undone = Undone(
        norms=norms.astype(np.float32),
        total=math.sqrt(float(np.square(norms).sum())) if changed else scalars["total"],
        nonfinite=nonfinite,
    )
    for call, strength in zip(calls, reversed(strengths), strict=True):
        slot = OWN_CLIPPING[call.function]
        limit, least = undone.columns.get(slot, (math.inf, math.nan))
        undone.columns[slot] = min(limit, call.limit), _least(least, strength)
    undone.misuses = _misuses(calls, scalars)
    return undone


def _least(first: float, second: float) -> float:
    """Return the smaller of two numbers, either of which may be NaN for unknown."""
    return second if math.isnan(first) or second < first else first


def _coefficient(call: ClipCall, scalars: Mapping[str, float], number: int) -> float:
    """Return the factor as torch works it out; NaN where the total norm was not finite."""
    total = scalars[f"own{number}.total"]
    if not math.isfinite(total):
        return math.nan
    return scalars.get(f"own{number}.coefficient", min(1.0, call.limit / (total + 1e-6)))


def _unscale(norms: npt.NDArray[np.float64], call: ClipCall, before: Norms, coefficient: float) -> float:
    if math.isnan(coefficient):
        if call.measured is not None:
            known = call.measured >= 0
            norms[call.measured[known]] = before[known]
    elif coefficient > 0:  # by zero, nothing is left to tell what was there
        norms[slice(None) if len(call.places) == len(norms) else call.places] /= coefficient
    return coefficient


def _unclamp(norms: npt.NDArray[np.float64], call: ClipCall, before: Norms, absent: npt.NDArray[np.bool_]) -> float:
    if call.measured is None:
        return math.nan
    after = math.sqrt(float(np.square(norms[call.places]).sum()))
    norms[call.places] = np.where(absent[call.places], -0.0, before)
    whole = math.sqrt(float(np.square(norms[call.places]).sum()))
    strength = after / whole if whole > 0 else 1.0
    return 1.0 if strength > UNCHANGED else strength


def _misuses(calls: Sequence[ClipCall], scalars: Mapping[str, float]) -> dict[str, str]:
    found = {}
    firsts: dict[int, tuple[float, float]] = {}
    for number, call in enumerate(calls):
        if call.scaled and call.limit <= SCALED * scalars.get("loss_scale", 0.0):
            found["before_unscale"] = (
                f"{call.function} at {call.limit:g} was called on gradients that still carried the loss scale: call "
                "scaler.unscale_(optimizer) before it"
            )
        if call.function != CLIP_GRAD_NORM:
            continue
        total, limit = scalars[f"own{number}.total"], call.limit
        if not call.again or id(call.places) not in firsts:
            firsts[id(call.places)] = limit, total
            continue
        first, first_total = firsts[id(call.places)]
        # Both would have clipped: a call with a limit out of reach only measures, or takes a precaution.
        if first_total > max(first, limit):
            found["twice"] = (
                f"{call.function} was called twice in one step on the same gradients, at {first:g} and at {limit:g}: "
                "one call is enough"
            )
    return found
