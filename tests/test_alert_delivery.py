"""From a gradient to a person: a training that goes wrong, the monitor, Prometheus with the rules that are shipped,
Alertmanager with the configuration that is shipped, and the notification that arrives.

All durations of the rules and of Alertmanager are divided by SPEED, and what is read is read more often; nothing else
is changed but addresses. The receiver's is that of a webhook of this test.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from gradiometer_dashboards.evaluation import Prometheus
from gradiometer_dashboards.rules import Settings, prometheus_rules
from tests._monitor import Monitor
from tests._ports import free_ports

if TYPE_CHECKING:
    from tests.conftest import Spawn, Start, WaitUntil

pytestmark = [pytest.mark.native, pytest.mark.slow]

SHIPPED = Path(__file__).parent.parent / "deploy" / "alertmanager.yml"
if not SHIPPED.is_file():
    pytest.skip("the deployment's files are not beside the tests", allow_module_level=True)

SPEED = 25
"""How many times faster than in earnest rules and Alertmanager go. A cause comes some time before what it holds back
would be told: twice as fast, that were less than a busy host is late by."""
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
GRAFANA = "http://grafana.test:3000"
HELD_BACK = {
    ("GradiometerSpike", "explodes"),
    ("GradiometerNonFinite", "breaks"),
    ("GradiometerLayerExploding", "breaks"),
    ("GradiometerLossNonFinite", "breaks"),
}
"""Alerts that follow from those that are told, by name and run."""
JOB = """
    import sys, time
    from pathlib import Path
    import torch
    from torch import nn
    from tests._training import attach, backward, loss_of

    root, ill = Path(sys.argv[1]), {"gradients": {}, "weights": {}}

    def train(name, seed):
        torch.manual_seed(seed)
        model = nn.Sequential()
        model.add_module("embed", nn.Linear(4, 8))
        model.add_module("act", nn.Tanh())
        model.add_module("middle", nn.Linear(8, 8))
        model.add_module("head", nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
        return model, optimizer, attach(root, model, optimizer, run_id=name)

    runs = {name: train(name, seed) for seed, name in enumerate(("explodes", "breaks", "healthy"))}
    broken, step = False, 0
    while True:
        if not broken and (root / "break").exists():
            broken = True
            runs["explodes"][0].middle.weight.register_hook(lambda gradient: gradient * 1e4)
            once = runs["breaks"][0].head.weight.register_hook(lambda gradient: gradient * float("nan"))
        for name, (model, optimizer, agent) in list(runs.items()):
            optimizer.zero_grad()
            loss = loss_of(model, step % 50)
            backward(loss)
            agent.log(loss=loss)
            optimizer.step()
            if name != "healthy" and (root / "end").exists():
                agent.detach()
                del runs[name]
        if broken and once:
            once = once.remove()
        step += 1
        time.sleep(0.002)
"""
"""Three trainings: one whose layer 'middle' explodes, one whose 'head' takes NaN in one step, and a healthy one."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """What was started, and what arrived."""

    monitor: Monitor
    prometheus: Prometheus
    delivered: list[dict[str, Any]] = field(default_factory=list)
    fired: set[tuple[str, str]] = field(default_factory=set)
    """Name and run of every alert that Prometheus had firing, told or not."""

    def told(self, run_id: str, status: str) -> list[dict[str, Any]]:
        """Return the alerts of a run that were told with a status, one for each time."""
        return [
            alert
            for message in list(self.delivered)
            for alert in message["alerts"]
            if alert["labels"].get("run_id") == run_id and alert["status"] == status
        ]


def quicker(text: str) -> str:
    """Divide every duration of rules by SPEED: of ranges and their steps, offsets, 'for' and 'keep_firing_for'."""
    times = re.compile(r"(\[|:(?=\d)|offset |for: )(\d+)(ms|[smhd])\b")
    return times.sub(lambda found: found[1] + divided(found[2] + found[3]), text)


def divided(duration: str) -> str:
    """Divide a duration by SPEED."""
    number, unit = re.fullmatch(r"(\d+)(\w+)", duration).groups()  # type: ignore[union-attr]  # ours are of this form
    return f"{round(int(number) * SECONDS[unit] * 1000 / SPEED)}ms"


def alertmanager_config(webhook: str) -> str:
    """Return the configuration that is shipped, with another receiver and shorter pauses."""
    config = yaml.safe_load(SHIPPED.read_text())
    for route in (config["route"], *config["route"]["routes"]):
        route |= {name: divided(value) for name, value in route.items() if isinstance(value, str) and name[:6] in
                  ("group_", "repeat") and value != "0s"}  # fmt: skip
    for receiver in config["receivers"]:
        receiver["webhook_configs"] = [{"url": f"{webhook}/{receiver['name']}", "send_resolved": True}]
    return yaml.safe_dump(config)


@pytest.fixture(scope="module")
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serve a webhook, and give its address and what was posted to it."""
    posted: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["content-length"]))) | {"path": self.path})
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", posted
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def stack(
    webhook: tuple[str, list[dict[str, Any]]], shared_start: Start, shared_spawn: Spawn, wait_until: WaitUntil,
    native_binary: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory,
) -> Stack:  # fmt: skip
    """Start trainings, monitor, Prometheus and Alertmanager; break two of the trainings; wait until all is resolved."""
    side, root = tmp_path_factory.mktemp("side"), tmp_path_factory.mktemp("runs")
    shared_spawn(sys.executable, "-c", textwrap.dedent(JOB), root)
    monitor = shared_start(root=root)
    alertmanager, prometheus = (f"127.0.0.1:{port}" for port in free_ports(2))
    (side / "alertmanager.yml").write_text(alertmanager_config(webhook[0]))
    shared_spawn(
        native_binary("prometheus-alertmanager"), f"--config.file={side}/alertmanager.yml",
        f"--storage.path={side}/alertmanager", f"--web.listen-address={alertmanager}", "--cluster.listen-address=",
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    settings = Settings(runbook_url=f"{monitor.url}/runbooks", grafana_url=GRAFANA)
    (side / "rules.yml").write_text(quicker(prometheus_rules(settings)))
    (side / "prometheus.yml").write_text(yaml.safe_dump(_prometheus_config(side, monitor, alertmanager)))
    shared_spawn(
        native_binary("prometheus"), f"--config.file={side}/prometheus.yml", f"--storage.tsdb.path={side}/data",
        f"--web.listen-address={prometheus}", stderr=subprocess.DEVNULL,
    )  # fmt: skip
    made = Stack(monitor=monitor, prometheus=Prometheus(url=f"http://{prometheus}"), delivered=webhook[1])
    _go_wrong(made, root, wait_until)
    return made


def _prometheus_config(side: Path, monitor: Monitor, alertmanager: str) -> dict[str, Any]:
    targets = {"targets": [monitor.url.removeprefix("http://")]}
    return {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(side / "rules.yml")],
        "scrape_configs": [{"job_name": "gradiometer", "static_configs": [targets]}],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
    }


