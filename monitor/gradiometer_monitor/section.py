"""What sections of the monitor's settings are made of: models that say what they expected."""

from __future__ import annotations

from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict

__all__ = ["Section", "between"]


class Section(BaseModel):
    """Settings that belong together: immutable, and a name that does not exist is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, validate_default=True)


def between(low: float, high: float) -> Any:
    """Make the annotation of a number that must lie from ``low`` to ``high``."""

    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"expected a number from {low} to {high}")
        return value

    return AfterValidator(check)
