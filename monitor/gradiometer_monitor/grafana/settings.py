"""Settings of the Grafana that is provisioned and annotated."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo, field_validator

from gradiometer_dashboards.rules.model import Settings as RuleSettings
from gradiometer_monitor.config.secret import read_secret
from gradiometer_monitor.config.section import Section, between
from gradiometer_monitor.grafana.rule_settings import AlertRuleSettings

__all__ = ["KINDS", "AnnotationSettings", "GrafanaSettings"]

KINDS = (
    *("run_started", "run_found", "run_finished", "run_lost", "run_pruned"),
    *("nonfinite", "finite_again", "clip_misuse"),
    *("policy_changed", "policy_rejected", "policy_action", "callback_failed"),
    *("alert_action", "request_taken", "request_done", "request_failed", "request_refused", "request_unanswered"),
)
"""Kinds of events that become annotations unless told otherwise."""
UID = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$"
"""What Grafana takes for a uid."""
ALERTS_PREFIX = 22
"""Characters that a prefix may have where the longest name of an alert follows it in a uid."""
PREFIX = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,23}$"


def _secret(value: Any) -> Any:
    """Hide the text before anything is checked, so that no message can quote a password."""
    return SecretStr(value) if isinstance(value, str) else value


def _check_url(url: SecretStr) -> SecretStr:
    """Raise ValueError unless it is a URL that requests can be sent to; the message does not quote it."""
    try:
        parts = urlsplit(url.get_secret_value())
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("expected http:// or https://, a host and if needed a path, as in https://grafana.example/sub")
    if parts.query or parts.fragment:
        raise ValueError("expected a URL without '?' and '#': settings of the connection have options of their own")
    if (parts.username is None) != (parts.password is None):
        raise ValueError("expected user and password, or neither, as in https://user:password@grafana.example")
    return url


class AnnotationSettings(Section):
    """Which events become annotations of the run's dashboard."""

    enabled: bool = True
    """Whether any do."""
    kinds: Annotated[tuple[str, ...], Field(min_length=1, max_length=64)] = KINDS
    """Kinds of events, as `/api/v1/events` has them."""
    max_age_days: Annotated[float, between(0.001, 366)] = 7.0
    """An event that is older when its turn comes is passed over and counted."""
    max_waiting: Annotated[int, between(1, 200_000)] = 10_000
    """Events that may wait while Grafana is away; beyond it the oldest are passed over and counted."""
    per_second: Annotated[float, between(0.1, 1000)] = 10.0
    """Events handled a second at most; each takes up to three requests."""


