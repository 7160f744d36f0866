"""What can be asked of the settings without a monitor that runs: the schema for editors, and a check of a config."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradiometer.problems import Path as Place
from gradiometer_monitor.config.fields import leaves
from gradiometer_monitor.config.resolving import Resolved
from gradiometer_monitor.config.section import UNITS
from gradiometer_monitor.config.settings import Settings

__all__ = ["SCHEMA", "make_schema", "show", "unreadable_files", "unusable_state"]

SCHEMA = Path(__file__).with_name("schema.json")
"""The schema as it is shipped."""
WRITTEN = ("port_file",)
"""Files that the monitor writes; the others it reads."""
FILE_NAMES = ("_file", "_certificate", "_key")
"""How the names of settings end that give a file to be read."""


def make_schema() -> str:
    """Make the JSON Schema of config files, as text."""
    schema = Settings.model_json_schema(by_alias=True)
    schema["required"] = [name for name in schema.get("required", []) if name != "dir"]  # other places give it
    for section in (schema, *schema["$defs"].values()):
        for name, described in section.get("properties", {}).items():
            _allow_units(name, described)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Config of the gradiometer monitor"}
    return json.dumps(schema | head, indent=1, ensure_ascii=False) + "\n"


def _allow_units(name: str, described: dict[str, Any]) -> None:
    """Allow a text where a number with a unit is allowed."""
    units = UNITS.get(name.rpartition("_")[2])
    kinds = described.get("anyOf") or [{"type": described.get("type")}]
    if units is None or not any(kind.get("type") in ("integer", "number") for kind in kinds):
        return
    bounds = {key: described.pop(key) for key in ("minimum", "maximum") if key in described}
    if "anyOf" not in described:
        described["anyOf"] = [{"type": described.pop("type"), **bounds}]
    described["anyOf"].append({"type": "string", "pattern": rf"^[0-9]+(\.[0-9]+)? ?({'|'.join(units)})$"})


def show(resolved: Resolved[Settings]) -> str:
    """Write the settings as a table: name, value without secrets, and where it came from."""
    rows = [("setting", "value", "from"), *resolved.lines()]
    name, value = (min(60, max(len(row[column]) for row in rows)) for column in (0, 1))
    return "\n".join(f"{row[0]:{name}}  {row[1]:{value}}  {row[2]}" for row in rows)


def unreadable_files(resolved: Resolved[Settings]) -> Iterator[str]:
    """Say of each file that the settings name, and that is to be read, why it cannot be."""
    for path, value in leaves(resolved.settings):
        if isinstance(value, Path) and str(path[-1]).endswith(FILE_NAMES) and path[-1] not in WRITTEN:
            try:
                value.open("rb").close()
            except OSError as error:
                yield f"{resolved.origin(path)}: {_name(path)} is {str(value)!r}: cannot be read ({error.strerror})"


def unusable_state(resolved: Resolved[Settings]) -> Iterator[str]:
    """Say why the monitor would work from memory, if ``state_dir`` is given and cannot be made or written."""
    wanted = resolved.settings.state_dir
    if wanted is None:
        return
    there = next(each for each in (wanted.absolute(), *wanted.absolute().parents) if os.access(each, os.F_OK))
    if not there.is_dir():
        reason = f"{there} is no directory"
    elif not os.access(there, os.W_OK | os.X_OK):
        reason = f"this user may not write in {there}"
    else:
        return
    yield (
        f"{resolved.origin(('state_dir',))}: state_dir is {str(wanted)!r}: cannot be used ({reason}), so nothing would "
        "be remembered over a restart; give a directory that this user can make and write"
    )


def _name(path: Place) -> str:
    return ".".join(map(str, path))
