"""A callback for Lightning: measures, and clips by policy, every optimizer step of ``trainer.fit``.

It serves ``lightning.pytorch`` and ``pytorch_lightning`` alike. The agent is attached when training starts, after the
strategy has placed the model and a checkpoint has been restored, and detached when ``fit`` returns or raises.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradiometer.backward import BackwardMode
from gradiometer.callbacks import Callback as ActionCallback
from gradiometer.integrations.attachment import Attachment
from gradiometer.live.loop import Handler
from gradiometer.policy.spec import PolicySource
from gradiometer.session import RING_BYTES, Agent

__all__ = ["GradiometerCallback"]

logger = logging.getLogger(__name__)


def _callback_class() -> type:
    """Return the ``Callback`` of Lightning: of both its packages where both are installed, for each knows its own."""
    packages = [name for name in ("lightning.pytorch", "pytorch_lightning") if find_spec(name.partition(".")[0])]
    if not packages:
        raise ImportError("gradiometer.integrations.lightning needs Lightning: pip install lightning")
    classes = tuple(import_module(name).Callback for name in packages)
    return classes[0] if len(classes) == 1 else type("Callback", classes, {})


def _checkpoints(trainer: Trainer) -> str:
    """Return where the Trainer keeps its checkpoints."""
    chosen = trainer.checkpoint_callback
    return str(getattr(chosen, "dirpath", None) or trainer.default_root_dir)


if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    Callback = _callback_class()


class GradiometerCallback(Callback):
    """Attach an agent for the length of a fit; the arguments are those of :func:`gradiometer.attach`.

    ``together`` is False unless given: a module with several optimizers optimizes by hand, usually with backward passes
    of their own, and each optimizer's step is then a row of its own. The loss that ``training_step`` returns is
    recorded with each step, without waiting for the device. Step numbers and policy state are in the Trainer's
    checkpoints. A job that is asked for a checkpoint saves ``requested-step=….ckpt`` where the Trainer's checkpoints
    go; one that is asked to stop sets ``trainer.should_stop``; ``on_request`` takes the place of either.

    Raises PolicyError for a wrong policy at once; at the start of training ValueError if the policy clips and so does
    ``gradient_clip_val``, and what :func:`gradiometer.attach` raises.
    """

    def __init__(
        self,
        *,
        policy: PolicySource | None = None,
        run_id: str | None = None,
        dir: str | os.PathLike[str] | None = None,  # noqa: A002  # attach's word for it
        backward: BackwardMode = "auto",
        labels: Mapping[str, str] | None = None,
        together: bool = False,
        ring_bytes: int = RING_BYTES,
        updates_every: int = 100,
        cosine: bool = False,
        callbacks: Mapping[str, ActionCallback] | None = None,
        on_request: Mapping[str, Handler] | None = None,
    ) -> None:
        self._attachment = Attachment(
            policy,
            run_id=run_id,
            dir=dir,
            backward=backward,
            labels=labels,
            together=together,
            ring_bytes=ring_bytes,
            updates_every=updates_every,
            cosine=cosine,
            callbacks=callbacks,
            on_request=on_request,
        )
        self._step = 0
        """The agent's step when a loss was last logged."""
        self._loss: Tensor | None = None
        """Sum of the losses of the batches since then."""
        self._batches = 0

    @property
    def agent(self) -> Agent | None:
        """The agent, while training runs."""
        return self._attachment.agent

    @property
    def path(self) -> Path | None:
        """This rank's directory of the latest run, also when it is over; :func:`gradiometer.open_run` takes it."""
        return self._attachment.path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: optimizers exist, the model is on its device, a checkpoint has been restored."""
        self._check_clipping(trainer)
        # As the strategy has wrapped it, for FSDP's root knows of parameters of its own.
        model = pl_module if trainer.model is None else trainer.model
        agent = self._attachment.start(model, trainer.optimizers, step=trainer.global_step)
        self._step, self._loss, self._batches = agent.step, None, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loss of the batches that led to the step just taken, and do what the job was asked."""
        agent = self.agent
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if agent is None:
            return
        if isinstance(loss, Tensor) and loss.numel() == 1 and not loss.is_complex():
            self._log(agent, loss, automatic=pl_module.automatic_optimization)
        self._heed(trainer, agent)

    def _log(self, agent: Agent, loss: Tensor, *, automatic: bool) -> None:
        loss = loss.detach().float()
        self._loss = loss if self._loss is None else self._loss + loss
        self._batches += 1
        if agent.step != self._step:
            # In automatic optimization Lightning has divided each micro-batch's loss by their number already.
            divisor = 1 if automatic else self._batches
            agent.log(loss=self._loss / divisor)
            self._step, self._loss, self._batches = agent.step, None, 0

    def _heed(self, trainer: Trainer, agent: Agent) -> None:
        """Do what was asked of the job; on every rank after the same batch, as Lightning wants it of a checkpoint."""
        if request := agent.requested("checkpoint"):
            path = os.path.join(_checkpoints(trainer), f"requested-step={trainer.global_step}.ckpt")  # noqa: PTH118  # or a URL
            trainer.save_checkpoint(path)
            agent.done("checkpoint", path)
            logger.info("gradiometer: saved %s, as %s asked", path, request.by or "somebody")
        if agent.requested("stop"):
            trainer.should_stop = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Detach; what fails here must not hide the exception that ended the training."""
        try:
            self._attachment.stop()
        except Exception:
            logger.exception("gradiometer: the agent's state could not be kept")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach at the end of a fit."""
        self._attachment.stop()

    def state_dict(self) -> dict[str, Any]:
        """Return step number and policy state, for the Trainer's checkpoint."""
        return dict(self._attachment.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what :meth:`state_dict` returned; it is used when training starts."""
        self._attachment.state = state_dict

    def _check_clipping(self, trainer: Trainer) -> None:
        if trainer.gradient_clip_val and self._attachment.clips:
            raise ValueError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val!r}) clips and so does the policy, which would "
                "see gradients that are clipped already: leave gradient_clip_val out, or take clipping out of the "
                "policy"
            )
