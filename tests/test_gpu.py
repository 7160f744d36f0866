"""GPUs in the monitor's metrics: what NVML says, in base units; nothing and no noise without it; recovery."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pynvml
import pytest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from gradiometer_monitor.exposition.exposition import OPENMETRICS, Exposition
from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.gpu import service as module
from gradiometer_monitor.gpu.service import GpuService, GpuSettings
from gradiometer_monitor.services import Context
from gradiometer_monitor.store import Store
from tests._nvml import LIBRARY, Card, FakeNvml

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Start, WaitUntil, WriteRun

Found = dict[tuple[str, tuple[str, ...]], float]
PARSE: Callable[[str], Iterable[Family]] = text_string_to_metric_families
Install = Callable[..., FakeNvml]
CORRECTED = (pynvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, pynvml.NVML_VOLATILE_ECC)
UNCORRECTED = (pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Give a function that puts a stand-in with these cards in place of ``pynvml``."""

    def put(*cards: Card) -> FakeNvml:
        nvml = FakeNvml(*cards)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    return put


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    """A context without runs, unless a test writes some and polls."""
    runs, store = Runs(tmp_path, retention_seconds=1e12), Store(None)
    yield Context(runs=runs, events=Events(runs, store), store=store)
    runs.close()
    store.close()


@pytest.fixture
def service(context: Context) -> Iterator[GpuService]:
    """A service whose rounds the test runs by hand, and that looks for what is lost in every one."""
    made = GpuService(GpuSettings(interval_seconds=1, retry_seconds=1), context)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def _debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "gradiometer_monitor")


def _samples(service: GpuService) -> Found:
    """Scrape the service alone, through the exposition, which holds its samples against the catalogue."""
    runs = Runs(Path("/nonexistent"), retention_seconds=1)
    exposition = Exposition(runs, series_budget=1000)
    exposition.collect_from({"gpu": service.samples})
    families = PARSE(exposition.render(OPENMETRICS).decode())
    found = [sample for family in families for sample in family.samples]
    return {
        (s.name, tuple(s.labels.values())): s.value
        for s in found
        if "gpu" in s.name or s.labels == {"collector": "gpu"}
    }


def _gpu(found: Found, *labels: str) -> dict[str, float]:
    """Take the series that have exactly these labels."""
    return {name.removeprefix("gradiometer_gpu_"): value for (name, has), value in found.items() if has == labels}


def _levels(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.levelname for record in caplog.records if record.name == "gradiometer_monitor.gpu.service"]


def test_a_gpu_in_base_units(install: Install, service: GpuService) -> None:
    """Milliwatts become watts, per cent ratios, MHz hertz; ECC errors are counters by type; the name is an info."""
    ecc = {CORRECTED: 7, UNCORRECTED: 2}
    install(Card(uuid="GPU-a", numbers={"nvmlDeviceGetTotalEccErrors": ecc}), Card(uuid="GPU-b"))
    assert service.work() == 1
    found = _samples(service)
    assert _gpu(found, "0", "GPU-a") == {
        "up": 1,
        "utilization_ratio": 0.97,
        "memory_utilization_ratio": 0.41,
        "memory_used_bytes": 3 * 2**30,
        "memory_total_bytes": 80 * 2**30,
        "power_watts": 412.5,
        "power_limit_watts": 700,
        "energy_joules_total": 123_456.789,
        "temperature_celsius": 61,
        "sm_clock_hertz": 1.755e9,
    }
    assert _gpu(found, "0", "GPU-a", "corrected") == {"ecc_errors_total": 7}
    assert _gpu(found, "0", "GPU-a", "uncorrected") == {"ecc_errors_total": 2}
    assert _gpu(found, "1", "GPU-b", "NVIDIA H100 80GB HBM3", "560.35.03") == {"info": 1}
    reasons = ("power_cap", "thermal", "hardware_thermal", "hardware_power_brake", "hardware")
    assert [_gpu(found, "1", "GPU-b", reason) for reason in reasons] == [{"throttled": float(i == 0)} for i in range(5)]


