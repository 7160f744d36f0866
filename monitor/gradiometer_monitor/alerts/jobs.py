"""Ask the job of a run for what an alert calls for: through the files that the command line writes."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradiometer.live.control import RequestError, request_policy, requests_rank
from gradiometer.live.requests import request_loop
from gradiometer.live.revisions import Revision, read_history
from gradiometer.policy.problems import PolicyError
from gradiometer.records import RUN_ID, RunFormatError, rank_directory, rank_of, read_manifest
from gradiometer_monitor.alerts.settings import Rule

__all__ = ["REFUSED", "Target", "find_target"]

REFUSED = (RequestError, PolicyError, RunFormatError)
"""What a request that cannot be made raises, and always would."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A run of this monitor's, and the rank whose agent reads requests."""

    run: Path
    rank: int
    wanted_rank: int | None

    def in_force(self) -> Revision:
        """Return the policy in force; raises OSError or RunFormatError."""
        directory = rank_directory(self.run, self.rank)
        return read_history(directory, read_manifest(directory / "manifest.json")).newest

    def ask(self, rule: Rule, request: str, by: str, note: str) -> None:
        """Ask for what the rule says. Raises what is in :data:`REFUSED`, FileNotFoundError, OSError."""
        if rule.action == "policy":
            self.ask_policy(None if rule.policy == "none" else rule.policy, request, by, note)
        else:
            request_loop(self.run, rule.action, rank=self.wanted_rank, by=by[:256], note=note, request=request)

    def ask_policy(self, policy: dict[str, Any] | None, request: str, by: str, note: str) -> None:
        """Ask for a policy; raises as :meth:`ask` does."""
        request_policy(self.run, policy, rank=self.wanted_rank, by=by[:256], note=note, request=request)


def find_target(root: Path, run_id: str, rank: int | None, *, own_host_only: bool) -> Target | None:
    """Find a run by its id; None where it is not one of this monitor's, or is asked on another host.

    Raises OSError for a directory that cannot be read, RunFormatError for what is none of a run.
    """
    run = root / run_id
    if not RUN_ID.fullmatch(run_id) or run.is_symlink() or not run.is_dir():
        return None
    try:
        directory = requests_rank(run, rank)
    except (FileNotFoundError, RequestError):
        return None
    if own_host_only and read_manifest(directory / "manifest.json").host != socket.gethostname():
        return None
    return Target(run=run, rank=rank_of(directory), wanted_rank=rank)
