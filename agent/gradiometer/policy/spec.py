"""The policy file: what a user may write, checked at once, with errors that say where. Needs no torch.

version: 1
pipeline:
  - nonfinite: {action: skip}
  - global_norm: {max_norm: 1.0}
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from gradiometer.policy.select import compile_pattern
from gradiometer.records import OWN_CLIPPING, PIPELINE_SLOTS

__all__ = [
    "GlobalNormSpec",
    "GroupNormSpec",
    "NonFiniteSpec",
    "PolicyError",
    "PolicySource",
    "PolicySpec",
    "ValueSpec",
    "load_policy",
]


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number")  # noqa: TRY004 - pydantic collects ValueErrors
    return value


Positive = Annotated[float, BeforeValidator(_no_bool), Field(gt=0, allow_inf_nan=False)]


class PolicyError(ValueError):
    """A policy that cannot be used; the message names the source, the path in it, the value and what was expected."""


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$")] = ""
    """Name in metrics and records; the kind of policy unless given."""

    @model_validator(mode="after")
    def _default_name(self) -> _Spec:
        if not self.name:
            object.__setattr__(self, "name", self.kind)  # type: ignore[attr-defined]  # every subclass has a kind
        return self


class _Selecting(_Spec):
    match: tuple[str, ...] = ()
    """Parameters the policy covers, by glob or ``re:`` pattern; all when empty."""
    exclude: tuple[str, ...] = ()
    """Parameters it leaves alone, likewise."""

    @field_validator("match", "exclude", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("match", "exclude")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                compile_pattern(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return patterns


class NonFiniteSpec(_Spec):
    """What happens to a step whose gradients hold NaN or Inf."""

    kind: Literal["nonfinite"] = "nonfinite"
    action: Literal["skip", "zero", "raise"] = "skip"
    """``skip`` the step; ``zero`` the tensors that are not finite; ``raise``: skip the step and stop the job."""
    max_consecutive: Annotated[int, Field(ge=1)] | None = None
    """Raise after this many non-finite steps in a row."""
    then: Literal["raise"] = "raise"


class GlobalNormSpec(_Selecting):
    """Scale all gradients so that their norm together is at most ``max_norm``."""

    kind: Literal["global_norm"] = "global_norm"
    max_norm: Positive
    norm_type: float = 2.0

    @field_validator("norm_type")
    @classmethod
    def _only_l2(cls, value: float) -> float:
        if value != 2:
            raise ValueError("only the L2 norm (2) is measured")
        return value


class GroupNormSpec(_Selecting):
    """Scale each layer's, or each parameter's, gradients so that their norm is at most ``max_norm``."""

    kind: Literal["group_norm"] = "group_norm"
    max_norm: Positive
    scope: Literal["layer", "parameter"] = "layer"


class ValueSpec(_Selecting):
    """Clamp every element of the gradients to ±``max_abs``."""

    kind: Literal["value"] = "value"
    max_abs: Positive


def _kind(entry: object) -> str | None:
    if isinstance(entry, _Spec):
        return str(getattr(entry, "kind", None))
    return str(entry.get("kind")) if isinstance(entry, Mapping) else None


AnySpec: TypeAlias = Annotated[
    Annotated[NonFiniteSpec, Tag("nonfinite")]
    | Annotated[GlobalNormSpec, Tag("global_norm")]
    | Annotated[GroupNormSpec, Tag("group_norm")]
    | Annotated[ValueSpec, Tag("value")],
    Discriminator(_kind),
]
_MODELS: dict[object, type[_Spec]] = {
    "nonfinite": NonFiniteSpec,
    "global_norm": GlobalNormSpec,
    "group_norm": GroupNormSpec,
    "value": ValueSpec,
}
KINDS = tuple(map(str, _MODELS))


class PolicySpec(BaseModel):
    """A whole policy: the pipeline, in the order in which its stages see the gradients."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    version: Literal[1] = 1
    pipeline: tuple[AnySpec, ...]

    @field_validator("pipeline", mode="before")
    @classmethod
    def _untag(cls, entries: object) -> object:
        if not isinstance(entries, Sequence) or isinstance(entries, str):
            raise ValueError("expected a list of policies, such as '- global_norm: {max_norm: 1.0}'")  # noqa: TRY004
        if not 1 <= len(entries) <= PIPELINE_SLOTS:
            raise ValueError(f"holds {len(entries)} policies, expected at least 1 and at most {PIPELINE_SLOTS}")
        return [_untagged(entry, index) for index, entry in enumerate(entries)]

    @model_validator(mode="after")
    def _ordered(self) -> PolicySpec:
        kinds = [spec.kind for spec in self.pipeline]
        if "nonfinite" in kinds[1:]:
            raise ValueError("nonfinite must be the first of the pipeline, and only once: clipping cannot mend NaN")
        if "value" in kinds[:-1]:
            raise ValueError("value must be the last of the pipeline, and only once: it changes norms unpredictably")
        for name, count in Counter(spec.name for spec in self.pipeline).items():
            if count > 1:
                raise ValueError(f"{count} policies are named {name!r}: give each a 'name' of its own")
            if name in OWN_CLIPPING:
                raise ValueError(f"a policy is named {name!r}, as torch's own function is in metrics: give it another")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.pipeline)

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as one would write it in YAML, defaults left out."""
        return {"version": self.version, "pipeline": [_tagged(spec) for spec in self.pipeline]}


PolicySource: TypeAlias = (
    PolicySpec | Mapping[str, Any] | Sequence[Mapping[str, Any] | _Spec | str] | str | os.PathLike[str]
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
    if isinstance(entry, _Spec):
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
        kind = next((part for part in item["loc"] if part in _MODELS), None)
        known = [name for name in (_MODELS[kind] if kind else PolicySpec).model_fields if name != "kind"]
        return f"no such setting; there are {', '.join(known)}"
    if item["type"] == "model_type":
        return "expected a mapping such as 'pipeline: [{global_norm: {max_norm: 1.0}}]'"
    return str(item["msg"]).removeprefix("Value error, ")


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else shown[:77] + "..."
