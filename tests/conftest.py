"""Fixtures that several test files share: small runs on disk, golden files, Debian's binaries, stopped processes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from hypothesis import HealthCheck, settings

from gradiometer.recorder import Recorder, RowHeader
from gradiometer.records import Flag, Manifest, ParameterInfo, RingGeometry
from tests._monitor import WRITER, Monitor, launch
from tests._ports import free_ports

NAN = float("nan")
START_NS = 1_700_000_000_000_000_000
LAYERS = ("embed", "blocks.0", "blocks.0", "head")
"""Layer of each parameter, unless a test says otherwise."""
PACKAGES = {
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "amtool": "prometheus-alertmanager",
    "victoria-metrics": "victoria-metrics",
    "vmalert": "victoria-metrics",
    "chromium": "chromium",
    "curl": "curl",
    "systemd-analyze": "systemd",
    "shellcheck": "shellcheck",
}
"""Debian's package of each program that tests run against."""


Golden = Callable[[str, str], None]
Promtool = Callable[..., "subprocess.CompletedProcess[str]"]
Spawn = Callable[..., "subprocess.Popen[str]"]
Train = Callable[..., "subprocess.Popen[str]"]
Start = Callable[..., Monitor]


class MakeManifest(Protocol):
    def __call__(
        self, run_id: str = ..., *, layers: Sequence[str] = ..., capacity: int = ..., **fields: Any
    ) -> Manifest: ...


class WriteRun(Protocol):
    def __call__(self, manifest: Manifest, norms: npt.ArrayLike, *, close: bool = ..., **columns: Any) -> Recorder: ...


class Append(Protocol):
    def __call__(self, recorder: Recorder, norms: npt.ArrayLike, **columns: Any) -> None: ...


class WaitUntil(Protocol):
    def __call__(self, check: Callable[[], Any], seconds: float = ...) -> Any: ...


def _make_manifest(
    run_id: str = "run", *, layers: Sequence[str] = LAYERS, capacity: int = 64, **fields: Any
) -> Manifest:
    """Make the manifest of a run of this process, one parameter for each of ``layers``."""
    parameters = tuple(
        ParameterInfo(name=f"{layer}.{place}", layer=layer, shape=(2, 3), dtype="float32", numel=6)
        for place, layer in enumerate(layers)
    )
    defaults: dict[str, Any] = {
        "format_version": 1, "run_id": run_id, "pid": os.getpid(), "process_start": psutil.Process().create_time(),
        "host": socket.gethostname(), "created_ns": START_NS, "gradiometer_version": "0.1.0", "torch_version": "2.13.0",
        "python_version": "3.11.7", "device": "cpu", "parameters": parameters,
        "ring": RingGeometry(capacity=capacity, parameters=len(parameters)),
    }  # fmt: skip
    return Manifest(**(defaults | fields))


def _make_row(step: int, norms: npt.NDArray[np.float32], **columns: Any) -> RowHeader:
    """Make the scalars of a row whose parameters have these ``norms``, one step a second."""
    total = float(np.sqrt(np.square(norms.astype(np.float64)).sum()))
    flags = 0 if np.isfinite(total) else Flag.NONFINITE | Flag.SKIPPED
    defaults: dict[str, Any] = {
        "step": step, "time_ns": START_NS + step * 10**9, "flags": flags, "clipped": 0, "optimizer": 0,
        "microbatches": 1, "first_nonfinite": -1, "policy_revision": 0, "grad_norm_preclip": total,
        "grad_norm_postclip": total, "coefficient": 1.0, "learning_rate": 0.001, "loss": 2.5, "loss_scale": NAN,
        "step_seconds": 1.0 if step else NAN, "agent_seconds": 0.001,
    }  # fmt: skip
    chosen = defaults | columns
    chosen["flags"] = int(chosen["flags"]) | (0 if np.isnan(chosen["loss"]) else Flag.LOSS)
    return RowHeader(**chosen)


def _append(recorder: Recorder, norms: npt.ArrayLike, **columns: Any) -> None:
    """Commit one row for each of ``norms``, [T, P]; a list in ``columns`` has a value for each row."""
    for place, row in enumerate(np.asarray(norms, np.float32)):
        recorder.stats[:] = row
        chosen = {name: value[place] if isinstance(value, list) else value for name, value in columns.items()}
        recorder.commit(_make_row(chosen.pop("step", recorder.status.steps), row, **chosen))


@pytest.fixture(scope="session")
def make_manifest() -> MakeManifest:
    """Give the function that makes manifests."""
    return _make_manifest


@pytest.fixture(scope="session")
def append() -> Append:
    """Give the function that commits rows of given parameter norms."""
    return _append


