"""What the parts of a policy demand of one another, told of a policy as it was written, right or wrong in itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from gradiometer.policy.actions import ActionSpec
from gradiometer.policy.kinds import KINDS, GroupsSpec, Spec
from gradiometer.policy.problems import Path, guess
from gradiometer.records import OWN_CLIPPING, PIPELINE_SLOTS

__all__ = ["MOST_ENTRIES", "check_order"]

MOST_ENTRIES = 100
"""Entries beyond which only their number is told of: a list as long was not written by hand."""
Complaint = tuple[Path, object, str]
"""Where, what is there, and what is wrong with it."""


class _Stage(NamedTuple):
    """What of a stage the others depend on."""

    path: Path
    kind: str
    name: object
    scope: object


def check_order(raw: object) -> Iterator[Complaint]:
    """Yield what is wrong between the stages; entries that are no policy are passed over, for they are told of."""
    if not isinstance(raw, Mapping):
        return
    lists = {section: raw.get(section, ()) for section in ("pipeline", "shadow")}
    if all(isinstance(entries, Sequence) and not isinstance(entries, str) for entries in lists.values()):
        count = sum(map(len, lists.values()))
        yield from _count(count, least=0 if raw.get("actions") else 1)
        if count > MOST_ENTRIES:
            return
        stages = {section: list(_stages(section, entries)) for section, entries in lists.items()}
        yield from _places(stages["pipeline"])
        yield from _names(stages["pipeline"] + stages["shadow"])
        yield from _scopes(stages["pipeline"] + stages["shadow"], raw.get("groups"))
        yield from _actions(raw.get("actions"), [stage.name for each in stages.values() for stage in each])


def _count(count: int, least: int) -> Iterator[Complaint]:
    if not least <= count <= PIPELINE_SLOTS:
        said = f"pipeline and shadow hold {count} policies together, expected at least 1 and at most {PIPELINE_SLOTS}"
        yield (), {}, said


def _stages(section: str, entries: Sequence[Any]) -> Iterator[_Stage]:
    for place, entry in enumerate(entries):
        if isinstance(entry, Spec):
            kind = str(getattr(entry, "kind", ""))
            yield _Stage((section, place, kind), kind, entry.name, getattr(entry, "scope", None))
            continue
        kind, settings = entry, None
        if isinstance(entry, Mapping) and len(entry) == 1:
            ((kind, settings),) = entry.items()
        if isinstance(kind, str) and kind in KINDS:
            settings = settings if isinstance(settings, Mapping) else {}
            yield _Stage((section, place, kind), kind, settings.get("name") or kind, settings.get("scope"))


def _places(pipeline: Sequence[_Stage]) -> Iterator[Complaint]:
    for stage in pipeline[1:]:
        if stage.kind == "nonfinite":
            yield stage.path, {}, "nonfinite must be the first of the pipeline, and only once: clipping cannot mend NaN"
    for stage in pipeline[:-1]:
        if stage.kind in ("value", "agc"):
            yield (
                stage.path,
                {},
                f"{stage.kind} must be the last of the pipeline, and only once: what it does to norms is known only "
                "when it is done",
            )


def _names(stages: Sequence[_Stage]) -> Iterator[Complaint]:
    names = [stage.name for stage in stages]
    for place, stage in enumerate(stages):
        if not isinstance(stage.name, str):
            continue
        if stage.name in names[:place]:
            count = names.count(stage.name)
            said = f"{count} policies are named {stage.name!r}: give each a 'name' of its own"
            yield (*stage.path, "name"), {}, said
        if stage.name in OWN_CLIPPING:
            said = f"a policy is named {stage.name!r}, as torch's own function is in metrics: give it another"
            yield (*stage.path, "name"), {}, said


def _scopes(stages: Sequence[_Stage], groups: object) -> Iterator[Complaint]:
    by: object = "layer"
    if isinstance(groups, GroupsSpec):
        by = groups.by
    elif isinstance(groups, Mapping):
        by = groups.get("by", by)
    for stage in stages:
        if stage.scope == "group" and not isinstance(by, Mapping):
            said = f"groups.by is {by!r}, expected names and patterns such as {{embeddings: 'embed*'}}"
            yield (*stage.path, "scope"), "group", said


def _actions(entries: object, policies: Sequence[object]) -> Iterator[Complaint]:
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        return
    if len(entries) > MOST_ENTRIES:
        return  # too many, which is told of elsewhere
    names = [_action_name(entry) for entry in entries]
    known = [*map(str, policies), *OWN_CLIPPING]
    for place, (entry, name) in enumerate(zip(entries, names, strict=True)):
        if name is not None and name in names[:place]:
            said = f"{names.count(name)} actions are named {name!r}: give each a 'name' of its own"
            yield ("actions", place, "name"), {}, said
        policy = _policy_of(entry)
        if isinstance(policy, str) and policy not in known:
            said = f"no such policy, expected one of {', '.join(known)}{guess(policy, known)}"
            yield ("actions", place, "when", "clip_rate", "policy"), policy, said


def _action_name(entry: object) -> str | None:
    """Return what an action is called; None where it is wrong in itself, which is told of elsewhere."""
    try:
        return ActionSpec.model_validate(entry).name
    except ValidationError:
        return None


def _policy_of(entry: object) -> object:
    """Return the name of the policy that an action is about, if it is about one."""
    if isinstance(entry, ActionSpec):
        return None if entry.when.clip_rate is None else entry.when.clip_rate.policy
    for key in ("when", "clip_rate", "policy"):
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    return entry
