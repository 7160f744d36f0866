"""A callback for the Hugging Face Trainer: measures, and clips by policy, every optimizer step of ``trainer.train``.

The Trainer clips at a norm of 1 unless told otherwise. Under a policy that clips, that is turned off for the length of
the training and a warning says so; under any other, or none, it stays, and is recorded as the loop's own clipping.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from gradiometer.backward import BackwardMode
from gradiometer.callbacks import Callback as ActionCallback
from gradiometer.integrations.attachment import Attachment
from gradiometer.live.loop import Handler
from gradiometer.policy.spec import PolicySource
from gradiometer.session import RING_BYTES, Agent

__all__ = ["GradiometerCallback"]

logger = logging.getLogger(__name__)


class GradiometerCallback(TrainerCallback, ExportableState):
    """Attach an agent for the length of a training; the arguments are those of :func:`gradiometer.attach`.

    The loss is recorded when the Trainer logs it, with the step it logs it at. Step numbers and policy state are in
    the ``trainer_state.json`` of the Trainer's checkpoints, and go on from there when one is resumed. A job that is
    asked for a checkpoint has the Trainer save one, one that is asked to stop ends as by
    ``control.should_training_stop``; ``on_request`` takes the place of either.

    Raises PolicyError for a wrong policy at once; at the start of training what :func:`gradiometer.attach` raises.
    """

    def __init__(
        self,
        *,
        policy: PolicySource | None = None,
        run_id: str | None = None,
        dir: str | os.PathLike[str] | None = None,  # noqa: A002  # attach's word for it
        backward: BackwardMode = "auto",
        labels: Mapping[str, str] | None = None,
        ring_bytes: int = RING_BYTES,
        updates_every: int = 100,
        cosine: bool = False,
        data_parallel: int | None = None,
        callbacks: Mapping[str, ActionCallback] | None = None,
        on_request: Mapping[str, Handler] | None = None,
    ) -> None:
        self._attachment = Attachment(
            policy,
            run_id=run_id,
            dir=dir,
            backward=backward,
            labels=labels,
            ring_bytes=ring_bytes,
            updates_every=updates_every,
            cosine=cosine,
            data_parallel=data_parallel,
            callbacks=callbacks,
            on_request=on_request,
        )
        self._max_grad_norm: float | None = None
        """The Trainer's own setting, while it is turned off."""

    @property
    def agent(self) -> Agent | None:
        """The agent, while training runs."""
        return self._attachment.agent

    @property
    def path(self) -> Path | None:
        """This rank's directory of the latest run, also when it is over; :func:`gradiometer.open_run` takes it."""
        return self._attachment.path

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        """Attach: model and optimizer are prepared, a checkpoint has been restored."""
        self._stop(args)  # of a training that raised, which a callback is not told of
        assert model is not None
        assert optimizer is not None  # the Trainer gives both to every event of a training
        self._attachment.state = _from_json(self._stored(state).get("agent_state", {}))
        self._attachment.start(model, [optimizer], step=state.global_step)
        if self._attachment.clips and args.max_grad_norm > 0:
            logger.warning(
                "gradiometer: the policy clips, so the Trainer's own clipping (max_grad_norm=%g) is turned off for "
                "this training; pass max_grad_norm=0 to say so yourself",
                args.max_grad_norm,
            )
            self._max_grad_norm, args.max_grad_norm = args.max_grad_norm, 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Have the Trainer do what the job was asked, on every rank after the same step."""
        agent = self.agent
        if agent is not None:
            if agent.requested("checkpoint"):
                control.should_save = True
            if agent.requested("stop"):
                control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell whoever asked for a checkpoint where it is."""
        if self.agent is not None:
            self.agent.done("checkpoint", os.path.join(args.output_dir or "", f"checkpoint-{state.global_step}"))  # noqa: PTH118

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record the loss that the Trainer has averaged since it last logged."""
        if self.agent is not None and logs and "loss" in logs:
            self.agent.log(loss=float(logs["loss"]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detach, and give the Trainer its setting back."""
        self._stop(args)

    def state(self) -> dict[str, Any]:
        """Return arguments and state as the Trainer writes them into its checkpoints: plain JSON."""
        attachment = self._attachment
        directory = attachment.options["dir"]
        labels = attachment.options["labels"]
        arguments = attachment.options | {
            "policy": attachment.spec and attachment.spec.to_dict(),
            "dir": directory and os.fspath(directory),
            "labels": labels and dict(labels),
            "callbacks": None,  # functions, which JSON cannot hold
            "on_request": None,
        }
        attributes = {} if self.agent is None else {"agent_state": _to_json(self.agent.state_dict())}
        return {"args": arguments, "attributes": attributes}

    def _stored(self, state: TrainerState) -> Mapping[str, Any]:
        """Return what the Trainer's state holds of ours, and see that it holds an entry, which saving wants."""
        callbacks: Any = state.stateful_callbacks  # declared a list, a mapping from the start
        stored = callbacks.setdefault(type(self).__name__, {"args": {}, "attributes": {}})
        return stored["attributes"] if isinstance(stored, Mapping) else {}

    def _stop(self, args: TrainingArguments) -> None:
        if self._max_grad_norm is not None:
            args.max_grad_norm, self._max_grad_norm = self._max_grad_norm, None
        self._attachment.stop()


def _to_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}
    if isinstance(value, Mapping):
        return {key: _to_json(each) for key, each in value.items()}
    return value


def _from_json(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"dtype", "values"}:
        return torch.tensor(value["values"], dtype=getattr(torch, value["dtype"]))
    return {key: _from_json(each) for key, each in value.items()}
