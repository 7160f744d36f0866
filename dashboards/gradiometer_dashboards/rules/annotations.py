"""What an alert says, and where it leads: the annotations, as far as Prometheus and Grafana have them alike."""

from __future__ import annotations

from gradiometer_dashboards.rules.model import Alert, Settings, Who

__all__ = ["fill", "filled", "links"]


def filled(text: str, *, who: str, value: str) -> str:
    """Put into a text what finds the names, and the value with which it fires."""
    text = text.replace("<who>", who).replace("<value>", f"{{{{ {value} | humanize }}}}")
    text = text.replace("<count>", f'{{{{ printf "%.0f" {value} }}}}')  # increase() extrapolates to parts of one
    return text.replace("{{ $value |", f"{{{{ {value} |")


def fill(who: Who, *, by: str, of: str) -> str:
    """Fill the query for names: ``of`` are matchers, or nothing."""
    with_more = who.expr.replace("<of ", "{" + (f"{of}, " if of else "")).replace('">', '"}')
    return with_more.replace("<of>", f"{{{of}}}" if of else "").replace("<by>", by)


def links(alert: Alert, settings: Settings) -> dict[str, str]:
    """Link the runbook, and the dashboard with the alert's run chosen."""
    chosen = [name for name in ("job", "run_id", "instance") if name in alert.by]
    query = [f"var-{name}={{{{ $labels.{name} | urlquery }}}}" for name in chosen]
    query += [f"viewPanel={alert.panel}"] if alert.panel is not None else []
    place = f"{settings.grafana_url.rstrip('/')}/d/{settings.uid_prefix}-{alert.dashboard}"
    return {
        "runbook_url": f"{settings.runbook_url.rstrip('/')}/{alert.name}",
        "dashboard_url": f"{place}?{'&'.join(query)}",
    }
