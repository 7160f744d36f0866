"""Samples of sharded parameters, in real processes over gloo: those of the whole, added up over the ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch.optim import SGD

import gradiometer
from gradiometer.insight import Samples
from tests._training import attach, backward, batch, small_model
from tests.test_bad_rank import launch

pytestmark = pytest.mark.slow
"""All of them together take long: the wheel's tests leave them out."""

SHARDED = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tests._training import batch, small_model
from gradiometer.updates import Sampler

class Poor(Sampler):
    reads = 0
    def read(self, tensors):
        Poor.reads += 1
        if FAILS == "samples" and rank == 1 and Poor.reads == 5:
            raise MemoryError
        return super().read(tensors)

measured, measure = [], gradiometer.norms.Meter.__call__
def poor(self, gradients):
    measured.append(1)
    if FAILS == "norms" and rank == 1 and len(measured) == 5:
        raise MemoryError
    return measure(self, gradients)

gradiometer.updates.Sampler = Poor
gradiometer.norms.Meter.__call__ = poor
model = fully_shard(small_model(), mesh=init_device_mesh("cpu", (world,)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
with gradiometer.attach(model, optimizer, dir=root, updates_every=2, cosine=not FAILS) as agent:
    for step in range(7):
        optimizer.zero_grad()
        model(batch(step).chunk(world)[rank]).square().mean().backward()
        optimizer.step()
    assert agent.errors == bool(FAILS and rank == 1), agent.errors
"""


def samples_of(run: Path, rank: int) -> Samples:
    samples = gradiometer.open_run(run, rank).samples
    assert samples is not None
    return samples


def test_ratios_and_cosines_are_those_of_the_whole(tmp_path: Path) -> None:
    """Under FSDP2 every rank records the update ratios and cosines of the same training in one process."""
    run = launch(tmp_path / "sharded", "FAILS = None\n" + SHARDED, 2)
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.05)
    with attach(tmp_path / "whole", model, optimizer, updates_every=2, cosine=True) as agent:
        for step in range(7):
            optimizer.zero_grad()
            backward(model(batch(step)).square().mean())
            optimizer.step()
    wanted = samples_of(agent.path, 0)
    for rank in range(2):
        found = samples_of(run, rank)
        assert found.steps.tolist() == [0, 2, 4, 6]
        np.testing.assert_allclose(found.weight_norms, wanted.weight_norms, rtol=1e-5)
        np.testing.assert_allclose(found.update_ratio, wanted.update_ratio, rtol=1e-3)
        np.testing.assert_allclose(found.total_cosine, wanted.total_cosine, atol=1e-4)
        np.testing.assert_allclose(found.cosine, wanted.cosine, atol=1e-4)


@pytest.mark.parametrize("what", ["samples", "norms"])
def test_a_rank_that_cannot_sample_keeps_nobody_waiting(tmp_path: Path, what: str) -> None:
    """When one rank fails in a sampled step, the other records that it is unknown, and both sample on, in phase."""
    run = launch(tmp_path, f"FAILS = {what!r}\n" + SHARDED, 2)
    assert len(samples_of(run, 1)) == 3
    found = samples_of(run, 0)
    assert found.steps.tolist() == [0, 2, 4, 6]
    assert np.isfinite(found.update_ratio).all(axis=1).tolist() == [True, True, False, True]


def test_ranks_that_sample_unlike_are_refused(tmp_path: Path) -> None:
    """Where samples are added up over the ranks, a rank that samples in other steps is refused at attach, on all."""
    body = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tests._training import small_model
model = fully_shard(small_model(), mesh=init_device_mesh("cpu", (world,)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
try:
    gradiometer.attach(model, optimizer, dir=root, updates_every=10 * rank)
except ValueError as error:
    assert "updates_every=0" in str(error) and "updates_every=10" in str(error), error
else:
    raise AssertionError("attached")
gradiometer.attach(model, optimizer, dir=root).detach()
"""
    assert samples_of(launch(tmp_path, body, 2), 0).steps.tolist() == []
