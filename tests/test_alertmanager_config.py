"""deploy/alertmanager.yml: Alertmanager takes it as it is, and with each of its examples; alerts go where it says."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from gradiometer.metrics.metric import WINDOW_SECONDS
from gradiometer_dashboards.rules import ALERTS, Alert

if TYPE_CHECKING:
    from tests.conftest import Spawn, WaitUntil

FILE = Path(__file__).parent.parent / "deploy" / "alertmanager.yml"
if not FILE.is_file():
    pytest.skip("the deployment's files are not beside the tests", allow_module_level=True)

TEXT = FILE.read_text()
EXAMPLES = re.findall(r"^ +# \[(\w+)\]$", TEXT, re.MULTILINE)
Check = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def check(tmp_path: Path, native_binary: Callable[[str], str]) -> Check:
    """Give a function that has amtool check a configuration."""

    def run(text: str) -> subprocess.CompletedProcess[str]:
        path = tmp_path / "alertmanager.yml"
        path.write_text(text)
        command = [native_binary("amtool"), "check-config", str(path)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return run


def with_example(*names: str) -> str:
    """Take examples out of their comments: each line after ``# [name]``, up to the next empty one."""
    found = TEXT
    for name in names:
        (block,) = re.findall(rf"^ +# \[{name}\]\n((?: +#.*\n)+)", found, re.MULTILINE)
        found = found.replace(block, re.sub(r"^( +)# ", r"\1", block, flags=re.MULTILINE))
    return found


@pytest.mark.native
@pytest.mark.parametrize("names", [(), *((name,) for name in EXAMPLES), tuple(EXAMPLES)], ids="+".join)
def test_alertmanager_takes_it(check: Check, names: tuple[str, ...]) -> None:
    """As it is shipped, with each example by itself, and with all of them together."""
    done = check(with_example(*names))
    assert done.returncode == 0, done.stdout + done.stderr
    receivers = {each["name"]: set(each) - {"name"} for each in yaml.safe_load(with_example(*names))["receivers"]}
    assert receivers == {"on-call": {f"{name}_configs" for name in names}, "monitor": {"webhook_configs"}}


@pytest.mark.native
def test_a_mistake_in_an_example_is_found(check: Check) -> None:
    """What is checked is the example: a setting that Alertmanager does not know is refused."""
    done = check(with_example("slack").replace("channel:", "chanel:"))
    assert done.returncode != 0
    assert "chanel" in done.stdout + done.stderr