def test_what_a_gpu_does_not_support_is_left_out(install: Install, service: GpuService) -> None:
    """A consumer card without ECC, energy and MIG has all of its other series, and no other value in their place."""
    lacks = {"nvmlDeviceGetTotalEccErrors", "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetMigMode"}
    install(Card(uuid="GPU-a", lacks=lacks), Card(uuid="GPU-b"))
    service.work()
    names = [{name for name, labels in _samples(service) if labels[:1] == (gpu,)} for gpu in "01"]
    assert names[1] - names[0] == {"gradiometer_gpu_ecc_errors_total", "gradiometer_gpu_energy_joules_total"}
    assert names[0] < names[1]


@pytest.mark.parametrize("code", ["LIBRARY_NOT_FOUND", "DRIVER_NOT_LOADED", "NO_PERMISSION", "UNKNOWN"])
def test_without_nvml_there_is_nothing_and_no_noise(
    install: Install, service: GpuService, caplog: pytest.LogCaptureFixture, code: str
) -> None:
    """Nothing is exported, the collector has not failed, and there is one line, for who debugs; later it is found."""
    nvml = install(Card(uuid="GPU-a"))
    nvml.fault = code
    assert [service.work() for _ in range(3)] == [1, 1, 1]
    assert _samples(service).keys() == {(f"gradiometer_collector_{x}", ("gpu",)) for x in ("success", "seconds")}
    assert _samples(service)["gradiometer_collector_success", ("gpu",)] == 1
    assert _levels(caplog) == ["DEBUG"]
    nvml.fault = None
    service.work()
    assert _gpu(_samples(service), "0", "GPU-a")["up"] == 1


