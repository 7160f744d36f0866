"""Have the ranks of a distributed job exchange a word, or learn which of them did not come.

They meet at the job's own key-value store and not in a collective, because a store lets each wait have its own end: a
rank that never comes hangs nobody. Guarantees: all who come to a meeting are told the same of it, whether it took place
or not, and one that did not take place does not disturb the next.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from hashlib import sha256
from itertools import count
from typing import Any

import torch

__all__ = ["AbsentError", "agree_on", "job_store", "meet"]

_GO, _APART = "go", "apart"
_numbers: dict[tuple[str, tuple[int, ...]], count[int]] = {}
"""Numbers the meetings of each set of ranks, for each purpose."""


class AbsentError(RuntimeError):
    """Some ranks did not come; the message names them."""


def job_store() -> Any:
    """Return the store of the job, or None: there is none, as over MPI, or this torch does not tell."""
    try:
        return torch.distributed.distributed_c10d._get_default_store()
    except (AttributeError, RuntimeError, ValueError):
        return None


def agree_on(value: str) -> str:
    """Return the ``value`` of whichever rank asked first: launches on several hosts have made different run ids."""
    store = job_store()
    return value if store is None else str(store.compare_set("gradiometer/run_id", "", value).decode())


def meet(
    store: Any, members: Sequence[int], own: int, message: str, patience: timedelta, call: str = "attach()"
) -> list[str]:
    """Return the messages of all ``members``, in their order; raises AbsentError if one is not here in time.

    ``call`` is what all of them have called, and those who have called something else are not met. A meeting that
    failed is over: ranks that had no part in it go on to the next.
    """
    house = f"gradiometer/{sha256(repr([call, *members]).encode()).hexdigest()[:16]}"
    for number in _numbers.setdefault((call, tuple(members)), count()):
        room = f"{house}/{number}"
        verdict = f"{room}/verdict"
        if not store.check([verdict]) or store.get(verdict).decode() != _APART:
            break
    store.set(f"{room}/{own}", message)
    if store.add(f"{room}/here", 1) == len(members):
        store.compare_set(verdict, "", _GO)
    else:
        _wait(store, verdict, patience)
    if store.compare_set(verdict, "", _APART).decode() != _GO:
        missing = [rank for rank in members if not store.check([f"{room}/{rank}"])]
        raise AbsentError(
            f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:8]))} did not call {call} within "
            f"{patience.total_seconds():g} s of this one: every rank must, or pass group= one of those that do"
        )
    return _share(store, room, members, own, patience)


def _share(store: Any, room: str, members: Sequence[int], own: int, patience: timedelta) -> list[str]:
    """Collect the messages once, for all: a thousand ranks mostly say the same, and need not ask a thousand times."""
    if own == members[0]:
        said = [store.get(f"{room}/{rank}").decode() for rank in members]
        distinct = list(dict.fromkeys(said))
        store.set(f"{room}/all", json.dumps([distinct, [distinct.index(message) for message in said]]))
    elif not _wait(store, f"{room}/all", patience):
        raise AbsentError(f"rank {members[0]} has gone while the ranks exchanged a word")
    distinct, indices = json.loads(store.get(f"{room}/all"))
    return [distinct[index] for index in indices]


def _wait(store: Any, key: str, patience: timedelta) -> bool:
    try:
        store.wait([key], patience)
    except RuntimeError:  # of which kind is for the store to say; one that has gone fails again, where it is read
        return False
    return True
