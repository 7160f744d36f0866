"""Settings of the Alertmanager webhook: which alerts lead to which actions."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from gradiometer.policy.spec import PolicyError, load_policy
from gradiometer_monitor.config.section import Section, between, placed

__all__ = ["Action", "AlertSettings", "Rule"]

Action = Literal["policy", "checkpoint", "stop"]
MAX_RULES = 100
Label = Annotated[str, Field(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*$")]


class Rule(Section):
    """One rule: alerts that match lead to one action in the run that they name."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    """In events, metrics and logs; every rule has its own."""
    alertname: str | None = None
    """The alert's name; the same as a label ``alertname`` in ``labels``."""
    labels: dict[Label, str] = Field(default_factory=dict)
    """Labels that the alert must have, with these values."""
    labels_regex: dict[Label, str] = Field(default_factory=dict)
    """Labels whose whole value must match; a label that the alert has not is empty."""
    action: Action
    """``policy``: put another policy in force. ``checkpoint``, ``stop``: ask the training loop, which decides."""
    policy: Any = None
    """With the action ``policy``: the path of a file, read when the settings are and relative to the config file, or
    the policy itself; ``none`` observes only."""
    on_resolved: Literal["nothing", "restore"] = "nothing"
    """``restore``: once no alert of the rule fires for the run, the policy that was in force before comes back, unless
    somebody has changed it since. With the action ``policy`` only."""
    run_label: Label | None = None
    """The label that names the run; that of the section unless given."""
    rank: Annotated[int, between(0, 1_000_000)] | None = None
    """A rank of the group that is meant, where groups of ranks train by themselves."""
    cooldown_seconds: Annotated[float, between(0, 7 * 86400)] = 600.0
    """How long after it has acted on a run the rule does not act on that run again."""
    max_per_hour: Annotated[int, between(1, 3600)] = 10
    """How often the rule acts in an hour, over all runs."""
    dry_run: bool = False
    """Tell what would be done, and do nothing."""

    @field_validator("labels_regex")
    @classmethod
    def _are_patterns(cls, patterns: dict[str, str]) -> dict[str, str]:
        for label, pattern in patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern {pattern!r} of {label} is no regular expression: {error}") from error
        return patterns

    @field_validator("policy")
    @classmethod
    def _is_policy(cls, policy: Any, info: ValidationInfo) -> Any:
        """Read the policy and check it as 'gradiometer policy check' does; None stays for what was not given."""
        if policy is None or policy == "none":
            return policy
        try:
            return load_policy(placed(policy, info) if isinstance(policy, str) else policy).to_dict()
        except PolicyError as error:
            raise ValueError(str(error)) from error
        except OSError as error:
            raise ValueError(f"the policy cannot be read: {error}") from error

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not (self.alertname or self.labels or self.labels_regex):
            raise ValueError(f"rule {self.name!r} would match every alert: give alertname, labels or labels_regex")
        if (self.action == "policy") != (self.policy is not None):
            raise ValueError(
                f"rule {self.name!r} has the action {self.action!r}: 'policy' is needed with the action 'policy', and "
                "with no other"
            )
        if self.on_resolved == "restore" and self.action != "policy":
            raise ValueError(f"rule {self.name!r}: on_resolved 'restore' needs the action 'policy'")
        return self

    def matches(self, labels: dict[str, str]) -> bool:
        """Tell whether an alert with these labels is one of the rule's."""
        if self.alertname is not None and labels.get("alertname") != self.alertname:
            return False
        if any(labels.get(label) != value for label, value in self.labels.items()):
            return False
        return all(re.fullmatch(pattern, labels.get(label, "")) for label, pattern in self.labels_regex.items())


class AlertSettings(Section):
    """Rules from alerts to actions."""

    rules: Annotated[tuple[Rule, ...], Field(max_length=MAX_RULES)] = ()
    """All rules that match an alert act, in this order: a checkpoint, then a stop."""
    dry_run: bool = False
    """Tell what would be done, and do nothing, whatever the rules say."""
    run_label: Label = "run_id"
    """The label of alerts that names the run."""
    own_host_only: bool = False
    """Act only on runs whose manifest names this host: for a directory that several hosts share."""
    max_age_seconds: Annotated[float, between(10, 86400)] = 900.0
    """An alert that was accepted longer ago is not acted on any more, as after the monitor was down."""
    answer_seconds: Annotated[float, between(1, 86400)] = 900.0
    """How long a job has to answer what it was asked before it is told that it has not."""

    @field_validator("rules")
    @classmethod
    def _have_names(cls, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
        names = [rule.name for rule in rules]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{names.count(name)} rules have the name {name!r}: every rule needs its own")
        return rules
