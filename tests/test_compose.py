"""The compose file and what it mounts: valid, pinned, healthy, confined, on loopback, without a password of ours."""

from __future__ import annotations

import json
import os
import re
import runpy
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest

from tests._compose import (
    FILE,
    OWN,
    PORTS,
    ROOT,
    SERVICES,
    interpolated,
    load_services,
    read_yaml,
    service_of,
)

OVERRIDE = ROOT / "deploy" / "grafana-alerts.yml"
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*")
SECRETS = ("grafana_admin_password", "monitor_tokens", "prometheus_token")

each_service = pytest.mark.parametrize("name", SERVICES)
each_own = pytest.mark.parametrize("name", OWN)


def _dockerfile(name: str) -> str:
    path: str = service_of(name)["build"]["dockerfile"]
    return (ROOT / path).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [FILE, OVERRIDE], ids=lambda path: path.name)
def test_compose_accepts_the_file(path: Path) -> None:
    """The file is what the schema of the compose specification asks for."""
    if os.environ.get("CI") != "true":
        pytest.importorskip("check_jsonschema")
    file = files("check_jsonschema").joinpath("builtin_schemas", "vendor", "compose-spec.json")
    schema = json.loads(file.read_text(encoding="utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(read_yaml(path))] == []
    broken = read_yaml(path)
    broken["services"]["prometheus"]["healthchecks"] = {}
    assert not validator.is_valid(broken)


def test_services_are_the_five() -> None:
    """The stack is monitor, Prometheus, Alertmanager and Grafana, and a demo job for who asks for its profile."""
    services = read_yaml(FILE)["services"]
    assert sorted(services) == sorted(SERVICES)
    assert {name: each["profiles"] for name, each in services.items() if "profiles" in each} == {"demo": ["demo"]}


@each_service
def test_image_is_pinned(name: str) -> None:
    """Every image names a version to its last number."""
    assert PINNED.fullmatch(service_of(name)["image"])


@each_own
def test_own_image_is_this_version(name: str) -> None:
    """A release rebuilds our images instead of starting the old ones."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert service_of(name)["image"] == f"gradiometer-{name}:{version}"


@each_own
def test_dockerfile_is_tidy(name: str) -> None:
    """It starts from pinned images, runs without root, copies what it names, and leaves no cache of packages."""
    text = _dockerfile(name)
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert len(bases) == 2
    assert all(PINNED.fullmatch(base) for base in bases)
    assert re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1] == "gradiometer"
    assert "HEALTHCHECK" in text
    assert not re.search(r"^(ADD|COPY \. )", text, re.MULTILINE)
    assert all("--no-cache-dir" in line for line in text.splitlines() if "pip install" in line)
    assert re.search(r'^ENTRYPOINT \["python"', text, re.MULTILINE)  # no shell between docker's signals and Python


@each_own
def test_build_sees_nothing_but_what_is_copied(name: str) -> None:
    """The context that is sent to the builder holds what the Dockerfile copies, and no secret."""
    path = ROOT / f"{service_of(name)['build']['dockerfile']}.dockerignore"
    ignored = path.read_text(encoding="utf-8").splitlines()
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", _dockerfile(name), re.MULTILINE)
    assert ignored[0] == "*"
    assert {line[1:] for line in ignored if line.startswith("!")} == {word for line in copied for word in line.split()}
    assert all((ROOT / word).exists() for line in copied for word in line.split())


def test_monitor_has_no_torch() -> None:
    """The monitor's image holds its extra and no other; the demo's holds the torch that is developed with."""
    assert re.findall(r"\[(\w+)\]\"", _dockerfile("monitor")) == ["monitor"]
    assert "torch==" not in _dockerfile("monitor")
    pinned = re.search(r"^torch==\S+$", (ROOT / "constraints-dev.txt").read_text(), re.MULTILINE)
    assert pinned
    assert pinned[0] in _dockerfile("demo")


@each_service
def test_service_restarts_and_reports_health(name: str) -> None:
    """Every service comes back after a crash, says whether it works, and gives up no log space without bound."""
    service = service_of(name)
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert service["logging"]["options"]["max-size"]


@each_service
def test_service_is_confined(name: str) -> None:
    """No service can write to its root, keeps a capability or can gain one, or is in a namespace of the host."""
    service = service_of(name)
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "network_mode", "pid", "ipc", "cap_add"}


def test_the_monitor_reads_runs_unless_told_otherwise() -> None:
    """Runs are read-only for the monitor, until a setting says that they are not."""
    (runs,) = (volume for volume in service_of("monitor")["volumes"] if isinstance(volume, dict))
    assert interpolated(runs["read_only"], {}) == "true"
    assert interpolated(runs["read_only"], {"GRADIOMETER_RUNS_READ_ONLY": "false"}) == "false"


def test_ports_are_those_of_loopback() -> None:
    """Each service is published on loopback under its own port, and without Docker they are the same."""
    published = {name: service_of(name).get("ports", []) for name in SERVICES}
    assert published == {name: [f"127.0.0.1:{port}:{port}"] for name, port in PORTS.items()} | {"demo": []}


def test_secrets_are_mounted_and_used() -> None:
    """Each secret is declared, and granted to just those whose configuration names it."""
    declared = read_yaml(FILE)["secrets"]
    assert sorted(declared) == sorted(SECRETS)
    services = load_services(FILE)
    for name in SERVICES:
        texts = [json.dumps(services[name].environment), *(path.read_text() for path in _mounted_files(name))]
        named = set(re.findall(r"/run/secrets/(\w+)", "\n".join(texts)))
        assert named == set(service_of(name).get("secrets", []))


def test_the_demo_removes_no_run_but_its_own() -> None:
    """A run of somebody whose name only begins as the demo's do stays."""
    demo = runpy.run_path(str(ROOT / "deploy" / "demo.py"), run_name="demo")
    assert demo["OWN"].fullmatch(f"{demo['PREFIX']}20261123-064500-12")
    for other in ("mine", "20261123-064500-12-kept", "20261123-064500", "x-20261123-064500-1"):
        assert not demo["OWN"].fullmatch(demo["PREFIX"] + other)


def _mounted_files(name: str) -> Iterator[Path]:
    """Yield the files of the repository that a service mounts, other than dashboards."""
    for source in load_services(FILE)[name].mounts.values():
        if source.startswith("./"):
            path = ROOT / source
            yield from (file for file in (path.rglob("*.yml") if path.is_dir() else [path]) if file.is_file())


def test_grafana_has_no_default_password() -> None:
    """Grafana's password is a secret, and nobody is let in without one."""
    environment = service_of("grafana")["environment"]
    assert environment["GF_SECURITY_ADMIN_PASSWORD__FILE"] == "/run/secrets/grafana_admin_password"
    assert "GF_SECURITY_ADMIN_PASSWORD" not in environment
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert environment["GF_USERS_ALLOW_SIGN_UP"] == "false"


def test_mounts_exist() -> None:
    """Every mounted path is in the repository, and every named volume is declared and used."""
    volumes = set(read_yaml(FILE)["volumes"])
    sources = [source for service in load_services(FILE).values() for source in service.mounts.values()]
    assert all((ROOT / source).exists() for source in sources if source.startswith("./"))
    assert {source for source in sources if re.fullmatch(r"[\w-]+", source)} == volumes


def test_addresses_are_those_of_services() -> None:
    """Wherever a mounted file names a service's address, it is there, and Prometheus scrapes all but the demo."""
    texts = "\n".join(path.read_text() for name in SERVICES for path in _mounted_files(name))
    named = {(host, int(port)) for host, port in re.findall(rf"\b({'|'.join(SERVICES)}):(\d+)\b", texts)}
    assert named == set(PORTS.items())
    jobs = read_yaml(ROOT / "deploy/prometheus.yml")["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    of = targets.pop("gradiometer")
    assert targets | {"monitor": of} == {name: [f"{name}:{port}"] for name, port in PORTS.items()}


def test_provisioned_dashboards_are_the_generated_ones() -> None:
    """Grafana is pointed at the generated JSON through a path that is mounted, and opens with the fleet."""
    mounts = load_services(FILE)["grafana"].mounts
    provisioning = ROOT / mounts["/etc/grafana/provisioning/dashboards"] / "gradiometer.yml"
    (provider,) = read_yaml(provisioning)["providers"]
    mounted = ROOT / mounts[provider["options"]["path"]]
    home = Path(service_of("grafana")["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert mounted.resolve() == ROOT / "dashboards" / "gradiometer_dashboards" / "json"
    assert str(home.parent) == provider["options"]["path"]
    assert (mounted / home.name).exists()
    assert read_yaml(ROOT / "deploy" / "monitor.yaml")["grafana"]["apply"] is False


def test_provisioned_datasources_are_the_stacks() -> None:
    """Grafana asks the stack's Prometheus, knows how often it scrapes, and which Alertmanager its rules go to."""
    folder = ROOT / load_services(FILE)["grafana"].mounts["/etc/grafana/provisioning/datasources"]
    sources = {source["type"]: source for source in read_yaml(folder / "gradiometer.yml")["datasources"]}
    prometheus, alertmanager = sources["prometheus"], sources["alertmanager"]
    scraping = read_yaml(ROOT / "deploy/prometheus.yml")["global"]["scrape_interval"]
    assert prometheus["uid"] == "gradiometer-prometheus"
    assert prometheus["isDefault"]
    assert prometheus["jsonData"]["timeInterval"] == scraping
    assert prometheus["jsonData"]["alertmanagerUid"] == alertmanager["uid"]
    assert alertmanager["jsonData"]["implementation"] == "prometheus"


def test_alerts_are_evaluated_once() -> None:
    """Where Grafana evaluates, Prometheus' rules are taken away under the same path; otherwise Grafana has none."""
    override = load_services(OVERRIDE)
    (rules,) = (target for target in load_services(FILE)["prometheus"].mounts if "/rules/" in target)
    assert read_yaml(ROOT / override["prometheus"].mounts[rules]) == {"groups": []}
    (alerting,) = override["grafana"].mounts.items()
    assert alerting[0].startswith("/etc/grafana/provisioning/alerting/")
    assert read_yaml(ROOT / alerting[1])["groups"]
    assert not any("alerting" in target for target in load_services(FILE)["grafana"].mounts)
