"""The last values of one or several series, on the device: a ring whose filling no host knows."""

from __future__ import annotations

import torch
from torch import Tensor

from gradiometer.policy.base import State

__all__ = ["MAX_VALUES", "Window"]

MAX_VALUES = 2**24
"""Values that the windows of one policy may hold together: 128 MiB in float64."""


class Window:
    """A ring of ``size`` values for each of the series that ``shape`` counts. Every method is pure.

    State: ``window`` [*shape, size] of ``dtype``, Inf where nothing has been put yet; ``count`` int64 [*shape], how
    many values have ever been put in.
    """

    def __init__(self, size: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.shape, self.dtype, self.device = size, shape, dtype, device
        self._places = torch.arange(size, device=device)

    def init(self) -> State:
        return {
            "window": torch.full((*self.shape, self.size), torch.inf, dtype=self.dtype, device=self.device),
            "count": torch.zeros(self.shape, dtype=torch.int64, device=self.device),
        }

    def put(self, state: State, values: Tensor, learned: Tensor | None = None) -> State:
        """Put ``values`` in place of the oldest, all of them or where ``learned`` says so."""
        window, count = state["window"], state["count"]
        place = (count % self.size).unsqueeze(-1)
        new = values.unsqueeze(-1)
        if learned is None:
            return {"window": window.scatter(-1, place, new), "count": count + 1}
        new = torch.where(learned.unsqueeze(-1), new, window.gather(-1, place))
        return {"window": window.scatter(-1, place, new), "count": count + learned}

    def filled(self, state: State) -> Tensor:
        """Return how many values there are, int64 [*shape]."""
        return state["count"].clamp(max=self.size)

    def mean_std(self, state: State) -> tuple[Tensor, Tensor]:
        """Return mean and unbiased standard deviation; NaN where there are too few values for them."""
        window, filled = state["window"], self.filled(state).unsqueeze(-1)
        there = self._places < filled
        mean = torch.where(there, window, 0.0).sum(-1, keepdim=True) / filled
        off = torch.where(there, window - mean, 0.0)
        return mean.squeeze(-1), ((off * off).sum(-1, keepdim=True) / (filled - 1)).sqrt().squeeze(-1)

    def quantile(self, state: State, share: float) -> Tensor:
        """Return the quantile, with linear interpolation as NumPy's; Inf or NaN where there is no value."""
        return _quantile(state["window"], self.filled(state) - 1, share)

    def median_deviation(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the median, and the median of the distances from it; Inf or NaN where there is no value."""
        window, last = state["window"], self.filled(state) - 1
        median = _quantile(window, last, 0.5)
        return median, _quantile((window - median.unsqueeze(-1)).abs(), last, 0.5)


def _quantile(window: Tensor, last: Tensor, share: float) -> Tensor:
    """Interpolate between the sorted values next to the place; the Inf of places that are not filled sort last."""
    ordered = window.sort(-1).values
    place = last.clamp(min=0).to(window.dtype) * share
    lower = place.floor()
    pair = ordered.gather(-1, torch.stack([lower, place.ceil()], -1).long())
    below, above = pair.unbind(-1)
    return torch.lerp(below, above, place - lower)
