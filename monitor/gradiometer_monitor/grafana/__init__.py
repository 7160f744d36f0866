"""The five dashboards, the datasource and the annotations of a Grafana, over its HTTP API."""
