"""What the dashboards of one run ask, apart from the panels that draw it."""
