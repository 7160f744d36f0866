"""The compose file and what it mounts: valid, pinned, healthy, confined, on loopback, without a password of ours."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import stat
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docker-compose.yml"
if not FILE.exists():
    pytest.skip("the compose file belongs to the repository, not to the wheel", allow_module_level=True)

from deploy.stack.compose import PORTS, Places, load_services  # noqa: E402 - it is there only where the file is
from gradiometer_monitor.config.resolving import resolve  # noqa: E402
from gradiometer_monitor.config.settings import Settings  # noqa: E402
from gradiometer_monitor.web.listen import check_access  # noqa: E402
from gradiometer_monitor.web.tokens import Tokens  # noqa: E402

Yaml = dict[str, Any]
Native = Callable[[str], str]
SERVICES = ("alertmanager", "demo", "grafana", "monitor", "prometheus")
OWN = ("monitor", "demo")
"""Services whose images are built here."""
OVERRIDE = ROOT / "deploy" / "grafana-alerts.yml"
PREPARE = ROOT / "deploy" / "prepare.sh"
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+[\w.-]*")
REQUIRED = re.compile(r"\$\{(\w+)(?::([?-])([^}]*))?\}")
SECRETS = ("grafana_admin_password", "monitor_tokens", "prometheus_token")

each_service = pytest.mark.parametrize("name", SERVICES)
each_own = pytest.mark.parametrize("name", OWN)


def _yaml(path: Path) -> Yaml:
    content: Yaml = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def _service(name: str) -> Yaml:
    service: Yaml = _yaml(FILE)["services"][name]
    return service


def _dockerfile(name: str) -> str:
    path: str = _service(name)["build"]["dockerfile"]
    return (ROOT / path).read_text(encoding="utf-8")


def _prepare(folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script with everything it makes below ``folder``."""
    own = {
        "GRADIOMETER_SECRETS": str(folder / "secrets"),
        "GRADIOMETER_DIR": str(folder / "my runs"),
        "GRADIOMETER_ENV_FILE": str(folder / "env"),
    }
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRAFANA_")}
    command = ["sh", str(PREPARE), *options]
    return subprocess.run(
        command, env=environment | own | variables, capture_output=True, text=True, check=False, timeout=30
    )


def _interpolated(text: str, variables: Mapping[str, str]) -> str:
    """Put variables in as compose does. Raises KeyError with what compose says of one that is missing."""

    def value(found: re.Match[str]) -> str:
        name, kind, rest = found.groups()
        if given := variables.get(name):
            return given
        if kind != "-":
            raise KeyError(rest or "")
        return str(rest)

    return REQUIRED.sub(value, text)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder in which the script has made everything."""
    folder = tmp_path_factory.mktemp("prepared")
    done = _prepare(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def places(tmp_path: Path, prepared: Path) -> Places:
    """Give places for all services on this host."""
    return Places(
        repository=ROOT,
        state=tmp_path / "state",
        runs=prepared / "my runs",
        secrets=prepared / "secrets",
        ports={name: port + 1 for name, port in PORTS.items()},
        without=frozenset(),
    )


def _copy_of(places: Places, name: str, path: str) -> Path:
    """Prepare a service, and return the copy of what is at ``path`` in its container."""
    return Path(places.prepare(load_services(FILE)[name])[path])


@pytest.mark.parametrize("path", [FILE, OVERRIDE], ids=lambda path: path.name)
def test_compose_accepts_the_file(path: Path) -> None:
    """The file is what the schema of the compose specification asks for."""
    if os.environ.get("CI") != "true":
        pytest.importorskip("check_jsonschema")
    file = files("check_jsonschema").joinpath("builtin_schemas", "vendor", "compose-spec.json")
    schema = json.loads(file.read_text(encoding="utf-8"))
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(_yaml(path))] == []
    broken = _yaml(path)
    broken["services"]["prometheus"]["healthchecks"] = {}
    assert not validator.is_valid(broken)


def test_services_are_the_five() -> None:
    """The stack is monitor, Prometheus, Alertmanager and Grafana, and a demo job for who asks for its profile."""
    services = _yaml(FILE)["services"]
    assert sorted(services) == sorted(SERVICES)
    assert {name: each["profiles"] for name, each in services.items() if "profiles" in each} == {"demo": ["demo"]}


@each_service
def test_image_is_pinned(name: str) -> None:
    """Every image names a version to its last number."""
    assert PINNED.fullmatch(_service(name)["image"])


@each_own
def test_own_image_is_this_version(name: str) -> None:
    """A release rebuilds our images instead of starting the old ones."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert _service(name)["image"] == f"gradiometer-{name}:{version}"


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
    path = ROOT / f"{_service(name)['build']['dockerfile']}.dockerignore"
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
    service = _service(name)
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
    assert service["logging"]["options"]["max-size"]


