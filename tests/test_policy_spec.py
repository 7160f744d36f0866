"""The policy file: what may be written, and errors that name source, path, value and expectation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gradiometer import PolicyError, PolicySpec, load_policy
from gradiometer.policy.base import Layout
from gradiometer.policy.build import build_pipeline
from gradiometer.policy.kinds import GlobalNormSpec, NonFiniteSpec, SkipSpec

WHOLE: dict[str, Any] = {
    "version": 1,
    "pipeline": [
        {"nonfinite": {"action": "skip", "max_consecutive": 5, "then": "raise"}},
        {"group_norm": {"max_norm": 1.0, "scope": "parameter", "exclude": ["lm_head.*"]}},
        {"global_norm": {"max_norm": 2.0, "name": "outer"}},
        {"value": {"max_abs": 0.5, "match": "re:^blocks"}},
    ],
}


def test_every_source_gives_the_same(tmp_path: Path) -> None:
    """A YAML file, by path or string, a dict, a list and a spec are the same policy."""
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(WHOLE))
    spec = load_policy(WHOLE)
    assert load_policy(path) == load_policy(str(path)) == load_policy(WHOLE["pipeline"]) == load_policy(spec) == spec


def test_objects_may_be_stages() -> None:
    """A list may hold specs as well as dicts and bare names."""
    spec = load_policy([NonFiniteSpec(), GlobalNormSpec(max_norm=1.0)])
    assert spec == load_policy(["nonfinite", {"global_norm": {"max_norm": 1}}])


def test_to_dict_goes_round() -> None:
    """``to_dict`` gives what one would write, and loads as the same policy."""
    spec = load_policy(WHOLE)
    assert load_policy(spec.to_dict()) == spec
    assert load_policy(yaml.safe_load(yaml.safe_dump(spec.to_dict()))) == spec
    assert load_policy(["nonfinite"]).to_dict() == {"version": 1, "pipeline": [{"nonfinite": {}}]}


def test_names_default_to_the_kind() -> None:
    """A stage is named after its kind unless it has a name."""
    assert load_policy(WHOLE).names == ("nonfinite", "group_norm", "outer", "value")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({}, 20), ({"compat": "reference"}, None), ({"compat": "reference", "max_consecutive": 20}, 20)],
)
def test_a_skip_has_a_bound_unless_it_is_to_the_letter(settings: dict[str, Any], wanted: int | None) -> None:
    """``max_consecutive`` is 20, with ``compat: reference`` none, and what is written wins; all go round."""
    spec = load_policy([{"skip": settings}])
    (stage,) = spec.pipeline
    assert isinstance(stage, SkipSpec)
    assert stage.max_consecutive == wanted
    assert load_policy(spec.to_dict()) == spec


GLOBAL = "pipeline[0].global_norm"
WRONG: dict[str, tuple[Any, list[str]]] = {
    "unknown key": (
        [{"global_norm": {"max_norm": 1, "max_nrm": 2}}],
        [f"{GLOBAL}.max_nrm", "is 2", "no such setting; there are"],
    ),
    "missing key": ([{"global_norm": {}}], [f"{GLOBAL}.max_norm", "required"]),
    "wrong type": ([{"global_norm": {"max_norm": "big"}}], [f"{GLOBAL}.max_norm", "is 'big'", "number"]),
    "negative": ([{"global_norm": {"max_norm": -1}}], [f"{GLOBAL}.max_norm", "is -1", "greater than 0"]),
    "zero": ([{"value": {"max_abs": 0}}], ["pipeline[0].value.max_abs", "is 0", "greater than 0"]),
    "infinite": ([{"global_norm": {"max_norm": float("inf")}}], [f"{GLOBAL}.max_norm", "is inf", "finite"]),
    "wrong choice": ([{"nonfinite": {"action": "stop"}}], ["pipeline[0].nonfinite.action", "'stop'", "'skip', 'zero'"]),
    "wrong norm": ([{"global_norm": {"max_norm": 1, "norm_type": 1}}], [f"{GLOBAL}.norm_type", "is 1", "L2"]),
    "zero in a row": ([{"nonfinite": {"max_consecutive": 0}}], ["nonfinite.max_consecutive", "is 0", "equal to 1"]),
    "bad expression": ([{"value": {"max_abs": 1, "match": "re:("}}], ["pipeline[0].value.match", "'re:('", "regular"]),
    "bad name": ([{"value": {"max_abs": 1, "name": "a b"}}], ["pipeline[0].value.name", "'a b'", "pattern"]),
    "unknown policy": ([{"clip": {"max_norm": 1}}], ["pipeline", "'clip'", "global_norm, group_norm, "]),
    "torch's name": ([{"value": {"max_abs": 1, "name": "clip_grad_value_"}}], ["'clip_grad_value_'", "torch's own"]),
    "two in one": (
        [{"value": {"max_abs": 1}, "nonfinite": {}}],
        ["pipeline[0]", "expected one policy"],
    ),
    "no settings": ([{"global_norm": 1.0}], ["pipeline[0]", "1.0", "key: value"]),
    "not a list": ({"version": 1, "pipeline": "nonfinite"}, ["pipeline", "'nonfinite'", "list of policies"]),
    "empty": ([], ["hold 0 policies", "at least 1"]),
    "too many": (
        [{"global_norm": {"max_norm": 1, "name": f"g{place}"}} for place in range(15)],
        ["hold 15 policies", "at most 14"],
    ),
    "nonfinite late": ([{"value": {"max_abs": 1}}, "nonfinite"], ["nonfinite must be the first"]),
    "value early": ([{"value": {"max_abs": 1}}, {"global_norm": {"max_norm": 1}}], ["value must be the last"]),
    "same name": ([{"global_norm": {"max_norm": 1}}] * 2, ["2 policies", "'global_norm'", "'name'"]),
    "wrong version": ({"version": 2, "pipeline": ["nonfinite"]}, ["version", "is 2", "1"]),
    "no policy at all": (3, ["the policy", "is 3", "expected a mapping such as"]),
    "wrong top": ({"pipeline": ["nonfinite"], "stages": []}, ["stages", "no such setting; there are"]),
}


@pytest.mark.parametrize("what", WRONG)
def test_errors_say_where_and_what(what: str) -> None:
    """A mistake is a PolicyError that names the source, the path, the value and what was expected."""
    source, parts = WRONG[what]
    with pytest.raises(PolicyError) as caught:
        load_policy(source)
    message = str(caught.value)
    for part in ("policy: ", *parts):
        assert part in message, message


def test_errors_name_the_file(tmp_path: Path) -> None:
    """A mistake in a file names the file, one line for each thing that is wrong."""
    path = tmp_path / "p.yaml"
    path.write_text("pipeline:\n  - global_norm: {max_norm: -1}\n  - value: {max_abs: x}\n")
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [str(path)] * 2


def test_a_missing_file(tmp_path: Path) -> None:
    """A file that is not there is an error that names it."""
    with pytest.raises(PolicyError, match=r"nowhere\.yaml does not exist"):
        load_policy(tmp_path / "nowhere.yaml")


def test_a_directory_is_no_policy(tmp_path: Path) -> None:
    """A path that cannot be read is an error that names it."""
    with pytest.raises(PolicyError, match=f"{tmp_path} cannot be read"):
        load_policy(tmp_path)


@pytest.mark.parametrize("text", ["pipeline: [", "a: b: c", "\t- x"])
def test_bad_yaml(tmp_path: Path, text: str) -> None:
    """A file that is not YAML is an error that names it."""
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=r"bad\.yaml:1:\d+: the policy is not YAML"):
        load_policy(path)


@pytest.mark.parametrize("text", ["", "nonfinite", "- nonfinite", "3"])
def test_yaml_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    """A YAML file that is not a mapping is an error that names it, and not a crash."""
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=r"odd\.yaml"):
        load_policy(path)


def test_a_policy_cannot_be_run_from_yaml(tmp_path: Path) -> None:
    """A tag that would make YAML build an object is refused."""
    path = tmp_path / "evil.yaml"
    path.write_text("pipeline: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(PolicyError, match="not YAML"):
        load_policy(path)


@pytest.mark.parametrize("key", ["match", "exclude"])
def test_a_pattern_that_covers_nothing(key: str) -> None:
    """A pattern without a parameter is misspelt: the error names the policy, the pattern and some names."""
    spec = load_policy([{"global_norm": {"max_norm": 1, key: "blocks.*.wieght"}}])
    layout = Layout(names=["blocks.0.weight"], layers=["blocks.0"], device=torch.device("cpu"))
    with pytest.raises(PolicyError, match=r"global_norm.*'blocks\.\*\.wieght'.*blocks\.0\.weight"):
        build_pipeline(spec, layout)


def test_a_spec_cannot_be_changed() -> None:
    """A policy is frozen."""
    spec = load_policy(["nonfinite"])
    with pytest.raises(ValueError, match="frozen"):
        spec.version = 1  # type: ignore[misc]  # that is the point
    assert isinstance(spec, PolicySpec)
