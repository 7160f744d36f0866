"""Attach by itself, in a program started by ``gradiometer run``: once an optimizer steps for the first time.

Guarantees: without a policy nothing raises into the program, and what cannot be measured is warned of once; with a
policy, an agent that cannot be attached stops the program, for acting was asked for. A program that attaches an agent
of its own is left to it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import multiprocessing.util
import os
import sys
import threading
from itertools import count
from pathlib import Path
from weakref import WeakSet

from torch.optim import Optimizer

from gradiometer import session
from gradiometer.discover import Found, enclosing_optimizers, find_around
from gradiometer.hooks import attached_optimizers, listener_of
from gradiometer.launch import LaunchSettings
from gradiometer.manifest import rank_and_world
from gradiometer.rendezvous import agree_on
from gradiometer.transfer import capturing

__all__ = ["AutomaticAttachError", "before_step"]

logger = logging.getLogger(__name__)


class AutomaticAttachError(RuntimeError):
    """A policy was asked for, and no agent could be attached to carry it out."""


_OF_THE_PROGRAM = ("own_clipping", "journal", "rounds", "session")
"""Modules whose warnings say what the program does, and are events of the run as well."""
_left_alone: WeakSet[Optimizer] = WeakSet()
"""Optimizers that another one's step calls, or that no agent could be attached to."""
_one_at_a_time = threading.Lock()
PATIENCE = 60.0
"""Seconds that ranks wait for each other: those that train together step within moments of one another."""
_attached: list[str] = []
"""Run ids of this process's agents. Ranks attach together or not at all, so each has as many."""


def before_step(optimizer: Optimizer) -> bool:
    """Attach an agent if this optimizer, which is about to step, should have one; return whether it was done now."""
    if listener_of(optimizer) or optimizer in _left_alone or "_optimizer_step_pre_hooks" not in optimizer.__dict__:
        return False
    if any(not agent.gives_way for agent in session.live_agents()):
        return False  # the program has gradiometer in its own hands
    if any(each is not optimizer for each in enclosing_optimizers()):
        _left_alone.add(optimizer)
        return False
    with _one_at_a_time:
        return listener_of(optimizer) is None and _attach(optimizer)


def _attach(optimizer: Optimizer) -> bool:
    settings = None
    try:
        settings = LaunchSettings.from_environment()
        found = find_around(optimizer, [*_left_alone, *attached_optimizers()])
        agent = _attach_to(found, settings)
    except Exception as error:
        _left_alone.add(optimizer)
        if settings is not None and settings.policy is not None:
            raise AutomaticAttachError(f"gradiometer run: the policy cannot be applied: {error}") from error
        logger.warning("gradiometer run: %s is not measured: %s", type(optimizer).__name__, error)
        return False
    agent.gives_way = True
    if multiprocessing.parent_process() is not None:  # which ends without the interpreter's own exit
        _detach_at_the_end_of(os.getpid())
    if not settings.verbose and settings.policy is None:
        for name in _OF_THE_PROGRAM:  # the program's output stays its own
            logging.getLogger(f"gradiometer.{name}").setLevel(logging.ERROR)
    if settings.verbose:
        names = ", ".join(type(each).__name__ for each in found.optimizers)
        # In one write, line end and all: the ranks of a job write to one stderr at the same time.
        sys.stderr.write(f"gradiometer: process {os.getpid()} measures {names} in {agent.path}\n")
    return True


@functools.cache
def _detach_at_the_end_of(process: int) -> None:
    del process  # in whose place a child that it forks is another
    multiprocessing.util.Finalize(None, _detach_all, exitpriority=0)


def _detach_all() -> None:
    for agent in session.live_agents():
        agent.detach()


def _attach_to(found: Found, settings: LaunchSettings) -> session.Agent:
    root = Path(settings.dir)
    if capturing():
        raise RuntimeError("its first step is captured into a CUDA graph: take one before the capture")
    run_id, claimed = _choose_id(root, settings.run_id)
    try:
        agent = session.attach(
            found.model,
            found.optimizers,
            policy=settings.policy,
            run_id=run_id,
            dir=root,
            backward=settings.backward,
            labels=settings.labels,
            together=found.together,
            updates_every=settings.updates_every,
            cosine=settings.cosine,
            patience=PATIENCE,
            ring_bytes=session.RING_BYTES if settings.ring_bytes is None else settings.ring_bytes,
        )
    except BaseException:
        if claimed:
            with contextlib.suppress(OSError):  # it is not empty: somebody else's by now
                (root / run_id).rmdir()
        raise
    _attached.append(run_id)
    return agent


def _choose_id(root: Path, wanted: str) -> tuple[str, bool]:
    """Return the id of this process's next run, and whether its directory was made to claim it."""
    if rank_and_world()[1] > 1:
        agreed = agree_on(wanted)
        return agreed if not _attached else f"{agreed}-{len(_attached) + 1}", False
    for attempt in count(1):
        chosen = wanted if attempt == 1 else f"{wanted}-{attempt}"
        with contextlib.suppress(FileExistsError):
            (root / chosen).mkdir(parents=True, mode=0o700)
            break
    return chosen, True
