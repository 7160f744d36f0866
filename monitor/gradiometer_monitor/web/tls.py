"""TLS by certificate files, which are read again when they change.

Guarantees: a new pair that does not fit, or cannot be read, changes nothing, and the log says so; at least TLS 1.2.
"""

from __future__ import annotations

import ssl
import time
from logging import getLogger
from pathlib import Path

from gradiometer_monitor.config.settings import SettingsError
from gradiometer_monitor.web.files import check_private, signature

__all__ = ["Certificate"]

log = getLogger(__name__)

CHECK_SECONDS = 1.0
"""How often at most it is looked whether the files have changed."""


class Certificate:
    """A certificate and its key. Raises SettingsError if they cannot be used."""

    def __init__(self, certificate: Path, key: Path) -> None:
        self._files = (certificate, key)
        self.context = _context()
        """The context of all connections; those made after a change see the new certificate."""
        self._seen = self._look()
        self._load()
        self._checked_at = time.monotonic()

    def refresh(self) -> None:
        """Read the files again if they have changed."""
        now = time.monotonic()
        if now - self._checked_at < CHECK_SECONDS:
            return
        self._checked_at = now
        seen = self._look()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._load()
        except SettingsError as error:
            log.error("%s; the certificate that was read before stays in use", error)  # noqa: TRY400 - one line
            return
        log.info("auth.tls_certificate %s was read again", self._files[0])

    def _load(self) -> None:
        certificate, key = self._files
        try:
            check_private(f"auth.tls_key {key}", key.stat().st_mode)
            _read(_context(), certificate, key)  # a pair that does not fit would leave half of itself in the other
            _read(self.context, certificate, key)
        except ssl.SSLError as error:
            raise SettingsError(
                f"auth.tls_certificate {certificate} and auth.tls_key {key} cannot be used ({error.reason}): expected "
                "PEM files of a certificate chain and of its key, without a password"
            ) from None
        except OSError as error:
            raise SettingsError(
                f"auth.tls_certificate {certificate} or auth.tls_key {key} cannot be read ({error.strerror})"
            ) from None

    def _look(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(map(signature, self._files))


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _read(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    context.load_cert_chain(certificate, key, password=lambda: b"")  # or OpenSSL asks at the terminal
