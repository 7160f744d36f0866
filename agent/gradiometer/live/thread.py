"""Change the policy of a running job: a thread that reads requests, and one attribute that the step path looks at.

The thread never touches the device and is never waited for, but in a step that its rank has pledged not to begin
without a verdict, and then not for ever. Guarantees: every rank takes a new policy up at the same step or none does;
a rank that cannot learn which of them it is raises, for ranks under different policies would train apart unseen.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any
from weakref import finalize, ref

import torch

from gradiometer.live.accord import Accord, Verdict, leave_quietly
from gradiometer.live.chronicle import Chronicle
from gradiometer.live.control import CONTROL_FILE, Request, RequestError, read_request
from gradiometer.live.loop import Loop
from gradiometer.live.requests import LoopRequest, read_loop_request, waiting
from gradiometer.policy.build import Binding, bind
from gradiometer.policy.pipeline import observe
from gradiometer.policy.spec import PolicyError, PolicySpec, load_policy
from gradiometer.records import RunFormatError
from gradiometer.rendezvous import job_store
from gradiometer.stepper import Stepper

__all__ = ["Live", "Order", "PolicyChangeError"]

logger = logging.getLogger(__name__)

IDLE_SECONDS, BUSY_SECONDS = 0.5, 0.02
STORE_CHECKS = 500
"""Looks a second that the ranks of a job together take at its store: beyond 250 ranks each looks less often."""
BUSY_CHECKS = 5000
"""As many, while they settle a request."""
PLEDGE_SECONDS = 2.0
"""How long the steps take, as far as can be told, that a rank takes before it waits for a verdict."""
MIN_STEPS, MAX_STEPS = 2, 10_000
WAIT_SECONDS = 300.0
"""How long a step waits for a verdict at most; its thread has refused long before, if it reaches the store. As long as
attach() waits for a rank: the store may be in a process that is stopped for a while, and a job outlives that."""
SLICE_SECONDS = 1.0
"""The wait is counted in these: a process that was stopped while it waited has not waited."""
LISTEN_SECONDS = 60.0
"""After attach, in which a loop that has not looked for requests may yet do so; one that waits is refused after it."""
FOLLOW_SECONDS = 5.0
"""In which another rank may yet come to look for them, as the first does."""
MOST_REASONS, LONGEST_REASON, REMEMBERED = 20, 500, 256
JOIN_SECONDS = 5.0
_attachments: dict[tuple[str, tuple[int, ...]], count[int]] = {}
"""Numbers the agents of one run id and group: ranks attach in the same order."""


class PolicyChangeError(RuntimeError):
    """This rank has agreed to change its policy with the others, and cannot learn whether they do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What was checked and agreed on, for the training thread: a policy to put in force, or a request to the loop."""

    request: Request | LoopRequest
    spec: PolicySpec | None = None
    at: int | None = None
    """The step, counted since attach, before which it is; None: at once."""


class Live:
    """What an agent has to do with changes of its policy."""

    def __init__(
        self,
        stepper: Stepper,
        directory: Path,
        members: Sequence[int],
        own: int,
        chronicle: Chronicle,
        check: Callable[[PolicySpec], None],
        loop: Loop,
    ) -> None:
        self.due = False
        """Whether the training thread should look here before its next step: all that a step looks at."""
        self.obstacle = ""
        """Why no policy could act in this job."""
        self._stepper, self._chronicle, self._fits, self._path = stepper, chronicle, check, directory
        self._loop, self._since = loop, time.monotonic()
        self._inode, self._pid = directory.stat().st_ino, os.getpid()
        self._seen: tuple[int, int, int] | None = None
        """Inode, time and size of the request that was read last."""
        self._handled: deque[str] = deque(maxlen=REMEMBERED)
        """Ids of requests that are done with: a file that is put back is not asked again."""
        self._changed = threading.Condition()
        self._horizon: int | None = None
        self._order: Order | None = None
        self._asked: Request | LoopRequest | None = None
        """What the ranks are deciding on."""
        self._asked_since, self._pledged, self._abandoned = 0.0, False, ""
        self._lost = ""
        self._paces: deque[tuple[float, int]] = deque(maxlen=8)
        self._accord, self._no_accord = self._open(members, own)
        self._reads = own == members[0]
        self._idle = IDLE_SECONDS if len(members) == 1 else max(IDLE_SECONDS, len(members) / STORE_CHECKS)
        self._busy = max(BUSY_SECONDS, len(members) / BUSY_CHECKS)
        self._stop = threading.Event()
        finalize(self, self._stop.set).atexit = False
        self._thread = threading.Thread(
            target=_watch, args=(ref(self), self._stop), name="gradiometer-live", daemon=True
        )
        self._thread.start()

    def _open(self, members: Sequence[int], own: int) -> tuple[Accord | None, str]:
        if len(members) == 1:
            return None, ""
        name = self._path.parent.name
        number = next(_attachments.setdefault((name, tuple(members)), count()))
        store = job_store()
        if store is None:
            return None, "the ranks of this job share no key-value store (MPI has none), so they cannot agree on a step"
        try:
            return Accord(store, f"{name}/{number}", members, own), ""
        except RuntimeError as error:
            return None, f"the job's key-value store cannot be reached: {error}"

    # For the training thread.

    def settle(self) -> Order | None:
        """Return what is to be put in force before the step that is about to be taken; wait for a verdict if pledged.

        Raises PolicyChangeError if there is none in time.
        """
        if os.getpid() != self._pid:
            self.due = False  # a forked child has no thread
            return None
        step = self._stepper.taken
        with self._changed:
            if self._horizon is not None and step >= self._horizon and not self._is_settled():
                self.due, self._horizon = False, None
                if isinstance(self._asked, LoopRequest):  # for which training is not ended
                    self._abandoned = self._asked.id
                    self._reject(self._asked, [f"no verdict came: {self._lost or 'the ranks do not answer'}"])
                    return None
                raise PolicyChangeError(
                    "this rank agreed to change its policy together with the others, and cannot learn whether they "
                    f"do: {self._lost or f'no verdict came within {WAIT_SECONDS:g} s'}. Ranks under different "
                    "policies would train apart; start again from a checkpoint"
                )
            order = self._order
            if order is None or (order.at is not None and step < order.at):
                self.due = order is not None or self._horizon is not None
                return None
            self._order, self.due = None, False
            return order

    def _is_settled(self) -> bool:
        """Wait for a verdict, the lock being held; tell whether it came."""
        waited = 0.0
        while self._horizon is not None and not self._lost and waited < WAIT_SECONDS:
            self._changed.wait(min(SLICE_SECONDS, WAIT_SECONDS))
            waited += SLICE_SECONDS
        return self._horizon is None

    def close(self) -> None:
        """End the thread; what has not been put in force by now is refused. Idempotent."""
        if os.getpid() != self._pid or self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(JOIN_SECONDS)
        order, self._order, self.due = self._order, None, False
        if order is not None:
            self._reject(order.request, ["the agent was detached before the step that was agreed on"])

    # For the thread.

    def look(self) -> float:
        """Do what there is to do; return after how many seconds to look again."""
        now, taken = time.monotonic(), self._stepper.taken
        if not self._paces or now - self._paces[-1][0] >= IDLE_SECONDS:
            self._paces.append((now, taken))
        self._chronicle.tend()
        self._loop.tend()
        if self._order is not None:
            return IDLE_SECONDS
        if self._accord is not None and not self._confer(self._accord):
            return IDLE_SECONDS
        busy = self._accord is not None and self._accord.open
        if self._reads and not busy:
            busy = self._read() or self._read_waiting()
        return self._busy if busy else self._idle

    def leave(self) -> None:
        """Take leave of the other ranks."""
        if self._accord is not None and not self._lost and _in_a_group():
            leave_quietly(self._accord, "its agent was detached", self._hear)

    def give_up(self, why: str) -> None:
        """Take no requests any more; the training thread learns of it if it waits."""
        with self._changed:
            self._lost = why
            self._changed.notify_all()
        if _in_a_group():
            logger.warning("gradiometer: this job takes no requests any more while it runs: %s", why)

    def _read(self) -> bool:
        """Take a new request, if there is one; tell whether it was."""
        found = self._signature()
        if found is None or found == self._seen:
            return False
        self._seen = found
        try:
            request = read_request(self._path)
        except (RequestError, RunFormatError) as error:
            self._reject(None, str(error).splitlines())
            return False
        except FileNotFoundError:
            return False
        except OSError as error:
            said = f"the request cannot be read ({error}): ask as the user who trains"
            self._reject(None, [said])
            return False
        if request.id in self._handled:
            return False
        return self._take(request, *self._check(request))

    def _read_waiting(self) -> bool:
        """Take the oldest request to the loop that it looks for, if there is one; tell whether it was."""
        try:
            found = waiting(self._path) if self._path.stat().st_ino == self._inode else {}
        except OSError:
            return False
        for identity, path in found.items():
            request, wrong = None, ""
            try:
                request = None if identity in self._handled else read_loop_request(path)
            except (RequestError, RunFormatError, OSError) as error:
                wrong = str(error)
            if request is None or self._loop.heeds(request.kind) or time.monotonic() - self._since > LISTEN_SECONDS:
                self._done_with(identity, path)
                if wrong:
                    self._loop.refuse(None, identity, _shortened(wrong.splitlines()))
                if request is not None and self._take(request, None, self._loop.objections(request)):
                    return True
        return False

    def _done_with(self, identity: str, path: Path) -> None:
        self._handled.append(identity)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    def _take(self, request: Request | LoopRequest, spec: PolicySpec | None, wrong: list[str]) -> bool:
        """Propose to the other ranks what was asked, or refuse it; tell which."""
        self._handled.append(request.id)
        if not wrong and self._no_accord:
            wrong = [self._no_accord]
        if wrong:
            self._reject(request, wrong)
        elif self._accord is not None:
            self._accord.propose(request.model_dump_json())
        else:
            self._hand_over(Order(request=request, spec=spec))
        return not wrong

    def _reject(self, request: Request | LoopRequest | None, reasons: Sequence[str]) -> None:
        """Tell why a request is refused, in so many words and no more: whoever wrote it may have written a lot."""
        said = _shortened(reasons)
        if isinstance(request, LoopRequest):
            self._loop.refuse(request, request.id, said)
        else:
            self._chronicle.reject(request, said)

    def _signature(self) -> tuple[int, int, int] | None:
        try:
            if self._path.stat().st_ino != self._inode:
                return None  # another run's, which has this one's place
            stat = (self._path / CONTROL_FILE).stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def _check(self, request: Request) -> tuple[PolicySpec | None, list[str]]:
        """Return the policy, tried on the host for one step to see that it can decide, and what is wrong with it."""
        if request.policy is None:
            return None, []
        if self.obstacle:
            return None, [self.obstacle]
        try:
            spec = load_policy(request.policy)
            layout = replace(self._stepper.layout, device=torch.device("cpu"))
            _try(bind(spec, layout), len(layout.names))
            self._fits(spec)
        except PolicyError as error:
            return None, str(error).splitlines()
        except Exception as error:  # whatever a policy cannot be built for, the job goes on with the one it has
            return None, [f"the policy cannot be built: {type(error).__name__}: {error}"]
        return spec, []

    def _confer(self, accord: Accord) -> bool:
        """Take part in what the ranks decide; tell whether they can."""
        if not _in_a_group():
            return False  # the group was destroyed, and its store may be gone
        try:
            if (message := accord.hear()) is not None:
                self._asked, self._asked_since, self._pledged = _parse(message), time.monotonic(), False
            if accord.open and not self._pledged:
                self._answer(accord)
            if (verdict := accord.look()) is not None:
                self._hear(verdict)
        except RuntimeError as error:  # of which kind is for the store to say
            self._accord, self._no_accord = None, f"the job's key-value store cannot be reached: {error}"
            self.give_up(self._no_accord)
            return False
        return True

    def _answer(self, accord: Accord) -> None:
        """Pledge, or refuse, or leave it until this rank's loop is as far as the first one's."""
        request = self._asked
        if isinstance(request, Request):
            wrong = self._check(request)[1]
        elif request is None or request.kind != "stop" or self._loop.heeds("stop"):
            wrong = []  # a checkpoint may be the first rank's work alone; ranks that do not all stop would hang
        elif time.monotonic() - self._asked_since < FOLLOW_SECONDS:
            return
        else:
            wrong = self._loop.objections(request)
        self._pledged = True
        if wrong:
            accord.refuse("; ".join(wrong)[:LONGEST_REASON])
            return
        accord.pledge(self._bind())

    def _bind(self) -> int:
        """Bind the training thread not to begin a step without a verdict; return which."""
        while True:
            horizon = self._stepper.taken + self._steps()
            with self._changed:
                self._horizon, self.due = horizon, True
            # A step that has begun since may not have seen that it is due; those after this look will.
            if self._stepper.taken + 1 < horizon:
                return horizon

    def _steps(self) -> int:
        """Return how many steps the training takes in two seconds, going by the last few."""
        if len(self._paces) < 2:
            return MIN_STEPS
        (began, first), (ended, last) = self._paces[0], self._paces[-1]
        return max(MIN_STEPS, min(MAX_STEPS, math.ceil((last - first) / (ended - began) * PLEDGE_SECONDS)))

    def _hear(self, verdict: Verdict) -> None:
        request = _parse(verdict.message)
        if request.id == self._abandoned:
            return
        if verdict.at is None:
            with self._changed:
                self._horizon = None
                self._changed.notify_all()
            self._reject(request, [verdict.why])
            return
        asked = request.policy if isinstance(request, Request) else None
        self._hand_over(Order(request=request, spec=None if asked is None else load_policy(asked), at=verdict.at))

    def _hand_over(self, order: Order) -> None:
        with self._changed:
            self._order, self._horizon, self.due = order, None, True
            self._changed.notify_all()


def _parse(message: str) -> Request | LoopRequest:
    """Read what the first rank has proposed."""
    raw = json.loads(message)
    return Request.model_validate(raw) if raw["kind"] == "policy" else LoopRequest.model_validate(raw)


def _shortened(reasons: Sequence[str]) -> list[str]:
    said = [each[:LONGEST_REASON] for each in reasons[:MOST_REASONS]]
    more = len(reasons) - len(said)
    return [*said, f"and {more} more"] if more > 0 else said


def _try(binding: Binding, parameters: int) -> None:
    """Let the stages of a policy decide about a step that never was: what fails here would fail in training."""
    states, step = binding.init(), observe(torch.ones(parameters), torch.ones(()))
    with torch.no_grad():
        for part in (binding.pipeline, binding.shadow):
            if part is not None:
                part.decide(states, step, 0)


def _in_a_group() -> bool:
    distributed: Any = torch.distributed
    return bool(distributed.is_available() and distributed.is_initialized())


def _watch(live: ref[Live], stop: threading.Event) -> None:
    """Look again and again; keep nothing alive in between."""
    seconds = IDLE_SECONDS
    while not stop.wait(seconds):
        mine = live()
        if mine is None:
            return
        try:
            seconds = mine.look()
        except Exception as error:  # a thread has nobody to raise to
            mine.give_up(f"{type(error).__name__}: {error}")
            return
        del mine
    mine = live()
    if mine is not None:
        mine.leave()
