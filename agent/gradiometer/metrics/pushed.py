"""What is pushed of each step, with the step's own time."""

from __future__ import annotations

from gradiometer.metrics.metric import Metric

__all__ = ["OF_STEPS"]

_STEP, _STEP_LAYER = ("run_id", "rank"), ("run_id", "rank", "layer")
_STEP_POLICY = ("run_id", "rank", "policy", "mode")

OF_STEPS = (
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
        labels=("receiver",),
        help="Always 1: sent to tell whether the receiver takes anything at all.",
    ),
)
