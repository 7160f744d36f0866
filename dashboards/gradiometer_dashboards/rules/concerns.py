"""Which option of ``gradiometer rules`` concerns which format; one that would change nothing there is refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["CONCERNS", "Concern", "Form", "check_concerns"]

Form = Literal["prometheus", "grafana", "operator", "fleet", "fleet-layers"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Concern:
    """What an option is for, and the formats in which it is."""

    option: str
    purpose: str
    forms: tuple[Form, ...]


_OF_ALERTS: tuple[Form, ...] = ("prometheus", "grafana", "operator")
_ALL: tuple[Form, ...] = (*_OF_ALERTS, "fleet", "fleet-layers")

CONCERNS = {
    "grafana_url": Concern(option="--grafana-url", purpose="begins alerts' links to dashboards", forms=_OF_ALERTS),
    "runbook_url": Concern(option="--runbook-url", purpose="begins alerts' links to runbooks", forms=_OF_ALERTS),
    "job": Concern(option="--job", purpose="says whose absence the alert MonitorDown tells", forms=_OF_ALERTS),
    "by": Concern(option="--by", purpose="names labels that rules keep", forms=_ALL),
    "set_": Concern(option="--set", purpose="sets thresholds of alerts", forms=_OF_ALERTS),
    "datasource_uid": Concern(
        option="--datasource-uid", purpose="names the Prometheus that Grafana's rules ask", forms=("grafana",)
    ),
    "keep_firing": Concern(
        option="--keep-firing/--no-keep-firing",
        purpose="writes Prometheus' keep_firing_for or leaves it out",
        forms=("prometheus", "operator"),
    ),
    "out": Concern(option="--out", purpose="names the file that rules are written to", forms=_ALL),
    "list_": Concern(option="--list", purpose="lists alerts", forms=_OF_ALERTS),
}
"""By the name of the command's parameter. With ``--list`` none of the others means anything: nothing is written."""


def check_concerns(form: Form, given: Iterable[str]) -> None:
    """Raise ValueError for the first parameter among those given by the user that means nothing for a format."""
    names = list(given)
    for concern in (CONCERNS[name] for name in names):
        if form not in concern.forms:
            others = ", ".join(concern.forms)
            raise ValueError(
                f"{concern.option}: it {concern.purpose}, which {form} has no use for; leave it out, or take one "
                f"of the formats that it is for: {others}"
            )
        if "list_" in names and concern.option != "--list":
            raise ValueError(
                f"{concern.option}: it {concern.purpose}, which --list has no use for: it only shows the names, "
                "severities and meanings of alerts; leave one of the two out"
            )
