"""Remove recorded runs that are over: the oldest first, by age and by the room that all take. Needs no torch.

Guarantees: nothing of a run that may be running is removed, nothing outside of the root, and no link is followed. What
is removed is looked at again right before, then renamed to a name that no run has, looked at once more, and put back if
it was started meanwhile. What cannot be read, or is no run, is left alone and said to be. A removal that was cut short
is finished by the next one.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gradiometer.process import process_alive
from gradiometer.records import RUN_ID, Manifest, RingReader, RunFormatError, State, read_manifest

__all__ = ["DAY_SECONDS", "Pruned", "Stored", "choose", "disk_bytes", "find_stored", "remove"]

DAY_SECONDS = 86_400.0
UNSEEN_SECONDS = DAY_SECONDS
"""A run whose process cannot be seen from here is over when it gave no sign of life for so long."""
TRASH = ".pruned-"
"""Begins the name of what is being removed; names of runs begin with a letter or digit."""
RANK = re.compile(r"rank-\d{5}(\.\d+)?")
"""A rank's directory, and those of its earlier starts."""

Entry = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A run on disk, or the directory that an earlier start of a rank left in it."""

    path: Path
    run_id: str
    rank: str = ""
    """Name of the earlier start's directory; empty for a run as a whole."""
    ended: float
    """Newest sign of life, in seconds since the epoch."""
    bytes: int
    """Of disk."""
    running: bool
    problem: str = ""
    """Why it cannot be told what it is; such a run is not removed."""
    entry: Entry
    """Device and inode of the directory."""

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"{self.run_id}/{self.rank}" if self.rank else self.run_id

    @property
    def removable(self) -> bool:
        return not self.running and not self.problem


@dataclass(kw_only=True, slots=True)
class Pruned:
    """What a removal came to."""

    removed: list[Stored] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    """Names of what was to be removed and was not, and why."""

    @property
    def bytes(self) -> int:
        """Bytes of disk that were freed."""
        return sum(each.bytes for each in self.removed)


def find_stored(root: Path) -> list[Stored]:
    """List what is recorded below ``root``, oldest first: earlier starts by themselves, and each run without them."""
    found: list[Stored] = []
    for run in _runs(root):
        try:
            found += _look(run)
        except FileNotFoundError:
            continue  # it went meanwhile
        except OSError as error:
            found.append(_unreadable(run, run, "", error))
    return sorted(found, key=lambda each: (each.ended, each.name))


def disk_bytes(root: Path) -> int:
    """Sum the disk space of all runs below ``root``, without looking at what they are."""
    return sum(_disk_bytes(run, ()) for run in _runs(root))


def _runs(root: Path) -> list[Path]:
    """List the directories whose name a run can have; a missing root has none."""
    if not root.is_dir():
        return []
    entries = [entry for entry in os.scandir(root) if RUN_ID.fullmatch(entry.name)]
    return [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]


def _look(run: Path) -> Iterator[Stored]:
    names = _rank_names(run)
    if not names:
        return
    earlier = [name for name in names if "." in name]
    for name in earlier:
        yield _stored(run, run / name, name, [run / name], ())
    yield _stored(run, run, "", [run / name for name in names if name not in earlier], earlier)


def _rank_names(run: Path) -> list[str]:
    entries = [entry for entry in os.scandir(run) if RANK.fullmatch(entry.name)]
    return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))


def _stored(run: Path, path: Path, rank: str, ranks: Sequence[Path], apart: Collection[str]) -> Stored:
    try:
        seen = [_rank(each) for each in ranks]
        found = path.stat(follow_symlinks=False)
        ended = max((heartbeat for heartbeat, _ in seen), default=found.st_mtime)
        return Stored(
            path=path,
            run_id=run.name,
            rank=rank,
            ended=ended,
            bytes=_disk_bytes(path, apart),
            running=any(running for _, running in seen),
            entry=(found.st_dev, found.st_ino),
        )
    except FileNotFoundError:
        raise
    except (OSError, RunFormatError) as error:
        return _unreadable(run, path, rank, error)


def _unreadable(run: Path, path: Path, rank: str, error: Exception) -> Stored:
    found = path.stat(follow_symlinks=False)
    return Stored(
        path=path,
        run_id=run.name,
        rank=rank,
        ended=found.st_mtime,
        bytes=_disk_bytes(path, ()),
        running=False,
        problem=f"{type(error).__name__}: it cannot be told whether it is running",
        entry=(found.st_dev, found.st_ino),
    )


def _rank(path: Path) -> tuple[float, bool]:
    """Return a rank's newest sign of life, and whether it may be running. Raises OSError or RunFormatError.

    The manifest is what a job writes last when it starts: while there is none, the age of the directory decides.
    """
    try:
        manifest = read_manifest(path / "manifest.json")
    except FileNotFoundError:
        made = path.stat(follow_symlinks=False).st_mtime
        return made, time.time() - made <= UNSEEN_SECONDS
    ring = RingReader(path / "steps.ring", manifest.ring)
    try:
        status = ring.status()
    finally:
        ring.close()
    heartbeat = max(int(status["heartbeat_ns"]), manifest.created_ns) / 1e9
    return heartbeat, int(status["state"]) != State.FINISHED and _may_live(manifest, heartbeat)


def _may_live(manifest: Manifest, heartbeat: float) -> bool:
    alive = process_alive(manifest)
    return time.time() - heartbeat <= UNSEEN_SECONDS if alive is None else alive


