"""Open the files of a rank directory, whoever owns it. Needs no torch.

Guarantees: no link is followed at the run, the rank or the file, whenever it was put there; nothing but a regular file
is read; what is read at once is bounded. A reader may have more rights than who wrote the run.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path

__all__ = ["RunFormatError", "open_file", "open_rank", "pread_all", "read_bounded"]


class RunFormatError(ValueError):
    """A file is not what the format says: foreign, truncated, or of another version."""


@contextmanager
def open_rank(path: Path) -> Iterator[int]:
    """Open a rank directory and give its descriptor, for files to be opened and written by it.

    Neither the directory nor the one above it may be a link, so that who owns a run cannot lead a reader, who may have
    more rights, to somewhere else. Raises RunFormatError if one is, OSError if they cannot be opened.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        run = os.open(path.parent, flags)
        try:
            rank = os.open(path.name or ".", flags, dir_fd=run)
        finally:
            os.close(run)
    except OSError as error:
        if path.is_symlink() or path.parent.is_symlink():
            raise RunFormatError(f"{path} is reached by a link, which is not followed: name the run itself") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        yield rank
    finally:
        os.close(rank)


def open_file(path: Path) -> FileIO:
    """Open a regular file of a rank directory for reading.

    Raises RunFormatError for a link, a pipe or a device, which could block for ever or be of somebody else.
    """
    with open_rank(path.parent) as rank:
        try:
            descriptor = os.open(path.name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=rank)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise RunFormatError(
                    f"{path} is not a regular file, but a link: it was put there by something else than gradiometer"
                ) from error
            raise OSError(error.errno, error.strerror, str(path)) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RunFormatError(f"{path} is not a regular file: it was put there by something else than gradiometer")
    return FileIO(descriptor)


def read_bounded(path: Path, limit: int, what: str) -> bytes:
    """Read a regular file whole; raises RunFormatError if it has more than ``limit`` bytes and so is no ``what``."""
    with open_file(path) as file:
        content = pread_all(file.fileno(), limit + 1, 0)
    if len(content) > limit:
        raise RunFormatError(f"{path} has more than {limit} bytes: it is not a gradiometer {what}")
    return content


def pread_all(descriptor: int, count: int, offset: int) -> bytes:
    """Read ``count`` bytes or up to the end of the file: one read returns at most 2 GiB."""
    parts = []
    while count > 0 and (part := os.pread(descriptor, count, offset)):
        parts.append(part)
        count, offset = count - len(part), offset + len(part)
    return b"".join(parts)
