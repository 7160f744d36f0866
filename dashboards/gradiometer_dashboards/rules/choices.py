"""What somebody who installs the rules may choose, read and checked; what is wrong is a ValueError that says so."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any
from urllib.parse import urlsplit

from gradiometer_dashboards.thresholds import THRESHOLDS, Thresholds

__all__ = ["read_job", "read_labels", "read_thresholds", "read_url", "split_thresholds"]

OWN_LABELS = ("alertname", "severity", "layer", "rank", "policy", "job", "run_id", "instance", "gpu", "receiver")
"""Labels that an alert has already, or must not have."""
SHARES = ("clip_ratio", "scaled_nonfinite_ratio")
"""Thresholds that are at most 1."""


def read_url(value: str) -> str:
    """Check what links begin with."""
    if "@" in value:
        raise ValueError("it holds a user or a password, which links would show to everybody; leave them out")
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.netloc or re.search(r"[\s{}?#]", value):
        raise ValueError(f"{value!r} is no address that a path can follow; give one like http://host:3000")
    return value


def read_job(value: str) -> str:
    """Check a regular expression that is put between quotes into a query."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{value!r} is no regular expression ({error}); give one like gradiometer.*") from error
    if not value or re.search(r'["\\\n]', value):
        raise ValueError(f"{value!r} is empty, or holds a quote or a backslash; give one like gradiometer.*")
    return value


def read_labels(given: Sequence[str]) -> tuple[str, ...]:
    """Check labels that alerts are to keep, each once."""
    for name in given:
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name) or name.startswith("__"):
            raise ValueError(f"{name!r} is no name of a label; give one that your scrapes add, like cluster")
        if name in OWN_LABELS:
            raise ValueError(f"{name!r} is a label that alerts have, or that would split them; leave it out")
    return tuple(dict.fromkeys(given))


def read_thresholds(given: Mapping[str, object]) -> Thresholds:
    """Put those that are given, as numbers or as texts, in the place of the usual ones."""
    known = {field.name: getattr(THRESHOLDS, field.name) for field in fields(Thresholds)}
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"there is no threshold {name!r}; there are: {', '.join(known)}")
        chosen[name] = _number(name, str(value), whole=isinstance(known[name], int))
    return replace(THRESHOLDS, **chosen)


def split_thresholds(given: Sequence[str]) -> dict[str, str]:
    """Split THRESHOLD=VALUE."""
    return {name: text for name, _, text in (item.partition("=") for item in given)}


def _number(name: str, text: str, *, whole: bool) -> float:
    most = 1.0 if name in SHARES else 1e9
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= most:
        kind = "a whole number" if whole else "a number"
        usual = getattr(THRESHOLDS, name)
        raise ValueError(f"{name}={text!r} is not {kind} from 0 to {most:g}; by default it is {usual:g}")
    return value
