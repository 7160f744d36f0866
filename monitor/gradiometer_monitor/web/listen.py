"""The address that the monitor serves: which are refused, and how many connections are accepted.

Guarantees: an address that is not loopback is served only to who has a token, and in clear only if that was asked for;
connections are counted from the moment they are accepted, so one that never finishes its TLS handshake counts as well.
"""

from __future__ import annotations

import socket
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from logging import getLogger
from typing import Any, Protocol

from gradiometer_monitor.config.settings import Settings, SettingsError
from gradiometer_monitor.web.settings import LimitSettings
from gradiometer_monitor.web.tls import Certificate
from gradiometer_monitor.web.tokens import read_tokens

__all__ = ["Gate", "Guarded", "Listener", "check_access", "listen"]

log = getLogger(__name__)

BACKLOG = 128
Address = tuple[str, int]


class Guarded(Protocol):
    """What a connection tells of itself to the gate."""

    @property
    def idle_since(self) -> float | None:
        """When (monotonic) the connection began to wait for its client; None while it is being served."""
        ...

    def cut(self) -> None:
        """Close it."""
        ...


@dataclass(slots=True)
class _Entry:
    connection: socket.socket
    client: str
    accepted_at: float
    guarded: Guarded | None = None
    """None before its first byte could be read: in the TLS handshake."""

    @property
    def idle_since(self) -> float | None:
        return self.accepted_at if self.guarded is None else self.guarded.idle_since

    def cut(self) -> None:
        if self.guarded is not None:
            self.guarded.cut()
            return
        with suppress(OSError):  # it may have gone by itself
            self.connection.shutdown(socket.SHUT_RDWR)


class Gate:
    """Counts connections, and makes room for a new one by cutting one that waits for its client.

    Of those that wait, it is the longest waiting of the client with the most connections: who holds many cannot keep
    out who holds one.
    """

    def __init__(self, limits: LimitSettings) -> None:
        self.limits = limits
        """Of connections that are accepted from now on."""
        self._entries: dict[int, _Entry] = {}
        """By file descriptor."""

    def admit(self, connection: socket.socket, client: str) -> bool:
        """Count a connection that was accepted; False if there is no room for it."""
        self._forget_closed()
        held = Counter(entry.client for entry in self._entries.values())
        own = held[client] >= self.limits.max_connections_per_client
        if own or len(self._entries) >= self.limits.max_connections:
            waiting = [entry for entry in self._entries.values() if entry.idle_since is not None]
            if own:
                waiting = [entry for entry in waiting if entry.client == client]
            if not waiting:
                return False
            chosen = min(waiting, key=lambda entry: (-held[entry.client], entry.idle_since))
            del self._entries[chosen.connection.fileno()]
            chosen.cut()
        self._entries[connection.fileno()] = _Entry(connection, client, time.monotonic())
        return True

    def guard(self, descriptor: int, guarded: Guarded) -> None:
        """Have a connection that was admitted tell of itself from now on."""
        if (entry := self._entries.get(descriptor)) is not None:
            entry.guarded = guarded

    def _forget_closed(self) -> None:
        late = time.monotonic() - self.limits.request_seconds
        for descriptor, entry in list(self._entries.items()):
            if entry.connection.fileno() != descriptor:
                del self._entries[descriptor]
            elif entry.guarded is None and entry.accepted_at < late:
                entry.cut()

    def __len__(self) -> int:
        self._forget_closed()
        return len(self._entries)


class Listener(socket.socket):
    """A listening socket whose connections pass a :class:`Gate`."""

    gate: Gate
    before: Callable[[], None] | None = None
    """Called before a connection is accepted; must be quick."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a connection. Raises ConnectionAbortedError, after closing it, if there is no room for it."""
        connection, address = super().accept()
        if self.before is not None:
            self.before()
        if not self.gate.admit(connection, str(address[0])):
            connection.close()
            raise ConnectionAbortedError
        return connection, address


def listen(settings: Settings) -> Listener:
    """Bind the address of the settings. Raises SettingsError or OSError, with the remedy."""
    host, port = settings.host, settings.port
    family, address = check_access(settings)
    listener = Listener(family, socket.SOCK_STREAM)
    listener.gate = Gate(settings.limits)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise OSError(
            f"port {port} of {host} cannot be bound ({error.strerror}): stop the process that uses it, or choose "
            "another with --port (0 takes a free one)"
        ) from error
    return listener


def check_access(settings: Settings) -> tuple[socket.AddressFamily, Any]:
    """Check everything that lets somebody in or keeps him out, and resolve the address. Raises SettingsError."""
    auth = settings.auth
    if auth.tokens_file is not None:
        read_tokens(auth.tokens_file)
    if auth.tls_certificate is not None and auth.tls_key is not None:
        Certificate(auth.tls_certificate, auth.tls_key)
    return _check_exposure(settings)


def _check_exposure(settings: Settings) -> tuple[socket.AddressFamily, Any]:
    """Resolve the address to serve, and refuse one that anybody could reach. Raises SettingsError."""
    host, auth = settings.host, settings.auth
    try:
        found = socket.getaddrinfo(host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else "not a name"
        raise SettingsError(f"host {host!r} cannot be resolved ({reason}): try --host 127.0.0.1") from error
    family, *_, address = found[0]
    if ip_address(str(address[0]).partition("%")[0]).is_loopback:
        return family, address
    if auth.tokens_file is None:
        raise SettingsError(
            f"host {host!r} is not a loopback address: anybody who reaches it could read the runs; set "
            "auth.tokens_file, or use --host 127.0.0.1, with an authenticating proxy in front of it"
        )
    if auth.tls_certificate is None and not auth.insecure_http:
        raise SettingsError(
            f"host {host!r} is not a loopback address: tokens would cross the network in clear; set "
            "auth.tls_certificate and auth.tls_key, or 'insecure_http: true' in auth where the network is private or a "
            "proxy speaks TLS, or use --host 127.0.0.1"
        )
    if auth.tls_certificate is None:
        log.warning("serving %s without TLS, as auth.insecure_http asks: tokens cross the network in clear", host)
    return family, address
