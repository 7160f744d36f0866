"""How the norms of a run's layers are spread: a few quantiles, however many layers there are. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gradiometer.tail import Sample

__all__ = ["QUANTILES", "SPREAD_OF", "spread"]

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
SPREAD_OF = "gradiometer_layer_grad_norm_window_max"
"""The column of :class:`gradiometer.summary.LayerSummary` that the quantiles are of."""


def spread(run_id: str, peaks: npt.NDArray[Any]) -> Iterator[Sample]:
    """Yield the quantiles of ``peaks``, float64[L] without NaN; nothing if it is empty.

    Each is the norm of some layer, the least that is not below such a share of them: between 1 and Inf lies nothing.
    """
    ranked = np.sort(peaks)
    for quantile in QUANTILES if len(ranked) else ():
        place = max(0, math.ceil(quantile * len(ranked)) - 1)
        yield "gradiometer_layer_grad_norm_quantile", (run_id, f"{quantile:g}"), float(ranked[place])