def test_without_the_binding_there_is_no_noise(
    service: GpuService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """nvidia-ml-py need not be installed."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    for _ in range(2):
        service.work()
    assert list(service.samples()) == []
    assert _levels(caplog) == ["DEBUG"]


def test_a_replaced_driver_is_worth_a_warning(
    install: Install, service: GpuService, caplog: pytest.LogCaptureFixture
) -> None:
    """A library that no longer fits its driver stays so until the monitor is restarted, which is said once."""
    install().fault = "LIB_RM_VERSION_MISMATCH"
    for _ in range(2):
        service.work()
    assert _levels(caplog) == ["WARNING"]
    assert "restart the monitor" in caplog.text


@pytest.mark.parametrize("code", ["GPU_IS_LOST", "RESET_REQUIRED", "UNKNOWN"])
def test_a_lost_gpu_disturbs_no_other(
    install: Install,
    service: GpuService,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
) -> None:
    """It is down under the uuid it had, the other goes on, NVML is opened anew after a while, and both come back."""
    cards = (Card(uuid="GPU-a"), Card(uuid="GPU-b"))
    nvml = install(*cards)
    service.work()
    cards[0].fault = code
    for _ in range(2):
        service.work()
    found = _samples(service)
    assert _gpu(found, "0", "GPU-a") == {"up": 0}
    assert _gpu(found, "1", "GPU-b")["utilization_ratio"] == 0.97
    assert _levels(caplog).count("WARNING") == 1
    later = time.monotonic() + 5
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: later))
    service.work()
    cards[0].fault = None
    service.work()
    assert nvml.opened == 2
    assert [_gpu(_samples(service), *labels)["up"] for labels in (("0", "GPU-a"), ("1", "GPU-b"))] == [1, 1]
    assert "GPU 0 (GPU-a) is back" in caplog.text


def test_a_gpu_that_was_never_read(install: Install, service: GpuService, caplog: pytest.LogCaptureFixture) -> None:
    """Lost from the start it is down without a uuid until it tells it; one of another container is no GPU of ours."""
    cards = (Card(uuid="GPU-a", fault="GPU_IS_LOST"), Card(uuid="GPU-b", fault="NO_PERMISSION"))
    install(*cards)
    for _ in range(2):
        service.work()
    assert _gpu(_samples(service), "0", "") == {"up": 0}
    assert not any(labels[0] == "1" for _, labels in _samples(service))
    assert _levels(caplog) == ["WARNING"]
    cards[0].fault = None
    service.work()
    assert {labels: value for (name, labels), value in _samples(service).items() if name == "gradiometer_gpu_up"} == {
        ("0", "GPU-a"): 1
    }


def test_a_reloaded_driver_is_found_again(
    install: Install, service: GpuService, caplog: pytest.LogCaptureFixture
) -> None:
    """While it is away its GPUs are down; the round after opens NVML anew. A GPU that does not come back stays down."""
    nvml = install(Card(uuid="GPU-a"), Card(uuid="GPU-b"))
    service.work()
    nvml.reload()
    nvml.fault = "DRIVER_NOT_LOADED"
    for _ in range(3):
        service.work()
    assert [_gpu(_samples(service), *labels) for labels in (("0", "GPU-a"), ("1", "GPU-b"))] == [{"up": 0}] * 2
    nvml.fault, nvml.cards = None, nvml.cards[1:]
    service.work()
    found = _samples(service)
    assert _gpu(found, "0", "GPU-a") == {"up": 0}
    assert _gpu(found, "0", "GPU-b")["up"] == 1
    assert "NVML is gone" in caplog.text


def test_mig_instances_have_memory_of_their_own(install: Install, service: GpuService) -> None:
    """Memory is that of the instances, so that a sum counts it once; one that is undone is not lost."""
    memory = {"nvmlDeviceGetMemoryInfo": SimpleNamespace(used=2**30, total=10 * 2**30)}
    instances = (Card(uuid="MIG-x", numbers=memory), None, Card(uuid="MIG-y", numbers=memory))
    install(card := Card(uuid="GPU-a", instances=instances))
    service.work()
    found = _samples(service)
    assert _gpu(found, "0/2", "MIG-y") == {"up": 1, "memory_used_bytes": 2**30, "memory_total_bytes": 10 * 2**30}
    assert "memory_used_bytes" not in _gpu(found, "0", "GPU-a")
    assert _gpu(found, "0", "GPU-a")["power_watts"] == 412.5
    assert {labels[0] for name, labels in found if name == "gradiometer_gpu_up"} == {"0", "0/0", "0/2"}
    card.instances = (Card(uuid="MIG-z", numbers=memory),)
    service.work()
    known = {labels for name, labels in _samples(service) if name == "gradiometer_gpu_up"}
    assert known == {("0", "GPU-a"), ("0/0", "MIG-z")}


def test_the_rank_that_computes_on_a_gpu(
    install: Install, service: GpuService, context: Context, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """A process that NVML names and a manifest too joins a GPU to a rank; one of another pid namespace does not."""
    write_run(make_manifest("mine", rank=1, world_size=2), np.ones((2, 4)))
    write_run(make_manifest("other", pid_namespace="pid:[1]"), np.ones((2, 4)))
    write_run(make_manifest("gone", process_start=1.0), np.ones((2, 4)))
    context.runs.poll()
    install(Card(uuid="GPU-a", pids=[1, os.getpid()]), Card(uuid="GPU-b"))
    service.work()
    found = [labels for name, labels in _samples(service) if name == "gradiometer_gpu_run_info"]
    assert found == [("0", "GPU-a", "mine", "1")]


def test_a_driver_that_hangs_is_told(
    install: Install, service: GpuService, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    """Numbers that got old are not shown: the collector fails, while scrapes and the end of the service go on."""
    nvml, release = install(Card(uuid="GPU-a")), threading.Event()
    service.work()
    assert _gpu(_samples(service), "0", "GPU-a")["up"] == 1
    monkeypatch.setattr(nvml, "nvmlDeviceGetCount", lambda: release.wait(60) and 1)
    monkeypatch.setattr(module, "STALE_SECONDS", 0.0)
    monkeypatch.setattr(module, "STALE_ROUNDS", 0)
    service.start()
    found = _samples(service)
    assert found.keys() == {(f"gradiometer_collector_{x}", ("gpu",)) for x in ("success", "seconds")}
    assert found["gradiometer_collector_success", ("gpu",)] == 0
    monkeypatch.undo()
    release.set()
    wait_until(lambda: _gpu(_samples(service), "0", "GPU-a").get("up"))
    service.stop()


@pytest.mark.parametrize(("name", "value"), [("interval_seconds", 0.1), ("retry_seconds", 0), ("interval", 5)])
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    """The error names the setting."""
    with pytest.raises(ValueError, match=name):
        GpuSettings.model_validate({name: value})


def test_a_daemon_over_a_library(
    start: Start,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    wait_until: WaitUntil,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """nvidia-ml-py itself, over a stub of the driver's library, in a daemon: each number is where it belongs."""
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("library")
    (folder / "stub.c").write_text(LIBRARY)
    built: list[str | Path] = [compiler, "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", folder / "stub.c"]
    subprocess.run(built, check=True, timeout=60)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))
    monkeypatch.setenv("STUB_GPU_PID", str(os.getpid()))
    write_run(make_manifest("mine"), np.ones((2, 4)))
    config = folder / "monitor.yaml"
    config.write_text("gpu: {interval_seconds: 0.5}")
    monitor = start("--config", str(config))
    wait_until(lambda: ("gradiometer_gpu_run_info", ("0", "GPU-good", "mine", "0")) in monitor.samples())
    found = monitor.samples()
    assert _gpu(found, "0", "GPU-good") == {
        "up": 1,
        "utilization_ratio": 0.5,
        "memory_utilization_ratio": 0.25,
        "memory_used_bytes": 2**33,
        "memory_total_bytes": 2**36,
        "power_watts": 250.5,
        "temperature_celsius": 55,
        "sm_clock_hertz": 1.5e9,
    }
    assert _gpu(found, "0", "GPU-good", "uncorrected") == {"ecc_errors_total": 11}
    assert _gpu(found, "0", "GPU-good", "hardware_thermal") == {"throttled": 1}
    assert _gpu(found, "0", "GPU-good", "NVIDIA X", "560.35.03") == {"info": 1}
    assert _gpu(found, "1", "GPU-lost") == {"up": 0}
    assert "GPU 1 cannot be read: GPU is lost" in monitor.end()


