"""What stands under deploy/ for systemd, Kubernetes and Slurm: accepted by their checkers, and run where possible."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from gradiometer_monitor.config.resolving import resolve as resolve_model
from gradiometer_monitor.config.settings import Settings

if TYPE_CHECKING:
    from tests.conftest import Spawn, WaitUntil

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
if not DEPLOY.is_dir():
    pytest.skip("deploy/ belongs to the repository, not to the wheel", allow_module_level=True)
UNIT = DEPLOY / "systemd" / "gradiometer-monitor@.service"
KUBERNETES = "1.34"
LIMITS = r"^(WatchdogSec|TimeoutStopSec)=(\d+)$"
Native = Callable[[str], str]
Yaml = dict[str, Any]


def _units(tmp_path: Path) -> Path:
    """Copy the unit, as an instance with its drop-in, naming programs that are there; return the folder."""
    text = UNIT.read_text().replace("/opt/gradiometer/bin/gradiometer", "/bin/true")
    (tmp_path / UNIT.name).write_text(text)
    (tmp_path / "gradiometer-monitor@root.service").write_text(text)
    drop_in = tmp_path / "gradiometer-monitor@root.service.d"
    drop_in.mkdir()
    shutil.copy(DEPLOY / "systemd" / "tokens.conf", drop_in)
    return tmp_path


def _ran(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, timeout=60, **options
    )


@pytest.mark.native
def test_systemd_accepts_the_unit(native_binary: Native, tmp_path: Path) -> None:
    """systemd finds no fault in the unit and its drop-in."""
    environment = os.environ | {"SYSTEMD_UNIT_PATH": f"{_units(tmp_path)}:"}
    unit = tmp_path / "gradiometer-monitor@root.service"
    done = _ran(native_binary("systemd-analyze"), "verify", "--man=no", unit, env=environment)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.native
def test_systemd_finds_the_unit_confined(native_binary: Native, tmp_path: Path) -> None:
    """By systemd's own measure, 0 to 10, little is exposed."""
    folder = _units(tmp_path)
    done = _ran(
        native_binary("systemd-analyze"),
        "security",
        "--offline=true",
        "--threshold=20",
        "--no-pager",
        folder / UNIT.name,
    )
    assert done.returncode == 0, done.stdout[-300:]


def test_the_unit_does_what_the_daemon_can() -> None:
    """Readiness, reload, watchdog and the end are those that the daemon knows, and training keeps its shared memory."""
    text = UNIT.read_text()
    for line in (
        "Type=notify",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "RemoveIPC=no",
        "User=%i",
        "ProtectSystem=strict",
    ):
        assert f"\n{line}\n" in text
    limits = {name: int(value) for name, value in re.findall(LIMITS, text, re.MULTILINE)}
    assert limits["WatchdogSec"] >= 60
    assert limits["TimeoutStopSec"] > 10


def _without_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("GRADIOMETER_"):
            monkeypatch.delenv(name)


def test_the_units_variables_and_config_are_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each variable that the unit and the drop-in set is that of a setting, and the config beside them is one."""
    _without_variables(monkeypatch)
    texts = UNIT.read_text() + (DEPLOY / "systemd" / "tokens.conf").read_text()
    for name, value in re.findall(r"^Environment=(GRADIOMETER_\w+)=(.*)$", texts, re.MULTILINE):
        monkeypatch.setenv(name, value)
    resolved = resolve_model(Settings, None, DEPLOY / "systemd" / "monitor.yaml", {})
    assert resolved.warnings == []
    assert resolved.settings.auth.tokens_file == Path("%d/tokens")


def _manifests() -> dict[str, Yaml]:
    """Return the objects for Kubernetes by kind."""
    folder = DEPLOY / "kubernetes"
    documents = [each for path in folder.glob("*.yaml") for each in yaml.safe_load_all(path.read_text())]
    return {each["kind"]: each for each in documents}


def _pod() -> Yaml:
    pod: Yaml = _manifests()["DaemonSet"]["spec"]["template"]["spec"]
    return pod


@pytest.mark.parametrize("kind", sorted(_manifests().keys() - {"PodMonitor"}))
def test_kubernetes_accepts_the_manifests(kind: str) -> None:
    """Each object is what the schemas of Kubernetes' API ask for, without a field that they do not know."""
    if os.environ.get("CI") != "true":
        pytest.importorskip("kubernetes_validate")
    import kubernetes_validate

    kubernetes_validate.validate(_manifests()[kind], KUBERNETES, strict=True)


