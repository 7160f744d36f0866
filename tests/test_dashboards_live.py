"""Every query of every dashboard, asked as Grafana asks, of a Prometheus that scrapes a monitor over real jobs."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml

from gradiometer import open_run
from gradiometer_dashboards import load
from gradiometer_dashboards.evaluation import Answer, Prometheus, View
from tests import _dashboard_job as job
from tests._alerts import alert, notification, post
from tests._dashboards import NAMES, Target, every_panel, panels, variables
from tests._grafana import StubServer, token_of
from tests._monitor import WRITER, launch
from tests._nvml import LIBRARY
from tests._ports import free_ports
from tests._receivers import Database, prometheus
from tests._web import READ, WRITE, write_tokens

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Spawn, WaitUntil

pytestmark = [pytest.mark.native, pytest.mark.slow]

Json = dict[str, Any]
SCRAPE_SECONDS = 1.0
NOWHERE = "http://127.0.0.1:1"
"""Where nothing answers."""
LAST_STEP = job.SICK_FROM + 100
"""By then the layers are known to be sick."""
ABSENT = {
    "gradiometer_gpu_energy_joules_total": "the stub of the driver's library has no function for it",
    "gradiometer_gpu_power_limit_watts": "the stub's GPU does not support it",
    "gradiometer_loss_scale": "the job has no GradScaler",
}
"""Metrics that nothing here exports, and why: panels over one of them alone must be empty, and not an error."""
UNLUCKY = """
import os, sys, time
import numpy as np, psutil
from pathlib import Path
from gradiometer.records import Manifest
from gradiometer.recorder import Recorder, RowHeader

manifest = Manifest.model_validate_json(sys.argv[2])
mine = {"pid": os.getpid(), "process_start": psutil.Process().create_time(), "created_ns": time.time_ns()}
recorder = Recorder(Path(sys.argv[1]), manifest.model_copy(update=mine))
step = 0
while True:
    for _ in range(2 * manifest.ring.capacity):
        recorder.stats[:] = 0.1 + step % 7
        norm = float(np.sqrt(np.square(recorder.stats[0].astype(np.float64)).sum()))
        recorder.commit(RowHeader(step, time.time_ns(), 0, 0, 0, 1, -1, 0, norm, norm, 1.0, 0.1, 2.0, 1.0, 0.01, 0.001))
        step += 1
    recorder.status.agent_errors += 1
    if step == 2 * manifest.ring.capacity:
        print("written", flush=True)
    time.sleep(0.5)
"""
"""Writes faster than its ring can be read, fails now and then, and has more layers than the budget of series."""
QUIET = {
    "Services that failed": 'gradiometer_service_healthy{service="remote_write_off"} == 1',
    "Log messages dropped": "gradiometer_log_messages_dropped_total == 0",
    "Runs removed": "gradiometer_pruned_runs_total == 0",
    "Disk space freed": "gradiometer_pruned_bytes_total == 0",
}
"""Panels of what did not happen here, by title, and what shows that it did not: they are empty, or draw zero."""
ONE_OF = {"Comparison"}
"""Panels whose queries exclude each other, by title: one has data."""
SETTLED = (
    f'count(gradiometer_steps_total{{run_id="{job.RUN}"}} > {LAST_STEP}) == 2',
    'ALERTS{run_id="gone"} and on () ALERTS{alertname="GradiometerMonitorDown"}',
    'gradiometer_layer_state{state="vanishing"}',
    'gradiometer_layer_state{state="exploding"}',
    f'gradiometer_gpu_run_info{{run_id="{job.RUN}"}}',
    "rate(gradiometer_remote_write_rows_sent_total[4s]) > 0",
    'gradiometer_run_state{run_id="done",state="finished"} == 1',
    'increase(gradiometer_agent_errors_total{run_id="unlucky"}[4s]) > 0',
    'increase(gradiometer_rows_dropped_total{run_id="unlucky"}[4s]) > 0',
    "count(sum_over_time(up[6s]) >= 5) == 2",
)
"""What shows that all has happened, that both monitors know it, and that they were scraped in time."""
RULES = """
groups:
- name: gradiometer
  interval: 1s
  rules:
  - alert: GradiometerAgentLost
    expr: max by (job, run_id) (gradiometer_run_state{state="lost"}) == 1
    labels: {severity: warning}
  - alert: GradiometerMonitorDown
    expr: up == 0
    labels: {severity: critical}
