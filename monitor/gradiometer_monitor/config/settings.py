"""The settings of the monitor: one model, filled from arguments, environment, a YAML file and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from gradiometer_monitor.alerts.settings import AlertSettings
from gradiometer_monitor.config.resolving import Resolved, SettingsError
from gradiometer_monitor.config.resolving import resolve as _resolve
from gradiometer_monitor.config.section import Section, between
from gradiometer_monitor.following.retention import RetentionSettings
from gradiometer_monitor.gpu.service import GpuSettings
from gradiometer_monitor.grafana.settings import GrafanaSettings
from gradiometer_monitor.logs import LogSettings
from gradiometer_monitor.remote_write.settings import RemoteWriteReceivers
from gradiometer_monitor.web.settings import AuthSettings, LimitSettings

__all__ = ["RESTART", "Settings", "SettingsError", "resolve", "resolve_all"]

STATE = ".monitor"
"""Below the root, where no run can be: names of runs do not begin with a dot."""
RESTART = ("root", "host", "port", "port_file", "state_dir")
"""Settings that a reload does not change: what is open is not moved."""


class Settings(Section):
    """How the monitor runs."""

    root: Annotated[Path, Field(alias="dir")]
    """Where runs live; `GRADIOMETER_DIR` in the environment, and the user's state directory unless given."""
    host: str = "127.0.0.1"
    """Address to serve on; one that is not loopback needs `auth.tokens_file`."""
    port: Annotated[int, between(0, 65535)] = 9477
    """0 takes a free one: see the log, or `port_file`."""
    port_file: Path | None = None
    """Where to write the port once it is bound, for whoever started the monitor with port 0."""
    state_dir: Path | None = None
    """Where the monitor keeps its own state; `.monitor` below `dir` unless given."""
    poll_seconds: Annotated[float, between(0.05, 3600)] = 1.0
    """Pause between two looks at the runs."""
    series_budget: Annotated[int, between(100, 10_000_000)] = 10_000
    """Series that one run may have in a scrape."""
    total_series: Annotated[int, between(100, 10_000_000)] = 200_000
    """Series that all runs together may have in a scrape."""
    layers: Literal["all", "lead", "none"] = "all"
    """Runs whose layers are in a scrape: `all`; `lead`, those whose rank 0 is on this host, so that a run on many hosts
    has each of its layers once; or `none`."""
    retention_seconds: Annotated[float, between(0, 366 * 86400)] = 900.0
    """How long the series of a run that is over stay after its last heartbeat."""
    log: LogSettings = LogSettings()
    auth: AuthSettings = AuthSettings()
    limits: LimitSettings = LimitSettings()
    retention: RetentionSettings = RetentionSettings()
    gpu: GpuSettings = GpuSettings()
    grafana: GrafanaSettings | None = None
    """A Grafana that gets the dashboards and annotations; none unless given."""
    remote_write: RemoteWriteReceivers = ()
    """Receivers to which every step is pushed with its own time."""
    alerts: AlertSettings | None = None
    """What alerts of Alertmanager do; its webhook is off unless given."""

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
    """Resolve the settings: an argument that is not None, else the variable, else the file, else the default.

    Arguments and variables (``GRADIOMETER_MONITOR_<NAME>``, the root's is ``GRADIOMETER_DIR``) name a setting of a
    section by two underscores: ``auth__tokens_file``. Raises :class:`SettingsError`, a line for each thing wrong.
    """
    return resolve_all(root, config, **arguments).settings


def resolve_all(root: Path | None = None, config: Path | None = None, **arguments: Any) -> Resolved[Settings]:
    """Resolve as :func:`resolve` does, and tell where each setting came from."""
    return _resolve(Settings, root, config, arguments)