@pytest.mark.native
def test_names_mention_nobody_in_slack(tmp_path: Path, native_binary: Callable[[str], str]) -> None:
    """A layer whose name Slack would take for a mention or a link is told by its name."""
    texts = {name: f"{name} of <!channel> <https://else.test|layer>" for name in ("summary", "description")}
    links = {"runbook_url": "https://runbook.test", "dashboard_url": "https://dashboard.test"}
    alert = {"status": "firing", "labels": {"alertname": "A", "severity": "critical"}, "annotations": texts | links}
    (tmp_path / "data.json").write_text(json.dumps({"status": "firing", "alerts": [alert]}))
    (slack,) = yaml.safe_load(with_example("slack"))["receivers"][0]["slack_configs"]
    for name, told in (("title", "summary"), ("text", "description")):
        command = [native_binary("amtool"), "template", "render", "--template.glob", str(tmp_path / "none")]
        command += ["--template.data", str(tmp_path / "data.json"), "--template.text", slack[name]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert f"{told} of &lt;!channel> &lt;https://else.test|layer>" in done.stdout
        assert re.findall("<.*?>", done.stdout) == [f"<{links[f'{link}_url']}|{link}>" for link in
                                                    ("runbook", "dashboard") if name == "text"]  # fmt: skip


@pytest.mark.native
@pytest.mark.parametrize(
    ("labels", "receivers"),
    [
        ("alertname=GradiometerNonFiniteUpdate severity=critical run_id=a", "on-call"),
        ("alertname=GradiometerSpike severity=warning run_id=a", "on-call"),
        ("alertname=GradiometerSeriesDropped severity=info run_id=a", "on-call"),
        ("alertname=GradientSpike severity=critical run_id=a action=tighten", "monitor,on-call"),
    ],
)
def test_alerts_go_where_they_should(native_binary: Callable[[str], str], labels: str, receivers: str) -> None:
    """Every severity is told to people, and what asks for an action to the monitor besides."""
    command = [native_binary("amtool"), "config", "routes", "test", f"--config.file={FILE}", *labels.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == receivers


def test_inhibition_names_alerts_that_there_are() -> None:
    """Each rule's source and targets are alerts of ours, told apart by labels that both have."""
    severities = {alert.alertname: alert for alert in ALERTS}
    for rule in yaml.safe_load(TEXT)["inhibit_rules"]:
        (source,) = _matching(rule["source_matchers"], set(severities))
        targets = _matching(rule["target_matchers"], set(severities))
        assert targets
        assert source not in targets
        assert set(rule["equal"]) == {*severities[source].by, "cluster"}


def _named(name: str, **labels: str) -> dict[str, str]:
    return {"alertname": f"Gradiometer{name}", "severity": "warning"} | labels


CAUSES = [
    _named("NonFiniteUpdate", job="g", run_id="a", cluster="x"),
    _named("LayerExploding", job="h", run_id="a"),
    _named("MonitorDown", job="gone", cluster="x"),
    _named("MonitorDown", job="h", instance="i"),
]
HELD = [
    _named("Spike", job="g", run_id="a", cluster="x"),
    _named("Spike", job="h", run_id="a"),
    _named("LayerVanishing", job="gone", run_id="a", cluster="x"),
    _named("MonitorDegraded", job="h", instance="i"),
]
TOLD = [
    *CAUSES,
    _named("Spike", job="g", run_id="a", cluster="y"),
    _named("Spike", job="g", run_id="a"),
    _named("Spike", job="g", run_id="b", cluster="x"),
    _named("Stalled", job="g", run_id="a", cluster="x"),
    _named("NonFinite", job="h", run_id="a"),
    _named("LayerVanishing", job="gone", run_id="a", cluster="y"),
    _named("LayerVanishing", job="h", run_id="a"),
    _named("MonitorDegraded", job="h", instance="j"),
    {"alertname": "HostDown", "job": "gone", "cluster": "x"},
]
"""What is told: of another run, job, cluster or monitor, or not of what follows from a cause."""


@pytest.mark.native
def test_only_what_follows_is_held_back(
    native_binary: Callable[[str], str], spawn: Spawn, free_port: int, wait_until: WaitUntil, tmp_path: Path
) -> None:
    """Alertmanager itself holds back what follows from a cause, and nothing else, whichever labels are missing."""

    spawn(
        native_binary("prometheus-alertmanager"), f"--config.file={FILE}", f"--storage.path={tmp_path}",
        f"--web.listen-address=127.0.0.1:{free_port}", "--cluster.listen-address=", stderr=subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{free_port}/api/v2/alerts"

    def posted() -> bool:
        body = json.dumps([{"labels": labels} for labels in (*CAUSES, *HELD, *TOLD)]).encode()
        try:
            urllib.request.urlopen(urllib.request.Request(url, body, {"content-type": "application/json"})).close()
        except OSError:
            return False
        return True

    def asked(query: str = "") -> list[Any]:
        with urllib.request.urlopen(f"{url}?{query}") as answer:
            return [alert["labels"] for alert in json.load(answer)]

    def sorts(found: list[Any]) -> list[Any]:
        return sorted(found, key=lambda labels: sorted(labels.items()))

    wait_until(posted)
    wait_until(lambda: len(asked()) == len(HELD) + len(TOLD))
    wait_until(lambda: len(asked("active=false")) >= len(HELD))  # each cause is taken in by itself, and holds back one
    assert sorts(asked("active=false")) == sorts(HELD)
    assert sorts(asked("inhibited=false")) == sorts(TOLD)


def test_what_holds_back_stays_longer() -> None:
    """A spike that was held back is not told when the explosion is over: that alert goes on for longer."""
    in_ranges = max(seconds(found) for found in re.findall(r"\[(\w+)\]", named("Spike").value))
    spike = WINDOW_SECONDS + in_ranges + seconds(named("Spike").keep_firing)
    exploding = seconds(named("LayerExploding").keep_firing)
    assert spike + 60 < exploding
    after_a_run, counted = 5 * 60, 10 * 60  # for how long a run counts as running, and an update as new
    assert after_a_run + exploding + 60 < counted + seconds(named("NonFiniteUpdate").keep_firing)


def named(name: str) -> Alert:
    """Return an alert by its name."""
    (found,) = (alert for alert in ALERTS if alert.name == name)
    return found


def seconds(duration: str) -> float:
    """Read a duration of one unit."""
    return float(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]


def _matching(matchers: list[str], names: set[str]) -> set[str]:
    """Return the names that fit all matchers of ``alertname``."""
    for matcher in matchers:
        found: Any = re.fullmatch(r'alertname(!?=)(~?)"(.+)"', matcher)
        fits = {name for name in names if re.fullmatch(found[3] if found[2] else re.escape(found[3]), name)}
        names = names - fits if found[1] == "!=" else names & fits
    return names


def test_one_run_is_one_group() -> None:
    """Alerts are grouped by run, and a warning waits until its cause can have become critical."""
    route = yaml.safe_load(TEXT)["route"]
    assert route["group_by"] == ["job", "run_id", "cluster"]
    assert seconds(named("LayerExploding").lasting) + 30 < seconds(route["group_wait"])
    (critical,) = (each for each in route["routes"] if each["matchers"] == ['severity="critical"'])
    assert critical["group_wait"] == "10s"
