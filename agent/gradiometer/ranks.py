"""What the ranks of a job settle once, at attach, and the one collective they share at each step.

Where every rank ends up with the same gradients (DistributedDataParallel) nothing is communicated at a step. Where
parameters are sharded, or ranks hold different ones (pipeline stages, experts), the squared norms of all parameters
are summed in one all-reduce of float64 [P]; each parameter is counted by the ranks that hold one copy of it and by no
other. So every rank has the same norms to the bit, and decides the same.

Negative zero is the neutral element of that sum: it stands for "no gradient" and for "not here", and a sum of nothing
but negative zeros is negative zero again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gradiometer.layers import Parameters, layer_of
from gradiometer.norms import Meter
from gradiometer.policy.select import compile_pattern
from gradiometer.records import ParameterInfo
from gradiometer.rendezvous import job_store, meet
from gradiometer.shards import local_part
from gradiometer.transfer import bring

__all__ = ["Agreement", "Group", "LossMean", "Parts", "Ranks", "SharedMeter", "label_parts"]

Group = Any  # torch.distributed.ProcessGroup, which is not there in every build of torch
Parts = str | Mapping[str, str]
SAMPLES, ALIKE = 16, 1e-2
"""Elements of a parameter that are compared between ranks, and how far those of copies may lie apart."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What the ranks have settled."""

    run_id: str
    parameters: Parameters
    counted: list[bool] | None
    """Whether this rank counts its part of each parameter [P]; None if no norm needs adding up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Message:
    """What one rank tells the others: first this, and the list itself only if the lists are not all alike."""

    run_id: str | None = None
    chosen: bool = False
    """Whether the user chose the run id."""
    policy: str = ""
    parameters: str = ""
    samples: str = ""
    settings: str = ""
    failure: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entry:
    """One parameter as one rank holds it."""

    info: ParameterInfo
    sharded: bool
    copy: int
    sample: list[float]


class Ranks:
    """The processes that train one model together: a process group, or this process alone."""

    def __init__(self, group: Group | None = None, patience: float = 300.0) -> None:
        """Take ``group``, else all ranks, who wait ``patience`` seconds for each other.

        Raises ValueError if this process is not in the group, or ``patience`` is no time.
        """
        if not isinstance(patience, int | float) or not 0 < patience < math.inf:
            raise ValueError(f"patience is {patience!r}, expected a positive number of seconds")
        distributed, self.group, self._members, self._own = torch.distributed, None, [0], 0
        self._patience = timedelta(seconds=patience)
        if distributed.is_available() and distributed.is_initialized():
            self.group = distributed.group.WORLD if group is None else group
            self._own = distributed.get_rank()
            if self.group is distributed.GroupMember.NON_GROUP_MEMBER:
                raise ValueError("group does not hold this rank: pass a group to the ranks that are in it only")
            self._members = distributed.get_process_group_ranks(self.group)
        elif group is not None:
            raise ValueError("group is given, but torch.distributed is not initialised")

    def __len__(self) -> int:
        return len(self._members)

    @property
    def members(self) -> list[int]:
        """The ranks, in the order of the group; 0 for a process alone."""
        return list(self._members)

    @property
    def own(self) -> int:
        return self._own

    @contextmanager
    def excused(self) -> Iterator[None]:
        """Tell the other ranks, which wait in :meth:`agree` or :meth:`confirm`, of what fails here, and raise it."""
        try:
            yield
        except Exception as error:
            if len(self) > 1:
                self._meet(_Message(failure=f"{type(error).__name__}: {error}"))
            raise

    def confirm(self) -> None:
        """Wait until every rank has all it needs for its agent; raises RuntimeError if one has not.

        A rank that went on without an agent would leave the others in an all-reduce that it knows nothing of.
        """
        if len(self) > 1:
            self._check(self._meet(_Message()))

    @contextmanager
    def excused_from(self, call: str) -> Iterator[None]:
        """Tell the other ranks, which wait in :meth:`compare`, of what fails here, and raise it."""
        try:
            yield
        except Exception as error:
            self._exchange(call, None, f"{type(error).__name__}: {error}")
            raise

    def compare(self, call: str, outline: object) -> None:
        """Wait until every rank has made this call; raises ValueError if one failed, or its ``outline`` is another.

        Raises RuntimeError if one does not come. Nothing that a step has to wait for: it is for the time between.
        """
        said = self._exchange(call, outline, None)
        for rank, (_, failure) in zip(self._members, said, strict=False):
            if failure is not None:
                raise ValueError(f"rank {rank} could not {call}, so no rank does: {failure}")
        for rank, (digest, _) in zip(self._members, said, strict=False):
            if digest != said[0][0]:
                raise ValueError(
                    f"ranks {self._members[0]} and {rank} did not call {call} with the same: they would differ"
                )

    def _exchange(self, call: str, outline: object, failure: str | None) -> list[tuple[str, str | None]]:
        """Return digest and failure of every rank's call; nothing where there is but one."""
        if len(self) == 1:
            return []
        mine, store = json.dumps([_digest(outline), failure]), job_store()
        if store is None:
            said = self._gather(mine)
        else:
            said = meet(store, self._members, self._own, mine, self._patience, call)
        return [tuple(json.loads(each)) for each in said]

    def agree(
        self, parameters: Parameters, *, run_id: str, chosen: bool, policy: object, settings: str = ""
    ) -> Agreement:
        """Settle one run id and one list of parameters. Every rank must call it, and waits for the others.

        ``chosen`` tells that the run id is the user's and not of the clock; ``settings`` says in which steps there are
        how many all-reduces, if norms are added up at all. Raises RuntimeError if another rank failed or did not come
        in time, ValueError if run ids, policies, parameters or settings of the ranks do not go together.
        """
        if len(self) == 1:
            return Agreement(run_id=run_id, parameters=parameters, counted=None)
        with self.excused():
            self._check_meshes(parameters)
            samples = _samples(parameters)
        said = self._meet(
            _Message(
                run_id=run_id if chosen or self._own == self._members[0] else None,
                chosen=chosen,
                policy=_digest(policy),
                parameters=_digest(_comparable(parameters)),
                samples=_digest(samples),
                settings=settings,
            )
        )
        self._check(said)
        if len({each.parameters for each in said}) == len({each.samples for each in said}) == 1:
            merged, counted = parameters, self._counted_alike(parameters)
        else:
            merged, counted = self._merge(parameters, samples)
        if counted is not None and len({each.settings for each in said}) > 1:
            raise ValueError(f"ranks were given different settings: {'; '.join(sorted({e.settings for e in said}))}")
        return Agreement(run_id=str(said[0].run_id), parameters=merged, counted=counted)

    def meter(self, agreement: Agreement, device: torch.device) -> Meter:
        """Return what measures the agreed parameters: over the ranks, if their norms need adding up."""
        return Meter(device) if agreement.counted is None else SharedMeter(device, self.group, agreement)

    def loss_mean(self, device: torch.device) -> LossMean:
        """Return what averages the ranks' losses for policies that ask for them."""
        return LossMean(device, self.group if len(self) > 1 else None)

    def _meet(self, mine: _Message) -> list[_Message]:
        store = job_store()
        if store is None:
            return self._gather(mine)
        said = meet(store, self._members, self._own, mine.to_json(), self._patience)
        return [_Message(**json.loads(message)) for message in said]

    def _gather(self, mine: Any) -> list[Any]:
        gathered: list[Any] = [None] * len(self)
        torch.distributed.all_gather_object(gathered, mine, group=self.group)
        return gathered

    def _check(self, said: Sequence[_Message]) -> None:
        for rank, message in zip(self._members, said, strict=True):
            if message.failure is not None:
                raise RuntimeError(f"rank {rank} could not attach, so no rank does: {message.failure}")
        for rank, message in zip(self._members, said, strict=True):
            if (message.chosen or said[0].chosen) and message.run_id != said[0].run_id:
                raise ValueError(
                    f"run_id is {said[0].run_id!r} on rank {self._members[0]} and {message.run_id!r} on rank {rank}: "
                    "give every rank the same, or none"
                )
            if message.policy != said[0].policy:
                raise ValueError(f"ranks {self._members[0]} and {rank} were given different policies")

    def _check_meshes(self, parameters: Parameters) -> None:
        members = set(self._members)
        for info, holding in zip(parameters.infos, parameters.holdings, strict=True):
            if holding is not None and not members.issuperset(holding.ranks):
                raise ValueError(
                    f"parameter {info.name!r} is sharded over ranks {list(holding.ranks)}, but the agent's group is "
                    f"{self._members}: pass group= one that holds them all"
                )

    def _counted_alike(self, parameters: Parameters) -> list[bool] | None:
        """Tell what this rank counts when all ranks have the same list."""
        held = [holding for holding in parameters.holdings if holding is not None]
        if not any(holding.sharded for holding in held):
            return None
        first = min(self._members)
        return [holding.copy == (min(holding.ranks) if holding.sharded else first) for holding in held]

    def _merge(self, own: Parameters, samples: list[list[float]]) -> tuple[Parameters, list[bool] | None]:
        """Make one list of what all ranks hold; raises ValueError for one name that means two things."""
        mine = [
            _Entry(info=info, sharded=holding.sharded, copy=holding.copy, sample=sample)
            for info, holding, sample in zip(own.infos, own.holdings, samples, strict=True)
            if holding is not None
        ]
        everyone: dict[str, list[tuple[int, _Entry]]] = {}
        for rank, entries in zip(self._members, self._gather(mine), strict=True):
            for entry in entries:
                everyone.setdefault(entry.info.name, []).append((rank, entry))
        for name, holders in everyone.items():
            _check_holders(name, holders)
        if all(len(holders) == len(self) and not holders[0][1].sharded for holders in everyone.values()):
            return own, None
        place = {info.name: index for index, info in enumerate(own.infos)}
        merged = Parameters(
            infos=[_located(holders, len(self)) for holders in everyone.values()],
            tensors=[own.tensors[place[name]] if name in place else None for name in everyone],
            holdings=[own.holdings[place[name]] if name in place else None for name in everyone],
        )
        first = [min(entry.copy for _, entry in holders) for holders in everyone.values()]
        counted = [
            holding is not None and holding.copy == copy for holding, copy in zip(merged.holdings, first, strict=True)
        ]
        return merged, counted


