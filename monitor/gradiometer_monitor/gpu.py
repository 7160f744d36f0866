"""What NVML tells of this host's GPUs."""

from __future__ import annotations

from gradiometer_monitor.section import Section

__all__ = ["GpuSettings"]


class GpuSettings(Section):
    """Whether and how GPUs are looked at."""

    enabled: bool = True
    """Look for GPUs; without NVML nothing is exported and nothing is said."""
