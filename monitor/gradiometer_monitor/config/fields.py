"""The tree of the settings: where each one is, what it is called, and how a nested value is merged and found."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from gradiometer.problems import Path as Place
from gradiometer_monitor.config.section import Section, kinds

__all__ = ["ANY", "PREFIX", "Field", "field_at", "leaves", "redact", "walk"]

ANY = "*"
"""In a path: each place of a list, or each key of a mapping."""
PREFIX = "GRADIOMETER_MONITOR_"
USER_INFO = re.compile(r"(?<=://)[^/?#\s@]*@")
HIDDEN = "***"


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One setting, which is not a section."""

    path: tuple[str, ...]
    info: FieldInfo
    section: type[Section]

    @property
    def variable(self) -> str | None:
        """The environment variable that gives it; None within lists, which are given as a whole."""
        return None if ANY in self.path else PREFIX + "__".join(self.path).upper()

    @property
    def types(self) -> set[Any]:
        return set(kinds(self.info.annotation))

    @property
    def secret(self) -> bool:
        """Whether its value must not be shown."""
        return SecretStr in self.types


def walk(model: type[Section], path: tuple[str, ...] = ()) -> Iterator[Field]:
    """Yield every setting of a model and of its sections, in their order; a list of sections, and then their own."""
    for name, info in model.model_fields.items():
        here = (*path, info.alias or name)
        sections = [kind for kind in kinds(info.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
        several = any(origin in str(info.annotation) for origin in ("tuple[", "list[", "dict["))
        if several or not sections:
            yield Field(path=here, info=info, section=model)
        for section in sections:
            yield from walk(section, (*here, ANY) if several else here)


def field_at(model: type[Section], path: Place) -> Field | None:
    """Return the setting at a path, in which places of lists are numbers."""
    return next((field for field in walk(model) if _matches(field.path, path)), None)


def _matches(known: Sequence[str], path: Place) -> bool:
    return len(known) == len(path) and all(a in (ANY, b) for a, b in zip(known, path, strict=True))


def leaves(value: Any, path: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yield what is at each path of a nested value or model, by the names that files use."""
    if isinstance(value, BaseModel):
        value = {info.alias or name: getattr(value, name) for name, info in type(value).model_fields.items()}
    if isinstance(value, Mapping) and value:
        for key, below in value.items():
            yield from leaves(below, (*path, key))
    elif isinstance(value, list | tuple) and any(isinstance(each, BaseModel | Mapping) for each in value):
        for place, each in enumerate(value):
            yield from leaves(each, (*path, place))
    else:
        yield path, value


def redact(value: Any) -> Any:
    """Return a value as it may be shown: no secret, and no password in a URL."""
    if isinstance(value, SecretStr):
        return HIDDEN
    if isinstance(value, list | tuple):
        return [redact(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): redact(each) for key, each in value.items()}
    if isinstance(value, str | Path):
        return USER_INFO.sub(f"{HIDDEN}@", str(value))
    return value if isinstance(value, bool | int | float | None) else USER_INFO.sub(f"{HIDDEN}@", str(value))
