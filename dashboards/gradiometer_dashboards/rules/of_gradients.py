"""Alerts about a run's gradients: non-finite, exploding, vanishing, clipped or skipped too often, spikes, the loss."""

from __future__ import annotations

from dataclasses import replace

from gradiometer_dashboards.rules.expressions import all_of, gained, highest, indented, newest, peak_norm
from gradiometer_dashboards.rules.model import Alert, Settings, Who
from gradiometer_dashboards.rules.recording import (
    CLIPPED,
    CLIPPING,
    NONFINITE_STEPS,
    NONFINITE_UPDATES,
    RATIO,
    RUNNING,
    STEPS,
)

__all__ = ["NONFINITE_LAYERS", "of_gradients"]

SCALE_SEARCH = 30
"""Halvings more that the scale of a GradScaler may take in the first steps: some begin at 2 ** 32."""
NONFINITE_LAYERS = Who(
    expr=gained("gradiometer_nonfinite_origin_total", "layer"), label="layer", noun="first seen in layer"
)
"""Where most steps began: NaN spreads through the backward pass, so that most layers, or all, have as many steps."""
ORIGIN = replace(NONFINITE_LAYERS, expr=f"1 / {NONFINITE_LAYERS.expr}")
"""Where fewest began: once NaN is in the weights so is it in the loss, and every step begins at the last layer."""
HIGHEST_LAYER = Who(
    expr="max by (<by>) (max_over_time(gradiometer_layer_anomaly_score<of>[3m])) > 3", label="layer", noun="layer"
)


def of_gradients(settings: Settings) -> tuple[Alert, ...]:
    """List these alerts."""
    return (
        _nonfinite_update(settings),
        _nonfinite(settings),
        _spike(settings),
        _exploding(settings),
        _vanishing(settings),
        _clip_saturated(settings),
        _skipping(settings),
        _loss(settings),
    )


def _nonfinite_update(settings: Settings) -> Alert:
    return Alert(
        name="NonFiniteUpdate",
        severity="critical",
        meaning="The optimizer moved the parameters by NaN or Inf: the weights are likely lost.",
        value=NONFINITE_UPDATES,
        limit=0,
        by=settings.of_run,
        keep_firing="10m",  # with the 10 counted, longer than LayerExploding, which it holds back: 5 and 12 after a run
        summary="Run {{ $labels.run_id }}: the optimizer moved the parameters by non-finite gradients<who>",
        description="<count> step(s) of the last 10 minutes took gradients with NaN or Inf into the weights. Every "
        "step since computes with them: stop the run, go back to a checkpoint, and let a policy skip such steps.",
        who=ORIGIN,
        dashboard="run",
        panel=10,
    )


def _nonfinite(settings: Settings) -> Alert:
    by, limits = settings.of_run, settings.thresholds
    scaled = f"{newest('gradiometer_loss_scale', by, '10m')} > 0"
    bad, taken = (
        highest(f"gradiometer_{name}_total", by, over="10m", reduce="increase") for name in ("nonfinite_steps", "steps")
    )
    too_many = all_of(
        f"{NONFINITE_STEPS} > 2",
        f"{bad} / {taken} > {limits.scaled_nonfinite_ratio:g}",
        f"{STEPS} >= {limits.warm_up_steps}",
    )
    value = f"({NONFINITE_STEPS} unless {scaled})\nor ({NONFINITE_STEPS} and {indented(too_many)})\n"
    return Alert(
        name="NonFinite",
        severity="warning",
        meaning="A gradient held NaN or Inf; with a GradScaler, too often for it to be looking for its scale.",
        value=f"{value}or 0 * {NONFINITE_STEPS}",
        limit=0,
        by=by,
        summary="Run {{ $labels.run_id }}: non-finite gradients<who>",
        description="<count> step(s) of the last 10 minutes had gradients with NaN or Inf. If they were skipped, the "
        f"weights are as before. With a GradScaler, up to {limits.scaled_nonfinite_ratio:.0%} of the steps are its "
        "usual search for a scale and do not alert.",
        who=NONFINITE_LAYERS,
        dashboard="run",
        panel=10,
    )


def _spike(settings: Settings) -> Alert:
    by, limits = settings.of_run, settings.thresholds
    usual = newest("gradiometer_grad_norm_baseline", by, "3m")
    noise = newest("gradiometer_grad_norm_mad", by, "3m")
    guarded = all_of(RATIO, f"{STEPS} >= {limits.warm_up_steps}", f"{RUNNING} == 1")
    return Alert(
        name="Spike",
        severity="warning",
        meaning="The global gradient norm was many times the run's own median.",
        value=f"{guarded}\nunless ({peak_norm(by)} - {usual} <= {limits.spike_deviations:g} * {noise})",
        limit=limits.spike_ratio,
        by=by,
        summary="Run {{ $labels.run_id }}: the gradient norm was <value> times the usual one<who>",
        description="The largest global norm before clipping of the last minutes was <value> times the median of the "
        f"run's last 512 finite steps; the limit is {limits.spike_ratio:g}. The layer named is the one furthest above "
        "its own usual norm.",
        who=HIGHEST_LAYER,
        dashboard="run",
        panel=6,
    )


