"""The benchmarks run and write what they measured. No test here looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from gradiometer_dashboards import names

ROOT = Path(__file__).parents[1]
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks belong to the repository, not to the wheel", allow_module_level=True)

from benchmarks.__main__ import BY_NAME, NAMES, read_options  # noqa: E402 - it is there only in the repository


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a benchmark's module from the repository's root."""
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)


Quick = Callable[[str], tuple[str, Path]]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Quick:
    """Give a function that runs a benchmark by the one command, each just once, and gives its output and its file."""
    folder = tmp_path_factory.mktemp("quick")

    @cache
    def run_once(name: str) -> tuple[str, Path]:
        done = run("benchmarks", name, "--quick", "--json", folder)
        assert done.returncode == 0, done.stderr
        return done.stdout, folder / f"{name}.json"

    return run_once


def results_of(path: Path) -> dict[str, Any]:
    """Read the comparisons of a results file, having checked that each holds times and ratios of the same names."""
    body: dict[str, Any] = json.loads(path.read_text())
    for comparison in body["results"].values():
        assert comparison["seconds"].keys() == comparison["ratios"].keys() >= {comparison["baseline"]}
        assert comparison["noise"] >= 0
    return body


def test_step_overhead_prints_both_views_with_aims(quick: Quick) -> None:
    """The step benchmark prints components beside their aims, and whole steps, of every model, and writes both."""
    said, path = quick("step_overhead")
    for expected in ("A/A noise", "≤ 0.70", "≤ 0.75", "agent: fused clip, active", "hooks armed ÷ off", "tiny"):
        assert expected in said
    body = results_of(path)
    assert [name.rsplit(", ")[1] for name in body["results"]] == ["components", "whole step"] * 4
    assert body["ratios"].keys() == body["results"].keys()
    for name in body["not_installed"]:
        assert f"{name}: not installed" in said


def test_parallel_counts_collectives(quick: Quick) -> None:
    """The parallel benchmark counts one collective a step where parameters are sharded, and none under DDP."""
    _, path = quick("parallel")
    body = results_of(path)
    assert body["collectives"].keys() == body["results"].keys()
    for name, counts in body["collectives"].items():
        agent = {count for call, count in counts.items() if call.startswith("agent")}
        assert agent == ({0} if name.endswith("DDP") else {1})


def test_policies_count_operators(quick: Quick) -> None:
    """The benchmark of deciding names every policy, for one unit and for many, with what it asks of torch."""
    _, path = quick("policies")
    body = results_of(path)
    assert body["operators"].keys() == body["results"].keys() == {"one unit", "300 units"}
    for title, counts in body["operators"].items():
        assert counts.keys() == body["results"][title]["seconds"].keys()
        assert all(0 < count <= 100 for count in counts.values())


def test_ingest_measures_time_waits_and_memory(quick: Quick) -> None:
    """The benchmark of following runs says what polling took, how long a scrape waited, and what memory it held."""
    said, path = quick("ingest")
    for expected in ("A/A noise", "aim:", "of 10%", "peak memory", "a scrape waited"):
        assert expected in said
    results = json.loads(path.read_text())["results"]
    assert [(each["ranks"], each["parameters"]) for each in results] == [(8, 1000), (1, 1000)]
    for each in results:
        assert each["share"] > 0
        assert each["rows"] > each["ranks"] * 256


def test_replay_times_each_kind(tmp_path: Path) -> None:
    """The replay benchmark writes a run, reads it and replays each kind of policy over it."""
    path = tmp_path / "replay.json"
    done = run("benchmarks.replay", "--steps", "300", "--layers", "5", "--json", path)
    assert done.returncode == 0, done.stderr
    body = json.loads(path.read_text())
    assert body["seconds"].keys() >= {"reading the run", "nonfinite", "global_norm", "group_norm"}
    assert all(seconds > 0 for seconds in body["seconds"].values())


