"""Draw a dashboard from the answers to its own queries: pictures for documents, and for those without a Grafana.

Guarantees: what is drawn is what the panels ask, where, in which unit and in which colours they state. It is not
Grafana's drawing: fonts, ticks and the shades of heatmaps are matplotlib's. Needs matplotlib (the extra ``plot``).
"""

from gradiometer_dashboards.drawing.page import draw

__all__ = ["draw"]
