"""The parts of an agent, made of what the ranks have settled, and what is said of them at attach."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

from torch.optim import Optimizer

from gradiometer.backward import BackwardMode, BackwardWatch
from gradiometer.layers import Parameters
from gradiometer.norms import Meter
from gradiometer.policy.base import Layout
from gradiometer.policy.coverage import coverage
from gradiometer.policy.spec import PolicySpec
from gradiometer.recorder import Recorder
from gradiometer.stepper import Stepper
from gradiometer.telemetry import Telemetry
from gradiometer.updates import Updates

__all__ = ["make_stepper", "make_updates", "make_watch", "tell_coverage", "tell_unstepped"]

logger = logging.getLogger(__name__)


def make_stepper(
    parameters: Parameters, optimizers: list[Optimizer], spec: PolicySpec | None, meter: Meter, *, together: bool
) -> Stepper:
    """Make what observes, decides and acts."""
    layout = Layout(
        names=parameters.names,
        layers=parameters.layers,
        device=meter.device,
        dims=[len(info.shape) for info in parameters.infos],
        placements=[info.placement for info in parameters.infos],
    )
    return Stepper(parameters, optimizers, layout, spec, meter, together=together)


def make_watch(parameters: Parameters, backward: BackwardMode, telemetry: Telemetry) -> BackwardWatch:
    """Make what watches backward passes."""
    return BackwardWatch(
        parameters,
        backward,
        telemetry.guard,
        distributed=telemetry.manifest.world_size > 1,
        unstepped=functools.partial(tell_unstepped, telemetry),
    )


def make_updates(parameters: Parameters, meter: Meter, recorder: Recorder, telemetry: Telemetry) -> Updates | None:
    """Make what samples the weights, if the run has a ring for it."""
    info = telemetry.manifest.samples
    if info is None or recorder.samples is None:
        return None
    return Updates(parameters.tensors, meter, info, recorder.samples, telemetry.guard)


def tell_unstepped(telemetry: Telemetry) -> None:
    """Say that the optimizer that was given does not step."""
    message = (
        "backward passes go by without a step of the optimizer that was given: if another has taken its place, nothing "
        "is measured and no policy acts; detach() and attach to that one"
    )
    logger.warning("gradiometer: %s", message)
    telemetry.notice("no_step", message)


def tell_coverage(spec: PolicySpec, names: Sequence[str], telemetry: Telemetry) -> None:
    """Say what the policy leaves out: in every rank's events, and in the log of the first."""
    for message in coverage(spec, names):
        if telemetry.manifest.rank == 0:
            logger.warning("gradiometer: policy coverage: %s", message)
        telemetry.notice("policy_coverage", message)
