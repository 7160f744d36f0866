"""Who is let in: tokens of a file, their roles, their exchange, and that they are told to nobody."""

from __future__ import annotations

import hmac
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from gradiometer.cli import app as cli
from gradiometer_monitor.config.settings import SettingsError
from gradiometer_monitor.web import auth, tokens
from gradiometer_monitor.web.auth import Failures
from gradiometer_monitor.web.tokens import Principal, Tokens, read_tokens
from tests._monitor import Monitor
from tests._web import AS_READER, AS_WRITER, READ, WRITE, logged, send, write_config, write_tokens

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Start, WaitUntil, WriteRun

PATHS = ("/metrics", "/api/v1/runs", "/api/v1/events", "/api/v1/openapi.json", "/nothing")
POLICY = "/api/v1/runs/run/policy"


@pytest.fixture
def guarded(tmp_path: Path, start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Monitor, Path]:
    """Start a daemon with a reader and a writer; give it and the path of its tokens."""
    directory = tmp_path_factory.mktemp("config")
    path = write_tokens(directory / "tokens")
    config = write_config(directory / "monitor.yaml", auth={"tokens_file": str(path)})
    return start("--config", config), path


def status_of(monitor: Monitor, path: str, token: str) -> int:
    return monitor.get(path, Authorization=f"Bearer {token}")[0]


def test_without_a_valid_token_nothing_is_told(guarded: tuple[Monitor, Path]) -> None:
    """Every path but the probes and the page answers 401, names the scheme, and says nothing of what there is."""
    monitor, _ = guarded
    wrong = [{"Authorization": value} for value in (f"Basic {READ}", "Bearer", f"Bearer {READ}x")]
    asked: list[tuple[str, dict[str, str]]] = [(path, {}) for path in PATHS]
    asked += [("/api/v1/runs", header) for header in wrong]  # together fewer than are told 429
    for path, header in asked:
        status, body, headers = monitor.get(path, **header)
        assert status == 401
        assert headers["www-authenticate"].startswith("Bearer")
        assert b"run" not in body
        assert [monitor.get(path, **header)[0] for path in ("/-/healthy", "/-/ready", "/")] == [200] * 3


def test_roles_are_held_to(guarded: tuple[Monitor, Path]) -> None:
    """A reader reads and is told why he may not write; a writer may do both, and not say that he is somebody else."""
    monitor, _ = guarded
    assert [monitor.get(path, **AS_READER)[0] for path in PATHS] == [200, 200, 200, 200, 404]
    status, body, _ = send(monitor, "PUT", POLICY, {"policy": None}, **AS_READER)
    assert (status, body["detail"]) == (403, "the token of prometheus has the role 'read': this needs one with 'write'")
    status, body, _ = send(monitor, "PUT", POLICY, {"policy": None}, **AS_WRITER)
    assert (status, body["detail"]) == (404, "no run 'run' is followed; there are: none")
    status, body, _ = send(monitor, "PUT", POLICY, {"policy": None, "by": "root"}, **AS_WRITER)
    assert (status, body["detail"][0]["loc"]) == (422, ["body", "by"])


def test_without_tokens_reading_is_open_and_writing_is_off(start: Start) -> None:
    """On loopback a monitor without tokens lets everybody read, and says how to switch changes on."""
    monitor = start()
    assert monitor.get("/api/v1/runs")[0] == 200
    for header in ({}, AS_WRITER):
        status, body, _ = send(monitor, "PUT", POLICY, {"policy": None}, **header)
        assert status == 403
        assert "set auth.tokens_file" in body["detail"]


def test_tokens_are_exchanged_without_a_restart(guarded: tuple[Monitor, Path], wait_until: WaitUntil) -> None:
    """A new token is let in and an old one is not, once the file was replaced; a broken file changes nothing."""
    monitor, path = guarded
    new = "n3w-" + READ[::-1]
    write_tokens(path, f"read old {READ}", f"read new {new}", "# both, while clients change over", "")
    wait_until(lambda: status_of(monitor, "/metrics", new) == 200)
    assert status_of(monitor, "/metrics", READ) == 200
    write_tokens(path, f"read new {new}")
    wait_until(lambda: status_of(monitor, "/metrics", READ) == 401)
    noticed = logged(monitor, "the token of somebody is too weak")
    write_tokens(path, "write somebody short")
    wait_until(lambda: status_of(monitor, "/metrics", new) == 200 and noticed())
    noticed = logged(monitor, "cannot be read (No such file or directory)")
    path.unlink()
    wait_until(lambda: status_of(monitor, "/metrics", new) == 200 and noticed())
    assert status_of(monitor, "/metrics", new) == 200
    assert status_of(monitor, "/metrics", READ) in (401, 429)


