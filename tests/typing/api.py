"""The public API as a type checker sees it; mypy reads this file, nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import gradiometer
from gradiometer.integrations.lightning import GradiometerCallback as LightningCallback
from gradiometer.integrations.transformers import GradiometerCallback as TrainerCallback


def use(model: nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    agent = gradiometer.attach(model, optimizer, policy={"pipeline": []}, dir=Path("runs"), labels={"team": "a"})
    assert_type(agent, gradiometer.Agent)
    agent.log(loss=loss, accuracy=0.5)
    assert_type(agent.state_dict(), dict[str, Any])
    assert_type(agent.path, Path)
    agent.detach()

    def save(call: gradiometer.ActionCall) -> None:
        assert_type(call.path, Path)

    with gradiometer.attach(model, [optimizer], policy="policy.yaml", callbacks={"save": save}) as another:
        assert_type(another.step, int)


def answer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def save(request: gradiometer.LoopRequest) -> None:
        assert_type(request.by, str)

    with gradiometer.attach(model, optimizer, on_request={"checkpoint": save, "stop": "raise"}) as agent:
        assert_type(agent.requested("stop"), gradiometer.LoopRequest | None)
        agent.done("checkpoint", "saved.pt")


def use_frameworks() -> None:
    lightning = LightningCallback(policy="policy.yaml", dir=Path("runs"), labels={"team": "a"}, on_request={})
    hugging_face = TrainerCallback(policy=[{"nonfinite": {}}], run_id="a")
    for callback in (lightning, hugging_face):
        assert_type(callback.agent, gradiometer.Agent | None)
        assert_type(callback.path, Path | None)


def read() -> None:
    run = gradiometer.open_run("runs/a", rank=1)
    assert_type(run, gradiometer.Run)
    assert_type(run.steps, npt.NDArray[np.int64])
    assert_type(run.parameter_norms, npt.NDArray[np.float32])
    assert_type(run.layer_norms(), npt.NDArray[np.float64])
    assert_type(run.skipped, npt.NDArray[np.bool_])
    assert_type(run.own_clipping, dict[str, npt.NDArray[np.bool_]])
    assert_type(run.events, list[dict[str, Any]])
    assert_type(run.parameters, list[str])
