"""What is worked out from recorded norms: the gradient noise scale and shares of the squared norm, on known answers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, Optimizer

import gradiometer
from gradiometer.exporter import collector
from gradiometer.insight import (
    MIN_STEPS,
    SETTLING,
    NoiseAverage,
    noise_scale,
    noise_terms,
    rank_ratios,
    replicas,
    shares,
)
from gradiometer.records import Flag
from gradiometer_monitor.exposition.exposition import Exposition
from gradiometer_monitor.following.runs import Runs
from tests._training import attach, backward, loss_of, small_model, train

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, WriteRun

WIDTH, NOISE, DISTANCE = 20, 0.5, 1.5
"""Inputs of the linear regression, standard deviation of its targets' noise, how far the weights are from the truth."""
SAMPLES = 4
"""Samples of a micro-batch."""
VARIANCE = (WIDTH + 1) * DISTANCE**2 + WIDTH * NOISE**2
"""Trace of the covariance of one sample's gradient: for x ~ N(0, I) and residual x·δ - η it is
E|x|²(x·δ - η)² - |δ|² = (d + 2)|δ|² + d τ² - |δ|²."""
SCALE = VARIANCE / DISTANCE**2 / SAMPLES
"""The noise scale in micro-batches: the true gradient is δ."""


class Regression:
    """Linear regression on endless random data, at weights that a learning rate of 0 keeps where they are."""

    def __init__(self, seed: int = 0) -> None:
        self.model = nn.Linear(WIDTH, 1, bias=False)
        with torch.no_grad():
            self.model.weight.fill_(DISTANCE / math.sqrt(WIDTH))  # the truth is 0
        self.optimizer = SGD(self.model.parameters(), lr=0.0)
        self._generator = torch.Generator().manual_seed(seed)

    def loss(self) -> Tensor:
        inputs = torch.randn(SAMPLES, WIDTH, generator=self._generator)
        targets = NOISE * torch.randn(SAMPLES, 1, generator=self._generator)
        loss: Tensor = 0.5 * (self.model(inputs) - targets).square().mean()
        return loss

    def train(self, steps: int, microbatches: int, divisor: float) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad()
            for _ in range(microbatches):
                backward(self.loss() / divisor)
            self.optimizer.step()


@pytest.mark.parametrize(("microbatches", "divisor"), [(2, 1.0), (4, 4.0), (12, 3.0)])
def test_the_noise_scale_of_linear_regression(tmp_path: Path, microbatches: int, divisor: float) -> None:
    """Whatever the loss is divided by, and beyond the micro-batches that are kept, it is tr(Σ)/|G|² within a tenth."""
    case = Regression()
    with attach(tmp_path, case.model, case.optimizer, backward="every") as agent:
        case.train(500, microbatches, divisor)
    found = gradiometer.open_run(agent.path).noise_scale()
    unit = (microbatches / divisor) ** 2
    assert found.steps == 500 - SETTLING
    assert found.scale == pytest.approx(SCALE, rel=0.1)
    assert found.signal == pytest.approx(DISTANCE**2 * unit, rel=0.1)
    assert found.noise == pytest.approx(VARIANCE / SAMPLES * unit, rel=0.1)


def test_the_terms_are_unbiased(tmp_path: Path) -> None:
    """Over 2000 steps the mean of each step's |G|² and tr(Σ) is the truth within three standard errors of its own."""
    case = Regression(seed=1)
    with attach(tmp_path, case.model, case.optimizer, backward="every") as agent:
        case.train(2000, 2, 2.0)
    run = gradiometer.open_run(agent.path)
    for terms, truth in zip(noise_terms(run.rows, 1), (DISTANCE**2, VARIANCE / SAMPLES), strict=True):
        known = terms[~np.isnan(terms)]
        assert abs(known.mean() - truth) < 3 * known.std() / math.sqrt(len(known))


def test_a_loss_scale_is_divided_out(tmp_path: Path) -> None:
    """Under a GradScaler the noise scale is the same, from the norms in the loss's own units."""
    case, scaler = Regression(), GradScaler("cpu", init_scale=1024.0)
    with attach(tmp_path, case.model, case.optimizer, backward="every") as agent:
        for _ in range(400):
            case.optimizer.zero_grad()
            for _ in range(4):
                backward(scaler.scale(case.loss() / 4))
            scaler.step(case.optimizer)
            scaler.update()
    found = gradiometer.open_run(agent.path).noise_scale()
    assert found.scale == pytest.approx(SCALE, rel=0.15)
    assert found.signal == pytest.approx(DISTANCE**2, rel=0.15)


