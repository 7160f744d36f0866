"""What a policy leaves out of a model, said so that it is meant. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from gradiometer.policy.kinds import GroupsSpec, SelectingSpec, SkipSpec
from gradiometer.policy.select import compile_pattern, select
from gradiometer.policy.spec import PolicySpec

__all__ = ["coverage", "group_of"]


def coverage(spec: PolicySpec, names: Sequence[str]) -> list[str]:
    """Return a message for each way in which a policy leaves parameters or groups out; none if there is none.

    That are parameters which no policy that clips covers, though some have patterns; named groups that own no
    parameter; parameters in no named group. Raises ValueError for a pattern that covers no parameter.
    """
    messages = []
    clipping = [
        stage for stage in spec.pipeline if isinstance(stage, SelectingSpec) and not isinstance(stage, SkipSpec)
    ]
    groups = group_of(names, spec.groups)
    if any(_chooses(stage, spec.groups) for stage in clipping):
        covered = [_covers(stage, spec.groups, names, groups) for stage in clipping]
        left = [name for name, *by in zip(names, *covered, strict=True) if not any(by)]
        if left:
            messages.append(f"no policy of the pipeline clips {_some(left)}: match and exclude leave them out")
    if isinstance(spec.groups.by, dict):
        empty = [group for group in spec.groups.by if group not in groups]
        if empty:
            messages.append(f"groups without a parameter: {_some(empty, 'groups')}; each goes to the first that fits")
        loose = [name for name, group in zip(names, groups, strict=True) if group is None]
        if loose:
            messages.append(f"in no named group: {_some(loose)}; a policy of scope group leaves them alone")
    return messages


def group_of(names: Sequence[str], groups: GroupsSpec) -> list[str | None]:
    """Return the first of the named groups that covers each parameter, None where none does or there are none."""
    named = groups.by.items() if isinstance(groups.by, dict) else ()
    compiled = [(name, [compile_pattern(pattern) for pattern in patterns]) for name, patterns in named]
    return [
        next((group for group, patterns in compiled if any(p.search(name) for p in patterns)), None) for name in names
    ]


def _chooses(stage: SelectingSpec, groups: GroupsSpec) -> bool:
    return bool(stage.match or stage.exclude or groups.exclude or _by_group(stage, groups))


def _by_group(stage: SelectingSpec, groups: GroupsSpec) -> bool:
    """Tell whether a stage bounds named groups, and so leaves alone what is in none."""
    scope = getattr(stage, "scope", "model")
    return scope == "group" or (scope is None and isinstance(groups.by, dict))


def _covers(
    stage: SelectingSpec, groups: GroupsSpec, names: Sequence[str], owners: Sequence[str | None]
) -> Sequence[bool]:
    chosen = select(names, stage.match, (*stage.exclude, *groups.exclude))
    if not _by_group(stage, groups):
        return chosen
    return [mine and owner is not None for mine, owner in zip(chosen, owners, strict=True)]


def _some(names: Sequence[str], what: str = "parameters") -> str:
    """Return up to three names, and how many there are."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") + f" ({len(names)} {what})"