def test_gpu_dry_run_covers_every_variant(tmp_path: Path) -> None:
    """A dry run of the GPU benchmark goes through every variant, its host waits and its kernels, on the CPU."""
    path = tmp_path / "gpu.json"
    done = run("benchmarks.gpu", "--dry-run", "--json", path)
    assert done.returncode == 0, done.stderr
    assert "≤ 1.00" in done.stdout
    body = results_of(path)
    details = body["details"]["dry run"]
    assert details["host_waits_a_step"].keys() == body["results"]["dry run"]["seconds"].keys()
    assert all(kernel["bytes_per_second"] > 0 for kernel in details["kernels"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_says_in_one_line_that_it_needs_cuda() -> None:
    """Without a CUDA device the GPU benchmark exits with 2 and one line that names the dry run."""
    done = run("benchmarks.gpu")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "--dry-run" in done.stderr


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_agent_never_waits_for_the_device(tmp_path: Path) -> None:
    """On a CUDA device no variant of the agent waits more often for it than a bare step does."""
    path = tmp_path / "gpu.json"
    done = run("benchmarks.gpu", "--rounds", "1", "--json", path)
    assert done.returncode == 0, done.stderr
    for details in results_of(path)["details"].values():
        waits = details["host_waits_a_step"]
        assert all(count <= waits["bare step"] for name, count in waits.items() if name.startswith("agent"))


@pytest.mark.slow
def test_remote_write_pushes_all(quick: Quick) -> None:
    """The benchmark of remote write compares encoders of the same bytes, and pushes every sample of its runs."""
    _, path = quick("remote_write")
    for layers, pushed in results_of(path)["pushed"].items():
        assert pushed["samples"] >= 150_000 // (int(layers) + 13) * int(layers)


@pytest.mark.native
@pytest.mark.slow
def test_fleet_asks_every_panel_of_hosts_and_of_runs(tmp_path: Path, native_binary: Callable[[str], str]) -> None:
    """A dry run of the fleet scrapes its hosts, sends on what is reduced, and asks each panel of each store."""
    for name in ("prometheus", "victoria-metrics"):
        native_binary(name)
    path = tmp_path / "fleet.json"
    done = run("benchmarks.fleet", "--dry-run", "--mix", "one", "--json", path)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())["results"]["one"]
    stores = found["stores"]
    assert found["hosts_up"] == 3
    assert found["rules"]["failed"] == []
    assert 0 < stores["reduced, Prometheus"]["series"] < stores["as scraped"]["series"]
    assert stores["reduced, VictoriaMetrics"]["samples_per_second"] > 0
    assert all(not each["errors"] and stores.keys() <= each["seconds"].keys() for each in found["panels"])
    assert {each["dashboard"] for each in found["panels"]} == set(names())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_runs_by_the_one_command(name: str, quick: Quick) -> None:
    """The command that runs all that need no GPU can run each of them, and writes a file for it."""
    said, path = quick(name)
    assert [line for line in said.splitlines() if line.startswith("==")] == [f"== {name}"]
    assert json.loads(path.read_text())["benchmark"] == name


def test_all_benchmarks_run_in_turn(tmp_path: Path) -> None:
    """Without names it is all that need no GPU; those that are to run do so in their order, each with its file."""
    assert tuple(read_options([]).names) == NAMES == (
        "step_overhead", "parallel", "policies", "ring", "exposition", "ingest", "conditions", "remote_write",
    )  # fmt: skip
    done = run("benchmarks", "ring", "conditions", "--quick", "--json", tmp_path)
    assert done.returncode == 0, done.stderr
    headings = [line for line in done.stdout.splitlines() if line.startswith("==")]
    assert headings == ["== ring", "== conditions"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conditions.json", "ring.json"]


def test_each_benchmark_is_in_the_table() -> None:
    """The README says of each what it measures, and of each result that is kept what it was."""
    said = (ROOT / "benchmarks" / "README.md").read_text()
    assert [name for name in NAMES + BY_NAME if f"\n| `{name}` | " not in said] == []
    kept = sorted(path.name for path in (ROOT / "benchmarks" / "results" / "cpu-2core").glob("*.json"))
    assert [name for name in kept if f"(results/cpu-2core/{name})" not in said] == []


def test_an_unknown_benchmark_is_refused() -> None:
    """A benchmark that is not there is named in the error."""
    done = run("benchmarks", "speed")
    assert done.returncode == 2
    assert "no benchmark is called speed" in done.stderr
