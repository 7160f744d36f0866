"""Rules for Prometheus, generated from Python."""
