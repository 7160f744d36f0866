"""The settings of the monitor: one model, filled from arguments, environment, a YAML file and defaults."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from gradiometer.policy.problems import PolicyError
from gradiometer.policy.source import read_source
from gradiometer.records import default_root
from gradiometer_monitor.alerts.settings import AlertSettings
from gradiometer_monitor.gpu import GpuSettings
from gradiometer_monitor.grafana.settings import GrafanaSettings
from gradiometer_monitor.logs import LogSettings
from gradiometer_monitor.remote_write.settings import RemoteWriteReceivers
from gradiometer_monitor.retention import RetentionSettings
from gradiometer_monitor.section import Section, between
from gradiometer_monitor.web.settings import AuthSettings, LimitSettings

__all__ = ["Settings", "SettingsError", "resolve"]

STATE = ".monitor"
"""Below the root, where no run can be: names of runs do not begin with a dot."""
ENVIRONMENT = ("host", "port", "poll_seconds", "series_budget", "retention_seconds", "port_file", "state_dir")
"""Settings that ``GRADIOMETER_MONITOR_<NAME>`` gives."""


class SettingsError(ValueError):
    """A setting is out of its range, or asks for what is refused; a line for each."""


class Settings(Section):
    """How the monitor runs."""

    root: Annotated[Path, Field(alias="dir")]
    """Where runs live."""
    host: str = "127.0.0.1"
    port: Annotated[int, between(0, 65535)] = 9477
    """0 takes a free one: see the log, or ``port_file``."""
    port_file: Path | None = None
    """Where to write the port once it is bound, for whoever started the monitor with port 0."""
    state_dir: Path | None = None
    """Where the monitor keeps its own state; ``.monitor`` below the root unless given."""
    poll_seconds: Annotated[float, between(0.05, 3600)] = 1.0
    series_budget: Annotated[int, between(100, 10_000_000)] = 10_000
    """Series that one run may have in a scrape."""
    retention_seconds: Annotated[float, between(0, 366 * 86400)] = 900.0
    """How long the series of a run that is over stay after its last heartbeat."""
    log: LogSettings = LogSettings()
    auth: AuthSettings = AuthSettings()
    limits: LimitSettings = LimitSettings()
    retention: RetentionSettings = RetentionSettings()
    gpu: GpuSettings = GpuSettings()
    grafana: GrafanaSettings | None = None
    remote_write: RemoteWriteReceivers = ()
    alerts: AlertSettings | None = None

    @field_validator("root")
    @classmethod
    def _is_directory(cls, root: Path) -> Path:
        if root.exists() and not root.is_dir():
            raise ValueError("is not a directory: give the one that holds the runs")
        return root

    @property
    def state(self) -> Path:
        """The directory of the monitor's own state."""
        return self.state_dir or self.root / STATE


def resolve(root: Path | None = None, config: Path | None = None, **arguments: Any) -> Settings:
    """Resolve the settings: an argument that is not None, else ``GRADIOMETER_MONITOR_<NAME>``, else the file, else the
    default.

    The root's variable is ``GRADIOMETER_DIR``. Raises :class:`SettingsError`.
    """
    chosen = _read(config) if config is not None else {}
    for name in ENVIRONMENT:
        if text := os.environ.get(f"GRADIOMETER_MONITOR_{name.upper()}"):
            chosen[name] = text
    chosen |= {name: value for name, value in arguments.items() if value is not None}
    if root is not None or os.environ.get("GRADIOMETER_DIR") or "dir" not in chosen:
        chosen["dir"] = default_root(root)
    try:
        return Settings.model_validate(chosen)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(item, arguments) for item in error.errors(include_url=False))) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = read_source(path).raw
    except PolicyError as error:
        raise SettingsError(str(error)) from error
    if raw is not None and not isinstance(raw, dict):
        raise SettingsError(f"{path}: expected settings by name, as in 'port: 9477'")
    return dict(raw or {})


def _explain(item: Any, arguments: dict[str, Any]) -> str:
    """Say which setting is wrong, by the name of the variable where it is from there."""
    path = ".".join(map(str, item["loc"]))
    variable = f"GRADIOMETER_MONITOR_{path.upper()}"
    name = variable if path in ENVIRONMENT and arguments.get(path) is None and variable in os.environ else path
    return f"{name} {item['input']!r}: {item['msg'].removeprefix('Value error, ')}"