class GrafanaSettings(Section):
    """A Grafana, how to be let in, and what is put there."""

    url: Annotated[SecretStr, AfterValidator(_check_url), BeforeValidator(_secret)]
    """Where Grafana is, with its sub path if it has one. A user and password may stand in it."""
    username: Annotated[str, Field(min_length=1, max_length=190)] | None = None
    """For basic authentication, with `password_file`."""
    password_file: Path | None = None
    """File that holds the password; read anew each time it is used."""
    token_file: Path | None = None
    """File that holds a service account's token; read anew each time it is used, so that it can be rotated."""
    ca_file: Path | None = None
    """File of certificate authorities to trust instead of the system's."""
    org_id: Annotated[int, between(1, 2**53)] | None = None
    """Organisation to work in, for a user who is in several; a token has one of its own."""
    timeout_seconds: Annotated[float, between(0.2, 120)] = 10.0
    """How long Grafana may take to accept a connection, and again to answer."""
    apply: bool = True
    """Whether folder, datasource, dashboards and alert rules are made; otherwise only annotations are."""
    check_seconds: Annotated[float, between(1, 7 * 86400)] = 3600.0
    """How often the monitor makes sure that they still are there."""
    overwrite: bool = False
    """Whether a dashboard that was changed in Grafana is set back to ours."""
    folder: Annotated[str, Field(min_length=1, max_length=189)] = "Gradiometer"
    """Title of the folder of the dashboards."""
    uid_prefix: Annotated[str, Field(pattern=PREFIX)] = "gradiometer"
    """What the uids of folder, datasource, dashboards and alert rules begin with; another one gives another set."""
    prometheus_url: str | None = None
    """Where Grafana finds Prometheus: the datasource is made of it; None leaves datasources alone."""
    datasource_uid: Annotated[str, Field(pattern=UID)] | None = None
    """Uid of the datasource that dashboards open with and rules ask; `<uid_prefix>-prometheus` if ours is made."""
    scrape_interval_seconds: Annotated[int, between(1, 3600)] | None = None
    """Interval of the scrapes, from which Grafana derives the width of rates; None leaves it as it is (15 s)."""
    alerts: bool = False
    """Whether the alert rules are made too, for Grafana's own alerting: never beside the same rules in Prometheus."""
    alert_rules: AlertRuleSettings = AlertRuleSettings()
    annotations: AnnotationSettings = AnnotationSettings()

    @field_validator("token_file")
    @classmethod
    def _one_way_in(cls, token_file: Path | None, info: ValidationInfo) -> Path | None:
        if not {"url", "username", "password_file"} <= info.data.keys():  # one of them is wrong, and said to be
            return token_file
        user = urlsplit(info.data["url"].get_secret_value()).username
        username, password_file = info.data["username"], info.data["password_file"]
        if (username is None) != (password_file is None):
            raise ValueError("username and password_file belong together: expected both, or neither")
        if sum(way is not None for way in (token_file, user, username)) != 1:
            raise ValueError(
                "expected a token_file, or user:password@ in the url, or username and password_file, and not two of "
                "these: one way to be let in"
            )
        return token_file

    @field_validator("ca_file")
    @classmethod
    def _is_file(cls, ca_file: Path | None) -> Path | None:
        if ca_file is not None and not ca_file.is_file():
            raise ValueError("is not a file: expected certificates in PEM")
        return ca_file

    @field_validator("prometheus_url")
    @classmethod
    def _reachable(cls, url: str | None) -> str | None:
        if url is not None and (urlsplit(url).scheme not in ("http", "https") or "@" in url):
            raise ValueError("expected http:// or https:// and a host, as Grafana reaches it, without a password")
        return url

    @field_validator("alerts")
    @classmethod
    def _can_be_made(cls, alerts: bool, info: ValidationInfo) -> bool:
        needed = {"apply", "uid_prefix", "prometheus_url", "datasource_uid"}
        if not alerts or not needed <= info.data.keys():
            return alerts
        if not info.data["apply"]:
            raise ValueError("expected apply: true too, without which nothing but annotations is made")
        if not (info.data["prometheus_url"] or info.data["datasource_uid"]):
            raise ValueError("expected a datasource_uid or prometheus_url too: rules must know which datasource to ask")
        if len(info.data["uid_prefix"]) > ALERTS_PREFIX:
            raise ValueError(
                f"expected a uid_prefix of at most {ALERTS_PREFIX} characters: a rule's uid has at most 40"
            )
        return alerts

    @property
    def rules(self) -> RuleSettings:
        """What the alert rules are written with."""
        uid = self.source_uid or ""
        return self.alert_rules.rules(url=self.address, uid_prefix=self.uid_prefix, datasource_uid=uid)

    @property
    def _parts(self) -> SplitResult:
        return urlsplit(self.url.get_secret_value())

    @property
    def address(self) -> str:
        """The URL without user and password, and without a slash at its end: what may be shown."""
        parts = self._parts
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"

    @property
    def source_uid(self) -> str | None:
        """Uid of the datasource that the dashboards open with, None where that is left to Grafana."""
        own = f"{self.uid_prefix}-prometheus" if self.prometheus_url else None
        return self.datasource_uid or own

    def read_credentials(self) -> str | tuple[str, str]:
        """Read the token, or user and password.

        Raises OSError if a file cannot be read, ValueError if it holds no secret.
        """
        if self.token_file is not None:
            token = read_secret(self.token_file)
            if " " in token:
                raise ValueError(f"token_file {self.token_file}: expected one token and nothing else")
            return token
        if self.username is not None and self.password_file is not None:
            return self.username, read_secret(self.password_file)
        return unquote(self._parts.username or ""), unquote(self._parts.password or "")
