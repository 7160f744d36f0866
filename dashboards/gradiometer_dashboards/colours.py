"""One colour a meaning, on every dashboard. The names are Grafana's, which suit light and dark."""

from __future__ import annotations

__all__ = [
    "ANY_IS_BAD",
    "ANY_IS_ODD",
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
    "UP_OR_DOWN",
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
UP_OR_DOWN = {0: ("down", BAD), 1: ("up", GOOD)}

ANY_IS_ODD: tuple[tuple[float | None, str], ...] = ((None, GOOD), (0.5, WARNING))
"""From where on a count has which colour: of what should not be."""
ANY_IS_BAD: tuple[tuple[float | None, str], ...] = ((None, GOOD), (0.5, BAD))
"""And of what must not be."""