def test_the_pod_is_confined() -> None:
    """No root, no capability, nothing to write but its state, no token of the cluster, the node's runs read only."""
    pod = _pod()
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert not pod["automountServiceAccountToken"]
    assert not pod["enableServiceLinks"]
    assert [mount["name"] for mount in container["volumeMounts"] if not mount.get("readOnly")] == ["state"]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert container["resources"]["limits"]["memory"]


def test_the_pods_config_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The config in the ConfigMap can be used with the pod's variables, and names paths that are mounted."""
    _without_variables(monkeypatch)
    (container,) = _pod()["containers"]
    for variable in container["env"]:
        monkeypatch.setenv(variable["name"], "10.1.2.3")
    path = tmp_path / "monitor.yaml"
    path.write_text(_manifests()["ConfigMap"]["data"]["monitor.yaml"])
    resolved = resolve_model(Settings, None, path, {})
    settings, mounts = resolved.settings, {mount["mountPath"] for mount in container["volumeMounts"]}
    assert resolved.warnings == []
    assert settings.host == "10.1.2.3"
    assert settings.auth.tokens_file is not None
    assert {str(settings.root), str(settings.state_dir), str(settings.auth.tokens_file.parent)} < mounts
    assert container["args"] == ["--config", "/etc/gradiometer/monitor.yaml"]
    assert container["ports"] == [{"name": "http", "containerPort": settings.port, "protocol": "TCP"}]


def test_what_selects_the_pods_finds_them() -> None:
    """PodMonitor, NetworkPolicy and DaemonSet select the pods by the labels that these have, and the port by name."""
    manifests = _manifests()
    labels = manifests["DaemonSet"]["spec"]["template"]["metadata"]["labels"]
    selectors = [manifests[kind]["spec"]["selector"]["matchLabels"] for kind in ("DaemonSet", "PodMonitor")]
    assert [*selectors, manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]] == [labels] * 3
    (endpoint,) = manifests["PodMonitor"]["spec"]["podMetricsEndpoints"]
    (port,) = _pod()["containers"][0]["ports"]
    assert endpoint["port"] == port["name"]
    (tokens,) = (volume for volume in _pod()["volumes"] if "secret" in volume)
    assert endpoint["authorization"]["credentials"]["name"] == tokens["secret"]["secretName"]
    spaces = {each["metadata"].get("namespace") for kind, each in manifests.items() if kind != "Namespace"}
    assert spaces == {manifests["Namespace"]["metadata"]["name"]}


def test_the_image_is_that_of_the_compose_file() -> None:
    """The DaemonSet starts the version that this repository builds."""
    compose = yaml.safe_load((DEPLOY.parent / "docker-compose.yml").read_text())
    assert _pod()["containers"][0]["image"] == compose["services"]["monitor"]["image"]


SCRIPTS = ("monitor.sh", "train.sbatch")


@pytest.mark.native
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_are_clean(native_binary: Native, name: str) -> None:
    """bash parses them, and shellcheck finds nothing."""
    path = DEPLOY / "slurm" / name
    assert _ran("bash", "-n", path).returncode == 0
    done = _ran(native_binary("shellcheck"), path)
    assert done.returncode == 0, done.stdout


