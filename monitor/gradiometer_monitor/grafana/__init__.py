"""The five dashboards, the alert rules, the datasource and the annotations of a Grafana, over its HTTP API."""
