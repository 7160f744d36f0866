"""The *Run* dashboard: one training run, from "is it alive" down to the instrument itself.

Ids of panels that moved to other dashboards, 14, 19, 20, 23, 24 and 107, are not given again.
"""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import stat
from grafana_foundation_sdk.models import common, dashboard

from gradiometer_dashboards import colours, panels
from gradiometer_dashboards.boards.layers import largest, layer_link
from gradiometer_dashboards.frame import Section, frame
from gradiometer_dashboards.panels import Card, Step
from gradiometer_dashboards.promql import RUN
from gradiometer_dashboards.queries import layers as layer_queries
from gradiometer_dashboards.queries import run as queries
from gradiometer_dashboards.thresholds import THRESHOLDS

__all__ = ["run"]

_MINUTE = 60.0
_NO_GPU = "no GPU of this run is known"
_OVER = [
    dashboard.DynamicConfigValue("color", {"mode": dashboard.FieldColorModeId.FIXED, "fixedColor": colours.FINISHED})
]
"""What was bad of a run is not any more, once it is over."""
_CLIPPED: tuple[Step, ...] = ((None, colours.GOOD), (THRESHOLDS.clip_ratio, colours.WARNING))


def run() -> builders.Dashboard:
    """Compose the dashboard; ``build()`` of the result is Grafana's model of it."""
    sections = [_now(), _gradient(), _clipping(), _training(), _layers(), _policy(), _insight(), _gpus(), _instrument()]
    return frame(
        "run",
        "Gradiometer / Run",
        "Gradient norms, clipping and incidents of one training run. Green is good; what is orange or red says in its "
        "description, at the i, what that means.",
        sections,
        choices=("run_id",),
    )


def _now() -> Section:
    return panels.row(100, "Now"), [*_alive(), *_healthy(), _alerts()]


def _alive() -> list[stat.Panel]:
    state = Card(
        1,
        "State",
        "none",
        "What the run's processes last said or showed of themselves: running, finished, or lost, which is gone without "
        "a word: killed or crashed.",
        width=3,
        height=4,
    )
    steps = Card(2, "Steps", "locale", "Optimizer steps recorded since the run began.", width=3, height=4)
    age = Card(
        3,
        "Data age",
        "s",
        "Time since the newest step of the slowest rank. It grows when the run hangs: red is "
        f"{THRESHOLDS.stalled_seconds:g} s. Blue once the run has finished, when it only says how long ago that was.",
        width=3,
        height=4,
    )
    judged = ((None, colours.GOOD), (_MINUTE, colours.WARNING), (THRESHOLDS.stalled_seconds, colours.BAD))
    return [
        panels.states(state, queries.STATE, colours.STATES),
        panels.value(steps, queries.STEPS),
        panels.value(age, queries.DATA_AGE, steps=judged).override_by_name("finished", _OVER),
    ]


def _healthy() -> list[stat.Panel]:
    normal = Card(
        4,
        "Norm / baseline",
        "none",
        "Largest global norm of the last minute as a multiple of the run's own median. Near 1 to 3 is usual; red, "
        f"{THRESHOLDS.spike_ratio:g}, is a spike. In the first {THRESHOLDS.warm_up_steps} steps norms fall fast, "
        "and it means little. With a GradScaler it is the largest finite one, as overflows are its way of working; "
        "otherwise one Inf makes it Inf. Blue once the run has finished.",
        width=3,
        height=4,
    )
    incidents = Card(
        5,
        "Incidents in view",
        "locale",
        "Steps in the time shown with a non-finite gradient, steps that did not move the parameters, and, worst of "
        "all, steps that moved them by NaN or Inf: then the weights are lost, and only a checkpoint helps.",
        width=5,
        height=4,
    )
    clipped = Card(
        27,
        "Clip ratio now",
        "percentunit",
        "Share of the last minute's steps that were clipped. Near 100 % the threshold is what sets the size of the "
        "update, not the gradient. Empty in the first 32 steps.",
        width=3,
        height=4,
    )
    spike = THRESHOLDS.spike_ratio
    judged = ((None, colours.GOOD), (spike / 2, colours.WARNING), (spike, colours.BAD))
    counts = (queries.NONFINITE_IN_VIEW, queries.SKIPPED_IN_VIEW, queries.HARM_IN_VIEW)
    steps = [{"value": start, "color": colour} for start, colour in colours.ANY_IS_BAD]
    red = [dashboard.DynamicConfigValue("thresholds", {"mode": "absolute", "steps": steps})]
    return [
        panels.value(normal, queries.NORM_OVER_BASELINE, steps=judged)
        .no_value("none finite")
        .override_by_name("finished", _OVER),
        panels.value(incidents, *counts, steps=colours.ANY_IS_ODD).decimals(0).override_by_query("C", red),
        panels.value(clipped, queries.CLIPPED_NOW, steps=_CLIPPED).no_value("not yet"),
    ]