def _go_wrong(stack: Stack, root: Path, wait_until: WaitUntil) -> None:
    """Break what is to break once it is warm, end it when that was told, and wait until Prometheus has nothing left."""

    def warm() -> bool:
        found = _ask(stack, "query", query="run:gradiometer_steps:min5m >= 1000")
        return len(found.get("result", [])) == 3

    def firing() -> set[tuple[str, str]] | None:
        alerts = _ask(stack, "alerts").get("alerts")
        if alerts is None:
            return None  # which is not known: Prometheus has not answered
        found = {(each["labels"]["alertname"], each["labels"].get("run_id", "")) for each in alerts
                 if each["state"] == "firing"}  # fmt: skip
        stack.fired.update(found)
        return found

    wait_until(warm, 180)
    (root / "break").touch()
    wait_until(lambda: firing() and stack.told("explodes", "firing") and stack.told("breaks", "firing"), 120)
    wait_until(lambda: firing() and stack.fired >= HELD_BACK, 120)
    (root / "end").touch()
    wait_until(lambda: firing() == set(), 180)
    wait_until(lambda: stack.told("explodes", "resolved") and stack.told("breaks", "resolved"), 120)
    time.sleep(float(divided("5m").removesuffix("ms")) / 1000 / 2)  # what is told too often, or late, is told by then


def _ask(stack: Stack, path: str, **parameters: str) -> dict[str, Any]:
    """Ask Prometheus; nothing is known while it starts."""
    url = f"{stack.prometheus.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            found: dict[str, Any] = json.load(response)["data"]
            return found
    except OSError:
        return {}


@pytest.mark.parametrize(
    ("run_id", "name", "layer"),
    [("explodes", "GradiometerLayerExploding", "middle"), ("breaks", "GradiometerNonFiniteUpdate", "head")],
)
def test_one_notification_says_all(stack: Stack, run_id: str, name: str, layer: str) -> None:
    """It comes once, names run and layer, and leads to a runbook that is there and to the dashboard of that run."""
    (alert,) = stack.told(run_id, "firing")
    said = alert["annotations"]
    assert (alert["labels"]["alertname"], alert["labels"]["severity"]) == (name, "critical")
    assert f"Run {run_id}:" in said["summary"]
    assert f"layer {layer}" in said["summary"]
    with urllib.request.urlopen(said["runbook_url"], timeout=30) as response:
        assert f'<h1 id="{name.lower()}">{name}</h1>' in response.read().decode()
    assert said["dashboard_url"].startswith(f"{GRAFANA}/d/gradiometer-")
    assert f"var-run_id={run_id}" in said["dashboard_url"]


@pytest.mark.parametrize("run_id", ["explodes", "breaks"])
def test_its_end_is_told_once(stack: Stack, run_id: str) -> None:
    """Resolved comes once, for the same firing."""
    (ended,) = stack.told(run_id, "resolved")
    (began,) = stack.told(run_id, "firing")
    assert ended["fingerprint"] == began["fingerprint"]
    assert ended["startsAt"] == began["startsAt"]


def test_what_follows_is_held_back(stack: Stack) -> None:
    """Prometheus had more alerts of both runs; nobody was told of them, at no time, and by no other way."""
    assert stack.fired >= HELD_BACK
    told = [(each["status"], len(each["alerts"])) for each in stack.delivered]
    assert sorted(told) == [("firing", 1), ("firing", 1), ("resolved", 1), ("resolved", 1)]
    assert {each["path"] for each in stack.delivered} == {"/on-call"}


def test_a_healthy_run_is_not_mentioned(stack: Stack) -> None:
    """It trains beside the others, in the same process, until the end; no alert of it ever fires."""
    assert stack.monitor.state("healthy") == "running"
    assert stack.monitor.runs()["healthy"]["steps"] > 1000
    assert {run_id for _, run_id in stack.fired} == {"explodes", "breaks"}
