"""Attach to a training loop: the agent, its life, and what it does around each optimizer step.

    observe (norms of all gradients) -> decide (the policy, pure tensors) -> act -> record

Acting is what the user asked for, and a failure there is raised. Recording is telemetry: its failures are caught,
counted and warned of once, and training goes on as if the agent were not there.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

from torch import Tensor, nn
from torch.optim import Optimizer

from gradiometer.actions import Actions, PolicyActionError, check_callbacks
from gradiometer.arguments import as_list, check_model, home_of
from gradiometer.assembly import make_stepper, make_updates, make_watch, tell_coverage, tell_unstepped
from gradiometer.backward import BackwardMode, BackwardWatch, check_mode
from gradiometer.callbacks import Callback
from gradiometer.hooks import StepHooks, check_free, listener_of
from gradiometer.layers import collect_parameters
from gradiometer.live.chronicle import Chronicle
from gradiometer.live.control import Request
from gradiometer.live.loop import Handler, Loop, StopTraining, check_handlers
from gradiometer.live.requests import Kind, LoopRequest
from gradiometer.live.thread import Live, Order
from gradiometer.manifest import check_sampling, choose_run_id, data_parallel_size, describe
from gradiometer.policy.spec import PolicyError, PolicySource, load_policy
from gradiometer.ranks import Group, Parts, Ranks, label_parts
from gradiometer.recorder import Recorder
from gradiometer.records import default_root
from gradiometer.stepper import NonFiniteGradientError, Stepper
from gradiometer.telemetry import STREAK, Telemetry
from gradiometer.transfer import capturing

__all__ = ["Agent", "NonFiniteGradientError", "PolicyActionError", "StopTraining", "attach", "live_agents"]

logger = logging.getLogger(__name__)

RING_BYTES = 128 * 2**20


class CapturedStepError(RuntimeError):
    """A policy was to act in a step that is captured into a CUDA graph, whose replays it would know nothing of."""


_live: WeakSet[Agent] = WeakSet()


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    policy: PolicySource | None = None,
    run_id: str | None = None,
    dir: str | os.PathLike[str] | None = None,  # noqa: A002  # the field's word for it
    backward: BackwardMode = "auto",
    labels: Mapping[str, str] | None = None,
    together: bool = True,
    group: Group | None = None,
    parts: Parts | None = None,
    patience: float = 300.0,
    ring_bytes: int = RING_BYTES,
    updates_every: int = 100,
    cosine: bool = False,
    data_parallel: int | None = None,
    callbacks: Mapping[str, Callback] | None = None,
    on_request: Mapping[str, Handler] | None = None,
) -> Agent:
    """Attach to a model and the optimizer that trains it; the training loop stays as it is.

    Attach after the model is on its device (and prepared, if Accelerate or Fabric does that; the optimizers they return
    are looked through). ``policy`` is a YAML file, a dict of the same shape, a list of stages or a
    :class:`~gradiometer.policy.spec.PolicySpec`; None observes and touches nothing. ``dir`` is where runs are kept
    (else ``GRADIOMETER_DIR``, else the user's state directory). ``backward`` says when backward hooks are armed:
    ``auto`` (the first steps, every hundredth, after an incident), ``every`` or ``off``. ``labels`` go with the run
    into its metrics. Several optimizers are taken to step one after another on the gradients of the same backward
    passes, so that norms and clipping span them all; pass ``together=False`` where each has a backward pass of its own
    (a GAN), and every optimizer's step is a row of its own. ``ring_bytes`` bounds the ring file.

    ``updates_every`` says in which steps it is measured by how much they move the weights, 0 for none;
    ``cosine`` adds, in the same steps, the cosine between the gradients and those of the step before.
    ``data_parallel`` is the number of ranks whose gradients are averaged, which is found out under
    DistributedDataParallel; say it where the model given is not the wrapped one. ``callbacks`` are the functions that
    the policy's ``actions`` may call, by name, each with a :class:`~gradiometer.callbacks.ActionCall`, on a thread.
    ``on_request`` are functions for what is asked of the job, ``checkpoint`` and ``stop``: see :meth:`Agent.requested`.
    Each is called with the :class:`~gradiometer.live.requests.LoopRequest`, by the training thread, as the last act of
    the step that the ranks have agreed on. ``{"stop": "raise"}`` raises :class:`StopTraining` there.

    In a distributed job every rank of ``group`` (a process group; all ranks unless given) attaches, in the same order:
    the ranks settle one run id and one list of parameters, for which they wait ``patience`` seconds at most. Sharded
    parameters (DTensor, FSDP1) are measured whole. Where ranks hold different parameters under the same names,
    ``parts`` names this rank's: one name for all (``"stage1"``), or patterns and names (``{"*experts*": "rank1"}``).

    Raises ValueError (PolicyError for the policy) for bad arguments, RuntimeError if an optimizer has an agent already
    or a live process writes the same run or another rank failed or did not come, OSError if the run directory cannot be
    made or its disk is full.
    """
    ranks = Ranks(group, patience)
    with ranks.excused():
        check_model(model)
        optimizers = as_list(optimizer)
        _make_room(optimizers)
        check_free(optimizers)  # before anything is made, so that a refusal leaves no run behind
        check_mode(backward)
        spec = None if policy is None else load_policy(policy)
        check_callbacks(() if spec is None else spec.actions, callbacks or {})
        handlers = check_handlers(on_request)
        own = label_parts(collect_parameters(model, optimizers), parts)
        chosen, settings = choose_run_id(run_id), check_sampling(updates_every, cosine=cosine)
        settings += f", together={together}" + ("" if together else f", {len(optimizers)} optimizers")
        replicas = data_parallel_size(model, len(ranks), data_parallel)
    agreement = ranks.agree(
        own, run_id=chosen, chosen=run_id is not None, policy=spec and spec.to_dict(), settings=settings
    )
    with contextlib.ExitStack() as undo:
        with ranks.excused():
            manifest = describe(
                run_id=agreement.run_id,
                parameters=agreement.parameters,
                optimizers=optimizers,
                device=home_of(own),
                ring_bytes=ring_bytes,
                policy=spec,
                labels=labels,
                data_parallel=replicas,
                updates_every=updates_every,
                cosine=cosine,
            )
            meter = ranks.meter(agreement, home_of(own))
            stepper = make_stepper(agreement.parameters, optimizers, spec, meter, together=together)
            stepper.loss_mean = ranks.loss_mean(meter.device)
            recorder = Recorder(default_root(dir), manifest)
            undo.callback(recorder.close)
            telemetry = Telemetry(recorder, manifest, meter.device)
            telemetry.actions = actions = Actions(recorder, manifest.run_id, manifest.rank, callbacks)
            undo.callback(actions.close)
            if spec is not None:
                actions.replace(spec.actions, telemetry.slots)
                tell_coverage(spec, agreement.parameters.names, telemetry)
            stepper.updates = make_updates(agreement.parameters, meter, recorder, telemetry)
            watch = make_watch(agreement.parameters, backward, telemetry)
            undo.callback(watch.remove)
            stepper.shadows.listen(telemetry.guard)
            stepper.own.listen(telemetry.guard)
            undo.callback(stepper.own.close)
        ranks.confirm()
        agent = Agent(stepper, telemetry, actions, watch, optimizers, ranks, handlers)
        undo.pop_all()
    return agent


def _make_room(optimizers: list[Optimizer]) -> None:
    """Detach what ``gradiometer run`` has attached by itself: the program does it on its own after all."""
    for each in optimizers:
        holder = listener_of(each)
        if isinstance(holder, Agent) and holder.gives_way:
            holder.detach()


def live_agents() -> list[Agent]:
    """Return the agents of this process that have not been detached."""
    return list(_live)


class Agent:
    """What :func:`attach` returns: the handle of one attachment, and a context manager that detaches.

    All methods are for the training thread.
    """

    def __init__(
        self,
        stepper: Stepper,
        telemetry: Telemetry,
        actions: Actions,
        watch: BackwardWatch,
        optimizers: list[Optimizer],
        ranks: Ranks,
        handlers: Mapping[str, Handler],
    ) -> None:
        self._stepper, self._telemetry, self._actions, self._watch = stepper, telemetry, actions, watch
        self._ranks = ranks
        self._detached = False
        self._told_of_capture = False
        self.gives_way = False
        """Whether another agent may take this one's place: it was attached by ``gradiometer run``."""
        self._spent = 0.0
        """Host seconds of the agent's own that no row has told of yet."""
        self._chronicle = Chronicle(telemetry, stepper.spec, ranks.members[0])
        self._loop = Loop(telemetry, handlers, lambda: stepper.step)
        self._live = Live(
            stepper, self.path, ranks.members, ranks.own, self._chronicle, actions.check_callbacks, self._loop
        )
        self._hooks = StepHooks(optimizers, self)
        watch.prepare(0, incident=False)
        _live.add(self)

    @property
    def run_id(self) -> str:
        return self._telemetry.manifest.run_id

    @property
    def path(self) -> Path:
        """This rank's directory of the run; :func:`gradiometer.open_run` takes it."""
        return self._telemetry.recorder.path

    @property
    def step(self) -> int:
        """Number of the next optimizer step, counted from 0 or from the checkpoint."""
        return self._stepper.step

    @property
    def errors(self) -> int:
        """Telemetry failures caught so far."""
        return self._telemetry.guard.errors

    def log(self, *, loss: float | Tensor | None = None, **scalars: float | Tensor) -> None:
        """Record the loss, and up to 16 other scalars, with the step they belong to.

        Numbers or one-element tensors; a tensor on the gradients' device is copied there and read only when its row
        reaches the host. A value goes with the step in progress or, if that has not begun its backward pass and the
        last one has no such value, with the step just taken: so it may be called before or after ``optimizer.step()``
        (with ``backward="off"``, where nothing tells of backward passes, after it, or at every step). Raises
        TypeError for anything else. After :meth:`detach`, and while a CUDA graph is captured, it does nothing.
        """
        named = {f"log.{name}": value for name, value in scalars.items()}
        if loss is not None:
            named["loss"] = loss
        if named and not self._detached and not capturing():
            self._telemetry.log(named, late_allowed=not self._watch.seen)

    def requested(self, kind: Kind) -> LoopRequest | None:
        """Return what was asked of the loop, ``"checkpoint"`` or ``"stop"``, if anything was; to be asked every step.

        A request arrives on every rank with the same step, so that ``if agent.requested(...)`` after
        ``optimizer.step()`` is the same on all of them. A checkpoint is returned once, and the loop says
        :meth:`done`; a stop stays asked for, and is done when the agent is detached. ``gradiometer request`` and the
        rules of the monitor ask. A job that does not call this, nor gave ``attach(on_request=...)``, is asked nothing.
        """
        return self._loop.requested(kind)

    def done(self, kind: Kind, note: str = "") -> None:
        """Say that what was asked for is done, for whoever waits; ``note`` says what came of it, as a path does."""
        self._loop.done(kind, note)

    def state_dict(self) -> dict[str, Any]:
        """Return step number, policy and what it remembers, for a checkpoint.

        Plain values, and tensors that are copies on the host: ``torch.load(…, weights_only=True)`` reads it. All ranks
        have the same. Between two steps; reading it waits for the device.
        """
        return self._stepper.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned; every rank calls it, with the same, as it called ``attach``.

        If the policy attached now is the one attached then, the one that was in force comes back with all it
        remembered. If it is another, it stays: stages that have kept name, kind and shapes keep their memory, the
        others begin anew, and a warning and an event ``policy_state`` say which.

        Raises ValueError if that is not the state of an agent, is of a model whose shapes are others, or differs
        between ranks, RuntimeError if another rank does not come; then nothing has been changed.
        """
        ranks = Ranks() if self._detached else self._ranks
        with ranks.excused_from("load_state_dict()"):
            plan = self._stepper.plan(state, self._actions.check_callbacks)
        ranks.compare("load_state_dict()", plan.outline)
        self._stepper.go_on(plan)
        self._chronicle.restore(self._stepper.spec, plan.step, plan.anew)
        self._follow_policy()
        logger.info("gradiometer: going on from a checkpoint, at step %d", plan.step)
        if plan.said:
            logger.warning("gradiometer: going on from a checkpoint: %s", plan.said)
            self._telemetry.notice("policy_state", plan.said, step=plan.step, anew=plan.anew, unused=plan.left)

    def flush(self) -> None:
        """Wait for the rows under way and write them."""
        self._telemetry.flush(self._watch.order)
        self._write_updates(wait=True)

    def detach(self) -> None:
        """Write what is under way, remove every hook and restore model and optimizer exactly. Idempotent.

        Waits for a callback under way, as long as its time lasts. Raises RuntimeError in one: it runs beside training.
        """
        if self._detached:
            return
        if self._actions.calling:
            raise RuntimeError("detach() was called by a callback, beside training: set a flag for the loop to see")
        self._detached = True
        if self._stepper.step == 0 and self._watch.passes:
            tell_unstepped(self._telemetry)
        _live.discard(self)
        self._live.close()
        self._loop.close()
        self._hooks.remove()
        self._watch.remove()
        self._stepper.own.close()
        self._write_notices()
        self._stepper.restore_all()
        self._write_updates(wait=True)
        self._telemetry.close(self._watch.order)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _write_notices(self) -> None:
        while self._stepper.notices:
            self._telemetry.notice(*self._stepper.notices.pop(0))

    def _settle(self, optimizer: Optimizer) -> None:
        """Put another policy in force, if one is due and the step that is about to be taken begins a round."""
        if self._stepper.begins_round(optimizer):
            order = self._live.settle()
            if order is None:
                return
            if isinstance(order.request, LoopRequest):
                self._loop.deliver(order.request)
            else:
                self._apply(order.request, order)

    def _apply(self, request: Request, order: Order) -> None:
        """Change the policy in all its parts: what acts, and what is recorded of it."""
        try:
            turn = self._stepper.change(order.spec)
        except Exception as error:
            if order.at is not None and not isinstance(error, PolicyError):
                raise  # a PolicyError is on all ranks alike; else the others may have changed theirs
            self._chronicle.reject(request, [f"{type(error).__name__}: {error}"])
            return
        self._chronicle.change(request, order.spec, self._stepper.step, turn)
        self._follow_policy()

    def _follow_policy(self) -> None:
        """Let what goes by the policy in force, beside what decides, go by the newest."""
        spec = self._stepper.spec
        self._actions.replace(() if spec is None else spec.actions, self._telemetry.slots, self._telemetry.revision)
        if spec is not None:
            tell_coverage(spec, self._stepper.layout.names, self._telemetry)

    # What the hooks call.

    def within_step(self, optimizer: Optimizer) -> bool:
        """Tell whether the step that begins is part of one that has begun."""
        with self._telemetry.guard:
            return self._stepper.within(optimizer)
        return False

    def before_update(self, optimizer: Optimizer) -> None:
        """Observe, decide and act: the gradients are final and the optimizer is about to use them."""
        began = time.perf_counter()
        if self._live.due:
            self._settle(optimizer)
        with self._telemetry.guard if self._stepper.pipeline is None else contextlib.nullcontext():
            self._note_loss()
            taken = self._stepper.before_update(optimizer)
            if taken is not None:
                self._telemetry.begin(taken, self._watch)
            self._write_notices()
        self._spent += time.perf_counter() - began

    def _note_loss(self) -> None:
        if self._stepper.wants_loss:
            coming = self._telemetry.coming_loss
            if coming is not None or not self._telemetry.pending:  # a closure evaluated again has that of before
                self._stepper.loss = coming

    def after_step(self, optimizer: Optimizer) -> None:
        """Put back what acting changed, and let rows that have arrived be written."""
        began = time.perf_counter()
        self._stepper.restore(optimizer)
        self._stepper.finished()
        with self._telemetry.guard:
            self._stepper.stepped(optimizer)
        self._write_updates()
        if self._telemetry.pending:
            seconds = self._spent + self._stepper.own.spent + time.perf_counter() - began
            self._spent = self._stepper.own.spent = 0.0
            began = time.perf_counter()
            incident = self._telemetry.finish(self._watch.order, seconds)
            with self._telemetry.guard:
                self._watch.prepare(self._stepper.step, incident=incident)
        self._spent += time.perf_counter() - began
        streaks, self._telemetry.streaks = self._telemetry.streaks, {}
        if streaks:
            self._stepper.check({name.removeprefix(STREAK): streak for name, streak in streaks.items()})
        self._actions.check()
        if self._loop.calls and not self._stepper.midway:
            self._loop.call()

    def step_failed(self, optimizer: Optimizer) -> None:
        """Put back what acting changed: the step raised."""
        if self._telemetry.pending and self._stepper.updates is not None:
            self._stepper.updates.drop()
        self._stepper.restore(optimizer)
        self._stepper.finished()

    def _write_updates(self, *, wait: bool = False) -> None:
        updates = self._stepper.updates
        if updates is not None:
            if not wait and not self._stepper.midway:  # where norms are added up over ranks, all of them finish
                updates.finish()
            updates.write(wait=wait)

    def captured(self, optimizer: Optimizer) -> None:
        """Stand aside from a step that is being captured into a CUDA graph; raise if a policy should act in it."""
        message = (
            f"a step of {type(optimizer).__name__} is captured into a CUDA graph: its replays run no Python, so they "
            "are neither measured nor clipped"
        )
        if self._stepper.pipeline is not None:
            raise CapturedStepError(f"{message}. Step outside of the graph, or attach without a policy")
        self._live.obstacle = "the job captures steps into CUDA graphs, in which no policy can act"
        if not self._told_of_capture:
            self._told_of_capture = True
            logger.warning("gradiometer: %s", message)
            self._telemetry.notice("step_captured", message)

    def scaler_skipped(self, optimizer: Optimizer) -> None:
        """Record a step that a GradScaler skipped before the optimizer saw it."""
        if self._live.due:
            self._settle(optimizer)
        with self._telemetry.guard:
            self._note_loss()
            taken = self._stepper.observe_skipped(optimizer)
            if taken is not None:
                self._telemetry.begin(taken, self._watch)
        self.after_step(optimizer)


@atexit.register
def _detach_all() -> None:
    for agent in list(_live):
        try:
            agent.detach()
        except Exception:  # whatever it is, the other agents must be detached too
            logger.exception("gradiometer: an agent could not be detached at exit")
