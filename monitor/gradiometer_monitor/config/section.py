"""What sections of the monitor's settings are made of: models that name what they expected, units, paths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationInfo, field_validator
from pydantic_core import CoreSchema, core_schema

__all__ = ["BASE", "UNITS", "Range", "Section", "between", "is_loopback", "kinds", "placed"]

BASE = "base"
"""In the context of a validation: the directory that relative paths, given as texts, begin at."""
UNITS: dict[str, dict[str, float]] = {
    "seconds": {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400},
    "bytes": {unit + "B": 1000**power for power, unit in enumerate(("", "k", "M", "G", "T"))}
    | {unit + "iB": 1024**power for power, unit in enumerate(("K", "M", "G", "T"), start=1)},
    "days": {"d": 1, "w": 7},
}
"""What a number may be followed by, in settings whose names end so."""
_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\s*")


class Section(BaseModel):
    """Settings that belong together: immutable, and a name that does not exist is an error."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, validate_default=True, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: ValidationInfo) -> Any:
        """Take the unit off a number, and put the directory of the config file before a relative path."""
        if info.field_name is None:
            return value
        if Path in kinds(cls.model_fields[info.field_name].annotation):
            return placed(value, info)
        if not isinstance(value, str):
            return value
        units = UNITS.get(info.field_name.rpartition("_")[2], {})
        found = _AMOUNT.fullmatch(value) if units else None
        if found is None:
            return value
        if found[2] not in units:
            raise ValueError(f"expected a number, or one with a unit of {', '.join(units)}")
        amount = float(found[1]) * units[found[2]]
        return int(amount) if amount.is_integer() else amount


def placed(value: Any, info: ValidationInfo) -> Any:
    """Make paths of texts, also within a list or as the values of a mapping; relative ones begin at the config file."""
    if isinstance(value, dict):
        return {key: placed(each, info) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [placed(each, info) for each in value]
    if not isinstance(value, str):
        return value
    base, path = (info.context or {}).get(BASE), Path(value).expanduser()
    return path if base is None else base / path


def kinds(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation is made of."""
    arguments = get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments:
        yield from kinds(argument)


@dataclass(frozen=True, slots=True)
class Range:
    """The bounds of a number, which are in the error, in the schema and in the documentation; None is passed over."""

    low: float
    high: float

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        made = handler(schema)
        for kind in made.get("anyOf", [made]):
            if kind.get("type") in ("integer", "number"):
                kind.update(minimum=self.low, maximum=self.high)
        return made

    def _check(self, value: float | None) -> float | None:
        if value is not None and not self.low <= value <= self.high:
            raise ValueError(f"expected a number from {self.low} to {self.high}")
        return value


def between(low: float, high: float) -> Any:
    """Make the annotation of a number that must lie from ``low`` to ``high``."""
    return Range(low, high)


def is_loopback(host: str) -> bool:
    """Tell whether a host, as a setting names it, is this one seen from itself; no name but localhost is looked up."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
