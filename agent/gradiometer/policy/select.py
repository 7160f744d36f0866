"""Choose parameters by name: globs, or regular expressions behind ``re:``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import translate

__all__ = ["compile_pattern", "select"]


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a glob (``blocks.*.bias``) or a regular expression (``re:blocks\\.[0-3]\\.``, found anywhere).

    Raises re.error for a bad expression.
    """
    if pattern.startswith("re:"):
        return re.compile(pattern[3:])
    return re.compile(translate(pattern))


def select(names: Sequence[str], match: Sequence[str], exclude: Sequence[str]) -> tuple[bool, ...]:
    """Tell for each name whether some ``match`` pattern (all names if there is none) and no ``exclude`` covers it.

    Raises ValueError for a pattern that covers no name (it is misspelt, or belongs to another model), and if none is
    left.
    """
    for pattern in (*match, *exclude):
        if not any(compile_pattern(pattern).search(name) for name in names):
            shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
            raise ValueError(f"pattern {pattern!r} matches no parameter; the model has {shown}")
    wanted = [compile_pattern(pattern) for pattern in match]
    unwanted = [compile_pattern(pattern) for pattern in exclude]
    chosen = tuple(
        (not wanted or any(p.search(name) for p in wanted)) and not any(p.search(name) for p in unwanted)
        for name in names
    )
    if not any(chosen):
        raise ValueError(f"match {list(match)} and exclude {list(exclude)} together leave no parameter")
    return chosen
