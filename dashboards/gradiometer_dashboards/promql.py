"""The pieces that the dashboards' PromQL is made of.

Guarantees: each series carries the matchers of its :class:`Selector`, and each metric is in the catalogue. A run that
spans hosts is exported by each host's monitor; what is the same on all of them (norms, decisions) is therefore reduced
with ``max``, and what each process counts for itself (losses, errors) with ``sum``.
"""

from __future__ import annotations

from dataclasses import dataclass

from gradiometer.metrics import CATALOGUE

__all__ = [
    "FLEET",
    "RUN",
    "TARGETS",
    "Query",
    "Selector",
    "by_number",
    "chosen_in_view",
    "finite",
    "firing",
    "gained_in_view",
    "increase",
    "increase_in_view",
    "metric",
    "over_view",
    "peak",
    "rate",
    "scraped",
    "series",
]


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


def gained_in_view(name: str, *, of: Selector = RUN, left: bool = False) -> str:
    """Count what a counter gained in the time range, with what it held when it was first scraped within it.

    A run whose third step takes NaN has counted it before its first scrape, and ``increase`` begins with that. With
    ``left`` that is counted of series too that are no longer there, which takes another look at the whole range.
    """
    counter, gained = series(name, of=of), increase_in_view(name, of=of)
    born = f"({f'last_over_time({counter}[$__range])' if left else counter} unless {counter} offset $__range)"
    return f"({born} > {gained} or {gained} or {born})"


def peak(name: str, *, of: Selector = RUN) -> str:
    """Keep the largest sample between two points of a graph, which zooming out would lose."""
    return f"max_over_time({series(name, of=of)}[$__interval])"


def over_view(function: str, name: str, *, of: Selector = RUN, span: str = "$__range") -> str:
    """Reduce each series over the dashboard's time range, or its last ``span``, to one number for a whole graph."""
    return f"{function}({series(name, of=of)}[{span}] @ end())"


def chosen_in_view(expr: str, rank: str, *, by: str = "run_id", first: str = "topk(20, {})") -> str:
    """Keep the series of ``expr`` that ``rank`` puts first, over the whole view.

    A bare ``topk`` in a graph chooses anew at every point, which makes shreds of many series out of a few that cross.
    """
    return f"({expr}) and on ({by}) {first.format(rank)}"


def firing(more: str = "") -> str:
    """Select our alerts that fire, which have a job and, being about a run on many hosts, no instance."""
    matchers = ['alertstate="firing"', 'alertname=~"Gradiometer.*"', *([more] if more else []), 'job=~"$job"']
    return f"ALERTS{{{', '.join(matchers)}}}"


def finite(expr: str) -> str:
    """Leave out NaN and Inf, either of which takes a whole axis or scale of colours with it."""
    return f"{expr} < Inf"


def by_number(expr: str, label: str) -> str:
    r"""Have the series of a graph come in natural order of ``label``, of up to two numbers: 2 before 10.

    Prometheus sorts the series of a range by their labels, compared as text, and Grafana's heatmap draws them in the
    order in which they come. So they get a label ``by_number``, which has to come before ``label`` in the alphabet: the
    same text with a letter for the number of digits in front of each number.
    """
    assert label > "by_number", label
    digit = r"\\d"
    expr, source = f'label_replace({expr}, "by_number", "$1", "{label}", "(.*)")', "by_number"
    for before, widths in ((r"\\D*\\d+\\D+", "abc"), (r"\\D*", "abcd")):
        for digits, letter in enumerate(widths, start=1):
            pattern = rf"({before})({digit * digits})(\\D.*|)"
            expr = f'label_replace({expr}, "by_number", "$1 {letter}$2$3", "{source}", "{pattern}")'
    return expr


def scraped(name: str) -> str:
    """Select what Prometheus tells of scraping ours: *All* jobs would else be every exporter that there is."""
    ours = over_view("max_over_time", "gradiometer_build_info", of=FLEET)
    return f"{name}{{{FLEET}}} and on (job) group by (job) ({ours})"


TARGETS = scraped("up")
