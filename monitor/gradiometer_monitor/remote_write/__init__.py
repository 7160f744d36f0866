"""Every step with its own timestamp, pushed to a remote-write receiver."""
