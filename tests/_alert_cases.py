"""What must make each alert fire, and what must not: series of a run, and when which alert fires."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf, nan

from tests._alert_series import MINUTES, RATE, Change, Rows, end, gap, healthy, leave, put, restart

__all__ = ["ANOMALIES", "START", "Anomaly", "Case", "cases"]

START = 20.0
"""When what is wrong begins, in minutes."""
KEEP = 5.0
"""For how long alerts go on when their condition is gone."""
SLACK = 1.0
A = 'job="J", instance="a:9477", run_id="r"'


@dataclass(frozen=True, kw_only=True)
class Anomaly:
    """What is wrong with a run, for ``minutes``, and by when the alert fires after its begin."""

    changes: dict[str, Change]
    minutes: float = 0.5
    fires: float = 0.0
    lingers: float = KEEP
    """For how long after the end the alert may fire."""
    also: tuple[str, ...] = ()
    """Alerts that fire with it."""
    below: dict[str, Change] = field(default_factory=dict)
    """What is just not too much."""
    of_run: bool = True

    def apply(self, rows: Rows, changes: dict[str, Change] | None = None) -> Rows:
        for part, change in (changes or self.changes).items():
            put(rows, part, change, START, START + self.minutes)
        return rows


NONFINITE: dict[str, Change] = {
    "nonfinite_steps_total": 1,
    "layer_nonfinite_total": 3,
    "nonfinite_origin_total;neck": 1,
    f'gradiometer_nonfinite_origin_total{{{A}, layer="head"}}': 2,
}
"""All layers are non-finite, as most are then; at ``head``, where most of it begins, it never did before."""
FROZEN: dict[str, Change] = {
    "gradiometer_steps_total": 0,
    "step_seconds": 0,
    "last_step_timestamp": 60 * START - 31,
    'last_step_timestamp;rank="1"': 60 * START - 33,
    "clip_events": 0,
}
COUNTED = 10 + KEEP


def _late(since: int) -> float:
    """Say when the newest step was, if it is always 280 s ago."""
    return 60 * START + 30 * (since - 1) - 280


def _state(state: str) -> str:
    return f'gradiometer_layer_state{{{A}, layer="head", state="{state}"}}'


ANOMALIES: dict[str, Anomaly] = {
    "NonFiniteUpdate": Anomaly(
        changes=NONFINITE | {"nonfinite_updates": 1}, lingers=COUNTED + 5, also=("NonFinite",), below=NONFINITE
    ),
    "NonFinite": Anomaly(changes=NONFINITE, lingers=COUNTED),
    "Spike": Anomaly(
        changes={"window_max": 10.5, "anomaly_score": 9}, minutes=1, lingers=3 + KEEP, below={"window_max": 9.8}
    ),
    "LayerExploding": Anomaly(changes={"layers_exploding": 1, _state("exploding"): 1}, minutes=3, fires=1, lingers=12),
    "LayerVanishing": Anomaly(changes={"layers_vanishing": 1, _state("vanishing"): 1}, minutes=14, fires=10),
    "ClipSaturated": Anomaly(
        changes={'clip_events;"act"': lambda since: 0.95 * RATE * since},
        minutes=20,
        fires=15,
        below={'clip_events;"act"': lambda since: 0.89 * RATE * since},
    ),
    "SkippingRun": Anomaly(changes={"in_a_row": 11}, minutes=1, lingers=3 + KEEP, below={"in_a_row": 10}),
    "Stalled": Anomaly(changes=FROZEN, minutes=8, fires=6.5, below={"last_step_timestamp": _late}),
    "RankDivergence": Anomaly(
        changes={'norm_deviation;rank="1"': 0.051}, minutes=9, fires=5, below={'norm_deviation;rank="1"': 0.049}
    ),
    "LossNonFinite": Anomaly(changes={"gradiometer_loss{": nan}, minutes=2),
    "SeriesDropped": Anomaly(changes={"series_omitted": 1}, minutes=17, fires=15),
    "RowsDropped": Anomaly(changes={"rows_dropped": 1}, lingers=COUNTED),
    "AgentErrors": Anomaly(changes={"agent_errors": 1}, lingers=COUNTED),
    "MonitorDegraded": Anomaly(changes={"config_last_reload;a:": 0}, minutes=14, fires=10, of_run=False),
    "RemoteWriteBehind": Anomaly(
        changes={"pending_seconds;a:": 601}, minutes=9, fires=5, of_run=False, below={"pending_seconds;a:": 600}
    ),
    "GpuErrors": Anomaly(changes={"ecc_errors;a:": 1}, fires=1, lingers=COUNTED, of_run=False),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A name, the series, and which alerts fire: some until and from when they must, no other at any time."""

    name: str
    rows: Rows
    of: str = ""
    """The alert that it is about."""
    fires: float | None = None
    """From when on it must fire, in minutes; None if it must not."""
    holds: float = 0.5
    """For how long after that."""
    quiet: float = MINUTES
    """From when on nothing may fire."""
    allowed: tuple[str, ...] = ()
    """Alerts that may fire beside it."""


