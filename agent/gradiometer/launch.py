"""Start a program so that gradiometer attaches by itself, in the program's own process. Needs no torch.

The program replaces this process, so its exit status, signals, terminal and streams are its own by construction. All
that it is given are two environment variables: PYTHONPATH, which leads to ``inject/sitecustomize.py``, and
GRADIOMETER_RUN, the settings, which its child processes inherit too.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from gradiometer.policy.spec import load_policy
from gradiometer.recorder import check_labels, check_run_id
from gradiometer.records import default_root

__all__ = ["ENVIRONMENT", "LaunchError", "LaunchSettings", "find_command", "launch", "make_settings"]

Mode = Literal["auto", "every", "off"]
ENVIRONMENT = "GRADIOMETER_RUN"
INJECTED = Path(__file__).parent / "inject"
_BLIND = re.compile(r"-[A-Za-z]*[EIS][A-Za-z]*")
"""Options of Python that keep it from looking into PYTHONPATH or from importing ``sitecustomize``."""


class LaunchError(ValueError):
    """The program cannot be started as asked; the message is for the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchSettings:
    """What the processes of one launch are told: what :func:`gradiometer.attach` takes, checked."""

    run_id: str
    dir: str
    backward: Mode = "auto"
    policy: Mapping[str, Any] | None = None
    """The policy itself, not its file: every process has the same, whatever becomes of the file."""
    labels: Mapping[str, str] = field(default_factory=dict)
    updates_every: int = 100
    cosine: bool = False
    ring_bytes: int | None = None
    """None leaves it to :func:`gradiometer.attach`."""
    verbose: bool = False

    @classmethod
    def from_environment(cls) -> Self:
        """Read the settings of the launch that this process is part of; raises LaunchError if it cannot."""
        text = os.environ.get(ENVIRONMENT, "")
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise LaunchError(
                f"{ENVIRONMENT} is {text!r:.80}, which this gradiometer cannot read ({error}): start the program with "
                "the 'gradiometer run' of the same version"
            ) from error


def make_settings(
    *,
    policy: Path | None,
    root: Path | None,
    run_id: str | None,
    backward: Mode,
    labels: Sequence[str],
    updates_every: int,
    cosine: bool,
    ring_bytes: int | None,
    verbose: bool,
) -> LaunchSettings:
    """Check what the user asked for and make the directory of runs; raises ValueError or OSError."""
    if cosine and not updates_every:
        raise LaunchError("--cosine is measured in the steps that --updates-every names, which is 0: give it a number")
    chosen = check_run_id(run_id) if run_id else f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return LaunchSettings(
        run_id=chosen,
        policy=None if policy is None else load_policy(policy).to_dict(),
        labels=check_labels(dict(_label(each) for each in labels)),
        dir=str(_writable(default_root(root))),
        backward=backward,
        updates_every=updates_every,
        cosine=cosine,
        ring_bytes=ring_bytes,
        verbose=verbose,
    )


def _label(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise LaunchError(f"--label {text!r}: expected NAME=VALUE, such as --label team=speech")
    return name, value


def _writable(root: Path) -> Path:
    root = root.absolute()
    try:
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        reason = f"{root} cannot be made ({error.strerror})"
        raise LaunchError(f"{reason}: pass another --dir, or set GRADIOMETER_DIR") from error
    if not os.access(root, os.W_OK | os.X_OK):
        raise LaunchError(f"{root} cannot be written by this user: pass another --dir, or set GRADIOMETER_DIR")
    return root


def find_command(command: Sequence[str]) -> list[str]:
    """Return the program and its arguments; a script, ``-m`` or ``-c`` is for this Python.

    Raises LaunchError if there is no such program, or if it is a Python that is told to ignore its environment.
    """
    words = list(command)
    if not words:
        raise LaunchError("there is nothing to run: add the command, as in 'gradiometer run -- python train.py'")
    script = words[0].endswith(".py") and shutil.which(words[0]) is None
    if script and not Path(words[0]).is_file():
        raise LaunchError(f"{words[0]}: no such file")
    if script or words[0].startswith("-"):
        words.insert(0, sys.executable)
    if shutil.which(words[0]) is None:
        raise LaunchError(f"{words[0]}: no such program, or it may not be executed")
    blind = _blind_option(words)
    if blind:
        raise LaunchError(
            f"{blind}: with -E, -I or -S Python ignores what would bring gradiometer in: leave that option out, or "
            "call gradiometer.attach() in the script"
        )
    return words


def _blind_option(words: Sequence[str]) -> str | None:
    if not Path(words[0]).name.startswith("python"):
        return None
    for word in words[1:]:
        if not word.startswith("-") or word.startswith(("-c", "-m", "--")):
            return None
        if not word.startswith(("-W", "-X")) and _BLIND.fullmatch(word):
            return word
    return None


def launch(command: Sequence[str], settings: LaunchSettings) -> NoReturn:
    """Become the program. Its run id is told on stderr if that is a terminal, or if asked to be ``verbose``."""
    words = find_command(command)
    if settings.verbose or sys.stderr.isatty():
        print(f"gradiometer: run {settings.run_id} in {settings.dir}", file=sys.stderr)  # noqa: T201
    sys.stdout.flush()
    sys.stderr.flush()
    for name in ("SIGPIPE", "SIGXFSZ"):  # Python ignores them, and what is ignored stays so in the next program
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.execvpe(words[0], words, _environment(settings))  # noqa: S606  # it is what was asked for


def _environment(settings: LaunchSettings) -> dict[str, str]:
    mine, before = str(INJECTED), os.environ.get("PYTHONPATH", "")
    kept = [entry for entry in before.split(os.pathsep) if entry != mine] if before else []
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([mine, *kept]),
        ENVIRONMENT: json.dumps(asdict(settings)),
    }