def _alerts() -> stat.Panel:
    card = Card(
        28,
        "Firing alerts",
        "none",
        "Alerts of this run, as Prometheus evaluates them: red is critical. Their times are marked in the graphs. "
        "Without the alert rules in Prometheus it always says none.",
        width=4,
        height=4,
    )
    steps: tuple[Step, ...] = ((None, colours.GOOD), (0.5, colours.WARNING), (1.5, colours.BAD))
    return panels.value(card, queries.ALERTS, steps=steps).text_mode(common.BigValueTextMode.NAME)


def _gradient() -> Section:
    norm = Card(
        6,
        "Global gradient norm",
        "none",
        "L2 norm of all gradients before clipping: of the newest step, and the largest finite one of the last minute "
        "so that a spike of one step stays visible. Baseline is the median of the recent finite steps, and above the "
        "dashed line is a spike. A threshold is in the units of what its policy bounds, which need not be this norm. "
        "NaN and Inf are not drawn: they are in the incidents.",
        width=24,
        height=8,
    )
    loss = Card(
        11,
        "Loss",
        "none",
        "Loss as the job logged it; empty if it logs none. A loss that jumps after a spike of the norm was hurt by it.",
        width=12,
        height=7,
    )
    histogram = Card(
        7,
        "Distribution of the global gradient norm",
        "none",
        "How many steps had which norm before clipping: every step counts, however far apart scrapes are. One narrow "
        "band is good. Non-finite norms are in the topmost bucket.",
        width=12,
        height=7,
    )
    norms = (queries.NORM_LAST, queries.NORM_PEAK, queries.NORM_BASELINE, queries.SPIKE, queries.CLIP_THRESHOLD)
    dashed = dashboard.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [10, 10]})
    return panels.row(101, "Gradient"), [
        panels.log_graph(norm, *norms).override_by_name(queries.SPIKE.legend, [dashed]),
        panels.graph(loss, queries.LOSS).no_value("the job logs no loss"),
        panels.histogram_map(histogram, queries.NORM_HISTOGRAM),
    ]


def _clipping() -> Section:
    ratio = Card(
        8,
        "Clip ratio",
        "percentunit",
        "Share of the steps in which a policy changed the gradients. Near one, the threshold is what sets "
        "the size of the update, not the gradient; above the line for 15 minutes is an alert. No line while the run "
        "stands still.",
    )
    coefficient = Card(
        9,
        "Smallest clip coefficient",
        "none",
        "Smallest factor that a policy applied to a gradient, of the steps that were scraped; one means untouched.",
    )
    incidents = Card(
        10,
        "Non-finite and skipped steps",
        "short",
        "Steps with NaN or Inf in some gradient, steps in which the optimizer did not move the parameters, and steps "
        "in which NaN or Inf did move them; each counted over the last few scrapes. A lone non-finite step that was "
        "skipped is harmless; one that was not is the end of the weights. What is worse is drawn before what is less.",
    )
    in_a_row = Card(
        29,
        "Skipped in a row",
        "short",
        "Most consecutive steps that did not move the parameters, in the last minute. A GradScaler skips one or two "
        f"when it lowers its scale; from {THRESHOLDS.skipped_in_a_row} on, at the line, the run does not train.",
        width=24,
        height=6,
    )
    return panels.row(102, "Clipping and incidents"), [
        panels.limited(panels.graph(ratio, queries.CLIP_RATIO), THRESHOLDS.clip_ratio).min(0).max(1),
        panels.log_graph(coefficient, queries.CLIP_COEFFICIENT),
        panels.bars(incidents, queries.SKIPPED_STEPS, queries.NONFINITE_STEPS, queries.HARMFUL_STEPS),
        panels.limited(panels.bars(in_a_row, queries.SKIPPED_IN_A_ROW), THRESHOLDS.skipped_in_a_row),
    ]


