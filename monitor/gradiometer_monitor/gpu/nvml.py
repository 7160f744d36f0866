"""Read GPUs through nvidia-ml-py, whose module every function takes: it is there on some hosts only.

Guarantees: what a GPU, its driver or the binding does not offer is left out; a GPU that cannot be read is told apart
from NVML as a whole being gone, for which :class:`NvmlGoneError` is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

__all__ = ["Device", "NvmlGoneError", "read_devices"]

Found = TypeVar("Found")
Reading = tuple[str, tuple[str, ...], float]
"""Name in the catalogue after ``gradiometer_gpu_``, label values after ``gpu`` and ``uuid``, value."""
Read = Callable[[Any, Any], list[Reading]]
"""Reads from a module and a handle of a device."""

_LEFT_OUT = (
    "NOT_SUPPORTED", "FUNCTION_NOT_FOUND", "NO_PERMISSION", "NOT_FOUND", "NO_DATA", "INVALID_ARGUMENT",
    "ARGUMENT_VERSION_MISMATCH",
)  # fmt: skip
"""Codes by which one reading is not to be had."""
_GONE = ("UNINITIALIZED", "DRIVER_NOT_LOADED", "LIB_RM_VERSION_MISMATCH")
"""Codes by which NVML has to be opened anew."""
_THROTTLES = {
    "power_cap": 0x04, "hardware": 0x08, "thermal": 0x20, "hardware_thermal": 0x40, "hardware_power_brake": 0x80,
}  # fmt: skip
"""Bits of nvmlClocksEventReasons that hold clocks down for want of power or cooling."""


class NvmlGoneError(Exception):
    """NVML does not answer for any GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """A GPU, or an instance of one that MIG divides, as it was at one look."""

    gpu: str
    """Index as NVML counts; ``<index>/<instance>`` for an instance."""
    uuid: str = ""
    """Empty for a GPU that could not be read even once."""
    error: str | None = None
    """Why it cannot be read; None if it can."""
    readings: list[Reading] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)
    """Processes that compute on it, in the pid namespace that the driver sees."""


def read_devices(nvml: Any) -> list[Device]:
    """Read every GPU there is. Raises :class:`NvmlGoneError`."""
    try:
        count, driver = int(nvml.nvmlDeviceGetCount()), _text(nvml.nvmlSystemGetDriverVersion())
    except nvml.NVMLError as error:
        raise NvmlGoneError(str(error)) from error
    return [device for index in range(count) for device in _read_gpu(nvml, index, driver)]


def _read_gpu(nvml: Any, index: int, driver: str) -> list[Device]:
    """Read one GPU and the instances it is divided in: each of those has memory of its own, and nothing else."""
    gpu, uuid = str(index), ""
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = _text(nvml.nvmlDeviceGetUUID(handle))
        instances = _offered(nvml, lambda: _instances(nvml, handle)) or []
        whole = _WHOLE if instances else (_memory, *_WHOLE)
        found = [_read(nvml, handle, gpu, driver, whole)]
        found += [_read(nvml, instance, f"{gpu}/{place}", driver, (_memory,)) for place, instance in instances]
    except nvml.NVMLError as error:
        if error.value in _codes(nvml, _GONE):
            raise NvmlGoneError(str(error)) from error
        if error.value == nvml.NVML_ERROR_NO_PERMISSION:
            return []  # a GPU of another container
        return [Device(gpu=gpu, uuid=uuid, error=str(error))]
    return found


def _instances(nvml: Any, handle: Any) -> list[tuple[int, Any]]:
    """List the MIG instances of a GPU by their index; there are none where MIG is off."""
    if nvml.nvmlDeviceGetMigMode(handle)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
        return []
    places = range(int(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)))
    found = [(i, _offered(nvml, partial(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, i))) for i in places]
    return [(place, instance) for place, instance in found if instance is not None]


def _read(nvml: Any, handle: Any, gpu: str, driver: str, wanted: Sequence[Read]) -> Device:
    """Read one GPU or instance."""
    readings: list[Reading] = [("info", (_text(nvml.nvmlDeviceGetName(handle)), driver), 1)]
    for read in wanted:
        readings += _offered(nvml, partial(read, nvml, handle)) or []
    processes = _offered(nvml, partial(nvml.nvmlDeviceGetComputeRunningProcesses, handle)) or []
    pids = [int(process.pid) for process in processes]
    return Device(gpu=gpu, uuid=_text(nvml.nvmlDeviceGetUUID(handle)), readings=readings, pids=pids)


def _memory(nvml: Any, handle: Any) -> list[Reading]:
    memory = _offered(nvml, lambda: nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2))
    if memory is None:  # an older driver, which counts what is reserved as used
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return [("memory_used_bytes", (), int(memory.used)), ("memory_total_bytes", (), int(memory.total))]


def _utilization(nvml: Any, handle: Any) -> list[Reading]:
    rates = nvml.nvmlDeviceGetUtilizationRates(handle)
    return [("utilization_ratio", (), rates.gpu / 100), ("memory_utilization_ratio", (), rates.memory / 100)]


def _power(nvml: Any, handle: Any) -> list[Reading]:
    return [("power_watts", (), nvml.nvmlDeviceGetPowerUsage(handle) / 1e3)]


def _power_limit(nvml: Any, handle: Any) -> list[Reading]:
    return [("power_limit_watts", (), nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3)]


def _energy(nvml: Any, handle: Any) -> list[Reading]:
    return [("energy_joules_total", (), nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)]


def _temperature(nvml: Any, handle: Any) -> list[Reading]:
    return [("temperature_celsius", (), nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))]


def _clock(nvml: Any, handle: Any) -> list[Reading]:
    return [("sm_clock_hertz", (), nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 10**6)]


def _corrected(nvml: Any, handle: Any) -> list[Reading]:
    return _ecc(nvml, handle, "corrected", nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED)


def _uncorrected(nvml: Any, handle: Any) -> list[Reading]:
    return _ecc(nvml, handle, "uncorrected", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED)


def _ecc(nvml: Any, handle: Any, kind: str, code: int) -> list[Reading]:
    return [("ecc_errors_total", (kind,), nvml.nvmlDeviceGetTotalEccErrors(handle, code, nvml.NVML_VOLATILE_ECC))]


def _throttles(nvml: Any, handle: Any) -> list[Reading]:
    reasons = _offered(nvml, lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
    if reasons is None:  # the name before driver 535
        reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    return [("throttled", (name,), int(bool(reasons & bit))) for name, bit in _THROTTLES.items()]


_WHOLE = (_utilization, _power, _power_limit, _energy, _temperature, _clock, _corrected, _uncorrected, _throttles)


def _offered(nvml: Any, call: Callable[[], Found]) -> Found | None:
    """Return what ``call`` returns; None where that is not to be had."""
    try:
        return call()
    except AttributeError:  # an older binding
        return None
    except nvml.NVMLError as error:
        if error.value in _codes(nvml, _LEFT_OUT):
            return None
        raise


def _codes(nvml: Any, names: Sequence[str]) -> set[int]:
    return {code for name in names if (code := getattr(nvml, f"NVML_ERROR_{name}", None)) is not None}


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
