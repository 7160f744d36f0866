"""Read a secret from the file that a setting names."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["read_secret"]

MAX_SECRET_BYTES = 64 * 1024


def read_secret(path: Path) -> str:
    """Read the one line of printable ASCII in a regular file, without white space at its ends.

    A link is followed: Kubernetes mounts secrets by links. Raises OSError or ValueError, neither of which holds any of
    the secret.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{path} is not a regular file: expected one that holds a secret")
        found = file.read(MAX_SECRET_BYTES + 1).strip()
    if not found or len(found) > MAX_SECRET_BYTES or not all(0x20 <= byte < 0x7F for byte in found):
        raise ValueError(f"{path}: expected one line of printable ASCII, of at most {MAX_SECRET_BYTES} bytes")
    return found.decode("ascii")
