"""Alerts as Alertmanager posts them, and a monitor's service of alerts that a test turns by hand."""

from __future__ import annotations

import itertools
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from gradiometer_monitor.alerts.payload import Accepted, Notification
from gradiometer_monitor.alerts.service import AlertService
from gradiometer_monitor.alerts.settings import AlertSettings
from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.services import Context
from gradiometer_monitor.store import Event, Store

__all__ = ["Bench", "alert", "notification", "post"]

_number = itertools.count()


def alert(run_id: str = "run", name: str = "Spike", status: str = "firing", start: str = "", **labels: str) -> Any:
    """Make one alert; of the same labels and ``start`` it is the same firing."""
    labels = {"alertname": name, "run_id": run_id, **labels}
    return {
        "status": status,
        "labels": labels,
        "annotations": {"summary": f"{name} in {run_id}"},
        "startsAt": start or f"2026-11-23T02:{next(_number) % 60:02d}:{next(_number) % 60:02d}.5Z",
        "endsAt": "0001-01-01T00:00:00Z",
        "generatorURL": "http://prometheus/graph",
        "fingerprint": f"{abs(hash(tuple(sorted(labels.items())))):016x}",
        "something_new": [1],
    }


def notification(*alerts: Any, **fields: Any) -> dict[str, Any]:
    """Make a notification of alerts, as Alertmanager 0.25 writes it."""
    return {
        "version": "4", "groupKey": '{}:{alertname="Spike"}', "truncatedAlerts": 0, "status": "firing",
        "receiver": "gradiometer", "groupLabels": {}, "commonLabels": {}, "commonAnnotations": {},
        "externalURL": "http://alertmanager", "alerts": list(alerts),
    } | fields  # fmt: skip


def post(url: str, body: Any, token: str | None = None) -> tuple[int, Any]:
    """Post a notification to a monitor: status and answer."""
    headers = {"content-type": "application/json"} | ({} if token is None else {"authorization": f"Bearer {token}"})
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/api/v1/alerts", data=data, headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


class Bench:
    """The service of alerts over a directory of runs, with a store on disk; each turn does what is to be done."""

    def __init__(self, root: Path, *rules: dict[str, Any], **settings: Any) -> None:
        self.store, runs = Store(root / ".monitor"), Runs(root, retention_seconds=900)
        self.context = Context(runs=runs, events=Events(runs, self.store), store=self.store)
        made = [{"alertname": "Spike", "cooldown_seconds": 0, **rule} for rule in rules]
        self.service = AlertService(AlertSettings(rules=made, **settings), self.context)

    def post(self, *alerts: Any) -> Accepted:
        """Accept alerts, and do nothing yet."""
        return self.service.accept(Notification.model_validate(notification(*alerts)), "alertmanager")

    def turn(self) -> list[str]:
        """Poll the runs and have the service do what it can; return all outcomes that were told so far."""
        self.context.runs.poll()
        self.context.events.follow()
        self.service.work()
        return self.outcomes

    @property
    def told(self) -> list[Event]:
        return self.store.events(kinds=["alert_action"], limit=1000)

    @property
    def outcomes(self) -> list[str]:
        return [event.data["outcome"] for event in self.told]

    def counted(self, outcome: str) -> float:
        """Return how many alerts came to this, over all rules."""
        found = [each for each in self.service.samples() if each[0] == "gradiometer_alert_actions_total"]
        return sum(value for _, labels, value in found if labels[1] == outcome)

    def close(self) -> None:
        """Leave the store to another, as a monitor that is killed does."""
        self.context.runs.close()
        self.store.close()
