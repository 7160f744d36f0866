"""The Alertmanager webhook: it keeps what comes, answers at once, and leaves the acting to the service of the alerts.

Alertmanager sends again what is answered with 5xx, and nothing else; so 503 is for what can be done later, and 4xx for
what would be refused again.
"""

from __future__ import annotations

from fastapi import APIRouter, HTTPException

from gradiometer_monitor.alerts.desk import FullError
from gradiometer_monitor.alerts.payload import Accepted, Notification
from gradiometer_monitor.services import Context
from gradiometer_monitor.web.auth import Requester
from gradiometer_monitor.web.openapi import api_router
from gradiometer_monitor.web.roles import needs

__all__ = ["router"]


def router(context: Context, *, enabled: bool) -> APIRouter:
    """Make the route of the webhook; ``enabled`` says whether there are rules for it."""
    made = api_router("alerts")

    @made.post(
        "/alerts",
        responses={404: {"description": "No rules are set"}, 503: {"description": "Send it again later"}},
    )
    @needs("alerts")
    def take_alerts(notification: Notification, by: Requester) -> Accepted:
        """Take a notification of Alertmanager's (webhook, version 4); the rules of ``alerts`` act on it soon after."""
        if not enabled:
            raise HTTPException(404, "this monitor has no rules for alerts: give its settings a section 'alerts'")
        taker = context.alerts.taker
        if taker is None:
            raise HTTPException(503, "the monitor is starting: send it again later")
        try:
            return taker.accept(notification, by)
        except FullError as error:
            raise HTTPException(503, f"{error}: send it again later") from error

    return made
