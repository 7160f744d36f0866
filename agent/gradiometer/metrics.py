"""The catalogue: every metric that gradiometer exports, declared once. Needs no torch.

The monitor, the in-process exporter, the dashboards, the alert rules and the documentation all name metrics from here;
a name that is not here fails a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CATALOGUE", "GRAD_NORM_BUCKETS", "PUSHED", "STEP_SECONDS_BUCKETS", "WINDOW_SECONDS", "Metric"]

WINDOW_SECONDS = 60.0
"""Width of the rolling maxima: at least twice a scrape interval of up to 30 s, so that no spike falls between two."""

GRAD_NORM_BUCKETS: tuple[float, ...] = tuple(2.0**exponent for exponent in range(-10, 11))
STEP_SECONDS_BUCKETS: tuple[float, ...] = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric family: ``name`` as exposed (counters with ``_total``), its type, HELP text and label names."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def family(self) -> str:
        """Name of the family in OpenMetrics: counters lose ``_total``."""
        return self.name.removesuffix("_total") if self.kind == "counter" else self.name


_RUN, _RANK, _LAYER, _POLICY = ("run_id",), ("run_id", "rank"), ("run_id", "layer"), ("run_id", "policy", "mode")
_RECEIVER, _STEP, _STEP_LAYER = ("receiver",), ("run_id", "rank"), ("run_id", "rank", "layer")
_STEP_POLICY = ("run_id", "rank", "policy", "mode")

_METRICS = (
    Metric(
        name="gradiometer_grad_norm",
        kind="histogram",
        labels=_RUN,
        buckets=GRAD_NORM_BUCKETS,
        help="Global L2 norm of the gradients before clipping, one observation a step; non-finite norms fall in +Inf.",
    ),
    Metric(
        name="gradiometer_grad_norm_last",
        kind="gauge",
        labels=_RANK,
        help="Global L2 norm of the gradients before clipping, newest step.",
    ),
    Metric(
        name="gradiometer_grad_norm_window_max",
        kind="gauge",
        labels=_RUN,
        help=f"Largest global L2 norm before clipping in the last {WINDOW_SECONDS:g} s of steps.",
    ),
    Metric(
        name="gradiometer_grad_norm_baseline",
        kind="gauge",
        labels=_RUN,
        help="Median global L2 norm before clipping of the last 512 finite steps.",
    ),
    Metric(
        name="gradiometer_layer_grad_norm_last",
        kind="gauge",
        labels=_LAYER,
        help="L2 norm of the layer's gradients before clipping, newest step.",
    ),
    Metric(
        name="gradiometer_layer_grad_norm_window_max",
        kind="gauge",
        labels=_LAYER,
        help=f"Largest L2 norm of the layer's gradients before clipping in the last {WINDOW_SECONDS:g} s of steps.",
    ),
    Metric(
        name="gradiometer_layer_nonfinite_total",
        kind="counter",
        labels=_LAYER,
        help="Steps in which a gradient of the layer held NaN or Inf.",
    ),
    Metric(
        name="gradiometer_layer_weight_norm",
        kind="gauge",
        labels=_LAYER,
        help="L2 norm of the layer's weights before the newest step that was sampled.",
    ),
    Metric(
        name="gradiometer_layer_update_ratio",
        kind="gauge",
        labels=_LAYER,
        help="L2 norm of what the newest step that was sampled added to the layer's weights, over that of the weights.",
    ),
    Metric(
        name="gradiometer_layer_grad_cosine",
        kind="gauge",
        labels=_LAYER,
        help="Cosine between the layer's gradients in the newest step that was sampled and in the step before it.",
    ),
    Metric(
        name="gradiometer_grad_cosine",
        kind="gauge",
        labels=_RUN,
        help="Cosine between all gradients in the newest step that was sampled and in the step before it.",
    ),
    Metric(
        name="gradiometer_grad_noise_scale",
        kind="gauge",
        labels=_RUN,
        help="Gradient noise scale in micro-batches: variance of a micro-batch's gradient over the squared norm of the "
        "true one, from running averages over the steps with armed backward hooks.",
    ),
    Metric(
        name="gradiometer_rank_nonfinite_total",
        kind="counter",
        labels=_RANK,
        help="Steps in which gradients of the rank's own batch, before the reduction between ranks, held NaN or Inf.",
    ),
    Metric(
        name="gradiometer_rank_microbatch_norm_last",
        kind="gauge",
        labels=_RANK,
        help="Global L2 norm of the rank's own gradients, before clipping and the reduction between ranks, root mean "
        "square over the micro-batches of the newest step with armed backward hooks.",
    ),
    Metric(name="gradiometer_steps_total", kind="counter", labels=_RUN, help="Optimizer steps recorded."),
    Metric(
        name="gradiometer_nonfinite_steps_total",
        kind="counter",
        labels=_RUN,
        help="Steps in which some gradient held NaN or Inf.",
    ),
    Metric(
        name="gradiometer_skipped_steps_total",
        kind="counter",
        labels=_RUN,
        help="Steps in which the optimizer did not move the parameters.",
    ),
    Metric(
        name="gradiometer_clip_events_total",
        kind="counter",
        labels=_POLICY,
        help="Steps in which the policy changed the gradients; in shadow, in which it would have.",
    ),
    Metric(
        name="gradiometer_clip_threshold",
        kind="gauge",
        labels=_POLICY,
        help="Threshold of the policy in the newest step, in units of the norm or value that it bounds.",
    ),
    Metric(
        name="gradiometer_clip_coefficient",
        kind="gauge",
        labels=_POLICY,
        help="Smallest factor by which the policy scaled a gradient in the newest step, or, in shadow, would have; "
        "1 when it changed nothing.",
    ),
    Metric(
        name="gradiometer_policy_revision",
        kind="gauge",
        labels=_RUN,
        help="Revision of the policy in the newest step: 0 as attached, one more with each change.",
    ),
    Metric(
        name="gradiometer_policy_changes_total",
        kind="counter",
        labels=_RUN,
        help="Changes of the policy while the job ran.",
    ),
    Metric(
        name="gradiometer_policy_rejections_total",
        kind="counter",
        labels=_RUN,
        help="Requests to change the policy that the agent refused.",
    ),
    Metric(
        name="gradiometer_step_seconds",
        kind="histogram",
        labels=_RUN,
        buckets=STEP_SECONDS_BUCKETS,
        help="Wall time from one optimizer step to the next.",
    ),
    Metric(
        name="gradiometer_loss",
        kind="gauge",
        labels=_RUN,
        help="Loss as logged by the job, newest value; left out if none was.",
    ),
    Metric(
        name="gradiometer_learning_rate",
        kind="gauge",
        labels=_RUN,
        help="Learning rate of the optimizer's first param group, newest step.",
    ),
    Metric(name="gradiometer_loss_scale", kind="gauge", labels=_RUN, help="Loss scale of the GradScaler, newest step."),
    Metric(
        name="gradiometer_last_step_timestamp_seconds",
        kind="gauge",
        labels=_RANK,
        help="Unix time of the newest optimizer step.",
    ),
    Metric(
        name="gradiometer_run_state",
        kind="gauge",
        labels=("run_id", "state"),
        help="1 for the state the run is in: running, finished or lost.",
    ),
    Metric(
        name="gradiometer_run_info",
        kind="gauge",
        labels=("run_id", "job_name", "device", "torch_version", "agent_version", "world_size", "policy"),
        help="Always 1: what the run is.",
    ),
    Metric(
        name="gradiometer_run_label_info",
        kind="gauge",
        labels=("run_id", "name", "value"),
        help="Always 1: a label that the job gave the run.",
    ),
    Metric(
        name="gradiometer_build_info",
        kind="gauge",
        labels=("version", "python_version"),
        help="Always 1: what serves these metrics.",
    ),
    Metric(
        name="gradiometer_rows_dropped_total",
        kind="counter",
        labels=_RUN,
        help="Steps that the agent or the reader lost: transfer slots all busy, or the ring overtook the reader.",
    ),
    Metric(
        name="gradiometer_events_dropped_total",
        kind="counter",
        labels=_RUN,
        help="Incidents not written because events.jsonl had reached its bound.",
    ),
    Metric(
        name="gradiometer_series_dropped_total",
        kind="counter",
        labels=_RUN,
        help="Per-layer series left out of scrapes because the run exceeded its series budget.",
    ),
    Metric(
        name="gradiometer_agent_errors_total",
        kind="counter",
        labels=_RUN,
        help="Telemetry failures that the agent caught so that training went on.",
    ),
    Metric(
        name="gradiometer_policy_actions_total",
        kind="counter",
        labels=("run_id", "condition", "action"),
        help="Times that a condition of the policy file was met and its action (event, callback or raise) called for.",
    ),
    Metric(
        name="gradiometer_callback_failures_total",
        kind="counter",
        labels=_RUN,
        help="Callbacks of policy actions that raised, outstayed their time or could not be started, over all ranks.",
    ),
    Metric(
        name="gradiometer_agent_seconds_total",
        kind="counter",
        labels=_RUN,
        help="Host time that the agent itself spent in its hooks.",
    ),
    Metric(
        name="gradiometer_remote_write_up",
        kind="gauge",
        labels=_RECEIVER,
        help="1 while the remote-write receiver takes samples.",
    ),
    Metric(
        name="gradiometer_remote_write_rows_sent_total",
        kind="counter",
        labels=_RECEIVER,
        help="Steps whose samples were sent to the receiver.",
    ),
    Metric(
        name="gradiometer_remote_write_rows_dropped_total",
        kind="counter",
        labels=(*_RECEIVER, "reason"),
        help="Steps that were not sent: overtaken in the ring, unreadable, too_old, ahead of the clock "
        "(future), or without a free timestamp (out_of_order, same_millisecond).",
    ),
    Metric(
        name="gradiometer_remote_write_samples_sent_total",
        kind="counter",
        labels=_RECEIVER,
        help="Samples that the receiver took.",
    ),
    Metric(
        name="gradiometer_remote_write_samples_failed_total",
        kind="counter",
        labels=(*_RECEIVER, "reason"),
        help="Samples of steps that were sent without them: rejected by the receiver, of a series that is not valid "
        "or beyond the budget (invalid), or left out because the receiver rejects its series (quarantined).",
    ),
    Metric(
        name="gradiometer_remote_write_requests_total",
        kind="counter",
        labels=(*_RECEIVER, "result"),
        help="Requests that were accepted, refused, or are to be made again later.",
    ),
    Metric(
        name="gradiometer_remote_write_request_seconds_total",
        kind="counter",
        labels=_RECEIVER,
        help="Time spent waiting for the receiver.",
    ),
    Metric(
        name="gradiometer_remote_write_bytes_total",
        kind="counter",
        labels=_RECEIVER,
        help="Bytes of requests, compressed.",
    ),
    Metric(
        name="gradiometer_remote_write_pending_rows",
        kind="gauge",
        labels=_RECEIVER,
        help="Steps that are recorded and not yet sent.",
    ),
    Metric(
        name="gradiometer_remote_write_pending_seconds",
        kind="gauge",
        labels=_RECEIVER,
        help="How long the oldest of the steps that are not yet sent has been waiting.",
    ),
    Metric(
        name="gradiometer_collector_success",
        kind="gauge",
        labels=("collector",),
        help="1 if the collector's last collection succeeded.",
    ),
    Metric(
        name="gradiometer_collector_seconds",
        kind="gauge",
        labels=("collector",),
        help="Duration of the collector's last collection.",
    ),
)

CATALOGUE: dict[str, Metric] = {metric.name: metric for metric in _METRICS}

_PUSHED = (
    Metric(
        name="gradiometer_step_number",
        kind="gauge",
        labels=_STEP,
        help="Number of the optimizer step, at the time of the step.",
    ),
    Metric(
        name="gradiometer_step_grad_norm",
        kind="gauge",
        labels=_STEP,
        help="Global L2 norm of the gradients before clipping.",
    ),
    Metric(
        name="gradiometer_step_grad_norm_postclip",
        kind="gauge",
        labels=_STEP,
        help="Global L2 norm of the gradients after clipping.",
    ),
    Metric(
        name="gradiometer_step_clip_coefficient",
        kind="gauge",
        labels=_STEP,
        help="Factor by which the pipeline scaled the gradients, over all policies.",
    ),
    Metric(
        name="gradiometer_step_learning_rate",
        kind="gauge",
        labels=_STEP,
        help="Learning rate of the optimizer's first param group.",
    ),
    Metric(name="gradiometer_step_loss_scale", kind="gauge", labels=_STEP, help="Loss scale of the GradScaler."),
    Metric(
        name="gradiometer_step_duration_seconds", kind="gauge", labels=_STEP, help="Wall time from the step before."
    ),
    Metric(
        name="gradiometer_step_agent_seconds",
        kind="gauge",
        labels=_STEP,
        help="Host time that the agent itself spent on the step.",
    ),
    Metric(name="gradiometer_step_loss", kind="gauge", labels=_STEP, help="Loss as logged by the job for this step."),
    Metric(
        name="gradiometer_step_nonfinite",
        kind="gauge",
        labels=_STEP,
        help="1 if some gradient held NaN or Inf, else 0.",
    ),
    Metric(
        name="gradiometer_step_skipped",
        kind="gauge",
        labels=_STEP,
        help="1 if the optimizer did not move the parameters, else 0.",
    ),
    Metric(
        name="gradiometer_step_clipped",
        kind="gauge",
        labels=_STEP,
        help="1 if a policy or the loop itself clipped the gradients, else 0.",
    ),
    Metric(
        name="gradiometer_step_clip_threshold",
        kind="gauge",
        labels=_STEP_POLICY,
        help="Threshold of the policy, in units of the norm or value that it bounds.",
    ),
    Metric(
        name="gradiometer_step_policy_coefficient",
        kind="gauge",
        labels=_STEP_POLICY,
        help="Smallest factor by which the policy scaled a gradient, or, in shadow, would have.",
    ),
    Metric(
        name="gradiometer_step_layer_grad_norm",
        kind="gauge",
        labels=_STEP_LAYER,
        help="L2 norm of the layer's gradients before clipping.",
    ),
    Metric(
        name="gradiometer_step_layer_grad_norm_postclip",
        kind="gauge",
        labels=_STEP_LAYER,
        help="L2 norm of the layer's gradients after clipping.",
    ),
    Metric(
        name="gradiometer_step_layer_microbatch_norm",
        kind="gauge",
        labels=_STEP_LAYER,
        help="L2 norm of the layer's own gradients, root mean square over micro-batches.",
    ),
    Metric(
        name="gradiometer_remote_write_probe",
        kind="gauge",
        labels=_RECEIVER,
        help="Always 1: sent to tell whether the receiver takes anything at all.",
    ),
)

PUSHED: dict[str, Metric] = {metric.name: metric for metric in _PUSHED}
"""What remote write sends, with each step's own timestamp. No name is in both, or a push would fight a scrape."""
