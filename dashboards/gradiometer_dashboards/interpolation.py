"""How Grafana writes values into queries: spans of time, escapes, the order of choices, legends, links.

Follows what Grafana 11 and later do for a Prometheus data source, its quirks included: spans are cut to whole units,
and quotes in label values are escaped as in its classic mode, which is its default. Pure functions of their arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

__all__ = [
    "current",
    "escape",
    "escape_regex",
    "formatted",
    "go_duration",
    "legend",
    "named_by_labels",
    "ordered",
    "query_parameters",
    "replaced",
    "round_interval",
    "seconds_of",
    "span",
]

ROUNDED_MS = (
    (10, 1), (15, 10), (35, 20), (75, 50), (150, 100), (350, 200), (750, 500), (1500, 1000), (3500, 2000),
    (7500, 5000), (12_500, 10_000), (17_500, 15_000), (25_000, 20_000), (45_000, 30_000), (90_000, 60_000),
    (210_000, 120_000), (450_000, 300_000), (750_000, 600_000), (1_050_000, 900_000), (1_500_000, 1_200_000),
    (2_700_000, 1_800_000), (5_400_000, 3_600_000), (9_000_000, 7_200_000), (16_200_000, 10_800_000),
    (32_400_000, 21_600_000), (86_400_000, 43_200_000), (604_800_000, 86_400_000), (1_814_400_000, 604_800_000),
    (3_628_800_000, 2_592_000_000),
)  # fmt: skip
"""Below how many milliseconds an interval becomes which."""
YEAR_MS = 31_536_000_000
UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604_800, "M": 2_629_800, "y": 31_557_600}
SPELT = ((31_536_000_000, "y"), (86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s"), (1, "ms"))
VARIABLE = re.compile(r"\$(\w+)|\$\{(\w+)((?:\.\w+|\[\"[^\"]*\"\])*)(?::(\w+))?\}")


def round_interval(milliseconds: float) -> int:
    """Round what a range and a number of points come to, milliseconds, as Grafana does."""
    return next((value for below, value in ROUNDED_MS if milliseconds < below), YEAR_MS)


def seconds_of(text: str) -> float:
    """Read a span such as ``15s``, ``1m30s`` or ``30``, which is seconds. Raises ValueError."""
    if re.fullmatch(r"\d+", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|[smhdwMy])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is no span of time: write it as 15s, 1m30s or 500ms")
    return sum(float(number) * UNITS[unit] for number, unit in parts)


def span(seconds: float) -> str:
    """Write ``$__interval``: whole units of the largest that fits, what is left over is cut off."""
    milliseconds = round(seconds * 1000)
    size, unit = next(((size, unit) for size, unit in SPELT if milliseconds >= size), (1, "ms"))
    return f"{max(1, milliseconds // size)}{unit}"


def go_duration(seconds: float) -> str:
    """Write ``$__rate_interval`` as Go writes a duration: ``1m0s``."""
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    if not hours and not minutes and rest < 1000:
        return f"{rest}ms" if rest else "0s"
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return (f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else "") + text


def escape(value: str) -> str:
    """Escape the value of a variable of one value, for a string of PromQL."""
    return value.replace("\\", r"\\").replace("'", r"\\'")


def escape_regex(value: str) -> str:
    """Escape a value of a variable that may have many, for a regular expression within a string of PromQL."""
    return re.sub(r"[$^*{}\[\]+?.()|]", lambda match: rf"\\{match[0]}", value.replace("\\", r"\\\\"))


def formatted(values: Sequence[str], *, many: bool) -> str:
    """Write the values chosen for a variable, which may have ``many``, into PromQL."""
    if not many:
        return escape(values[0]) if values else ""
    escaped = [escape_regex(value) for value in values]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"


def replaced(text: str, known: Mapping[str, str], write: Callable[[str, str, str], str | None] | None = None) -> str:
    """Replace the variables in a text; what is not known stays as it is.

    ``write`` is asked first with name, path and format of each, as of ``${__data.fields.run_id:percentencode}``.
    """

    def one(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if write is not None and (found := write(name, match[3] or "", match[4] or "")) is not None:
            return found
        plain = not match[3] and not match[4]
        return known[name] if plain and name in known else match[0]

    return VARIABLE.sub(one, text)


def query_parameters(name: str, values: Iterable[str]) -> str:
    """Write a variable as the address of a dashboard has it: ``var-rank=0&var-rank=1``."""
    return "&".join(f"var-{quote(name, safe='')}={quote(value, safe='$')}" for value in values)


def ordered(values: Iterable[str], sort: int) -> list[str]:
    """Order what may be chosen by a variable's ``sort``: 0 as it comes, else one of four ways, even ones descending."""
    found = list(dict.fromkeys(values))
    if not sort:
        return found
    found.sort(key=(_as_is, _first_number, str.lower, _natural)[(sort - 1) // 2])
    return found[::-1] if sort % 2 == 0 else found


def _as_is(value: str) -> str:
    return value


def _first_number(value: str) -> int:
    match = re.search(r"\d+", value)
    return int(match[0]) if match else -1


def _natural(value: str) -> list[tuple[int, int, str]]:
    """Compare runs of digits as numbers and the rest without case, punctuation before digits before letters."""
    parts = re.findall(r"\d+|[a-z]+|[^\da-z]", value.lower())
    return [(1, int(p), "") if p.isdigit() else (2, 0, p) if p.isalpha() else (0, 0, p) for p in parts]


def legend(form: str, labels: Mapping[str, str], expr: str) -> str:
    """Name a series as the data source does; empty where ``__auto`` leaves it to :func:`named_by_labels`."""
    if form == "__auto":
        return "" if labels else expr
    if form:
        return re.sub(r"\{\{\s*(.+?)\s*\}\}", lambda match: labels.get(match[1], ""), form)
    return _spelt(labels) or expr


def named_by_labels(all_labels: Sequence[Mapping[str, str]]) -> list[str]:
    """Name the series of an answer whose legend is ``__auto``: by the value of their only label, else by all."""
    keys = {key for labels in all_labels for key in labels if key != "__name__"}
    if len(keys) == 1:
        (key,) = keys
        return [labels.get(key, "") for labels in all_labels]
    return [_spelt(labels) for labels in all_labels]


def _spelt(labels: Mapping[str, str]) -> str:
    pairs = ", ".join(f'{key}="{labels[key]}"' for key in sorted(labels) if key != "__name__")
    return labels.get("__name__", "") + (f"{{{pairs}}}" if pairs else "")


def current(variable: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what a dashboard has stored as a variable's choice."""
    value = variable.get("current", {}).get("value", ())
    return (value,) if isinstance(value, str) else tuple(value)
