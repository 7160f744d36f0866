"""The alert and recording rules of gradiometer, as data, and what writes them for Prometheus, its operator and Grafana.

Needs nothing but Python and PyYAML.
"""

from gradiometer_dashboards.rules.catalogue import ALERTS, alerts, recordings
from gradiometer_dashboards.rules.fleet import fleet_layer_rules, fleet_rules
from gradiometer_dashboards.rules.grafana import grafana_rules
from gradiometer_dashboards.rules.model import Alert, Recording, Settings
from gradiometer_dashboards.rules.prometheus import operator_rules, prometheus_rules

__all__ = [
    "ALERTS",
    "Alert",
    "Recording",
    "Settings",
    "alerts",
    "fleet_layer_rules",
    "fleet_rules",
    "grafana_rules",
    "operator_rules",
    "prometheus_rules",
    "recordings",
]
