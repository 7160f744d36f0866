"""The processes of the stack: started, told apart in what they print, and stopped by their own pids.

Guarantees: what was started is stopped when :class:`Processes` is left, in any way but SIGKILL; where ``setpriv`` is
(Debian's util-linux), the kernel ends them also then. Neither they nor the end wait for whoever reads the output.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

from deploy.stack.output import Output

__all__ = ["Part", "Processes", "StackError"]

STOP_SECONDS = 20.0
"""How long a process has to end in order, before it is killed."""
LOOK_SECONDS = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
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
        self._stopping = False  # no Event: a signal may come while its lock is held
        self._output = Output(self._ask_to_stop)

    def __enter__(self) -> Self:
        for number in SIGNALS:
            signal.signal(number, self._signalled)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._output.end()
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    @property
    def stopping(self) -> bool:
        """Whether somebody asked for the end."""
        return self._stopping

    def say(self, line: str, name: str = "stack") -> None:
        """Print a line, with the name of whose it is before it; it is left out where too many wait to be read."""
        self._output.say(f"{name:{self._width}} | {line}")

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
                time.sleep(LOOK_SECONDS)

    def watch(self) -> None:
        """Wait until somebody asks for the end. Raises StackError if a process ends before."""
        while not self.stopping:
            self.check()
            time.sleep(LOOK_SECONDS)

    def check(self) -> None:
        """Raise StackError if a process has ended."""
        for part, process, reader in self._started:
            if process.poll() is not None and not self.stopping:
                reader.join(1)
                status = process.returncode
                how = f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"
                raise StackError(f"{part.name} {how}: see its last lines")

    def _relay(self, part: Part, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        while line := process.stdout.readline(LINE_BYTES):
            self.say(line.decode(errors="replace").rstrip(), part.name)

    def _signalled(self, *_: object) -> None:
        if self.stopping:  # asked again: at once
            self._signal(signal.SIGKILL)
        self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        self._stopping = True

    def _stop(self) -> None:
        self._ask_to_stop()
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
