"""Lines of Prometheus text 0.0.4 and OpenMetrics 1.0, which differ, in what we export, by the headers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gradiometer.metrics import CATALOGUE, Metric
from gradiometer.summary import Histogram
from gradiometer.tail import Sample

__all__ = ["Counts", "Lines", "add", "add_histogram", "header", "label_set", "line", "spell"]

LABEL_SETS = 65_536
"""Label sets outside the layers that are kept as text: those of some thousand runs."""

Lines = dict[str, list[str]]
"""The lines of each metric of the catalogue; an item may hold several."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """A histogram as it was at one instant."""

    bounds: tuple[float, ...]
    cumulative: Sequence[int]
    sum: float

    @classmethod
    def of(cls, histogram: Histogram) -> Counts:
        """Copy what ``histogram`` counts now."""
        return cls(bounds=histogram.bounds, cumulative=histogram.cumulative, sum=histogram.sum)


def header(metric: Metric, openmetrics: bool) -> str:
    """Write the lines that come before the samples of ``metric``."""
    name = metric.family if openmetrics else metric.name
    text = metric.help.replace("\\", r"\\").replace("\n", r"\n")
    text = text.replace('"', r"\"") if openmetrics else text
    return f"# HELP {name} {text}\n# TYPE {name} {metric.kind}\n"


def label_set(name: str, values: tuple[str, ...], extra: str = "") -> str:
    """Write the labels of one series of the metric ``name``, braces and all; ``extra`` is put last as it is."""
    pairs = [f'{label}="{_escape(value)}"' for label, value in zip(CATALOGUE[name].labels, values, strict=True)]
    text = ",".join(pairs) + extra
    return f"{{{text.removeprefix(',')}}}" if text else ""


_labels = lru_cache(maxsize=LABEL_SETS)(label_set)


def _escape(value: str) -> str:
    if not value.isascii():  # a lone surrogate, which no UTF-8 holds, becomes its escape: two names stay two
        value = value.encode("utf-8", "backslashreplace").decode()
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def spell(text: str) -> str:
    """Write non-finite values as the formats do; a label cannot hold these strings, whose newlines it would escape."""
    return text.replace("} inf\n", "} +Inf\n").replace("} -inf\n", "} -Inf\n").replace("} nan\n", "} NaN\n")


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(value)
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def line(sample: Sample) -> str:
    """Write one sample of a gauge or a counter. Raises KeyError or ValueError if it is not as the catalogue says."""
    name, labels, value = sample
    return f"{name}{_labels(name, labels)} {_number(value)}\n"


def add(lines: Lines, samples: Iterable[Sample]) -> None:
    """Add samples of gauges and counters."""
    for sample in samples:
        lines[sample[0]].append(line(sample))


def add_histogram(lines: Lines, name: str, labels: tuple[str, ...], counts: Counts) -> None:
    """Add the lines of one histogram."""
    found = lines[name]
    for bound, count in zip([*counts.bounds, math.inf], counts.cumulative, strict=True):
        le = f',le="{_number(bound)}"'
        found.append(f"{name}_bucket{_labels(name, labels, le)} {count}\n")
    text = _labels(name, labels)
    found += (f"{name}_count{text} {counts.cumulative[-1]}\n", f"{name}_sum{text} {_number(counts.sum)}\n")
