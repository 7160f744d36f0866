"""The dashboards: one file each, with its queries and its panels."""
