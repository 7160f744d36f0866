"""Have all ranks of a job do something at the same step, or none of them, without a collective.

The ranks speak through a key-value store, from threads, and only ever look: nobody waits in the store. The first of
them posts a proposal; each answers it with a pledge, "I shall not begin my n-th step without knowing the verdict"; the
first sets the verdict: at the largest of the pledged steps, or refused. Anyone may refuse, and whoever is not answered
in time does; the verdict is set once, by compare-and-set, and so is one for all. Whoever reads "apply at K" has not
begun K, because K is no less than its own pledge: so all apply at K.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

__all__ = ["Accord", "Verdict", "leave_quietly"]

GATHER_SECONDS = 10.0
"""How long the first rank waits for the pledges of the others."""
DECIDE_SECONDS = 15.0
"""How long the others then wait for its verdict."""
LINGER_SECONDS = 2.0
"""How long a rank that leaves waits for the others to have read a verdict: the store may go with it."""
LOOK_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What was decided about a proposal; ``at`` is a step counted since attach, None where it is refused."""

    message: str
    at: int | None
    why: str = ""


class Accord:
    """One rank's part. All methods are for one thread; each raises RuntimeError where the store cannot be reached."""

    def __init__(self, store: Any, name: str, members: Sequence[int], own: int) -> None:
        self._store = _own_connection(store)
        self._house = f"gradiometer/accord/{sha256(f'{name}/{list(members)}'.encode()).hexdigest()[:16]}"
        self._members, self._own, self._number = list(members), own, 0
        self._message: str | None = None
        self._pledged = False
        self._since = 0.0

    @property
    def leads(self) -> bool:
        return self._own == self._members[0]

    @property
    def open(self) -> bool:
        """Whether a proposal was heard and no verdict."""
        return self._message is not None

    def propose(self, message: str) -> None:
        """Post a proposal; only for the first rank, while none is open."""
        assert self.leads
        assert not self.open
        self._store.set(self._key("said"), message)

    def hear(self) -> str | None:
        """Return the proposal that has come since the last verdict, once; it must be answered."""
        if self.open or not self._store.check([self._key("said")]):
            return None
        self._message, self._pledged, self._since = self._store.get(self._key("said")).decode(), False, time.monotonic()
        return self._message

    def pledge(self, horizon: int) -> None:
        """Agree to the proposal, and not to begin step ``horizon``, counted since attach, without knowing the verdict.

        The training thread must be bound by it already.
        """
        self._pledged, self._since = True, time.monotonic()
        self._store.set(self._key(f"pledge/{self._own}"), str(horizon))

    def refuse(self, why: str) -> None:
        """Have the proposal refused, unless a verdict is there."""
        self._store.compare_set(self._key("verdict"), "", json.dumps([None, f"rank {self._own}: {why}"]))

    def look(self) -> Verdict | None:
        """Return the verdict on the open proposal, if there is one by now; set it where that is this rank's to do."""
        if not self.open:
            return None
        verdict = self._key("verdict")
        if not self._store.check([verdict]):
            decided = self._decide()
            if decided is None:
                return None
            self._store.compare_set(verdict, "", json.dumps(decided))
        at, why = json.loads(self._store.get(verdict).decode())
        assert self._message is not None
        found = Verdict(message=self._message, at=at, why=why)
        self._store.add(self._key("seen"), 1)
        self._message, self._number = None, self._number + 1
        return found

    def leave(self, why: str) -> Verdict | None:
        """Refuse what is open; let the others read what was decided, for a moment. Return the verdict, if any."""
        found = None
        if self.open:
            self.refuse(why)
            found = self.look()
        if self.leads and self._number:
            self._linger(f"{self._house}/{self._number - 1}/seen")
        return found

    def _linger(self, seen: str) -> None:
        end = time.monotonic() + LINGER_SECONDS
        while self._store.add(seen, 0) < len(self._members) and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)

    def _decide(self) -> tuple[int | None, str] | None:
        waited = time.monotonic() - self._since
        if not self.leads:
            if waited < DECIDE_SECONDS:
                return None
            return None, f"rank {self._own} waited {waited:.0f} s for rank {self._members[0]} to decide"
        keys = {rank: self._key(f"pledge/{rank}") for rank in self._members}
        if not self._store.check(list(keys.values())):
            if waited < GATHER_SECONDS:
                return None
            missing = [rank for rank in self._members if not self._store.check([keys[rank]])]
            shown = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:8]))}"
            return None, f"{shown} did not answer within {GATHER_SECONDS:g} s: ended, detached, or stopped"
        return max(int(self._store.get(key).decode()) for key in keys.values()), ""

    def _key(self, what: str) -> str:
        return f"{self._house}/{self._number}/{what}"


def _own_connection(store: Any) -> Any:
    """Connect anew, where this torch and kind of store can: the training thread may be waiting in the old one."""
    try:
        return store.clone()
    except (AttributeError, RuntimeError):
        return store


def leave_quietly(accord: Accord, why: str, hear: Callable[[Verdict], None]) -> None:
    """Leave, where nobody can be told any more that the store is gone."""
    with contextlib.suppress(RuntimeError):
        if (verdict := accord.leave(why)) is not None:
            hear(verdict)