def _state(settings: Settings, state: str) -> tuple[str, Who]:
    value = all_of(highest(f"gradiometer_layers_{state}", settings.of_run), f"{RUNNING} == 1")
    of = f'<of state="{state}">'
    return value, Who(expr=f"max by (<by>) (gradiometer_layer_state{of})", label="layer", noun="layer")


def _exploding(settings: Settings) -> Alert:
    value, who = _state(settings, "exploding")
    return Alert(
        name="LayerExploding",
        severity="critical",
        meaning="Layers have norms above ten times their usual ones, step after step.",
        value=value,
        limit=0,
        by=settings.of_run,
        lasting="1m",
        keep_firing="12m",  # longer than a Spike goes on (1 + 3 + 5 minutes), which Alertmanager holds back meanwhile
        summary="Run {{ $labels.run_id }}: exploding gradients<who>",
        description="The norms of <count> layer(s) are above ten times their usual ones, or not finite, in each of the "
        "last 8 steps and for a minute.",
        who=who,
        dashboard="layers",
    )


def _vanishing(settings: Settings) -> Alert:
    value, who = _state(settings, "vanishing")
    return Alert(
        name="LayerVanishing",
        severity="warning",
        meaning="Layers have hardly any gradient: they learn nothing.",
        value=value,
        limit=0,
        by=settings.of_run,
        lasting="10m",
        summary="Run {{ $labels.run_id }}: vanishing gradients<who>",
        description="The norms of <count> layer(s) have been at most a thousandth of their usual ones, or next to "
        "zero, for 10 minutes.",
        who=who,
        dashboard="layers",
    )


def _clip_saturated(settings: Settings) -> Alert:
    by, limits = settings.of_run, settings.thresholds
    warmed = highest("gradiometer_steps_total", by, over="15m", reduce="min_over_time")
    known = f"max by ({', '.join(by)}) (last_over_time(gradiometer_steps_total[5m] offset 10m))"
    warm = f"{'min' + warmed.removeprefix('max')} >= {limits.warm_up_steps}"
    return Alert(
        name="ClipSaturated",
        severity="warning",
        meaning="Nearly every step is clipped: the threshold sets the step size, and not the gradient.",
        value=all_of(CLIPPED, warm, known, f"{RUNNING} == 1"),
        limit=limits.clip_ratio,
        by=by,
        summary="Run {{ $labels.run_id }}: {{ $value | humanizePercentage }} of the steps are clipped<who>",
        description="A policy changed the gradients of {{ $value | humanizePercentage }} of the steps of the last 15 "
        f"minutes; the limit is {limits.clip_ratio:.0%}. Raise its threshold, or lower the learning rate, which is "
        "what clipping does.",
        who=Who(
            expr=f"max by (<by>) (increase(gradiometer_clip_events_total<of {CLIPPING}>[15m])) > 0",
            label="policy",
            noun="policy",
        ),
        dashboard="run",
        panel=8,
    )


def _skipping(settings: Settings) -> Alert:
    by, limit = settings.of_run, settings.thresholds.skipped_in_a_row
    skipped = highest("gradiometer_skipped_steps_in_a_row", by, over="3m")
    young = f"{STEPS} < {settings.thresholds.warm_up_steps}"
    searching = f"{skipped} <= {limit + SCALE_SEARCH} and {young} and {newest('gradiometer_loss_scale', by, '10m')} > 0"
    return Alert(
        name="SkippingRun",
        severity="warning",
        meaning="Many consecutive steps did not move the parameters.",
        value=f"{all_of(skipped, f'{RUNNING} == 1')}\nunless ({searching})",
        limit=limit,
        by=by,
        summary="Run {{ $labels.run_id }}: <count> steps in a row did not move the parameters",
        description=f"<count> consecutive steps were skipped, more than {limit}: the run burns time and learns "
        "nothing. Look where gradients were not finite<who>, and at the loss scale.",
        who=NONFINITE_LAYERS,
        dashboard="run",
        panel=10,
    )


def _loss(settings: Settings) -> Alert:
    by = settings.of_run
    bad = f"count by ({', '.join(by)}) ((gradiometer_loss != gradiometer_loss) or (abs(gradiometer_loss) == Inf))"
    return Alert(
        name="LossNonFinite",
        severity="warning",
        meaning="The loss that the job logged is NaN or Inf.",
        value=all_of(bad, f"{RUNNING} == 1"),
        limit=0,
        by=by,
        summary="Run {{ $labels.run_id }}: the loss is not finite",
        description="The newest loss that the job logged is NaN or Inf. Unless this was one bad batch whose step was "
        "skipped, the run is lost. Its gradients tell more, if they are not finite either<who>.",
        who=ORIGIN,
        dashboard="run",
        panel=11,
    )
