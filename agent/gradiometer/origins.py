"""In which layers gradients first went non-finite, step by step: how many steps began there, and which ones last.

A layer may have begun many steps long ago, as overflows of a GradScaler; where NaN got into the weights is often a
layer with a single step, of just now. So of many layers it is the newest that are told.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["Origins"]

Integers = npt.NDArray[np.int64]


class Origins:
    """Counts of ``layers`` layers, all 0 at first."""

    def __init__(self, layers: int) -> None:
        self.steps: Integers = np.zeros(layers, np.int64)
        """Steps whose first non-finite gradient, in the order of the backward pass, was one of the layer, int64[L]."""
        self._last: Integers = np.zeros(layers, np.int64)
        """Of each layer the place of the last such step among all of them, from 1, int64[L]; 0 without any."""

    def add(self, layers: Integers) -> None:
        """Count the layers in which steps began, int64[T], oldest first."""
        if len(layers):
            self.steps += np.bincount(layers, minlength=len(self.steps))
            np.maximum.at(self._last, layers, self._last.max() + 1 + np.arange(len(layers)))

    def newest(self, limit: int) -> list[int]:
        """Return the places of the layers in which a step began last, the newest first, at most ``limit``."""
        places = self.steps.nonzero()[0]
        first: list[int] = places[np.argsort(-self._last[places])[:limit]].tolist()
        return first

    @property
    def state(self) -> dict[str, int]:
        """What :meth:`resume` takes: steps by the place of the layer, the newest last."""
        return {str(place): int(self.steps[place]) for place in reversed(self.newest(len(self.steps)))}

    def resume(self, state: dict[str, int]) -> None:
        """Go on from another's :attr:`state`. Raises ValueError or IndexError if it is of other layers."""
        for last, (place, steps) in enumerate(state.items(), 1):
            self.steps[int(place)], self._last[int(place)] = steps, last
