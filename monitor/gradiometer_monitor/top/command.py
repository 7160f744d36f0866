"""``gradiometer top``: the loop between the keyboard, the runs and the terminal."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from gradiometer.records import default_root
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.top.draw import ASCII, UNICODE
from gradiometer_monitor.top.follower import Follower, Snapshot
from gradiometer_monitor.top.keys import Keyboard
from gradiometer_monitor.top.screen import SORTS, State, chosen, render

__all__ = ["top"]

WIDE, TALL = 130, 60
"""Size of a snapshot where there is no terminal to have one."""
CATCH_UP_SECONDS = 10.0
"""How long a snapshot may read before it shows what it has."""
PAGE = 10


def top(
    run: Annotated[str | None, typer.Argument(help="Look at this run at once.")] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="Where runs live [env: GRADIOMETER_DIR; default: the user's state directory]."),
    ] = None,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=60.0)] = 1.0,
    ended_hours: Annotated[float, typer.Option(help="How long runs that are over are shown.", min=0.0)] = 24.0,
    once: Annotated[bool, typer.Option("--once", help="Print one snapshot and leave, as without a terminal.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the runs as JSON, once.")] = False,
) -> None:
    """Watch this host's runs in the terminal: no server, no torch."""
    runs = Runs(default_root(directory), retention_seconds=ended_hours * 3600)
    console = Console(highlight=False)
    state = State(mode="run" if run else "runs", selected=run, glyphs=_glyphs(console))
    screen = console.is_terminal and not console.is_dumb_terminal and sys.stdin.isatty()
    with _read_end() as (descriptor, wake):
        follower = Follower(runs, interval, wake)
        follower.select(run)
        try:
            if once or as_json or not screen:
                raise typer.Exit(_print_once(follower, state, console, as_json=as_json))
            follower.start()
            raise typer.Exit(_Loop(follower, state, console, descriptor).run(wake))
        finally:
            follower.stop()


def _glyphs(console: Console) -> Any:
    return UNICODE if "utf" in console.encoding.lower() else ASCII


@contextmanager
def _read_end() -> Iterator[tuple[int, Callable[[], None]]]:
    """Give a descriptor, and a function that makes it readable from any thread."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def wake() -> None:
        with suppress(OSError):  # full, so it is readable already; or the end has come
            os.write(writing, b".")

    try:
        yield reading, wake
    finally:
        os.close(reading)
        os.close(writing)


def _print_once(follower: Follower, state: State, console: Console, *, as_json: bool) -> int:
    deadline = time.monotonic() + CATCH_UP_SECONDS
    while (follower.look() or not follower.snapshot.ready) and time.monotonic() < deadline:
        pass
    snapshot = follower.snapshot
    if as_json:
        typer.echo(json.dumps([line.to_dict() for line in chosen(state, snapshot)], indent=1))
        return 0
    if state.mode == "run" and snapshot.view is None:
        typer.echo(f"gradiometer: run {state.selected!r} is not among those of {follower.root}", err=True)
        return 2
    width = console.width if console.is_terminal else WIDE
    height = len(snapshot.lines) + 4 if state.mode == "runs" else TALL
    for line in render(state, snapshot, width, max(height, 6), cursor=False)[:-1]:
        line.rstrip()
        if line or state.mode == "runs":
            console.print(line, soft_wrap=True)
    return 0


class _Loop:
    """The screen until the user leaves it."""

    def __init__(self, follower: Follower, state: State, console: Console, descriptor: int) -> None:
        self._follower, self._state, self._console, self._woken = follower, state, console, descriptor
        self._shown = Snapshot()
        self._leave = False

    def run(self, wake: Callable[[], None]) -> int:
        """Show the screen, and return the exit code: 0, or 130 after Control-C. SIGTERM and SIGHUP raise SystemExit."""
        keyboard = Keyboard(sys.stdin.fileno())
        with _signals(wake), _silence(), keyboard, Live(console=self._console, screen=True, auto_refresh=False) as live:
            try:
                while not self._leave:
                    self._draw(live)
                    self._wait(keyboard)
            except KeyboardInterrupt:
                return 130
        return 0

    def _draw(self, live: Live) -> None:
        if not self._state.paused:
            self._shown = self._follower.snapshot
        width, height = self._console.size
        lines = render(self._state, self._shown, width, height)
        live.update(Group(*map(_uncut, lines)), refresh=True)

    def _wait(self, keyboard: Keyboard) -> None:
        """Wait for a key, a look at the runs, or a new size of the terminal."""
        ready = select.select([sys.stdin, self._woken], [], [])[0]
        if self._woken in ready:
            os.read(self._woken, 4096)
        if sys.stdin in ready:
            keys = keyboard.read()
            self._leave |= keys is None
            for key in keys or ():
                self._press(key)

    def _press(self, key: str) -> None:
        state = self._state
        if state.typing:
            self._type(key)
        elif key == "q":
            self._leave = True
        elif key == "?":
            state.mode = "runs" if state.mode == "help" else "help"
            self._follower.select(None)
        elif key in ("p", " "):
            state.paused = not state.paused
        elif key in ("escape", "left", "backspace"):
            self._back()
        elif state.mode == "runs":
            self._press_in_list(key)
        elif state.mode == "run":
            last = len(self._shown.view.layers) - 1 if self._shown.view else 0
            state.first_layer = max(0, min(last, _moved(state.first_layer, key, last)))

    def _type(self, key: str) -> None:
        """Take a key into the filter."""
        state = self._state
        if key in ("enter", "escape"):
            state.typing, state.filter = False, state.filter if key == "enter" else ""
        elif key == "backspace":
            state.filter = state.filter[:-1]
        elif len(key) == 1 and key.isprintable():
            state.filter += key

    def _back(self) -> None:
        if self._state.mode == "runs":
            self._state.filter = ""
        self._state.mode, self._state.first_layer, self._state.paused = "runs", 0, False
        self._follower.select(None)

    def _press_in_list(self, key: str) -> None:
        state, names = self._state, [line.run_id for line in chosen(self._state, self._shown)]
        place = names.index(state.selected) if state.selected in names else 0
        if key == "s":
            order = list(SORTS)
            state.sort = order[(order.index(state.sort) + 1) % len(order)]
        elif key == "/":
            state.typing, state.filter = True, ""
        elif names and key in ("enter", "right"):
            state.selected, state.mode = names[place], "run"
            self._follower.select(state.selected)
        elif names:
            state.selected = names[max(0, min(len(names) - 1, _moved(place, key, len(names) - 1)))]


def _moved(place: int, key: str, last: int) -> int:
    steps = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -PAGE, "page down": PAGE, "home": -last, "end": last}
    return place + steps.get(key, 0)


def _uncut(line: Text) -> Text:
    line.no_wrap, line.overflow = True, "crop"
    return line


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the log off the screen, which says itself how many runs cannot be read."""
    logger, handler = logging.getLogger("gradiometer_monitor"), logging.NullHandler()
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


@contextmanager
def _signals(wake: Callable[[], None]) -> Iterator[None]:
    """Leave in order at SIGTERM and SIGHUP, and draw anew when the terminal has another size."""

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: wake())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