def label_parts(parameters: Parameters, parts: Parts | None) -> Parameters:
    """Put the name of this rank's part of the model before those parameters that other ranks have under the same name.

    ``parts`` is one name for all parameters, or a mapping of patterns to names; the first pattern that covers a
    parameter names its part.
    """
    if parts is None:
        return parameters
    if not isinstance(parts, str | Mapping):
        raise TypeError(f"parts is {parts!r}, expected a name for this rank's part, or a mapping of patterns to names")
    named = {"*": parts} if isinstance(parts, str) else dict(parts)
    patterns = [(compile_pattern(pattern), part) for pattern, part in named.items()]
    infos = []
    for info in parameters.infos:
        part = next((part for pattern, part in patterns if pattern.search(info.name)), None)
        name = info.name if part is None else f"{part}.{info.name}"
        infos.append(info.model_copy(update={"name": name, "layer": layer_of(name)}))
    return replace(parameters, infos=infos)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()


def _comparable(parameters: Parameters) -> object:
    """Return what is alike on ranks that hold the same."""
    meshes = [holding.ranks if holding is not None and holding.sharded else None for holding in parameters.holdings]
    return [info.model_dump() for info in parameters.infos], meshes


def _samples(parameters: Parameters) -> list[list[float]]:
    """Return a few elements of every whole parameter, to tell copies from parameters that share but the name."""
    return [
        _sample(tensor) if tensor is not None and holding is not None and not holding.sharded else []
        for tensor, holding in zip(parameters.tensors, parameters.holdings, strict=True)
    ]


