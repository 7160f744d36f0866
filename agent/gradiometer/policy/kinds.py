"""The ten kinds of policy as a user writes them: settings, defaults and ranges. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from gradiometer.policy.select import compile_pattern

__all__ = [
    "KINDS",
    "AdaGCSpec",
    "AgcSpec",
    "AnySpec",
    "EmaRatioSpec",
    "GlobalNormSpec",
    "GroupNormSpec",
    "GroupsSpec",
    "NonFiniteSpec",
    "Patterns",
    "PercentileSpec",
    "Scope",
    "SelectingSpec",
    "SkipSpec",
    "Spec",
    "ValueSpec",
    "ZClipSpec",
]


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("expected a number")  # noqa: TRY004 - pydantic collects ValueErrors
    return value


def _one_or_many(value: object) -> object:
    return (value,) if isinstance(value, str) else value


def _compiles(patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            compile_pattern(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return patterns


_NO_BOOL = BeforeValidator(_no_bool)
"""Stands after the bounds of a number: pydantic's schemas would lose those that come after it."""
LARGEST, MOST = 3e38, 2**53
"""What float32 holds, and what a double counts to: tensors are made of the numbers in a policy, on any device."""
Positive = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False), _NO_BOOL]
Share = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False), _NO_BOOL]
Decay = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False), _NO_BOOL]
Count = Annotated[int, Field(ge=1, le=MOST), _NO_BOOL]
Steps = Annotated[int, Field(ge=0, le=MOST), _NO_BOOL]
Window = Annotated[int, Field(ge=2, le=100_000), _NO_BOOL]
Patterns = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
SomePatterns = Annotated[tuple[str, ...], Field(min_length=1), BeforeValidator(_one_or_many)]
Scope: TypeAlias = Literal["model", "layer", "parameter", "group"]
"""What is bounded by itself: all gradients together, each layer's, each parameter's, or those of each named group."""
Compat: TypeAlias = Literal["safe", "reference"]
NAME = r"^[A-Za-z_][A-Za-z0-9_.-]{0,63}$"


class Spec(BaseModel):
    """What every policy has."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    name: Annotated[str, Field(pattern=NAME)] = ""
    """Name in metrics, records and checkpoints; the kind of policy unless given."""

    @model_validator(mode="after")
    def _default_name(self) -> Spec:
        if not self.name:
            object.__setattr__(self, "name", self.kind)  # type: ignore[attr-defined]  # every subclass has a kind
        return self


class SelectingSpec(Spec):
    """What every policy has that may be for some parameters only."""

    match: Patterns = ()
    """Parameters the policy covers, by glob or ``re:`` pattern; all when empty."""
    exclude: Patterns = ()
    """Parameters it leaves alone, likewise."""

    @field_validator("match", "exclude")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return _compiles(patterns)


class _Learning(SelectingSpec):
    compat: Compat = "safe"
    """``reference`` reproduces the published code to the letter, its faults included; ``safe`` adds guards."""


class NonFiniteSpec(Spec):
    """What happens to a step whose gradients hold NaN or Inf."""

    kind: Literal["nonfinite"] = "nonfinite"
    action: Literal["skip", "zero", "raise"] = "skip"
    """``skip`` the step; ``zero`` the tensors that are not finite; ``raise``: skip the step and stop the job."""
    max_consecutive: Count | None = None
    """Raise after this many non-finite steps in a row."""
    then: Literal["raise"] = "raise"
    """What is done after ``max_consecutive``."""


class GlobalNormSpec(SelectingSpec):
    """Scale all gradients so that their norm together is at most ``max_norm``."""

    kind: Literal["global_norm"] = "global_norm"
    max_norm: Positive
    """Largest norm."""
    norm_type: Annotated[float, _NO_BOOL, WithJsonSchema({"const": 2})] = 2.0
    """Only the L2 norm is measured."""

    @field_validator("norm_type")
    @classmethod
    def _only_l2(cls, value: float) -> float:
        if value != 2:
            raise ValueError("only the L2 norm (2) is measured")
        return value


class GroupNormSpec(SelectingSpec):
    """Scale each layer's, parameter's or group's gradients so that their norm is at most ``max_norm``."""

    kind: Literal["group_norm"] = "group_norm"
    max_norm: Positive
    """Largest norm of each."""
    scope: Literal["layer", "parameter", "group"] | None = None
    """What is bounded by itself; what ``groups.by`` says unless given, which is layers unless given."""


