"""What the monitor tells of itself, of its host, and of what it does for others."""

from __future__ import annotations

from gradiometer.metrics.metric import SCRAPE_SECONDS_BUCKETS, Metric

__all__ = ["OF_MONITOR"]

_GPU, _RECEIVER = ("gpu", "uuid"), ("receiver",)

OF_MONITOR = (
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
        help="1 if what the monitor remembers outlives it, 0 if it works from memory or cannot write.",
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