def test_a_file_in_place_of_another_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is replaced within the same second, at the same size, is read again."""
    monkeypatch.setattr(tokens, "CHECK_SECONDS", 0.0)
    found = Tokens(write_tokens(tmp_path / "tokens", f"read a {READ}"))
    assert found.find(READ.encode()) == Principal(name="a", role="read")
    write_tokens(tmp_path / "tokens", f"read a {WRITE}")
    assert found.find(READ.encode()) is None
    assert found.find(WRITE.encode()) == Principal(name="a", role="read")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("read prometheus", "expected '<role> <name> <token>', found 2 words"),
        (f"admin prometheus {READ}", "expected role 'metrics', 'alerts', 'read' or 'write' as the first"),
        (f"read {READ} prometheus", "the second word is not a name"),
        ("read prometheus hunter2", "the token of prometheus is too weak"),
        ("read prometheus " + "ab" * 20, "the token of prometheus is too weak"),
        ("read prometheus " + READ + "é", "the token of prometheus is too weak"),
        ("# nobody", "has 0 tokens, expected 1 to 256"),
        (f"read a {READ}\nwrite b {READ}", "line 2: the token of b is there twice"),
    ],
)
def test_a_wrong_line_is_named_and_never_shown(tmp_path: Path, line: str, said: str) -> None:
    """The error names the file, the line and the remedy, and holds no token."""
    with pytest.raises(SettingsError) as caught:
        read_tokens(write_tokens(tmp_path / "tokens", line))
    assert said in str(caught.value)
    assert "gradiometer token" in str(caught.value) or "twice" in said
    assert READ not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o644, 0o666])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """Neither others may read the tokens, nor the group or others write them."""
    path = write_tokens(tmp_path / "tokens")
    path.chmod(mode)
    with pytest.raises(SettingsError, match=f"has mode {mode:04o}: others must not read it"):
        read_tokens(path)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o440, 0o640])
def test_a_private_file_is_read(tmp_path: Path, mode: int) -> None:
    """The modes that systemd and Kubernetes give to secrets are good, and so is a link, as Kubernetes makes them."""
    path = write_tokens(tmp_path / "tokens")
    path.chmod(mode)
    (tmp_path / "link").symlink_to(path)
    assert len(read_tokens(tmp_path / "link")) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """Who owns the file decides who is let in: that is root, or who runs the monitor."""
    path = write_tokens(tmp_path / "tokens")
    os.chown(path, 1234, -1)
    with pytest.raises(SettingsError, match="is owned by user 1234"):
        read_tokens(path)


def test_every_token_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the first, the last or none is right, all digests are compared, in constant time each."""
    lines = [f"read client{number} {READ[:-2]}{number:02d}" for number in range(20)]
    found = Tokens(write_tokens(tmp_path / "tokens", *lines))
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for token in (f"{READ[:-2]}00", f"{READ[:-2]}19", "x", "x" * 5000):
        compared.clear()
        found.find(token.encode())
        assert compared == [(32, 32)] * 20


def test_failures_are_bounded_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address has ten failures, then one in six seconds; only so many addresses are remembered."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    failures = Failures()
    assert [failures.count("a") > 0 for _ in range(12)] == [False] * 10 + [True] * 2
    assert failures.count("b") == 0
    now[0] += 6.5
    assert [failures.count("a") > 0 for _ in range(2)] == [False, True]
    for number in range(5000):
        failures.count(str(number))
    assert len(failures) == auth.MAX_CLIENTS


