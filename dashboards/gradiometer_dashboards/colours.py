"""One colour a meaning, on every dashboard. The names are Grafana's, which suit light and dark."""

from __future__ import annotations

__all__ = [
    "BAD",
    "BASELINE",
    "CLIPPED",
    "FINISHED",
    "GOOD",
    "HARM",
    "LEARNING_RATE",
    "LOSS",
    "NEUTRAL",
    "NONFINITE",
    "NORM",
    "PEAK",
    "SHADOW",
    "SKIPPED",
    "STATES",
    "THRESHOLD",
    "WARNING",
]

NORM = "blue"
"""A norm as it is: of the newest step."""
PEAK = "light-blue"
"""The largest norm of a window."""
BASELINE = "semi-dark-green"
"""What is usual for the run."""
THRESHOLD = "dark-purple"
CLIPPED = "purple"
SHADOW = "light-purple"
"""What a policy that only watches would have done."""
NONFINITE = "red"
HARM = "dark-red"
"""NaN or Inf that reached the weights."""
SKIPPED = "orange"
LOSS = "semi-dark-yellow"
LEARNING_RATE = "super-light-yellow"

GOOD, WARNING, BAD = "green", "orange", "red"
"""How it stands, where a value is judged."""
FINISHED = "blue"
NEUTRAL = "text"

STATES = {"running": GOOD, "finished": FINISHED, "lost": BAD}
