"""Bring rows from the gradients' device to the host without ever waiting for it.

A row is copied into a pinned slot behind the work already queued on the stream, and an event marks the end of the
copy; later steps take the slots whose events have fired. When every slot is busy the row is dropped, and the caller
counts it. On the CPU the same code runs with events that have always fired.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["SLOTS", "Transfer", "bring", "capturing", "reads_are_free"]

SLOTS = 16
"""Rows that may be under way; on a GPU the host runs at most a few steps ahead."""

Record = TypeVar("Record")


def reads_are_free(device: torch.device) -> bool:
    """Tell whether the host can read a tensor of ``device`` without waiting for queued work."""
    return device.type == "cpu"


def capturing() -> bool:
    """Tell whether the work that is queued now is not run but captured into a CUDA graph.

    Asking for an event then, as much as reading a tensor, would spoil the capture.
    """
    initialised: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch
    return initialised and torch.cuda.is_current_stream_capturing()


def bring(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on ``device``, waiting for it only if that is the CPU: the host may read it at once."""
    if tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=device.type != "cpu")


class _Slot:
    def __init__(self, width: int, device: torch.device) -> None:
        self.host = torch.empty(width, dtype=torch.float32, pin_memory=device.type == "cuda")
        self.array: npt.NDArray[np.float32] = self.host.numpy()
        self.event = None if reads_are_free(device) else torch.Event(device)
        self.used = 0

    def copy(self, values: Tensor) -> None:
        end = self.used + values.numel()
        self.host[self.used : end].copy_(values, non_blocking=True)
        self.used = end
        if self.event is not None:
            self.event.record()


class Transfer(Generic[Record]):
    """A queue of rows of at most ``width`` float32 values, each travelling with a host-side record."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._free = [_Slot(width, device) for _ in range(SLOTS)]
        self._busy: deque[tuple[_Slot, Record]] = deque()

    def send(self, values: Tensor, record: Record) -> bool:
        """Queue the copy of ``values`` (1-dim); return False, with nothing queued, if every slot is busy."""
        if not self._free:
            return False
        slot = self._free[-1]
        slot.used = 0
        slot.copy(values)
        self._busy.append((self._free.pop(), record))
        return True

    def extend(self, values: Tensor) -> None:
        """Append ``values`` to the newest row, which must still be under way."""
        self._busy[-1][0].copy(values)

    @property
    def newest(self) -> Record | None:
        """The record of the newest row that is still under way."""
        return self._busy[-1][1] if self._busy else None

    def arrived(
        self, *, wait: bool = False, keep_newest: bool = False
    ) -> Iterator[tuple[Record, npt.NDArray[np.float32]]]:
        """Take the rows that have arrived, oldest first; ``wait`` for them; ``keep_newest`` for :meth:`extend`.

        The array is a view of the slot, valid until the next iteration.
        """
        while len(self._busy) > keep_newest:
            slot, record = self._busy[0]
            if slot.event is not None and not slot.event.query():
                if not wait:
                    return
                slot.event.synchronize()
            self._busy.popleft()
            yield record, slot.array[: slot.used]
            self._free.append(slot)
