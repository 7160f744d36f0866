"""The rules as Grafana's own alerting takes them from a provisioning file; they stand on no recording rule.

A is the value of each run, B reduces it to a number, C compares it and is the condition: healthy runs are *Normal* and
not missing, and the limit can be changed in Grafana's editor. Templates there cannot ask Prometheus, so W asks for the
worst layer or rank of each run, and N how many more there are: Grafana matches what they find to the alert whose labels
are among theirs.
"""

from __future__ import annotations

import re
from typing import Any

from gradiometer_dashboards.rules.annotations import fill, filled, links
from gradiometer_dashboards.rules.catalogue import alerts, recordings
from gradiometer_dashboards.rules.expressions import indented
from gradiometer_dashboards.rules.model import Alert, Settings
from gradiometer_dashboards.rules.prometheus import written

__all__ = ["FOLDER", "INTERVAL_SECONDS", "grafana_rules", "groups"]

Json = dict[str, Any]
FOLDER = "Gradiometer"
"""Title of the folder, which is that of the dashboards."""
INTERVAL_SECONDS = 30
MISSING_EVALUATIONS = 10
"""In how many evaluations a series must be missing before its alert resolves: for as long as they keep firing."""


def grafana_rules(settings: Settings) -> str:
    """Write the file for ``provisioning/alerting/``."""
    found = groups(settings)
    for query in (query for group in found for rule in group["rules"] for query in rule["data"]):
        if "expr" in query["model"]:  # in which Grafana takes $NAME, of a file, for a variable of its environment
            query["model"]["expr"] = query["model"]["expr"].replace("$", "$$")
    more = {"orgId": 1, "folder": FOLDER, "interval": f"{INTERVAL_SECONDS}s"}
    return written("grafana", {"apiVersion": 1, "groups": [{"name": each["name"]} | more | each for each in found]})


def groups(settings: Settings) -> list[Json]:
    """List the groups: those about runs, and those about monitors."""
    listed = alerts(settings)
    of_runs = [_rule(alert, settings) for alert in listed if "run_id" in alert.by]
    of_monitors = [_rule(alert, settings) for alert in listed if "run_id" not in alert.by]
    prefix = settings.uid_prefix
    return [{"name": f"{prefix}-runs", "rules": of_runs}, {"name": f"{prefix}-monitor", "rules": of_monitors}]


def _rule(alert: Alert, settings: Settings) -> Json:
    texts = {"summary": alert.summary, "description": alert.description}
    said = {name: filled(text, who=_names(alert), value="$values.B.Value") for name, text in texts.items()}
    prefix = settings.uid_prefix
    board = {"__dashboardUid__": f"{prefix}-{alert.dashboard}"}
    place = board | {"__panelId__": str(alert.panel)} if alert.panel is not None else {}
    # A Prometheus that cannot be asked is told once, by MonitorDown; the others stay as they are, and resolve nothing.
    failed = "Error" if alert.name == "MonitorDown" else "KeepLast"
    rule: Json = {"uid": f"{prefix}-{alert.name.lower()}", "title": alert.alertname, "condition": "C"}
    rule |= {"data": _data(alert, settings), "for": alert.lasting}
    if alert.keep_firing:
        rule |= {"keepFiringFor": alert.keep_firing, "missing_series_evals_to_resolve": MISSING_EVALUATIONS}
    # No data is no run: nothing is wrong.
    rule |= {"noDataState": "OK", "execErrState": failed}
    if place:
        rule |= {"dashboardUid": f"{prefix}-{alert.dashboard}", "panelId": alert.panel}
    rule |= {"labels": {"severity": alert.severity}, "annotations": said | links(alert, settings) | place}
    return rule | {"isPaused": False}


def _data(alert: Alert, settings: Settings) -> list[Json]:
    inlined = _inlined(alert.value, settings)
    data = [_query("A", inlined, settings), _reduce("B", "A"), _threshold("C", "B", alert.limit)]
    if alert.who is not None:
        kept = ", ".join(alert.by)
        expr = fill(alert.who, by=f"{kept}, {alert.who.label}", of="")
        data += [_query("W", f"topk by ({kept}) (1, {expr})", settings), _reduce("D", "W")]
    if alert.who is not None and alert.who.several:
        data += [_query("N", f"count by ({kept}) ({expr}) - 1 > 0", settings), _reduce("E", "N")]
    return data


def _inlined(expr: str, settings: Settings) -> str:
    """Put the expressions of recording rules in the place of their names."""
    known = {each.name: each.expr for each in recordings(settings)}
    return re.sub(r"run:\w+:\w+", lambda match: indented(known[match[0]]), expr)


def _names(alert: Alert) -> str:
    """Write the template that names whom the alert is about, or nothing where W found nobody."""
    who = alert.who
    if who is None:
        return ""
    more = "{{ with $values.E }}{{ if .Value }} and {{ printf `%.0f` .Value }} more{{ end }}{{ end }}"
    found = f"{who.noun} {{{{ . }}}}{more if who.several else ''}"
    return f"{{{{ with $values.D }}}}{{{{ with .Labels.{who.label} }}}} ({found}){{{{ end }}}}{{{{ end }}}}"


def _query(ref: str, expr: str, settings: Settings) -> Json:
    uid = settings.datasource_uid
    model = {
        "refId": ref, "datasource": {"type": "prometheus", "uid": uid}, "editorMode": "code", "expr": expr,
        "instant": True, "range": False, "intervalMs": 1000, "maxDataPoints": 43200,
    }  # fmt: skip
    return {"refId": ref, "relativeTimeRange": {"from": 600, "to": 0}, "datasourceUid": uid, "model": model}


def _expression(ref: str, **model: Any) -> Json:
    given = {"refId": ref, "datasource": {"type": "__expr__", "uid": "__expr__"}} | model
    return {"refId": ref, "relativeTimeRange": {"from": 600, "to": 0}, "datasourceUid": "__expr__", "model": given}


def _reduce(ref: str, of: str) -> Json:
    return _expression(ref, type="reduce", expression=of, reducer="last")


def _threshold(ref: str, of: str, limit: float) -> Json:
    evaluator = {"type": "gt", "params": [limit]}
    return _expression(ref, type="threshold", expression=of, conditions=[{"evaluator": evaluator}])
