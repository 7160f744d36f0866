"""Have the ranks of a distributed job attach together or not at all, without hanging a job that never planned to.

Attaching is collective, but that every rank trains is not known beforehand: one of them may have an optimizer to
itself. So before the first collective the ranks meet at the job's own key-value store, where a rank that waits in vain
gives up.
"""

from __future__ import annotations

from datetime import timedelta
from itertools import count
from typing import Any

import torch

from gradiometer.manifest import rank_and_world

__all__ = ["PATIENCE", "agree_on", "all_ranks_come"]

PATIENCE = timedelta(seconds=60)
"""How long the first rank waits for the last, once: ranks that train together step within moments of each other."""
_GO, _APART = "go", "apart"
_meetings = count(1)


def agree_on(value: str) -> str:
    """Return the ``value`` of whichever rank asked first: launches on several hosts have made different run ids."""
    store = _store()
    return value if store is None else str(store.compare_set("gradiometer/run_id", "", value).decode())


def all_ranks_come() -> bool:
    """Wait for every rank to call this too; return False if one did not within :data:`PATIENCE`. All are told the same.

    A meeting that failed before is over: ranks that had no part in it go on to the next.
    """
    store, world = _store(), rank_and_world()[1]
    if store is None:
        return True
    while True:
        number = next(_meetings)
        here, verdict = f"gradiometer/here/{number}", f"gradiometer/verdict/{number}"
        if store.check([verdict]) and store.get(verdict).decode() == _APART:
            continue
        if store.add(here, 1) == world:
            store.compare_set(verdict, "", _GO)
        else:
            _wait(store, verdict)
        return bool(store.compare_set(verdict, "", _APART).decode() == _GO)


def _wait(store: Any, key: str) -> None:
    try:
        store.wait([key], PATIENCE)
    except torch.distributed.DistStoreError:
        return  # in vain


def _store() -> Any:
    """Return the store of the job, or None: it has one rank, or was initialised without, as over MPI."""
    if rank_and_world()[1] == 1:
        return None
    try:
        return torch.distributed.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        return None
