"""Alerts about whether a run goes on, whether its ranks go together, and whether it is measured in full."""

from __future__ import annotations

from gradiometer.metrics import STEP_SECONDS_BUCKETS
from gradiometer_dashboards.rules.expressions import all_of, highest, indented, moved, running
from gradiometer_dashboards.rules.model import Alert, Settings, Who
from gradiometer_dashboards.rules.recording import RUNNING, STEP_AGE, STEP_SECONDS, STEPS

__all__ = ["of_progress"]

STARTING_STEPS = 10
LONGEST = f'{{le="{STEP_SECONDS_BUCKETS[-1]}"}}'
"""Selects the steps that took no longer than the longest that are told apart, 300 s."""


def of_progress(settings: Settings) -> tuple[Alert, ...]:
    """List these alerts."""
    return (
        _stalled(settings),
        _divergence(settings),
        _lost(settings),
        _series_dropped(settings),
        _rows_dropped(settings),
        _agent_errors(settings),
    )


def _stalled(settings: Settings) -> Alert:
    by, limits = settings.of_run, settings.thresholds
    grouped = f"max by ({', '.join(by)})"
    slow = f"{STEP_AGE} <= {limits.stalled_steps:g} * {STEP_SECONDS}"
    steps = highest("gradiometer_steps_total", by)
    paused = f"{grouped} (gradiometer_step_seconds_count - ignoring (le) gradiometer_step_seconds_bucket{LONGEST}) > 0"
    paused = f"{STEP_AGE} <= {limits.starting_seconds:g} and {paused}"
    starting = f"{STEP_AGE} <= {limits.starting_seconds:g} and {steps} < {STARTING_STEPS}"
    return Alert(
        name="Stalled",
        severity="warning",
        meaning="The run is alive and takes no steps.",
        value=f"{all_of(STEP_AGE, running(by))}\nunless ({slow})\nunless ({starting})\nunless ({paused})",
        limit=limits.stalled_seconds,
        by=by,
        lasting="1m",
        summary="Run {{ $labels.run_id }}: no step for {{ $value | humanizeDuration }}<who>",
        description="The processes of the run are alive, and their newest step is {{ $value | humanizeDuration }} old, "
        f"more than {limits.stalled_seconds:g} s and {limits.stalled_steps:g} usual steps. A collective that waits for "
        "a dead rank, a data loader, a checkpoint or an evaluation that takes this long all look like this.",
        who=Who(
            expr="time() - max by (<by>) (gradiometer_last_step_timestamp_seconds<of>)",
            label="rank",
            noun="longest: rank",
            several=False,
        ),
        dashboard="run",
        panel=3,
    )


def _divergence(settings: Settings) -> Alert:
    by, limits = settings.of_run, settings.thresholds
    grouped = ", ".join(by)
    behind = highest("gradiometer_rank_steps_behind", by)
    late = f"{behind} * {STEP_SECONDS} > {limits.rank_seconds_behind:g}"
    apart = (
        f"(max by ({grouped}) (gradiometer_grad_norm_baseline) - min by ({grouped}) (gradiometer_grad_norm_baseline))\n"
        f"/ max by ({grouped}) (gradiometer_grad_norm_baseline)"
    )
    parts = {
        "ranks": f"{highest('gradiometer_rank_norm_deviation', by)} / {limits.rank_deviation:g}",
        "hosts": f"{indented(apart)} / {limits.rank_deviation:g} and {STEPS} >= {limits.warm_up_steps}",
        "steps": f"{behind} / {limits.rank_steps_behind:g} and {late}",
    }
    marked = [f'label_replace({expr}, "between", "{name}", "", "")' for name, expr in parts.items()]
    together = "\nor ".join(marked)
    return Alert(
        name="RankDivergence",
        severity="warning",
        meaning="The ranks of a run no longer compute the same gradient, or one of them falls behind.",
        value=all_of(f"max by ({grouped}) {indented(together)}", f"{RUNNING} == 1"),
        limit=1,
        by=by,
        lasting="5m",
        summary="Run {{ $labels.run_id }}: its ranks diverge<who>",
        description="For 5 minutes, ranks that should see the same global norm differ by more than "
        f"{limits.rank_deviation:.0%}, or their usual norms differ between hosts, or a rank is more than "
        f"{limits.rank_steps_behind:g} steps and {limits.rank_seconds_behind:g} s behind: <value> times the limit. "
        "Their weights may differ by now.",
        who=Who(
            expr=f"max by (<by>) (gradiometer_rank_norm_deviation<of>) > {limits.rank_deviation:g} "
            f"or max by (<by>) (gradiometer_rank_steps_behind<of>) > {limits.rank_steps_behind:g}",
            label="rank",
            noun="rank",
        ),
        dashboard="ranks",
    )


def _lost(settings: Settings) -> Alert:
    by = settings.of_run
    was = highest("gradiometer_run_state", by, of='state="running"', over="1h")
    return Alert(
        name="AgentLost",
        severity="warning",
        meaning="The process of a run died without saying so.",
        value=all_of(highest("gradiometer_run_state", by, of='state="lost"'), f"{was} == 1"),
        limit=0,
        by=by,
        lasting="1m",
        summary="Run {{ $labels.run_id }}: its process is gone, and did not detach",
        description="The run was running within the last hour; now its process no longer lives, and left no word that "
        "it finished: it was killed, ran out of memory, or crashed. The run directory holds every step up to then.",
        dashboard="run",
        panel=1,
    )


def _series_dropped(settings: Settings) -> Alert:
    return Alert(
        name="SeriesDropped",
        severity="info",
        meaning="A series budget leaves layers out of the metrics.",
        value=highest("gradiometer_series_omitted", settings.of_run),
        limit=0,
        by=settings.of_run,
        lasting="15m",
        summary="Run {{ $labels.run_id }}: <count> series of layers are left out",
        description="The run has more layers than the monitor's series_budget or total_series has room for. The most "
        "anomalous are served, and quantiles hold all of them; raise the budget if Prometheus can bear it.",
        dashboard="run",
        panel=17,
    )


def _rows_dropped(settings: Settings) -> Alert:
    return Alert(
        name="RowsDropped",
        severity="warning",
        meaning="Steps were lost on the way to the metrics.",
        value=moved("gradiometer_rows_dropped_total", settings.of_run),
        limit=0,
        by=settings.of_run,
        summary="Run {{ $labels.run_id }}: <count> step(s) were not recorded",
        description="<count> step(s) of the last 10 minutes were lost: the agent's transfer slots were all busy, or "
        "the ring overtook the monitor. What happened in them no alert can see.",
        dashboard="run",
        panel=17,
    )


def _agent_errors(settings: Settings) -> Alert:
    return Alert(
        name="AgentErrors",
        severity="warning",
        meaning="The agent caught failures of its own so that training went on.",
        value=moved("gradiometer_agent_errors_total", settings.of_run),
        limit=0,
        by=settings.of_run,
        summary="Run {{ $labels.run_id }}: the agent caught <count> failure(s) of its own",
        description="Training goes on; something of the measurement is missing. The job's log says what, once a kind "
        "of failure.",
        dashboard="run",
        panel=18,
    )
