"""A delivery and the pieces that it is cut into when it is refused, each of which is one request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from gradiometer_monitor.remote_write.protocol import Block, Series

__all__ = ["Delivery", "Piece"]


@dataclass(slots=True)
class Cut:
    """Two halves of a piece."""

    refused: int = 0
    held: Piece | None = None
    """The first half of a row, which was refused, until the other has its answer."""


@dataclass(slots=True)
class Piece:
    """Part of a delivery: what one request carries."""

    blocks: tuple[Block, ...]
    kind: Literal["whole", "part", "row", "half"] = "whole"
    """Row: one instant of a delivery that may have been taken before; half: the same, cut by series."""
    by_series: bool = True
    """Along which side to cut next."""
    tries: int = 0
    parent: Cut | None = None

    @property
    def samples(self) -> int:
        return sum(block.samples for block in self.blocks)

    def counts(self) -> Counter[Series]:
        """Return the samples of each series."""
        found: Counter[Series] = Counter()
        for block in self.blocks:
            totals = np.count_nonzero(block.present, axis=0).tolist()
            found.update({series: total for series, total in zip(block.series, totals, strict=True) if total})
        return found

    def cut(self) -> list[Piece]:
        """Cut in two, the later half first, as on a stack: between blocks, or within the one there is.

        It goes on along the side of the cut that made the piece, until both halves of one were refused: a series that
        is at fault is found by one side, a time by the other.
        """
        blocks = tuple(compact for block in self.blocks if (compact := block.compact()).samples)
        if len(blocks) > 1:
            middle = len(blocks) // 2
            return [Piece(half, "part", self.by_series) for half in (blocks[middle:], blocks[:middle])]
        (block,) = blocks
        switch = self.parent is not None and self.parent.refused > 1
        by_series = self.by_series is not switch
        by_series = len(block.series) > 1 if by_series or len(block.times) == 1 else by_series
        halves, cut = block.halves(by_series=by_series), Cut()
        pieces = [Piece((half,), "part", by_series, parent=cut) for half in reversed(halves)]
        return [each for each in pieces if each.samples]

    def rows(self) -> list[Piece]:
        """Cut into single instants of single blocks, the last first."""
        pieces = [Piece((row,), "row") for block in self.blocks for row in block.rows() if row.samples]
        return pieces[::-1]

    def split_row(self) -> list[Piece]:
        """Cut a row in two by series; its halves know of each other."""
        (block,) = self.blocks
        cut = Cut()
        halves = reversed(block.compact().halves(by_series=True))
        return [Piece((half,), "half", parent=cut) for half in halves]


@dataclass(slots=True)
class Delivery:
    """What is on its way: a stack of pieces, the next one last."""

    blocks: tuple[Block, ...]
    pieces: list[Piece]
    repeated: bool = False
    """The receiver may have taken it before: its answer was lost, or the monitor was, before the cursor moved."""
    requests: int = 0
    accepted: int = 0
    """Samples."""
    rejected: Counter[Series] = field(default_factory=Counter)
    """Samples, by series."""

    @classmethod
    def of(cls, blocks: Sequence[Block], *, repeated: bool = False) -> Delivery:
        """Make a delivery of blocks that have no series in common."""
        kept = tuple(block for block in blocks if block.samples)
        return cls(blocks=kept, pieces=[Piece(kept)] if kept else [], repeated=repeated)