def _sample(parameter: nn.Parameter) -> list[float]:
    values = local_part(parameter.detach())
    values = (torch.view_as_real(values) if values.is_complex() else values).reshape(-1)
    if not values.numel():
        return []
    places = torch.linspace(0, values.numel() - 1, SAMPLES, dtype=torch.float64).long()
    numbers: list[float] = values[places.to(values.device)].double().cpu().tolist()
    return numbers


def _check_holders(name: str, holders: Sequence[tuple[int, _Entry]]) -> None:
    """Raise ValueError if ranks that use one name for a parameter mean different ones."""
    (first, expected), *others = holders
    for rank, entry in others:
        same = (entry.info.shape, entry.info.dtype) == (expected.info.shape, expected.info.dtype)
        if not same:
            _refuse(name, f"is {_kind(expected)} on rank {first} and {_kind(entry)} on rank {rank}")
        if entry.sharded != expected.sharded:
            _refuse(name, f"is sharded on one of ranks {first} and {rank} and whole on the other")
        if not entry.sharded and not _alike(entry.sample, expected.sample):
            _refuse(name, f"has other values on rank {rank} than on rank {first}")


def _kind(entry: _Entry) -> str:
    return f"{entry.info.dtype} {list(entry.info.shape)}"


def _refuse(name: str, what: str) -> NoReturn:
    raise ValueError(
        f"parameter {name!r} {what}. If every rank holds a part of the model of its own (a pipeline stage, its "
        "experts), name the part: attach(..., parts='stage1') or parts={'*experts*': 'rank1'}. If they are copies, "
        "make them alike before you attach. If the trainings are independent, give each a group= of its own"
    )


def _alike(sample: list[float], other: list[float]) -> bool:
    scale = max((abs(value) for value in (*sample, *other) if math.isfinite(value)), default=0.0)
    return all(
        abs(a - b) <= ALIKE * scale or not (math.isfinite(a) or math.isfinite(b))
        for a, b in zip(sample, other, strict=True)
    )


