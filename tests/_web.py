"""Tokens, raw connections and a job that trains, for tests of the HTTP server."""

from __future__ import annotations

import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from fastapi import FastAPI

from gradiometer_monitor.config.settings import Settings
from gradiometer_monitor.exposition.exposition import Exposition
from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.services import Context
from gradiometer_monitor.store import Store
from gradiometer_monitor.web.app import app
from tests._monitor import Monitor

READ, WRITE = "a-token-of-a-reader-0123456789-ABCDEF", "a-token-of-a-writer-9876543210-FEDCBA"
AS_READER, AS_WRITER = ({"Authorization": f"Bearer {token}"} for token in (READ, WRITE))


def write_tokens(path: Path, *lines: str) -> Path:
    """Write a file of tokens with mode 600, of a reader and a writer unless told otherwise; return its path."""
    text = "\n".join(lines or (f"read prometheus {READ}", f"write oncall {WRITE}")) + "\n"
    temporary = path.with_name(f"{path.name}.new")
    temporary.touch(0o600)
    temporary.write_text(text)
    temporary.replace(path)
    return path


def write_config(path: Path, **settings: Any) -> str:
    """Write settings as YAML; return the path as text."""
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def replace_config(path: Path, text: str) -> None:
    """Put another config in the place of one that a monitor may be reading: it is there whole, or not at all."""
    new = path.with_name(f"{path.name}.new")
    new.write_text(text)
    new.replace(path)


def with_tokens(directory: Path) -> tuple[str, str]:
    """Write tokens of a reader and a writer, and a config that names them; return the option that names the config."""
    tokens = write_tokens(directory / "tokens")
    return "--config", write_config(directory / "monitor.yaml", auth={"tokens_file": str(tokens)})


@contextmanager
def made_app(root: Path) -> Iterator[FastAPI]:
    """Make the application with default settings, to ask it for its routes and its document."""
    runs, store = Runs(root, retention_seconds=900), Store(None)
    context = Context(runs=runs, events=Events(runs, store), store=store)
    try:
        yield app(context, Exposition(runs, series_budget=10_000), Settings(root=root))
    finally:
        store.close()


def send(
    monitor: Monitor, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Send a request with a JSON body: status, body and headers of the answer."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    given = {name.replace("_", "-").lower(): value for name, value in headers.items()}
    if data is not None:
        given.setdefault("content-type", "application/json")
    request = urllib.request.Request(monitor.url + path, data=data, headers=given, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read() or b"{}"), dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"{}"), dict(error.headers)


def connect(monitor: Monitor) -> socket.socket:
    """Open a connection and say nothing."""
    host, port = monitor.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def read_to_end(connection: socket.socket) -> bytes:
    """Read until the other side closes, in order or not."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionError:
        pass
    return b"".join(parts)


def logged(monitor: Monitor, text: str) -> Callable[[], bool]:
    """Make a check whether the monitor has logged ``text`` by now; what it reads is not in its output at the end."""
    assert monitor.process.stderr is not None
    descriptor, seen = monitor.process.stderr.fileno(), bytearray()
    os.set_blocking(descriptor, False)

    def check() -> bool:
        with suppress(BlockingIOError):
            seen.extend(os.read(descriptor, 2**20))
        return text.encode() in seen

    return check


JOB = """
import sys, time, torch, gradiometer

model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
policy = [{"nonfinite": {}}, {"global_norm": {"max_norm": 5.0}}]
with gradiometer.attach(model, optimizer, policy=policy, dir=sys.argv[1], run_id="job", ring_bytes=2**20):
    print("attached", flush=True)
    while True:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0.01)
"""
"""Trains under a policy until it is killed."""
