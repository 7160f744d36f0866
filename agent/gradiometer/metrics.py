"""The catalogue: every metric that gradiometer exports, declared once. Needs no torch.

The monitor, the in-process exporter, the dashboards, the alert rules and the documentation all name metrics from here;
a name that is not here fails a test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CATALOGUE",
    "GRAD_NORM_BUCKETS",
    "PUSHED",
    "SCRAPE_SECONDS_BUCKETS",
    "STEP_SECONDS_BUCKETS",
    "WINDOW_SECONDS",
    "Metric",
]

WINDOW_SECONDS = 60.0
"""Width of the rolling maxima: at least twice a scrape interval of up to 30 s, so that no spike falls between two."""

GRAD_NORM_BUCKETS: tuple[float, ...] = tuple(2.0**exponent for exponent in range(-10, 11))
STEP_SECONDS_BUCKETS: tuple[float, ...] = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)  # fmt: skip
SCRAPE_SECONDS_BUCKETS: tuple[float, ...] = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


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
_GPU = ("gpu", "uuid")
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
        name="gradiometer_grad_norm_mad",
        kind="gauge",
        labels=_RUN,
        help="Median absolute deviation of the norms behind the baseline; left out before 128 of them.",
    ),
    Metric(
        name="gradiometer_clip_ratio",
        kind="gauge",
        labels=_RUN,
        help=f"Share of the steps of the last {WINDOW_SECONDS:g} s whose gradients were clipped; left out before 32.",
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
        name="gradiometer_layer_grad_norm_quantile",
        kind="gauge",
        labels=("run_id", "q"),
        help=f"Quantile q, across all layers of the run, of their largest L2 norm in the last {WINDOW_SECONDS:g} s of "
        "steps; whatever the series budget leaves out is in it.",
    ),
    Metric(
        name="gradiometer_layer_nonfinite_total",
        kind="counter",
        labels=_LAYER,
        help="Steps in which a gradient of the layer held NaN or Inf.",
    ),
    Metric(
        name="gradiometer_layer_anomaly_score",
        kind="gauge",
        labels=_LAYER,
        help=f"Robust z-score of the layer's largest norm of the last {WINDOW_SECONDS:g} s: by how many deviations "
        "(1.4826 MAD, at least 0.1) its logarithm is above the median of the layer's last 512 steps.",
    ),
    Metric(
        name="gradiometer_layers_vanishing",
        kind="gauge",
        labels=_RUN,
        help="Layers whose norm was at most 1/1000 of their usual one, or below 1e-8 an element, in the last 64 steps.",
    ),
    Metric(
        name="gradiometer_layers_exploding",
        kind="gauge",
        labels=_RUN,
        help="Layers whose norm was above 10 times their usual one, or not finite, in each of the last 8 steps.",
    ),
    Metric(
        name="gradiometer_layer_state",
        kind="gauge",
        labels=("run_id", "layer", "state"),
        help="Always 1: the layer is vanishing or exploding; of at most 20 layers for each of the two.",
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
        name="gradiometer_uncounted_steps",
        kind="gauge",
        labels=_RUN,
        help="Steps that the run's histograms and non-finite counts of layers do not hold: they had left the ring "
        "before it was first read.",
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
        help="Per-layer series that a series budget left out, summed over scrapes: it grows with the scrapers too.",
    ),
    Metric(
        name="gradiometer_series_omitted",
        kind="gauge",
        labels=_RUN,
        help="Per-layer series that a series budget left out of this scrape.",
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
        name="gradiometer_run_directories_bytes",
        kind="gauge",
        help="Disk space that the run directories take, when they were last measured.",
    ),
    Metric(
        name="gradiometer_pruned_runs_total",
        kind="counter",
        help="Run directories, and those of earlier starts, that the monitor removed because a bound asked for it.",
    ),
    Metric(
        name="gradiometer_pruned_bytes_total",
        kind="counter",
        help="Disk space that these removals freed.",
    ),
    Metric(
        name="gradiometer_annotations_total",
        kind="counter",
        labels=("result",),
        help="Events that were due to become annotations in Grafana: created, extended to a region, present already, "
        "the echo of another rank, skipped for being too old or too many, or rejected by Grafana.",
    ),
    Metric(
        name="gradiometer_annotations_waiting",
        kind="gauge",
        help="Events that wait to become annotations in Grafana.",
    ),
    Metric(
        name="gradiometer_grafana_up",
        kind="gauge",
        help="1 if Grafana answered the last time it was asked.",
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
        name="gradiometer_alerts_received_total",
        kind="counter",
        labels=("status",),
        help="Alerts that Alertmanager sent to the monitor's webhook, firing or resolved, and that were accepted.",
    ),
    Metric(
        name="gradiometer_alerts_unmatched_total",
        kind="counter",
        help="Alerts received that no rule matches, or that name no run.",
    ),
    Metric(
        name="gradiometer_alerts_truncated_total",
        kind="counter",
        help="Alerts that max_alerts of Alertmanager's receiver cut off, of which the monitor knows nothing else.",
    ),
    Metric(
        name="gradiometer_alerts_queued",
        kind="gauge",
        help="Alerts times rules that were accepted and have not been looked at.",
    ),
    Metric(
        name="gradiometer_alert_actions_open",
        kind="gauge",
        help="Requests made of jobs by rules of alerts that have not been answered.",
    ),
    Metric(
        name="gradiometer_alert_actions_total",
        kind="counter",
        labels=("rule", "outcome"),
        help="Alerts that a rule matched, by what became of them; what was asked counts again when it is answered.",
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
    Metric(
        name="gradiometer_config_last_reload_successful",
        kind="gauge",
        help="1 if the monitor's config could be used when it was last read.",
    ),
    Metric(
        name="gradiometer_config_last_reload_success_timestamp_seconds",
        kind="gauge",
        help="When the monitor last read a config that could be used, Unix time.",
    ),
    Metric(
        name="gradiometer_log_messages_dropped_total",
        kind="counter",
        help="Messages that the monitor did not log because it had said them often enough within a minute.",
    ),
    Metric(
        name="gradiometer_scrape_seconds",
        kind="histogram",
        buckets=SCRAPE_SECONDS_BUCKETS,
        help="Time that the monitor took to make a scrape, waiting for its collectors included, compression not.",
    ),
    Metric(
        name="gradiometer_scrape_size_bytes",
        kind="gauge",
        help="Size of the scrape before this one, not compressed.",
    ),
    Metric(
        name="gradiometer_http_requests_total",
        kind="counter",
        labels=("path", "code"),
        help="Requests that the monitor answered, by route and status code.",
    ),
    Metric(
        name="gradiometer_store_persistent",
        kind="gauge",
        help="1 if what the monitor remembers outlives it, 0 if it works from memory.",
    ),
    Metric(
        name="gradiometer_service_healthy",
        kind="gauge",
        labels=("service",),
        help="1 if the newest round of the service did not fail.",
    ),
    Metric(
        name="gradiometer_service_failures_total",
        kind="counter",
        labels=("service",),
        help="Rounds of the service that failed, and were tried again.",
    ),
    Metric(
        name="gradiometer_gpu_up",
        kind="gauge",
        labels=_GPU,
        help="1 if the GPU answered when it was last looked at, 0 if it was lost since it was first seen.",
    ),
    Metric(
        name="gradiometer_gpu_info",
        kind="gauge",
        labels=("gpu", "uuid", "name", "driver_version"),
        help="Always 1: what the GPU is.",
    ),
    Metric(
        name="gradiometer_gpu_run_info",
        kind="gauge",
        labels=("gpu", "uuid", "run_id", "rank"),
        help="Always 1: the process of this rank computes on the GPU.",
    ),
    Metric(
        name="gradiometer_gpu_memory_used_bytes",
        kind="gauge",
        labels=_GPU,
        help="Memory of the GPU in use; of each MIG instance where there are some.",
    ),
    Metric(
        name="gradiometer_gpu_memory_total_bytes",
        kind="gauge",
        labels=_GPU,
        help="Memory of the GPU; of each MIG instance where there are some.",
    ),
    Metric(
        name="gradiometer_gpu_utilization_ratio",
        kind="gauge",
        labels=_GPU,
        help="Share of the last sampling period, up to a second, in which a kernel ran on the GPU.",
    ),
    Metric(
        name="gradiometer_gpu_memory_utilization_ratio",
        kind="gauge",
        labels=_GPU,
        help="Share of the last sampling period in which memory of the GPU was read or written.",
    ),
    Metric(
        name="gradiometer_gpu_power_watts",
        kind="gauge",
        labels=_GPU,
        help="Power that the GPU draws.",
    ),
    Metric(
        name="gradiometer_gpu_power_limit_watts",
        kind="gauge",
        labels=_GPU,
        help="Power limit in force on the GPU.",
    ),
    Metric(
        name="gradiometer_gpu_energy_joules_total",
        kind="counter",
        labels=_GPU,
        help="Energy that the GPU used since its driver was loaded.",
    ),
    Metric(
        name="gradiometer_gpu_temperature_celsius",
        kind="gauge",
        labels=_GPU,
        help="Temperature of the GPU's core.",
    ),
    Metric(
        name="gradiometer_gpu_sm_clock_hertz",
        kind="gauge",
        labels=_GPU,
        help="Clock of the GPU's streaming multiprocessors.",
    ),
    Metric(
        name="gradiometer_gpu_ecc_errors_total",
        kind="counter",
        labels=("gpu", "uuid", "type"),
        help="ECC errors in all memories of the GPU since its driver was loaded, corrected or uncorrected.",
    ),
    Metric(
        name="gradiometer_gpu_throttled",
        kind="gauge",
        labels=("gpu", "uuid", "reason"),
        help="1 if this holds its clocks down: power_cap, thermal, hardware_thermal, hardware_power_brake, hardware.",
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