def _training() -> Section:
    rate = Card(12, "Learning rate", "sci", "Learning rate of the optimizer's first param group.")
    seconds = Card(
        13,
        "Step time",
        "s",
        "Quantiles of the wall time from one optimizer step to the next, estimated from histogram buckets. p99 far "
        "above p50 is a job that waits: for data, for a checkpoint, for a slow rank.",
    )
    scale = Card(
        30,
        "Loss scale",
        "none",
        "Scale of the GradScaler in mixed precision: it halves at each overflow and grows again. One that only falls "
        "is a run whose gradients overflow again and again. Empty without a GradScaler.",
    )
    return panels.row(103, "Training"), [
        panels.graph(rate, queries.LEARNING_RATE),
        panels.graph(seconds, *(queries.step_seconds(quantile) for quantile in (0.5, 0.9, 0.99))),
        panels.log_graph(scale, queries.LOSS_SCALE).no_value("no GradScaler"),
    ]


def _layers() -> Section:
    vanishing = Card(
        31,
        "Vanishing layers",
        "locale",
        "Layers whose gradient has been next to nothing for 64 steps. They learn nothing; Layers names them.",
        width=4,
        height=5,
    )
    exploding = Card(
        32,
        "Exploding layers",
        "locale",
        "Layers whose gradient was above 10 times their usual norm, or not finite, in each of the last 8 steps.",
        width=4,
        height=5,
    )
    top = Card(
        15,
        "Largest layers",
        "none",
        "The ten layers with the largest norm before clipping in the last minute. Score: how many robust deviations "
        "above its own usual norm, in single digits unless something happened. Share: of the squared norm; large is "
        "who decides what a global clip does. Click a name to go to Layers with that layer chosen.",
        width=16,
        height=10,
    )
    left_out = Card(
        33,
        "Left out of scrapes",
        "locale",
        "Series of layers that the monitor's series budget leaves out. Where this is not 0, the table beside lacks "
        "layers; counts are of all.",
        width=8,
        height=5,
    )
    link = layer_link("layers", "This layer over time")
    return panels.row(104, "Layers"), [
        largest(top, link, of=RUN),
        panels.value(vanishing, layer_queries.VANISHING, steps=colours.ANY_IS_ODD),
        panels.value(exploding, layer_queries.EXPLODING, steps=colours.ANY_IS_BAD),
        panels.value(left_out, layer_queries.LEFT_OUT, steps=colours.ANY_IS_ODD),
    ]


def _policy() -> Section:
    revision = Card(
        34,
        "Policy revision",
        "none",
        "How often the policy was changed: 0 is the one that the job began with. Changes are marked in all graphs.",
        height=7,
    )
    changes = Card(
        35,
        "Policy changes",
        "short",
        "Changes of the policy while the job ran, and requests for one that the agent refused, as of a policy that "
        "does not fit the job; each counted over the last few scrapes.",
        height=7,
    )
    actions = Card(
        36,
        "Policy actions",
        "short",
        "Times that a condition of the policy file was met and its action called for. Empty without conditions.",
        height=7,
    )
    thresholds = Card(
        25,
        "Thresholds in shadow",
        "none",
        "Thresholds of the policies that only watch beside those in force and the norm that they judge: what clipping "
        "by them would have been. In the units of what each policy bounds, which need not be this norm.",
        width=16,
        height=9,
    )
    ratio = Card(
        26,
        "Clip ratio in shadow",
        "percentunit",
        "Share of the steps in which a policy that only watches would have changed the gradients, beside the share in "
        "which one in force did.",
        height=9,
    )
    shown = (queries.NORM_LAST, queries.NORM_PEAK, queries.CLIP_THRESHOLD, queries.SHADOW_THRESHOLD)
    return panels.row(108, "Policy"), [
        panels.graph(revision, queries.POLICY_REVISION).min(0).decimals(0),
        panels.bars(changes, queries.POLICY_CHANGES, queries.POLICY_REJECTIONS),
        panels.bars(actions, queries.POLICY_ACTIONS).no_value("the policy has no conditions"),
        panels.log_graph(thresholds, *shown),
        panels.graph(ratio, queries.CLIP_RATIO, queries.SHADOW_RATIO).min(0).max(1),
    ]


