"""Get one delivery through: wait for the receiver where it is at fault, find and count the samples where they are.

A receiver takes a batch or refuses it as a whole, and what it answers does not tell which it was reliably: Prometheus
answers 500 to a sample that is too old. So a refusal is believed only while a probe, one sample of a series of the
monitor's own, is taken. Then the batch is halved, and its halves, until what was refused is single samples.

A batch that the receiver may have had before, because its answer was lost, is different: a receiver that keeps order
refuses all of it but what it has not had. It is sent row by row, and rows of which nothing is taken were there.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from logging import getLogger
from typing import NoReturn

import numpy as np

from gradiometer_monitor.remote_write.pieces import Delivery, Piece
from gradiometer_monitor.remote_write.protocol import Block, Series, encode, make_series
from gradiometer_monitor.remote_write.receiver import TOO_LARGE, Answer, Receiver
from gradiometer_monitor.retrying import backoff

__all__ = ["Delivery", "Postman", "UnavailableError"]

log = getLogger(__name__)

TRIES_BEFORE_PROBE = 3
"""A server error is taken for an outage this often before the batch is suspected."""
UNANSWERED = (0, 502, 504)
"""After these it is not known whether the samples were taken."""
MAX_REQUESTS = 512
"""Requests that one delivery may cost; after them its parts are sent once, and counted whole where they are refused."""
BACKOFF_SECONDS = 0.5
"""First pause after a failure; with jitter, between half of it and the whole."""
HEALTHY_SECONDS = 1.0
"""A receiver that took something so shortly ago need not be probed."""
WARN_SECONDS = 60.0
"""Refusals are logged no more often."""
STRIKES = 3
"""Deliveries in a row in which nothing of a series was taken, and something of others, before it is left out."""
QUARANTINE_SECONDS = 300.0
MAX_SUSPECTS = 100_000
PROBE = "gradiometer_remote_write_probe"


class UnavailableError(Exception):
    """The receiver takes nothing now: try again after :attr:`seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Postman:
    """Sends deliveries to one receiver, piece by piece, and counts."""

    def __init__(
        self, name: str, receiver: Receiver, labels: dict[str, str], stopping: Callable[[], bool], backoff_max: float
    ) -> None:
        self._name, self._receiver, self._stopping = name, receiver, stopping
        self._backoff_max = backoff_max
        self._probe = make_series(PROBE, labels | {"receiver": name})
        self._probe_ms, self._taken_at = 0, -np.inf
        self._failures, self._warned_at, self._unwarned = 0, -np.inf, 0
        self._strikes: Counter[Series] = Counter()
        self._quarantine: dict[Series, float] = {}
        self.counts: Counter[str] = Counter()
        """Requests by what became of them, bytes, samples sent and rejected."""
        self.request_seconds = 0.0
        self.connection: object = None
        """The connection on which something was taken last."""
        self.up = True
        """The last request was answered, and not by an error of the server's."""

    def deliver(self, delivery: Delivery, timeout_seconds: float | None = None) -> bool:
        """Send what is left; True when all is settled, False when told to stop. Raises UnavailableError."""
        while delivery.pieces:
            if timeout_seconds is None and self._stopping():
                return False
            self._step(delivery, timeout_seconds)
        self._judge_series(delivery)
        return True

    def quarantined(self) -> frozenset[Series]:
        """Return the series that are left out for now, nothing of which was taken."""
        if self._quarantine:
            now = time.monotonic()
            self._quarantine = {series: until for series, until in self._quarantine.items() if until > now}
        return frozenset(self._quarantine)

    def greet(self) -> None:
        """Probe the receiver, so that what is wrong with it is said at the start and not with the first step."""
        answer = self._send_probe(None)
        if answer.verdict == "later":
            self._fail(answer)
        elif answer.verdict == "refused":
            log.warning("receiver %s refuses a probe: %d %s", self._name, answer.status, answer.words)
        else:
            log.info("receiver %s takes samples", self._name)

    def _step(self, delivery: Delivery, timeout_seconds: float | None) -> None:
        piece = delivery.pieces[-1]
        answer = self._post(encode(piece.blocks), timeout_seconds)
        delivery.requests += 1
        if answer.verdict == "accepted":
            self._taken(delivery, piece)
        elif answer.verdict == "later":
            delivery.repeated |= answer.status in UNANSWERED
            self._fail(answer)
        else:
            self._refused(delivery, piece, answer, timeout_seconds)

    def _refused(self, delivery: Delivery, piece: Piece, answer: Answer, timeout_seconds: float | None) -> None:
        piece.tries += 1
        if piece.kind == "whole" and answer.status >= 500 and piece.tries < TRIES_BEFORE_PROBE:
            self._fail(answer)
        may_cut = piece.samples > 1 and delivery.requests < MAX_REQUESTS
        if answer.status != TOO_LARGE and (piece.kind != "part" or not may_cut):
            self._suspect(answer, timeout_seconds)
        delivery.pieces.pop()
        if piece.parent is not None:
            piece.parent.refused += 1
        if piece.kind == "whole" and delivery.repeated and may_cut and answer.status != TOO_LARGE:
            delivery.pieces += piece.rows()
        elif piece.kind == "row" and piece.samples > 1:
            delivery.pieces += piece.split_row()
        elif piece.kind in ("row", "half"):
            self._half_refused(piece, answer)
        elif may_cut:
            delivery.pieces += piece.cut()
        else:
            self._reject(delivery, piece, answer)

    def _half_refused(self, piece: Piece, answer: Answer) -> None:
        """Believe that a row was taken before when nothing of it is taken now; else look for what is at fault."""
        if piece.parent is not None and piece.parent.refused == 1:
            piece.parent.held = piece
            return
        self.counts["repeated"] += piece.samples
        held = piece.parent.held if piece.parent is not None else None
        self.counts["repeated"] += held.samples if held is not None else 0
        log.debug("receiver %s has had these samples already: %d %s", self._name, answer.status, answer.words)

    def _taken(self, delivery: Delivery, piece: Piece) -> None:
        delivery.pieces.pop()
        delivery.accepted += piece.samples
        self.counts["sent"] += piece.samples
        if piece.kind == "half" and piece.parent is not None:
            held, piece.parent.held = piece.parent.held, None
            # The half that stands alone among those refused is at fault itself.
            suspects = [held] if held is not None else [each for each in delivery.pieces if each.parent is piece.parent]
            for each in suspects:
                each.kind, each.parent = "part", None
            delivery.pieces += [held] if held is not None else []

    def _reject(self, delivery: Delivery, piece: Piece, answer: Answer) -> None:
        delivery.rejected += piece.counts()
        self.counts["rejected"] += piece.samples
        self._warn(piece, answer)

    def _suspect(self, answer: Answer, timeout_seconds: float | None) -> None:
        """Return if the receiver takes a probe, so that what it refused is at fault; raise UnavailableError if not."""
        if time.monotonic() - self._taken_at > HEALTHY_SECONDS:
            probed = self._send_probe(timeout_seconds)
            if probed.verdict != "accepted":
                self._fail(answer)

    def _send_probe(self, timeout_seconds: float | None) -> Answer:
        self._probe_ms = max(time.time_ns() // 1_000_000, self._probe_ms + 1)
        one = np.ones((1, 1))
        times = np.array([self._probe_ms], np.int64)
        block = Block(times=times, series=(self._probe,), values=one, present=one > 0)
        return self._post(encode([block]), timeout_seconds)

    def _post(self, body: bytes, timeout_seconds: float | None) -> Answer:
        started = time.perf_counter()
        answer = self._receiver.post(body, timeout_seconds)
        self.request_seconds += time.perf_counter() - started
        self.counts[answer.verdict] += 1
        self.counts["bytes"] += len(body)
        self.counts["broken"] += answer.status == 0
        if answer.verdict == "accepted":
            self._taken_at, self.connection = time.monotonic(), answer.connection
            self._recovered()
        return answer

    def _fail(self, answer: Answer) -> NoReturn:
        """Raise UnavailableError with how long to wait: longer each time, and no shorter than the receiver asks for."""
        if self.up:
            said = f"{answer.status} {answer.words}" if answer.status else answer.words
            log.warning("receiver %s takes no samples, they wait in the rings: %s", self._name, said)
        self.up = False
        pause = backoff(self._failures, BACKOFF_SECONDS, self._backoff_max)
        self._failures += 1
        raise UnavailableError(max(pause, answer.retry_after_seconds))

    def _recovered(self) -> None:
        if not self.up:
            log.info("receiver %s takes samples again", self._name)
        self.up, self._failures = True, 0

    def _warn(self, piece: Piece, answer: Answer) -> None:
        """Log what was refused with the receiver's words, at most once a minute."""
        self._unwarned += piece.samples
        if time.monotonic() - self._warned_at < WARN_SECONDS:
            return
        block = piece.blocks[0]
        first = next(each for each, there in zip(block.series, block.anywhere.tolist(), strict=True) if there)
        log.warning(
            "receiver %s refused %d samples, as of %s at %d ms, and they are lost to it: %d %s",
            self._name, self._unwarned, first, block.times[0], answer.status, answer.words,
        )  # fmt: skip
        self._warned_at, self._unwarned = time.monotonic(), 0

    def _judge_series(self, delivery: Delivery) -> None:
        """Leave out for a while what is refused again and again while others are taken: it makes each batch costly."""
        if not delivery.rejected and not self._strikes:
            return
        for series, total in Piece(delivery.blocks).counts().items():
            if delivery.rejected[series] < total:
                self._strikes.pop(series, None)
            elif delivery.accepted and len(self._strikes) < MAX_SUSPECTS:
                self._strikes[series] += 1
                if self._strikes[series] >= STRIKES:
                    del self._strikes[series]
                    self._quarantine[series] = time.monotonic() + QUARANTINE_SECONDS
                    log.warning(
                        "receiver %s refuses all of %s: left out for %g s", self._name, series, QUARANTINE_SECONDS
                    )