@each_service
def test_service_is_confined(name: str) -> None:
    """No service can write to its root, keeps a capability or can gain one, or is in a namespace of the host."""
    service = _service(name)
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.keys() & {"privileged", "network_mode", "pid", "ipc", "cap_add"}


@each_own
def test_own_service_is_the_owner_of_the_runs(name: str, prepared: Path) -> None:
    """The monitor and the demo are the user who has prepared the stack, for runs are his alone."""
    variables = _variables(prepared)
    assert _interpolated(_service(name)["user"], variables) == f"{os.getuid()}:{os.getgid()}"
    (runs,) = (volume for volume in _service(name)["volumes"] if isinstance(volume, dict))
    assert _interpolated(runs["source"], variables) == str(prepared / "my runs")
    assert stat.S_IMODE((prepared / "my runs").stat().st_mode) == 0o700
    assert runs["bind"] == {"create_host_path": False}  # Docker would make it as root


def test_the_monitor_reads_runs_unless_told_otherwise() -> None:
    """Runs are read-only for the monitor, until a setting says that they are not."""
    (runs,) = (volume for volume in _service("monitor")["volumes"] if isinstance(volume, dict))
    assert _interpolated(runs["read_only"], {}) == "true"
    assert _interpolated(runs["read_only"], {"GRADIOMETER_RUNS_READ_ONLY": "false"}) == "false"


def test_ports_are_those_of_loopback() -> None:
    """Each service is published on loopback under its own port, and without Docker they are the same."""
    published = {name: _service(name).get("ports", []) for name in SERVICES}
    assert published == {name: [f"127.0.0.1:{port}:{port}"] for name, port in PORTS.items()} | {"demo": []}


def _variables(folder: Path) -> dict[str, str]:
    lines = (folder / "env").read_text().splitlines()
    return {name: value.strip("'") for name, _, value in (line.partition("=") for line in lines)}


def test_what_is_missing_is_said_with_the_remedy(prepared: Path) -> None:
    """Before the script was run, compose says to run it, whatever it asks for first; after it, nothing is missing."""
    text = FILE.read_text(encoding="utf-8")
    required = {name: rest for name, kind, rest in REQUIRED.findall(text) if kind != "-"}
    assert sorted(required) == ["GRADIOMETER_DIR", "GRADIOMETER_GID", "GRADIOMETER_SECRETS", "GRADIOMETER_UID"]
    for said in required.values():
        assert "run deploy/prepare.sh first" in said
    with pytest.raises(KeyError, match=r"run deploy/prepare\.sh first"):
        _interpolated(text, {})
    content = yaml.safe_load(_interpolated(text, _variables(prepared)))
    assert all(Path(secret["file"]).stat().st_size for secret in content["secrets"].values())


