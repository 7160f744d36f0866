"""From an alert to an action: the Alertmanager webhook."""
