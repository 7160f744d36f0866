"""Which process writes a run, as it can be told from beside it, and whether that process lives. Needs no torch."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil

from gradiometer.records import Manifest

__all__ = ["pid_namespace", "process_alive"]


def pid_namespace() -> str:
    """Name the namespace in which this process's pid is one, as Linux does; empty where that cannot be known."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def process_alive(manifest: Manifest) -> bool | None:
    """Tell whether the writer's process lives; None when it cannot be seen from this host, or from this container."""
    if manifest.host != socket.gethostname():
        return None
    own = pid_namespace()
    if own and manifest.pid_namespace and own != manifest.pid_namespace:
        return None
    try:
        process = psutil.Process(manifest.pid)
        same = abs(process.create_time() - manifest.process_start) < 1.0
        # Where nobody reaps, as in a container without an init, a killed process stays as a zombie.
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return None
