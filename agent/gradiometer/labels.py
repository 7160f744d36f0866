"""The labels that a user gives a run: what metrics can carry of them. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["check_labels"]

MAX_LABELS, MAX_LABEL_LENGTH = 16, 128


def check_labels(labels: Mapping[str, str] | None) -> dict[str, str]:
    """Return the labels as strings; raises ValueError for a name or a number of them that metrics cannot carry."""
    if not isinstance(labels, Mapping | None):
        raise TypeError(f"labels is a {type(labels).__name__}, expected a mapping of names to strings")
    labels = dict(labels or {})
    if len(labels) > MAX_LABELS:
        raise ValueError(f"labels has {len(labels)} entries, expected at most {MAX_LABELS}")
    for name, value in labels.items():
        if not isinstance(name, str) or not (name.isascii() and name.isidentifier()) or name.startswith("__"):
            raise ValueError(
                f"label name {name!r}: expected letters, digits and '_', not starting with a digit or '__'"
            )
        if not isinstance(value, str) or len(value) > MAX_LABEL_LENGTH:
            raise ValueError(
                f"label {name} is {value!r:.40}, expected a string of at most {MAX_LABEL_LENGTH} characters"
            )
    return labels
