"""What an event looks like as an annotation, and which events tell of one thing. Knows no network.

Each annotation carries a tag made of its event's id, by which one that is there already is found again. What all ranks
of a job tell alike becomes one annotation, of the rank that was heard first.
"""

from __future__ import annotations

import hashlib
import html
from collections.abc import Sequence

from gradiometer_monitor.logs import one_line
from gradiometer_monitor.store import Event, Store

__all__ = ["TAG", "event_tag", "opened_by", "tags_of", "text_of", "told_first"]

TAG = "gradiometer"
TEXT_CHARACTERS = 1000
"""Of an event's message; the rest is left out."""
TAG_CHARACTERS = 100
"""What Grafana's database holds of a tag; the name of a run that is longer is cut."""
ECHO_NS = 600 * 10**9
"""Ranks that tell of the same step and thing within this tell of one incident."""
NEIGHBOURS = 1000
"""Events of a run and kind that are looked through for the one that an event belongs to."""


def event_tag(event: Event) -> str:
    """Make the tag of an event, the same whichever monitor sees it, after a restart, or without its state."""
    return f"event-{hashlib.sha256(event.id.encode()).hexdigest()[:20]}"


def tags_of(event: Event) -> list[str]:
    """Make the tags: ours, kind, run, and the event's own."""
    return [TAG, event.kind, event.run_id[:TAG_CHARACTERS], event_tag(event)]


def text_of(event: Event, layer: str | None, end: Event | None = None) -> str:
    """Say what happened, in HTML without markup; ``end`` is the event that ended what ``event`` began."""
    where = [event.run_id]
    where += [f"rank {event.rank}"] if event.rank is not None else []
    where += [f"step {event.step}"] if event.step is not None else []
    where += [f"layer {layer}"] if layer else []
    said = [event.message or event.kind.replace("_", " ")]
    said += [end.message] if end else []
    message = "; ".join(map(one_line, said))
    if len(message) > TEXT_CHARACTERS:
        message = f"{message[:TEXT_CHARACTERS]}…"
    return html.escape(f"{one_line(', '.join(where))}: {message}", quote=False)


def opened_by(store: Store, event: Event) -> Event | None:
    """Return the event that began what ``event``, a ``finite_again``, ends; None if it is not known any more."""
    kinds = ("nonfinite", "finite_again", "attached")
    before = store.events(run_id=event.run_id, kinds=kinds, before=event.number, limit=NEIGHBOURS)
    own = [each for each in before if each.rank == event.rank]
    return own[-1] if own and own[-1].kind == "nonfinite" else None


def told_first(store: Store, event: Event) -> Event:
    """Return the event that stands for all ranks that tell of this: itself if no other rank was heard before."""
    if event.rank is None:
        return event
    before = store.events(run_id=event.run_id, kinds=(event.kind,), before=event.number, limit=NEIGHBOURS)
    standing: list[Event] = []
    for each in before:
        if _thing(each) == _thing(event) and _near(each, event) and not _answers(standing, each):
            standing.append(each)
    return standing[-1] if _answers(standing, event) else event


def _answers(standing: Sequence[Event], event: Event) -> bool:
    """Tell whether a rank is heard after another; one that itself was the first, and tells again, was started anew."""
    return bool(standing) and all(each.rank != event.rank for each in standing)


def _near(one: Event, other: Event) -> bool:
    return one.rank is not None and abs(one.time_ns - other.time_ns) <= ECHO_NS


def _thing(event: Event) -> tuple[object, ...]:
    return (event.kind, event.step, *(str(event.data.get(key)) for key in ("name", "request", "revision", "callback")))
