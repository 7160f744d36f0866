"""Put settings together: arguments before the environment, before a YAML file, before defaults; and say what is wrong.

Everything that is wrong is said at once, each with where it came from: line and column of the file, or the variable, or
the option. A value that is secret is in no message.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import ValidationError

from gradiometer.problems import Path as Place
from gradiometer.problems import Problem, ProblemsError, explain, guess
from gradiometer.records import default_root
from gradiometer.yaml_source import Source, read_source
from gradiometer_monitor.config.fields import ANY, PREFIX, field_at, leaves, redact, walk
from gradiometer_monitor.config.section import BASE, Section

__all__ = ["Resolved", "SettingsError", "resolve"]

CONFIG_VARIABLE = "GRADIOMETER_MONITOR_CONFIG"
ROOT_VARIABLE = "GRADIOMETER_DIR"
WHOLE = "the config"

S = TypeVar("S", bound=Section)


class SettingsError(ProblemsError):
    """A setting is out of its range, misspelt, or asks for what is refused; a line for each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved(Generic[S]):
    """Settings, and where each came from."""

    settings: S
    origins: dict[Place, str]
    """Option, variable, or file with its line, by path; what is not here is a default."""
    warnings: list[str] = field(default_factory=list)
    """Variables that look as if they were meant for the monitor, and give no setting."""

    def origin(self, path: Place) -> str:
        """Tell where the setting at a path came from."""
        found = (self.origins[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.origins)
        return next(found, "default")

    def lines(self) -> Iterator[tuple[str, str, str]]:
        """Yield name, value and origin of each setting; secrets are hidden."""
        for path, value in leaves(self.settings):
            name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
            shown = yaml.safe_dump(redact(value), default_flow_style=True, width=1000).removesuffix("\n...\n").strip()
            yield name, shown, self.origin(path)


def resolve(model: type[S], root: Path | None, config: Path | None, arguments: Mapping[str, Any]) -> Resolved[S]:
    """Resolve a model's settings; ``root`` is its ``dir``. Raises SettingsError."""
    source = Source(name="settings", raw={})
    if config is None and (named := os.environ.get(CONFIG_VARIABLE)):
        config = Path(named)
    if config is not None:
        source = read_source(config, "config", SettingsError)
        if not isinstance(source.raw, dict | None):
            raise SettingsError(f"{config}: expected settings by name, as in 'port: 9477'")
    chosen: dict[Any, Any] = {}
    origins: dict[Place, str] = {}
    for path, value in leaves(source.raw or {}):
        _put(chosen, origins, path, value, f"{source.name}:{source.place(path)[0]}")
    warnings = _take_environment(model, chosen, origins)
    for name, value in arguments.items():
        if value is not None:
            _put(chosen, origins, tuple(name.split("__")), value, f"--{name.replace('_', '-')}")
    _take_root(root, chosen, origins)
    return Resolved(settings=_validate(model, chosen, source, origins), origins=origins, warnings=warnings)


def _put(chosen: dict[Any, Any], origins: dict[Place, str], path: Place, value: Any, origin: str) -> None:
    """Put a value where its path leads; a list that is given anew takes the place of the whole old one."""
    inside: Any = chosen
    for place, part in enumerate(path[:-1]):
        below: Any = [] if isinstance(path[place + 1], int) else {}
        if isinstance(inside, list):
            inside.extend([None] * (int(part) + 1 - len(inside)))
            inside[int(part)] = inside[int(part)] or below
        elif not isinstance(inside.get(part), dict | list):
            inside[part] = below
        inside = inside[part]
    if not path:
        return
    if isinstance(inside, list):
        inside.extend([None] * (int(path[-1]) + 1 - len(inside)))
    inside[path[-1]] = value
    for known in [known for known in origins if known[: len(path)] == path]:
        del origins[known]
    origins[path] = origin


def _take_environment(model: type[Section], chosen: dict[Any, Any], origins: dict[Place, str]) -> list[str]:
    known = {field.variable: field for field in walk(model) if field.variable and field.path != ("dir",)}
    for variable, found in known.items():
        if text := os.environ.get(variable or ""):
            value: Any = text
            if Path in found.types:
                value = Path(text).expanduser()
            elif text.startswith(("[", "{")) and str not in found.types:
                value = _parsed(text)
            _put(chosen, origins, found.path, value, str(variable))
    names = [name for name in known if name] + [CONFIG_VARIABLE]
    unknown = sorted(name for name in os.environ if name.startswith(PREFIX) and name not in names)
    return [f"variable {name} gives no setting{guess(name, names)}" for name in unknown]


def _parsed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _take_root(root: Path | None, chosen: dict[Any, Any], origins: dict[Place, str]) -> None:
    if root is not None:
        _put(chosen, origins, ("dir",), root, "--dir")
    elif os.environ.get(ROOT_VARIABLE):
        _put(chosen, origins, ("dir",), default_root(None), ROOT_VARIABLE)
    elif "dir" not in chosen:
        chosen["dir"] = default_root(None)


def _validate(model: type[S], chosen: dict[Any, Any], source: Source, origins: dict[Place, str]) -> S:
    problems, settings = [*source.problems, *_by_field_name(model, chosen, source)], None
    base = Path(source.name).absolute().parent
    try:
        settings = model.model_validate(chosen, context={BASE: base})
    except ValidationError as error:
        problems += [_explain(model, item, source, origins) for item in error.errors(include_url=False)]
    if problems or settings is None:
        raise SettingsError.of(sorted(problems, key=lambda each: (each.line or 0, each.column or 0)))
    return settings


def _by_field_name(model: type[Section], chosen: dict[Any, Any], source: Source) -> Iterator[Problem]:
    """Take out what is called by the name that it has in the code, and not in files."""
    for name, info in model.model_fields.items():
        if info.alias and name in chosen:
            del chosen[name]
            line, column = source.place((name,))
            said = f"no such setting, did you mean {info.alias!r}?"
            yield Problem(source=source.name, path=(name,), expected=said, line=line, column=column)


def _explain(model: type[Section], item: Any, source: Source, origins: dict[Place, str]) -> Problem:
    """Put an error in words, and say where what it is about came from."""
    said = explain(source.name, item, lambda path: _names(model, path))
    if item["type"] == "missing":
        said = replace(said, expected="is not given, and must be")
    elif item["type"] in ("model_type", "model_attributes_type", "dict_type"):
        said = replace(said, expected="expected settings by name")
    elif item["type"] in ("tuple_type", "list_type"):
        said = replace(said, expected="expected a list: '- ' before each entry")
    expected = said.expected.replace("Input should be", "expected")
    found = field_at(model, said.path)
    hidden = item["type"] == "extra_forbidden" or (found is not None and found.secret)
    value = "" if hidden else str(redact(said.value))
    if value.startswith("'tcp://"):
        expected += "; Kubernetes sets this for a service named gradiometer-monitor: enableServiceLinks: false"
    said = replace(said, expected=expected, value=value, whole=WHOLE)
    origin = next((origins[said.path[:end]] for end in range(len(said.path), 0, -1) if said.path[:end] in origins), "")
    if origin and not origin.startswith(f"{source.name}:"):
        return replace(said, source=origin)
    line, column = source.place(said.path)
    return replace(said, line=line, column=column)


def _names(model: type[Section], path: Place) -> list[str]:
    """Return the names of the settings that there are in the section at a path."""
    found: dict[str, None] = {}
    for known in walk(model):
        if len(known.path) > len(path) and all(a in (ANY, b) for a, b in zip(known.path, path, strict=False)):
            found[known.path[len(path)]] = None
    return [name for name in found if name != ANY]
