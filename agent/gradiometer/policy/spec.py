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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    ModelWrapValidatorHandler,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from gradiometer.policy import kinds
from gradiometer.policy.actions import ActionSpec, known_settings
from gradiometer.policy.kinds import KINDS, AnySpec, GroupsSpec, Spec
from gradiometer.policy.order import MOST_ENTRIES, check_order
from gradiometer.policy.problems import PolicyError, Problem, explain, guess, shorten
from gradiometer.yaml_source import Source, read_source

__all__ = ["MOST_ACTIONS", "PolicyError", "PolicySource", "PolicySpec", "load_policy"]

MOST_ACTIONS = 32


def _kind(entry: object) -> str | None:
    if isinstance(entry, Spec):
        return str(getattr(entry, "kind", None))
    return str(entry.get("kind")) if isinstance(entry, Mapping) else None


def _untagged(entry: object) -> object:
    """Turn ``{global_norm: {max_norm: 1}}`` into ``{kind: global_norm, max_norm: 1}``."""
    if isinstance(entry, Spec):
        return entry
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, Mapping) or len(entry) != 1 or next(iter(entry)) not in KINDS:
        name = next(iter(entry)) if isinstance(entry, Mapping) and len(entry) == 1 else ""
        got = f"{shorten(entry)} is there, " if isinstance(entry, Mapping) else ""
        raise ValueError(f"{got}expected one policy and its settings; policies: {', '.join(KINDS)}{guess(name, KINDS)}")
    ((kind, settings),) = entry.items()
    if settings is not None and not isinstance(settings, Mapping):
        raise ValueError(f"{kind} has {shorten(settings)}, expected its settings as 'key: value' pairs")
    if settings and "kind" in settings:
        raise ValueError(f"{kind} has a setting 'kind': no such setting, the name of the entry is its kind")
    # YAML 1.1, of which most loaders are, takes the key "on" for True.
    return {"on" if key is True else key: value for key, value in (settings or {}).items()} | {"kind": kind}


Stage: TypeAlias = Annotated[
    Annotated[
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
    ],
    BeforeValidator(_untagged),
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
    actions: Annotated[tuple[ActionSpec, ...], Field(max_length=MOST_ACTIONS)] = ()
    """What is done on the host when a condition is met."""

    @field_validator("pipeline", "shadow", mode="before")
    @classmethod
    def _is_a_list(cls, entries: object) -> object:
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise ValueError("expected a list of policies, such as '- global_norm: {max_norm: 1.0}'")  # noqa: TRY004
        return entries if len(entries) <= MOST_ENTRIES else ()  # which check_order tells of

    @model_validator(mode="wrap")
    @classmethod
    def _all_at_once(cls, raw: Any, handler: ModelWrapValidatorHandler[PolicySpec]) -> PolicySpec:
        """Report what is wrong between the stages together with what is wrong in them."""
        if isinstance(raw, PolicySpec):
            return handler(raw)
        found, spec = [], None
        try:
            spec = handler(raw)
        except ValidationError as error:
            found += [_repeated(item) for item in error.errors(include_url=False)]
        found += [
            InitErrorDetails(type=PydanticCustomError("policy", "{said}", {"said": said}), loc=path, input=value)
            for path, value, said in check_order(raw)
        ]
        if found or spec is None:
            raise ValidationError.from_exception_data(cls.__name__, found)
        return spec

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
    if isinstance(source, str | os.PathLike):
        read = read_source(Path(source), "policy", PolicyError)
    else:
        raw: object = source if isinstance(source, Mapping) or not isinstance(source, Sequence) else [*source]
        read = Source(name="policy", raw={"pipeline": raw} if isinstance(raw, list) else raw)
    problems, spec = read.problems, None
    try:
        spec = PolicySpec.model_validate(read.raw)
    except ValidationError as error:
        problems += [explain(read.name, item, _settings_at) for item in error.errors(include_url=False)]
    if problems or spec is None:
        raise PolicyError.of(sorted((_placed(each, read) for each in problems), key=_by_place))
    return spec


def _placed(problem: Problem, source: Source) -> Problem:
    if problem.line is not None:
        return problem
    line, column = source.place(problem.path)
    return replace(problem, line=line, column=column)


def _by_place(problem: Problem) -> tuple[int, int]:
    return problem.line or 0, problem.column or 0


def _settings_at(path: Sequence[str | int]) -> list[str]:
    """Return the names of the settings there are at a path."""
    if path[:1] == ("actions",) and len(path) > 1:
        return known_settings(path[2:])
    model: type[BaseModel] = PolicySpec
    if path and path[0] == "groups":
        model = GroupsSpec
    elif kind := next((KINDS[part] for part in path if isinstance(part, str) and part in KINDS), None):
        model = kind
    return [name for name in model.model_fields if name != "kind"]


def _repeated(item: Any) -> InitErrorDetails:
    return InitErrorDetails(type=item["type"], loc=item["loc"], input=item["input"], ctx=item.get("ctx", {}))


def _tagged(spec: AnySpec) -> dict[str, Any]:
    settings = spec.model_dump(mode="json", exclude={"kind"}, exclude_defaults=True)
    if settings.get("name") == spec.kind:
        del settings["name"]
    if isinstance(spec, kinds.SkipSpec) and spec.compat == "reference":  # where the default is another
        settings["max_consecutive"] = spec.max_consecutive
    return {spec.kind: settings}
