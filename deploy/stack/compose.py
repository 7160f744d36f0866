"""What docker-compose.yml says of a service, and the same without containers: its files and addresses on this host.

Guarantees: commands, settings and mounted files are those of the compose file. Files that are configuration are copied,
and in the copies, in commands and in variables two things are changed and nothing else: a path of a container
becomes the path here of what is mounted there, and an address of a service becomes its address on loopback.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

__all__ = ["PORTS", "Places", "Service", "load_services"]

PORTS = {"monitor": 9477, "prometheus": 9090, "alertmanager": 9093, "grafana": 3000}
"""Port of each service, in its container and, unless told otherwise, on loopback."""
CONFIGURATION = (".yml", ".yaml")
SECRETS = "/run/secrets"
Yaml = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """What the compose file says of a service, as far as it is needed without containers."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    mounts: Mapping[str, str]
    """What is mounted, by path in the container: a path of the repository, a named volume, or what a variable names."""


def load_services(file: Path) -> dict[str, Service]:
    """Read the services of a compose file, by name."""
    content: Yaml = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {
        name: Service(
            name=name,
            command=tuple(map(str, found.get("command", ()))),
            environment=found.get("environment", {}),
            mounts=dict(map(_mount, found.get("volumes", ()))),
        )
        for name, found in content["services"].items()
    }


def _mount(volume: str | Yaml) -> tuple[str, str]:
    """Return path in the container and source of a volume, in the short syntax or the long one."""
    if isinstance(volume, str):
        source, target = volume.split(":")[:2]
        return target, source
    return str(volume["target"]), str(volume["source"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where on this host is what the containers have."""

    repository: Path
    state: Path
    """Holds copies of the configuration and the data of the services."""
    runs: Path
    secrets: Path
    ports: Mapping[str, int]
    without: frozenset[str]
    """Services that are not started: what concerns them is left out of the configuration of the others."""

    def prepare(self, service: Service) -> dict[str, str]:
        """Put the files of a service in place; return paths here by path in its container."""
        paths = {SECRETS: str(self.secrets)}
        for target, source in service.mounts.items():
            paths[target] = str(self._place(service, target, source))
        for target, source in service.mounts.items():
            if source.startswith("./") and Path(paths[target]) != self.repository / source:
                self._copy(self.repository / source, Path(paths[target]), paths)
        return paths

    def _place(self, service: Service, target: str, source: str) -> Path:
        """Choose the path here of what is mounted at ``target``."""
        if given := re.fullmatch(r"\$\{GRADIOMETER_(DIR|SECRETS)\b[^}]*\}(.*)", source):
            return Path(f"{self.runs if given[1] == 'DIR' else self.secrets}{given[2]}")
        if not source.startswith("./"):
            (data := self.state / "data" / source).mkdir(parents=True, exist_ok=True)
            return data
        original = self.repository / source
        if not original.exists():
            raise FileNotFoundError(f"{original} is not there, which docker-compose.yml mounts into {service.name}")
        return self.state / "config" / service.name / target.lstrip("/") if _configuration(original) else original

    def _copy(self, source: Path, target: Path, paths: Mapping[str, str]) -> None:
        for file in _configuration(source):
            copy = target / file.relative_to(source) if source.is_dir() else target
            copy.parent.mkdir(parents=True, exist_ok=True)
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            for name in self.without:
                content = _leave_out(content, name)
            content = self._rewritten(content, paths)
            copy.write_text(yaml.safe_dump(content, sort_keys=False, width=10_000, allow_unicode=True), "utf-8")

    def _rewritten(self, content: Any, paths: Mapping[str, str]) -> Any:
        """Rewrite the texts of a document before they are YAML, in which a path may need quotes."""
        if isinstance(content, dict):
            return {key: self._rewritten(value, paths) for key, value in content.items()}
        if isinstance(content, list):
            return [self._rewritten(value, paths) for value in content]
        return self.rewrite(content, paths) if isinstance(content, str) else content

    def rewrite(self, text: str, paths: Mapping[str, str]) -> str:
        """Put the paths and addresses of this host in place of those of the containers."""
        changed = dict(paths)
        for name, port in PORTS.items():
            changed[f"{name}:{port}"] = changed[f"127.0.0.1:{port}"] = f"127.0.0.1:{self.ports[name]}"
        names = sorted(changed, key=len, reverse=True)
        before = {name: r"(?<![\w./-])" if name.startswith("/") else r"(?<![\w.-])" for name in names}
        pattern = "|".join(rf"{before[name]}{re.escape(name)}(?![\w-])" for name in names)
        return re.sub(pattern, lambda found: changed[found[0]], text)


def _configuration(source: Path) -> list[Path]:
    """Return the files of configuration that ``source`` is, or holds."""
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    return [file for file in files if file.suffix in CONFIGURATION]


def _leave_out(content: Any, service: str) -> Any:
    """Take a service's own section, and its scrape job, out of a document."""
    if not isinstance(content, dict):
        return content
    kept = {key: value for key, value in content.items() if key != service}
    if jobs := kept.get("scrape_configs"):
        kept["scrape_configs"] = [job for job in jobs if job["job_name"] != service]
    return kept
