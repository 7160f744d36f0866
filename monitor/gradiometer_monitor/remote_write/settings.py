"""Settings of a remote-write receiver."""

from __future__ import annotations

from gradiometer_monitor.section import Section

__all__ = ["RemoteWriteSettings"]


class RemoteWriteSettings(Section):
    """A receiver, and how rows are sent to it."""

    url: str
