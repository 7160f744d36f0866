"""What a metric is, and the buckets and windows that several of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["GRAD_NORM_BUCKETS", "SCRAPE_SECONDS_BUCKETS", "STEP_SECONDS_BUCKETS", "WINDOW_SECONDS", "Metric"]

WINDOW_SECONDS = 60.0
"""Width of the rolling maxima: at least twice a scrape interval of up to 30 s, so that no spike falls between two."""

GRAD_NORM_BUCKETS: tuple[float, ...] = tuple(2.0**exponent for exponent in range(-10, 11))
STEP_SECONDS_BUCKETS: tuple[float, ...] = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)  # fmt: skip
SCRAPE_SECONDS_BUCKETS: tuple[float, ...] = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric family: ``name`` as exposed (counters with ``_total``), its type, HELP text and label names."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def family(self) -> str:
        """Name of the family in OpenMetrics: counters lose ``_total``."""
        return self.name.removesuffix("_total") if self.kind == "counter" else self.name
