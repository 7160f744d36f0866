"""The runbooks say what is so: a page for each alert, with commands, queries, addresses and panels that there are."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import typer
import yaml

from gradiometer.cli import app
from gradiometer.metrics import CATALOGUE, PUSHED
from gradiometer.policy.spec import load_policy
from gradiometer.recorder import Recorder
from gradiometer_dashboards.thresholds import THRESHOLDS
from gradiometer_monitor.config.settings import Settings
from gradiometer_monitor.web.runbooks import INDEX, runbooks
from tests._monitor import Monitor
from tests._runbooks import blocks, commands, heredocs, inline, panels, urls

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, Promtool, Start

HEADINGS = (
    "What it means", "How bad it is", "See it", "Likely causes", "What to do now", "How to prevent it",
    "When to silence it",
)  # fmt: skip
PAGES = {name: text for name, text in runbooks().items() if name != INDEX}
RULES = files("gradiometer_dashboards").joinpath("alerts", "gradiometer.rules.yml")
OF_PROMETHEUS = {"scrape_duration_seconds", "scrape_samples_scraped", "up"}
SAID = {
    "Spike": (f"{THRESHOLDS.spike_ratio:g} times", f"first {THRESHOLDS.warm_up_steps} steps"),
    "ClipSaturated": (f"{THRESHOLDS.clip_ratio:.0%}".replace("%", " %"), f"first {THRESHOLDS.warm_up_steps} steps"),
    "SkippingRun": (f"More than {THRESHOLDS.skipped_in_a_row} steps",),
    "Stalled": (f"older than {THRESHOLDS.stalled_seconds:g} s",),
    "RankDivergence": (f"more than {THRESHOLDS.rank_deviation:.0%}".replace("%", " %"),),
}
"""Limits that a page repeats."""


@pytest.fixture(scope="module")
def monitor(
    shared_start: Start, make_manifest: MakeManifest, append: Append, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Monitor]:
    """Start a monitor over a run of the name that the pages have in place of one."""
    root = tmp_path_factory.mktemp("runs")
    recorder = Recorder(root, make_manifest("RUN", created_ns=time.time_ns()))
    append(recorder, [[1.0] * 4] * 3)
    yield shared_start(root=root)
    recorder.close()


def test_every_alert_has_its_page() -> None:
    """There is a page for each alert that is generated and none besides; the index has all, with their severity."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    alerts = {
        rule["alert"].removeprefix("Gradiometer"): rule["labels"]["severity"]
        for group in groups
        for rule in group["rules"]
        if "alert" in rule
    }
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.md\) \| (\w+) \|", runbooks()[INDEX], re.MULTILINE)
    assert set(PAGES) == set(alerts)
    assert {name: severity for name, _, severity in rows} == alerts
    assert all(name == target for name, target, _ in rows)


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_built_alike(name: str) -> None:
    """Each has the name of the alert as its title, the same headings in the same order, and two screens at most."""
    page = PAGES[name]
    assert page.startswith(f"# Gradiometer{name}\n")
    assert tuple(re.findall(r"^## (.+)$", page, re.MULTILINE)) == HEADINGS
    assert 40 <= len(page.splitlines()) <= 90
    assert re.search(r"^1\. ", page.partition("## Likely causes")[2], re.MULTILINE)
    assert "://" not in page.replace("http://127.0.0.1", "")


@pytest.mark.parametrize("name", SAID)
def test_limits_are_those_of_the_alerts(name: str) -> None:
    """A number that an alert stands on is the same on its page."""
    text = " ".join(PAGES[name].split())
    assert [said for said in SAID[name] if said not in text] == []


@pytest.mark.parametrize("name", runbooks())
def test_commands_are_understood(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command of ours is taken by the command line: its name, options, arguments and their choices."""
    monkeypatch.chdir(tmp_path)
    command = typer.main.get_command(app)
    page = runbooks()[name]
    for words in commands(page, "gradiometer"):
        _parse(command, words)
    for words in inline(page, "gradiometer"):
        _resolve(command, words)


def _parse(command: Any, words: list[str]) -> None:
    found, rest = _resolve(command, words)
    with found.make_context(found.name, rest):
        pass


def _resolve(command: Any, words: list[str]) -> tuple[Any, list[str]]:
    """Follow the groups to a command; return it, and what is left of the words."""
    while hasattr(command, "get_command"):
        found = command.get_command(command.make_context(command.name, [], resilient_parsing=True), words[0])
        assert found is not None, f"no command {words[0]}"
        command, words = found, words[1:]
    return command, words


@pytest.mark.parametrize("name", runbooks())
def test_files_to_be_written_are_right(name: str) -> None:
    """Every policy that a page has somebody write is one, and every piece of a monitor's configuration too."""
    page = runbooks()[name]
    for text in heredocs(page):
        assert load_policy(yaml.safe_load(text)).pipeline
    for text in blocks(page, "yaml"):
        assert text.startswith("# monitor.yaml\n")
        Settings.model_validate({"dir": ".", **yaml.safe_load(text)})


@pytest.mark.parametrize("name", runbooks())
def test_metrics_are_in_the_catalogue(name: str) -> None:
    """A page names metrics that are exported, and no others."""
    named = set(re.findall(r"\bgradiometer_[a-z_]+\b", runbooks()[name])) - {"gradiometer_remote_write"}
    assert named <= CATALOGUE.keys() | PUSHED.keys()


@pytest.mark.parametrize("name", PAGES)
def test_panels_are_on_their_dashboards(name: str) -> None:
    """A panel that a page sends its reader to is there, by that title, on the dashboard that it names."""
    there = {}
    for file in files("gradiometer_dashboards").joinpath("json").iterdir():
        board = json.loads(file.read_text())
        shown = [panel for row in board["panels"] for panel in (row, *row.get("panels", []))]
        there[board["title"].removeprefix("Gradiometer / ")] = {
            each["title"] for each in shown if each["type"] != "row"
        }
    wanted = panels(PAGES[name])
    assert wanted
    assert [(board, title) for board, title in wanted if title not in there.get(board, ())] == []


def test_addresses_answer(monitor: Monitor) -> None:
    """Every path of the monitor that a page asks for is answered with 200."""
    asked = set.union(*(urls(page) for page in runbooks().values()))
    assert len(asked) > 10
    for path in sorted(asked):
        status, body, _ = monitor.get(path.partition("#")[0] or "/")
        assert status == 200, (path, body)


@pytest.mark.native
def test_queries_are_valid(promtool: Promtool, tmp_path: Path) -> None:
    """Prometheus understands every query, and each asks for metrics that there are."""
    rules = []
    for name, page in runbooks().items():
        for number, query in enumerate(blocks(page, "promql")):
            rules.append({"record": f"runbook:{name}:{number}", "expr": query.strip()})
            assert OF_PROMETHEUS & set(re.findall(r"\w+", query)) or "gradiometer_" in query
    assert len(rules) >= len(PAGES)
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "runbooks", "rules": rules}]}))
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
