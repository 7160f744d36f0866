"""What is wrong with a policy, in the words of policies. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gradiometer import problems
from gradiometer.problems import Path, Problem, ProblemsError, guess, shorten, show_path

__all__ = ["Path", "PolicyError", "Problem", "explain", "guess", "shorten", "show_path"]


class PolicyError(ProblemsError):
    """A policy that cannot be used; the message names the source, the path in it, the value and what was expected."""


def explain(source: str, item: Mapping[str, Any], settings_at: Callable[[Path], Sequence[str]]) -> Problem:
    """Put an error of pydantic in words; ``settings_at`` gives the names of the settings that there are at a path."""
    said = problems.explain(source, item, settings_at)
    path = said.path
    misplaced = item["type"] == "extra_forbidden" and path[0] == "groups" and len(path) == 2
    if misplaced and isinstance(item["input"], str | Sequence):
        hint = f"no such setting; named groups stand under 'by': groups: {{by: {{{path[1]}: ...}}}}"
    elif item["type"] == "model_type":
        hint = "expected a mapping such as 'pipeline: [{global_norm: {max_norm: 1.0}}]'"
    else:
        return said
    return replace(said, expected=hint)
