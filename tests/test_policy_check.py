"""``gradiometer policy check`` and ``schema``: everything that is wrong at once, each with its place in the file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from gradiometer.cli import app
from gradiometer.policy.kinds import KINDS
from gradiometer.policy.schema import SCHEMA_FILE, policy_schema
from gradiometer.policy.spec import PolicyError, load_policy
from tests.test_policy_spec import WHOLE, WRONG

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, WriteRun

ROOT = Path(__file__).parent.parent
EVERYTHING = """\
version: 1
groups: {by: layr}
pipelin: 3
pipeline:
  - global_nrm: {max_norm: 1}
  - value:
      max_abs: 1
  - global_norm: {max_norm: -1, max_nrom: 2, exclude: ["re:("]}
  - nonfinite: {action: stop}
  - global_norm: {max_norm: 1, max_norm: 2}
  - 3
  - group_norm: {scope: group, max_norm: 1}
  - skip: {rule: abs}
"""
FOUND = {
    "2:14: groups.by is 'layr'": "did you mean 'layer'?",
    "3:10: pipelin is 3": "did you mean 'pipeline'?",
    "5:5: pipeline[0]": "did you mean 'global_norm'?",
    "6:5: pipeline[1].value": "must be the last",
    "8:29: pipeline[2].global_norm.max_norm is -1": "greater than 0",
    "8:43: pipeline[2].global_norm.max_nrom is 2": "did you mean 'max_norm'?",
    "8:46: pipeline[2].global_norm.exclude is": "not a regular expression",
    "9:5: pipeline[3].nonfinite": "must be the first",
    "9:25: pipeline[3].nonfinite.action is 'stop'": "'skip', 'zero' or 'raise'",
    "10:5: pipeline[4].global_norm.name": "2 policies are named",
    "10:32: pipeline[4].global_norm": "'max_norm' is given twice",
    "11:5: pipeline[5] is 3": "expected one policy",
    "12:25: pipeline[6].group_norm.scope is 'group'": "groups.by is 'layr'",
    "13:5: pipeline[7].skip": "threshold goes with rule: abs",
}


def check(*arguments: str | Path) -> tuple[int, str, list[str]]:
    """Run ``policy check``; return exit status, stdout and the lines of stderr."""
    done = CliRunner().invoke(app, ["policy", "check", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr.splitlines()


def write(tmp_path: Path, text: str, name: str = "policy.yaml") -> Path:
    """Write a policy file."""
    path = tmp_path / name
    path.write_text(text)
    return path


def test_everything_wrong_is_reported_at_once(tmp_path: Path) -> None:
    """Fields, shapes and what is between stages: one line each, in the order of the file, with line and column."""
    path = write(tmp_path, EVERYTHING)
    status, _, lines = check(path)
    assert status == 1
    for (start, said), line in zip(FOUND.items(), lines, strict=True):
        assert line.startswith(f"{path}:{start}"), line
        assert said in line, line


def test_names_of_groups_in_the_wrong_place(tmp_path: Path) -> None:
    """Whoever writes named groups right under ``groups`` is told where they go."""
    path = write(tmp_path, "groups: {head: 'head.*', rest: ['*']}\npipeline: [{group_norm: {max_norm: 1}}]\n")
    status, _, lines = check(path)
    assert status == 1
    for name, line in zip(("head", "rest"), lines, strict=True):
        assert f"groups: {{by: {{{name}: ...}}}}" in line


@pytest.mark.parametrize(
    ("pipeline", "told"),
    [
        ("[{global_norm: {max_norm: 1}}]", True),
        ("[{skip: {match: 'a*'}}]", True),
        ("[{skip: {on: loss}}]", True),
        ("[{skip: {}}, {global_norm: {max_norm: 1}}]", False),
        ("[nonfinite, {global_norm: {max_norm: 1}}]", False),
        ("[], shadow: [zclip]", False),
    ],
)
def test_a_pipeline_that_lets_nan_through(tmp_path: Path, pipeline: str, told: bool) -> None:
    """Nothing but ``nonfinite``, and ``skip`` by the whole norm, keeps NaN from the optimizer: that is said."""
    status, out, _ = check(write(tmp_path, f"{{pipeline: {pipeline}}}\n"))
    assert (status, "no stage 'nonfinite'" in out) == (0, told)


def test_problems_can_be_had_as_values(tmp_path: Path) -> None:
    """PolicyError holds each problem with path, value, line and column, for programs."""
    with pytest.raises(PolicyError) as caught:
        load_policy(write(tmp_path, "pipeline:\n  - global_norm: {max_norm: -1}\n"))
    (problem,) = caught.value.problems
    assert (problem.path, problem.value) == (("pipeline", 0, "global_norm", "max_norm"), "-1")
    assert (problem.line, problem.column) == (2, 29)


def test_a_missing_setting_points_at_its_policy(tmp_path: Path) -> None:
    """What is not there has no place of its own: the place of the policy is told."""
    status, _, lines = check(write(tmp_path, "pipeline:\n  - nonfinite\n  - global_norm: {}\n"))
    assert status == 1
    assert [line.split("policy.yaml")[1] for line in lines] == [
        ":3:5: pipeline[1].global_norm.max_norm: Field required"
    ]


def test_several_files(tmp_path: Path) -> None:
    """Each file is checked; one that is wrong makes the exit status 1, and the right one's table is shown."""
    good = write(tmp_path, yaml.safe_dump(WHOLE), "good.yaml")
    status, shown, lines = check(good, write(tmp_path, "pipeline: []\n", "bad.yaml"), tmp_path / "nowhere.yaml")
    assert status == 1
    assert "good.yaml" in shown
    assert "clip to a norm of 2" in shown
    assert ["bad.yaml" in line for line in lines] == [True, False]
    assert "does not exist" in lines[1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_told_in_a_sentence(tmp_path: Path, kind: str) -> None:
    """A right file exits with 0 and says what each stage does and for which parameters."""
    settings: dict[str, Any] = {
        "global_norm": {"max_norm": 1},
        "group_norm": {"max_norm": 1},
        "value": {"max_abs": 1},
    }.get(kind, {})
    if kind != "nonfinite":
        settings = settings | {"exclude": ["head.*"]}
    status, shown, lines = check(write(tmp_path, yaml.safe_dump({"pipeline": [{kind: settings}]})))
    assert (status, lines) == (0, [])
    (row,) = [line for line in shown.splitlines() if line.split()[:2] == ["1", kind]]
    assert ("not head.*" in row) == (kind != "nonfinite")
    assert len(row.split()) > 6


def test_numbers_and_words_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    """``on`` is a key and not True, and 1e-8 a number: as editors have it, and as the examples of papers write it."""
    path = write(tmp_path, "pipeline:\n  - skip: {on: [loss]}\n  - adagc: {floor: 1e-8}\n")
    assert check(path)[0] == 0
    assert load_policy(yaml.safe_load(path.read_text())) == load_policy(path)


def test_actions_are_told_and_checked_too(tmp_path: Path) -> None:
    """A line for each action that is right; of one that is wrong, the place of the fault."""
    path = write(tmp_path, "actions:\n  - {when: {skip_rate: {above: 0.2}}, do: {callback: save}, cooldown: 9}\n")
    status, shown, lines = check(path)
    assert (status, lines) == (0, [])
    assert "call save when skip_rate: above 0.2, window 500; at most once in 9 steps" in " ".join(shown.split())
    wrong = (
        "actions:\n  - {when: {skip_rate: {abov: 0.2}}, do: raise}\n  - {when: {norm_above: 1}, do: 3, colldown: 1}\n"
    )
    status, _, lines = check(write(tmp_path, wrong))
    assert status == 1
    assert [line.split("policy.yaml:")[1].split(": ")[0] for line in lines] == ["2:13", "2:31", "3:33", "3:46"]
    assert "did you mean 'above'?" in lines[1]
    assert "did you mean 'cooldown'?" in lines[3]


def test_patterns_are_matched_with_a_recorded_run(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """--run tells what each stage covers and leaves alone, and what nothing clips."""
    write_run(make_manifest(), np.ones((1, 4)))
    policy = write(tmp_path, "pipeline:\n  - nonfinite\n  - group_norm: {max_norm: 1, match: 'blocks.*'}\n")
    status, shown, _ = check(policy, "--run", "run", "--dir", tmp_path)
    assert status == 0
    assert "2 parameters, 1 unit" in shown
    assert "nothing clips 2 of the parameters: embed.0, head.3" in shown
    assert "group_norm leaves alone 2 of the parameters" in shown


def test_a_pattern_that_matches_nothing_of_the_run(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """All patterns without a parameter are errors, with their places; so is a stage without any."""
    write_run(make_manifest(), np.ones((1, 4)))
    policy = write(
        tmp_path,
        "groups: {by: {a: ['embed*', 'nope']}}\npipeline:\n  - value: {max_abs: 1, match: [blokcs, 'embed*'], exclude: "
        "['*']}\n",
    )
    status, _, lines = check(policy, "--run", tmp_path / "run")
    assert status == 1
    assert [line.split("policy.yaml:")[1][:4] for line in lines] == ["1:29", "3:33", "3:5:"]
    assert "the model has embed.0, blocks.0.1, blocks.0.2, …" in lines[1]


def test_check_needs_no_torch(tmp_path: Path) -> None:
    """A policy is checked where torch is not installed."""
    policy = write(tmp_path, yaml.safe_dump(WHOLE))
    code = (
        "import sys\nsys.modules['torch'] = None\nfrom gradiometer.cli import main\n"
        f"sys.argv[1:] = ['policy', 'check', {str(policy)!r}]\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "clamp to ±0.5" in done.stdout


def test_the_shipped_schema_does_not_drift(request: pytest.FixtureRequest) -> None:
    """policy/schema.json is what the models make, and what ``policy schema`` prints."""
    text = json.dumps(policy_schema(), indent=1) + "\n"
    if request.config.getoption("--update-golden"):
        SCHEMA_FILE.write_text(text)
    assert SCHEMA_FILE.read_text() == text
    assert CliRunner().invoke(app, ["policy", "schema"]).stdout == text


UNKNOWABLE = {"bad expression", "torch's name", "nonfinite late", "value early", "same name"}
UNKNOWABLE |= {"actions of one name", "an action about no policy"}
"""Cases that are wrong in what no schema can say."""
MORE_WRONG: dict[str, Any] = {
    "kind as a setting": [{"nonfinite": {"kind": "value"}}],
    "a boolean for a number": [{"global_norm": {"max_norm": True}}],
    "rule abs without threshold": [{"skip": {"rule": "abs"}}],
    "threshold without rule abs": [{"skip": {"threshold": 3}}],
    "settings missing": [{"value": None}],
    "bare name of what needs settings": ["value"],
    "unknown scope": [{"group_norm": {"max_norm": 1, "scope": "layers"}}],
    "neither word nor groups": {"groups": {"by": "blocks"}, "pipeline": ["nonfinite"]},
    "a group without patterns": {"groups": {"by": {"a": []}}, "pipeline": ["nonfinite"]},
    "on nothing": [{"skip": {"on": []}}],
    "on something else": [{"skip": {"on": "norm"}}],
    "two conditions": {"actions": [{"when": {"norm_above": 1, "skip_rate": {"above": 0.5}}, "do": "raise"}]},
    "no condition": {"actions": [{"when": {}, "do": "raise"}]},
    "a condition without its number": {"actions": [{"when": {"norm_above": None}, "do": "raise"}]},
    "a share above 1": {"actions": [{"when": {"skip_rate": {"above": 1.5}}, "do": "raise"}]},
    "nothing known to do": {"actions": [{"when": {"norm_above": 1}, "do": "stop"}]},
    "a callback without a name": {"actions": [{"when": {"norm_above": 1}, "do": {"callback": ""}}]},
    "one action alone": {"actions": {"when": {"norm_above": 1}, "do": "event"}},
    "too many actions": {"actions": [{"name": f"a{n}", "when": {"norm_above": 1}, "do": "event"} for n in range(33)]},
    "actions of one name": {"actions": [{"when": {"norm_above": 1}, "do": "event"}] * 2},
    "an action about no policy": {
        "actions": [{"when": {"clip_rate": {"policy": "zclip", "above": 0.5}}, "do": "event"}],
    },
    "no action": {"actions": []},
}
RIGHT: dict[str, Any] = {
    "whole": WHOLE,
    "bare": {"pipeline": ["nonfinite", "zclip"]},
    "no settings": {"pipeline": [{"nonfinite": None}]},
    "shadow alone": {"shadow": [{"percentile": {"p": 50, "scope": "layer"}}]},
    "groups": {
        "groups": {"by": {"embeddings": "embed*", "rest": ["*"]}, "exclude": "head.*"},
        "pipeline": [{"group_norm": {"max_norm": 1}}, {"adagc": {"scope": "group"}}],
    },
    "skip": {"pipeline": [{"skip": {"rule": "abs", "on": "loss", "threshold": 3}}, {"skip": {"name": "b"}}]},
    "actions alone": {"actions": [{"when": {"max_ratio": None}, "do": {"callback": "save"}, "timeout": 5}]},
    "actions": {
        "pipeline": ["nonfinite"],
        "actions": [{"name": "often", "when": {"clip_rate": {"policy": "nonfinite", "above": 0.9}}, "do": "event"}],
    },
    "everything of a kind": {"pipeline": [{"zclip": {"max_grad_norm": None, "match": "a*", "compat": "reference"}}]},
}


def _as_mapping(source: Any) -> Any:
    return {"pipeline": source} if isinstance(source, list) else source


def validator() -> Any:
    """Return a validator of the shipped schema."""
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads(SCHEMA_FILE.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("what", RIGHT)
def test_what_is_right_validates(what: str) -> None:
    """What load_policy takes, the schema takes."""
    assert load_policy(RIGHT[what]).to_dict()
    assert list(validator().iter_errors(RIGHT[what])) == []


@pytest.mark.parametrize("what", [*WRONG, *MORE_WRONG])
def test_the_schema_agrees_with_load_policy(what: str) -> None:
    """What load_policy refuses the schema refuses, but for what no schema can say."""
    source = WRONG[what][0] if what in WRONG else MORE_WRONG[what]
    with pytest.raises(PolicyError):
        load_policy(source)
    assert validator().is_valid(_as_mapping(source)) == (what in UNKNOWABLE)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_examples_validate(path: Path) -> None:
    """The policies of examples/ are right by both."""
    assert load_policy(path).stages
    assert validator().is_valid(yaml.safe_load(path.read_text()))


def test_every_setting_is_described() -> None:
    """An editor can show a sentence on every setting, and a default on all but those that must be given."""
    definitions = policy_schema()["$defs"]
    for kind in KINDS:
        for name, setting in definitions[kind]["properties"].items():
            assert setting["description"], (kind, name)
            assert ("default" in setting) != (name in definitions[kind].get("required", ())), (kind, name)
