"""From alerts that were accepted to what is asked of jobs, one after another, and from their answers to events.

Guarantees: what was accepted is in the store, and is done, or told to be too old, after a restart as well; a firing
leads to one action of a rule, however often it is notified; jobs of one run are done in the order of their alerts, and
one policy is asked for after the other was answered.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterable
from logging import getLogger
from typing import Any

from gradiometer.live.control import answer_of, new_id
from gradiometer.records import RUN_ID
from gradiometer.tail import Sample
from gradiometer_monitor.alerts.desk import FullError
from gradiometer_monitor.alerts.jobs import REFUSED, Target, find_target
from gradiometer_monitor.alerts.ledger import Asked, Job, Ledger, PutInForce
from gradiometer_monitor.alerts.payload import Accepted, Notification
from gradiometer_monitor.alerts.settings import AlertSettings, Rule
from gradiometer_monitor.services import Context, Service
from gradiometer_monitor.store import Event

__all__ = ["MAX_QUEUED", "OUTCOMES", "AlertService"]

log = getLogger(__name__)

MAX_QUEUED = 10_000
"""Alerts times rules that wait at most; a notification that would exceed it is answered 503, and sent again."""
OUTCOMES = (
    *("asked", "applied", "refused", "failed", "unanswered"),
    *("dry_run", "cooled_down", "limited", "repeated", "elsewhere", "expired", "superseded", "resolved"),
)
FINAL = ("asked", "applied", "refused", "failed", "unanswered")
"""Of a firing: what is not done again."""
ANSWERS = ("policy_changed", "policy_rejected", "request_done", "request_refused", "request_failed")
IDLE_SECONDS, BUSY_SECONDS, RETRY_SECONDS = 1.0, 0.1, 5.0
SETTLE_SECONDS = 60.0
"""How long a policy that was asked for may take before another is asked for in its place."""
OVER_SECONDS = 10.0
"""How long after its end a run may still be found to have answered."""
FORGET_SECONDS = 3600.0
PAGE = 500


class AlertService(Service):
    """Acts on alerts by the rules of ``settings``."""

    name = "alerts"
    sections = ("alerts",)

    def __init__(self, settings: AlertSettings, context: Context) -> None:
        super().__init__()
        self._settings, self._context, self._ledger = settings, context, Ledger(context.store)
        self._rules = {rule.name: rule for rule in settings.rules}
        self._accepting = threading.Lock()
        self._outcomes = Counter({(name, outcome): 0 for name in self._rules for outcome in OUTCOMES})
        self._received: Counter[str] = Counter(firing=0, resolved=0)
        self._unmatched = self._truncated = self._queued = self._open = 0
        self._over: dict[str, float] = {}
        """When (monotonic) a request was first seen whose run is over."""
        self._forgotten_at = -FORGET_SECONDS

    def start(self) -> None:
        """Begin to take alerts, in the place of the service before, which takes them until now."""
        self._queued = len(self._ledger.queued())
        self._context.events.listen(self.wake)
        self._context.alerts.taker = self
        super().start()

    def close(self) -> None:
        self._context.events.forget(self.wake)

    def accept(self, notification: Notification, by: str) -> Accepted:
        """Keep what the rules match, to be done soon; from any thread. Raises FullError where it cannot be kept."""
        with self._accepting:
            found, unmatched = [], 0
            for alert in notification.alerts:
                jobs = []
                for rule in self._settings.rules:
                    run_id = alert.labels.get(rule.run_label or self._settings.run_label, "")
                    if RUN_ID.fullmatch(run_id) and rule.matches(alert.labels):
                        jobs.append(self._ledger.make_job(rule.name, run_id, alert, by, new_id()[0]))
                unmatched += not jobs
                found += jobs
            if self._queued + len(found) > MAX_QUEUED:
                raise FullError(f"{self._queued} alerts wait already, and {MAX_QUEUED} may")
            try:
                self._ledger.put(found)
            except sqlite3.Error as error:
                raise FullError(f"what was accepted cannot be stored: {error}") from error
            self._queued += len(found)
            self._received.update(alert.status for alert in notification.alerts)
            self._unmatched += unmatched
            self._truncated += notification.truncated_alerts
        if notification.truncated_alerts:
            log.warning("max_alerts of Alertmanager's receiver cut off %d alerts", notification.truncated_alerts)
        if found:
            self.wake()
        return Accepted(queued=len(found), unmatched=unmatched)

    def samples(self) -> Iterable[Sample]:
        """Give what came in and what became of it."""
        for status, count in self._received.items():
            yield "gradiometer_alerts_received_total", (status,), count
        yield "gradiometer_alerts_unmatched_total", (), self._unmatched
        yield "gradiometer_alerts_truncated_total", (), self._truncated
        yield "gradiometer_alerts_queued", (), self._queued
        yield "gradiometer_alert_actions_open", (), self._open
        for labels, count in list(self._outcomes.items()):
            yield "gradiometer_alert_actions_total", labels, count

    # Rounds.

    def work(self) -> float:
        """Take in the answers of jobs, then do what waits."""
        self._take_answers()
        asked = self._ledger.unanswered()
        for request, each in asked.items():
            self._check_answered(request, each)
        now = time.time()
        busy = {
            each.job.run_id for each in asked.values() if each.action == "policy" and now - each.at < SETTLE_SECONDS
        }
        waiting = self._ledger.queued()
        done = 0
        for job in waiting:
            if self.stopping.is_set():
                break
            if job.run_id not in busy and self._finish(job, busy):
                done += 1
        with self._accepting:
            self._queued = len(self._ledger.queued())
        self._open = len(self._ledger.unanswered())
        if time.monotonic() - self._forgotten_at >= FORGET_SECONDS:
            self._forgotten_at = time.monotonic()
            self._ledger.forget(now)
        return BUSY_SECONDS if done else RETRY_SECONDS if len(waiting) > done and not busy else IDLE_SECONDS

    def _finish(self, job: Job, busy: set[str]) -> bool:
        """Do a job; tell whether that is all, and what else is not to be done now."""
        rule = self._rules.get(job.rule)
        try:
            if rule is None or time.time() - job.received > self._settings.max_age_seconds:
                self._expire(job, rule)
            elif job.resolved:
                self._resolve(job, rule, busy)
            else:
                self._fire(job, rule, busy)
        except OSError as error:
            log.warning("run %s: rule %s cannot act, and will try again: %s", job.run_id, job.rule, error)
            busy.add(job.run_id)
            return False
        except sqlite3.Error:  # for which nothing can be done with any job
            raise
        except Exception as error:  # whatever is wrong with one job, those behind it must be done
            log.exception("run %s: rule %s failed, and is not tried again for this alert", job.run_id, job.rule)
            notes = {} if job.resolved else self._seen(job, "failed")
            self._conclude(job, "failed", f"{type(error).__name__}: see the monitor's log", notes=notes)
        return True

    def _expire(self, job: Job, rule: Rule | None) -> None:
        if rule is None:
            said = "the rule is gone from the settings"
        else:
            said = f"it was accepted more than {self._settings.max_age_seconds:g} s ago and could not be acted on"
        self._conclude(job, "expired", said, notes={} if job.resolved else self._seen(job, "expired"))

    def _fire(self, job: Job, rule: Rule, busy: set[str]) -> None:
        before = self._ledger.outcome(job)
        if before in FINAL:
            self._conclude(job, "repeated", notes=self._seen(job, before))
            return
        target = self._find(job, rule)
        if target is None:
            self._conclude(job, "elsewhere")
            return
        now = time.time()
        outcome, said = self._hindrance(job, rule, now)
        if outcome == "asked":
            outcome, said, notes = self._ask(job, rule, target, now)
            if outcome == "asked" and rule.action == "policy":
                busy.add(job.run_id)
        else:
            notes = self._ledger.acted(job, now, dry=True) if outcome == "dry_run" and before != "dry_run" else {}
        told = said if outcome != before else ""  # once: notifications are repeated for as long as it fires
        self._conclude(job, outcome, told, rule.action, notes=notes | self._seen(job, outcome))
        if outcome == "asked":
            self._look_back(job)

    def _hindrance(self, job: Job, rule: Rule, now: float) -> tuple[str, str]:
        """Say why the rule does not act now, or ``asked``."""
        dry = rule.dry_run or self._settings.dry_run
        rested = self._ledger.seconds_since(job, now, dry=dry)
        if dry and self._ledger.outcome(job) == "dry_run":
            return "dry_run", "nothing is asked: dry_run"
        if rested < rule.cooldown_seconds:
            return "cooled_down", f"it acted on this run {rested:.0f} s ago, and rests for {rule.cooldown_seconds:g} s"
        if self._ledger.in_an_hour(rule.name, now, dry=dry) >= rule.max_per_hour:
            return "limited", f"it acted {rule.max_per_hour} times in the last hour, as often as max_per_hour lets it"
        if dry:
            return "dry_run", "nothing is asked: dry_run"
        return "asked", ""

    def _ask(self, job: Job, rule: Rule, target: Target, now: float) -> tuple[str, str, dict[str, Any]]:
        """Ask the run's job; return outcome, what is said of it, and what is to be remembered."""
        try:
            was = target.in_force()
            target.ask(rule, job.request, f"rule {rule.name}, alert {job.alert}", job.summary)
        except REFUSED as error:
            return "refused", str(error), {}
        except FileNotFoundError as error:
            return "refused", f"the run's directory was removed: {error}", {}
        asked = Asked(job=job, action=rule.action, rank=target.rank, at=now)
        notes = self._ledger.open(asked) | self._ledger.acted(job, now, dry=False)
        if rule.on_resolved == "restore" and was.request != job.request:
            known = self._ledger.in_force(job)
            back = known.before if known is not None and known.request == was.request else was.policy
            notes |= self._ledger.put_in_force(job, PutInForce(request=job.request, before=back, at=now))
        return "asked", f"the job was asked for {_what(rule.action)}", notes

    def _resolve(self, job: Job, rule: Rule, busy: set[str]) -> None:
        notes = self._seen(job, self._ledger.outcome(job) or "resolved")
        mine = self._ledger.in_force(job)
        if mine is None or self._ledger.others_fire(job):
            dry = self._ledger.outcome(job) == "dry_run" and rule.on_resolved == "restore"
            said = "nothing is asked, as it would be to restore the policy: dry_run" if dry else ""
            self._conclude(job, "dry_run" if dry else "resolved", said, "restore", notes=notes)
            return
        target = self._find(job, rule)
        if target is None:
            self._conclude(job, "elsewhere", notes=notes | self._ledger.put_in_force(job, None))
            return
        outcome, said, more = self._restore(job, rule, target, mine)
        if outcome == "asked":
            busy.add(job.run_id)
        notes |= more if outcome == "dry_run" else more | self._ledger.put_in_force(job, None)
        self._conclude(job, outcome, said, "restore", notes=notes)

    def _restore(self, job: Job, rule: Rule, target: Target, mine: PutInForce) -> tuple[str, str, dict[str, Any]]:
        """Ask for the policy that was in force before, if what the rule asked for still is."""
        try:
            newest = target.in_force()
            if newest.request not in (mine.request, job.request) and mine.request not in self._ledger.unanswered():
                said = f"revision {newest.revision} of {newest.by or 'unknown'} is in force by now, and stays"
                return "superseded", said, {}
            if rule.dry_run or self._settings.dry_run:
                return "dry_run", "nothing is asked, as it would be to restore the policy: dry_run", {}
            target.ask_policy(mine.before, job.request, f"rule {rule.name}, alert {job.alert}", "resolved")
        except REFUSED as error:
            return "refused", str(error), {}
        except FileNotFoundError as error:
            return "refused", f"the run's directory was removed: {error}", {}
        asked = Asked(job=job, action="policy", rank=target.rank, at=time.time())
        return "asked", "the job was asked for the policy that was in force before", self._ledger.open(asked)

    # Answers.

    def _take_answers(self) -> None:
        store = self._context.store
        after = self._ledger.cursor(-1)
        if after < 0:  # nothing was ever asked
            self._ledger.write(self._ledger.look_up_to(store.newest))
            return
        while found := store.events(kinds=ANSWERS, after=after, limit=PAGE):
            asked = self._ledger.unanswered()
            for event in found:
                each = asked.get(str(event.data.get("request")))
                if each is not None and event.run_id == each.job.run_id and event.rank == each.rank:
                    self._answered(each, event)
            after = found[-1].number
            self._ledger.write(self._ledger.look_up_to(after))

    def _look_back(self, job: Job) -> None:
        """Find the answer to what was asked already, by a monitor that was killed before it could note it."""
        asked = self._ledger.unanswered().get(job.request)
        for event in self._context.store.events(run_id=job.run_id, kinds=ANSWERS, limit=PAGE):
            if asked is not None and event.data.get("request") == job.request and event.rank == asked.rank:
                self._answered(asked, event)
                return

    def _answered(self, asked: Asked, event: Event) -> None:
        outcome, said = "applied", event.message
        if event.kind != "policy_changed":
            answer = answer_of({"kind": event.kind, **event.data}, asked.job.request)
            if answer is not None and not answer.applied:
                outcome, said = "refused" if event.kind != "request_failed" else "failed", "; ".join(answer.reasons)
        self._close(asked, outcome, said, step=event.step)

    def _check_answered(self, request: str, asked: Asked) -> None:
        """Give up on a job that does not answer, or is over and has not."""
        if time.time() - asked.at > self._settings.answer_seconds:
            self._close(asked, "unanswered", f"the job has not answered for {self._settings.answer_seconds:g} s")
            return
        with self._context.runs.snapshot() as runs:
            over = any(run.run_id == asked.job.run_id and run.state != "running" for run in runs)
        since = self._over.setdefault(request, time.monotonic()) if over else time.monotonic()
        if time.monotonic() - since > OVER_SECONDS:
            self._close(asked, "unanswered", "the run ended before its job answered")

    def _close(self, asked: Asked, outcome: str, said: str, step: int | None = None) -> None:
        self._over.pop(asked.job.request, None)
        job, notes = asked.job, self._ledger.closed(asked.job.request)
        if not job.resolved:
            notes |= self._seen(job, outcome)
        self._outcomes[job.rule, outcome] += 1
        self._tell(job, outcome, said, asked.action, notes, step=step)

    # What is told.

    def _find(self, job: Job, rule: Rule) -> Target | None:
        root = self._context.runs.root
        try:
            return find_target(root, job.run_id, rule.rank, own_host_only=self._settings.own_host_only)
        except REFUSED:
            return None

    def _seen(self, job: Job, outcome: str) -> dict[str, Any]:
        return self._ledger.seen(job, outcome, time.time())

    def _conclude(
        self, job: Job, outcome: str, said: str = "", action: str = "", notes: dict[str, Any] | None = None
    ) -> None:
        """Be done with a job: count it, tell of it where ``said`` is something, and forget it."""
        notes = (notes or {}) | {job.key: None}
        if said:
            self._tell(job, outcome, said, action, notes)
        else:
            self._ledger.write(notes)
        self._outcomes[job.rule, outcome] += 1

    def _tell(
        self, job: Job, outcome: str, said: str, action: str, notes: dict[str, Any], step: int | None = None
    ) -> None:
        message = f"rule {job.rule}, alert {job.alert}{' resolved' if job.resolved else ''}: {outcome}: {said}"
        self._context.events.tell(
            job.run_id, "alert_action", message, step=step, notes=notes, rule=job.rule, alert=job.alert,
            action=action, outcome=outcome, resolved=job.resolved, fingerprint=job.fingerprint,
            starts_at=job.starts_at, request=job.request if outcome in FINAL else None, by=job.by,
            summary=job.summary,
        )  # fmt: skip


def _what(action: str) -> str:
    return {"policy": "another policy", "checkpoint": "a checkpoint", "stop": "its end"}[action]
