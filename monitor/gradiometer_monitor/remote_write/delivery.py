"""Get one delivery through: wait for the receiver where it is at fault, find and count the samples where they are.

A receiver takes a batch or refuses it as a whole, and what it answers does not tell which it was reliably: Prometheus
answers 500 to a sample that is too old. So a refusal is believed only while a probe, one sample of a series of the
monitor's own, is taken. Then the batch is halved, and its halves, until what was refused is single samples.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from typing import NoReturn

import numpy as np

from gradiometer_monitor.remote_write.protocol import Block, Series, encode, make_series
from gradiometer_monitor.remote_write.receiver import TOO_LARGE, Answer, Receiver

__all__ = ["Delivery", "Postman", "UnavailableError"]

log = getLogger(__name__)

TRIES_BEFORE_PROBE = 3
"""A server error is taken for an outage this often before the batch is suspected."""
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


@dataclass(slots=True)
class Piece:
    """Part of a delivery: what one request carries."""

    blocks: tuple[Block, ...]
    by_series: bool = True
    """Along which side to cut next."""
    whole: bool = True
    """Nothing of the delivery has been cut off."""
    tries: int = 0
    parent: _Cut | None = None

    @property
    def samples(self) -> int:
        return sum(block.samples for block in self.blocks)

    @property
    def divisible(self) -> bool:
        return self.samples > 1


@dataclass(slots=True)
class _Cut:
    """Two halves: when both are refused, the fault lies across the cut, and the next goes along the other side."""

    refused: int = 0


@dataclass(slots=True)
class Delivery:
    """What is on its way: a stack of pieces, the next one last."""

    pieces: list[Piece]
    requests: int = 0
    accepted: int = 0
    """Samples."""
    rejected: Counter[Series] = field(default_factory=Counter)
    """Samples, by series."""
    blocks: tuple[Block, ...] = ()

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> Delivery:
        kept = tuple(block for block in blocks if block.samples)
        return cls(pieces=[Piece(kept)] if kept else [], blocks=kept)


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
            delivery.pieces.pop()
            delivery.accepted += piece.samples
            self.counts["sent"] += piece.samples
        elif answer.verdict == "later":
            self._fail(answer)
        else:
            self._refused(delivery, piece, answer, timeout_seconds)

    def _refused(self, delivery: Delivery, piece: Piece, answer: Answer, timeout_seconds: float | None) -> None:
        piece.tries += 1
        may_cut = piece.divisible and delivery.requests < MAX_REQUESTS
        if piece.whole and answer.status >= 500 and piece.tries < TRIES_BEFORE_PROBE:
            self._fail(answer)
        if answer.status != TOO_LARGE and (piece.whole or not may_cut):
            self._suspect(answer, timeout_seconds)
        delivery.pieces.pop()
        if may_cut:
            delivery.pieces += _cut(piece)
            return
        for block in piece.blocks:
            totals = np.count_nonzero(block.present, axis=0).tolist()
            delivery.rejected.update({s: n for s, n in zip(block.series, totals, strict=True) if n})
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
        if answer.verdict == "accepted":
            self._taken_at = time.monotonic()
            self._recovered()
        return answer

    def _fail(self, answer: Answer) -> NoReturn:
        """Raise UnavailableError with how long to wait: longer each time, and no shorter than the receiver asks for."""
        if self.up:
            said = f"{answer.status} {answer.words}" if answer.status else answer.words
            log.warning("receiver %s takes no samples, they wait in the rings: %s", self._name, said)
        self.up = False
        pause = min(BACKOFF_SECONDS * 2.0 ** min(self._failures, 20), self._backoff_max)
        self._failures += 1
        raise UnavailableError(max(pause * random.uniform(0.5, 1.0), answer.retry_after_seconds))

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
        totals: Counter[Series] = Counter()
        for block in delivery.blocks:
            counts = np.count_nonzero(block.present, axis=0).tolist()
            totals.update(dict(zip(block.series, counts, strict=True)))
        for series, total in totals.items():
            if not total:
                continue
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


def _cut(piece: Piece) -> list[Piece]:
    """Cut a piece in two, the later half first, as on a stack: between blocks, or within the one there is.

    It goes on along the side of the cut that made the piece, until both halves of one were refused.
    """
    blocks = tuple(compact for block in piece.blocks if (compact := block.compact()).samples)
    by_series = piece.by_series
    if piece.parent is not None:
        piece.parent.refused += 1
        by_series = by_series if piece.parent.refused < 2 else not by_series
    if len(blocks) > 1:
        middle = len(blocks) // 2
        halves, cut = [blocks[middle:], blocks[:middle]], None
    else:
        (block,) = blocks
        by_series = len(block.series) > 1 if by_series or len(block.times) == 1 else by_series
        first, second = block.halves(by_series=by_series)
        halves, cut = [(second,), (first,)], _Cut()
    pieces = [Piece(half, by_series=by_series, whole=False, parent=cut) for half in halves]
    return [each for each in pieces if each.samples]
