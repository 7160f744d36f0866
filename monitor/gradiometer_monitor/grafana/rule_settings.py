"""Settings of the alert rules that are put into a Grafana: those of `gradiometer rules`, by the same names."""

from __future__ import annotations

from pydantic import Field, field_validator

from gradiometer_dashboards.rules.choices import read_job, read_labels, read_thresholds, read_url
from gradiometer_dashboards.rules.model import Settings
from gradiometer_monitor.config.section import Section

__all__ = ["AlertRuleSettings"]

DEFAULTS = Settings()


class AlertRuleSettings(Section):
    """What the alert rules are made with, as `gradiometer rules` takes it."""

    grafana_url: str | None = None
    """Where people open Grafana: links to dashboards begin with it; None is `url`."""
    runbook_url: str = DEFAULTS.runbook_url
    """What runbooks' addresses begin with."""
    job: str = DEFAULTS.job
    """Regular expression of the scrape jobs that are monitors, for MonitorDown."""
    by: tuple[str, ...] = ()
    """Labels that your scrapes add and alerts keep, as `cluster`."""
    thresholds: dict[str, int | float] = Field(default_factory=dict)
    """Thresholds that are not the usual ones, as `spike_ratio: 20`."""

    @field_validator("grafana_url", "runbook_url")
    @classmethod
    def _begins_links(cls, url: str | None) -> str | None:
        return None if url is None else read_url(url)

    @field_validator("job")
    @classmethod
    def _compiles(cls, job: str) -> str:
        return read_job(job)

    @field_validator("by")
    @classmethod
    def _are_labels(cls, by: tuple[str, ...]) -> tuple[str, ...]:
        return read_labels(by)

    @field_validator("thresholds")
    @classmethod
    def _are_known(cls, thresholds: dict[str, int | float]) -> dict[str, int | float]:
        read_thresholds(thresholds)
        return thresholds

    def rules(self, *, url: str, uid_prefix: str, datasource_uid: str) -> Settings:
        """Return what the rules are written with, in the Grafana at ``url``."""
        return Settings(
            grafana_url=self.grafana_url or url,
            runbook_url=self.runbook_url,
            job=self.job,
            by=self.by,
            thresholds=read_thresholds(self.thresholds),
            datasource_uid=datasource_uid,
            uid_prefix=uid_prefix,
        )