def test_secrets_are_mounted_and_used() -> None:
    """Each secret is declared, and granted to just those whose configuration names it."""
    declared = _yaml(FILE)["secrets"]
    assert sorted(declared) == sorted(SECRETS)
    services = load_services(FILE)
    for name in SERVICES:
        texts = [json.dumps(services[name].environment), *(path.read_text() for path in _mounted_files(name))]
        named = set(re.findall(r"/run/secrets/(\w+)", "\n".join(texts)))
        assert named == set(_service(name).get("secrets", []))


def test_alertmanager_reads_its_token_where_it_is(prepared: Path) -> None:
    """What Alertmanager tells the monitor with is in the folder that is mounted for it."""
    receivers = {receiver["name"]: receiver for receiver in _yaml(ROOT / "deploy" / "alertmanager.yml")["receivers"]}
    (webhook,) = receivers["monitor"]["webhook_configs"]
    token = Path(webhook["http_config"]["authorization"]["credentials_file"])
    source = load_services(FILE)["alertmanager"].mounts[str(token.parent)]
    assert (Path(_interpolated(source, _variables(prepared))) / token.name).stat().st_size


def test_tokens_are_in_no_arguments(tmp_path: Path) -> None:
    """Everybody sees the arguments of a process: the script gives no secret to a program that way."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for program in ("grep", "cat", "mv", "chmod", "head", "base64", "tr"):
        real = shutil.which(program)
        (folder / program).write_text(f'#!/bin/sh\necho "$@" >>"{tmp_path}/arguments"\nexec "{real}" "$@"\n')
        (folder / program).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    for _ in range(2):
        assert _prepare(tmp_path, PATH=path).returncode == 0
    said = (tmp_path / "arguments").read_text()
    tokens = [line.split()[2] for line in (tmp_path / "secrets" / "monitor_tokens").read_text().splitlines()]
    assert len(tokens) == 3
    assert "-qxF" in said
    assert not [token for token in tokens if token in said]


@pytest.mark.parametrize("name", ["it's", "back\\", "two\nlines"])
def test_paths_that_env_cannot_hold_are_refused(name: str, tmp_path: Path) -> None:
    """They are named, and nothing is written that compose would read as something else."""
    for variable in ("GRADIOMETER_DIR", "GRADIOMETER_SECRETS"):
        done = _prepare(tmp_path, **{variable: f"{tmp_path}/{name}"})
        assert done.returncode == 2
        assert f"{variable} {tmp_path}/{name}: .env cannot hold" in done.stderr
    assert (tmp_path / "env").read_text() == ""


def test_paths_are_the_same_for_compose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is relative is so to where the script runs, one in quotes may begin with ~, and no word is run."""
    odd = f"{tmp_path}/$(touch pwned) `id` #"
    for given, meant in (("a b/runs", tmp_path / "a b" / "runs"), ("~/r", tmp_path / "r"), (odd, Path(odd))):
        (tmp_path / "env").unlink(missing_ok=True)
        monkeypatch.chdir(tmp_path)
        done = _prepare(tmp_path, GRADIOMETER_DIR=given, HOME=str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert f"GRADIOMETER_DIR='{meant}'" in (tmp_path / "env").read_text().splitlines()
        assert meant.is_dir()
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["a: b", "a #b", "it's", 'quote"d', "$HOME", "{x}", "a\\b", "\u00e9"])
def test_odd_paths_stay_what_they_are(name: str, tmp_path: Path, prepared: Path) -> None:
    """A folder whose name would be something else in YAML is in the copies as it is."""
    odd = Places(
        repository=ROOT, state=tmp_path / name, runs=tmp_path / name / "runs", secrets=prepared / name, ports=PORTS,
        without=frozenset(),
    )  # fmt: skip
    token = _yaml(_copy_of(odd, "prometheus", "/etc/prometheus/prometheus.yml"))["scrape_configs"][0]["authorization"]
    assert token == {"credentials_file": f"{prepared / name}/prometheus_token"}
    monitor = _yaml(_copy_of(odd, "monitor", "/etc/gradiometer/monitor.yaml"))
    assert monitor["dir"] == str(tmp_path / name / "runs")


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
    environment = _service("grafana")["environment"]
    assert environment["GF_SECURITY_ADMIN_PASSWORD__FILE"] == "/run/secrets/grafana_admin_password"
    assert "GF_SECURITY_ADMIN_PASSWORD" not in environment
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert environment["GF_USERS_ALLOW_SIGN_UP"] == "false"


