"""Literal series of a run on two hosts, one sample every half minute, and what can befall them.

A row is a list of values; None is a sample that is missing. Times are in minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from math import isinf, isnan

__all__ = ["MINUTES", "RATE", "Change", "Rows", "end", "gap", "healthy", "leave", "put", "restart", "samples"]

Value = float | None
Rows = dict[str, list[Value]]
"""Samples of each series, by the series in PromQL."""
Change = float | Callable[[int], float]
MINUTES = 60
LENGTH = 2 * MINUTES + 1
RATE = 300
"""Steps that a healthy run takes from sample to sample."""
SECOND = ("up{", "steps_total", "step_seconds", "run_state", "baseline", "rank_", "last_step", "nonfinite_steps")
"""What is looked at of the second host."""
STATES = ("running", "finished", "lost")


def healthy(*, steps: int = 5000, rate: int = RATE) -> Rows:
    """Give the series of a healthy run after ``steps`` steps, ``rate`` of them a sample, and of its monitors."""
    rows: Rows = {}
    for rank, host in enumerate("ab"):
        monitor = f'job="J", instance="{host}:9477"'
        of = f'{monitor}, run_id="r"'
        constant = _gauges(of, rank) | _monitor(monitor, f'{monitor}, gpu="0", uuid="GPU-{host}"')
        rows |= {name: [value] * LENGTH for name, value in constant.items()}
        for name, (first, each) in _counters(of, steps, rate).items():
            rows[name] = [first + each * place for place in range(LENGTH)]
        stamps = f'gradiometer_last_step_timestamp_seconds{{{of}, rank="{rank}"}}'
        rows[stamps] = [30.0 * place - 1 for place in range(LENGTH)]
    return {name: row for name, row in rows.items() if '"b:' not in name or any(part in name for part in SECOND)}


def _gauges(of: str, rank: int) -> dict[str, float]:
    states = {f'gradiometer_run_state{{{of}, state="{state}"}}': float(state == "running") for state in STATES}
    return states | {
        f"gradiometer_grad_norm_window_max{{{of}}}": 1.5,
        f"gradiometer_grad_norm_finite_window_max{{{of}}}": 1.5,
        f"gradiometer_grad_norm_baseline{{{of}}}": 1.0,
        f"gradiometer_grad_norm_mad{{{of}}}": 0.05,
        f'gradiometer_layer_anomaly_score{{{of}, layer="head"}}': 1.0,
        f"gradiometer_layers_exploding{{{of}}}": 0,
        f"gradiometer_layers_vanishing{{{of}}}": 0,
        f"gradiometer_skipped_steps_in_a_row{{{of}}}": 1,
        f"gradiometer_loss{{{of}}}": 2.5,
        f"gradiometer_series_omitted{{{of}}}": 0,
        f'gradiometer_rank_norm_deviation{{{of}, rank="{rank}"}}': 0.001,
        f'gradiometer_rank_steps_behind{{{of}, rank="{rank}"}}': rank,
    }


def _counters(of: str, steps: int, rate: int) -> dict[str, tuple[float, float]]:
    """Give where each counter begins, and by how much it grows a sample."""
    return {
        f"gradiometer_steps_total{{{of}}}": (steps, rate),
        f"gradiometer_step_seconds_sum{{{of}}}": (steps * 30 / rate, 30),
        f"gradiometer_step_seconds_count{{{of}}}": (steps, rate),
        f"gradiometer_nonfinite_steps_total{{{of}}}": (0, 0),
        f"gradiometer_nonfinite_updates_total{{{of}}}": (0, 0),
        f'gradiometer_layer_nonfinite_total{{{of}, layer="embed"}}': (0, 0),
        f'gradiometer_layer_nonfinite_total{{{of}, layer="head"}}': (0, 0),
        f'gradiometer_layer_nonfinite_total{{{of}, layer="neck"}}': (0, 0),
        f'gradiometer_nonfinite_origin_total{{{of}, layer="embed"}}': (5, 0),
        f'gradiometer_nonfinite_origin_total{{{of}, layer="neck"}}': (3, 0),
        f'gradiometer_clip_events_total{{{of}, policy="norm", mode="act"}}': (100, 0.1 * rate),
        f'gradiometer_clip_events_total{{{of}, policy="tight", mode="shadow"}}': (steps, rate),
        f"gradiometer_rows_dropped_total{{{of}}}": (0, 0),
        f"gradiometer_agent_errors_total{{{of}}}": (0, 0),
    }


def _monitor(of: str, gpu: str) -> dict[str, float]:
    return {
        f"up{{{of}}}": 1,
        f'gradiometer_service_healthy{{{of}, service="grafana"}}': 1,
        f'gradiometer_collector_success{{{of}, collector="poll"}}': 1,
        f"gradiometer_config_last_reload_successful{{{of}}}": 1,
        f"gradiometer_store_persistent{{{of}}}": 1,
        f'gradiometer_remote_write_pending_seconds{{{of}, receiver="mimir"}}': 2,
        f"gradiometer_gpu_up{{{gpu}}}": 1,
        f'gradiometer_gpu_ecc_errors_total{{{gpu}, type="uncorrected"}}': 4,
        f'gradiometer_gpu_run_info{{{gpu}, run_id="r", rank="0"}}': 1,
    }


def _places(start: float, stop: float = MINUTES + 1) -> range:
    return range(round(2 * start), min(round(2 * stop), LENGTH))


def _accumulates(name: str) -> bool:
    return name.partition("{")[0].endswith(("_total", "_sum", "_count"))


def put(rows: Rows, part: str, change: Change, start: float, stop: float = MINUTES + 1) -> None:
    """Change the series that have each ``;``-separated piece of ``part`` in them, or add one that is written in full.

    A gauge is what ``change`` says from ``start`` to ``stop``; a counter gains what it says above what it had, and
    keeps it, also one that is born with it. A function is given the number of samples since the start, from 1.
    """
    names = [name for name in rows if all(piece in name for piece in part.split(";"))]
    born = not names
    if born:
        assert part.endswith("}"), f"no series has {part}"
        names, rows[part] = [part], [None] * LENGTH
    places = _places(start, stop)
    for name in names:
        row, before = rows[name], list(rows[name])
        counter = _accumulates(name)
        base = (row[places[0] - 1] or 0.0) if counter and start else 0.0
        for since, place in enumerate(places, 1):
            row[place] = base + (change(since) if callable(change) else change)
        if counter:
            gained = (row[places[-1]] or 0.0) - (before[places[-1]] or 0.0)
            for place in _places(stop):
                row[place] = None if row[place] is None and not born else (row[place] or 0.0) + gained


def gap(rows: Rows, start: float, minutes: float = 2.0) -> None:
    """Let no monitor be scraped for some minutes."""
    for name, row in rows.items():
        for place in _places(start, start + minutes):
            row[place] = 0.0 if name.startswith("up{") else None


def restart(rows: Rows, start: float) -> None:
    """Let the job begin anew under the same run id: its counters fall to zero, and gain from there what they would."""
    for name, row in rows.items():
        if 'run_id="r"' in name and _accumulates(name):
            base = row[round(2 * start)] or 0.0
            for place in _places(start):
                row[place] = None if row[place] is None else (row[place] or 0.0) - base


def leave(rows: Rows, start: float, *, of: str = 'run_id="r"') -> None:
    """Let series no longer be exported."""
    for name, row in rows.items():
        if of in name:
            row[round(2 * start) :] = [None] * len(_places(start))


def end(rows: Rows, start: float, *, state: str = "finished") -> None:
    """Let the run be over: all stays as it is for ``retention_seconds``, and then leaves."""
    for name, row in rows.items():
        if 'run_id="r"' in name:
            last = row[round(2 * start) - 1]
            row[round(2 * start) :] = [last] * len(_places(start))
    for each in STATES:
        put(rows, f'run_state;"{each}"', float(each == state), start)
    leave(rows, start + 15)


def samples(row: list[Value]) -> str:
    """Write a row as promtool reads it, with Prometheus' marker where a series was no longer there."""
    written: list[str] = []
    before: Value = None
    for value, equal in groupby(row, key=str):
        count, first = len(list(equal)) - 1, None if value == "None" else float(value)
        written.append("stale" if first is None and before is not None else _spelled(first))
        if count:
            written.append(f"_x{count}" if first is None else f"{_spelled(first)}+0x{count - 1}")
        before = first
    return " ".join(written)


def _spelled(value: Value) -> str:
    if value is None:
        return "_"
    return "NaN" if isnan(value) else ("Inf" if value > 0 else "-Inf") if isinf(value) else f"{value:.9g}"
