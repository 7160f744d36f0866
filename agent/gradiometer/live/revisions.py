"""Which policy was in force when: ``policy.json``, and whose each slot of the policy columns was. Needs no torch.

    <root>/<run_id>/rank-00000/
        policy.json     the policies that were in force, newest last, each with its table of slots

A row of the ring and the counters name the revision by which their policy columns are to be read. Guarantees: a stage
that keeps name and mode, which are the labels of its counter, keeps its slot over a change, also if it was away in
between and nobody took its place; the file is replaced as a whole, and bounded.
"""

from __future__ import annotations

import json
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gradiometer.policy.spec import PolicySpec
from gradiometer.rank_files import open_rank
from gradiometer.records import PIPELINE_SLOTS, Manifest, RunFormatError, read_bounded

__all__ = [
    "History",
    "Mode",
    "Revision",
    "Slot",
    "SlotTable",
    "Source",
    "describe_change",
    "read_history",
    "slots_of",
    "write_atomically",
    "write_history",
]

POLICY_FILE = "policy.json"
MAX_REVISIONS, MAX_HISTORY_BYTES = 100, 8 * 2**20
"""The file forgets the oldest revisions beyond either; the newest is always there."""
MAX_SHOWN = 8
"""Differences that are told of one change."""
Mode = Literal["act", "shadow"]
Source = Literal["attach", "request", "checkpoint"]


class Slot(BaseModel):
    """Whose a slot of the policy columns is."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    name: str
    kind: str = ""
    mode: Mode = "act"


Slots = tuple[Slot | None, ...]


class Revision(BaseModel):
    """A policy, and from which step on it was in force."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    revision: Annotated[int, Field(ge=0)]
    """0 is the policy that the agent was attached with."""
    step: int
    """The first step that was decided by it."""
    time_ns: int
    policy: dict[str, Any] | None
    """As one writes it; None observes only."""
    slots: Annotated[Slots, Field(max_length=PIPELINE_SLOTS)]
    source: Source
    request: str | None = None
    by: str = ""

    @property
    def named(self) -> list[tuple[int, Slot]]:
        """The slots in use and whose they are, in the order of the slots."""
        return [(place, slot) for place, slot in enumerate(self.slots) if slot is not None]

    @property
    def acting(self) -> tuple[str, ...]:
        """Names of the policies that act."""
        return tuple(slot.name for _, slot in self.named if slot.mode == "act")


class History(BaseModel):
    """``policy.json``: the revisions that are remembered, newest last."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    version: Literal[1] = 1
    leader: int = 0
    """The rank that reads requests for this one."""
    revisions: Annotated[tuple[Revision, ...], Field(min_length=1)]

    @property
    def newest(self) -> Revision:
        return self.revisions[-1]

    def find(self, revision: int) -> Revision | None:
        """Return the revision of that number, None if it is forgotten or not known yet."""
        return next((each for each in reversed(self.revisions) if each.revision == revision), None)

    def answer(self, request: str) -> Revision | None:
        """Return the revision that a request has brought about, if it has."""
        return next((each for each in reversed(self.revisions) if each.request == request), None)


def slots_of(spec: PolicySpec | None) -> list[Slot]:
    """Return what the stages of a policy need slots for: the pipeline, then what is in shadow."""
    if spec is None:
        return []
    acting = [Slot(name=stage.name, kind=stage.kind, mode="act") for stage in spec.pipeline]
    return acting + [Slot(name=stage.name, kind=stage.kind, mode="shadow") for stage in spec.shadow]


class SlotTable:
    """Gives slots to stages, over the changes of one run."""

    def __init__(self, wanted: Sequence[Slot]) -> None:
        self._owners: list[Slot | None] = [None] * PIPELINE_SLOTS
        """Who had each slot last, retired or not."""
        self._retired: list[int] = []
        """Slots whose owners are retired, the longest retired first."""
        self.change(wanted)

    @property
    def slots(self) -> Slots:
        """Whose each slot is now, None where it is nobody's."""
        return tuple(None if place in self._retired else owner for place, owner in enumerate(self._owners))

    @property
    def places(self) -> dict[str, int]:
        """The slot of each stage, by name."""
        return {slot.name: place for place, slot in enumerate(self.slots) if slot is not None}

    def change(self, wanted: Sequence[Slot]) -> frozenset[int]:
        """Give the ``wanted`` their slots, at most 14; return those that were another's before."""
        places = {(owner.name, owner.mode): place for place, owner in enumerate(self._owners) if owner is not None}
        kept = {places[label] for slot in wanted if (label := (slot.name, slot.mode)) in places}
        self._retired = [place for place in self._retired if place not in kept] + [
            place
            for place, owner in enumerate(self._owners)
            if owner is not None and place not in kept and place not in self._retired
        ]
        free = [place for place, owner in enumerate(self._owners) if owner is None]
        taken = set()
        for slot in wanted:
            place = places.get((slot.name, slot.mode), -1)
            if place < 0:
                place = free.pop(0) if free else self._retired.pop(0)
                if self._owners[place] is not None:
                    taken.add(place)
            self._owners[place] = slot
        return frozenset(taken)