def _insight() -> Section:
    noise = Card(
        21,
        "Gradient noise scale",
        "none",
        "Micro-batches a step beyond which a larger batch hardly helps. Empty where a step has one micro-batch only.",
        width=12,
        height=7,
    )
    cosine = Card(
        22,
        "Cosine to the step before",
        "none",
        "Likeness of successive gradients: near -1 the steps undo each other, as with too large a learning rate. "
        "Measured where the job asked for it.",
        width=12,
        height=7,
    )
    return panels.row(106, "Insight"), [
        panels.log_graph(noise, queries.NOISE_SCALE).no_value("one micro-batch a step, or not yet known"),
        panels.graph(cosine, queries.GRAD_COSINE).min(-1).max(1).no_value("not asked for: cosine=True"),
    ]


def _gpus() -> Section:
    utilization = Card(
        37,
        "GPU utilisation",
        "percentunit",
        "Share of the time in which some kernel ran on each GPU of this run. Low on all: it waits for data or the "
        "host; low on one: that rank waits for, or is waited for by, the others. Empty without GPUs, or where the "
        "monitor cannot see which process is whose.",
        height=7,
    )
    memory = Card(
        38, "GPU memory", "percentunit", "Share of the memory in use. Near 100 % the next larger batch fails.", height=7
    )
    temperature = Card(
        39, "GPU temperature", "celsius", "Temperature of each core. Above some 85 °C GPUs slow down.", height=7
    )
    power = Card(40, "GPU power", "watt", "Power that each GPU draws: far below its usual one, it waits.", width=12)
    throttled = Card(
        41,
        "GPU throttled",
        "short",
        "Shows 1 while this reason holds a GPU's clocks down: power_cap is usual under load; thermal and hardware are "
        "not, and make every rank as slow as this one.",
        width=12,
    )
    return panels.row(109, "GPUs of this run"), [
        panels.graph(utilization, queries.GPU_UTILIZATION).min(0).max(1).no_value(_NO_GPU),
        panels.graph(memory, queries.GPU_MEMORY).min(0).max(1).no_value(_NO_GPU),
        panels.graph(temperature, queries.GPU_TEMPERATURE).no_value(_NO_GPU),
        panels.graph(power, queries.GPU_POWER).min(0).no_value(_NO_GPU),
        panels.graph(throttled, queries.GPU_THROTTLED).min(0).max(1).no_value(_NO_GPU),
    ]


def _instrument() -> Section:
    overhead = Card(
        16,
        "Agent overhead",
        "percentunit",
        "Host time that the agent spent in its hooks, as a share of wall time. Some per cent is usual for a small "
        "model with short steps, far below one for a large one.",
    )
    dropped = Card(
        17,
        "Dropped",
        "short",
        "Rows lost on the way out of the process, incidents not written for want of room, and layer series "
        "left out of scrapes by the series budget. Where this is not zero, the panels above show less than happened.",
    )
    errors = Card(
        18,
        "Agent errors",
        "short",
        "Telemetry failures that the agent caught so that training went on, and callbacks of policy actions that "
        "failed. Nothing here is good; the job's log has the first of each.",
    )
    return panels.row(105, "Instrument"), [
        panels.graph(overhead, queries.AGENT_OVERHEAD).min(0),
        panels.bars(dropped, queries.ROWS_DROPPED, queries.EVENTS_DROPPED, queries.SERIES_DROPPED),
        panels.bars(errors, queries.AGENT_ERRORS, queries.CALLBACK_FAILURES),
    ]
