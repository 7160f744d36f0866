"""What is remembered of alerts over restarts: those accepted, those acted on, and what was asked of jobs.

Everything is a note in the monitor's store, so that what was accepted is there after a crash and is done once: a
request has its id before it is made, and an agent does what has an id once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict

from gradiometer_monitor.alerts.payload import Alert
from gradiometer_monitor.store import Store

__all__ = ["Asked", "Job", "Ledger", "PutInForce"]

PREFIX = "alerts"
REMEMBER_SECONDS = 14 * 86400.0
"""How long a firing is remembered after it was last heard of: more than twice as long as Alertmanager does."""
HOUR = 3600.0


class Job(BaseModel):
    """An alert that one rule matched, accepted and not yet done with."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    key: str
    """Of the note; jobs sort by it in the order in which they were accepted."""
    request: str
    """Id of the request that is made of it, if one is."""
    received: float
    """Unix time."""
    rule: str
    run_id: str
    by: str
    """Who posted it."""
    alert: str
    """Its name."""
    firing: str
    fingerprint: str
    starts_at: str
    resolved: bool
    summary: str


class Asked(BaseModel):
    """What was asked of a job that has not answered."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    job: Job
    action: str
    rank: int
    """The one that answers."""
    at: float


class PutInForce(BaseModel):
    """A policy that a rule has put in force, and what was in force before."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    request: str
    before: dict[str, Any] | None
    at: float


class Ledger:
    """The notes of the alerts in one store; what belongs together is written together, through :meth:`write`."""

    def __init__(self, store: Store) -> None:
        self._store, self._count = store, 0

    def write(self, notes: dict[str, Any]) -> None:
        """Write notes, all of them or none; None forgets one."""
        self._store.add((), notes)

    def make_job(self, rule: str, run_id: str, alert: Alert, by: str, request: str) -> Job:
        """Make the job of an alert and a rule; for one thread at a time."""
        now, self._count = time.time_ns(), self._count + 1
        return Job(
            key=f"{PREFIX}/queue/{now:020d}.{self._count % 10**9:09d}",
            request=request,
            received=now / 1e9,
            rule=rule,
            run_id=run_id,
            by=by,
            alert=alert.name,
            firing=alert.firing,
            fingerprint=alert.identity,
            starts_at=alert.starts_at,
            resolved=alert.status == "resolved",
            summary=alert.summary,
        )

    def put(self, jobs: Iterable[Job]) -> None:
        """Queue jobs, all of them or none. Raises sqlite3.Error."""
        self.write({job.key: job.model_dump() for job in jobs})

    def queued(self) -> list[Job]:
        """Return the jobs that wait, the oldest first."""
        return [Job.model_validate(raw) for _, raw in sorted(self._store.notes(f"{PREFIX}/queue/").items())]

    # What became of a firing.

    def outcome(self, job: Job) -> str | None:
        """Return what became of the job's firing before, None if it is not known."""
        found = self._store.note(_seen(job))
        return None if found is None else str(found["outcome"])

    def seen(self, job: Job, outcome: str, now: float) -> dict[str, Any]:
        """Make the notes of what became of a firing, and whether it goes on."""
        return {_seen(job): {"outcome": outcome, "at": now}, _fires(job): None if job.resolved else {"at": now}}

    def others_fire(self, job: Job) -> bool:
        """Tell whether another alert of the rule fires for the run."""
        return any(key != _fires(job) for key in self._store.notes(f"{PREFIX}/fires/{job.rule}/{job.run_id}/"))

    # How often a rule has acted, or would have: a dry run holds no action back.

    def acted(self, job: Job, now: float, *, dry: bool) -> dict[str, Any]:
        """Make the notes that the rule acts on the run now."""
        times = [*self._times(job.rule, now, dry), now]
        return {_of("hour", dry, job.rule): times, _of("acted", dry, job.rule, job.run_id): {"at": now}}

    def seconds_since(self, job: Job, now: float, *, dry: bool) -> float:
        """Return how long ago the rule acted on the run; infinite if it never did."""
        found = self._store.note(_of("acted", dry, job.rule, job.run_id))
        return float("inf") if found is None else max(0.0, now - float(found["at"]))

    def in_an_hour(self, rule: str, now: float, *, dry: bool) -> int:
        """Return how often the rule acted in the last hour."""
        return len(self._times(rule, now, dry))

    def _times(self, rule: str, now: float, dry: bool) -> list[float]:
        return [at for at in self._store.note(_of("hour", dry, rule), []) if now - HOUR < at <= now]

    # What was asked, and what it replaced.

    def open(self, asked: Asked) -> dict[str, Any]:
        """Make the note of a request that is to be answered."""
        return {f"{PREFIX}/open/{asked.job.request}": asked.model_dump()}

    def closed(self, request: str) -> dict[str, Any]:
        """Make the note of one that was."""
        return {f"{PREFIX}/open/{request}": None}

    def unanswered(self) -> dict[str, Asked]:
        """Return what was asked and not answered, by request."""
        found = self._store.notes(f"{PREFIX}/open/")
        return {key.rpartition("/")[2]: Asked.model_validate(raw) for key, raw in found.items()}

    def in_force(self, job: Job) -> PutInForce | None:
        """Return the policy that the rule put in force in the run, if it did."""
        found = self._store.note(_in_force(job))
        return None if found is None else PutInForce.model_validate(found)

    def put_in_force(self, job: Job, before: PutInForce | None) -> dict[str, Any]:
        """Make the note of it; None forgets."""
        return {_in_force(job): None if before is None else before.model_dump()}

    def cursor(self, default: int) -> int:
        """Return the number of the last event that was looked at for answers."""
        return int(self._store.note(f"{PREFIX}/answers", default))

    def look_up_to(self, number: int) -> dict[str, Any]:
        """Make the note of that."""
        return {f"{PREFIX}/answers": number}

    def forget(self, now: float) -> None:
        """Forget what was long ago."""
        old = {
            key: None
            for kind in ("seen", "fires", "acted", "acted-dry", "in-force")
            for key, note in self._store.notes(f"{PREFIX}/{kind}/").items()
            if now - float(note["at"]) > REMEMBER_SECONDS
        }
        if old:
            self.write(old)


def _of(kind: str, dry: bool, *names: str) -> str:
    return "/".join([PREFIX, f"{kind}-dry" if dry else kind, *names])


def _seen(job: Job) -> str:
    return f"{PREFIX}/seen/{job.rule}/{job.run_id}/{job.firing}"


def _fires(job: Job) -> str:
    return f"{PREFIX}/fires/{job.rule}/{job.run_id}/{job.fingerprint}"


def _in_force(job: Job) -> str:
    return f"{PREFIX}/in-force/{job.rule}/{job.run_id}"