@pytest.mark.native
def test_prometheus_accepts_how_it_finds_them(native_binary: Native) -> None:
    """Prometheus itself finds no fault in the scrape configuration for jobs."""
    done = _ran(native_binary("promtool"), "check", "config", "--syntax-only", DEPLOY / "slurm" / "prometheus.yml")
    assert done.returncode == 0, done.stderr


STUBS = {
    "srun": """
options=()
while [[ $1 == -* ]]; do options+=("$1"); shift; done
echo "${options[*]}" >>"$STUBS/srun.log"
SLURMD_NODENAME=node1 exec "$@"
""",
    "scontrol": 'echo "   Command=$DEPLOY/train.sbatch --epochs 3"\n',
    "gradiometer": 'exec "$PYTHON" -m gradiometer.cli "$@"\n',
}
TRAINING = """
import json, os, signal, sys, time, urllib.request
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
files = []
while not files:
    time.sleep(0.05)
    files = list(Path(os.environ["GRADIOMETER_TARGETS"]).glob("*.json"))
(found,) = json.loads(files[0].read_text())
while True:
    try:
        urllib.request.urlopen(f"http://{found['targets'][0]}/-/ready", timeout=5)
        break
    except OSError:
        time.sleep(0.05)
told = Path(sys.argv[1])
told.with_name("telling").write_text(json.dumps([files[0].name, found, os.environ["GRADIOMETER_DIR"]]))
told.with_name("telling").replace(told)
time.sleep(600 if sys.argv[2] == "stay" else 0)
sys.exit(7)
"""


@pytest.fixture
def job(tmp_path: Path, spawn: Spawn) -> Callable[[str], subprocess.Popen[str]]:
    """Give a function that runs the job script as Slurm would, with stubs for its commands."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "targets").mkdir()
    for name, text in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable, "STUBS": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "DEPLOY": str(DEPLOY / "slurm"), "HOME": str(tmp_path),
        "SLURM_JOB_ID": "42", "SLURM_NNODES": "1", "GRADIOMETER_TARGETS": str(tmp_path / "targets"),
        "GRADIOMETER_LINGER_SECONDS": "0", "TMPDIR": str(tmp_path),
    }  # fmt: skip

    def start(end: str) -> subprocess.Popen[str]:
        command = ("bash", DEPLOY / "slurm" / "train.sbatch", sys.executable, "-c", TRAINING, tmp_path / "told", end)
        return spawn(*command, env=environment, stderr=subprocess.PIPE)

    return start


@pytest.mark.parametrize(("end", "status"), [("finish", 7), ("stay", 9)])
def test_the_job_has_a_monitor_as_long_as_it_lasts(
    job: Callable[[str], subprocess.Popen[str]], tmp_path: Path, wait_until: WaitUntil, end: str, status: int
) -> None:
    """While it trains its monitor serves and is registered; in the end both are gone, with the training's status."""
    process = job(end)
    wait_until((tmp_path / "told").exists, 120)
    if end == "stay":
        process.send_signal(signal.SIGTERM)
    log = process.communicate(timeout=120)[1]
    assert process.returncode == status, log
    name, target, directory = json.loads((tmp_path / "told").read_text())
    assert name == "gradiometer-42-node1.json"
    assert target["labels"]["slurm_job_id"] == "42"
    assert directory == f"{tmp_path}/.local/state/gradiometer/slurm/42/node1"
    assert list((tmp_path / "targets").iterdir()) == []
    assert list(tmp_path.glob("gradiometer-monitor.*")) == []
    monitor, training = sorted((tmp_path / "srun.log").read_text().splitlines(), reverse=True)
    assert "--overlap" in monitor
    assert training == ""
    with pytest.raises(OSError, match="refused"):
        _connect(target["targets"][0])


def _connect(address: str) -> None:
    import socket

    host, _, port = address.rpartition(":")
    socket.create_connection((host, int(port)), timeout=5).close()
