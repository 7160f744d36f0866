"""The demo: a deep LSTM learns the source text of Python's standard library, byte by byte, under the agent's eyes.

The case where clipping is known to matter: plain SGD at a learning rate of 20, as in word-level LSTM language models
since Zaremba, Sutskever and Vinyals (2014). With its gradients clipped the model trains; without, it diverges in a few
steps. The text is read from this machine and split 9 to 1; nothing is made up.
"""

from __future__ import annotations

import contextlib
import math
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from gradiometer.policy.spec import PolicySource
from gradiometer.records import default_root
from gradiometer.report import draw
from gradiometer.run import open_run
from gradiometer.session import Agent, attach
from gradiometer.tail import RankTail

__all__ = ["DEFAULT_POLICY", "CharLSTM", "DemoError", "DemoSettings", "Text", "read_text", "run_demo"]

DEFAULT_POLICY: PolicySource = {"pipeline": [{"nonfinite": {"action": "skip"}}, {"global_norm": {"max_norm": 0.2}}]}
TEXT_BYTES = 8 * 2**20
LEARNING_RATE = 20.0
BATCH, LENGTH = 32, 64
MONITOR_SECONDS = 60.0
"""How long the monitor may take to start."""
SCRAPE_SECONDS = 20.0
"""How long it may take to have read the last step; it is scraped then, or as it is."""


class DemoError(RuntimeError):
    """The demo cannot run; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSettings:
    """What ``gradiometer demo`` was asked for; ``port`` None is 9477, or a free port if that is taken."""

    steps: int = 600
    run_id: str | None = None
    root: Path | None = None
    policy: PolicySource | None = None
    port: int | None = None
    serve: bool = True
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Text:
    """Bytes of text as indices into ``vocabulary``; int64 on the CPU."""

    vocabulary: list[int]
    train: Tensor
    held_out: Tensor


def read_text(folder: Path | None = None, limit: int = TEXT_BYTES) -> Text:
    """Read up to ``limit`` bytes of the standard library's own ``.py`` files; the last tenth is held out.

    Raises DemoError where the interpreter has no sources.
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    raw = bytearray()
    for path in sorted(folder.glob("*.py")):
        raw += path.read_bytes()
    if len(raw) < 100_000:
        raise DemoError(f"{folder} holds {len(raw)} bytes of .py files, too few to train on: use a Python with sources")
    raw = raw[:limit]
    vocabulary = sorted(set(raw))
    place = torch.zeros(256, dtype=torch.int64)
    place[vocabulary] = torch.arange(len(vocabulary))
    indices = place[torch.frombuffer(raw, dtype=torch.uint8).long()]
    split = len(indices) * 9 // 10
    return Text(vocabulary, indices[:split], indices[split:])