def cases() -> Iterator[Case]:
    """Give all cases."""
    for name, anomaly in ANOMALIES.items():
        yield from _variants(name, anomaly)
    yield from _of_gaps()
    yield from _silent()
    yield from _firing()


def _variants(name: str, anomaly: Anomaly) -> Iterator[Case]:
    """Let an anomaly meet all that happens to series."""
    first = START + anomaly.fires
    quiet = START + anomaly.minutes + anomaly.lingers + SLACK
    rows = {kind: anomaly.apply(healthy()) for kind in ("alone", "gap", "hidden", "restarting")}
    yield Case(name=f"{name}-alone", rows=rows["alone"], of=name, fires=first, quiet=quiet, allowed=anomaly.also)
    if anomaly.below:
        below = anomaly.apply(healthy(), anomaly.below)
        yield Case(name=f"{name}-below", rows=below, of=name, allowed=anomaly.also)
    gap(rows["gap"], first + 1)
    yield Case(
        name=f"{name}-gap", rows=rows["gap"], of=name, fires=first, holds=4, quiet=quiet + 2.5, allowed=anomaly.also
    )
    gap(rows["hidden"], START - 1.5)
    yield Case(
        name=f"{name}-hidden", rows=rows["hidden"], of=name, fires=first + SLACK, quiet=quiet + 2, allowed=anomaly.also
    )
    if anomaly.of_run:
        yield from _endings(name, anomaly, first, quiet)


def _endings(name: str, anomaly: Anomaly, first: float, quiet: float) -> Iterator[Case]:
    ended, before, after = (anomaly.apply(healthy()) for _ in range(3))
    end(ended, first + 1)
    left = max(quiet, first + 1 + 15 + KEEP + SLACK)
    yield Case(name=f"{name}-end", rows=ended, of=name, fires=first, quiet=left, allowed=anomaly.also)
    restart(before, 2)
    yield Case(name=f"{name}-after-restart", rows=before, of=name, fires=first, quiet=quiet, allowed=anomaly.also)
    restart(after, first + 1)
    yield Case(name=f"{name}-restart", rows=after, of=name, fires=first, quiet=quiet, allowed=anomaly.also)


def _of_gaps() -> Iterator[Case]:
    """Give the cases of a monitor that is not scraped, which is an anomaly of its own."""
    down = healthy()
    gap(down, START, 8)
    yield Case(name="MonitorDown-alone", rows=down, of="MonitorDown", fires=START + 5, quiet=START + 8.5)
    gone = healthy()
    leave(gone, START, of='job="J"')
    yield Case(name="MonitorDown-gone", rows=gone, of="MonitorDown", fires=START + 5, holds=30)
    lost = healthy()
    end(lost, START, state="lost")
    yield Case(name="AgentLost-alone", rows=lost, of="AgentLost", fires=START + 1, quiet=START + 15 + KEEP + SLACK)
    hidden = healthy()
    end(hidden, START, state="lost")
    gap(hidden, START - 1)
    yield Case(name="AgentLost-hidden", rows=hidden, of="AgentLost", fires=START + 2, quiet=START + 16 + KEEP + SLACK)
    blind = ANOMALIES["NonFiniteUpdate"].apply(healthy())
    gap(blind, START - 5, 20)
    yield Case(
        name="NonFiniteUpdate-outage", rows=blind, of="NonFiniteUpdate", fires=START + 15, quiet=START + 36,
        allowed=("NonFinite", "MonitorDown"),
    )  # fmt: skip


def _silent() -> Iterator[Case]:
    """Give the cases in which nothing may fire."""
    makers: dict[str, Callable[[], Rows]] = {
        "healthy": healthy, "warm-up": _warm_up, "gap": _gapped, "restart": _restarted, "end": _ended,
        "scaler": _scaler, "scaler-starts": _scaler_starts, "noisy": _noisy, "slow": _slow, "starting": _starting,
        "finished": _finished, "lost-long-ago": _lost_long_ago, "fast-ranks": _fast_ranks, "pod": _moved,
        "infinite-peak": _infinite_peak, "overflows-often": _overflows_often, "scaler-searches": _scaler_searches,
        "evaluates": _evaluates, "by-design": _clips_by_design, "one-target-less": _scaled_down,
        "slow-ranks": _slow_ranks,
    }  # fmt: skip
    for name, make in makers.items():
        yield Case(name=name, rows=make())


