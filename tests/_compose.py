"""The compose file, read as compose reads it; what imports this belongs to the repository and skips without it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docker-compose.yml"
if not FILE.exists():
    pytest.skip("the compose file belongs to the repository, not to the wheel", allow_module_level=True)

from deploy.stack.compose import PORTS, Places, load_services  # noqa: E402 - it is there only where the file is

__all__ = [
    "FILE",
    "OWN",
    "PORTS",
    "REQUIRED",
    "ROOT",
    "SERVICES",
    "Places",
    "interpolated",
    "load_services",
    "read_yaml",
    "service_of",
]

Yaml = dict[str, Any]
SERVICES = ("alertmanager", "demo", "grafana", "monitor", "prometheus")
OWN = ("monitor", "demo")
"""Services whose images are built here."""
REQUIRED = re.compile(r"\$\{(\w+)(?::([?-])([^}]*))?\}")
"""A variable, the kind of what stands behind it, and that."""


def read_yaml(path: Path) -> Yaml:
    """Read a file that holds one document."""
    content: Yaml = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def service_of(name: str) -> Yaml:
    """Give a service as the compose file has it."""
    service: Yaml = read_yaml(FILE)["services"][name]
    return service


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """Put variables in as compose does. Raises KeyError with what compose says of one that is missing."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if given := variables.get(name):
            return given
        if kind != "-":
            raise KeyError(rest or "")
        return str(rest)

    return REQUIRED.sub(value, text)
