"""The compose file and what it mounts: pinned, healthy, on loopback, without a default password, and consistent."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docker-compose.yml"
Yaml = dict[str, Any]
SERVICES = ("grafana", "monitor", "prometheus")
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+[\w.-]*")

if not FILE.exists():
    pytest.skip("the compose file belongs to the repository, not to the wheel", allow_module_level=True)

each_service = pytest.mark.parametrize("name", SERVICES)


def _yaml(path: Path) -> Yaml:
    content: Yaml = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def _service(name: str) -> Yaml:
    service: Yaml = _yaml(FILE)["services"][name]
    return service


def _dockerfile() -> str:
    path: str = _service("monitor")["build"]["dockerfile"]
    return (ROOT / path).read_text(encoding="utf-8")


def _mounts(name: str) -> dict[str, str]:
    """Return host or volume name by path in the container, of the short-syntax volumes."""
    short = [volume.split(":") for volume in _service(name)["volumes"] if isinstance(volume, str)]
    return {parts[1]: parts[0] for parts in short}


def test_services_are_the_three() -> None:
    """The stack is the monitor, Prometheus and Grafana."""
    assert sorted(_yaml(FILE)["services"]) == sorted(SERVICES)


@each_service
def test_image_is_pinned(name: str) -> None:
    """Every image names a version."""
    assert PINNED.fullmatch(_service(name)["image"])


def test_base_images_are_pinned() -> None:
    """The Dockerfile starts from images that name a version."""
    bases = re.findall(r"^FROM (\S+)", _dockerfile(), re.MULTILINE)
    assert bases
    assert all(PINNED.fullmatch(base) for base in bases)


def test_monitor_image_is_this_version() -> None:
    """A release rebuilds the monitor's image instead of starting the old one."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert _service("monitor")["image"].endswith(f":{version}")


@each_service
def test_service_restarts_and_reports_health(name: str) -> None:
    """Every service comes back after a crash, says whether it works, and gives up no log space without bound."""
    service = _service(name)
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["logging"]["options"]["max-size"]


@each_service
def test_service_has_few_privileges(name: str) -> None:
    """No service keeps capabilities or can gain any."""
    service = _service(name)
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged", False)


@each_service
def test_ports_are_loopback_only(name: str) -> None:
    """Nothing is reachable from another machine."""
    assert all(port.startswith("127.0.0.1:") for port in _service(name).get("ports", []))


def test_monitor_is_confined() -> None:
    """The monitor runs without root, without a writable file system and with the runs read-only."""
    monitor = _service("monitor")
    (runs,) = (volume for volume in monitor["volumes"] if isinstance(volume, dict))
    assert monitor["read_only"]
    assert runs["read_only"]
    assert runs["source"].startswith("${GRADIOMETER_DIR:-")
    (state,) = (volume for volume in monitor["volumes"] if volume == "monitor-state:/state")
    assert monitor["environment"]["GRADIOMETER_MONITOR_STATE_DIR"].startswith(state.partition(":")[2])
    assert "--mode 1777 /state" in _dockerfile()
    assert re.findall(r"^USER (\S+)", _dockerfile(), re.MULTILINE)[-1] not in {"root", "0"}
    assert not monitor["user"].startswith("0")


def test_monitor_is_scraped_over_loopback() -> None:
    """The monitor listens on loopback inside Prometheus' network namespace, where Prometheus looks for it."""
    command = re.search(r"^CMD (\[.*\])", _dockerfile(), re.MULTILINE)
    assert command
    words = yaml.safe_load(command[1])
    address = f"{words[words.index('--host') + 1]}:{words[words.index('--port') + 1]}"
    (job,) = (j for j in _yaml(ROOT / "deploy/prometheus.yml")["scrape_configs"] if j["job_name"] == "gradiometer")
    monitor = _service("monitor")
    assert job["static_configs"] == [{"targets": [address]}]
    assert f"http://{address}/" in monitor["healthcheck"]["test"][-1]
    assert address.startswith("127.0.0.1:")
    assert monitor["network_mode"] == "service:prometheus"
    assert "ports" not in monitor


def test_grafana_has_no_default_password() -> None:
    """Grafana does not start without a password of its owner's choice, and lets no one in without it."""
    environment = _service("grafana")["environment"]
    assert re.fullmatch(r"\$\{GRAFANA_ADMIN_PASSWORD:\?.{10,}\}", environment["GF_SECURITY_ADMIN_PASSWORD"])
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert environment["GF_USERS_ALLOW_SIGN_UP"] == "false"


def test_mounts_exist() -> None:
    """Every mounted path is in the repository, and every named volume is declared."""
    declared = set(_yaml(FILE)["volumes"])
    for name in ("grafana", "prometheus"):
        for source in _mounts(name).values():
            assert (ROOT / source).exists() if source.startswith("./") else source in declared


def test_provisioned_dashboards_are_the_committed_ones() -> None:
    """Grafana is pointed at the generated JSON, through a path that is mounted."""
    provisioning = ROOT / _mounts("grafana")["/etc/grafana/provisioning/dashboards"] / "gradiometer.yml"
    (provider,) = _yaml(provisioning)["providers"]
    mounted = ROOT / _mounts("grafana")[provider["options"]["path"]]
    home = Path(_service("grafana")["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert mounted.resolve() == ROOT / "dashboards" / "gradiometer_dashboards" / "json"
    assert str(home.parent) == provider["options"]["path"]
    assert (mounted / home.name).exists()


def test_provisioned_datasource_is_our_prometheus() -> None:
    """Grafana asks the stack's Prometheus, and knows how often it scrapes."""
    provisioning = ROOT / _mounts("grafana")["/etc/grafana/provisioning/datasources"] / "prometheus.yml"
    (datasource,) = _yaml(provisioning)["datasources"]
    scraping = _yaml(ROOT / "deploy/prometheus.yml")["global"]["scrape_interval"]
    assert datasource["url"] == "http://prometheus:9090"
    assert datasource["jsonData"]["timeInterval"] == scraping


@pytest.mark.native
def test_prometheus_accepts_its_configuration(native_binary: Callable[[str], Any]) -> None:
    """Prometheus itself finds no fault in the scrape configuration."""
    command = [str(native_binary("promtool")), "check", "config", str(ROOT / "deploy/prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