def _firing() -> Iterator[Case]:
    """Give the cases in which an alert fires that are not of the kinds that all have."""
    makers: dict[str, tuple[str, Callable[[Rows], None], float, float]] = {
        "born": ("NonFiniteUpdate", _born, 0, 21),
        "scaler-overflows": ("NonFinite", _overflows, 6, 45),
        "loss-inf": ("LossNonFinite", lambda rows: put(rows, "gradiometer_loss{", inf, START, START + 2), 0, 8),
        "gpu-lost": ("GpuErrors", lambda rows: put(rows, "gpu_up;a:", 0, START, START + 4), 1, 10),
        "store": ("MonitorDegraded", lambda rows: put(rows, "store_persistent;a:", 0, START, START + 12), 10, 18),
        "service": ("MonitorDegraded", lambda rows: put(rows, "service_healthy;a:", 0, START, START + 12), 10, 18),
        "collector": ("MonitorDegraded", lambda rows: put(rows, "collector_s;a:", 0, START, START + 12), 10, 18),
        "behind": ("RankDivergence", lambda rows: put(rows, 'steps_behind;rank="1"', 110, START, START + 8), 5, 14),
        "hosts": ("RankDivergence", lambda rows: put(rows, "norm_baseline;b:", 1.06, START, START + 8), 5, 14),
        "scaled-spike": ("Spike", _spike_beside_overflows, 0, 10),
        "scale-lost": ("SkippingRun", _searches_for_ever, 0, 9),
        "hangs-after-evaluations": ("Stalled", _hangs_after_evaluations, 32, 45),
        "stuck-at-start": ("Stalled", _stuck_at_start, 12, 40),
    }
    for name, (of, change, fires, lingers) in makers.items():
        rows = healthy()
        change(rows)
        also = ("NonFinite",) if name == "born" else ()
        yield Case(name=name, rows=rows, of=of, fires=START + fires, quiet=START + lingers, allowed=also)


def _warm_up() -> Rows:
    """Give a run from its first step: norms fall from a hundred times what they will be, and every step is clipped."""
    rows = healthy(steps=0, rate=30)
    put(rows, "window_max", lambda since: max(1.5, 300 * 0.7**since), 0)
    put(rows, "norm_baseline", lambda since: max(1.0, 8 * 0.7**since), 0)
    put(rows, 'clip_events;"act"', lambda since: 30 * min(since, 33), 0)
    return rows


def _gapped() -> Rows:
    rows = healthy()
    gap(rows, START)
    return rows


def _restarted() -> Rows:
    rows = healthy()
    restart(rows, START)
    return rows


def _ended() -> Rows:
    rows = healthy()
    end(rows, START)
    return rows


