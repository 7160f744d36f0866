"""Remote write 1.0 on the wire: series and samples as protobuf, compressed as a snappy block.

The messages are those of the public specification, https://prometheus.io/docs/specs/prw/remote_write_spec/. A request
is put together from parts that the library has serialised: the labels of a series once, its samples each time. That
is what protobuf defines concatenation to mean, and an embedded message and a field of bytes are the same on the wire.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import cramjam
import numpy as np
import numpy.typing as npt
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

__all__ = ["STALE", "Block", "LabelError", "Series", "encode", "make_series", "message", "normal"]

STALE: float = struct.unpack("<d", struct.pack("<Q", 0x7FF0000000000002))[0]
"""The NaN that ends a series; the bits count."""
STALE_BITS, NAN_BITS = np.uint64(0x7FF0000000000002), np.uint64(0x7FF8000000000001)
MAX_SERIES_LABELS = 30
"""Labels of a series with its name: what VictoriaMetrics and Mimir take by default."""
MAX_VALUE_BYTES = 2048
"""Bytes of a label's value: what Mimir takes by default."""
METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_PACKAGE = "gradiometer.remote_write"
_FIELD = descriptor_pb2.FieldDescriptorProto
_SCHEMA: dict[str, tuple[tuple[str, int, int, str, bool], ...]] = {
    "Label": (("name", 1, _FIELD.TYPE_STRING, "", False), ("value", 2, _FIELD.TYPE_STRING, "", False)),
    "Sample": (("value", 1, _FIELD.TYPE_DOUBLE, "", False), ("timestamp", 2, _FIELD.TYPE_INT64, "", False)),
    "Labels": (("labels", 1, _FIELD.TYPE_MESSAGE, "Label", True),),
    "Samples": (("samples", 2, _FIELD.TYPE_MESSAGE, "Sample", True),),
    "TimeSeries": (
        ("labels", 1, _FIELD.TYPE_MESSAGE, "Label", True),
        ("samples", 2, _FIELD.TYPE_MESSAGE, "Sample", True),
    ),
    "WriteRequest": (("timeseries", 1, _FIELD.TYPE_MESSAGE, "TimeSeries", True),),
    "SerialisedRequest": (("timeseries", 1, _FIELD.TYPE_BYTES, "", True),),
}
"""Messages and their fields: name, number, type, message of the type, repeated. ``Labels`` and ``Samples`` are the two
halves of ``TimeSeries``; ``SerialisedRequest`` is a ``WriteRequest`` whose series are serialised already."""


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto3")
    for title, fields in _SCHEMA.items():
        described = file.message_type.add(name=title)
        for name, number, kind, of, repeated in fields:
            label = _FIELD.LABEL_REPEATED if repeated else _FIELD.LABEL_OPTIONAL
            field = described.field.add(name=name, number=number)
            field.type, field.label = kind, label  # type: ignore[assignment] # the stubs tell enums from their numbers
            if of:
                field.type_name = f".{_PACKAGE}.{of}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        title: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{title}")) for title in _SCHEMA
    }


_MESSAGES = _build()


def message(name: str) -> Any:
    """Return the class of a message of the protocol, as ``WriteRequest``."""
    return _MESSAGES[name]


class LabelError(ValueError):
    """A series has labels that receivers do not take, or would take and distort."""


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """A series: its labels, sorted, and the same serialised. It is told from others by identity: make each once."""

    labels: tuple[tuple[str, str], ...]
    serialised: bytes

    def __str__(self) -> str:
        pairs = ", ".join(f"{name}={value!r}" for name, value in self.labels if name != "__name__")
        return f"{dict(self.labels)['__name__']}{{{pairs}}}"


def make_series(name: str, labels: Mapping[str, str]) -> Series:
    """Make a series from the metric's name and its labels, of which empty ones are left out.

    Raises LabelError for what the data model does not have, or what goes beyond the usual limits of receivers.
    """
    if not METRIC_NAME.fullmatch(name):
        raise LabelError(f"{name!r} cannot be the name of a metric")
    pairs = sorted([("__name__", name), *((label, value) for label, value in labels.items() if value)])
    if len(pairs) > MAX_SERIES_LABELS:
        raise LabelError(f"{name} has {len(pairs)} labels, receivers take {MAX_SERIES_LABELS}")
    for label, value in pairs:
        if not LABEL_NAME.fullmatch(label) or (label.startswith("__") and label != "__name__"):
            raise LabelError(f"{label!r} cannot be the name of a label")
        _check_value(label, value)
    half = message("Labels")(labels=[message("Label")(name=label, value=value) for label, value in pairs])
    return Series(tuple(pairs), half.SerializeToString())


