"""Settings of the HTTP server: who is let in, and what a request may cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from gradiometer_monitor.config.section import Section, between

__all__ = ["AuthSettings", "LimitSettings"]

HostName = Annotated[str, Field(pattern=r"^(\*\.)?[A-Za-z0-9]([A-Za-z0-9.-]{0,252})$|^\[[0-9A-Fa-f:.]{2,45}\]$")]
"""A name, a name with ``*.`` for its first label, or an address; that of IPv6 in brackets. Without a port."""


class AuthSettings(Section):
    """Who is let in; without tokens the monitor serves loopback only, and nothing can be changed through it."""

    tokens_file: Path | None = None
    """File with a line ``<role> <name> <token>`` for each client; role ``metrics``, ``alerts``, ``read`` or ``write``.
    Read again when it changes."""
    tls_certificate: Path | None = None
    """PEM file of the certificate and its chain; read again when it changes."""
    tls_key: Path | None = None
    """PEM file of the certificate's key, which only its owner and his group may read."""
    insecure_http: bool = False
    """Serve an address that is not loopback without TLS: tokens and gradients cross the network in clear. For a
    network that is private by itself, or where a proxy in front speaks TLS."""
    allowed_hosts: Annotated[tuple[HostName, ...], Field(max_length=64)] = ()
    """Names without port by which clients ask for this monitor, beside ``localhost``, loopback and ``host``; ``*.`` may
    stand for the first labels."""

    @model_validator(mode="after")
    def _both_or_none(self) -> AuthSettings:
        if (self.tls_certificate is None) != (self.tls_key is None):
            given, missing = ("certificate", "key") if self.tls_key is None else ("key", "certificate")
            raise ValueError(f"tls_{given} is given without tls_{missing}: TLS needs both")
        return self


class LimitSettings(Section):
    """What a request may cost."""

    max_body_bytes: Annotated[int, between(1024, 64 * 2**20)] = 1_048_576
    """A longer body is refused with 413."""
    max_header_bytes: Annotated[int, between(1024, 2**20)] = 16_384
    """Longer headers, the line of the request included, are refused with 431."""
    max_query_bytes: Annotated[int, between(256, 2**16)] = 8_192
    """A longer query string is refused with 414."""
    request_seconds: Annotated[float, between(0.5, 600)] = 10.0
    """A request that has not arrived whole after this is refused with 408, or just closed before its headers are
    there."""
    answer_seconds: Annotated[float, between(1, 600)] = 60.0
    """An answer that has not begun after this is given up with 504; a client that takes nothing of it for as long is
    cut off. Streams may last."""
    max_connections: Annotated[int, between(8, 10_000)] = 128
    """Connections held at once. One more takes the place of the longest idle one; where none is idle it is told 503."""
    max_connections_per_client: Annotated[int, between(1, 10_000)] = 64
    """Connections that one address may hold at once, of ``max_connections``."""
