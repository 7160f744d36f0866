"""GradiometerCallback in Lightning's own Trainer: what docs/lightning.md says."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader

import gradiometer
from gradiometer.integrations.lightning import GradiometerCallback
from tests._training import ABORTED, assert_same, attach, batch, check_run, hand_norms, small_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated"),  # Lightning's use of torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch"),
]
CLIP = [{"nonfinite": {}}, {"global_norm": {"max_norm": 0.5}}]
Module = pl.LightningModule


class Plain(Module):
    """Automatic optimization; notes the norms that Lightning and we see by hand before each step."""

    def __init__(self, *, fused: bool = False, decay: float = 1.0) -> None:
        super().__init__()
        self.net, self.fused, self.decay = small_model(), fused, decay
        self.noted: list[Any] = []
        self.by_lightning: list[dict[str, float]] = []
        self.losses: list[float] = []

    def training_step(self, inputs: Tensor, index: int) -> Tensor:
        loss: Tensor = self.net(inputs).square().sum()
        self.losses.append(loss.item())
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.noted.append(hand_norms(self))
        self.by_lightning.append({name: float(norm) for name, norm in grad_norm(self, norm_type=2).items()})

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=0.01, fused=self.fused)
        if self.decay == 1.0:  # a scheduler complains of steps that a GradScaler skips
            return optimizer
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=self.decay)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., pl.Trainer]:
    """Give a function that makes a quiet Trainer of one process on the CPU."""

    def make(callback: pl.Callback, **options: Any) -> pl.Trainer:
        settings: dict[str, Any] = {
            "accelerator": "cpu", "devices": 1, "max_steps": 6, "default_root_dir": tmp_path, "logger": False,
            "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        }  # fmt: skip
        return pl.Trainer(callbacks=[callback], **(settings | options))

    return make


def callback_in(tmp_path: Path, **options: Any) -> GradiometerCallback:
    return GradiometerCallback(dir=tmp_path / "runs", ring_bytes=2**20, **options)


def run_of(callback: GradiometerCallback) -> gradiometer.Run:
    assert callback.path is not None
    return gradiometer.open_run(callback.path)


def batches(steps: int = 12) -> DataLoader[Tensor]:
    return loader([batch(step) for step in range(steps)])


def loader(each: list[Tensor]) -> DataLoader[Tensor]:
    return DataLoader(each, batch_size=None)  # type: ignore[arg-type]  # a list is a map from numbers to batches


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_norms_are_those_lightning_and_a_hand_measure(
    tmp_path: Path, make_trainer: Callable[..., pl.Trainer], options: dict[str, Any]
) -> None:
    """Norms of every parameter and of all, learning rates and the mean of the micro-batches' losses are recorded."""
    model, callback = Plain(decay=0.5), callback_in(tmp_path)
    make_trainer(callback, **options).fit(model, batches())
    run = run_of(callback)
    np.testing.assert_allclose(run.parameter_norms, np.stack(model.noted), rtol=1e-6)
    assert run.parameters == ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    total = [norms["grad_2.0_norm_total"] for norms in model.by_lightning]
    np.testing.assert_allclose(run.grad_norm_preclip, total, rtol=1e-4)  # Lightning rounds to 4 digits
    np.testing.assert_allclose(run.learning_rate, 0.01 * 0.5 ** np.arange(6), rtol=1e-6)
    losses = np.array(model.losses).reshape(6, -1).mean(axis=1)
    np.testing.assert_allclose(run.loss, losses, rtol=1e-6)


def test_updates_and_cosines(tmp_path: Path, make_trainer: Callable[..., pl.Trainer]) -> None:
    """Which steps are sampled, and whether cosines are measured, is the user's choice here too."""
    callback = callback_in(tmp_path, updates_every=2, cosine=True)
    make_trainer(callback).fit(Plain(), batches())
    samples = run_of(callback).samples
    assert samples is not None
    assert samples.steps.tolist() == [0, 2, 4]
    assert np.isfinite(samples.total_cosine[1:]).all()


@pytest.mark.parametrize("fused", [False, True])
def test_a_policy_trains_as_gradient_clip_val_does(
    tmp_path: Path, make_trainer: Callable[..., pl.Trainer], fused: bool
) -> None:
    """The policy global_norm leaves the parameters that Lightning's own clipping leaves, and records both norms."""
    model, twin, callback = Plain(fused=fused), Plain(fused=fused), callback_in(tmp_path, policy=CLIP)
    make_trainer(callback).fit(model, batches())
    make_trainer(pl.Callback(), gradient_clip_val=0.5).fit(twin, batches())
    assert_same(model, twin)
    run = run_of(callback)
    total = np.sqrt(np.square(np.stack(twin.noted)).sum(axis=1))
    np.testing.assert_allclose(run.grad_norm_preclip, total, rtol=1e-5)
    np.testing.assert_allclose(run.grad_norm_postclip, 0.5, rtol=1e-5)


def fp16() -> MixedPrecision:
    """Make 16-mixed with a GradScaler on the CPU, where Trainer(precision="16-mixed") falls back to bfloat16."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**18))


def test_under_a_grad_scaler_norms_are_unscaled(tmp_path: Path, make_trainer: Callable[..., pl.Trainer]) -> None:
    """Fused or not, the scale is divided out; steps that the scaler skips are recorded as skipped."""
    runs = []
    for fused in (False, True):
        model, callback = Plain(fused=fused), callback_in(tmp_path)
        make_trainer(callback, plugins=[fp16()], max_steps=8).fit(model, batches())
        runs.append(run_of(callback))
        taken = np.isfinite(np.stack(model.noted)).all(axis=1)
        scale = runs[-1].loss_scale[:, None] if fused else 1.0  # Lightning's hook sees scaled gradients of a fused one
        np.testing.assert_allclose(runs[-1].parameter_norms[taken], (np.stack(model.noted) / scale)[taken], rtol=1e-6)
        np.testing.assert_array_equal(runs[-1].skipped, ~taken)
        assert 1 < taken.sum() < 8
    np.testing.assert_array_equal(runs[0].loss_scale, runs[1].loss_scale)
    np.testing.assert_allclose(runs[0].loss, runs[1].loss, rtol=1e-3)


def test_fused_with_amp_and_clipping(tmp_path: Path, make_trainer: Callable[..., pl.Trainer]) -> None:
    """What gradient_clip_val refuses a fused optimizer under AMP, a policy does, and as an unfused one would."""
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        make_trainer(pl.Callback(), plugins=[fp16()], gradient_clip_val=0.5).fit(Plain(fused=True), batches())
    model, twin, callback = Plain(fused=True), Plain(fused=False), callback_in(tmp_path, policy=CLIP)
    make_trainer(callback, plugins=[fp16()], max_steps=8).fit(model, batches())
    make_trainer(pl.Callback(), plugins=[fp16()], max_steps=8, gradient_clip_val=0.5).fit(twin, batches())
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)  # the forward pass is in float16
    run = run_of(callback)
    taken = ~run.skipped
    total = np.sqrt(np.square(np.stack(twin.noted)).sum(axis=1))
    np.testing.assert_allclose(run.grad_norm_preclip[taken], total[taken], rtol=1e-2)
    np.testing.assert_allclose(run.grad_norm_postclip[taken], 0.5, rtol=1e-5)


class Gan(Module):
    """Two optimizers stepped by hand, each after a backward pass of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.g, self.d = small_model(0), nn.Linear(2, 1)
        self.noted: list[Any] = []
        self.losses: list[float] = []

    def training_step(self, inputs: Tensor, index: int) -> dict[str, Tensor]:
        for optimizer, sign in zip(self.optimizers(), (1, -1), strict=True):
            loss = sign * self.d(self.g(inputs)).tanh().sum()
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.noted.append(hand_norms(self))
            optimizer.step()
        self.losses.append(loss.item())
        return {"loss": loss.detach()}

    def configure_optimizers(self) -> Any:
        return [AdamW(self.g.parameters(), lr=0.01), AdamW(self.d.parameters(), lr=0.02)]


def test_a_gan_optimized_by_hand(
    tmp_path: Path, make_trainer: Callable[..., pl.Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    """Each optimizer's step is a row with the norms of its own parameters, and nothing is warned of."""
    model, callback = Gan(), callback_in(tmp_path)
    make_trainer(callback, max_steps=8).fit(model, batches())
    run, noted = run_of(callback), np.stack(model.noted)
    assert run.optimizer.tolist() == [0, 1] * 4
    np.testing.assert_allclose(run.parameter_norms[::2, :4], noted[::2, :4], rtol=1e-6)
    np.testing.assert_allclose(run.parameter_norms[1::2, 4:], noted[1::2, 4:], rtol=1e-6)
    assert np.signbit(run.parameter_norms[::2, 4:]).all()
    np.testing.assert_allclose(run.loss[1::2], model.losses, rtol=1e-6)
    assert np.isnan(run.loss[::2]).all()
    np.testing.assert_allclose(run.learning_rate, [0.01, 0.02] * 4, rtol=1e-6)
    assert not [record for record in caplog.records if record.name.startswith("gradiometer")]


def test_two_clippers_are_refused(tmp_path: Path, make_trainer: Callable[..., pl.Trainer]) -> None:
    """gradient_clip_val and a policy that clips are an error, and no run is left behind."""
    with pytest.raises(ValueError, match=r"gradient_clip_val=0\.5.*leave gradient_clip_val out"):
        make_trainer(callback_in(tmp_path, policy=CLIP), gradient_clip_val=0.5).fit(Plain(), batches())
    assert not (tmp_path / "runs").exists()


def test_lightnings_own_clipping_is_recorded(tmp_path: Path, make_trainer: Callable[..., pl.Trainer]) -> None:
    """Without a policy that clips gradient_clip_val stays, and the norms before and after it are recorded."""
    model, callback = Plain(), callback_in(tmp_path, policy=[{"nonfinite": {}}])
    make_trainer(callback, gradient_clip_val=0.5).fit(model, batches())
    run = run_of(callback)
    np.testing.assert_allclose(run.parameter_norms, np.stack(model.noted), rtol=1e-5)
    np.testing.assert_allclose(run.grad_norm_postclip, 0.5, rtol=1e-5)
    assert run.own_clipping["clip_grad_norm_"].all()


class Failing(Plain):
    def training_step(self, inputs: Tensor, index: int) -> Tensor:
        if index == 3 and not self.losses[3:]:
            self.losses.append(0.0)
            raise ArithmeticError("a bad batch")
        return super().training_step(inputs, index)


def test_an_exception_detaches(tmp_path: Path, make_trainer: Callable[..., pl.Trainer]) -> None:
    """A fit that raises leaves a finished run of the steps taken and no hook, and the Trainer can fit again."""
    model, callback = Failing(), callback_in(tmp_path)
    trainer = make_trainer(callback)
    with pytest.raises(ArithmeticError, match="a bad batch"):
        trainer.fit(model, batches())
    assert callback.agent is None
    assert run_of(callback).steps.tolist() == [0, 1, 2]
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks
    trainer.fit(model, batches())
    assert run_of(callback).steps.tolist() == [3, 4, 5]


def test_fitting_again_goes_on(tmp_path: Path, make_trainer: Callable[..., pl.Trainer]) -> None:
    """A second fit of one Trainer is a new run whose step numbers go on."""
    model, callback = Plain(), callback_in(tmp_path)
    trainer = make_trainer(callback, max_steps=-1, max_epochs=1)
    trainer.fit(model, batches(3))
    first = callback.path
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, batches(3))
    assert callback.path != first
    assert run_of(callback).steps.tolist() == [3, 4, 5]


def test_a_checkpoint_holds_step_and_policy_state(tmp_path: Path, make_trainer: Callable[..., pl.Trainer]) -> None:
    """Two bad steps before a checkpoint and one after it are three in a row to a policy that allows two."""
    bad = batch(0) * torch.nan
    policy = [{"nonfinite": {"max_consecutive": 3}}]
    trainer = make_trainer(callback_in(tmp_path, policy=policy), max_steps=3)
    trainer.fit(Plain(), loader([batch(0), bad, bad, bad]))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    callback = callback_in(tmp_path, policy=policy)
    trainer = make_trainer(callback, max_steps=6)
    with pytest.raises(gradiometer.NonFiniteGradientError, match="3 step"):
        trainer.fit(Plain(), loader([bad] * 4), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert run_of(callback).steps.tolist() == [3]


def test_a_checkpoint_of_another_policy(
    tmp_path: Path, make_trainer: Callable[..., pl.Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    """What a changed policy does not use is said, and step numbers go on; without our state they go on as well."""
    for before in (callback_in(tmp_path, policy=[{"nonfinite": {}}]), pl.Callback()):
        trainer = make_trainer(before, max_steps=2)
        trainer.fit(Plain(), batches())
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        callback = callback_in(tmp_path, policy=[{"global_norm": {"max_norm": 1.0}}])
        make_trainer(callback, max_steps=4).fit(Plain(), batches(), ckpt_path=tmp_path / "last.ckpt")
        assert run_of(callback).steps.tolist() == [2, 3]
    assert caplog.text.count("what the checkpoint remembers of nonfinite is not used") == 1


def test_attach_takes_lightnings_own_wrapper(tmp_path: Path) -> None:
    """An optimizer as ``self.optimizers()`` gives it is looked through to the one that steps."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped: Any = pl.core.optimizer.LightningOptimizer(optimizer)  # not an Optimizer, until it is made
    with attach(tmp_path, model, wrapped) as agent:
        model(batch(0)).sum().backward()
        optimizer.step()
        assert agent.step == 1
        assert agent.errors == 0


def test_a_loop_of_fabric(tmp_path: Path) -> None:
    """Model and optimizer as ``fabric.setup`` returns them can be attached to, and names are the model's own."""
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    inner, noted = small_model(), []
    model, optimizer = fabric.setup(inner, torch.optim.SGD(inner.parameters(), lr=0.01))
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        for step in range(4):
            optimizer.zero_grad()
            fabric.backward(model(batch(step)).square().sum())
            noted.append(hand_norms(model))
            optimizer.step()
    assert check_run(agent.path, np.stack(noted), max_norm=0.5).parameters[0] == "0.weight"


SCRIPT = """
import sys, torch
{first}
import pytorch_lightning as pl
from gradiometer.integrations.lightning import GradiometerCallback

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 1)
    def configure_model(self):
        if self.device_mesh is not None:
            torch.distributed.fsdp.fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
    def training_step(self, inputs, index):
        mine = inputs[self.global_rank :: self.trainer.world_size]
        return (self.net(mine) - 3.0).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

if __name__ == "__main__":
    torch.manual_seed(0)
    callback = GradiometerCallback(dir=sys.argv[1], ring_bytes=2**20, policy=[{{"global_norm": {{"max_norm": 0.5}}}}])
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=callback,
        use_distributed_sampler=False, {options}
    )
    data = torch.linspace(-1, 1, 64).view(16, 4)
    trainer.fit(Model(), torch.utils.data.DataLoader(data, batch_size=4))
"""


def run_script(tmp_path: Path, *, first: str = "", options: str = "devices=1") -> Path:
    """Run SCRIPT in a process of its own and return the one run it left."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(first=first, options=options))
    paths = os.pathsep.join(filter(None, sys.path))
    for attempt in range(3):
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path / f"runs{attempt}")],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        if ABORTED not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / f"runs{attempt}").iterdir()
    return run


@pytest.mark.parametrize("first", ["", "import lightning.pytorch", "import gradiometer.integrations.lightning"])
def test_pytorch_lightning_by_its_own_name(tmp_path: Path, first: str) -> None:
    """The callback serves the package pytorch_lightning, alone or beside lightning, whichever was imported first."""
    run = gradiometer.open_run(run_script(tmp_path, first=first))
    assert run.parameters == ["net.weight", "net.bias"]
    np.testing.assert_allclose(run.grad_norm_postclip, 0.5, rtol=1e-5)
    assert np.isfinite(run.loss).all()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Under DDP, and sharded by FSDP2, both ranks record one run, with the norms that one process has of all rows."""
    sharded = "pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)"
    paths = []
    ways = {"one": "devices=1", "ddp": "devices=2, strategy='ddp'", "fsdp": f"devices=2, strategy={sharded}"}
    for name, options in ways.items():
        (tmp_path / name).mkdir()
        paths.append(run_script(tmp_path / name, options=options))
    one = gradiometer.open_run(paths[0])
    for path in paths[1:]:
        for rank in range(2):
            run = gradiometer.open_run(path, rank)
            assert run.manifest.world_size == 2
            assert run.parameters == ["net.weight", "net.bias"]
            np.testing.assert_allclose(run.parameter_norms, one.parameter_norms, rtol=1e-5)
            np.testing.assert_allclose(run.grad_norm_postclip, 0.5, rtol=1e-5)
