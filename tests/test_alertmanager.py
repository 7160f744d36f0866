"""A real Alertmanager, and a real Prometheus before it, lead a real training to what the rules of the monitor say."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import textwrap
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from gradiometer import open_run
from tests._monitor import Monitor

if TYPE_CHECKING:
    from tests.conftest import Spawn, Start, WaitUntil

pytestmark = [pytest.mark.native, pytest.mark.slow]

JOB = """
    import sys, time
    from pathlib import Path
    import torch
    from tests._training import attach, backward, loss_of, small_model
    root = Path(sys.argv[1])
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    with attach(root, model, optimizer, run_id="job", policy=[{"global_norm": {"max_norm": 1e6}}]) as agent:
        print("go", flush=True)
        while not agent.requested("stop"):
            optimizer.zero_grad()
            spiked = agent.step % 10 == 0 and (root / "spike").exists()  # seldom: its baseline stays what it is
            backward(loss_of(model, agent.step % 50) * (1000.0 if spiked else 1.0))
            optimizer.step()
            if request := agent.requested("checkpoint"):
                torch.save({"step": agent.step, "why": request.note}, root / "saved.pt")
                agent.done("checkpoint", "saved.pt")
            time.sleep(0.01)
"""
TIGHT = [{"global_norm": {"max_norm": 0.5}}]
Launch = Callable[..., tuple[Monitor, str]]


@pytest.fixture
def job(tmp_path: Path, spawn: Spawn) -> subprocess.Popen[str]:
    """Start a training that goes on until it is asked to stop, and spikes now and then once there is a file 'spike'."""
    process = spawn(sys.executable, "-c", textwrap.dedent(JOB), tmp_path, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    return process


@pytest.fixture
def launch(tmp_path: Path, start: Start, spawn: Spawn, free_port: int, native_binary: Any, wait_until: Any) -> Launch:
    """Give a function that starts a monitor with rules, and an Alertmanager that tells it; returns both addresses."""
    binary, side = native_binary("prometheus-alertmanager"), tmp_path.with_name(f"{tmp_path.name}-side")
    side.mkdir()

    def run(*rules: dict[str, Any], **settings: Any) -> tuple[Monitor, str]:
        tokens = {role: secrets.token_urlsafe(32) for role in ("read", "alerts")}
        (side / "tokens").write_text("".join(f"{role} {role}er {token}\n" for role, token in tokens.items()))
        for role, token in tokens.items():
            (side / role).write_text(token)
        for file in side.iterdir():
            file.chmod(0o600)
        config = {"auth": {"tokens_file": str(side / "tokens")}, "alerts": {"rules": rules, **settings}}
        (side / "monitor.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(config))))
        monitor = start("--config", str(side / "monitor.yaml"))
        (side / "alertmanager.yml").write_text(_alertmanager(monitor.url, side / "alerts"))
        url = f"http://127.0.0.1:{free_port}"
        spawn(
            binary, f"--config.file={side}/alertmanager.yml", f"--storage.path={side}/alertmanager",
            f"--web.listen-address=127.0.0.1:{free_port}", "--cluster.listen-address=", stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until(lambda: _ready(url))
        return monitor, url

    return run


def _alertmanager(monitor: str, token: Path) -> str:
    """Write the configuration of an Alertmanager in a hurry, which repeats itself every second."""
    webhook = {
        "url": f"{monitor}/api/v1/alerts",
        "send_resolved": True,
        "http_config": {"authorization": {"credentials_file": str(token)}},
    }
    route = {
        "receiver": "gradiometer", "group_by": ["alertname", "run_id"], "group_wait": "0s", "group_interval": "1s",
        "repeat_interval": "1s",
    }  # fmt: skip
    return yaml.safe_dump({"route": route, "receivers": [{"name": "gradiometer", "webhook_configs": [webhook]}]})


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/-/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _fire(alertmanager: str, *labels: dict[str, str], over: bool = False) -> None:
    """Post alerts to an Alertmanager, as Prometheus does."""
    now = datetime.now(UTC)
    ends = now - timedelta(seconds=1) if over else now + timedelta(hours=1)
    alerts = [
        {"labels": each, "annotations": {"summary": "norm too large"}, "endsAt": ends.isoformat()} for each in labels
    ]
    request = urllib.request.Request(
        f"{alertmanager}/api/v2/alerts",
        data=json.dumps(alerts).encode(),
        headers={"content-type": "application/json"},
        method="POST",
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.status == 200


def _outcomes(monitor: Monitor, tmp_path: Path) -> list[tuple[str, str]]:
    token = tmp_path.with_name(f"{tmp_path.name}-side") / "read"
    found = monitor.get("/api/v1/events?kind=alert_action", Authorization=f"Bearer {token.read_text()}")[1]
    return [(event["data"]["rule"], event["data"]["outcome"]) for event in json.loads(found)["events"]]


def _repeated(monitor: Monitor, tmp_path: Path, outcome: str) -> float:
    token = tmp_path.with_name(f"{tmp_path.name}-side") / "read"
    text = monitor.get("/metrics", Authorization=f"Bearer {token.read_text()}")[1].decode()
    lines = [line for line in text.splitlines() if "alert_actions_total{" in line and f'outcome="{outcome}"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_a_policy_while_an_alert_fires(
    tmp_path: Path, job: subprocess.Popen[str], launch: Launch, wait_until: WaitUntil
) -> None:
    """Notified again and again, an alert changes the policy of the run it names once; resolved, it restores it."""
    rule = {"name": "tighten", "alertname": "Spike", "action": "policy", "policy": TIGHT, "on_resolved": "restore"}
    monitor, alertmanager = launch(rule)
    ours, others = ({"alertname": "Spike", "run_id": run_id} for run_id in ("job", "of-another-host"))
    _fire(alertmanager, ours, others, {"alertname": "Else", "run_id": "job"})
    wait_until(lambda: _outcomes(monitor, tmp_path) == [("tighten", "asked"), ("tighten", "applied")])
    wait_until(lambda: _repeated(monitor, tmp_path, "repeated") >= 2 and _repeated(monitor, tmp_path, "elsewhere") >= 1)
    _fire(alertmanager, ours, others, over=True)
    wait_until(lambda: _outcomes(monitor, tmp_path)[2:] == [("tighten", "asked"), ("tighten", "applied")])
    policies = [each.policy and each.policy["pipeline"] for each in open_run(tmp_path / "job").history.revisions]
    assert policies == [[{"global_norm": {"max_norm": 1e6}}], TIGHT, [{"global_norm": {"max_norm": 1e6}}]]
    assert job.poll() is None


def test_dry_run_tells_and_does_nothing(
    tmp_path: Path, job: subprocess.Popen[str], launch: Launch, wait_until: WaitUntil
) -> None:
    """With dry_run an event says what would be done; the job goes on as it was."""
    monitor, alertmanager = launch({"name": "stop", "alertname": "Spike", "action": "stop"}, dry_run=True)
    _fire(alertmanager, {"alertname": "Spike", "run_id": "job"})
    wait_until(lambda: _repeated(monitor, tmp_path, "dry_run") >= 2)
    assert _outcomes(monitor, tmp_path) == [("stop", "dry_run")]
    assert job.poll() is None
    assert not list((tmp_path / "job").rglob("request-*"))


def test_from_a_rule_of_prometheus_to_a_checkpoint_and_a_stop(
    tmp_path: Path,
    job: subprocess.Popen[str],
    launch: Launch,
    spawn: Spawn,
    native_binary: Callable[[str], str],
    wait_until: WaitUntil,
) -> None:
    """A spike of the gradient norm is scraped, alerted of, saved, and ends the training; nobody is at the keyboard."""
    binary, side = native_binary("prometheus"), tmp_path.with_name(f"{tmp_path.name}-side")
    monitor, alertmanager = launch(
        {"name": "save", "labels": {"action": "save-and-stop"}, "action": "checkpoint"},
        {"name": "stop", "labels_regex": {"action": ".*stop"}, "action": "stop"},
    )
    rule = {
        "alert": "GradientSpike",
        "expr": "gradiometer_grad_norm_finite_window_max > 20 * gradiometer_grad_norm_baseline",
        "labels": {"action": "save-and-stop"},
        "annotations": {"summary": "the gradient norm of {{ $labels.run_id }} is {{ $value }}"},
    }
    (side / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "gradiometer", "rules": [rule]}]}))
    scrape = {
        "job_name": "gradiometer",
        "static_configs": [{"targets": [monitor.url.removeprefix("http://")]}],
        "authorization": {"credentials_file": str(side / "read")},
    }
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(side / "rules.yml")],
        "scrape_configs": [scrape],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager.removeprefix("http://")]}]}]},
    }
    (side / "prometheus.yml").write_text(yaml.safe_dump(config))
    spawn(
        binary, f"--config.file={side}/prometheus.yml", f"--storage.tsdb.path={side}/data",
        "--web.listen-address=127.0.0.1:0", stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_until(lambda: open_run(tmp_path / "job").status["steps"] > 100)
    assert job.poll() is None
    (tmp_path / "spike").touch()
    assert job.wait(timeout=180) == 0
    assert "gradient norm of job" in torch.load(tmp_path / "saved.pt")["why"]
    wait_until(lambda: len(_outcomes(monitor, tmp_path)) == 4)
    assert sorted(_outcomes(monitor, tmp_path)) == [
        ("save", "applied"),
        ("save", "asked"),
        ("stop", "applied"),
        ("stop", "asked"),
    ]
