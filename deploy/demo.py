"""A job that trains for ever, with an incident now and then: the demo of the stack.

The model, the text and the policy are those of ``gradiometer demo``. Incidents are put in on purpose, one after the
other, and said on stdout: a loss that is scaled up, so that the gradient spikes and is clipped, and one that is
infinite, so that the step is skipped. After ``--steps`` the run ends and the next one begins; of its own runs that are
over, it keeps the newest few.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from gradiometer.demo import DEFAULT_POLICY, LEARNING_RATE, CharLSTM, Text, loss_of, read_text, windows
from gradiometer.prune import find_stored, remove
from gradiometer.records import default_root
from gradiometer.session import attach

PREFIX = "stack-demo-"
"""Begins the ids of the demo's runs."""
OWN = re.compile(rf"{PREFIX}\d{{8}}-\d{{6}}-\d+")
"""Ids that the demo makes; nothing else is ever removed, also not ``stack-demo-mine``."""
KEPT_RUNS = 2
"""How many of its runs that are over the demo keeps."""
RING_BYTES = 16 * 2**20
INCIDENTS = (("a gradient spike", 1000.0), ("a gradient that is not finite", float("inf")))
"""What is said of each, and by what the loss of that step is multiplied."""


def main() -> None:
    """Train one run after the other until SIGTERM or SIGINT."""
    options = _options()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    root, text = default_root(options.dir), read_text()
    incidents = itertools.cycle(INCIDENTS)
    for seed in itertools.count():
        _forget_old(root)
        _train(root, text, seed, options, incidents)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small model for ever, with an incident now and then.")
    parser.add_argument("--dir", type=Path, help="where runs live; the user's state directory unless given")
    parser.add_argument("--steps", type=int, default=20_000, help="steps of a run, after which the next begins")
    parser.add_argument(
        "--pause", type=float, default=0.05, help="seconds between two steps, to leave the CPU to others"
    )
    parser.add_argument("--incident-every", type=float, default=60.0, help="seconds between two incidents")
    return parser.parse_args()


def _train(
    root: Path, text: Text, seed: int, options: argparse.Namespace, incidents: Iterator[tuple[str, float]]
) -> None:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = CharLSTM(len(text.vocabulary))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    run_id = f"{PREFIX}{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{seed}"
    labels = {"job": "stack-demo"}
    with attach(
        model, optimizer, policy=DEFAULT_POLICY, run_id=run_id, dir=root, labels=labels, ring_bytes=RING_BYTES
    ) as agent:
        print(f"{run_id}: {options.steps} steps", flush=True)
        incident_at = time.monotonic() + options.incident_every
        for step in range(options.steps):
            optimizer.zero_grad()
            loss = loss_of(model, windows(text.train, generator, torch.device("cpu")))
            agent.log(loss=loss)
            if time.monotonic() >= incident_at:
                said, factor = next(incidents)
                print(f"{run_id}: step {step} has {said}, on purpose", flush=True)
                incident_at, loss = time.monotonic() + options.incident_every, loss * factor
            loss.backward()  # type: ignore[no-untyped-call]  # torch
            optimizer.step()
            time.sleep(options.pause)


def _forget_old(root: Path) -> None:
    """Remove the demo's own runs that are over, but for the newest."""
    with contextlib.suppress(FileNotFoundError):
        own = [each for each in find_stored(root) if OWN.fullmatch(each.run_id) and not each.rank]
        over = sorted((each for each in own if each.removable), key=lambda each: each.ended)
        remove(root, over[:-KEPT_RUNS])


if __name__ == "__main__":
    main()
