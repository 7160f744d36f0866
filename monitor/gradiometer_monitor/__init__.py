"""The gradiometer daemon: finds the runs of a host, follows them, and serves their metrics. Needs no torch."""
