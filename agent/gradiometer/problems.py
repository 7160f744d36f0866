"""What is wrong with a file that a user wrote: where, what is there, and what was expected instead. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import PurePath
from typing import Any, Self, TypeAlias

__all__ = ["Path", "Problem", "ProblemsError", "explain", "guess", "shorten", "show_path"]

Path: TypeAlias = tuple[str | int, ...]
"""Keys and places that lead to a value in a file, from the top."""
LONGEST = 80
OF_PYDANTIC = ("<", "[")
"""How the parts begin that pydantic puts into a path for itself: branches of a union, and keys of a mapping."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One thing that is wrong; as a string one line, which editors can follow where line and column are known."""

    source: str
    """The file, or what else it came from."""
    path: Path = ()
    value: str = ""
    """What is there, as Python would write it; empty where nothing is, or too much."""
    expected: str
    line: int | None = None
    """Counted from 1, as :attr:`column` is."""
    column: int | None = None
    whole: str = "the policy"
    """What the empty path is called."""

    def __str__(self) -> str:
        place = "" if self.line is None else f":{self.line}:{self.column}"
        got = f" is {self.value}" if self.value else ""
        return f"{self.source}{place}: {show_path(self.path) or self.whole}{got}: {self.expected}"


class ProblemsError(ValueError):
    """What a user wrote cannot be used; the message names the source, the path in it, the value and the expectation."""

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)
        """Everything that is wrong, one by one, where the file could be read at all."""

    @classmethod
    def of(cls, problems: Sequence[Problem]) -> Self:
        """Return the error that says all of these, a line each."""
        return cls("\n".join(map(str, problems)), problems)


def show_path(path: Path) -> str:
    """Write a path as one would in Python: ``pipeline[0].global_norm.max_norm``; the empty one is empty."""
    shown = ""
    for part in path:
        shown += f"[{part}]" if isinstance(part, int) else f".{part}" if shown else part
    return shown


def guess(word: object, known: Iterable[str]) -> str:
    """Return ``, did you mean '…'?`` for a word that is nearly one of the known, else nothing."""
    close = get_close_matches(str(word), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def explain(source: str, item: Mapping[str, Any], settings_at: Callable[[Path], Sequence[str]]) -> Problem:
    """Put an error of pydantic in words; ``settings_at`` gives the names of the settings that there are at a path."""
    path = tuple(part for part in item["loc"] if not (isinstance(part, str) and part.startswith(OF_PYDANTIC)))
    silent = item["type"] == "missing" or isinstance(item["input"], Mapping)
    return Problem(
        source=source,
        path=path,
        value="" if silent else shorten(item["input"]),
        expected=_expected(item, path, settings_at),
    )


def _expected(item: Mapping[str, Any], path: Path, settings_at: Callable[[Path], Sequence[str]]) -> str:
    if item["type"] == "extra_forbidden":
        known = settings_at(path[:-1])
        return f"no such setting; there are {', '.join(known)}{guess(path[-1], known)}"
    if item["type"] == "tuple_type":
        return "expected a text or a list of texts"
    if item["type"] == "too_short":
        return "expected at least one"
    said = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "literal_error":
        return said + guess(item["input"], re.findall(r"'([^']*)'", item["ctx"]["expected"]))
    return said


def shorten(value: object) -> str:
    """Return what Python writes for a value, cut to some eighty characters."""
    shown = repr(str(value) if isinstance(value, PurePath) else value)
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 3] + "..."
