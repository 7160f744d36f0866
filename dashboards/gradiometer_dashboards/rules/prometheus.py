"""The rules as Prometheus, and what reads its files, takes them: VictoriaMetrics, Mimir, the Prometheus operator.

Guarantees: an alert names whom it is about by a query when it fires; one that finds nobody leaves the names out.
"""

from __future__ import annotations

from typing import Any

import yaml

from gradiometer_dashboards.rules.annotations import fill, filled, links
from gradiometer_dashboards.rules.catalogue import alerts, recordings
from gradiometer_dashboards.rules.model import Alert, Settings

__all__ = ["operator_rules", "prometheus_rules", "written"]

Json = dict[str, Any]
HEADER = """\
# Written by `gradiometer rules {what}`: change settings there, not here. What each alert means is in docs/alerts.md.
"""


def prometheus_rules(settings: Settings) -> str:
    """Write the file that ``rule_files`` of Prometheus names."""
    return written("prometheus", {"groups": _groups(settings)})


def operator_rules(settings: Settings) -> str:
    """Write the resource from which the Prometheus operator makes that file."""
    meta = {"name": "gradiometer", "labels": {"app.kubernetes.io/name": "gradiometer"}}
    kind = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PrometheusRule", "metadata": meta}
    return written("operator", kind | {"spec": {"groups": _groups(settings)}})


def _groups(settings: Settings) -> list[Json]:
    """Group what is computed in order: recordings before the alerts that stand on them."""
    listed = alerts(settings)
    runs = [_rule(alert, settings) for alert in listed if "run_id" in alert.by]
    monitors = [_rule(alert, settings) for alert in listed if "run_id" not in alert.by]
    recorded = [{"record": each.name, "expr": each.expr} for each in recordings(settings)]
    return [
        {"name": "gradiometer-runs", "rules": [*recorded, *runs]},
        {"name": "gradiometer-monitor", "rules": monitors},
    ]


def _rule(alert: Alert, settings: Settings) -> Json:
    names = _names(alert)
    texts = {"summary": alert.summary, "description": alert.description}
    said = {name: filled(text, who=names, value="$value") for name, text in texts.items()}
    rule: Json = {"alert": alert.alertname, "expr": _above(alert)}
    if alert.lasting != "0s":
        rule["for"] = alert.lasting
    if alert.keep_firing and settings.keep_firing:
        rule["keep_firing_for"] = alert.keep_firing
    return rule | {"labels": {"severity": alert.severity}, "annotations": said | links(alert, settings)}


def _above(alert: Alert) -> str:
    if "\n" not in alert.value and " " not in alert.value:
        return f"{alert.value} > {alert.limit:g}"
    return "(\n" + "".join(f"  {line}\n" for line in alert.value.splitlines()) + f") > {alert.limit:g}"


def _names(alert: Alert) -> str:
    """Write the template that names whom the alert is about: the worst, and how many more there are."""
    who = alert.who
    if who is None:
        return ""
    of = ", ".join(f"{name}=%[{place}]q" for place, name in enumerate(alert.by, 1))
    expr = fill(who, by=who.label, of=of)
    given = " ".join(f"$labels.{name}" for name in alert.by)
    worst, others = (f"printf `{query}` {given} | query" for query in (f"topk(1, {expr})", f"count({expr}) - 1 > 0"))
    more = f"{{{{ with {others} }}}} and {{{{ . | first | value }}}} more{{{{ end }}}}"
    more = more if who.several else ""
    return f'{{{{ with {worst} }}}} ({who.noun} {{{{ . | first | label "{who.label}" }}}}{more}){{{{ end }}}}'


def written(what: str, document: Json) -> str:
    """Write YAML that says what wrote it, in which texts of several lines stand as they are."""
    text = yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=10_000, allow_unicode=True)
    return HEADER.format(what=what) + str(text)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)
