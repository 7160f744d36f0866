"""The address that is served: refused without tokens, or without TLS; certificates that change; connections counted."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from gradiometer_monitor.config.settings import Settings, SettingsError
from gradiometer_monitor.web import tls
from gradiometer_monitor.web.listen import Gate, check_access
from gradiometer_monitor.web.settings import AuthSettings, LimitSettings
from gradiometer_monitor.web.tls import Certificate
from tests._web import AS_READER, read_to_end, write_config, write_tokens

if TYPE_CHECKING:
    from tests.conftest import Spawn, Start, WaitUntil


def issue(authority: trustme.CA, directory: Path, *names: str) -> dict[str, str]:
    """Write a certificate and its key; return the settings that name them."""
    made = authority.issue_cert(*names)
    made.private_key_pem.write_to_path(directory / "tls.key")
    (directory / "tls.key").chmod(0o600)
    made.cert_chain_pems[0].write_to_path(directory / "tls.crt")
    return {"tls_certificate": str(directory / "tls.crt"), "tls_key": str(directory / "tls.key")}


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_open_address_needs_tokens_and_tls(tmp_path: Path, host: str) -> None:
    """Beyond loopback, without tokens or in clear, the monitor is refused with the remedy; asked for, it is let."""
    tokens = write_tokens(tmp_path / "tokens")

    def check(**auth: Any) -> Any:
        return check_access(Settings(root=tmp_path, host=host, port=0, auth=AuthSettings(**auth)))

    with pytest.raises(SettingsError, match=r"is not a loopback address: anybody .* set auth.tokens_file"):
        check()
    with pytest.raises(SettingsError, match=r"anybody who reaches it could read the runs"):
        check(insecure_http=True)
    with pytest.raises(SettingsError, match=r"tokens would cross the network in clear; set auth.tls_certificate"):
        check(tokens_file=tokens)
    assert check(tokens_file=tokens, insecure_http=True)[1][0] == host
    assert check(tokens_file=tokens, **issue(trustme.CA(), tmp_path, "localhost"))[1][0] == host


def test_files_that_cannot_be_used_are_refused_at_the_start(spawn: Spawn, tmp_path: Path) -> None:
    """Tokens that are not there end the start with one line and status 1, and so does a key that others may read."""
    files = issue(trustme.CA(), tmp_path, "localhost")
    (tmp_path / "tls.key").chmod(0o644)
    for auth, said in (
        ({"tokens_file": str(tmp_path / "none")}, "cannot be read (No such file or directory)"),
        (files, "has mode 0644: others must not read it"),
    ):
        config = write_config(tmp_path / "monitor.yaml", auth=auth)
        command = (sys.executable, "-m", "gradiometer_monitor", "--dir", tmp_path / "runs", "--port", "0")
        process = spawn(*command, "--config", config, stderr=subprocess.PIPE)
        (line,) = process.communicate(timeout=120)[1].splitlines()
        assert process.returncode == 1
        assert said in line


@dataclass
class Secure:
    """A daemon that serves TLS, and how to ask it."""

    port: int
    authority: trustme.CA
    directory: Path

    def ask(self, path: str, version: ssl.TLSVersion | None = None) -> tuple[int, str]:
        """Ask for a path: status, and the serial number of the certificate that was shown."""
        context = ssl.create_default_context()
        self.authority.configure_trust(context)
        if version is not None:
            context.minimum_version = context.maximum_version = version
        connection = http.client.HTTPSConnection("localhost", self.port, context=context, timeout=20)
        try:
            connection.request("GET", path, headers=AS_READER)
            answer = connection.getresponse()
            answer.read()
            shown = connection.sock.getpeercert() or {}
            return answer.status, str(shown["serialNumber"])
        finally:
            connection.close()


@pytest.fixture(scope="module")
def secure(shared_spawn: Spawn, wait_until: WaitUntil, tmp_path_factory: pytest.TempPathFactory) -> Secure:
    """Start a daemon with tokens and TLS."""
    directory, authority = tmp_path_factory.mktemp("config"), trustme.CA()
    auth = {"tokens_file": str(write_tokens(directory / "tokens")), **issue(authority, directory, "localhost")}
    config = write_config(directory / "monitor.yaml", auth=auth, limits={"request_seconds": 60, "max_connections": 8})
    port_file = directory / "port"
    command = (sys.executable, "-m", "gradiometer_monitor", "--dir", directory / "runs", "--port", "0")
    shared_spawn(*command, "--config", config, "--port-file", port_file, stderr=subprocess.DEVNULL)
    wait_until(port_file.exists)
    return Secure(port=int(port_file.read_text()), authority=authority, directory=directory)


def test_tls_is_served_and_its_certificate_exchanged(secure: Secure, wait_until: WaitUntil) -> None:
    """HTTPS answers by TLS 1.2 and later; a new pair is shown to new connections; a broken one changes nothing."""
    status, first = secure.ask("/api/v1/runs", ssl.TLSVersion.TLSv1_2)
    assert (status, secure.ask("/metrics")[0]) == (200, 200)
    (secure.directory / "tls.crt").write_text("broken")
    assert secure.ask("/-/ready")[1] == first
    issue(secure.authority, secure.directory, "localhost")
    wait_until(lambda: secure.ask("/-/ready")[1] != first)
    context = ssl.create_default_context()
    secure.authority.configure_trust(context)
    with socket.create_connection(("localhost", secure.port), timeout=20) as plain:
        plain.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"HTTP/1.1 200" not in read_to_end(plain)


def test_half_made_handshakes_keep_nobody_out(secure: Secure) -> None:
    """Connections that never finish their TLS handshake are counted, and make room for who does."""
    held = [socket.create_connection(("127.0.0.1", secure.port), timeout=20) for _ in range(12)]
    try:
        assert [secure.ask("/metrics")[0] for _ in range(3)] == [200] * 3
    finally:
        for connection in held:
            connection.close()


def test_old_tls_is_not_spoken(tmp_path: Path) -> None:
    """TLS 1.1 and older are switched off."""
    issue(trustme.CA(), tmp_path, "localhost")
    made = Certificate(tmp_path / "tls.crt", tmp_path / "tls.key")
    assert made.context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_a_pair_that_does_not_fit_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a new pair leaves the old one in use whole."""
    monkeypatch.setattr(tls, "CHECK_SECONDS", 0.0)
    authority = trustme.CA()
    issue(authority, tmp_path, "localhost")
    made = Certificate(tmp_path / "tls.crt", tmp_path / "tls.key")
    old_key = (tmp_path / "tls.key").read_bytes()
    issue(authority, tmp_path, "localhost")
    (tmp_path / "tls.key").write_bytes(old_key)
    made.refresh()
    client_in, server_in = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    authority.configure_trust(context)
    client = context.wrap_bio(client_in, server_in, server_hostname="localhost")
    server = made.context.wrap_bio(server_in, client_in, server_side=True)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue
    assert client.version() in ("TLSv1.2", "TLSv1.3")


