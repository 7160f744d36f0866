"""What is to be done on the host when a run goes wrong for a while: conditions and actions as a user writes them.

actions:
  - {when: {consecutive_skips: 10}, do: raise}
  - {when: {clip_rate: {policy: global_norm, above: 0.9, window: 500}}, do: event}
  - {name: keep, when: {max_ratio: {}}, do: {callback: save}, cooldown: 2000}

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from gradiometer.policy.kinds import _NO_BOOL, NAME, Count, Positive

__all__ = ["CONDITIONS", "ActionSpec", "ClipRate", "DelayedMean", "MaxRatio", "SkipRate", "When", "known_settings"]

Window = Annotated[int, Field(ge=1, le=100_000), _NO_BOOL]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), _NO_BOOL]
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False), _NO_BOOL]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ClipRate(_Part):
    """A policy has clipped in more than a share of the last steps."""

    policy: str
    """Name of the policy, acting or in shadow."""
    above: Share
    """Share of the steps."""
    window: Window = 500
    """Steps; nothing is said before there were as many."""


class SkipRate(_Part):
    """More than a share of the last steps were skipped."""

    above: Share
    """Share of the steps."""
    window: Window = 500
    """Steps; nothing is said before there were as many."""


class DelayedMean(_Part):
    """llm-foundry's detector: the norm is beyond a multiple of its mean some time ago."""

    ratio: Positive = 7.5
    """Multiple of the mean."""
    delay: Window = 500
    """Steps that the mean is over, and that it lies back."""
    compat: Literal["safe", "reference"] = "safe"
    """``reference`` lets NaN and Inf into the mean, which then says nothing for ``delay`` steps; ``safe`` does not."""


class MaxRatio(_Part):
    """Megatron's detector: the norm is at least a multiple of the largest of the first ones."""

    ratio: Positive = 10.0
    """Multiple of the largest."""
    samples: Window = 100
    """Steps that are the first ones; only finite norms count."""


def _bare(value: object) -> object:
    """Let ``when: {max_ratio: }`` stand for all defaults."""
    return {} if value is None else value


def _one_given(schema: dict[str, Any]) -> None:
    """Say in a JSON Schema that one condition is given, and that only those with defaults alone may be null."""
    for name, condition in schema["properties"].items():
        del condition["default"]
        if name not in ("delayed_mean", "max_ratio"):
            (given,) = (each for each in condition.pop("anyOf") if each != {"type": "null"})
            condition |= given
    schema |= {"minProperties": 1, "maxProperties": 1}


class When(_Part):
    """A condition: exactly one of these."""

    model_config = ConfigDict(json_schema_extra=_one_given)

    consecutive_skips: Count | None = None
    """As many steps in a row have been skipped, by whatever policy or GradScaler."""
    consecutive_nonfinite: Count | None = None
    """As many steps in a row had NaN or Inf in a gradient."""
    norm_above: Positive | None = None
    """The global norm before clipping is larger; NaN is not."""
    clip_rate: ClipRate | None = None
    """A policy clips too often."""
    skip_rate: SkipRate | None = None
    """Too many steps are skipped."""
    delayed_mean: Annotated[DelayedMean | None, BeforeValidator(_bare)] = None
    """The norm is far above its mean some time ago."""
    max_ratio: Annotated[MaxRatio | None, BeforeValidator(_bare)] = None
    """The norm is far above those of the first steps."""

    @model_validator(mode="after")
    def _one(self) -> When:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1 or len(self.model_fields_set) != 1:
            shown = ", ".join(sorted(self.model_fields_set)) or "none"
            raise ValueError(f"conditions given: {shown}; expected exactly one of {', '.join(CONDITIONS)}")
        return self

    @property
    def condition(self) -> str:
        """Name of the condition."""
        (given,) = self.model_fields_set
        return given

    @property
    def setting(self) -> Any:
        """Its number, or its settings."""
        return getattr(self, self.condition)


CONDITIONS = tuple(When.model_fields)
"""Every condition; their places are those of the counters in a run's records, so new ones go to the end."""


_CALLBACK = {"type": "object", "properties": {"callback": {"type": "string", "minLength": 1}}}
_DO = {"anyOf": [{"enum": ["raise", "event"]}, _CALLBACK | {"required": ["callback"], "additionalProperties": False}]}


class ActionSpec(_Part):
    """What is done, and when. It is looked at on the host, as rows arrive, at each rank by itself."""

    name: Annotated[str, Field(pattern=NAME)] = ""
    """Name in events; the condition and the action unless given."""
    when: When
    """Condition."""
    do: Annotated[Literal["raise", "event"] | dict[Literal["callback"], str], WithJsonSchema(_DO)]
    """``raise`` from ``optimizer.step()``, write an ``event``, or ``{callback: name}``, which calls a function given to
    ``attach(callbacks=...)`` on a thread of its own."""
    cooldown: Count = 500
    """Steps in which it is not done again."""
    timeout: Seconds = 60.0
    """Seconds after which a callback counts as failed and is left behind."""

    @field_validator("do", mode="before")
    @classmethod
    def _known(cls, do: object) -> object:
        callback = do.get("callback") if isinstance(do, Mapping) and len(do) == 1 else None
        if do not in ("raise", "event") and not (isinstance(callback, str) and callback):
            raise ValueError("expected raise, event, or {callback: name}")
        return do

    @model_validator(mode="after")
    def _default_name(self) -> ActionSpec:
        if not self.name:
            object.__setattr__(self, "name", f"{self.when.condition}_{self.callback or self.do}"[:64])
        return self

    @property
    def callback(self) -> str | None:
        """Name of the function to call, if that is what is done."""
        return self.do["callback"] if isinstance(self.do, dict) else None

    @property
    def kind(self) -> str:
        """``raise``, ``event`` or ``callback``."""
        return "callback" if isinstance(self.do, dict) else self.do

    def to_dict(self) -> dict[str, Any]:
        """Return it as one would write it, defaults left out."""
        written = self.model_dump(mode="json", exclude_defaults=True)
        setting = self.when.setting
        if isinstance(setting, _Part):
            setting = setting.model_dump(mode="json", exclude_defaults=True)
        unnamed = ActionSpec(when=self.when, do=self.do).name
        if written["name"] == unnamed:
            del written["name"]
        return written | {"when": {self.when.condition: setting}}


def known_settings(path: Sequence[str | int]) -> list[str]:
    """Return the names of the settings there are at a path below an action."""
    parts: dict[str, type[_Part]] = {
        "clip_rate": ClipRate, "skip_rate": SkipRate, "delayed_mean": DelayedMean, "max_ratio": MaxRatio, "when": When,
    }  # fmt: skip
    return list(next((part for name, part in parts.items() if name in path), ActionSpec).model_fields)
