"""A service of remote write that is worked by hand, and what a test looks at of it."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.remote_write.service import RemoteWrite
from gradiometer_monitor.remote_write.settings import RemoteWriteSettings
from gradiometer_monitor.services import Context
from gradiometer_monitor.store import Store
from tests._receivers import Stub

if TYPE_CHECKING:
    from tests.conftest import WaitUntil

NAN = float("nan")
STALE = 0x7FF0000000000002
OK = (204, b"", dict[str, str]())
Push = Callable[..., "Pusher"]


class Pusher:
    """A service that is worked by hand, over the runs of a directory."""

    def __init__(self, root: Path, store: Store, url: str, **settings: Any) -> None:
        self.runs = Runs(root, retention_seconds=900)
        self.context = Context(runs=self.runs, events=Events(self.runs, store), store=store)
        chosen = {"name": "db", "url": url, "timeout_seconds": 60, "backoff_max_seconds": 0.1} | settings
        self.service = RemoteWrite(RemoteWriteSettings.model_validate(chosen), self.context)

    def work(self) -> None:
        """Look at the runs until all is read, and send what there is."""
        while self.runs.poll():
            pass
        self.service.work()

    def count(self, name: str, *labels: str) -> float:
        """Return a metric of the service."""
        found = {(each, values): value for each, values, value in self.service.samples()}
        return found[f"gradiometer_remote_write_{name}", ("db", *labels)]

    def until(self, wait_until: WaitUntil, check: Callable[[], Any]) -> None:
        """Work until that is so."""

        def worked() -> Any:
            self.work()
            return check()

        wait_until(worked)

    def close(self) -> None:
        self.service.stopping.set()
        self.service.close()
        self.runs.close()


@contextmanager
def pushing(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Push]:
    """Give a function that makes a service for a receiver's URL, over the runs of a directory, and close them all.

    It holds a run's newest row back for as long as a slow host may need.
    """
    monkeypatch.setattr("gradiometer_monitor.remote_write.feed.SETTLE_SECONDS", 600.0)
    made: list[Pusher] = []

    def make(url: str, *, store: Store | None = None, **settings: Any) -> Pusher:
        made.append(Pusher(root, store or Store(None), url, **settings))
        return made[-1]

    yield make
    for pusher in made:
        pusher.close()


def recent(count: int, *, apart_ns: int = 10**9, ago: float = 600.0) -> list[int]:
    """Return times of rows, in nanoseconds, evenly spaced and on whole milliseconds."""
    first = int((time.time() - ago) * 1000) * 10**6
    return [first + place * apart_ns for place in range(count)]


def values(stub: Stub, name: str) -> list[float]:
    """Return the values of the only series of a metric, without stale markers."""
    (samples,) = stub.named(name)
    return [value for _, value in samples if not is_stale(value)]


def is_stale(value: float) -> bool:
    return struct.pack("<d", value) == struct.pack("<Q", STALE)