class ValueSpec(SelectingSpec):
    """Clamp every element of the gradients to ±``max_abs``."""

    kind: Literal["value"] = "value"
    max_abs: Positive
    """Largest magnitude of an element."""


class AgcSpec(SelectingSpec):
    """Adaptive gradient clipping: bound each row's gradient norm by a share of its weights' norm."""

    kind: Literal["agc"] = "agc"
    clip_factor: Positive = 0.01
    """Largest gradient norm of a unit, in norms of its weights."""
    eps: Positive = 1e-3
    """Weight norms below this count as this."""


class PercentileSpec(_Learning):
    """AutoClip: the threshold is a percentile of the norms seen so far."""

    kind: Literal["percentile"] = "percentile"
    p: Annotated[float, Field(ge=0, le=100), _NO_BOOL] = 10.0
    """Percentile of the history, this step included."""
    window: Window = 1000
    """Steps of history that are kept."""
    min_history: Count = 1
    """Norms that must have been seen, this step's included, before anything is clipped."""
    scope: Scope = "model"
    """What has a history and a threshold of its own."""

    @model_validator(mode="after")
    def _fits(self) -> PercentileSpec:
        if self.min_history > self.window:
            raise ValueError(f"min_history is {self.min_history}, expected at most window, which is {self.window}")
        return self


class ZClipSpec(_Learning):
    """ZClip: clip norms that lie too many standard deviations above their running mean."""

    kind: Literal["zclip"] = "zclip"
    alpha: Decay = 0.97
    """Share of the old mean and variance that each step keeps."""
    z: Positive = 2.5
    """Standard deviations above the mean beyond which a norm is a spike."""
    option: Literal["reciprocal", "mean", "percentile"] = "reciprocal"
    """What a spike is cut to: between mean and ``z`` deviations, the less the higher it is; the mean; or ``z``
    deviations above it."""
    clip_factor: Positive = 1.0
    """Factor on what a spike is cut to, with ``reciprocal``."""
    max_grad_norm: Positive | None = 1.0
    """Largest norm in any case; null for none."""
    warmup_steps: Count = 25
    """Steps whose norms make the first mean and variance."""
    learn_from_spikes: bool = True
    """Whether a spike teaches mean and variance what it was cut to, or nothing (``skip_update_on_spike``)."""
    floor: Share = 0.01
    """With ``compat: safe``, the least deviation that is believed, as a share of the mean."""
    scope: Scope = "model"
    """What has a mean and a variance of its own."""


class AdaGCSpec(_Learning):
    """AdaGC: bound each norm by its own running average."""

    kind: Literal["adagc"] = "adagc"
    ratio: Positive = 1.04
    """Largest norm, in running averages."""
    beta: Decay = 0.99
    """Share of the old average that each step keeps."""
    warmup_steps: Steps = 100
    """Steps that are clipped by their global norm instead, while the averages form."""
    warmup_max_norm: Positive = 1.0
    """Largest global norm in these; with ``compat: safe`` also the largest first norm of what appears only later."""
    floor: Positive = 1e-8
    """With ``compat: safe``, the least average."""
    scope: Scope = "parameter"
    """What has an average of its own."""


class EmaRatioSpec(_Learning):
    """OLMo's adaptive clipping: bound each norm by a multiple of its running average."""

    kind: Literal["ema_ratio"] = "ema_ratio"
    ratio: Positive = 2.0
    """Largest norm, in running averages."""
    beta: Decay = 0.95
    """Share of the old average that each step keeps; OLMo takes the larger of the optimizer's betas."""
    floor: Positive = 1e-8
    """With ``compat: safe``, the least average."""
    scope: Scope = "parameter"
    """What has an average of its own."""


