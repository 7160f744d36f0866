"""The keyboard of a terminal: keys one by one, without waiting for a line, and the terminal as it was in the end."""

from __future__ import annotations

import os
import select
import termios
from types import TracebackType
from typing import Self

__all__ = ["Keyboard"]

ESCAPE_SECONDS = 0.05
"""What follows ESC within it belongs to it: an arrow, and not the key."""
NAMED = {
    "\x1b[A": "up", "\x1bOA": "up", "\x1b[B": "down", "\x1bOB": "down", "\x1b[C": "right", "\x1bOC": "right",
    "\x1b[D": "left", "\x1bOD": "left", "\x1b[5~": "page up", "\x1b[6~": "page down", "\x1b[H": "home",
    "\x1b[1~": "home", "\x1b[F": "end", "\x1b[4~": "end", "\x1b": "escape", "\r": "enter", "\n": "enter",
    "\x7f": "backspace", "\x08": "backspace",
}  # fmt: skip


class Keyboard:
    """Reads keys from ``descriptor``, a terminal, which within ``with`` neither echoes nor waits for lines.

    Control-C still interrupts; Control-Z is a key, because a screen that is stopped would be left as it is.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._before = termios.tcgetattr(descriptor)

    def __enter__(self) -> Self:
        mode = termios.tcgetattr(self._descriptor)
        mode[3] &= ~(termios.ICANON | termios.ECHO)
        mode[6] = list(mode[6])
        mode[6][termios.VMIN], mode[6][termios.VTIME], mode[6][termios.VSUSP] = 1, 0, b"\0"
        termios.tcsetattr(self._descriptor, termios.TCSADRAIN, mode)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)

    def read(self) -> list[str] | None:
        """Return the keys that were pressed, named or as their character, None at the end of the input."""
        data = self._take()
        if data == b"":
            return None
        while (
            data.endswith((b"\x1b", b"\x1b[", b"\x1bO"))
            and select.select([self._descriptor], [], [], ESCAPE_SECONDS)[0]
        ):
            data += self._take()
        return _split(data.decode("utf-8", "ignore"))

    def _more(self) -> bool:
        return bool(select.select([self._descriptor], [], [], ESCAPE_SECONDS)[0])

    def _take(self) -> bytes:
        try:
            return os.read(self._descriptor, 1024)
        except OSError:  # the terminal is gone
            return b""


def _split(text: str) -> list[str]:
    keys = []
    while text:
        name = next((code for code in sorted(NAMED, key=len, reverse=True) if text.startswith(code)), text[0])
        if name == "\x1b" and text[1:2] in ("[", "O"):  # a sequence that means nothing here
            end = next((at for at, char in enumerate(text[2:], 2) if char.isalpha() or char == "~"), len(text) - 1)
            text = text[end + 1 :]
            continue
        keys.append(NAMED.get(name, name))
        text = text[len(name) :]
    return keys
