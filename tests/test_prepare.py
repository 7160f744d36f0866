"""What ``deploy/prepare.sh`` makes, with which compose starts, and the copies for a host without containers."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gradiometer_monitor.config.resolving import resolve
from gradiometer_monitor.config.settings import Settings
from gradiometer_monitor.web.listen import check_access
from gradiometer_monitor.web.tokens import Tokens
from tests._compose import (
    FILE,
    OWN,
    PORTS,
    REQUIRED,
    ROOT,
    Places,
    interpolated,
    load_services,
    read_yaml,
    service_of,
)

Native = Callable[[str], str]
PREPARE = ROOT / "deploy" / "prepare.sh"


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
        command, env=environment | own | variables, capture_output=True, text=True, check=False, timeout=120
    )


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


@pytest.mark.parametrize("name", OWN)
def test_own_service_is_the_owner_of_the_runs(name: str, prepared: Path) -> None:
    """The monitor and the demo are the user who has prepared the stack, for runs are his alone."""
    variables = _variables(prepared)
    assert interpolated(service_of(name)["user"], variables) == f"{os.getuid()}:{os.getgid()}"
    (runs,) = (volume for volume in service_of(name)["volumes"] if isinstance(volume, dict))
    assert interpolated(runs["source"], variables) == str(prepared / "my runs")
    assert stat.S_IMODE((prepared / "my runs").stat().st_mode) == 0o700
    assert runs["bind"] == {"create_host_path": False}  # Docker would make it as root


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
        interpolated(text, {})
    content = yaml.safe_load(interpolated(text, _variables(prepared)))
    assert all(Path(secret["file"]).stat().st_size for secret in content["secrets"].values())


def test_alertmanager_reads_its_token_where_it_is(prepared: Path) -> None:
    """What Alertmanager tells the monitor with is in the folder that is mounted for it."""
    receivers = {
        receiver["name"]: receiver for receiver in read_yaml(ROOT / "deploy" / "alertmanager.yml")["receivers"]
    }
    (webhook,) = receivers["monitor"]["webhook_configs"]
    token = Path(webhook["http_config"]["authorization"]["credentials_file"])
    source = load_services(FILE)["alertmanager"].mounts[str(token.parent)]
    assert (Path(interpolated(source, _variables(prepared))) / token.name).stat().st_size


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
    token = read_yaml(_copy_of(odd, "prometheus", "/etc/prometheus/prometheus.yml"))["scrape_configs"][0][
        "authorization"
    ]
    assert token == {"credentials_file": f"{prepared / name}/prometheus_token"}
    monitor = read_yaml(_copy_of(odd, "monitor", "/etc/gradiometer/monitor.yaml"))
    assert monitor["dir"] == str(tmp_path / name / "runs")


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
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert f"cannot read {tmp_path}/deploy/prometheus.yml: chmod -R o+rX deploy dashboards" in done.stderr
    (tmp_path / "deploy" / "prometheus.yml").chmod(0o644)
    assert subprocess.run(command, env=environment, capture_output=True, check=False, timeout=120).returncode == 0
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
    assert yaml.safe_load(back) == read_yaml(original)
    fewer = Places(**{name: getattr(places, name) for name in Places.__slots__} | {"without": frozenset({"grafana"})})
    assert "grafana" not in _copy_of(fewer, "prometheus", "/etc/prometheus/prometheus.yml").read_text()
    assert "grafana" not in read_yaml(_copy_of(fewer, "monitor", "/etc/gradiometer/monitor.yaml"))


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
