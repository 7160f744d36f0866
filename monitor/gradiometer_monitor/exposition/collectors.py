"""Sources of a scrape, each called in a thread of its own: none that fails or hangs holds up the others.

Guarantees: a source is asked once at a time, so that one that hangs costs one thread; an answer that came too late is
thrown away.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from logging import getLogger
from typing import Generic, TypeVar

__all__ = ["Answer", "Asked"]

log = getLogger(__name__)

Found = TypeVar("Found")


@dataclass(slots=True)
class Answer(Generic[Found]):
    """What a source answered."""

    found: Found | None = None
    error: BaseException | None = None
    seconds: float = 0.0
    done: threading.Event = field(default_factory=threading.Event)


class Asked(Generic[Found]):
    """One source: :meth:`begin` asks it, :meth:`finish` has what it answered by then. For one thread."""

    def __init__(self, name: str, collect: Callable[[], Found]) -> None:
        self.name, self._collect = name, collect
        self._current: Answer[Found] | None = None
        self._begun = 0.0
        self._late = self._warned = False

    def begin(self) -> None:
        """Ask the source, unless it still owes the answer to an earlier scrape."""
        self._late = self._current is not None and not self._current.done.is_set()
        if self._late:
            return
        self._current, self._begun = Answer(), time.monotonic()
        thread = threading.Thread(
            target=_answer, args=(self._current, self._collect), name=f"gradiometer-collect-{self.name}", daemon=True
        )
        thread.start()

    def ask(self) -> Answer[Found]:
        """Ask in this thread and wait: for a source that cannot hang."""
        answer = Answer[Found]()
        _answer(answer, self._collect)
        return answer

    def finish(self, deadline: float) -> Answer[Found]:
        """Wait for the answer until ``deadline``, monotonic; one that hung in the scrape before is not waited for."""
        answer = self._current
        assert answer is not None, "begin() comes first"
        if not self._late:
            answer.done.wait(max(0.0, deadline - time.monotonic()))
        if self._late or not answer.done.is_set():
            seconds = time.monotonic() - self._begun
            answer = Answer(error=TimeoutError(f"no answer for {seconds:.1f} s"), seconds=seconds)
        return answer

    def tell(self, error: BaseException | None) -> None:
        """Log why the source failed, once until it succeeds."""
        if error is not None and not self._warned:
            trace = None if isinstance(error, TimeoutError) else error
            log.error("collector %s failed (%s), and says so once until it succeeds", self.name, error, exc_info=trace)
        self._warned = error is not None


def _answer(answer: Answer[Found], collect: Callable[[], Found]) -> None:
    started = time.perf_counter()
    try:
        answer.found = collect()
    except Exception as error:  # a collector that fails, for whatever reason, must not lose the scrape
        answer.error = error
    answer.seconds = time.perf_counter() - started
    answer.done.set()
