"""The policy file: what a user may write, checked at once, with errors that say where. Needs no torch.

version: 1
pipeline:
  - nonfinite: {action: skip}
  - global_norm: {max_norm: 1.0}
shadow:
  - zclip: {z: 2.5}
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from gradiometer.policy import kinds
from gradiometer.policy.actions import ActionSpec, known_settings
from gradiometer.policy.kinds import KINDS, AnySpec, GroupsSpec, Spec
from gradiometer.records import OWN_CLIPPING, PIPELINE_SLOTS

__all__ = ["PolicyError", "PolicySource", "PolicySpec", "load_policy"]


class PolicyError(ValueError):
    """A policy that cannot be used; the message names the source, the path in it, the value and what was expected."""


def _kind(entry: object) -> str | None:
    if isinstance(entry, Spec):
        return str(getattr(entry, "kind", None))
    return str(entry.get("kind")) if isinstance(entry, Mapping) else None


Stage: TypeAlias = Annotated[
    Annotated[kinds.NonFiniteSpec, Tag("nonfinite")]
    | Annotated[kinds.GlobalNormSpec, Tag("global_norm")]
    | Annotated[kinds.GroupNormSpec, Tag("group_norm")]
    | Annotated[kinds.ValueSpec, Tag("value")]
    | Annotated[kinds.AgcSpec, Tag("agc")]
    | Annotated[kinds.PercentileSpec, Tag("percentile")]
    | Annotated[kinds.ZClipSpec, Tag("zclip")]
    | Annotated[kinds.AdaGCSpec, Tag("adagc")]
    | Annotated[kinds.EmaRatioSpec, Tag("ema_ratio")]
    | Annotated[kinds.SkipSpec, Tag("skip")],
    Discriminator(_kind),
]


class PolicySpec(BaseModel):
    """A whole policy: the pipeline, in the order in which its stages see the gradients, and what only watches."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    version: Literal[1] = 1
    """Version of this file's shape."""
    groups: GroupsSpec = GroupsSpec()
    """How the model is divided."""
    pipeline: tuple[Stage, ...] = ()
    """Policies that act, in the order in which they see the gradients."""
    shadow: tuple[Stage, ...] = ()
    """Policies that decide and are recorded, and never act; each sees the gradients as they were measured."""

    actions: Annotated[tuple[ActionSpec, ...], Field(max_length=32)] = ()
    """What is done on the host when a condition is met."""

    @field_validator("pipeline", "shadow", mode="before")
    @classmethod
    def _untag(cls, entries: object) -> object:
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise ValueError("expected a list of policies, such as '- global_norm: {max_norm: 1.0}'")  # noqa: TRY004
        return [_untagged(entry, index) for index, entry in enumerate(entries)]

    @model_validator(mode="after")
    def _ordered(self) -> PolicySpec:
        least = 0 if self.actions else 1
        if not least <= len(self.stages) <= PIPELINE_SLOTS:
            raise ValueError(
                f"pipeline and shadow hold {len(self.stages)} policies together, expected at least 1 and at most "
                f"{PIPELINE_SLOTS}"
            )
        acting = [spec.kind for spec in self.pipeline]
        if "nonfinite" in acting[1:]:
            raise ValueError("nonfinite must be the first of the pipeline, and only once: clipping cannot mend NaN")
        for kind in ("value", "agc"):
            if kind in acting[:-1]:
                raise ValueError(
                    f"{kind} must be the last of the pipeline, and only once: what it does to norms is known only when "
                    "it is done"
                )
        for name, count in Counter(self.names).items():
            if count > 1:
                raise ValueError(f"{count} policies are named {name!r}: give each a 'name' of its own")
            if name in OWN_CLIPPING:
                raise ValueError(f"a policy is named {name!r}, as torch's own function is in metrics: give it another")
        for spec in self.stages:
            if getattr(spec, "scope", None) == "group" and not isinstance(self.groups.by, dict):
                raise ValueError(
                    f"policy {spec.name!r} has scope 'group', but groups.by is {self.groups.by!r}, expected names and "
                    "patterns such as {embeddings: 'embed*'}"
                )
        return self

    @model_validator(mode="after")
    def _actions_fit(self) -> PolicySpec:
        for name, count in Counter(action.name for action in self.actions).items():
            if count > 1:
                raise ValueError(f"{count} actions are named {name!r}: give each a 'name' of its own")
        known = [*self.names, *OWN_CLIPPING]
        for action in self.actions:
            rate = action.when.clip_rate
            if rate is not None and rate.policy not in known:
                raise ValueError(
                    f"action {action.name!r} is about policy {rate.policy!r}, expected one of {', '.join(known)}"
                )
        return self

    @property
    def stages(self) -> tuple[AnySpec, ...]:
        """The pipeline, then what is in shadow."""
        return self.pipeline + self.shadow

    @property
    def names(self) -> tuple[str, ...]:
        """Names of :attr:`stages`."""
        return tuple(spec.name for spec in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as one would write it in YAML, defaults left out."""
        whole: dict[str, Any] = {"version": self.version}
        if self.groups != GroupsSpec():
            whole["groups"] = self.groups.model_dump(mode="json", exclude_defaults=True)
        whole["pipeline"] = [_tagged(spec) for spec in self.pipeline]
        if self.shadow:
            whole["shadow"] = [_tagged(spec) for spec in self.shadow]
        return whole | ({"actions": [action.to_dict() for action in self.actions]} if self.actions else {})


PolicySource: TypeAlias = (
    PolicySpec | Mapping[str, Any] | Sequence[Mapping[str, Any] | Spec | str] | str | os.PathLike[str]
)


def load_policy(source: PolicySource) -> PolicySpec:
    """Read a policy from a YAML file, a dict of the same shape, a list (the pipeline alone) or a :class:`PolicySpec`.

    Raises :class:`PolicyError` with one line for each thing that is wrong.
    """
    if isinstance(source, PolicySpec):
        return source
    where: str = "policy"
    raw: object = source
    if isinstance(source, str | os.PathLike):
        where, raw = str(source), _read_yaml(Path(source))
    elif isinstance(source, Sequence):
        raw = {"pipeline": list(source)}
    try:
        return PolicySpec.model_validate(raw)
    except ValidationError as error:
        raise PolicyError("\n".join(_explain(where, item) for item in error.errors(include_url=False))) from error


class _StrictLoader(yaml.SafeLoader):
    """Refuse a key that is there twice, of which YAML would quietly take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> object:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError as error:
        raise PolicyError(f"policy file {path} does not exist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"policy file {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise PolicyError(f"policy file {path} is not YAML: {error}") from error


def _untagged(entry: object, index: int) -> object:
    """Turn ``{global_norm: {max_norm: 1}}`` into ``{kind: global_norm, max_norm: 1}``."""
    if isinstance(entry, Spec):
        return entry
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, Mapping) or len(entry) != 1 or next(iter(entry)) not in KINDS:
        raise ValueError(
            f"entry {index} is {entry!r}, expected one policy and its settings; policies: {', '.join(KINDS)}"
        )
    ((kind, settings),) = entry.items()
    if settings is not None and not isinstance(settings, Mapping):
        raise ValueError(f"entry {index}: {kind} has {settings!r}, expected its settings as 'key: value' pairs")
    return {**(settings or {}), "kind": kind}


def _tagged(spec: AnySpec) -> dict[str, Any]:
    settings = spec.model_dump(mode="json", exclude={"kind"}, exclude_defaults=True)
    if settings.get("name") == spec.kind:
        del settings["name"]
    return {spec.kind: settings}


def _explain(where: str, item: Any) -> str:
    path = ""
    for part in item["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    got = "" if item["type"] == "missing" or isinstance(item["input"], Mapping) else f" is {_short(item['input'])}"
    return f"{where}: {path or 'the policy'}{got}: {_expected(item)}"


def _expected(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        if item["loc"][:1] == ("actions",) and len(item["loc"]) > 2:
            return f"no such setting; there are {', '.join(known_settings(item['loc'][2:]))}"
        kind = next((part for part in item["loc"] if part in KINDS), None)
        known = [name for name in (KINDS[kind] if kind else PolicySpec).model_fields if name != "kind"]
        return f"no such setting; there are {', '.join(known)}"
    if item["type"] == "model_type":
        return "expected a mapping such as 'pipeline: [{global_norm: {max_norm: 1.0}}]'"
    return str(item["msg"]).removeprefix("Value error, ")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
