"""What Alertmanager posts to a webhook, version 4, and what it is answered. Unknown fields are passed over."""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

__all__ = ["Accepted", "Alert", "Notification"]

SUMMARY = 300
"""Characters of an alert's summary, and of its name, that are kept."""
Text = Annotated[str, AfterValidator(lambda text: text.encode("utf-8", "replace").decode())]
"""Text that can be written to files: JSON may name half of a surrogate pair, for which '?' stands here."""


class Alert(BaseModel):
    """One alert of a notification."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    status: Literal["firing", "resolved"]
    labels: dict[Text, Text] = {}
    annotations: dict[Text, Text] = {}
    starts_at: Text = Field("", alias="startsAt", max_length=64)
    """When it began to fire, RFC 3339; another firing begins at another time."""
    fingerprint: Text = Field("", max_length=128)
    """Alertmanager's name of the label set."""

    @property
    def name(self) -> str:
        return self.labels.get("alertname", "")[:SUMMARY]

    @property
    def identity(self) -> str:
        """Name the set of labels."""
        labels = "\n".join(f"{name}={value}" for name, value in sorted(self.labels.items()))
        return self.fingerprint or sha256(labels.encode()).hexdigest()[:16]

    @property
    def firing(self) -> str:
        """Name this firing, in repeated notifications as well."""
        return sha256(f"{self.identity}@{self.starts_at}".encode()).hexdigest()[:24]

    @property
    def summary(self) -> str:
        """What the rule's author says of it, or else its name."""
        return (self.annotations.get("summary") or self.name)[:SUMMARY]


class Notification(BaseModel):
    """What Alertmanager posts: alerts of one group, some that fire and some that are resolved."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    version: Literal["4"]
    alerts: list[Alert]
    truncated_alerts: int = Field(0, alias="truncatedAlerts", ge=0)
    """Alerts that ``max_alerts`` of the receiver has cut off: nothing is known of them here."""


class Accepted(BaseModel):
    """What became of a notification: the actions themselves follow, and are told as events ``alert_action``."""

    queued: int
    """Alerts times rules that will be looked at, in their order."""
    unmatched: int
    """Alerts that no rule matches, or that name no run."""