def _scaler() -> Rows:
    """Give a run with a GradScaler that now and then finds its scale too large."""
    rows = healthy()
    put(rows, f"gradiometer_loss_scale{{{A}}}", 65536.0, 0)
    put(rows, "nonfinite_steps_total", lambda since: since // 5, START)
    return rows


def _scaler_starts() -> Rows:
    """Give a run with a GradScaler from its first step, half of whose first steps are too large."""
    rows = healthy(steps=0, rate=30)
    put(rows, f"gradiometer_loss_scale{{{A}}}", 65536.0, 0)
    put(rows, "nonfinite_steps_total", lambda since: min(15, since), 0)
    return rows


def _noisy() -> Rows:
    rows = healthy()
    put(rows, "norm_mad", 0.6, 0)
    put(rows, "window_max", 12.0, START, START + 1)
    return rows


def _slow() -> Rows:
    """Give a run of which a step takes eight minutes."""
    rows = healthy(steps=2000, rate=1)
    put(rows, "step_seconds_sum", lambda since: 2000 * 480.0, 0)
    put(rows, "step_seconds_count", lambda since: 2000, 0)
    put(rows, "last_step_timestamp", lambda since: since // 16 * 480.0, 0)
    return rows


def _starting() -> Rows:
    """Give a run that compiles for twenty minutes after its first steps."""
    rows = healthy()
    put(rows, "gradiometer_steps_total", lambda since: 9, 0)
    put(rows, "last_step_timestamp", 0, 0, 25)
    return rows


def _evaluates(minutes: float = 20) -> Rows:
    """Give a run that evaluates, and not for the first time: two of its steps took longer than 300 s."""
    rows = healthy()
    for part, change in FROZEN.items():
        put(rows, part, change, START, START + minutes)
    counts = {name: row for name, row in rows.items() if name.startswith("gradiometer_step_seconds_count")}
    for name, row in counts.items():
        bucket = name.replace("_count{", "_bucket{").replace("}", ', le="300.0"}')
        rows[bucket] = [None if value is None else value - 2 for value in row]
    return rows


def _hangs_after_evaluations(rows: Rows) -> None:
    """Let a run that has evaluated before hang for longer than any evaluation may take."""
    rows.update(_evaluates(38))


def _stuck_at_start(rows: Rows) -> None:
    """Let the run hang in its first steps for longer than it may take to start."""
    put(rows, "gradiometer_steps_total", lambda since: 9, 0)
    put(rows, "last_step_timestamp", 0, 0, START + 25)


def _finished() -> Rows:
    """Give a run that finishes with a loss of NaN, a vanishing layer and steps that were skipped."""
    rows = healthy()
    end(rows, 5)
    for part, value in {"layers_vanishing": 1, "gradiometer_loss{": nan, "in_a_row": 20, "window_max": 50}.items():
        put(rows, part, value, 11, 20)
    return rows


def _lost_long_ago() -> Rows:
    rows = healthy()
    for state in ("running", "lost"):
        put(rows, f'run_state;"{state}"', float(state == "lost"), 0)
    return rows


def _fast_ranks() -> Rows:
    """Give a fast run whose second rank is read a second after the first."""
    rows = healthy()
    put(rows, 'steps_behind;rank="1"', 90, 0)
    return rows


def _slow_ranks() -> Rows:
    """Give a run of long steps whose second rank is some steps behind."""
    rows = healthy(rate=3)
    put(rows, 'steps_behind;rank="1"', 5, 0)
    return rows


def _moved() -> Rows:
    """Give a run, once non-finite, whose monitors come back under other addresses."""
    rows = healthy()
    for part in ("nonfinite_steps_total", "agent_errors", "rows_dropped"):
        put(rows, part, 0, 0)
    others = {name.replace(":9477", ":9999"): list(row) for name, row in rows.items()}
    leave(rows, START, of='job="J"')
    for row in others.values():
        row[: round(2 * START) + 4] = [None] * (round(2 * START) + 4)
    return rows | others


def _infinite_peak() -> Rows:
    """Give a run in which no norm of a minute was finite."""
    rows = healthy()
    put(rows, "norm_window_max", inf, START, START + 1)
    (finite,) = (row for name, row in rows.items() if "finite_window_max" in name)
    finite[round(2 * START) : round(2 * START) + 2] = [None, None]
    return rows


def _overflows_often() -> Rows:
    """Give a run whose GradScaler overflows every 20 s: the largest norm of the last minute is always Inf."""
    rows = healthy()
    put(rows, f"gradiometer_loss_scale{{{A}}}", 65536.0, 0)
    put(rows, "norm_window_max", inf, 0)
    return rows


def _scaler_searches() -> Rows:
    """Give a run whose GradScaler comes down from 2 ** 64 in its first steps."""
    rows = healthy(steps=0, rate=10)
    put(rows, f"gradiometer_loss_scale{{{A}}}", 65536.0, 0)
    put(rows, "in_a_row", 40.0, 0, 1)
    return rows


def _clips_by_design() -> Rows:
    """Give a run of a policy that clips nine steps of ten, and of another that clips hardly any."""
    rows = healthy()
    put(rows, f'gradiometer_clip_events_total{{{A}, policy="percentile", mode="act"}}', lambda since: RATE * since, 0)
    return rows


def _spike_beside_overflows(rows: Rows) -> None:
    """Let a norm be large in one minute of a run whose GradScaler overflows every 20 s."""
    rows.update(_overflows_often())
    put(rows, "finite_window_max", 10.5, START, START + 1)


def _searches_for_ever(rows: Rows) -> None:
    """Let a GradScaler skip all of a run's first steps."""
    rows.update(healthy(steps=0, rate=10))
    put(rows, f"gradiometer_loss_scale{{{A}}}", 65536.0, 0)
    put(rows, "in_a_row", 41.0, START, START + 1)


def _scaled_down() -> Rows:
    """Give a run of which one of two monitors is no longer a target."""
    rows = healthy()
    leave(rows, START, of='instance="b:9477"')
    return rows


def _born(rows: Rows) -> None:
    """Let a run appear that has counted before it was first scraped."""
    put(rows, "nonfinite_", 1, 0)
    put(rows, "layer_nonfinite_total;embed", 0, 0)
    for name, row in rows.items():
        if 'run_id="r"' in name:
            row[: round(2 * START)] = [None] * round(2 * START)


def _overflows(rows: Rows) -> None:
    """Let a GradScaler skip every tenth step for ten minutes."""
    put(rows, f"gradiometer_loss_scale{{{A}}}", 65536.0, 0)
    put(rows, "nonfinite_steps_total", lambda since: 0.1 * RATE * since, START, START + 10)