@pytest.fixture
def write_run(tmp_path: Path) -> Iterator[WriteRun]:
    """Give a function that writes a run below ``tmp_path``, and close its recorders in the end."""
    recorders: list[Recorder] = []

    def write(manifest: Manifest, norms: npt.ArrayLike, *, close: bool = False, **columns: Any) -> Recorder:
        recorders.append(recorder := Recorder(tmp_path, manifest))
        _append(recorder, norms, **columns)
        if close:
            recorder.close()
        return recorder

    yield write
    for recorder in recorders:
        recorder.close()


def pytest_configure() -> None:
    """Give torch one thread, here and in child processes: small models on two cores wait for each other otherwise.

    Let no example of hypothesis fail for its time, as a host that is busy makes any of them slow, nor for the fixtures
    that it shares with the others.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    fit = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile("patient", settings(), deadline=None, suppress_health_check=fit)
    settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: one that begins last would keep the others waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Offer ``--update-golden``."""
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew; read their diff")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Give a function that compares a text with the golden file of that name, or writes it."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            path.write_text(text)
        assert text == path.read_text(), f"{path.name} differs: if it should, run pytest --update-golden"

    return compare


@pytest.fixture(scope="session")
def native_binary() -> Callable[[str], str]:
    """Give a function that finds a Debian binary; without it the test is skipped, or fails where CI=true."""

    def find(name: str) -> str:
        path = shutil.which(name)
        remedy = f"{name} is not installed (apt-get install {PACKAGES[name]})"
        if path is None and os.environ.get("CI") == "true":
            pytest.fail(f"{remedy}, and CI must have it")
        return path or pytest.skip(remedy)

    return find


@pytest.fixture(scope="session")
def promtool(native_binary: Callable[[str], str]) -> Promtool:
    """Give a function that runs promtool with these words and this input to its end, which takes it minutes at most."""

    def run(*words: str | Path, text: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [native_binary("promtool"), *map(str, words)]
        return subprocess.run(command, input=text, capture_output=True, text=True, timeout=600, check=False)

    return run


@pytest.fixture
def free_port() -> int:
    """Give a port of loopback that was free a moment ago."""
    (port,) = free_ports(1)
    return port


@pytest.fixture(scope="session")
def wait_until() -> WaitUntil:
    """Give a function that calls another until it returns something true, returns that, and fails after a while."""

    def wait(check: Callable[[], Any], seconds: float = 60.0) -> Any:
        deadline = time.monotonic() + seconds
        while not (found := check()):
            if time.monotonic() > deadline:
                pytest.fail(f"still {found!r} after {seconds} s")
            time.sleep(0.05)
        return found

    return wait


@contextmanager
def _spawning() -> Iterator[Spawn]:
    """Give a function that starts a process with this Python's path, and stop what it started."""
    started: list[subprocess.Popen[str]] = []

    def start(*command: str | Path, **options: Any) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen([str(part) for part in command], text=True, **({"env": environment} | options))
        started.append(process)
        return process

    try:
        yield start
    finally:
        for process in started:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    stream.close()


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Give a function that starts a process with this Python's path, and stop what it started after the test."""
    with _spawning() as start:
        yield start


@pytest.fixture(scope="module")
def shared_spawn() -> Iterator[Spawn]:
    """Give what ``spawn`` does, for processes that the tests of a file share."""
    with _spawning() as start:
        yield start


@pytest.fixture
def start(tmp_path: Path, spawn: Spawn, wait_until: WaitUntil) -> Start:
    """Give a function that starts a daemon over ``tmp_path`` on a free port, and waits until it is ready."""
    return partial(launch, spawn, wait_until, tmp_path, stderr=subprocess.PIPE)


@pytest.fixture(scope="module")
def shared_start(
    shared_spawn: Spawn, wait_until: WaitUntil, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Monitor]:
    """Give a function that starts a daemon that the tests of a file share, over a directory of its own.

    It takes ``--`` options, and ``root`` for a directory that has runs already. Its log is the tests' own output.
    """

    def start(*options: str, root: Path | None = None) -> Monitor:
        return launch(shared_spawn, wait_until, root or tmp_path_factory.mktemp("runs"), *options)

    return start


@pytest.fixture
def train(tmp_path: Path, spawn: Spawn) -> Callable[..., subprocess.Popen[str]]:
    """Give a function that runs a writer in a process until its steps are written, then finishes it or leaves it."""

    def run(manifest: Manifest, steps: int, end: str = "stay") -> subprocess.Popen[str]:
        arguments = (tmp_path, manifest.model_dump_json(), str(steps), end)
        process = spawn(sys.executable, "-c", WRITER, *arguments, stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        if end == "finish":
            assert process.wait(timeout=60) == 0
        return process

    return run
