"""The table of the *Fleet* dashboard: one row a run, what needs attention on top."""

from __future__ import annotations

from grafana_foundation_sdk.builders import table

from gradiometer_dashboards import colours
from gradiometer_dashboards.panels import Card
from gradiometer_dashboards.promql import FLEET, firing, gained_in_view, rate, series
from gradiometer_dashboards.tables import Column, joined, link_to
from gradiometer_dashboards.thresholds import THRESHOLDS

__all__ = ["AGE", "SPEED", "STATE", "age", "runs_table"]

MINUTE = 60.0
FINE = "transparent"
"""Of a cell that asks for nothing: where nothing is wrong, nothing is coloured."""

RUN_STATES = {
    0: ("finished", colours.FINISHED),
    1: ("running", colours.GOOD),
    2: ("lost", colours.BAD),
}
"""What the numbers of :data:`STATE` mean, which are ordered so that the worst of a run's hosts is the run's."""


def _state(at: str = "") -> str:
    lost, running = (series("gradiometer_run_state", of=FLEET & f'state="{name}"') for name in ("lost", "running"))
    return f"max by (run_id) (2 * {lost}{at} or {running}{at})"


def age(at: str = "") -> str:
    """Ask for the time since the slowest rank's newest step, of the runs that are not finished."""
    newest = series("gradiometer_last_step_timestamp_seconds", of=FLEET)
    return f"(time() - min by (run_id) ({newest}{at})) and on (run_id) ({_state(at)} > 0)"


RUNS = f"max by (run_id) ({series('gradiometer_run_info', of=FLEET)})"
STATE = _state()
AGE = age()
SPEED = f"max by (run_id) ({rate('gradiometer_steps_total', of=FLEET)})"
_SCALED = f"max by (run_id) ({series('gradiometer_loss_scale', of=FLEET)}) > 0"
"""Runs with a GradScaler, which finds its scale by steps that are not finite and skips them."""
_LARGEST, _FINITE = (
    f"max by (run_id) ({series(f'gradiometer_grad_norm_{name}', of=FLEET)})"
    f" / max by (run_id) ({series('gradiometer_grad_norm_baseline', of=FLEET)})"
    for name in ("window_max", "finite_window_max")
)
LARGEST_NORM = f"(({_LARGEST} unless on (run_id) {_SCALED} or {_FINITE}) and on (run_id) ({STATE} > 0))"
"""The largest finite one where a GradScaler overflows, else Inf where a norm was; nothing of a run that is finished."""


def _of_every_run(expr: str) -> str:
    """Answer for each run that there is, and for no other: with 0 where ``expr`` has none."""
    return f"({RUNS} * on (run_id) ({expr}) or 0 * {RUNS})"


NONFINITE = _of_every_run(f"max by (run_id) ({gained_in_view('gradiometer_nonfinite_steps_total', of=FLEET)})")
SKIPPED = _of_every_run(f"max by (run_id) ({gained_in_view('gradiometer_skipped_steps_total', of=FLEET)})")
_CRITICAL, _OTHERS = firing('severity="critical"'), firing('severity!="critical"')
CRITICAL = _of_every_run(f"count by (run_id) ({_CRITICAL})")
OTHERS = _of_every_run(f"count by (run_id) ({_OTHERS})")
ATTENTION = " + ".join(
    (
        f"16 * ({CRITICAL} > bool 0)",
        f"8 * ({STATE} == bool 2)",
        f"4 * ({OTHERS} > bool 0)",
        f"2 * ({_of_every_run(f'{NONFINITE} unless on (run_id) {_SCALED}')} > bool 0)",
        f"2 * ({_of_every_run(LARGEST_NORM)} > bool {THRESHOLDS.spike_ratio:g})",
        f"({STATE} == bool 1)",
    )
)
"""A critical alert, a run that is lost, another alert, bad numbers, and then running before finished."""