def test_hosts_can_be_allowed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Names that the config lists are answered, by their whole labels; others are not."""
    allowed = ["gpu-7.example.org", "*.example.com"]
    config = write_config(tmp_path_factory.mktemp("config") / "monitor.yaml", auth={"allowed_hosts": allowed})
    monitor = start("--config", config)
    for host in ("gpu-7.example.org:9477", "GPU-7.EXAMPLE.ORG", "gpu-7.example.com", "127.0.0.1:1", "localhost"):
        assert monitor.get("/api/v1/runs", Host=host)[0] == 200, host
    for host in ("gpu-8.example.org:9477", "example.com.evil.net", "evilexample.com", "10.1.2.3:9477"):
        status, body, _ = monitor.get("/api/v1/runs", Host=host)
        assert status == 400, host
        assert "auth.allowed_hosts" in json.loads(body)["detail"]


class _Held:
    def __init__(self, idle_since: float | None) -> None:
        self.idle_since = idle_since
        self.was_cut = False

    def cut(self) -> None:
        self.was_cut = True


def test_the_longest_waiting_of_who_has_most_makes_room() -> None:
    """Beyond the limit a connection is cut, never one that is being served, nor that of a client who has fewer."""
    gate = Gate(LimitSettings(max_connections=8, max_connections_per_client=7))
    pairs = [socket.socketpair() for _ in range(10)]
    try:
        held = [_Held(idle) for idle in (1.0, 9.0, None, 5.0, 6.0, 7.0, 8.0, None)]
        clients = ["quiet", *["greedy"] * 7]
        for (connection, _), client, guarded in zip(pairs, clients, held, strict=False):
            assert gate.admit(connection, client)
            gate.guard(connection.fileno(), guarded)
        assert gate.admit(pairs[8][0], "new")
        assert [each.was_cut for each in held] == [False, False, False, True, False, False, False, False]
        assert len(gate) == 8
    finally:
        for pair in pairs:
            for end in pair:
                end.close()
