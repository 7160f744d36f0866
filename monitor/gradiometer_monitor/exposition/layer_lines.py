"""The per-layer lines of a run: which layers its budget lets in, and their text from templates.

Per-layer lines are one template a metric and run, built when the run's layers change and filled by one ``%`` operation:
a client object a series costs some twenty times as much. Norms of layers have nine significant digits, which tell any
two float32 apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradiometer.metrics import CATALOGUE
from gradiometer.spread import QUANTILES, SPREAD_OF, spread
from gradiometer.summary import LAYER_METRICS, LayerSummary
from gradiometer.tail import Sample
from gradiometer_monitor.exposition.lines import label_set, spell

__all__ = ["RUN_SAMPLES", "LayerLines", "LayerValues", "share"]

STICKINESS = 3.0
"""A layer replaces a chosen one only when its anomaly is larger by this, so that noise moves no series."""

RUN_SAMPLES = 2 + len(QUANTILES)
"""Samples that :meth:`LayerLines.samples` gives at most."""

Mask = npt.NDArray[np.bool_]


def share(wanted: Iterable[int], total: int) -> int:
    """Return what each may have at most for all together to have ``total``: who wants less leaves it to the others."""
    left, sizes = total, sorted(wanted)
    for place, size in enumerate(sizes):
        level = left // (len(sizes) - place)
        if size > level:
            return max(0, level)
        left -= size
    return total


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerValues:
    """What a scrape shows of the layers, copied: it stays as it is while the run goes on."""

    columns: list[tuple[str, Mask, npt.NDArray[Any]]]
    """Metric, which layers are shown, bool[L], and the values of those."""
    peaks: npt.NDArray[Any]
    """Window maximum of every layer of which one is known, shown or not."""
    omitted: int
    """Series left out."""


class LayerLines:
    """The per-layer lines of one run."""

    def __init__(self, run_id: str, names: Sequence[str]) -> None:
        self._run_id = run_id
        self._labels = [label_set(LAYER_METRICS[0], (run_id, name)).replace("%", "%%") for name in names]
        self._chosen: Mask = np.zeros(len(names), np.bool_)
        self._blocks: dict[str, _Block] = {}
        self._dropped = 0

    def take(self, layers: LayerSummary, places: int | None) -> LayerValues:
        """Copy what is to be shown, ``places`` being how many series there is room for; None shows no layer at all.

        Layers that another host shows are not omitted; what is told of all of them together is told here too.
        """
        if places is None:
            peaks, known = layers.columns()[SPREAD_OF]
            return LayerValues(columns=[], peaks=peaks[known], omitted=0)
        self._choose(layers, max(0, places) // len(layers.metrics))
        columns = layers.columns()
        shown = {name: known & self._chosen for name, (_, known) in columns.items()}
        peaks, known = columns[SPREAD_OF]
        omitted = int(np.count_nonzero(layers.exported & ~self._chosen)) * len(layers.metrics)
        self._dropped += omitted
        return LayerValues(
            columns=[(name, shown[name], values[shown[name]]) for name, (values, _) in columns.items()],
            peaks=peaks[known],
            omitted=omitted,
        )

    def _choose(self, layers: LayerSummary, places: int) -> None:
        """Choose the layers to export: all of them if there are places.

        Otherwise those come first that were non-finite most often, and among equals those whose window maximum is
        furthest above their usual norm.
        """
        exported = layers.exported
        if np.count_nonzero(exported) <= places:
            self._chosen = exported.copy()
            return
        anomaly = layers.anomaly() + STICKINESS * self._chosen
        best = np.lexsort((-anomaly, -layers.nonfinite, ~exported))[:places]
        self._chosen = np.zeros(len(exported), np.bool_)
        self._chosen[best] = True

    def render(self, values: LayerValues) -> Iterator[tuple[str, str]]:
        """Yield the name and the lines of each per-layer metric that has any."""
        for name, shown, numbers in values.columns:
            if len(numbers):
                yield name, self._block(name, shown).render(numbers)

    def samples(self, values: LayerValues) -> Iterator[Sample]:
        """Yield what tells of the layers as a whole: their spread, and what was left out."""
        yield "gradiometer_series_dropped_total", (self._run_id,), self._dropped
        yield "gradiometer_series_omitted", (self._run_id,), values.omitted
        yield from spread(self._run_id, values.peaks)

    def _block(self, name: str, shown: Mask) -> _Block:
        block = self._blocks.get(name)
        if block is None or not np.array_equal(block.shown, shown):
            form = "%d" if CATALOGUE[name].kind == "counter" else "%.9g"
            places = shown.nonzero()[0].tolist()
            template = "".join([f"{name}{self._labels[place]} {form}\n" for place in places])
            block = self._blocks[name] = _Block(shown=shown, template=template)
        return block


@dataclass(kw_only=True, slots=True)
class _Block:
    """The lines of one metric and run: a template with a place for each value, and the text it last became."""

    shown: Mask
    template: str
    numbers: npt.NDArray[Any] | None = None
    text: str = ""

    def render(self, numbers: npt.NDArray[Any]) -> str:
        """Fill the template; counters that did not move, and runs that are over, are not rendered again."""
        if self.numbers is None or not np.array_equal(self.numbers, numbers):
            text = self.template % tuple(numbers.tolist())
            self.numbers, self.text = numbers, text if np.isfinite(numbers).all() else spell(text)
        return self.text
