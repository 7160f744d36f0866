"""Prometheus and VictoriaMetrics as processes of a benchmark: started, looked at, and asked as a dashboard asks."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from gradiometer_dashboards.evaluation import Prometheus

__all__ = ["Store", "prometheus", "shard_config", "victoria"]

ROOT = Path(__file__).parents[1]
RULES = ROOT / "dashboards" / "gradiometer_dashboards" / "alerts"
READY_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Store:
    """One that runs, at ``url``."""

    name: str
    url: str
    data: Path
    process: psutil.Process

    @property
    def api(self) -> Prometheus:
        return Prometheus(url=self.url, timeout_seconds=120)

    def number(self, expression: str) -> float:
        """Return the one number that a query gives, 0 without any."""
        found = self.api.ask("query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else 0.0

    def own(self, name: str) -> float:
        """Add up the series of one of the metrics that the store exports of itself."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            text = response.read().decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE))

    def get(self, path: str) -> Any:
        """Return the data of an answer of the API that takes no POST."""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}", timeout=60) as response:
            return json.load(response)["data"]

    @property
    def series(self) -> int:
        """Series that it holds now."""
        status = self.get("status/tsdb")
        return int(status["headStats"]["numSeries"] if "headStats" in status else status["totalSeries"])

    @property
    def memory(self) -> dict[str, int]:
        """Resident memory now, and at most since it began, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = {name: int(size) * 1024 for name, size in re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status, re.M)}
        return {"rss_bytes": found["VmRSS"], "peak_rss_bytes": found["VmHWM"]}

    @property
    def cpu_seconds(self) -> float:
        times = self.process.cpu_times()
        return float(times.user + times.system)

    @property
    def disk_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.data.rglob("*") if path.is_file())


@contextmanager
def _running(name: str, data: Path, command: list[str], port: int, ready: str) -> Iterator[Store]:
    path, url = shutil.which(command[0]), f"http://127.0.0.1:{port}"
    if path is None:
        raise SystemExit(f"{command[0]} is not installed: apt-get install {command[0]}")
    data.mkdir(parents=True)
    with (data.parent / f"{data.name}.log").open("w") as log:
        process = subprocess.Popen([path, *command[1:]], stdout=log, stderr=log, cwd=data.parent)
        try:
            _wait(f"{url}{ready}", process, Path(log.name))
            yield Store(name=name, url=url, data=data, process=psutil.Process(process.pid))
        finally:
            process.kill()
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise SystemExit(f"{url} does not answer; the end of its log:\n{log.read_text()[-2000:]}")


def _port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def prometheus(name: str, folder: Path, config: dict[str, Any] | None = None) -> Iterator[Store]:
    """Run a Prometheus with this configuration, which takes remote writes."""
    port, data = _port(), folder / name.replace(" ", "-")
    file = folder / f"{data.name}.yml"
    file.write_text(json.dumps(config or {"global": {}}))
    command = [
        "prometheus", f"--config.file={file}", f"--storage.tsdb.path={data}", "--web.enable-remote-write-receiver",
        f"--web.listen-address=127.0.0.1:{port}", "--query.timeout=2m", "--log.level=warn",
    ]  # fmt: skip
    with _running(name, data, command, port, "/-/ready") as store:
        yield store


@contextmanager
def victoria(name: str, folder: Path) -> Iterator[Store]:
    """Run a VictoriaMetrics."""
    port, data = _port(), folder / name.replace(" ", "-")
    command = [
        "victoria-metrics", f"-storageDataPath={data}", f"-httpListenAddr=127.0.0.1:{port}", "-loggerLevel=WARN",
        "-search.maxUniqueTimeseries=3000000", "-search.latencyOffset=1s",
    ]  # fmt: skip
    with _running(name, data, command, port, "/health") as store:
        yield store


def shard_config(
    targets: list[dict[str, Any]], interval: float, receivers: list[str], *, layers: bool
) -> dict[str, Any]:
    """Fill in ``deploy/fleet/prometheus-shard.yml``: whom it scrapes, how often, and to which URLs it sends.

    ``layers`` has it record those too, where every host exports those of its runs.
    """
    config: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "fleet" / "prometheus-shard.yml").read_text())
    every = f"{round(interval * 1000)}ms"
    config["global"] |= {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every}
    names = [path.name for path in RULES.glob("*.rules.yml") if layers or path.name != "fleet-layers.rules.yml"]
    config["rule_files"] = [str(RULES / name) for name in names]
    (job,) = config["scrape_configs"]
    del job["authorization"], job["file_sd_configs"]
    job["static_configs"] = targets
    form = {key: config["remote_write"][0][key] for key in ("queue_config", "write_relabel_configs")}
    if layers:
        names_of_layers = "gradiometer_(?:layer_[a-z_]+|series_omitted);.+"
        recorded = {"source_labels": ["__name__", "run_id"], "regex": names_of_layers, "action": "drop"}
        form["write_relabel_configs"] = [form["write_relabel_configs"][0], recorded, *form["write_relabel_configs"][1:]]
    config["remote_write"] = [{"url": url, **form} for url in receivers]
    return config
