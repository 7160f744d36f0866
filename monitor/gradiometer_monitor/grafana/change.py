"""What became of a thing that is put into a Grafana."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CHANGED", "Change", "State"]

State = Literal["created", "updated", "unchanged", "kept", "failed"]
CHANGED = ("created", "updated")


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What became of one thing in Grafana, or with a dry run would become."""

    what: Literal["folder", "datasource", "dashboard", "alerts"]
    uid: str
    """For alerts the name of the group of rules, which has no uid."""
    name: str
    state: State
    """``kept``: it differs and was left as it is; ``detail`` says why, and what to do."""
    detail: str = ""
    passing: bool = False
    """Whether what failed may succeed by itself, later."""