def _has_nvml() -> bool:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    pynvml.nvmlShutdown()
    return True


@pytest.mark.skipif(_has_nvml(), reason="NVML is here")
def test_the_real_binding_without_a_driver(service: GpuService, caplog: pytest.LogCaptureFixture) -> None:
    """nvidia-ml-py itself, on a host without NVML, is as quiet."""
    for _ in range(2):
        service.work()
    assert list(service.samples()) == []
    assert _levels(caplog) == ["DEBUG"]


@pytest.mark.gpu
@pytest.mark.skipif(not _has_nvml(), reason="no NVML")
def test_the_real_nvml(service: GpuService) -> None:
    """On a host with a GPU its memory, power and temperature are there and plausible, and NVML can be opened again."""
    for _ in range(2):
        service.work()
        found = _samples(service)
        (labels, *_) = [labels for name, labels in found if name == "gradiometer_gpu_memory_total_bytes"]
        mine = _gpu(found, *labels)
        assert mine["up"] == 1
        assert 2**30 < mine["memory_total_bytes"] < 2**40
        assert 0 <= mine["memory_used_bytes"] <= mine["memory_total_bytes"]
        if "/" not in labels[0]:
            assert 0 <= mine["utilization_ratio"] <= 1
            assert 1 < mine["power_watts"] < 3000
            assert 5 < mine["temperature_celsius"] < 110
        service.close()
