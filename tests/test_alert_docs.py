"""The example of docs/alert-actions.md is one: each of its files is accepted by the program that reads it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gradiometer_monitor.alerts.service import OUTCOMES
from gradiometer_monitor.alerts.settings import AlertSettings, Rule

PAGE = Path(__file__).parent.parent / "docs" / "alert-actions.md"
if not PAGE.exists():
    pytest.skip("the documentation is not beside the tests", allow_module_level=True)


def example(name: str) -> str:
    (found,) = re.findall(rf"```yaml\n# {re.escape(name)}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return str(found)


@pytest.mark.native
@pytest.mark.parametrize(
    ("name", "command"),
    [("rules.yml", ["promtool", "check", "rules"]), ("alertmanager.yml", ["amtool", "check-config"])],
)
def test_files_of_others(tmp_path: Path, native_binary: Callable[[str], str], name: str, command: list[str]) -> None:
    """Prometheus and Alertmanager take the files as they stand."""
    (tmp_path / name).write_text(example(name))
    checked = [native_binary(command[0]), *command[1:], str(tmp_path / name)]
    done = subprocess.run(checked, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.native
def test_where_alerts_go(tmp_path: Path, native_binary: Callable[[str], str]) -> None:
    """Alerts that ask for an action reach the monitor as well as people; others do not reach the monitor."""
    (tmp_path / "alertmanager.yml").write_text(example("alertmanager.yml"))
    for label, receivers in (("action=tighten", "gradiometer,people"), ("severity=page", "people")):
        command = [native_binary("amtool"), "config", "routes", "test", f"--config.file={tmp_path}/alertmanager.yml"]
        done = subprocess.run([*command, label], capture_output=True, text=True, timeout=60)
        assert done.stdout.strip() == receivers, done.stderr


def test_the_rules_match_the_alerts() -> None:
    """What the rules of Prometheus label, the rules of the monitor act on."""
    groups: Any = yaml.safe_load(example("rules.yml"))["groups"]
    settings = AlertSettings.model_validate(yaml.safe_load(example("monitor.yml"))["alerts"])
    acting = {
        rule["alert"]: [
            each.name for each in settings.rules if each.matches(rule["labels"] | {"alertname": rule["alert"]})
        ]
        for rule in groups[0]["rules"]
    }
    assert acting == {"GradientSpike": ["tighten"], "LossNotFinite": ["save", "stop"]}


def test_every_setting_and_outcome_is_on_the_page() -> None:
    """The tables of settings and outcomes leave none out, and the defaults are those of the code."""
    text = PAGE.read_text()
    names = {*Rule.model_fields, *AlertSettings.model_fields, *OUTCOMES} - {"rules"}
    assert {name for name in names if f"`{name}`" not in text} == set()
    for name in ("cooldown_seconds", "max_per_hour", "dry_run", "on_resolved"):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        default = Rule.model_fields[name].default
        shown = default if isinstance(default, str) else json.dumps(int(default) if type(default) is float else default)
        assert row.split("|")[2].strip(" `") == shown
