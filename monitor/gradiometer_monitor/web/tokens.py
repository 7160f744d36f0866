"""The bearer tokens of the monitor's clients: a file of them, read again when it changes.

Guarantees: a token is compared with all there are in a time that does not tell which is like it; the tokens themselves
are not kept, only their digests; nothing of a token is in a message, a log or a representation.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path

from gradiometer_monitor.config.settings import SettingsError
from gradiometer_monitor.web.files import check_private, signature
from gradiometer_monitor.web.roles import ROLES, Role, one_of

__all__ = ["Principal", "Tokens", "read_tokens"]

log = getLogger(__name__)

MIN_TOKEN, MAX_TOKEN = 32, 512
"""Characters of a token: of 32 random ones nobody guesses one."""
MIN_DISTINCT = 10
"""Different characters in a token; of 32 random hexadecimal digits one in 10 000 has fewer."""
MAX_FILE_BYTES, MAX_TOKENS = 2**18, 256
CHECK_SECONDS = 0.5
"""How often at most it is looked whether the file has changed."""
TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""What may follow ``Bearer``: RFC 6750, section 2.1."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,30}")
"""Shorter than any token, so that a line whose words are in another order is told."""
REMEDY = "'gradiometer token <role> <name>' prints a line for it"


@dataclass(frozen=True, kw_only=True, slots=True)
class Principal:
    """Who has a token."""

    name: str
    role: Role


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    principal: Principal
    digest: bytes = field(repr=False)


class Tokens:
    """The tokens of a file. Raises SettingsError if it has none, or must not be used.

    A file that is broken later, or gone, changes nothing: the tokens that were read last stay, and the log says so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failed = False
        """Whether the file as it is now could not be taken."""
        self._seen = signature(path)
        self._entries = read_tokens(path)
        self._checked_at = time.monotonic()

    def find(self, token: bytes) -> Principal | None:
        """Return whose ``token`` is, None if it is nobody's."""
        self._refresh()
        digest, found = hashlib.sha256(token).digest(), None
        for entry in self._entries:  # to the end in any case: the time must not tell
            if hmac.compare_digest(entry.digest, digest):
                found = entry.principal
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked_at < CHECK_SECONDS:
            return
        self._checked_at = now
        seen = signature(self.path)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._entries = read_tokens(self.path)
        except SettingsError as error:
            self.failed = True
            log.error("%s; the tokens that were read before stay in use", error)  # noqa: TRY400 - one line is enough
            return
        self.failed = False
        log.info("auth.tokens_file %s was read again: %s", self.path, _names(self._entries))


def read_tokens(path: Path) -> Sequence[_Entry]:
    """Read a file of tokens; raises SettingsError that names the line and what is wrong, and never the token."""
    try:
        text = _read_private(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise SettingsError(f"auth.tokens_file {path} cannot be read ({reason})") from None
    entries: list[_Entry] = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            entries.append(_parse(f"auth.tokens_file {path}, line {number}", line.split(), entries))
    if not 1 <= len(entries) <= MAX_TOKENS:
        raise SettingsError(f"auth.tokens_file {path} has {len(entries)} tokens, expected 1 to {MAX_TOKENS}: {REMEDY}")
    return entries


def _parse(where: str, words: list[str], before: Sequence[_Entry]) -> _Entry:
    if len(words) != 3:
        raise SettingsError(f"{where}: expected '<role> <name> <token>', found {len(words)} words: {REMEDY}")
    said, name, token = words
    role = next((each for each in ROLES if each == said), None)
    if role is None:
        raise SettingsError(f"{where}: expected role {one_of(ROLES)} as the first word: {REMEDY}")
    if not NAME.fullmatch(name):
        raise SettingsError(f"{where}: the second word is not a name, of at most 31 of A-Z a-z 0-9 . _ @ -: {REMEDY}")
    if not MIN_TOKEN <= len(token) <= MAX_TOKEN or not TOKEN.fullmatch(token) or len(set(token)) < MIN_DISTINCT:
        raise SettingsError(
            f"{where}: the token of {name} is too weak or holds what cannot be sent; expected {MIN_TOKEN} to "
            f"{MAX_TOKEN} random ones of A-Z a-z 0-9 . _ ~ + / -: {REMEDY}"
        )
    digest = hashlib.sha256(token.encode()).digest()
    if any(hmac.compare_digest(entry.digest, digest) for entry in before):
        raise SettingsError(f"{where}: the token of {name} is there twice: give each client one of its own")
    return _Entry(principal=Principal(name=name, role=role), digest=digest)


def _read_private(path: Path) -> str:
    """Read a small regular file that others may neither read nor write; a link to it is followed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise SettingsError(f"auth.tokens_file {path} is not a regular file")
        check_private(f"auth.tokens_file {path}", found.st_mode)
        if found.st_uid not in (0, os.geteuid()):
            raise SettingsError(f"auth.tokens_file {path} is owned by user {found.st_uid}: chown it to root, or to who "
                                "runs the monitor")  # fmt: skip
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise SettingsError(f"auth.tokens_file {path} has more than {MAX_FILE_BYTES} bytes")
    return content.decode()


def _names(entries: Sequence[_Entry]) -> str:
    return ", ".join(f"{entry.principal.name} ({entry.principal.role})" for entry in entries)