def test_one_micro_batch_a_step_says_nothing(tmp_path: Path) -> None:
    """With N = 1 the small batch is the large one: there is no estimate, and no sample is exported."""
    case = Regression()
    with attach(tmp_path, case.model, case.optimizer, backward="every") as agent:
        case.train(50, 1, 1.0)
    found = gradiometer.open_run(agent.path).noise_scale()
    assert (found.steps, math.isnan(found.scale)) == (0, True)
    assert exported(agent.path, "gradiometer_grad_noise_scale") is None


def test_steps_without_hooks_say_nothing(tmp_path: Path) -> None:
    """In mode auto only the armed steps count, and too few of them are no estimate."""
    case = Regression()
    with attach(tmp_path, case.model, case.optimizer) as agent:
        case.train(301, 2, 1.0)
    found = gradiometer.open_run(agent.path).noise_scale()
    assert found.steps == 3 < MIN_STEPS
    assert math.isnan(found.scale)


def test_bad_steps_are_left_out(tmp_path: Path) -> None:
    """Non-finite and skipped steps are no part of the estimate, and leave it finite."""
    case = Regression()
    with attach(tmp_path, case.model, case.optimizer, backward="every", policy=["nonfinite"]) as agent:
        for step in range(60):
            case.optimizer.zero_grad()
            for _ in range(2):
                backward(case.loss() * (math.nan if step % 10 == 5 else 1.0))
            case.optimizer.step()
    found = gradiometer.open_run(agent.path).noise_scale()
    assert found.steps == 60 - 6 - SETTLING
    assert math.isfinite(found.scale)


def test_gradients_of_another_loss_are_not_mixed_in(tmp_path: Path) -> None:
    """Where a step's backward passes also reach parameters that it does not use, as in a GAN, it says nothing."""
    model = small_model()
    halves: list[Optimizer] = [SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)]
    with attach(tmp_path, model, halves, together=False, backward="every") as agent:
        for step in range(20):
            for optimizer in halves:
                model.zero_grad()
                backward(loss_of(model, step))
                backward(loss_of(model, step + 100))
                optimizer.step()
    assert gradiometer.open_run(agent.path).noise_scale().steps == 0


def exported(path: Path, name: str, **labels: str) -> float | None:
    """Read one sample of the in-process exporter."""
    registry = CollectorRegistry()
    registry.register(made := collector(path))
    value = registry.get_sample_value(name, {"run_id": path.parent.name} | labels)
    made.close()
    return value


def test_the_exported_noise_scale(tmp_path: Path) -> None:
    """The exporter and the monitor give the running averages' ratio, near the truth after some hundred steps."""
    case = Regression()
    with attach(tmp_path, case.model, case.optimizer, backward="every") as agent:
        case.train(400, 8, 8.0)
    value = exported(agent.path, "gradiometer_grad_noise_scale")
    assert value == pytest.approx(SCALE, rel=0.35)
    runs = Runs(tmp_path, retention_seconds=1e12)
    runs.poll()
    text = Exposition(runs, series_budget=100).render().decode()
    runs.close()
    assert f'gradiometer_grad_noise_scale{{run_id="{agent.run_id}"}} {value!r}' in text


def test_running_averages_follow(tmp_path: Path) -> None:
    """Fed one row at a time or all at once the running averages are the same, each a twentieth nearer to the newest."""
    case = Regression()
    with attach(tmp_path, case.model, case.optimizer, backward="every") as agent:
        case.train(60, 2, 1.0)
    rows = gradiometer.open_run(agent.path).rows
    whole, single = NoiseAverage(), NoiseAverage()
    whole.update(rows, 1)
    for place in range(len(rows)):
        single.update(rows[place : place + 1], 1)
    signal, _ = noise_terms(rows, 1)
    weights = 0.95 ** np.arange(60 - SETTLING)[::-1]
    assert whole.terms == pytest.approx(single.terms)
    assert whole.terms[0] == pytest.approx(float(np.average(signal[SETTLING:], weights=weights)))
    assert noise_scale([whole, single]).scale == pytest.approx(noise_scale([whole]).scale)
    assert math.isnan(noise_scale([]).scale)


