"""The GPUs of the *Fleet* dashboard, where NVML is: who idles, who is hot, who is held back."""

from __future__ import annotations

from gradiometer_dashboards import panels
from gradiometer_dashboards.frame import Section
from gradiometer_dashboards.panels import Card, Panel
from gradiometer_dashboards.promql import FLEET, Query, chosen_in_view, increase, over_view, series

__all__ = ["gpus"]

LEGEND = "{{instance}} GPU {{gpu}}"
ABSENT = " Empty on hosts without NVML, where the monitor exports nothing of GPUs."


def _by_gpu(name: str) -> str:
    return f"max by (instance, gpu) ({series(f'gradiometer_gpu_{name}', of=FLEET)})"


def _over_view(name: str, function: str = "avg_over_time") -> str:
    return f"max by (instance, gpu) ({over_view(function, f'gradiometer_gpu_{name}', of=FLEET)})"


def _chosen(expr: str, rank: str, first: str = "topk(20, {})") -> Query:
    return Query(expr=chosen_in_view(expr, rank, by="instance, gpu", first=first), legend=LEGEND)


_COMPUTES = f"group by (instance, gpu) ({over_view('max_over_time', 'gradiometer_gpu_run_info', of=FLEET)})"
UTILISATION = _chosen(
    _by_gpu("utilization_ratio"),
    f"{_over_view('utilization_ratio')} and on (instance, gpu) {_COMPUTES}",
    first="bottomk(20, {})",
)
MEMORY = _chosen(
    f"{_by_gpu('memory_used_bytes')} / {_by_gpu('memory_total_bytes')}",
    f"{_over_view('memory_used_bytes')} / {_over_view('memory_total_bytes')}",
)
POWER = _chosen(_by_gpu("power_watts"), _over_view("power_watts"))
TEMPERATURE = _chosen(_by_gpu("temperature_celsius"), _over_view("temperature_celsius", "max_over_time"))
THROTTLED = Query(
    expr=f"sum by (reason) (max by (uuid, reason) ({series('gradiometer_gpu_throttled', of=FLEET)}))",
    legend="{{reason}}",
)
_ECC = increase("gradiometer_gpu_ecc_errors_total", of=FLEET)
ECC = Query(expr=f"sum by (type) (max by (uuid, type) ({_ECC}))", legend="{{type}}")


def gpus(id_: int) -> Section:
    """Build the section, shut until somebody opens it."""
    return panels.folded(id_, "GPUs", *_load(), *_health()), []


def _load() -> list[Panel]:
    utilisation = Card(
        16,
        "Utilisation of the least busy GPUs",
        "percentunit",
        "Share of the time in which a kernel ran, of the 20 GPUs that ran least in view although a run computes on "
        "them. A GPU near zero beside busy ones waits: for data, for another rank, or for ever." + ABSENT,
    )
    memory = Card(
        17,
        "Memory of the fullest GPUs",
        "percentunit",
        "Memory in use over memory there is, of the 20 fullest in view. Close to one, the next larger batch is the "
        "last; a line that climbs steadily is a leak." + ABSENT,
    )
    power = Card(
        18,
        "Power",
        "watt",
        "Power drawn, of the 20 GPUs that drew most in view. A drop of all of a run's GPUs at once is a run that "
        "stands still." + ABSENT,
    )
    return [
        panels.graph(utilisation, UTILISATION).min(0).max(1),
        panels.graph(memory, MEMORY).min(0).max(1),
        panels.graph(power, POWER).min(0),
    ]


def _health() -> list[Panel]:
    temperature = Card(
        19,
        "Temperature of the hottest GPUs",
        "celsius",
        "Temperature of the core, of the 20 GPUs that were hottest in view. One that stands out from its host's others "
        "is badly cooled; above some 85 degrees most hold their clocks down." + ABSENT,
    )
    throttled = Card(
        20,
        "GPUs held back",
        "short",
        "GPUs whose clocks are held down, by reason. A power cap is often meant; thermal and hardware reasons never "
        "are, and one slow GPU slows its whole run." + ABSENT,
    )
    ecc = Card(
        21,
        "ECC errors",
        "short",
        "Memory errors over the last few scrapes. Corrected ones do no harm but announce worse; after an uncorrected "
        "one the numbers of that GPU are not to be trusted." + ABSENT,
    )
    return [
        panels.graph(temperature, TEMPERATURE),
        panels.graph(throttled, THROTTLED).min(0),
        panels.bars(ecc, ECC),
    ]
