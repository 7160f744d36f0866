"""The processes of the stack: started, told apart in what they print, and stopped by their own pids.

Guarantees: what was started is stopped when :class:`Processes` is left, in any way but SIGKILL; where ``setpriv`` is
(Debian's util-linux), the kernel ends them also then.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

__all__ = ["Part", "Processes", "StackError"]

STOP_SECONDS = 20.0
"""How long a process has to end in order, before it is killed."""
LOOK_SECONDS = 0.2
LINE_BYTES = 16_384
"""A longer line of a part is several: one that never ends fills no memory."""


class StackError(Exception):
    """The stack cannot be started, or has ended; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One process of the stack."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to that of the stack."""
    health: str | None = None
    """URL that answers 200 once it works."""


class Processes:
    """The processes that were started, and whether they shall end."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._started: list[tuple[Part, subprocess.Popen[bytes], threading.Thread]] = []
        self._stopping = threading.Event()
        self._output = threading.Lock()

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._stop_asked)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    @property
    def stopping(self) -> bool:
        """Whether somebody asked for the end."""
        return self._stopping.is_set()

    def say(self, line: str, name: str = "stack") -> None:
        """Print a line, with the name of whose it is before it."""
        with self._output, contextlib.suppress(ValueError):
            try:
                print(f"{name:{self._width}} | {line}", flush=True)
            except BrokenPipeError:  # nobody reads any more
                self._stopping.set()
                sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - for as long as we live

    def start(self, part: Part) -> None:
        """Start a process in a session of its own, out of reach of the terminal's Ctrl-C."""
        bound = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
        process = subprocess.Popen(
            [*bound, *part.command],
            env=os.environ | part.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        reader = threading.Thread(target=self._relay, args=(part, process), daemon=True)
        self._started.append((part, process, reader))
        reader.start()

    def await_health(self, seconds: float) -> None:
        """Wait until all answer. Raises StackError if one ends, or has not answered after so many seconds."""
        deadline = time.monotonic() + seconds
        for part, _, _ in self._started:
            while part.health is not None and not self.stopping and not _answers(part.health):
                self.check()
                if time.monotonic() > deadline:
                    raise StackError(
                        f"{part.name} does not answer at {part.health} after {seconds:.0f} s: see its lines"
                    )
                self._stopping.wait(LOOK_SECONDS)

    def watch(self) -> None:
        """Wait until somebody asks for the end. Raises StackError if a process ends before."""
        while not self._stopping.wait(LOOK_SECONDS):
            self.check()

    def check(self) -> None:
        """Raise StackError if a process has ended."""
        for part, process, reader in self._started:
            if process.poll() is not None and not self.stopping:
                reader.join(1)
                raise StackError(f"{part.name} ended with status {process.returncode}: see its last lines")

    def _relay(self, part: Part, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while line := process.stdout.readline(LINE_BYTES):
            self.say(line.decode(errors="replace").rstrip(), part.name)

    def _stop_asked(self, *_: object) -> None:
        if self.stopping:  # asked again: at once
            self._signal(signal.SIGKILL)
        self._stopping.set()

    def _stop(self) -> None:
        self._stopping.set()
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        for _, process, _ in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self._signal(signal.SIGKILL)
        for _, process, reader in self._started:
            process.wait()
            reader.join(1)

    def _signal(self, number: signal.Signals) -> None:
        for _, process, _ in reversed(self._started):
            process.send_signal(number)  # to nobody, if it has ended


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False