def test_mounts_exist() -> None:
    """Every mounted path is in the repository, and every named volume is declared and used."""
    volumes = set(_yaml(FILE)["volumes"])
    sources = [source for service in load_services(FILE).values() for source in service.mounts.values()]
    assert all((ROOT / source).exists() for source in sources if source.startswith("./"))
    assert {source for source in sources if re.fullmatch(r"[\w-]+", source)} == volumes


def test_addresses_are_those_of_services() -> None:
    """Wherever a mounted file names a service's address, it is there, and Prometheus scrapes all but the demo."""
    texts = "\n".join(path.read_text() for name in SERVICES for path in _mounted_files(name))
    named = {(host, int(port)) for host, port in re.findall(rf"\b({'|'.join(SERVICES)}):(\d+)\b", texts)}
    assert named == set(PORTS.items())
    jobs = _yaml(ROOT / "deploy/prometheus.yml")["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    of = targets.pop("gradiometer")
    assert targets | {"monitor": of} == {name: [f"{name}:{port}"] for name, port in PORTS.items()}


def test_provisioned_dashboards_are_the_generated_ones() -> None:
    """Grafana is pointed at the generated JSON through a path that is mounted, and opens with the fleet."""
    mounts = load_services(FILE)["grafana"].mounts
    provisioning = ROOT / mounts["/etc/grafana/provisioning/dashboards"] / "gradiometer.yml"
    (provider,) = _yaml(provisioning)["providers"]
    mounted = ROOT / mounts[provider["options"]["path"]]
    home = Path(_service("grafana")["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert mounted.resolve() == ROOT / "dashboards" / "gradiometer_dashboards" / "json"
    assert str(home.parent) == provider["options"]["path"]
    assert (mounted / home.name).exists()
    assert _yaml(ROOT / "deploy" / "monitor.yaml")["grafana"]["apply"] is False


def test_provisioned_datasources_are_the_stacks() -> None:
    """Grafana asks the stack's Prometheus, knows how often it scrapes, and which Alertmanager its rules go to."""
    folder = ROOT / load_services(FILE)["grafana"].mounts["/etc/grafana/provisioning/datasources"]
    sources = {source["type"]: source for source in _yaml(folder / "gradiometer.yml")["datasources"]}
    prometheus, alertmanager = sources["prometheus"], sources["alertmanager"]
    scraping = _yaml(ROOT / "deploy/prometheus.yml")["global"]["scrape_interval"]
    assert prometheus["uid"] == "gradiometer-prometheus"
    assert prometheus["isDefault"]
    assert prometheus["jsonData"]["timeInterval"] == scraping
    assert prometheus["jsonData"]["alertmanagerUid"] == alertmanager["uid"]
    assert alertmanager["jsonData"]["implementation"] == "prometheus"


def test_alerts_are_evaluated_once() -> None:
    """Where Grafana evaluates, Prometheus' rules are taken away under the same path; otherwise Grafana has none."""
    override = load_services(OVERRIDE)
    (rules,) = (target for target in load_services(FILE)["prometheus"].mounts if "/rules/" in target)
    assert _yaml(ROOT / override["prometheus"].mounts[rules]) == {"groups": []}
    (alerting,) = override["grafana"].mounts.items()
    assert alerting[0].startswith("/etc/grafana/provisioning/alerting/")
    assert _yaml(ROOT / alerting[1])["groups"]
    assert not any("alerting" in target for target in load_services(FILE)["grafana"].mounts)


def test_the_script_makes_secrets_that_only_their_users_read(prepared: Path) -> None:
    """The folder is the owner's alone; what containers of other users read is readable within, and the rest is not."""
    folder = prepared / "secrets"
    modes = {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    clients = {
        "prometheus_token": ("prometheus", "metrics"),
        "alertmanager/gradiometer-token": ("alertmanager", "alerts"),
        "browser_token": ("browser", "write"),
    }
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert modes == {
        "monitor_tokens": 0o600, "browser_token": 0o600, "prometheus_token": 0o644, "grafana_admin_password": 0o644,
        "alertmanager": 0o755, "alertmanager/gradiometer-token": 0o644,
    }  # fmt: skip
    tokens = Tokens(folder / "monitor_tokens")
    for file, client in clients.items():
        found = tokens.find((folder / file).read_bytes())
        assert found
        assert (found.name, found.role) == client


def test_the_script_keeps_what_is_there(tmp_path: Path) -> None:
    """A second run changes nothing; a token whose file was removed is exchanged for another."""
    assert _prepare(tmp_path).returncode == 0
    before = {path.name: path.read_text() for path in (tmp_path / "secrets").rglob("*") if path.is_file()}
    settings = (tmp_path / "env").read_text()
    for other in ({"GRADIOMETER_DIR": "/elsewhere/runs"}, {"GRAFANA_ADMIN_PASSWORD": "another one"}):
        done = _prepare(tmp_path, **other)
        assert done.returncode == 2
        assert str(tmp_path) in done.stderr
    assert not Path("/elsewhere").exists()
    assert _prepare(tmp_path).returncode == 0
    assert {path.name: path.read_text() for path in (tmp_path / "secrets").rglob("*") if path.is_file()} == before
    assert (tmp_path / "env").read_text() == settings
    (tmp_path / "secrets" / "browser_token").unlink()
    assert _prepare(tmp_path).returncode == 0
    tokens = Tokens(tmp_path / "secrets" / "monitor_tokens")
    assert tokens.find(before["browser_token"].encode()) is None
    assert tokens.find(before["prometheus_token"].encode())
    assert tokens.find((tmp_path / "secrets" / "browser_token").read_bytes())


def test_the_script_narrows_roles_of_before(tmp_path: Path) -> None:
    """Tokens of an earlier version stay; their roles become what is needed, once, which is said without a token."""
    secrets = tmp_path / "secrets"
    assert _prepare(tmp_path).returncode == 0
    new = (secrets / "monitor_tokens").read_text()
    old = new.replace("metrics prometheus ", "read prometheus ").replace("alerts alertmanager ", "write alertmanager ")
    (secrets / "monitor_tokens").write_text(f"{old}read somebody {'0123456789abcdef' * 2}\n")
    before = {file: (secrets / file).read_text() for file in ("prometheus_token", "alertmanager/gradiometer-token")}
    done = _prepare(tmp_path, "--only-secrets")
    assert done.stdout.splitlines() == [
        "roles:   prometheus has 'metrics' now and had 'read' before; docs/stack.md says what to do",
        "roles:   alertmanager has 'alerts' now and had 'write' before; docs/stack.md says what to do",
    ]
    assert {file: (secrets / file).read_text() for file in before} == before
    lines = set((secrets / "monitor_tokens").read_text().splitlines())
    assert lines == {*new.splitlines(), f"read somebody {'0123456789abcdef' * 2}"}
    assert _prepare(tmp_path, "--only-secrets").stdout == ""


def test_the_password_may_come_from_the_environment(tmp_path: Path) -> None:
    """Grafana's password is what the environment says, unless that cannot be one; then nothing is made of it."""
    for given, said in (("short", "has 5 characters: give it 8 or more"), ("twö lines\nof it", "printable ASCII")):
        done = _prepare(tmp_path, GRAFANA_ADMIN_PASSWORD=given)
        assert done.returncode == 2
        assert said in done.stderr
        assert given not in done.stderr
    assert _prepare(tmp_path, "--only-secrets", GRAFANA_ADMIN_PASSWORD="correct horse").returncode == 0
    assert (tmp_path / "secrets" / "grafana_admin_password").read_text() == "correct horse\n"
    assert not (tmp_path / "env").exists()


def test_what_containers_cannot_read_is_said(tmp_path: Path) -> None:
    """A clone that was made under a strict umask is told of, with the command that mends it."""
    for folder in ("deploy", "dashboards"):
        (tmp_path / folder).mkdir(mode=0o755)
    script = tmp_path / "deploy" / "prepare.sh"
    script.write_text(PREPARE.read_text())
    (tmp_path / "deploy" / "prometheus.yml").touch(0o600)
    (tmp_path / "deploy" / "prometheus.yml").chmod(0o600)
    environment = os.environ | {"GRADIOMETER_DIR": str(tmp_path / "runs")}
    command = ["sh", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert f"cannot read {tmp_path}/deploy/prometheus.yml: chmod -R o+rX deploy dashboards" in done.stderr
    (tmp_path / "deploy" / "prometheus.yml").chmod(0o644)
    assert subprocess.run(command, env=environment, capture_output=True, check=False, timeout=30).returncode == 0
    assert (tmp_path / ".env").exists()


def test_the_monitors_config_is_one(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor takes its config, finds every file that it names, and may serve beyond loopback with it."""
    for name in os.environ:
        if name.startswith("GRADIOMETER_"):
            monkeypatch.delenv(name)
    resolved = resolve(Settings, None, _copy_of(places, "monitor", "/etc/gradiometer/monitor.yaml"), {})
    settings = resolved.settings
    assert resolved.warnings == []
    assert settings.host == "0.0.0.0"
    check_access(settings)
    assert settings.root == places.runs
    assert settings.state_dir == places.state / "data" / "monitor-state" / "monitor"
    assert settings.grafana is not None
    assert settings.grafana.read_credentials() == (
        "admin",
        (places.secrets / "grafana_admin_password").read_text().strip(),
    )
    assert settings.alerts is not None


def test_only_paths_and_addresses_differ_without_containers(places: Places) -> None:
    """The copy for this host is the same document, but for its paths and addresses; a service left out has no trace."""
    copy, original = (
        _copy_of(places, "prometheus", "/etc/prometheus/prometheus.yml"),
        ROOT / "deploy" / "prometheus.yml",
    )
    back = copy.read_text().replace(str(places.secrets), "/run/secrets")
    for name, port in PORTS.items():
        back = back.replace(f"127.0.0.1:{port + 1}", f"{name}:{port}")
    assert yaml.safe_load(back) == _yaml(original)
    fewer = Places(**{name: getattr(places, name) for name in Places.__slots__} | {"without": frozenset({"grafana"})})
    assert "grafana" not in _copy_of(fewer, "prometheus", "/etc/prometheus/prometheus.yml").read_text()
    assert "grafana" not in _yaml(_copy_of(fewer, "monitor", "/etc/gradiometer/monitor.yaml"))


@pytest.mark.native
def test_prometheus_and_alertmanager_accept_their_configuration(native_binary: Native, places: Places) -> None:
    """Both find no fault in their files, with the rules and secrets that these name in place."""
    for program, words, name, path in (
        ("promtool", ("check", "config"), "prometheus", "/etc/prometheus/prometheus.yml"),
        ("amtool", ("check-config",), "alertmanager", "/etc/alertmanager/alertmanager.yml"),
    ):
        command = [native_binary(program), *words, str(_copy_of(places, name, path))]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.native
def test_the_script_is_clean(native_binary: Native) -> None:
    """shellcheck finds nothing."""
    done = subprocess.run(
        [native_binary("shellcheck"), PREPARE], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout
