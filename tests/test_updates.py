"""What is measured every so many steps: by how much weights move, and how alike successive gradients are."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

import gradiometer
from gradiometer.insight import Samples
from gradiometer.updates import ELEMENTS, TOTAL, Sampler
from tests._training import assert_same, attach, backward, batch, loss_of, small_model, train

CPU = torch.device("cpu")
Floats = npt.NDArray[np.float64]


def samples_of(path: Path) -> Samples:
    """Open the samples of a run, which must have some."""
    samples = gradiometer.open_run(path).samples
    assert samples is not None
    return samples


def weights(model: nn.Module) -> list[Floats]:
    """Copy the weights in float64."""
    return [parameter.detach().numpy().astype(np.float64) for parameter in model.parameters()]


def norm(arrays: list[Floats]) -> float:
    """Compose the L2 norm of several arrays by hand."""
    return math.sqrt(sum(float(np.square(array).sum()) for array in arrays))


def moved(after: list[Floats], before: list[Floats]) -> list[Floats]:
    """Subtract."""
    return [new - old for new, old in zip(after, before, strict=True)]


@pytest.mark.parametrize("kind", [SGD, Adam, AdamW])
def test_the_update_is_what_the_weights_moved_by(tmp_path: Path, kind: Any) -> None:
    """Each layer's ratio is that of copies taken before and after the step, whatever the optimizer and the policy."""
    model = small_model()
    optimizer, wanted = kind(model.parameters(), lr=0.01), []
    with attach(tmp_path, model, optimizer, policy=[{"global_norm": {"max_norm": 0.5}}], updates_every=1) as agent:
        for step in range(4):
            before = weights(model)
            train(model, optimizer, [step])
            deltas = moved(weights(model), before)
            wanted.append([norm(deltas[:2]) / norm(before[:2]), norm(deltas[2:]) / norm(before[2:])])
    samples = samples_of(agent.path)
    assert samples.steps.tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(samples.update_ratio, wanted, rtol=1e-4)


def test_every_third_step_is_sampled(tmp_path: Path) -> None:
    """Of ten steps every third is there, the weights' norm being that before the step."""
    model = small_model()
    optimizer, wanted = SGD(model.parameters(), lr=0.01), []
    with attach(tmp_path, model, optimizer, updates_every=3) as agent:
        for step in range(10):
            wanted.append([norm(weights(model)[:2]), norm(weights(model)[2:])])
            train(model, optimizer, [step])
    samples = samples_of(agent.path)
    assert samples.steps.tolist() == [0, 3, 6, 9]
    np.testing.assert_allclose(samples.weight_norms, np.array(wanted)[::3], rtol=1e-6)
    assert samples.columns == ("weight_norm", "update_norm")


def test_off_leaves_no_file(tmp_path: Path) -> None:
    """With an interval of 0 nothing is sampled and no ring is made."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, updates_every=0) as agent:
        train(model, optimizer)
    assert gradiometer.open_run(agent.path).samples is None
    assert not (agent.path / "samples.ring").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"updates_every": -1}, "updates_every is -1"),
        ({"updates_every": 0, "cosine": True}, "updates_every names, which is 0"),
    ],
)
def test_wrong_intervals_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """What cannot be carried out is refused before anything is made."""
    model = small_model()
    with pytest.raises(ValueError, match=message):
        attach(tmp_path, model, SGD(model.parameters(), lr=0.01), **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["foreach", "fused"])
def test_a_skipped_step_has_an_update_of_zero(tmp_path: Path, how: str) -> None:
    """A non-finite step that the policy skips moved nothing, and says so."""
    model = small_model()
    optimizer = Adam(model.parameters(), lr=0.01, foreach=how == "foreach", fused=how == "fused")
    with attach(tmp_path, model, optimizer, policy=["nonfinite"], updates_every=1) as agent:
        train(model, optimizer, [0])
        backward(loss_of(model, 1) * math.nan)
        optimizer.step()
    samples = samples_of(agent.path)
    assert (samples.update_ratio[0] > 0).all()
    assert samples.update_ratio[1].tolist() == [0.0, 0.0]


def test_a_step_that_a_scaler_skips_has_an_update_of_zero(tmp_path: Path) -> None:
    """A GradScaler that does not call the optimizer leaves a sample of 0; the step after it moves again."""
    model = small_model()
    optimizer, scaler = Adam(model.parameters(), lr=0.01, foreach=True), GradScaler("cpu")
    with attach(tmp_path, model, optimizer, updates_every=1) as agent:
        for factor in (1.0, math.inf, 1.0):
            optimizer.zero_grad()
            backward(scaler.scale(loss_of(model, 1) * factor))
            scaler.step(optimizer)
            scaler.update()
    ratios = samples_of(agent.path).update_ratio
    assert [bool(ratio.all()) for ratio in ratios] == [True, False, True]
    assert ratios[1].tolist() == [0.0, 0.0]


def test_optimizers_that_step_together_are_one_sample(tmp_path: Path) -> None:
    """What two optimizers do to their halves of the model is measured after the second has stepped."""
    model = small_model()
    halves: list[Optimizer] = [SGD(model[0].parameters(), lr=0.1), Adam(model[2].parameters(), lr=0.01)]
    with attach(tmp_path, model, halves, updates_every=2) as agent:
        for step in range(3):
            before = weights(model)
            model.zero_grad()
            backward(loss_of(model, step))
            for optimizer in halves:
                optimizer.step()
        deltas = moved(weights(model), before)
    samples = samples_of(agent.path)
    assert samples.steps.tolist() == [0, 2]
    np.testing.assert_allclose(samples.update_norms[1], [norm(deltas[:2]), norm(deltas[2:])], rtol=1e-4)


def test_optimizers_apart_are_sampled_each(tmp_path: Path) -> None:
    """Where optimizers alternate, each is sampled in its own first, third, … step, and the other's layer is unknown."""
    model = small_model()
    halves: list[Optimizer] = [SGD(model[0].parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)]
    with attach(tmp_path, model, halves, updates_every=2, together=False) as agent:
        for _ in range(3):
            for optimizer in halves:
                train(model, optimizer, [0])
    samples = samples_of(agent.path)
    assert samples.rows["optimizer"].tolist() == [0, 1, 0, 1]
    assert np.isnan(samples.update_ratio).tolist() == [[False, True], [True, False]] * 2


def test_a_closure_evaluated_often_is_one_step(tmp_path: Path) -> None:
    """LBFGS evaluates several times in a step; the update is from before the first to after the last."""
    model = small_model()
    optimizer = LBFGS(model.parameters(), lr=0.01, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        backward(loss)
        return loss

    with attach(tmp_path, model, optimizer, updates_every=1) as agent:
        before = weights(model)
        optimizer.step(closure)  # type: ignore[no-untyped-call]  # torch
        wanted = norm(moved(weights(model), before))
    assert math.hypot(*samples_of(agent.path).update_norms[0]) == pytest.approx(wanted, rel=1e-4)


def test_a_step_that_raised_is_forgotten(tmp_path: Path) -> None:
    """When the optimizer raises half-way, what it moved is no update, neither its own nor that of the next step."""

    class Brittle(SGD):
        """Moves a weight and raises, when told to."""

        broken = False

        def step(self, closure: Any = None) -> Any:
            if self.broken:
                with torch.no_grad():
                    self.param_groups[0]["params"][0].add_(1.0)
                raise ArithmeticError
            return super().step(closure)

    model = small_model()
    optimizer = Brittle(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, updates_every=1) as agent:
        train(model, optimizer, [0])
        backward(loss_of(model, 1))
        optimizer.broken = True
        with pytest.raises(ArithmeticError):
            optimizer.step()
        optimizer.broken = False
        before = weights(model)
        train(model, optimizer, [2])
        wanted = norm(moved(weights(model), before))
        assert agent.errors == 0
    samples = samples_of(agent.path)
    assert samples.steps.tolist() == [0, 2]
    assert math.hypot(*samples.update_norms[1]) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.complex64])
def test_other_types_of_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    """The ratio of half, double and complex weights is that of their values, subtracted in float32 or better."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 8, dtype=dtype))
    before = weight.detach().clone()
    optimizer = SGD([weight], lr=0.25)
    with attach(tmp_path, nn.ParameterList([weight]), optimizer, updates_every=1) as agent:
        weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()
        assert agent.errors == 0
    wide = torch.complex128 if dtype.is_complex else torch.float64
    wanted = (weight.detach().to(wide) - before.to(wide)).norm() / before.to(wide).norm()
    assert samples_of(agent.path).update_ratio[0, 0] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("layout", ["rows", "columns", "image"])
def test_large_tensors_are_sampled_evenly(layout: str) -> None:
    """A tensor with a heavy column, row or channel is estimated within a few per cent: the samples meet them all."""
    torch.manual_seed(0)
    shape = (128, 16, 8, 8) if layout == "image" else (300, 400)
    tensor = torch.randn(shape) * 0.01
    if layout == "rows":
        tensor[:30] = 1.0
    else:
        tensor[:, : shape[1] // 8] = 1.0
    if layout == "image":
        tensor = tensor.to(memory_format=torch.channels_last)
    sampler = Sampler([tensor], CPU)
    matrix = sampler.read([tensor])
    assert tensor.numel() > 20 * ELEMENTS
    assert matrix.shape == (1, ELEMENTS)
    assert float(sampler.squares(matrix)[0].sqrt()) == pytest.approx(float(tensor.norm()), rel=0.05)


def test_the_precision_that_is_stated() -> None:
    """Over 200 Gaussian tensors the norm from 4096 elements is off by sqrt(1 / 2n) = 1.1 % rms, and without bias."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(200, 199, generator=generator) for _ in range(200)]
    sampler = Sampler(tensors, CPU)
    exact = np.array([float(tensor.norm()) for tensor in tensors])
    samples = sampler.read(tensors)
    errors = sampler.squares(samples).sqrt().numpy() / exact - 1
    read = np.count_nonzero(samples[0])
    assert read > ELEMENTS / 2
    assert np.sqrt(np.square(errors).mean()) == pytest.approx(math.sqrt(1 / (2 * read)), rel=0.25)
    assert abs(errors.mean()) < 0.003


def test_small_tensors_are_measured_exactly() -> None:
    """Up to the bound, every element is read."""
    tensor = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    sampler = Sampler([tensor, tensor[0]], CPU)
    samples = sampler.read([tensor, None])
    norms = sampler.squares(samples).sqrt()
    assert norms.tolist() == pytest.approx([float(tensor.norm()), 0.0], rel=1e-6)


@pytest.mark.parametrize("count", [1, 1024, 5000])
def test_what_is_read_is_bounded(count: int) -> None:
    """However many parameters there are, and however large, at most 16 MiB of float32 are read of them."""
    tensor = torch.zeros(100, 100)
    matrix = Sampler([tensor] * count, CPU).read([tensor] * count)
    assert matrix.numel() <= TOTAL == 2**22
    assert matrix.element_size() == 4


def test_a_huge_weight_is_not_copied(tmp_path: Path) -> None:
    """Sampling a weight of a gigabyte, most of it never touched, takes some megabytes and not another gigabyte."""
    weight = nn.Parameter(torch.empty(2**14, 2**14), requires_grad=False)
    small = nn.Parameter(torch.ones(4))
    model = nn.ParameterList([weight, small])
    optimizer = SGD([small, weight], lr=0.1)
    before = psutil.Process().memory_info().rss
    with attach(tmp_path, model, optimizer, updates_every=1) as agent:
        small.grad = torch.ones(4)
        optimizer.step()
        assert agent.errors == 0
    assert psutil.Process().memory_info().rss - before < 200 * 2**20
    assert samples_of(agent.path).stat("update_norm")[0, 1] == pytest.approx(0.2)


def test_nothing_is_kept_between_samples(tmp_path: Path) -> None:
    """Training is to the bit what it is without the agent."""
    model, twin = small_model(), small_model()
    optimizer, reference = AdamW(model.parameters(), lr=0.01), AdamW(twin.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, updates_every=2, cosine=True):
        train(model, optimizer, range(6))
    train(twin, reference, range(6))
    assert_same(model, twin, exactly=True)


def gradients(model: nn.Module) -> list[Floats]:
    """Copy the gradients in float64."""
    return [copy.deepcopy(p.grad.numpy().astype(np.float64)) for p in model.parameters() if p.grad is not None]


def cosine(left: list[Floats], right: list[Floats]) -> float:
    """Compute the cosine of two lists of arrays by hand."""
    dot = sum(float((a * b).sum()) for a, b in zip(left, right, strict=True))
    return dot / norm(left) / norm(right)


