"""The monitor's log: what it is written as, and where to."""

from __future__ import annotations

import logging
from typing import Literal

from gradiometer_monitor.section import Section

__all__ = ["LogSettings", "log_to_stderr"]


class LogSettings(Section):
    """How the monitor logs, to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


def log_to_stderr() -> None:
    """Log what this package says, and what uvicorn warns of, to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("gradiometer", "gradiometer_monitor", "uvicorn"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING if name == "uvicorn" else logging.INFO)
        logger.propagate = False
