"""``gradiometer token``: make a token for a client of the monitor."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated

import typer

from gradiometer_monitor.config.settings import SettingsError
from gradiometer_monitor.web.roles import Role, describe_roles
from gradiometer_monitor.web.tokens import NAME, read_tokens

__all__ = ["token"]

TOKEN_BYTES = 32


def token(
    role: Annotated[Role, typer.Argument(help=f"What the client may do; {describe_roles()}.")],
    name: Annotated[str, typer.Argument(help="What the client is called in events and logs.")],
    file: Annotated[
        Path | None, typer.Option("--file", help="Add the line to this file, and print the token alone.")
    ] = None,
) -> None:
    """Make a random token for a client of the monitor: a line for the file that auth.tokens_file names."""
    if not NAME.fullmatch(name):
        raise typer.BadParameter("expected at most 31 of A-Z a-z 0-9 . _ @ -, beginning with a letter or digit")
    made = secrets.token_urlsafe(TOKEN_BYTES)
    line = f"{role} {name} {made}"
    if file is None:
        typer.echo(line)
        return
    try:
        _add(file, line)
    except SettingsError as error:
        typer.echo(f"gradiometer: {error}", err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        said = f"--file {str(file)!r}: cannot be written ({error.strerror}); the directory must be there, and be yours"
        typer.echo(f"gradiometer: {said}", err=True)
        raise typer.Exit(1) from error
    typer.echo(made)


def _add(path: Path, line: str) -> None:
    """Put a line at the end of a file of tokens, which is made with mode 600 if it is not there, as a whole."""
    old = path.read_text() if path.exists() else ""
    if old:
        read_tokens(path)  # one that is broken, or that others may read, is not to be added to
    text = f"{old}{'' if not old or old.endswith(chr(10)) else chr(10)}{line}\n"
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            if old:
                found = path.stat()
                os.fchmod(descriptor, found.st_mode & 0o640)
                if os.geteuid() == 0:
                    os.fchown(descriptor, found.st_uid, found.st_gid)
            file.write(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
