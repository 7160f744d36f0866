"""Settings of the HTTP server: who is let in, and what a request may cost."""

from __future__ import annotations

from pathlib import Path

from gradiometer_monitor.section import Section

__all__ = ["AuthSettings", "LimitSettings"]


class AuthSettings(Section):
    """Who is let in; without tokens the monitor serves loopback only, and nothing can be changed through it."""

    tokens_file: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None


class LimitSettings(Section):
    """What a request may cost."""

    max_body_bytes: int = 1_048_576