def test_who_fails_too_often_is_told_to_wait(guarded: tuple[Monitor, Path]) -> None:
    """After ten failures it is 429 with Retry-After, but never for a valid token from the same address."""
    monitor, _ = guarded
    began, failed = time.monotonic(), 0
    while (answer := monitor.get("/metrics", Authorization=f"Bearer {'wrong' * 8}"))[0] == 401 and failed < 100:
        failed += 1
    assert answer[0] == 429
    assert 10 <= failed <= 10 + (time.monotonic() - began) // auth.REFILL_SECONDS
    assert 1 <= int(answer[2]["retry-after"]) <= 6
    assert status_of(monitor, "/metrics", READ) == 200


def test_an_address_that_a_client_claims_is_not_believed(guarded: tuple[Monitor, Path]) -> None:
    """Who fails under ever other addresses of X-Forwarded-For is told to wait like everybody."""
    monitor, _ = guarded
    wrong = {"Authorization": f"Bearer {'wrong' * 8}"}
    found = [monitor.get("/metrics", **wrong, **{"X-Forwarded-For": f"192.0.2.{last}"})[0] for last in range(100)]
    assert found[0] == 401
    assert 429 in found


def test_secrets_are_never_logged(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """At the level of debug, over every kind of request with every kind of token, no token is in the log."""
    write_run(make_manifest("run"), [[1.0] * 4])
    directory = tmp_path_factory.mktemp("config")
    path = write_tokens(directory / "tokens")
    config = write_config(
        directory / "monitor.yaml", auth={"tokens_file": str(path)}, log={"level": "debug", "format": "json"}
    )
    monitor = start("--config", config)
    wrong = "wr0ng-" + READ[::-1]
    for token in (READ, WRITE, wrong):
        for path_asked in (*PATHS, f"/metrics?token={token}", f"/{token}"):
            monitor.get(path_asked, Authorization=f"Bearer {token}")
        for body in ({"policy": None}, {"policy": {"pipeline": token}}, token.encode()):
            send(monitor, "PUT", POLICY, body, Authorization=f"Bearer {token}")
    write_tokens(path, f"read a {wrong}", f"nonsense {WRITE}")
    monitor.get("/metrics", Authorization=f"Bearer {READ}, {WRITE}")
    log = monitor.end()
    assert "is not one of auth.tokens_file" in log
    for token in (READ, WRITE, wrong):
        assert token not in log


def test_a_command_makes_tokens(tmp_path: Path) -> None:
    """It prints a line that is good as it stands, or adds one to a file that nobody else may read."""
    path = tmp_path / "tokens"
    runner = CliRunner()
    done = runner.invoke(cli, ["token", "read", "prometheus"])
    assert done.exit_code == 0, done.output
    write_tokens(path, done.stdout.strip())
    made = [runner.invoke(cli, ["token", "write", f"oncall{i}", "--file", str(path)]).stdout.strip() for i in range(2)]
    assert path.stat().st_mode & 0o777 == 0o600
    found = Tokens(path)
    assert found.find(done.stdout.split()[2].encode()) == Principal(name="prometheus", role="read")
    assert [found.find(token.encode()) for token in made] == [
        Principal(name=f"oncall{i}", role="write") for i in range(2)
    ]
    path.chmod(0o644)
    refused = runner.invoke(cli, ["token", "read", "late", "--file", str(path)])
    assert refused.exit_code == 1
    assert "has mode 0644" in refused.output
    assert len(path.read_text().splitlines()) == 3
    lost = runner.invoke(cli, ["token", "read", "late", "--file", str(tmp_path / "no" / "tokens")])
    assert lost.exit_code == 1
    assert f"--file '{tmp_path}/no/tokens': cannot be written (No such file or directory)" in lost.output


def test_a_check_of_the_config_tells_what_would_be_refused(tmp_path: Path) -> None:
    """Tokens that cannot be used, and an address that nobody guards, are told without a start."""
    path = write_tokens(tmp_path / "tokens", "read a short")
    for settings, said in (
        ({"auth": {"tokens_file": str(path)}}, "the token of a is too weak"),
        ({"host": "0.0.0.0"}, "is not a loopback address"),
    ):
        config = write_config(tmp_path / "monitor.yaml", dir=str(tmp_path), **settings)
        done = CliRunner().invoke(cli, ["monitor", "--check-config", "--config", config])
        assert done.exit_code == 2
        assert said in done.output