class CharLSTM(nn.Module):
    """A language model over ``symbols`` characters: an embedding, ``depth`` LSTM layers, a linear head."""

    def __init__(self, symbols: int, width: int = 128, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(symbols, width // 2)
        self.lstm = nn.LSTM(width // 2, width, depth, batch_first=True)
        self.head = nn.Linear(width, symbols)

    def forward(self, text: Tensor) -> Tensor:
        """Predict the next characters' logits, float [B, T, symbols], from int64 [B, T]."""
        hidden, _ = self.lstm(self.embed(text))
        logits: Tensor = self.head(hidden)
        return logits


def windows(text: Tensor, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw a batch of windows and the same one character on, int64 [BATCH, LENGTH] each."""
    starts = torch.randint(len(text) - LENGTH - 1, (BATCH,), generator=generator)
    drawn = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()]).to(device)
    return drawn[:, :-1], drawn[:, 1:]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean cross-entropy in nats per character."""
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def run_demo(settings: DemoSettings, console: Console) -> int:
    """Train, serve and sum up; return the exit status: 130 after Ctrl-C, else 0.

    Raises DemoError if the device, the text or the monitor is not to be had, and SystemExit at SIGTERM.
    """
    with _exit_at_sigterm():
        return _run(settings, console)


@contextlib.contextmanager
def _exit_at_sigterm() -> Iterator[None]:
    """Unwind the stack at SIGTERM, which would otherwise leave the monitor behind."""

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(settings: DemoSettings, console: Console) -> int:
    device = _device(settings.device)
    torch.manual_seed(settings.seed)
    torch.set_num_threads(1)  # the model is small: more threads wait for each other, and on a busy machine for long
    torch.set_flush_denormal(True)  # the gradients of a run that diverged are full of them, and seven times slower
    text = read_text()
    root = default_root(settings.root)
    model = CharLSTM(len(text.vocabulary)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, fused=device.type in ("cpu", "cuda"))
    status, held_out = 0, math.nan
    with contextlib.ExitStack() as stack:
        # First the monitor, so that where its port is taken no empty run is left behind.
        monitor = stack.enter_context(_monitor(root, settings.port, console)) if settings.serve else None
        agent = stack.enter_context(
            attach(model, optimizer, policy=settings.policy, run_id=settings.run_id, dir=root, labels={"job": "demo"})
        )
        _introduce(console, text, model, agent, monitor)
        try:
            _train(model, optimizer, agent, text, settings, console)
        except KeyboardInterrupt:
            status = 130
            console.print("[yellow]stopped by Ctrl-C[/yellow]; what was recorded so far:")
        agent.flush()
        held_out = _held_out_loss(model, text, settings.seed, device)
        if monitor is not None:
            _show_scrape(monitor, agent, console)
    draw(open_run(agent.path), console)
    console.print(f"held-out loss: [bold]{held_out:.3f}[/bold] nats per character ({_verdict(held_out, text)})")
    console.print(f"look again:    gradiometer show {agent.run_id} --dir {root}", soft_wrap=True)
    console.print(f"serve it:      gradiometer monitor --dir {root}", soft_wrap=True)
    if settings.policy is not None:
        console.print("without clipping the same run diverges:  gradiometer demo --policy none")
    return status


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DemoError("--device is 'cuda', but torch sees no CUDA device: use --device cpu or auto")
    return torch.device(name)


def _introduce(console: Console, text: Text, model: nn.Module, agent: Agent, monitor: str | None) -> None:
    size = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"training a 3-layer LSTM of {size:,} parameters on {len(text.train):,} characters "
        "of the Python standard library's source"
    )
    console.print(f"recording to   {agent.path}", soft_wrap=True)
    if monitor is not None:
        console.print(f"metrics        {monitor}/metrics")
        console.print(f"runs           {monitor}/api/v1/runs")


def _train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    agent: Agent,
    text: Text,
    settings: DemoSettings,
    console: Console,
) -> None:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(settings.seed)
    with _Watcher(agent, console, settings.steps) as watcher:
        for _ in range(settings.steps):
            optimizer.zero_grad()
            loss = loss_of(model, windows(text.train, generator, device))
            loss.backward()  # type: ignore[no-untyped-call]  # torch
            agent.log(loss=loss)
            optimizer.step()
            watcher.advance()


class _Watcher:
    """The progress bar; reads the run back from its ring, as any other reader would."""

    def __init__(self, agent: Agent, console: Console, steps: int) -> None:
        self._tail = RankTail(Path(agent.path))
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
        )
        self._task: TaskID = self._bar.add_task("train", total=steps, state="")
        self._shown = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._describe()
        self._bar.stop()
        self._tail.close()

    def advance(self) -> None:
        self._bar.advance(self._task)
        if time.monotonic() - self._shown > 0.25:
            self._shown = time.monotonic()
            self._describe()

    def _describe(self) -> None:
        self._tail.poll()
        row = self._tail.newest()
        if row is None:
            return
        status, summary = self._tail.summary.status, self._tail.summary
        clips = int(self._tail.clip_events.max()) / max(1, int(status["steps"]))
        norm = float(row["grad_norm_preclip"])
        ratio = norm / summary.grad_norm_baseline
        state = f"loss {row['loss']:.3f}  norm {norm:.3g} ({ratio:.1f}x its median)  clipped {clips:.0%}"
        self._bar.update(self._task, state=state)


def _held_out_loss(model: nn.Module, text: Text, seed: int, device: torch.device) -> float:
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        losses = [float(loss_of(model, windows(text.held_out, generator, device))) for _ in range(8)]
    return sum(losses) / len(losses)


def _verdict(loss: float, text: Text) -> str:
    uniform = math.log(len(text.vocabulary))
    if loss < uniform:
        return f"guessing blindly gives {uniform:.2f}"
    return f"diverged: guessing blindly gives {uniform:.2f}"


@contextlib.contextmanager
def _monitor(root: Path, port: int | None, console: Console) -> Iterator[str]:
    """Run the monitor as a process of its own, out of reach of the terminal's Ctrl-C; yield its URL."""
    with tempfile.TemporaryDirectory() as folder:
        port_file, log = Path(folder) / "port", Path(folder) / "log"
        wanted = _free_or(9477, console) if port is None else port
        command = [sys.executable, "-m", "gradiometer_monitor", "--dir", str(root), "--port", str(wanted)]
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [*command, "--port-file", str(port_file)], stdout=sink, stderr=sink, start_new_session=True
            )
        try:
            yield f"http://127.0.0.1:{_await_port(process, port_file, log)}"
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def _free_or(port: int, console: Console) -> int:
    """Return ``port`` if nobody listens there, else 0: any free one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            console.print(f"port {port} is taken; the monitor takes a free one")
            return 0
    return port


def _await_port(process: subprocess.Popen[bytes], port_file: Path, log: Path) -> int:
    deadline = time.monotonic() + MONITOR_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if port_file.exists() and (text := port_file.read_text().strip()):
            return int(text)
        time.sleep(0.05)
    raise DemoError(f"the monitor did not start:\n{log.read_text()}(--no-serve trains without it)")


def _show_scrape(url: str, agent: Agent, console: Console) -> None:
    """Scrape the monitor as Prometheus would, once it has read the last step, and say what it found of this run."""
    steps, deadline = int(open_run(agent.path).status["steps"]), time.monotonic() + SCRAPE_SECONDS
    try:
        lines = _scrape(url)
        while _steps_told(lines, agent.run_id) < steps and time.monotonic() < deadline:
            time.sleep(0.1)
            lines = _scrape(url)
    except OSError as error:
        console.print(f"[yellow]the monitor could not be scraped: {error}[/yellow]")
        return
    mine = [line for line in lines if f'run_id="{agent.run_id}"' in line]
    console.print(f"scraped {url}/metrics: {len(mine)} series of this run, among them")
    for wanted in ("steps_total", "clip_events_total", "grad_norm_window_max", "grad_norm_baseline"):
        for line in mine:
            if line.startswith(f"gradiometer_{wanted}{{"):
                console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _scrape(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:  # noqa: S310 - our own http URL
        text: str = response.read().decode()
        return text.splitlines()


def _steps_told(lines: Sequence[str], run_id: str) -> float:
    """Return the steps that a scrape has of a run; -1 where it does not know the run."""
    name = f'gradiometer_steps_total{{run_id="{run_id}"}} '
    return next((float(line.removeprefix(name)) for line in lines if line.startswith(name)), -1.0)