def _located(holders: Sequence[tuple[int, _Entry]], world: int) -> ParameterInfo:
    """Describe a parameter, and which ranks it lives on if not on all."""
    info = holders[0][1].info
    if len(holders) == world:
        return info
    ranks = ", ".join(str(rank) for rank, _ in holders[:4]) + (", …" if len(holders) > 4 else "")
    where = f"rank{'s' * (len(holders) > 1)} {ranks}"
    return info.model_copy(update={"placement": where if info.placement == "local" else f"{info.placement}; {where}"})


class SharedMeter(Meter):
    """A meter whose norms are those of the whole model, added up over the ranks: every call is one all-reduce.

    If this rank cannot measure, it says so with NaN, lest the others wait for it; then it raises.
    """

    shared = True

    def __init__(self, device: torch.device, group: Group, agreement: Agreement) -> None:
        super().__init__(device)
        assert agreement.counted is not None
        self._group, self._wire = group, _wire(group, device)
        self._counted = torch.tensor(agreement.counted, device=device)
        self._nothing = torch.full((), -0.0, dtype=torch.float64, device=device)
        wide = any(info.dtype in ("float64", "complex128") for info in agreement.parameters.infos)
        self._result = torch.float64 if wide else torch.float32

    def __call__(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Return the norms [P] of the whole parameters; ``gradients`` are this rank's parts."""
        try:
            own = super().__call__(gradients).double()
        except Exception:
            self.abstain()
            raise
        self.calls += 1
        squares = torch.copysign(own.square(), own)
        # A copy that is not counted still speaks up when it is not finite.
        heard = self._counted | ~(squares < math.inf)
        return self._sum(torch.where(heard, squares, self._nothing)).sqrt().to(self._result)

    def abstain(self) -> None:
        """Take part in the all-reduce of a measurement that failed here, with NaN: the others are in it."""
        self.calls += 1
        self._sum(torch.full(self._counted.shape, math.nan, dtype=torch.float64, device=self.device))

    def add(self, values: Tensor) -> Tensor:
        """Return the sums [K, P] over all ranks' ``values`` (float64), each copy counted once: one more all-reduce."""
        return self._sum(torch.where(self._counted, values, torch.zeros_like(values)))

    def maximum(self, value: Tensor) -> Tensor:
        """Return the largest of all ranks' values, by element: one more all-reduce."""
        wire = value.to(self._wire)
        wire = wire.clone() if wire is value else wire
        torch.distributed.all_reduce(wire, torch.distributed.ReduceOp.MAX, group=self._group)
        return bring(wire, value.device)

    def _sum(self, squares: Tensor) -> Tensor:
        wire = squares.to(self._wire)
        torch.distributed.all_reduce(wire, group=self._group)
        return bring(wire, self.device)


class LossMean:
    """The mean of the ranks' losses: one all-reduce of two numbers a call, none where this rank is alone.

    A rank that has none does not count; a NaN or Inf of any rank is in the mean of all.
    """

    def __init__(self, device: torch.device, group: Group | None = None) -> None:
        self.device, self._group = device, group
        self._wire = device if group is None else _wire(group, device)
        self.calls = 0
        """How often this rank has taken part."""

    def __call__(self, loss: float | Tensor | None) -> Tensor:
        """Return the mean, 0-dim float64 on the deciding device; NaN if no rank has a loss. Nothing is read."""
        told = torch.zeros(2, dtype=torch.float64, device=self.device)
        if loss is not None:
            told[0].fill_(1.0)
            if isinstance(loss, Tensor):
                told[1].copy_(loss.detach().reshape(()), non_blocking=True)
            else:
                told[1].fill_(loss)
        return self._mean(told)

    def abstain(self) -> None:
        """Take part without a loss: something failed here, and the others are in the all-reduce."""
        self._mean(torch.zeros(2, dtype=torch.float64, device=self.device))

    def _mean(self, told: Tensor) -> Tensor:
        self.calls += 1
        if self._group is not None:
            wire = told.to(self._wire)
            torch.distributed.all_reduce(wire, group=self._group)
            told = bring(wire, self.device)
        return told[1] / told[0]


def _wire(group: Group, device: torch.device) -> torch.device:
    """Return where tensors must lie for the group's collectives: ``device`` if its backend takes that."""
    backends = dict(part.split(":", 1) for part in torch.distributed.get_backend_config(group).split(","))
    usable = [kind for kind, backend in backends.items() if backend != "undefined"]
    if device.type in usable or not usable:
        return device
    kind = usable[0]
    return torch.device(kind, torch.get_device_module(kind).current_device()) if kind != "cpu" else torch.device(kind)