class SkipSpec(SelectingSpec):
    """Skip steps whose loss or global norm is an outlier."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"rule": {"const": "abs"}}, "required": ["rule"]},
            "then": {"properties": {"threshold": {"type": "number"}}, "required": ["threshold"]},
            "else": {"properties": {"threshold": {"type": "null"}}},
        }
    )
    kind: Literal["skip"] = "skip"
    rule: Literal["sigma", "abs", "median_mad"] = "sigma"
    """``sigma``: beyond ``sigma`` deviations above the mean; ``abs``: beyond ``threshold``; ``median_mad``: beyond
    ``k`` robust deviations above the median."""
    on: Annotated[tuple[Literal["loss", "global_norm"], ...], Field(min_length=1), BeforeValidator(_one_or_many)] = (
        "global_norm",
    )
    """What must not be an outlier; a loss must be logged before the step it is of."""
    window: Window = 128
    """Steps before this one that it is compared with."""
    sigma: Positive = 6.0
    """Deviations, for ``rule: sigma``."""
    k: Positive = 6.0
    """Robust deviations, for ``rule: median_mad``."""
    threshold: Positive | None = None
    """Largest value, for ``rule: abs``."""
    min_history: Annotated[int, Field(ge=2), _NO_BOOL] = 64
    """Steps that must have been seen, this one included, before any is skipped."""
    floor: Share = 0.01
    """The least deviation that is believed, as a share of the mean (with ``compat: safe``) or of the median."""
    max_consecutive: Count | None = 20
    """Steps in a row that may be skipped; null for any number, which is the default with ``compat: reference``."""
    then: Literal["accept", "raise"] = "accept"
    """After ``max_consecutive``, ``accept`` the next step if its values are finite, or ``raise``."""
    compat: Compat = "safe"
    """``reference`` reproduces OLMo-core to the letter, its faults included; ``safe`` adds guards."""

    @model_validator(mode="after")
    def _complete(self) -> SkipSpec:
        if self.compat == "reference" and "max_consecutive" not in self.model_fields_set:
            object.__setattr__(self, "max_consecutive", None)
        if (self.rule == "abs") != (self.threshold is not None):
            raise ValueError("threshold goes with rule: abs, and rule: abs needs it")
        if self.min_history > self.window:
            raise ValueError(f"min_history is {self.min_history}, expected at most window, which is {self.window}")
        return self


class GroupsSpec(BaseModel):
    """How the model is divided, for every policy of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    by: Annotated[
        Annotated[Literal["layer", "parameter"], Tag("<word>")]
        | Annotated[dict[Annotated[str, Field(pattern=NAME)], SomePatterns], Tag("<names>")],
        Discriminator(lambda by: "<names>" if isinstance(by, Mapping) else "<word>"),
    ] = "layer"
    """What ``group_norm`` bounds by itself: layers, parameters, or named groups, each with its patterns; a parameter
    belongs to the first group that covers it."""
    exclude: Patterns = ()
    """Parameters that every policy but ``nonfinite`` leaves alone, by glob or ``re:`` pattern."""

    @field_validator("exclude")
    @classmethod
    def _excludes(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        return _compiles(patterns)

    @field_validator("by")
    @classmethod
    def _groups(cls, by: object) -> object:
        for patterns in by.values() if isinstance(by, dict) else ():
            _compiles(patterns)
        return by


AnySpec: TypeAlias = (
    NonFiniteSpec
    | GlobalNormSpec
    | GroupNormSpec
    | ValueSpec
    | AgcSpec
    | PercentileSpec
    | ZClipSpec
    | AdaGCSpec
    | EmaRatioSpec
    | SkipSpec
)
KINDS: dict[str, type[AnySpec]] = {
    "nonfinite": NonFiniteSpec,
    "skip": SkipSpec,
    "global_norm": GlobalNormSpec,
    "group_norm": GroupNormSpec,
    "percentile": PercentileSpec,
    "zclip": ZClipSpec,
    "adagc": AdaGCSpec,
    "ema_ratio": EmaRatioSpec,
    "agc": AgcSpec,
    "value": ValueSpec,
}
"""Every kind of policy, in the order in which they usually stand in a pipeline."""
