"""The settings of the monitor: what there are, where they come from, and how they change while it runs."""
