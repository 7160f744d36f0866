"""What is exported of runs, by the monitor and by the exporter inside a process."""

from __future__ import annotations

from gradiometer.metrics.metric import GRAD_NORM_BUCKETS, STEP_SECONDS_BUCKETS, WINDOW_SECONDS, Metric

__all__ = ["OF_RUNS"]

_RUN, _RANK, _LAYER, _POLICY = ("run_id",), ("run_id", "rank"), ("run_id", "layer"), ("run_id", "policy", "mode")

OF_RUNS = (
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
        name="gradiometer_grad_norm_finite_window_max",
        kind="gauge",
        labels=_RUN,
        help=f"Largest finite global L2 norm before clipping in the last {WINDOW_SECONDS:g} s of steps; left out while "
        "none was finite.",
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
        help=f"Share of the steps of the last {WINDOW_SECONDS:g} s, and at least the last 32, whose gradients were "
        "clipped; left out before 32 steps.",
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
        name="gradiometer_nonfinite_origin_total",
        kind="counter",
        labels=_LAYER,
        help="Steps whose first non-finite gradient, in the order of the backward pass, was one of the layer; only "
        "layers that ever were, at most 20, those where a step began last.",
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
    Metric(
        name="gradiometer_rank_norm_deviation",
        kind="gauge",
        labels=_RANK,
        help="Largest relative difference of the rank's global norm before clipping from the median of the ranks that "
        f"the monitor sees at the same step, in the last {WINDOW_SECONDS:g} s of steps; +Inf where it was not finite "
        "and another rank's was, left out for a single rank.",
    ),
    Metric(
        name="gradiometer_rank_steps_behind",
        kind="gauge",
        labels=_RANK,
        help="Steps that the rank's newest is behind that of the furthest of the ranks that the monitor sees; left out "
        "for a single rank.",
    ),
    Metric(
        name="gradiometer_rank_lag_seconds",
        kind="gauge",
        labels=_RANK,
        help="How much later than the first of the ranks that the monitor sees the rank ended the same step, mean over "
        f"the last {WINDOW_SECONDS:g} s of steps; left out for a single rank.",
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
        name="gradiometer_nonfinite_updates_total",
        kind="counter",
        labels=_RUN,
        help="Steps in which the optimizer moved the parameters by gradients that held NaN or Inf: neither skipped nor "
        "replaced by zeros.",
    ),
    Metric(
        name="gradiometer_skipped_steps_in_a_row",
        kind="gauge",
        labels=_RUN,
        help="Most consecutive steps of one optimizer that did not move the parameters, of those series of steps that "
        f"ended in the last {WINDOW_SECONDS:g} s of steps or go on; 0 without any.",
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
)
