"""Take the pictures of docs/dashboards.md: two ranks train a small transformer, and Prometheus watches it.

    pip install 'gradiometer[torch,monitor,plot]'              # and Debian's prometheus
    python examples/dashboard_pictures.py [FOLDER] [MINUTES]   # default: docs/images, 8 minutes

What is shown is real: the model learns the source text of Python's standard library; the monitor, Prometheus and the
alert rules are those that we ship. Some batches have a loss that is scaled up, and some a loss of NaN, so that there is
something to see. The panels are drawn by matplotlib from what their own queries return: Grafana's drawing differs.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gradiometer
import gradiometer_dashboards
from gradiometer.demo import loss_of, read_text, windows
from gradiometer_dashboards.drawing import draw
from gradiometer_dashboards.evaluation import Prometheus, View

RUN, RANKS, WIDTH = "2026-11-23-transformer", 2, 48
SCRAPE_SECONDS, STEP_SECONDS = 5, 0.12
SPIKES = {500: 40.0, 1100: 15.0, 1500: 25.0, 2300: 80.0}
"""By which factor the loss of a step is scaled, by its place in a cycle."""
BAD, CYCLE = 1900, 2600
"""Place of the step whose loss is NaN on one rank, and after how many steps all begins anew."""
POLICY = {
    "pipeline": [{"nonfinite": {"action": "skip"}}, {"global_norm": {"max_norm": 1.0}}],
    "shadow": [{"zclip": {}}],
}
HEIGHTS = {"run": 36, "layers": 34, "ranks": 34, "fleet": 36, "monitor": 30}
"""Rows of the grid that a picture has: the first screens."""


class Transformer(nn.Module):
    """A language model over ``symbols`` characters."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, symbols)

    def forward(self, text: Tensor) -> Tensor:
        x = self.embed(text)
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        out: Tensor = self.head(x)
        return out


def train(root: Path, rank: int, port: int) -> None:
    """Train one rank until stopped."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    text, generator = read_text(), torch.Generator().manual_seed(rank)
    model = DistributedDataParallel(Transformer(len(text.vocabulary)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=100_000, pct_start=0.005)
    with gradiometer.attach(model, optimizer, policy=POLICY, run_id=RUN, dir=root, updates_every=20) as agent:
        for step in range(100_000):
            began = time.monotonic()
            loss = loss_of(model, windows(text.train, generator, torch.device("cpu")))
            optimizer.zero_grad()
            place = step % CYCLE
            factor = float("nan") if place == BAD and rank == 1 else SPIKES.get(place, 1.0)
            (loss * factor).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            agent.log(loss=loss)
            schedule.step()
            time.sleep(max(0.0, STEP_SECONDS - (time.monotonic() - began)))


@contextmanager
def running(*command: object) -> Iterator[None]:
    """Run a program until the block ends."""
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def configure(folder: Path, monitor: int) -> Path:
    """Write the configuration of a Prometheus that scrapes the monitor and evaluates our rules."""
    rules = Path(gradiometer_dashboards.__file__).parent / "alerts" / "gradiometer.rules.yml"
    target = {"job_name": "gradiometer", "static_configs": [{"targets": [f"127.0.0.1:{monitor}"]}]}
    every = {"scrape_interval": f"{SCRAPE_SECONDS}s", "evaluation_interval": f"{SCRAPE_SECONDS}s"}
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump({"global": every, "rule_files": [str(rules)], "scrape_configs": [target]}))
    return file


def take(url: str, folder: Path, began: float) -> None:
    """Draw every dashboard over the time since ``began``."""
    for name in gradiometer_dashboards.names():
        view = View(
            dashboard=gradiometer_dashboards.load(name), prometheus=Prometheus(url=url), start=began, end=time.time(),
            chosen={"run_id": RUN}, scrape_interval=SCRAPE_SECONDS,
        )  # fmt: skip
        draw(view, folder / f"dashboard-{name}.png", unfold=False, rows=HEIGHTS.get(name))


def main(folder: Path, minutes: float) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        home, monitor, prometheus, meeting = Path(temporary), free_port(), free_port(), free_port()
        os.environ["GRADIOMETER_STATE_DIR"] = str(home / "state")
        demo = (sys.executable, "-m", "gradiometer.cli", "demo", "--no-serve", "--steps", "100", "--dir", home / "runs")
        url, began = f"http://127.0.0.1:{prometheus}", time.time()
        with (
            running(sys.executable, "-m", "gradiometer_monitor", "--dir", home / "runs", "--port", monitor),
            running(
                shutil.which("prometheus") or "prometheus", f"--config.file={configure(home, monitor)}",
                f"--storage.tsdb.path={home}/tsdb", f"--web.listen-address=127.0.0.1:{prometheus}",
            ),
            running(sys.executable, __file__, "--train", home / "runs", 0, meeting),
            running(sys.executable, __file__, "--train", home / "runs", 1, meeting),
        ):  # fmt: skip
            subprocess.run([str(part) for part in (*demo, "--run-id", "2026-11-23-lstm")], check=True)
            while (left := began + 60 * minutes - time.time()) > 0:
                print(f"{left:.0f} s to go", flush=True)
                time.sleep(min(60.0, left))
            take(url, folder, began)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:
        train(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        chosen = sys.argv[1:3]
        main(Path(chosen[0]) if chosen else Path("docs/images"), float(chosen[1]) if len(chosen) > 1 else 8.0)
