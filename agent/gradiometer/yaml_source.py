"""A file that a user wrote in YAML, with the line and column of everything in it. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path as File
from typing import Any

import yaml

from gradiometer.problems import Path, Problem, ProblemsError, shorten

__all__ = ["Source", "read_source"]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 as editors read it, where PyYAML is of 1.1: ``on`` is a text, and ``1e-8`` a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the parent has it
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOL, [*"tTfF"])
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, [*"-+.0123456789"])


@dataclass(kw_only=True, slots=True)
class Source:
    """What a file holds, and where."""

    name: str
    raw: object
    root: yaml.Node | None = None
    problems: list[Problem] = field(default_factory=list)
    """Keys that are given twice, of which YAML would quietly take the last."""

    def place(self, path: Path) -> tuple[int | None, int | None]:
        """Return line and column, from 1, of what is at ``path``, or of the nearest that there is above it.

        Where the last part is a key whose value is plain, that is the value's place; else the key's.
        """
        node, key = self.root, None
        for part in path:
            below = _child(node, part)
            if below is None:
                break
            key, node = below
        found = key if key is not None and not isinstance(node, yaml.ScalarNode) else node
        return (None, None) if found is None else _line_column(found.start_mark)


def read_source(path: File, what: str, error: type[ProblemsError]) -> Source:
    """Read a YAML file that holds a ``what``; raises ``error`` that says where, if it cannot be read or is not YAML."""
    try:
        text = path.read_text(encoding="utf-8")
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            raw = None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except FileNotFoundError as missing:
        raise error(f"{what} file {path} does not exist") from missing
    except (OSError, UnicodeDecodeError) as unreadable:
        raise error(f"{what} file {path} cannot be read: {unreadable}") from unreadable
    except yaml.YAMLError as wrong:
        raise error.of([_not_yaml(path, what, wrong)]) from wrong
    source = Source(name=str(path), raw=raw, root=root)
    source.problems += [replace(problem, whole=f"the {what}") for problem in _doubles(source.name, root, ())]
    return source


def _not_yaml(path: File, what: str, error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    line, column = (None, None) if mark is None else _line_column(mark)
    said = str(getattr(error, "problem", None) or error)
    if "'\\t'" in said:
        said = "a line begins with a tab: indent with spaces"
    return Problem(source=str(path), value="not YAML", expected=said, line=line, column=column, whole=f"the {what}")


def _child(node: yaml.Node | None, part: str | int) -> tuple[yaml.Node | None, yaml.Node] | None:
    """Return key and value of a part of a mapping, or a place in a list; a bare name is its own mapping."""
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return None, node.value[part]
    if isinstance(node, yaml.MappingNode):
        return next(((key, value) for key, value in node.value if key.value == part), None)
    return None


def _doubles(name: str, node: yaml.Node | None, path: Path) -> Iterator[Problem]:
    if isinstance(node, yaml.SequenceNode):
        for place, each in enumerate(node.value):
            yield from _doubles(name, each, (*path, place))
    elif isinstance(node, yaml.MappingNode):
        seen: set[Any] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    line, column = _line_column(key.start_mark)
                    said = f"{shorten(key.value)} is given twice, expected once"
                    yield Problem(source=name, path=path, expected=said, line=line, column=column)
                seen.add(key.value)
                yield from _doubles(name, value, (*path, key.value))


def _line_column(mark: Any) -> tuple[int, int]:
    return mark.line + 1, mark.column + 1
