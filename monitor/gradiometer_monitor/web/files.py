"""Files that decide who is let in: whether they changed, and whether they are private."""

from __future__ import annotations

import stat
from pathlib import Path

from gradiometer_monitor.config.settings import SettingsError

__all__ = ["check_private", "signature"]


def signature(path: Path) -> tuple[int, ...] | None:
    """Return what is another after a file was written or replaced; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_dev, found.st_mtime_ns, found.st_ctime_ns, found.st_size


def check_private(named: str, mode: int) -> None:
    """Raise SettingsError for a file that others may read or write, or its group write; ``named`` is its setting."""
    if mode & 0o027:
        raise SettingsError(
            f"{named} has mode {stat.S_IMODE(mode):04o}: others must not read it, nor its group write it; chmod 600 "
            "it, or 640"
        )