@pytest.mark.parametrize("every", [1, 2])
def test_cosines_of_successive_gradients(tmp_path: Path, every: int) -> None:
    """Each layer's cosine, and that of all, is that of copies of the gradients before clipping."""
    model = small_model()
    optimizer, kept = SGD(model.parameters(), lr=0.05), []
    policy = [{"group_norm": {"max_norm": 0.1, "scope": "parameter"}}]
    with attach(tmp_path, model, optimizer, policy=policy, updates_every=every, cosine=True) as agent:
        for step in range(6):
            optimizer.zero_grad()
            backward(loss_of(model, step))
            kept.append(gradients(model))
            optimizer.step()
    samples = samples_of(agent.path)
    steps = samples.steps.tolist()
    assert steps == list(range(0, 6, every))
    assert np.isnan(samples.total_cosine[0])
    whole = [cosine(kept[step], kept[step - 1]) for step in steps[1:]]
    np.testing.assert_allclose(samples.total_cosine[1:], whole, atol=1e-5)
    wanted = [[cosine(kept[s][:2], kept[s - 1][:2]), cosine(kept[s][2:], kept[s - 1][2:])] for s in steps[1:]]
    np.testing.assert_allclose(samples.cosine[1:], wanted, atol=1e-5)


def test_known_cosines(tmp_path: Path) -> None:
    """The same gradient again is 1, its opposite -1, one at right angles 0."""
    weight = nn.Parameter(torch.zeros(2))
    optimizer = SGD([weight], lr=0.1)
    with attach(tmp_path, nn.ParameterList([weight]), optimizer, updates_every=1, cosine=True) as agent:
        for gradient in ([1.0, 1.0], [2.0, 2.0], [-3.0, -3.0], [1.0, -1.0]):
            weight.grad = torch.tensor(gradient)
            optimizer.step()
    np.testing.assert_allclose(samples_of(agent.path).total_cosine[1:], [1.0, -1.0, 0.0], atol=1e-6)


def test_a_bad_gradient_has_no_cosine(tmp_path: Path) -> None:
    """Neither a non-finite step nor the one after it, whose neighbour it is, has a cosine; the next has again."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, policy=["nonfinite"], updates_every=1, cosine=True) as agent:
        for step, factor in enumerate((1.0, 1.0, math.nan, 1.0, 1.0)):
            optimizer.zero_grad()
            backward(loss_of(model, step) * factor)
            optimizer.step()
    assert np.isfinite(samples_of(agent.path).total_cosine).tolist() == [False, True, False, False, True]


def test_cosines_of_large_gradients(tmp_path: Path) -> None:
    """From 4096 of 250 000 elements the cosine of gradients of known likeness is within some hundredths."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(500, 500))
    optimizer = SGD([weight], lr=0.1)
    first, second = torch.randn(2, 500, 500, generator=generator).unbind()
    with attach(tmp_path, nn.ParameterList([weight]), optimizer, updates_every=1, cosine=True) as agent:
        for gradient in (first, 0.6 * first + 0.8 * second, second):
            weight.grad = gradient.clone()
            optimizer.step()
    np.testing.assert_allclose(samples_of(agent.path).total_cosine[1:], [0.6, 0.8], atol=0.04)


def test_a_table_of_samples(tmp_path: Path) -> None:
    """The samples as a DataFrame have a row a sample and a column a layer and quantity."""
    pytest.importorskip("pandas")
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    with attach(tmp_path, model, optimizer, updates_every=2, cosine=True) as agent:
        train(model, optimizer, range(4))
    samples = samples_of(agent.path)
    table = samples.to_pandas()
    assert table.index.tolist() == [0, 2]
    np.testing.assert_array_equal(table["update_ratio/2"], samples.update_ratio[:, 1])
    np.testing.assert_array_equal(table["cosine/0"], samples.cosine[:, 0])


def test_the_ring_of_samples_wraps(tmp_path: Path) -> None:
    """More samples than the ring holds leave the newest."""
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.001)
    with attach(tmp_path, model, optimizer, updates_every=20, ring_bytes=2**18, backward="off") as agent:
        inputs = batch(0)
        for _ in range(70 * 20):
            optimizer.zero_grad()
            backward(model(inputs).sum())
            optimizer.step()
    run = gradiometer.open_run(agent.path)
    samples = samples_of(agent.path)
    assert run.manifest.samples is not None
    assert run.manifest.samples.ring.capacity == 64
    assert samples.steps.tolist() == [20 * place for place in range(6, 70)]
