"""docs/policies.md lists every kind, with the settings and defaults that the models have, and a picture."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradiometer.policy.kinds import KINDS
from gradiometer.policy.schema import policy_schema

PAGE = Path(__file__).parent.parent / "docs" / "policies.md"
if not PAGE.is_file():
    pytest.skip("the documentation is not beside the tests", allow_module_level=True)
NO_PICTURE = {"agc", "value"}
COMMON = {"name", "match", "exclude"}


def settings_table(kind: str) -> str:
    """Write the settings of one kind from its model."""
    schema = policy_schema()["$defs"][kind]
    rows = [
        f"| `{name}` | {_default(setting)} | {' '.join(setting['description'].split()).replace('``', '`')} |"
        for name, setting in schema["properties"].items()
        if name not in COMMON
    ]
    return "\n".join(["| setting | default | |", "|---|---|---|", *rows])


def _default(setting: dict[str, Any]) -> str:
    if "default" not in setting:
        return "must be given"
    default = setting["default"]
    return "none" if default is None else str(default)


def _between(kind: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- settings of {kind} -->\n)(.*?)\n?(<!-- end -->)", re.DOTALL)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_are_those_of_the_model(kind: str, request: pytest.FixtureRequest) -> None:
    """The table of each kind is what its model makes; ``--update-golden`` writes it."""
    text = PAGE.read_text()
    if request.config.getoption("--update-golden"):
        table = settings_table(kind)
        text = _between(kind).sub(lambda match: f"{match[1]}{table}\n{match[3]}", text)
        PAGE.write_text(text)
    found = _between(kind).search(text)
    assert found is not None
    assert found[2] == settings_table(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_section(kind: str) -> None:
    """Each kind has formula, reference, state, use and traps, and a small picture where one can be drawn."""
    section = PAGE.read_text().split(f"### `{kind}`\n")[1].split("\n### ")[0].split("\n## ")[0]
    for word in ("*Reference:*", "*State and warm-up:*", "*When:*", "*Traps:*"):
        assert word in section
    assert (f"images/policy-{kind}.png" in section) == (kind not in NO_PICTURE)
    if kind not in NO_PICTURE:
        assert (PAGE.parent / "images" / f"policy-{kind}.png").stat().st_size < 60_000


def test_the_pictures_can_be_drawn(tmp_path: Path) -> None:
    """examples/plot_policies.py draws a small picture of each kind, or says why there is none."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = subprocess.run(
        [sys.executable, str(PAGE.parents[1] / "examples" / "plot_policies.py"), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    pictures = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    for kind in KINDS:
        assert pictures.get(f"policy-{kind}.png", 60_000) < 60_000 or f"{kind}: no picture, " in done.stdout
    assert "policy-global_norm.png" in pictures
