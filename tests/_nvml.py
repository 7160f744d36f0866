"""A stand-in for the module ``pynvml`` over GPUs that a test describes; constants and exceptions are the real ones."""

# ruff: noqa: N802 - the names are NVML's

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pynvml


@dataclass(kw_only=True)
class Card:
    """One GPU, or an instance of one."""

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    pids: Sequence[int] = ()
    instances: Sequence[Card | None] = ()
    """MIG instances; None for a place that has none. MIG is on if there are any."""
    lacks: set[str] = field(default_factory=set)
    """Functions that it does not support."""
    fault: str | None = None
    """Code, without NVML_ERROR_, that every function of it raises."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """What functions return in place of the usual."""


USUAL: dict[str, Any] = {
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=41),
    "nvmlDeviceGetPowerUsage": 412_500,
    "nvmlDeviceGetEnforcedPowerLimit": 700_000,
    "nvmlDeviceGetTotalEnergyConsumption": 123_456_789,
    "nvmlDeviceGetTemperature": 61,
    "nvmlDeviceGetClockInfo": 1755,
    "nvmlDeviceGetTotalEccErrors": 0,
    "nvmlDeviceGetCurrentClocksEventReasons": pynvml.nvmlClocksEventReasonSwPowerCap,
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(used=3 * 2**30, total=80 * 2**30),
}


class FakeNvml(ModuleType):
    """The functions of ``pynvml`` that the monitor calls."""

    def __init__(self, *cards: Card) -> None:
        super().__init__("pynvml")
        self.cards = list(cards)
        self.fault: str | None = None
        """Code that :meth:`nvmlInit` raises."""
        self.opened = 0
        """Calls of :meth:`nvmlInit` that succeeded."""
        self._open = False

    def __getattr__(self, name: str) -> Any:
        """Give the real constants and exceptions, and a function for whatever :data:`USUAL` has a number for."""
        if name in USUAL:
            return lambda card, *arguments, **options: self._ask(card, name, *arguments)
        if name.startswith("NVML") or name == "nvmlMemory_v2":
            return getattr(pynvml, name)
        raise AttributeError(name)

    def reload(self) -> None:
        """Unload the driver and load it again: who had NVML open must open it anew."""
        self._open = False

    def nvmlInit(self) -> None:
        self._raise(self.fault)
        self.opened, self._open = self.opened + 1, True

    def nvmlShutdown(self) -> None:
        self._raise(None if self._open else "UNINITIALIZED")
        self._open = False

    def nvmlDeviceGetCount(self) -> int:
        self._raise(None if self._open else "UNINITIALIZED")
        return len(self.cards)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "560.35.03"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Card:
        self._raise(self.cards[index].fault)
        return self.cards[index]

    def nvmlDeviceGetUUID(self, card: Card) -> bytes:
        self._raise(card.fault)
        return card.uuid.encode()

    def nvmlDeviceGetName(self, card: Card) -> str:
        return card.name

    def nvmlDeviceGetMigMode(self, card: Card) -> list[int]:
        if "nvmlDeviceGetMigMode" in card.lacks:
            self._raise("NOT_SUPPORTED")
        return [int(bool(card.instances))] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, card: Card) -> int:
        return len(card.instances)

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: Card, index: int) -> Card:
        found = card.instances[index]
        if found is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return found

    def nvmlDeviceGetComputeRunningProcesses(self, card: Card) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=None) for pid in card.pids]

    def _ask(self, card: Card, name: str, *arguments: Any) -> Any:
        self._raise(card.fault or ("NOT_SUPPORTED" if name in card.lacks else None))
        found = card.numbers.get(name, USUAL[name])
        return found[arguments] if isinstance(found, dict) else found

    def _raise(self, code: str | None) -> None:
        if code is not None:
            raise pynvml.NVMLError(getattr(pynvml, f"NVML_ERROR_{code}"))


LIBRARY = r"""
#include <stdlib.h>
#include <string.h>
typedef unsigned int u; typedef unsigned long long ull; typedef int device;
struct memory { u version; ull total, reserved, free, used; };
struct rates { u gpu, memory; };
struct process { u pid; ull used; u gpu_instance, compute_instance; };
enum { OK = 0, INVALID = 2, NOT_SUPPORTED = 3, TOO_SMALL = 7, LOST = 15 };
static device gpus[2];
static int lost(device *gpu) { return gpu == &gpus[1]; }
int nvmlInitWithFlags(u flags) { return flags == 0 ? OK : INVALID; }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) { return code == LOST ? "GPU is lost" : "some error"; }
int nvmlSystemGetDriverVersion(char *text, u size) { strncpy(text, "560.35.03", size); return OK; }
int nvmlDeviceGetCount_v2(u *count) { *count = 2; return OK; }
int nvmlDeviceGetHandleByIndex_v2(u index, device **gpu) { *gpu = &gpus[index]; return OK; }
int nvmlDeviceGetUUID(device *gpu, char *text, u size) {
    strncpy(text, lost(gpu) ? "GPU-lost" : "GPU-good", size); return OK; }
int nvmlDeviceGetName(device *gpu, char *text, u size) {
    strncpy(text, "NVIDIA X", size); return lost(gpu) ? LOST : OK; }
int nvmlDeviceGetMemoryInfo_v2(device *gpu, struct memory *m) {
    if (m->version != (sizeof *m | 2u << 24)) return INVALID;
    m->total = 1ull << 36; m->used = 1ull << 33; m->free = m->total - m->used; m->reserved = 0; return OK; }
int nvmlDeviceGetUtilizationRates(device *gpu, struct rates *r) { r->gpu = 50; r->memory = 25; return OK; }
int nvmlDeviceGetPowerUsage(device *gpu, u *milliwatts) { *milliwatts = 250500; return OK; }
int nvmlDeviceGetEnforcedPowerLimit(device *gpu, u *milliwatts) { return NOT_SUPPORTED; }
int nvmlDeviceGetTemperature(device *gpu, int sensor, u *celsius) { *celsius = sensor == 0 ? 55 : 0; return OK; }
int nvmlDeviceGetClockInfo(device *gpu, int clock, u *mhz) { *mhz = clock == 1 ? 1500 : 0; return OK; }
int nvmlDeviceGetTotalEccErrors(device *gpu, int type, int counter, ull *count) {
    *count = counter == 0 ? 10 + type : 0; return OK; }
int nvmlDeviceGetCurrentClocksEventReasons(device *gpu, ull *reasons) { *reasons = 0x40; return OK; }
int nvmlDeviceGetComputeRunningProcesses_v3(device *gpu, u *count, struct process *found) {
    if (found == NULL) { *count = 1; return TOO_SMALL; }
    memset(found, 0, sizeof *found); found->pid = atoi(getenv("STUB_GPU_PID")); *count = 1; return OK; }
"""
"""C source of a stub of libnvidia-ml.so.1: one GPU that answers, one that is lost. It has no MIG and no energy."""