"""


@dataclass(frozen=True, kw_only=True)
class World:
    """What runs while the dashboards are asked."""

    database: Database
    root: Path
    began: float
    ended: float
    """When the dashboards are looked at: an instant at which all of it was there."""
    spike: float
    """Norm of the job's largest spike, as it was recorded."""

    def view(self, name: str, **chosen: str) -> View:
        """Open a dashboard over all that has happened; the run is the job's unless told otherwise."""
        return View(
            dashboard=load(name),
            prometheus=Prometheus(url=self.database.url),
            start=self.began,
            end=self.ended,
            chosen={"run_id": job.RUN, **chosen},
            scrape_interval=SCRAPE_SECONDS,
        )

    def values(self, selector: str) -> list[float]:
        """Return the values of the series that Prometheus knew then."""
        return _values(self.database, selector, self.ended)


def _values(database: Database, selector: str, at: float) -> list[float]:
    found = Prometheus(url=database.url).ask("query", query=selector, time=f"{at:.3f}")["result"]
    return [float(each["value"][1]) for each in found]


def _written(spawn: Spawn, root: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a process that writes a run, and wait until its first rows are there."""
    process = spawn(sys.executable, "-c", script, root, *arguments, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    return process


def _train(spawn: Spawn, root: Path, make_manifest: MakeManifest) -> int:
    """Start the job on its ranks, and runs that finish, are lost, cannot be read in time and cannot be read at all.

    Returns the process of the job's rank 0.
    """
    port, command = str(free_ports(1)[0]), (sys.executable, "-m", "tests._dashboard_job")
    ranks = [
        spawn(*command, str(rank), port, root, cwd=Path(__file__).parents[1], stderr=subprocess.DEVNULL)
        for rank in range(job.WORLD)
    ]
    done, gone = (make_manifest(run_id, capacity=64).model_dump_json() for run_id in ("done", "gone"))
    _written(spawn, root, WRITER, done, "200", "finish").wait(timeout=30)
    _written(spawn, root, WRITER, gone, "200", "stay").kill()
    unlucky = make_manifest("unlucky", layers=[f"layers.{place:03}" for place in range(100)], capacity=64)
    _written(spawn, root, UNLUCKY, unlucky.model_dump_json())
    (root / "broken" / "rank-00000").mkdir(parents=True)
    (root / "broken" / "rank-00000" / "manifest.json").write_text("{")
    return ranks[0].pid


def _gpu_library(folder: Path) -> None:
    compiler = shutil.which("cc") or pytest.skip("there is no C compiler")
    (folder / "stub.c").write_text(LIBRARY)
    built: list[str | Path] = [compiler, "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", folder / "stub.c"]
    subprocess.run(built, check=True, timeout=60)


def _settings(side: Path, grafana: str, receiver: str) -> str:
    tokens, token = write_tokens(side / "tokens"), side / "grafana"
    token.write_text(token_of("Admin"))
    token.chmod(0o600)
    push = {"flush_seconds": 0.5, "backoff_max_seconds": 0.5, "timeout_seconds": 2}
    settings = {
        "auth": {"tokens_file": str(tokens)},
        "gpu": {"interval_seconds": 0.5},
        "series_budget": 300,
        "grafana": {"url": grafana, "token_file": str(token), "apply": False},
        "alerts": {
            "rules": [{"name": "keep", "alertname": "GradiometerSpike", "action": "checkpoint", "dry_run": True}]
        },
        "remote_write": [{"name": "db", "url": receiver, **push}, {"name": "off", "url": NOWHERE, **push}],
    }
    (side / "monitor.yaml").write_text(yaml.safe_dump(settings))
    return str(side / "monitor.yaml")


def _scrape(side: Path, *monitors: str) -> None:
    (side / "rules.yml").write_text(RULES)
    (side / "read").write_text(READ)
    scrape = {
        "job_name": "gradiometer",
        "authorization": {"credentials_file": str(side / "read")},
        "static_configs": [{"targets": [url.removeprefix("http://") for url in (*monitors, NOWHERE)]}],
    }
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(side / "rules.yml")],
        "scrape_configs": [scrape],
    }
    (side / "prometheus.yml").write_text(yaml.safe_dump(config))


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    native_binary: Callable[[str], str],
    shared_spawn: Spawn,
    wait_until: WaitUntil,
    make_manifest: MakeManifest,
) -> Iterator[World]:
    """Train, serve, scrape and wait until all that the job does has been scraped and the rates have settled."""
    root, side, began = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("side"), time.time()
    program = native_binary("prometheus")
    _gpu_library(side)
    database = prometheus(program, side, free_ports(1)[0], shared_spawn, wait_until)
    pid = _train(shared_spawn, root, make_manifest)
    grafana = StubServer("")
    outage = grafana.stub.fault(drop=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_LIBRARY_PATH", str(side))
        patch.setenv("STUB_GPU_PID", str(pid))
        config = _settings(side, grafana.url, database.write_url)
        monitor = launch(shared_spawn, wait_until, root, "--config", config, stderr=subprocess.DEVNULL)
        same = side / "same"  # a monitor's files are named after its directory
        same.symlink_to(root)
        other = launch(shared_spawn, wait_until, same, "--state-dir", str(side / "other"), stderr=subprocess.DEVNULL)
        _scrape(side, monitor.url, other.url)
        database.start()

        def has(selector: str) -> bool:
            return bool(_values(database, selector, time.time()))

        def settled() -> float:
            """Return an instant at which all was there, and all scrapes before it are over; 0 for none."""
            at = time.time() - 2 * SCRAPE_SECONDS
            return at if all(_values(database, selector, at) for selector in SETTLED) else 0.0

        assert post(monitor.url, notification(alert(job.RUN, "GradiometerSpike")), WRITE)[0] in (200, 202)
        wait_until(lambda: has("gradiometer_grafana_up == 0"))
        wait_until(lambda: has(f'count(gradiometer_nonfinite_steps_total{{run_id="{job.RUN}"}}) == 2'), 120)
        job.go(root)
        grafana.stub.faults.remove(outage)
        spike = _spike(root, wait_until)
        for selector in SETTLED:
            wait_until(partial(has, selector), 120)
        yield World(database=database, root=root, began=began, ended=wait_until(settled, 120), spike=spike)
    grafana.down()


def _spike(root: Path, wait_until: WaitUntil) -> float:
    """Return the largest norm of the job's spikes once they are over; later its ring holds them no longer."""
    run = wait_until(lambda: (found := open_run(root / job.RUN)).status["steps"] > job.SICK_FROM and found, 180)
    found = run.grad_norm_preclip[np.isin(run.steps, job.SPIKES)]
    assert len(found) == len(job.SPIKES)
    assert found.max() > 1000 * np.nanmedian(run.grad_norm_preclip)
    return float(found.max())


def _absent(expr: str) -> bool:
    """Whether a query needs a metric that nothing exports; what comes after ``unless`` is not needed."""
    return any(metric in expr.partition(" unless ")[0] for metric in ABSENT)


def _check_shape(panel: Json, answer: Answer) -> None:
    """Check that an answer is what its kind of panel draws."""
    assert answer.series, answer.expr
    if answer.instant:
        assert all(len(series.values) == 1 for series in answer.series)
    assert any(math.isfinite(value) for series in answer.series for value in series.values), answer.expr
    labels = [tuple(sorted(series.labels.items())) for series in answer.series]
    assert len(set(labels)) == len(labels)
    if panel["type"] == "stat":
        assert all(math.isfinite(series.values[0]) for series in answer.series), answer.expr
    if panel["type"] in ("stat", "timeseries"):
        legends = [series.legend for series in answer.series]
        assert all(legends), answer.expr
        assert len(set(legends)) == len(legends), legends
    if panel["type"] == "heatmap":
        _check_heatmap(panel, answer)


def _check_heatmap(panel: Json, answer: Answer) -> None:
    (target,) = panel["targets"]
    if target["format"] != "heatmap":
        assert {series.legend for series in answer.series} <= {*job.LAYERS, "0", "1"}
        return
    buckets = sorted((float(series.legend), series) for series in answer.series)
    assert buckets[-1][0] == math.inf
    newest = [series.values[-1] for _, series in buckets if len(series.values) == len(buckets[-1][1].values)]
    assert newest == sorted(newest), "buckets are cumulative"


def _check_columns(panel: Json, answers: list[Answer]) -> None:
    """Check that each column which a table's transformations name is there."""
    letters = [answer.ref_id for answer in answers]
    columns = {label for answer in answers for series in answer.series for label in series.labels}
    columns |= {"Time", "Value"} | {f"Value #{letter}" for letter in letters}
    for transformation in panel.get("transformations", ()):
        if transformation["id"] == "organize":
            options = transformation["options"]
            shown = {c for c, hidden in options.get("excludeByName", {}).items() if not hidden}
            named = {*options.get("renameByName", {}), *options.get("indexByName", {}), *shown}
            assert {c for c in named if not _numbered(c)} <= columns, panel["title"]


def _numbered(column: str) -> bool:
    """Tell whether a column is one of those that a join numbers: ``Time 1``."""
    name, _, number = column.rpartition(" ")
    return bool(name) and number.isdigit()


@pytest.mark.parametrize("panel", every_panel())
def test_every_target_has_data(panel: Json, world: World, request: pytest.FixtureRequest) -> None:
    """Each target of the panel returns what a panel of its kind draws; one that cannot be known here is empty."""
    if not panel.get("targets"):
        return
    name = request.node.callspec.id.partition("-")[0]
    answers = world.view(name).answers(panel)
    assert {answer.ref_id for answer in answers} == {target["refId"] for target in panel["targets"]}
    if panel["title"] in ONE_OF:
        (answers,) = [[answer] for answer in answers if answer.series]
    for answer in answers:
        if _absent(answer.expr):
            assert not answer.series, f"{answer.expr} is said to be absent"
        elif panel["title"] in QUIET:
            assert all(value == 0 for series in answer.series for value in series.values)
            assert world.values(QUIET[panel["title"]])
        else:
            _check_shape(panel, answer)
    if panel["type"] == "table":
        _check_columns(panel, answers)


@pytest.mark.parametrize("name", NAMES)
def test_variables_offer_what_there_is(name: str, world: World) -> None:
    """The choices of the variables are the job's, in order."""
    view = world.view(name)
    offered = {each: view.options(each) for each, v in variables(name).items() if v["type"] == "query"}
    assert len(offered["instance"]) == 2
    assert offered["job"] == ["gradiometer"]
    assert offered["run_id"] == ["unlucky", "job", "gone", "done"]
    assert offered["rank"] == ["0", "1"]
    assert offered["layer"] == sorted(job.LAYERS)


@pytest.mark.parametrize("run_id", ["done", "gone"])
@pytest.mark.parametrize("name", [name for name in NAMES if variables(name)["run_id"].get("hide", 0) != 2])
def test_runs_that_are_over_are_no_error(name: str, run_id: str, world: World) -> None:
    """The dashboards of one run open on a finished run and on a lost one, with one rank and without GPUs."""
    view = world.view(name, run_id=run_id)
    found = [answer for panel in view.panels for answer in view.answers(panel)]
    assert sum(bool(answer.series) for answer in found) > 0


def _peaks_of(target: Target) -> bool:
    return "max_over_time(gradiometer_grad_norm_finite_window_max" in target.expr


def test_known_spikes_are_seen(world: World) -> None:
    """The peak of the job's largest spike is on the Run dashboard, to the last digit of the norm that was recorded."""
    view = world.view("run")
    drawn = [
        value
        for panel in panels("run")
        for target, answer in zip(panel.get("targets", ()), view.answers(panel), strict=True)
        if _peaks_of(Target(board="run", panel=panel, target=target)) and panel["type"] == "timeseries"
        for series in answer.series
        for value in series.values
    ]
    assert max(drawn) == pytest.approx(world.spike, rel=1e-6)


def test_known_incidents_are_counted(world: World) -> None:
    """The one non-finite step is one non-finite step of both monitors, and it was skipped."""
    for name in ("nonfinite", "skipped"):
        assert world.values(f'gradiometer_{name}_steps_total{{run_id="job"}}') == [1.0, 1.0]
