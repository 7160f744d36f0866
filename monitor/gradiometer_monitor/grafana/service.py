"""Keep a Grafana as it should be, and turn events into annotations there, each once, in the order they were heard of.

Guarantees: an event is looked for in Grafana, by its own tag, before it is annotated, so that one whose annotation was
made while the answer, or the monitor, was lost is not annotated again; the place in the events moves on only after
that. While Grafana is away, or lets nobody in, events wait in the store, as many and as long as the settings say; one
that Grafana will never take is counted and passed over. Nothing here is in the way of a poll or a scrape.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterable
from logging import getLogger
from typing import Any

from gradiometer.tail import Sample
from gradiometer_monitor.grafana.annotations import event_tag, opened_by, tags_of, text_of, told_first
from gradiometer_monitor.grafana.client import Grafana, GrafanaError
from gradiometer_monitor.grafana.provision import CHANGED, Change, apply, run_dashboard
from gradiometer_monitor.grafana.settings import GrafanaSettings
from gradiometer_monitor.retrying import backoff
from gradiometer_monitor.services import Context, Service
from gradiometer_monitor.store import Event

__all__ = ["GrafanaService"]

log = getLogger(__name__)

RESULTS = ("created", "extended", "present", "echo", "skipped", "rejected")
"""What becomes of an event: annotated, its region ended, found annotated, told by another rank, too old, not wanted."""
BATCH = 100
"""Events read from the store at once. Grafana takes annotations one by one."""
FIRST_WAIT_SECONDS, LAST_WAIT_SECONDS = 1.0, 300.0
"""Pauses between tries while Grafana is away: doubled each time, up to the last; each is shortened by chance."""
POISON_TRIES = 8
"""An event that a Grafana which is well answers so often with status 500 is passed over, lest it hold up all others."""
UNSURE = (0, 408, 502, 503, 504)
"""After no answer, or one of a proxy, Grafana may still be busy with the request."""
LOOK_SECONDS = 1.0
"""Pause between two looks for an annotation that may be on its way."""
STOPPED = ""
"""What becomes of an event that is in doubt when the service is to end: the next one sees to it."""
IDLE_SECONDS = 60.0
"""Longest pause while there is nothing to do; a new event ends it."""
ONE_AT_A_TIME = threading.Lock()
"""Held while annotating: after a reload, the service before may still wait for an answer."""


class GrafanaService(Service):
    """Applies the dashboards to a Grafana and annotates the run's with what happens to runs."""

    name = "grafana"
    sections = ("grafana",)

    def __init__(self, settings: GrafanaSettings, context: Context) -> None:
        super().__init__()
        self._settings, self._context, self._store = settings, context, context.store
        self._key = f"grafana/{_digest(settings.address, settings.org_id or 0, settings.uid_prefix)}"
        self._grafana: Grafana | None = None
        self._counts = dict.fromkeys(RESULTS, 0)
        self._cursor: int = int(self._store.note(self._key, 0))
        self._waiting, self._up = self._count_waiting(), 0
        self._tries, self._not_before, self._apply_at = 0, 0.0, 0.0
        self._poison: tuple[str, int] = ("", 0)
        self._told: object = None

    def start(self) -> None:
        """Begin, and be woken by events from now on."""
        self._context.events.listen(self.wake)
        super().start()

    def samples(self) -> Iterable[Sample]:
        for result, count in self._counts.items():
            yield "gradiometer_annotations_total", (result,), float(count)
        yield "gradiometer_annotations_waiting", (), float(self._waiting)
        yield "gradiometer_grafana_up", (), float(self._up)

    def close(self) -> None:
        self._context.events.forget(self.wake)
        self._disconnect()

    def work(self) -> float:
        pause = self._not_before - time.monotonic()
        try:
            if pause <= 0:
                done = self._tend()
                self._succeeded()
                pause = min(IDLE_SECONDS if done else FIRST_WAIT_SECONDS, max(self._apply_at - time.monotonic(), 0.0))
        except GrafanaError as error:
            pause = self._failed(error)
        self._waiting = self._count_waiting()
        return pause

    def _tend(self) -> bool:
        """Do all there is to do, and tell whether that was all. Raises GrafanaError where Grafana cannot be used."""
        grafana = self._connect()
        if time.monotonic() >= self._apply_at:
            complete = self._apply(grafana) if self._settings.apply else bool(grafana.health())
            pause = self._settings.check_seconds if complete else min(self._settings.check_seconds, IDLE_SECONDS)
            self._apply_at = time.monotonic() + pause
        if not self._settings.annotations.enabled:
            return True
        if not ONE_AT_A_TIME.acquire(timeout=FIRST_WAIT_SECONDS):
            return False
        try:
            self._annotate(grafana)
        finally:
            ONE_AT_A_TIME.release()
        return True

    def _connect(self) -> Grafana:
        """Return the session; a new one when the token or the password was rotated."""
        try:
            credentials = self._settings.read_credentials()
        except (OSError, ValueError) as error:
            raise GrafanaError(f"nobody can be let into {self._settings.address}: {error}", status=401) from error
        if self._grafana is None or self._grafana.credentials != credentials:
            self._disconnect()
            self._grafana = Grafana(self._settings)
        return self._grafana

    def _disconnect(self) -> None:
        grafana, self._grafana = self._grafana, None
        if grafana is not None:
            grafana.close()

    def _apply(self, grafana: Grafana) -> bool:
        """Make everything as it should be, as far as Grafana lets us; tell whether it did."""
        version, changes = apply(grafana)
        for change in changes:
            if change.state in CHANGED:
                log.info("Grafana %s: %s %s %s %s", version, change.what, change.uid, change.state, change.detail)
        self._tell_once([change for change in changes if change.state in ("kept", "failed")])
        return all(change.state != "failed" for change in changes)

    def _tell_once(self, changes: list[Change]) -> None:
        """Warn of what is not as it should be, again only when it is something else."""
        for change in changes if changes != self._told else ():
            log.warning("Grafana: %s %s %s: %s", change.what, change.uid, change.state, change.detail)
        self._told = changes

    def _annotate(self, grafana: Grafana) -> None:
        """Annotate what waits, until there is nothing more."""
        annotations, board = self._settings.annotations, run_dashboard(self._settings)
        self._cursor = int(self._store.note(self._key, 0))
        self._skip_surplus()
        while not self.stopping.is_set():
            newest, checked = self._store.newest, False
            batch = self._store.events(after=self._cursor, kinds=annotations.kinds, limit=BATCH)
            if not batch:
                self._move(max(self._cursor, newest))
                return
            for event in batch:
                if self.stopping.is_set():
                    return
                old = time.time() - event.time_ns / 1e9 > annotations.max_age_days * 86400
                if not old and not checked:  # Grafana would make an annotation of the whole organisation instead
                    if grafana.dashboard(board) is None:
                        self._apply_at = 0.0
                        raise GrafanaError(f"there is no dashboard {board} to annotate: apply it", status=404)
                    checked = True
                result = "skipped" if old else self._handle(grafana, board, event)
                if result == STOPPED:
                    return
                self._move(event.number)
                self._waiting = self._count_waiting()  # before it counts as done: a scrape never sees it as both
                self._counts[result] += 1
                if result not in ("skipped", "echo") and self.stopping.wait(1 / annotations.per_second):
                    return

    def _handle(self, grafana: Grafana, board: str, event: Event) -> str:
        """Bring one event into Grafana and return what became of it. Raises GrafanaError to have it tried again."""
        if told_first(self._store, event).id != event.id:
            return "echo"
        try:
            result = self._put(grafana, board, event)
        except GrafanaError as error:
            self._up = int(error.status > 0)
            if not (error.lasting or self._poisoned(grafana, event, error)):
                raise
            log.warning("Grafana will not take event %s, which is passed over: %s", event.id, error)
            return "rejected"
        self._succeeded()
        return result

    def _put(self, grafana: Grafana, board: str, event: Event) -> str:
        began = opened_by(self._store, event) if event.kind == "finite_again" else None
        if began is not None and self._extend(grafana, told_first(self._store, began), event):
            return "extended"
        if self._find(grafana, event):
            return "present"
        if self.stopping.is_set():
            return STOPPED
        self._store.put(f"{self._key}/sent", {"id": event.id, "at": time.time()})
        try:
            grafana.add_annotation(board, event.time_ns // 10**6, tags_of(event), text_of(event, self._layer(event)))
        except GrafanaError as error:
            if error.status not in UNSURE:
                self._store.put(f"{self._key}/sent", None)
            raise
        return "created"

    def _extend(self, grafana: Grafana, began: Event, end: Event) -> bool:
        """Make a region of the annotation of ``began``; False if it is not there. Doing it again changes nothing."""
        start_ms, end_ms = began.time_ns // 10**6, end.time_ns // 10**6
        there = grafana.find_annotation(event_tag(began), start_ms)
        number = there.get("id") if there else None
        if not isinstance(number, int):
            return False
        text = text_of(began, self._layer(began), end)
        grafana.update_annotation(number, (start_ms, max(start_ms, end_ms)), tags_of(began), text)
        return True

    def _find(self, grafana: Grafana, event: Event) -> bool:
        """Tell whether an event is annotated; look for as long as Grafana may be busy with it.

        That is so where it was sent shortly before the answer, or we, were lost.
        """
        sent: Any = self._store.note(f"{self._key}/sent", {})
        busy = float(sent["at"]) + self._settings.timeout_seconds - time.time() if sent.get("id") == event.id else 0.0
        until = time.monotonic() + min(busy, self._settings.timeout_seconds)
        while not grafana.find_annotation(event_tag(event), event.time_ns // 10**6):
            rest = until - time.monotonic()
            if rest <= 0 or self.stopping.wait(min(rest, LOOK_SECONDS)):
                return False
        return True

    def _poisoned(self, grafana: Grafana, event: Event, error: GrafanaError) -> bool:
        """Tell whether it is this event that fails, and not Grafana."""
        tries = self._poison[1] + 1 if self._poison[0] == event.id else 1
        self._poison = (event.id, tries) if error.status == 500 else ("", 0)
        if self._poison[1] < POISON_TRIES:
            return False
        grafana.health()
        return True

    def _layer(self, event: Event) -> str | None:
        """Return the layer that an event tells of, if its run is still there."""
        if isinstance(layer := event.data.get("layer"), str):
            return layer
        if not isinstance(name := event.data.get("parameter"), str):
            return None
        with self._context.runs.snapshot() as runs:
            tails = [tail for run in runs if run.run_id == event.run_id for tail in run.ranks]
        parameters = tails[0].manifest.parameters if tails else ()
        return next((each.layer for each in parameters if each.name == name), name)

    def _skip_surplus(self) -> None:
        """Pass over the oldest of what waits beyond the bound."""
        kinds = self._settings.annotations.kinds
        surplus = self._count_waiting() - self._settings.annotations.max_waiting
        if surplus > 0:
            log.warning("Grafana was away for too long: the oldest %d events that waited are not annotated", surplus)
        while surplus > 0 and (batch := self._store.events(after=self._cursor, kinds=kinds, limit=min(surplus, 1000))):
            surplus -= len(batch)
            self._counts["skipped"] += len(batch)
            self._move(batch[-1].number)

    def _count_waiting(self) -> int:
        annotations = self._settings.annotations
        return self._store.count(after=self._cursor, kinds=annotations.kinds) if annotations.enabled else 0

    def _move(self, number: int) -> None:
        if number != self._cursor:
            self._cursor = number
            self._store.put(self._key, number)

    def _succeeded(self) -> None:
        if self._tries:
            log.info("Grafana at %s is there again", self._settings.address)
        self._up, self._tries, self._not_before = 1, 0, 0.0

    def _failed(self, error: GrafanaError) -> float:
        """Tell of a failure once, and return how long to wait."""
        self._disconnect()
        self._up = int(error.status > 0)
        (log.debug if self._tries else log.warning)("%s; events wait, and it will be tried again", error)
        wait = max(backoff(self._tries, FIRST_WAIT_SECONDS, LAST_WAIT_SECONDS), error.wait_seconds)
        self._tries += 1
        self._not_before = time.monotonic() + wait
        return wait


def _digest(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]