def _disk_bytes(path: Path, apart: Collection[str]) -> int:
    """Sum the disk blocks below a directory, without those of the entries ``apart``; no link is followed."""
    total = 0
    for where, folders, files in os.walk(path, onerror=None, followlinks=False):
        if where == str(path):
            folders[:] = [name for name in folders if name not in apart]
        for name in (*files, "."):
            try:
                total += Path(where, name).stat(follow_symlinks=False).st_blocks * 512
            except OSError:  # it went meanwhile
                continue
    return total


def choose(
    stored: Iterable[Stored],
    *,
    max_age_seconds: float | None = None,
    max_bytes: int | None = None,
    keep: Collection[str] = (),
    keep_newest: int = 0,
    now: float | None = None,
) -> list[Stored]:
    """Choose what is to be removed: what ended longer ago than that, then the oldest until all take no more than that.

    ``keep`` names runs that stay with their earlier starts, ``keep_newest`` says how many of the newest stay. What is
    running, or cannot be read, counts in the room that is taken and is never chosen.
    """
    ordered = sorted(stored, key=lambda each: (each.ended, each.name))
    now = time.time() if now is None else now
    runs = [each.name for each in ordered if not each.rank]
    newest = runs[-keep_newest:] if keep_newest > 0 else []
    candidates = [each for each in ordered if each.removable and each.run_id not in keep and each.name not in newest]
    chosen = [each for each in candidates if max_age_seconds is not None and now - each.ended > max_age_seconds]
    taken = sum(each.bytes for each in ordered) - sum(each.bytes for each in chosen)
    for each in candidates:
        if max_bytes is None or taken <= max_bytes:
            break
        if each not in chosen:
            chosen.append(each)
            taken -= each.bytes
    return sorted(chosen, key=lambda each: (each.ended, each.name))


def remove(root: Path, chosen: Iterable[Stored], removed: Callable[[Stored], None] = lambda _: None) -> Pruned:
    """Remove what was chosen below ``root``, and what an earlier removal left; ``removed`` is told of each.

    A failure with one does not keep the others. Raises OSError only if the root itself cannot be opened.
    """
    result = Pruned()
    with _opened(root) as descriptor:
        _sweep(root, descriptor)
        # earlier starts first: they are within runs that may be chosen as well
        for each in sorted(chosen, key=lambda each: not each.rank):
            try:
                problem = _remove(root, descriptor, each)
            except FileNotFoundError:
                problem = "it went meanwhile"
            except (OSError, RunFormatError) as error:
                problem = str(error)
            if problem:
                result.kept[each.name] = problem
            else:
                result.removed.append(each)
                removed(each)
    return result


@contextmanager
def _opened(path: Path | str, within: int | None = None) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if within is None else os.O_NOFOLLOW)
    descriptor = os.open(path, flags, dir_fd=within)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _sweep(path: Path, root: int) -> None:
    """Finish removals that were cut short."""
    for name in os.listdir(root):
        if not name.startswith(TRASH) or not stat.S_ISDIR(os.stat(name, dir_fd=root, follow_symlinks=False).st_mode):
            continue
        if not _half_lives(path / name):
            shutil.rmtree(name, ignore_errors=True, dir_fd=root)


def _half_lives(path: Path) -> bool:
    """Whether what is left of a removed directory is written to by a process that was started in it."""
    for each in (path, *(path / name for name in _rank_names(path))):
        try:
            manifest = read_manifest(each / "manifest.json")
        except (OSError, RunFormatError):
            continue
        if process_alive(manifest) is not False and _rank(each)[1]:
            return True
    return False


def _remove(root: Path, descriptor: int, each: Stored) -> str:
    """Remove one, and return why it was not, or nothing."""
    trash = f"{TRASH}{each.run_id}-{secrets.token_hex(4)}"
    if each.rank:
        with _opened(each.run_id, descriptor) as run:
            return _remove_entry(root, descriptor, (each.rank, run), trash, each)
    return _remove_entry(root, descriptor, (each.run_id, descriptor), trash, each)


def _remove_entry(root: Path, descriptor: int, source: tuple[str, int], trash: str, each: Stored) -> str:
    """Rename ``source``, a name in an open directory, into the root under ``trash``, and delete it unless it lives."""
    name, where = source
    found = os.stat(name, dir_fd=where, follow_symlinks=False)
    if not stat.S_ISDIR(found.st_mode) or (found.st_dev, found.st_ino) != each.entry:
        return "another took its place meanwhile"
    if _lives(each.path, each):
        return "it was started again meanwhile"
    os.rename(name, trash, src_dir_fd=where, dst_dir_fd=descriptor)
    if _lives(root / trash, each):
        try:
            os.stat(name, dir_fd=where, follow_symlinks=False)
        except FileNotFoundError:
            os.rename(trash, name, src_dir_fd=descriptor, dst_dir_fd=where)
            return "it was started again meanwhile"
        return f"it was started again meanwhile, and twice: what the first wrote is in {trash}"
    shutil.rmtree(trash, dir_fd=descriptor)
    return ""


def _lives(path: Path, each: Stored) -> bool:
    """Whether anything in the directory of a run, or of an earlier start, may be running by now or changed since."""
    if each.rank:
        return _rank(path)[1]
    names = [name for name in _rank_names(path) if "." not in name]
    return any(running or heartbeat > each.ended for heartbeat, running in (_rank(path / name) for name in names))
