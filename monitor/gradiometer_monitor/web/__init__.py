"""What the monitor serves over HTTP: metrics, probes, the API, the live page."""
