"""What an alert is, what it stands on, and what somebody who installs it may choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradiometer_dashboards.thresholds import THRESHOLDS, Thresholds

__all__ = ["PREFIX", "Alert", "Recording", "Settings", "Severity", "Who"]

PREFIX = "Gradiometer"
"""What every ``alertname`` begins with."""
Severity = Literal["critical", "warning", "info"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What differs from one place to another."""

    grafana_url: str = "http://127.0.0.1:3000"
    """Where people open Grafana, with its sub path: links to dashboards begin with it."""
    runbook_url: str = "http://127.0.0.1:9477/runbooks"
    """What runbooks' addresses begin with; the monitor serves them."""
    job: str = "gradiometer.*"
    """Regular expression of the scrape jobs that are monitors, for MonitorDown."""
    by: tuple[str, ...] = ()
    """Labels that alerts keep beside their own, as of a cluster."""
    thresholds: Thresholds = THRESHOLDS
    datasource_uid: str = "gradiometer-prometheus"
    """Uid of the Prometheus that Grafana-managed rules ask."""
    uid_prefix: str = "gradiometer"
    """What the uids of the dashboards that are linked begin with, and in Grafana those of the rules."""
    keep_firing: bool = True
    """Whether ``keep_firing_for`` is written, which Prometheus before 2.42 and vmalert before 1.92 refuse."""

    @property
    def of_run(self) -> tuple[str, ...]:
        """The labels that are a run's identity."""
        return ("job", "run_id", *self.by)

    @property
    def of_monitor(self) -> tuple[str, ...]:
        """The labels that are a monitor's identity."""
        return ("job", "instance", *self.by)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """A series that several alerts stand on; ``name`` is ``level:metric:operations``."""

    name: str
    expr: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Who:
    """A query that finds whom an alert is about, one series each, the worst one with the largest value.

    In ``expr``, ``<of>`` stands for matchers of the alert's own labels, ``<by>`` for the labels that the series keep.
    """

    expr: str
    label: str
    noun: str
    """What stands before the label's value in the text."""
    several: bool = True
    """Whether it says how many more there are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alert:
    """A condition that somebody should know of: ``value`` is above ``limit`` for as long as ``lasting``.

    In the texts ``<who>`` stands for the names that ``who`` finds, or for nothing, ``<value>`` for the
    value and ``<count>`` for a whole one.
    """

    name: str
    severity: Severity
    meaning: str
    """What it tells, in one sentence, for lists."""
    value: str
    limit: float
    by: tuple[str, ...]
    """Labels of the alert, of which the first two are its identity."""
    lasting: str = "0s"
    keep_firing: str = "5m"
    """For how long it goes on when the value is gone: a monitor that is started again resolves nothing."""
    summary: str
    description: str
    who: Who | None = None
    dashboard: str
    panel: int | None = None

    @property
    def alertname(self) -> str:
        return PREFIX + self.name
