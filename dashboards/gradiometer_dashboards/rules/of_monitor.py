"""Alerts about the monitor and its host."""

from __future__ import annotations

from gradiometer_dashboards.promql import metric
from gradiometer_dashboards.rules.expressions import highest, moved
from gradiometer_dashboards.rules.model import Alert, Settings, Who

__all__ = ["of_monitor"]

SHOULD_BE_ONE = (
    "gradiometer_service_healthy",
    "gradiometer_collector_success",
    "gradiometer_config_last_reload_successful",
    "gradiometer_store_persistent",
)
"""Metrics that are 0 when something of the monitor does not work."""


def of_monitor(settings: Settings) -> tuple[Alert, ...]:
    """List these alerts."""
    return _down(settings), _degraded(settings), _remote_write(settings), _gpu(settings)


def _down(settings: Settings) -> Alert:
    monitors = f'up{{job=~"{settings.job}"}}'
    of_job = ", ".join(("job", *settings.by))
    gone = f"(0 * max by ({of_job}) (max_over_time({monitors}[1h])) + 1 unless max by ({of_job}) ({monitors}))"
    return Alert(
        name="MonitorDown",
        severity="warning",
        meaning="A monitor is not scraped: no other alert can see its runs.",
        value=f"1 - max by ({', '.join(settings.of_monitor)}) ({monitors})\nor {gone}",
        limit=0,
        by=settings.of_monitor,
        lasting="5m",
        keep_firing="",
        summary="Monitor{{ with $labels.instance }} {{ . }}{{ end }} of job {{ $labels.job }} is down",
        description="Prometheus has had no scrape of it for 5 minutes, or every target of the job has gone. Training "
        "is not touched, and what happens meanwhile stays in the run directories.",
        dashboard="monitor",
    )


def _degraded(settings: Settings) -> Alert:
    names = "|".join(metric(name) for name in SHOULD_BE_ONE)
    failing = f'{{__name__=~"{names}"}} == 0'
    return Alert(
        name="MonitorDegraded",
        severity="warning",
        meaning="Something of the monitor does not work: a service, a collector, its config or its store.",
        value=f"count by ({', '.join(settings.of_monitor)}) ({failing})",
        limit=0,
        by=settings.of_monitor,
        lasting="10m",
        summary="Monitor {{ $labels.instance }}: <count> of its parts not working<who>",
        description="For 10 minutes a service failed, a collector gave nothing, the config could not be used, or the "
        "store cannot be written or works from memory, and forgets at the next start. The monitor's log says why.",
        who=Who(expr="max by (<by>) (1 - gradiometer_service_healthy<of>) > 0", label="service", noun="service"),
        dashboard="monitor",
    )


def _remote_write(settings: Settings) -> Alert:
    limit = settings.thresholds.remote_write_seconds
    by = (*settings.of_monitor, "receiver")
    return Alert(
        name="RemoteWriteBehind",
        severity="warning",
        meaning="Steps wait too long for a remote-write receiver.",
        value=highest("gradiometer_remote_write_pending_seconds", by),
        limit=limit,
        by=by,
        lasting="5m",
        summary="Monitor {{ $labels.instance }}: steps wait {{ $value | humanizeDuration }} for receiver "
        "{{ $labels.receiver }}",
        description="The oldest step that is not sent has been waiting for {{ $value | humanizeDuration }}; the limit "
        f"is {limit:g} s. When the ring comes round, it is lost to the receiver.",
        dashboard="monitor",
    )


def _gpu(settings: Settings) -> Alert:
    by = (*settings.of_monitor, "gpu")
    errors = moved("gradiometer_gpu_ecc_errors_total", by, of='type="uncorrected"', born=False)
    counted = errors.rsplit("\nor ", 1)[0]
    return Alert(
        name="GpuErrors",
        severity="critical",
        meaning="A GPU had uncorrected memory errors, or no longer answers.",
        value=f"{counted}\nor 1 - {highest('gradiometer_gpu_up', by)}",
        limit=0,
        by=by,
        lasting="1m",
        summary="GPU {{ $labels.gpu }} at {{ $labels.instance }}: uncorrected memory errors, or lost<who>",
        description="In the last 10 minutes the GPU counted uncorrected ECC errors, or it no longer answers. Results "
        "computed on it are not to be trusted: drain the host and reset the GPU.",
        who=Who(expr="max by (<by>) (gradiometer_gpu_run_info<of>)", label="run_id", noun="run"),
        dashboard="monitor",
    )
