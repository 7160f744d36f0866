"""The pieces that the dashboards' PromQL is made of.

Guarantees: each series carries the matchers of its :class:`Selector`, and each metric is in the catalogue. A run that
spans hosts is exported by each host's monitor; what is the same on all of them (norms, decisions) is therefore reduced
with ``max``, and what each process counts for itself (losses, errors) with ``sum``.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradiometer.metrics import CATALOGUE

__all__ = ["FLEET", "RUN", "Query", "Selector", "increase", "increase_in_view", "metric", "peak", "rate", "series"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Selector:
    """Label matchers that stand in a query, as dashboard variables."""

    more: str = ""
    """Matchers beside those of job and instance, which every query has."""

    def __str__(self) -> str:
        return 'job=~"$job", instance=~"$instance"' + (f", {self.more}" if self.more else "")

    def __and__(self, more: str) -> Selector:
        return Selector(more=", ".join(part for part in (self.more, more) if part))


FLEET = Selector()
RUN = FLEET & 'run_id="$run_id"'


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """An expression, the legend of its series, in which ``{{label}}`` stands for a label's value, and their colour."""

    expr: str
    legend: str
    colour: str | None = None
    """One of :mod:`gradiometer_dashboards.colours`; left to Grafana where series of one query must differ."""


def metric(name: str) -> str:
    """Return ``name`` if the catalogue has it, else raise ``KeyError``."""
    return CATALOGUE[name].name


def series(name: str, part: str = "", *, of: Selector = RUN) -> str:
    """Select a metric; ``part`` is ``_bucket``, ``_sum`` or ``_count`` of a histogram."""
    return f"{metric(name)}{part}{{{of}}}"


def rate(name: str, part: str = "", *, of: Selector = RUN) -> str:
    return f"rate({series(name, part, of=of)}[$__rate_interval])"


def increase(name: str, part: str = "", *, of: Selector = RUN) -> str:
    return f"increase({series(name, part, of=of)}[$__rate_interval])"


def increase_in_view(name: str, *, of: Selector = RUN) -> str:
    """Count what a counter gained over the dashboard's whole time range."""
    return f"increase({series(name, of=of)}[$__range])"


def peak(name: str, *, of: Selector = RUN) -> str:
    """Keep the largest sample between two points of a graph, which zooming out would lose."""
    return f"max_over_time({series(name, of=of)}[$__interval])"