TO_RUN = link_to("run", "Show the run")
TO_LAYERS = link_to("layers", "Show its layers")
TO_RANKS = link_to("ranks", "Show its ranks")
DESCRIPTION = (
    "One row a run, however many hosts it spans: those with a critical alert first, then runs that are lost, other "
    "alerts, non-finite steps (but for a GradScaler's) or a spike, then what runs. Cells without colour are well; "
    "orange or red ones are where to look. A name leads to the run, a number to its layers or ranks. A run that is "
    "over leaves the table after 15 minutes, and one whose monitor is down at once, so see the monitors above too. "
    "Norm / baseline is the largest norm of the last minute as a multiple of the run's own median, of those not "
    "finished, and with a GradScaler the largest finite one; in their first "
    f"{THRESHOLDS.warm_up_steps} steps norms fall fast, and red means little. Steps that went wrong are counted in "
    "view."
)


def runs_table(id_: int) -> table.Panel:
    """Build the panel: each column is one query that returns one series a run."""
    run = Column(title="Run", label="run_id", links=(TO_RUN, TO_LAYERS, TO_RANKS), width=260)
    card = Card(id_, "Runs", "none", DESCRIPTION, width=24, height=13)
    return joined(card, run, [*_who(), *_norms(), *_steps()], ATTENTION)


def _who() -> list[Column]:
    job = f"topk by (run_id) (1, group by (run_id, job_name) ({series('gradiometer_run_info', of=FLEET)}))"
    critical, others = ((None, FINE), (1, colours.BAD)), ((None, FINE), (1, colours.WARNING))
    return [
        Column(title="State", expr=STATE, names=RUN_STATES, links=(TO_RUN,), width=90),
        Column(title="Critical alerts", expr=CRITICAL, decimals=0, steps=critical, links=(TO_RUN,), width=120),
        Column(title="Other alerts", expr=OTHERS, decimals=0, steps=others, links=(TO_RUN,), width=110),
        Column(title="Job", expr=job, label="job_name", links=(TO_RUN,)),
    ]


def _norms() -> list[Column]:
    spike, clipped = THRESHOLDS.spike_ratio, THRESHOLDS.clip_ratio
    norm = ((None, FINE), (spike / 2, colours.WARNING), (spike, colours.BAD))
    return [
        Column(title="Norm / baseline", expr=LARGEST_NORM, decimals=2, steps=norm, links=(TO_LAYERS,), width=130),
        Column(
            title="Clip ratio",
            expr=f"max by (run_id) ({series('gradiometer_clip_ratio', of=FLEET)})",
            unit="percentunit",
            decimals=0,
            steps=((None, FINE), (clipped, colours.WARNING)),
            links=(TO_RUN,),
            width=90,
        ),
    ]


def _steps() -> list[Column]:
    steps = f"max by (run_id) ({series('gradiometer_steps_total', of=FLEET)})"
    ranks = f"count by (run_id) (group by (run_id, rank) ({series('gradiometer_grad_norm_last', of=FLEET)}))"
    some = ((None, FINE), (0.5, colours.WARNING))
    old = ((None, FINE), (MINUTE, colours.WARNING), (THRESHOLDS.stalled_seconds, colours.BAD))
    return [
        Column(title="Non-finite steps", expr=NONFINITE, decimals=0, steps=some, links=(TO_LAYERS,), width=130),
        Column(title="Skipped steps", expr=SKIPPED, decimals=0, steps=some, links=(TO_LAYERS,), width=120),
        Column(title="Steps", expr=steps, unit="locale", links=(TO_RUN,), width=110),
        Column(title="Steps/s", expr=SPEED, decimals=2, links=(TO_RANKS,), width=90),
        Column(title="Data age", expr=AGE, unit="s", decimals=0, steps=old, links=(TO_RANKS,), width=100),
        Column(title="Ranks seen", expr=ranks, decimals=0, links=(TO_RANKS,), width=100),
    ]