def _check_value(label: str, value: str) -> None:
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise LabelError(f"label {label} is {value!r:.80}, which is not valid Unicode") from error
    if size > MAX_VALUE_BYTES:
        raise LabelError(f"label {label} has {size} bytes, receivers take {MAX_VALUE_BYTES}: {value!r:.80}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Samples of S series at T instants: what of ``values`` is ``present``."""

    times: npt.NDArray[np.int64]
    """Milliseconds since the epoch, growing, [T]."""
    series: tuple[Series, ...]
    """No series twice, [S]."""
    values: npt.NDArray[np.float64]
    """[T, S]"""
    present: npt.NDArray[np.bool_]
    """[T, S]"""

    @property
    def samples(self) -> int:
        return int(np.count_nonzero(self.present))

    @property
    def anywhere(self) -> npt.NDArray[np.bool_]:
        """Which series have a sample, [S]."""
        there: npt.NDArray[np.bool_] = np.logical_or.reduce(self.present, axis=0)
        return there

    def without(self, series: frozenset[Series]) -> Block:
        """Leave some series out."""
        kept = np.array([each not in series for each in self.series], np.bool_)
        return self._columns(kept)

    def compact(self) -> Block:
        """Leave out the series without a sample."""
        return self._columns(self.anywhere)

    def _columns(self, kept: npt.NDArray[np.bool_]) -> Block:
        if kept.all():
            return self
        series = tuple(each for each, keep in zip(self.series, kept.tolist(), strict=True) if keep)
        return Block(times=self.times, series=series, values=self.values[:, kept], present=self.present[:, kept])

    def halves(self, *, by_series: bool) -> tuple[Block, Block]:
        """Cut in two, by series or by time; the earlier half first."""
        if by_series:
            middle = len(self.series) // 2
            cuts = [(slice(None), slice(None, middle)), (slice(None), slice(middle, None))]
        else:
            middle = len(self.times) // 2
            cuts = [(slice(None, middle), slice(None)), (slice(middle, None), slice(None))]
        first, second = (
            Block(times=self.times[t], series=self.series[s], values=self.values[t, s], present=self.present[t, s])
            for t, s in cuts
        )
        return first, second

    def rows(self) -> Iterator[Block]:
        """Yield a block for each instant."""
        for row in range(len(self.times)):
            one = slice(row, row + 1)
            yield Block(times=self.times[one], series=self.series, values=self.values[one], present=self.present[one])


def normal(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Give every NaN the bits that say no more than that: one that a job logged must not end its series."""
    nan = np.isnan(values)
    if nan.any():
        values = values.copy()
        values.view(np.uint64)[nan] = NAN_BITS
    return values


def encode(blocks: Iterable[Block]) -> bytes:
    """Encode blocks, which have no series in common, as the body of one request."""
    parts: list[bytes] = []
    for block in blocks:
        parts += _serialise(block)
    request = message("SerialisedRequest")(timeseries=parts)
    return bytes(cramjam.snappy.compress_raw(request.SerializeToString()))


def _serialise(block: Block) -> Iterable[bytes]:
    """Serialise each series that has samples; one message serves those that have one at every instant."""
    times = block.times.tolist()
    shared, sample = message("Samples")(), message("Sample")
    shared.samples.extend([sample(timestamp=time) for time in times])
    places, serialise = list(shared.samples), shared.SerializeToString
    full, some = np.logical_and.reduce(block.present, axis=0).tolist(), block.anywhere.tolist()
    for column, series in enumerate(block.series):
        values = block.values[:, column].tolist()
        if full[column]:
            for place, value in zip(places, values, strict=True):
                place.value = value
            yield series.serialised + serialise()
        elif some[column]:
            known = zip(times, values, block.present[:, column].tolist(), strict=True)
            own = message("Samples")(samples=[sample(timestamp=t, value=v) for t, v, there in known if there])
            yield series.serialised + own.SerializeToString()