def write_atomically(path: Path, text: str) -> None:
    """Write a file of a rank directory, for its owner alone (0600): a reader sees none, the old one, or the new one.

    A link is replaced and never followed. Raises RunFormatError if the directory is reached by one, or OSError.
    """
    temporary = f".{path.name}.{secrets.token_hex(6)}.tmp"
    with open_rank(path.parent) as rank:
        owner = os.fstat(rank)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(temporary, flags, 0o600, dir_fd=rank)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                if os.geteuid() == 0 and owner.st_uid != 0:  # a request of the administrator's, for the job to read
                    os.fchown(descriptor, owner.st_uid, owner.st_gid)
            os.replace(temporary, path.name, src_dir_fd=rank, dst_dir_fd=rank)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=rank)
            raise


def write_history(directory: Path, history: History) -> History:
    """Write ``policy.json`` of a rank directory; return the history as far as it is remembered."""
    revisions = list(history.revisions[-MAX_REVISIONS:])
    sizes = [len(revision.model_dump_json()) for revision in revisions]
    while len(revisions) > 1 and sum(sizes) > MAX_HISTORY_BYTES:
        del revisions[0], sizes[0]
    kept = history.model_copy(update={"revisions": tuple(revisions)})
    write_atomically(directory / POLICY_FILE, kept.model_dump_json(indent=1))
    return kept


def read_history(directory: Path, manifest: Manifest) -> History:
    """Read ``policy.json`` of a rank directory; a run without one has the policy of its manifest.

    Raises RunFormatError for a file that is something else, OSError for one that cannot be read.
    """
    path = directory / POLICY_FILE
    try:
        content = read_bounded(path, 2 * MAX_HISTORY_BYTES, "history of policies")
    except FileNotFoundError:
        return _of_manifest(manifest)
    try:
        return History.model_validate(json.loads(content))
    except (ValueError, ValidationError) as error:
        raise RunFormatError(f"{path} is not a gradiometer history of policies: {error}") from error


def _of_manifest(manifest: Manifest) -> History:
    kinds = {name: kind for _, name, kind, _ in _stages(manifest.policy)}
    names = _distinct(manifest.policies)
    slots = tuple(
        Slot(name=name, kind=kinds.get(name, ""), mode="shadow" if name in manifest.shadow else "act") for name in names
    )
    attached = Revision(
        revision=0, step=0, time_ns=manifest.created_ns, policy=manifest.policy, slots=slots, source="attach"
    )
    return History(leader=manifest.rank, revisions=(attached,))


def _distinct(names: Sequence[str]) -> list[str]:
    """Number the names that come again, because two series may not have the same labels."""
    return [f"{name}#{names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names)]


def _stages(policy: Mapping[str, Any] | None) -> Iterator[tuple[Mode, str, str, Mapping[str, Any]]]:
    """Yield mode, name, kind and settings of the stages of a policy as one writes it."""
    modes: dict[str, Mode] = {"pipeline": "act", "shadow": "shadow"}
    for part, mode in modes.items():
        for stage in (policy or {}).get(part, ()):
            entry: Mapping[str, Any] = stage if isinstance(stage, Mapping) else {stage: None}
            ((kind, settings),) = entry.items()
            yield mode, (settings or {}).get("name", kind), kind, settings or {}


def describe_change(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str:
    """Say in a line what is different in the ``new`` policy; both as one writes them."""
    before = {name: (mode, kind, settings) for mode, name, kind, settings in _stages(old)}
    after = {name: (mode, kind, settings) for mode, name, kind, settings in _stages(new)}
    said = [f"-{name}" for name in before if name not in after]
    for name, (mode, kind, settings) in after.items():
        shadow = " (shadow)" if mode == "shadow" else ""
        if name not in before:
            said.append(f"+{name}{shadow}")
            continue
        was_mode, was_kind, was = before[name]
        if (was_mode, was_kind) != (mode, kind):
            said.append(f"{name}: {was_mode} {was_kind} -> {mode} {kind}")
        said += _differences(name, was, settings)
    order = [name for name in before if name in after]
    if order != [name for name in after if name in before]:
        said.append("other order")
    said += _rest(old or {}, new or {})
    more = f", and {len(said) - MAX_SHOWN} more" if len(said) > MAX_SHOWN else ""
    return ", ".join(said[:MAX_SHOWN]) + more if said else "the same policy again"


def _rest(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is different beside the stages."""
    for part in sorted({*old, *new} - {"version", "pipeline", "shadow"}):
        if old.get(part) != new.get(part):
            yield f"{part}: {_short(old.get(part))} -> {_short(new.get(part))}"


def _differences(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for key in Counter([*old, *new]):
        if old.get(key) != new.get(key):
            yield f"{name}.{key} {_short(old.get(key, 'default'))} -> {_short(new.get(key, 'default'))}"


def _short(value: object) -> str:
    shown = value if isinstance(value, str) else json.dumps(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
