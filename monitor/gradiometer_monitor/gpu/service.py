"""What NVML tells of this host's GPUs, looked at by a thread of its own: a call of the driver can take seconds.

Guarantees: without NVML, driver or permission nothing is exported and nothing is said above debug level; NVML that
appears later is found, and found again after the driver was reloaded. What a GPU does not support is left out, a GPU
that is lost says so and disturbs no other, and numbers that got old because the driver hangs are not shown.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from logging import DEBUG, WARNING, getLogger
from typing import Annotated, Any

from gradiometer.process import process_alive
from gradiometer.tail import Sample
from gradiometer_monitor.config.section import Section, between
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.gpu.nvml import Device, NvmlGoneError, read_devices
from gradiometer_monitor.services import Context, Service

__all__ = ["GpuService", "GpuSettings"]

log = getLogger(__name__)

STALE_ROUNDS, STALE_SECONDS = 5, 60.0
"""Numbers are not shown once they are older than this many intervals, and than this."""


class GpuSettings(Section):
    """Whether and how GPUs are looked at."""

    enabled: bool = True
    """Look for GPUs; without NVML nothing is exported and nothing is said."""
    interval_seconds: Annotated[float, between(0.5, 3600)] = 5.0
    """Pause between two looks at the GPUs; no more than the scrape interval, or scrapes repeat a number."""
    retry_seconds: Annotated[float, between(1, 86400)] = 60.0
    """Pause before NVML is looked for again where it was not found."""


class GpuService(Service):
    """Reads every GPU each ``interval_seconds``, and finds out which rank of which run computes on it."""

    name = "gpu"
    sections = ("gpu",)

    def __init__(self, settings: GpuSettings, context: Context) -> None:
        super().__init__()
        self._settings, self._runs = settings, context.runs
        self._nvml: Any = None
        self._said: str | None = None
        self._known: dict[str, Device] = {}
        self._samples: list[Sample] = []
        self._looked_at = time.monotonic()
        self._reopen_at: float | None = None

    def work(self) -> float:
        """Look at the GPUs once, or for NVML."""
        if self._nvml is None:
            self._open()
        if self._nvml is not None:
            self._look()
        self._looked_at = time.monotonic()
        return self._settings.interval_seconds if self._nvml is not None else self._settings.retry_seconds

    def samples(self) -> Iterable[Sample]:
        """Give what the newest look saw. Raises TimeoutError when that is too long ago."""
        age = time.monotonic() - self._looked_at
        pause = self._settings.interval_seconds if self._nvml is not None else self._settings.retry_seconds
        if age > max(STALE_SECONDS, STALE_ROUNDS * pause):
            raise TimeoutError(f"NVML has not answered for {age:.0f} s: the driver may hang, see dmesg")
        return self._samples

    def close(self) -> None:
        """Let go of NVML."""
        self._shut()

    def _open(self) -> None:
        """Load and initialise NVML if it is there."""
        try:
            nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            self._say(DEBUG, f"no GPUs are looked at: {error}; nvidia-ml-py is not installed")
            return
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            replaced = error.value == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
            remedy = "; the driver was replaced: once the new one is loaded, restart the monitor" if replaced else ""
            self._say(WARNING if replaced else DEBUG, f"no GPUs are looked at: {error}{remedy}")
            return
        self._nvml, self._said, self._reopen_at = nvml, None, None

    def _look(self) -> None:
        """Read every GPU, and open NVML anew when it is gone, or, some time after one was lost, to see it again."""
        try:
            devices = read_devices(self._nvml)
        except NvmlGoneError as error:
            log.warning(
                "NVML is gone, and will be looked for again every %g s: %s", self._settings.retry_seconds, error
            )
            devices = []
            self._shut()
        self._tell_changes(devices)
        self._samples = [*_up(self._known.values()), *_readings(devices), *_users(devices, self._runs)]
        lost = any(device.error for device in self._known.values())
        if not lost:
            self._reopen_at = None
        elif self._reopen_at is None:
            self._reopen_at = time.monotonic() + self._settings.retry_seconds
        elif time.monotonic() >= self._reopen_at:
            self._shut()

    def _tell_changes(self, devices: list[Device]) -> None:
        """Remember every GPU that was ever seen, by its uuid, and log those that were lost or are back."""
        seen = {device.uuid or self._key(device.gpu): device for device in devices}
        for key, known in list(self._known.items()):
            now = seen.pop(key, None)
            # One that was never read may be one of those that tell their uuid now; an instance may be divided anew.
            if now is None and (not known.uuid or "/" in known.gpu):
                del self._known[key]
                continue
            now = now or replace(known, error="it is not there any more")
            if now.error and not known.error:
                log.warning("GPU %s (%s) is lost: %s", known.gpu, known.uuid, now.error)
            elif known.error and not now.error:
                log.info("GPU %s (%s) is back", now.gpu, known.uuid)
            self._known[key] = replace(now, uuid=known.uuid)
        for key, device in seen.items():
            if device.error:
                log.warning("GPU %s cannot be read: %s", device.gpu, device.error)
            else:
                log.info(
                    "GPU %s (%s) is looked at every %g s", device.gpu, device.uuid, self._settings.interval_seconds
                )
            self._known[key] = device

    def _key(self, gpu: str) -> str:
        """Name a GPU that does not tell its uuid: by that of the one that had its index, or else by the index."""
        return next((key for key, device in self._known.items() if device.gpu == gpu), f"{gpu} unread")

    def _shut(self) -> None:
        if self._nvml is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
            self._nvml = None

    def _say(self, level: int, message: str) -> None:
        """Log a message, once until there is another one to log."""
        if message != self._said:
            self._said = message
            log.log(level, message)


def _up(known: Iterable[Device]) -> Iterator[Sample]:
    for device in known:
        yield "gradiometer_gpu_up", (device.gpu, device.uuid), int(device.error is None)


def _readings(devices: Iterable[Device]) -> Iterator[Sample]:
    for device in devices:
        for name, labels, value in device.readings:
            yield f"gradiometer_gpu_{name}", (device.gpu, device.uuid, *labels), value


def _users(devices: Iterable[Device], runs: Runs) -> Iterator[Sample]:
    """Yield which rank computes on which GPU, as far as its process is one of this pid namespace."""
    pids = {pid for device in devices for pid in device.pids}
    if not pids:
        return
    with runs.snapshot() as found:
        ranks = [(run.run_id, tail) for run in found if run.state == "running" for tail in run.ranks]
    for run_id, tail in ranks:
        if tail.manifest.pid in pids and process_alive(tail.manifest):
            for device in devices:
                if tail.manifest.pid in device.pids:
                    yield "gradiometer_gpu_run_info", (device.gpu, device.uuid, run_id, str(tail.rank)), 1
