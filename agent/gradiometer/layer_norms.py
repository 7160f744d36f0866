"""Compose the norms of layers from those of their parameters. Needs no torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gradiometer.records import Manifest

__all__ = ["LayerNorms"]

NEGATIVE_ZERO = np.float32(-0.0).view(np.uint32)
"""Bits of the norm of a parameter that had no gradient."""


class LayerNorms:
    """Which parameters a layer has; arrays of layers are in the order of ``Manifest.layers``."""

    def __init__(self, manifest: Manifest) -> None:
        index = manifest.layer_index
        self.count = len(manifest.layers)
        order = np.argsort(index, kind="stable")
        self._order: slice | npt.NDArray[np.intp] = slice(None) if (order == np.arange(len(order))).all() else order
        self._starts = np.searchsorted(index[order], np.arange(self.count))

    def compose(self, norms: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
        """Compose float32[T, P] norms of parameters to float64[T, L] of layers.

        Return them with bool[T, L]: which layers had no gradient at all, and so have a norm that says nothing.
        """
        ordered = norms[:, self._order]
        absent = np.logical_and.reduceat(ordered.view(np.uint32) == NEGATIVE_ZERO, self._starts, axis=1)
        composed = np.sqrt(np.add.reduceat(np.square(ordered, dtype=np.float64), self._starts, axis=1))
        return composed, absent

    def any_of(self, found: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Tell of bool[P] parameters which layers have one that is true, bool[L]."""
        return np.logical_or.reduceat(found[self._order], self._starts)