def test_unknown_replicas_say_nothing(tmp_path: Path) -> None:
    """In a distributed job whose number of averaged ranks is not known there is no estimate rather than a wrong one."""
    case = Regression()
    with attach(tmp_path, case.model, case.optimizer, backward="every") as agent:
        case.train(40, 2, 1.0)
    run = gradiometer.open_run(agent.path)
    assert not np.isnan(noise_terms(run.rows, replicas(run.manifest))[0]).all()
    alone = run.manifest.model_copy(update={"world_size": 8, "data_parallel": None})
    assert np.isnan(noise_terms(run.rows, replicas(alone))[0]).all()


def test_shares_by_hand() -> None:
    """Norms of 3, 4 and 12 have 9, 16 and 144 parts in 169; a bad or empty step has none."""
    found = shares(np.array([[3.0, 4.0, 12.0], [math.nan, 1.0, 1.0], [0.0, 0.0, 0.0], [math.inf, 1.0, 1.0]]))
    np.testing.assert_allclose(found[0], [9 / 169, 16 / 169, 144 / 169])
    assert np.isnan(found[1:]).all()


def test_shares_of_a_run(tmp_path: Path) -> None:
    """The shares of a run's layers are those of gradients of known norms, and sum to one."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    optimizer = SGD(model.parameters(), lr=0.1)
    with attach(tmp_path, model, optimizer) as agent:
        for parameter, value in zip(model.parameters(), (1.0, 2.0, 2.0, 4.0), strict=True):
            parameter.grad = torch.full_like(parameter, value)
        optimizer.step()
    np.testing.assert_allclose(gradiometer.open_run(agent.path).layer_shares(), [[5 / 25, 20 / 25]], rtol=1e-6)


def test_samples_are_exported(tmp_path: Path) -> None:
    """Exporter and monitor give each layer's newest sampled weight norm, ratio and cosine, and the whole cosine."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.05)
    with attach(tmp_path, model, optimizer, updates_every=2, cosine=True) as agent:
        train(model, optimizer, range(5))
    samples = gradiometer.open_run(agent.path).samples
    assert samples is not None
    wanted: dict[tuple[str, str], Any] = {
        ("gradiometer_layer_weight_norm", "0"): samples.weight_norms[-1, 0],
        ("gradiometer_layer_update_ratio", "2"): samples.update_ratio[-1, 1],
        ("gradiometer_layer_grad_cosine", "2"): samples.cosine[-1, 1],
    }
    for (name, layer), value in wanted.items():
        assert exported(agent.path, name, layer=layer) == pytest.approx(value)
    assert exported(agent.path, "gradiometer_grad_cosine") == pytest.approx(samples.total_cosine[-1])
    runs = Runs(tmp_path, retention_seconds=1e12)
    runs.poll()
    text = Exposition(runs, series_budget=100).render().decode()
    runs.close()
    for (name, layer), value in wanted.items():
        assert f'{name}{{run_id="{agent.run_id}",layer="{layer}"}} {value:.9g}\n' in text


def test_a_run_of_which_the_samples_are_gone_is_followed(tmp_path: Path) -> None:
    """Without its ring of samples a run is still exported, less what is in it."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.05)
    with attach(tmp_path, model, optimizer) as agent:
        train(model, optimizer)
    (agent.path / "samples.ring").unlink()
    assert exported(agent.path, "gradiometer_steps_total") == 5
    assert exported(agent.path, "gradiometer_layer_update_ratio", layer="0") is None


def test_ranks_are_counted_and_compared(make_manifest: MakeManifest, write_run: WriteRun, tmp_path: Path) -> None:
    """The rank whose own gradients are ten times the others' is found, and each one's bad steps are its own."""
    watched = int(Flag.HOOKED | Flag.OWN_WATCHED)
    for rank, factor in enumerate((1.0, 10.0, 1.0, 1.1)):
        manifest = make_manifest(rank=rank, world_size=4, data_parallel=4)
        flags = [watched | int(Flag.OWN_NONFINITE) * (rank == 2 and step == 1) for step in range(3)]
        write_run(manifest, factor * np.ones((3, 4)), flags=flags)
    ratios = rank_ratios(tmp_path / "run")
    assert ratios[1] == pytest.approx(10.0)
    assert max(ratios[rank] for rank in (0, 2, 3)) < 1.2
    for rank in range(4):
        path = tmp_path / f"run/rank-{rank:05d}"
        assert exported(path, "gradiometer_rank_nonfinite_total", rank=str(rank)) == (rank == 2)
    norm = exported(tmp_path / "run/rank-00001", "gradiometer_rank_microbatch_norm_last", rank="1")
    assert norm == pytest.approx(20.0)
