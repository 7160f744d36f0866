"""The page of security and that of the API say what is so: each claim has its test, each example is answered."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gradiometer_monitor.web.roles import PERMISSIONS, ROLES, Permission
from gradiometer_monitor.web.settings import LimitSettings

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Start, WaitUntil, WriteRun

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SUFFIXES = (".md", ".sh", ".yml", ".yaml", ".conf")
if not DOCS.is_dir():
    pytest.skip("the documentation is not beside the tests", allow_module_level=True)


def test_every_claim_has_its_test() -> None:
    """Each row of a table of claims names tests, and each of them is a function of the tests."""
    page = (DOCS / "security.md").read_text()
    tables = re.findall(r"\| claim \| test \|\n\|---\|---\|\n((?:\|.*\n)+)", page)
    rows = [row for table in tables for row in table.splitlines()]
    written = "\n".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)", written, re.MULTILINE))
    assert len(rows) > 25
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert there.issuperset(named), row


def test_the_limits_of_the_page_are_the_defaults() -> None:
    """Each limit that has a setting is there with the value that it has unless told otherwise."""
    page, factors = (DOCS / "security.md").read_text(), {"MiB": 2**20, "KiB": 2**10, "s": 1, "": 1}
    rows = re.findall(r"\| ([0-9]+) ?(MiB|KiB|s|) \| `limits\.(\w+)`", page)
    assert {name: float(number) * factors[unit] for number, unit, name in rows} == LimitSettings().model_dump()


def test_the_roles_of_the_page_are_those_there_are() -> None:
    """Each role is in the page's table, with all that it may."""
    table = (DOCS / "security.md").read_text().partition("| role | may | is for |\n|---|---|---|\n")[2]
    rows = (row.split(" | ") for row in table.partition("\n\n")[0].splitlines())
    told = {role.strip("| `"): may.replace("`", "").split(", ") for role, may, _ in rows}
    assert told == {role: _phrases(may) for role, may in ROLES.items()}


def _phrases(may: Iterable[Permission]) -> list[str]:
    return [phrase for each in may for phrase in PERMISSIONS[each].split(", ")]


SHIPPED = {"prometheus": "metrics", "alertmanager": "alerts"}
"""The roles of clients that are machines."""


def test_shipped_tokens_have_the_narrowest_role() -> None:
    """Wherever a token for Prometheus or Alertmanager is made, or written of, it has the role that is for just that."""
    files = [path for name in ("deploy", "docs") for path in (ROOT / name).rglob("*") if path.suffix in SUFFIXES]
    found = [
        (client, role, path.name)
        for path in files
        for role, client in re.findall(
            r"\b(metrics|alerts|read|write|ROLE) (prometheus|alertmanager)\b", path.read_text()
        )
    ]
    assert {client for client, _, _ in found} == SHIPPED.keys()
    assert {name for _, _, name in found} >= {"prepare.sh", "tokens.conf", "deploy.md", "alert-actions.md", "api.md"}
    for client, role, name in found:
        assert role == SHIPPED[client], name


@pytest.mark.native
def test_the_examples_of_the_api_are_answered(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil,
    native_binary: Callable[[str], str],
) -> None:  # fmt: skip
    """Each curl of the page gets the answer that it should, from a monitor that has no tokens."""
    native_binary("curl")
    write_run(make_manifest("demo", created_ns=time.time_ns()), [[1.0] * 4])
    monitor = start()
    wait_until(lambda: monitor.state("demo"))
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / "api.md").read_text(), re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.startswith("curl")]
    assert len(commands) == 8
    for command in commands:
        words = [*shlex.split(command.replace("http://127.0.0.1:9477", monitor.url)), "-w", "\n%{http_code}"]
        environment = os.environ | {"TOKEN": "none"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
        assert done.stdout.splitlines()[-1] == ("403" if "PUT" in words else "200"), (command, done.stdout)
