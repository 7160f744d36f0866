"""One rank of the parallel trainings of the tests: ``python -m tests._parallel RANK WORLD PORT ROOT CASE…``.

Every case builds the same model from the same seed, trains it under an agent, in its own way of being parallel, and
leaves what it saw in ``ROOT/<case>-<rank>.json``. The tests compare that with one process that is not parallel.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import gradiometer
from tests._ranks import (
    BATCH,
    FEATURES,
    OUTPUTS,
    POLICY,
    STEPS,
    WIDTH,
    Case,
    attach,
    build_model,
    inputs,
    loss_of,
    mine,
    run_cases,
    sgd,
    train,
)
from tests._training import backward


def ddp(rank: int, world: int) -> dict[str, Any]:
    model = nn.parallel.DistributedDataParallel(build_model())
    optimizer = sgd(model)
    with attach(model, optimizer, backward="every") as agent:
        return {"collectives": train(agent, model, optimizer, lambda step: mine(step, rank, world))}


def zero(rank: int, world: int) -> dict[str, Any]:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns where it is imported

    model = nn.parallel.DistributedDataParallel(build_model())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.05)
    with attach(model, optimizer) as agent:
        train(agent, model, optimizer, lambda step: mine(step, rank, world))
    return {}


def sharded(model: nn.Module, **options: Any) -> Any:
    """Apply FSDP2 to every layer and to the whole."""
    for layer in model.children():
        if list(layer.parameters()):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def fsdp2(rank: int, world: int) -> dict[str, Any]:
    model = sharded(build_model())
    optimizer = sgd(model)
    with attach(model, optimizer) as agent:
        return {"collectives": train(agent, model, optimizer, lambda step: mine(step, rank, world))}


def fsdp2_fused(rank: int, world: int) -> dict[str, Any]:
    model = sharded(build_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    with attach(model, optimizer) as agent:
        return {"collectives": train(agent, model, optimizer, lambda step: mine(step, rank, world))}


def fsdp2_offload(rank: int, world: int) -> dict[str, Any]:
    model = sharded(build_model(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = sgd(model)
    with attach(model, optimizer) as agent:
        train(agent, model, optimizer, lambda step: mine(step, rank, world))
    return {}


def fsdp2_accumulate(rank: int, world: int) -> dict[str, Any]:
    """Two micro-batches a step, the first of them without reduction."""
    model = sharded(build_model())
    optimizer = sgd(model)
    with attach(model, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            for number, part in enumerate(mine(step, rank, world).chunk(2)):
                model.set_requires_gradient_sync(number == 1)
                backward(loss_of(model(part)) / 2)
            optimizer.step()
    return {}


def fsdp2_bf16(rank: int, world: int) -> dict[str, Any]:
    """Mixed precision, whose reference is the gradients themselves."""
    model = sharded(
        build_model().float(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    )
    optimizer, norms = sgd(model), list[list[float]]()
    with attach(model, optimizer) as agent:
        train(agent, model, optimizer, lambda step: mine(step, rank, world).bfloat16(), norms=norms)
    return {"norms": norms}


def fsdp2_own_clip(rank: int, world: int) -> dict[str, Any]:
    """The loop clips by itself, as loops do, and the agent looks on."""
    model = sharded(build_model())
    optimizer = sgd(model)
    with attach(model, optimizer, policy=None):
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(loss_of(model(mine(step, rank, world))))
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
    return {}


def hsdp(rank: int, world: int) -> dict[str, Any]:
    """Replicas of shards: a mesh of two dimensions."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(build_model(), mesh=mesh)
    optimizer = sgd(model)
    with attach(model, optimizer) as agent:
        return {"collectives": train(agent, model, optimizer, lambda step: mine(step, rank, world))}


def fsdp1(strategy: ShardingStrategy, *, whole: bool) -> Case:
    def case(rank: int, world: int) -> dict[str, Any]:
        inner = build_model()
        for place in (0, 3):
            inner[place] = FullyShardedDataParallel(
                inner[place], sharding_strategy=strategy, use_orig_params=whole, device_id=torch.device("cpu")
            )
        model = FullyShardedDataParallel(
            inner, sharding_strategy=strategy, use_orig_params=whole, device_id=torch.device("cpu")
        )
        optimizer = sgd(model)
        with attach(model, optimizer) as agent:
            train(agent, model, optimizer, lambda step: mine(step, rank, world))
        return {"parameters": gradiometer.open_run(agent.path).parameters}

    return case


def tensor_parallel(model: nn.Module, mesh: Any) -> nn.Module:
    return parallelize_module(model, mesh, {"3": ColwiseParallel(), "4": RowwiseParallel()})


def tp(rank: int, world: int) -> dict[str, Any]:
    """Two layers sharded, the others whole on every rank."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    model = tensor_parallel(build_model(), mesh)
    optimizer = sgd(model)
    with attach(model, optimizer) as agent:
        return {"collectives": train(agent, model, optimizer, inputs)}


def tp_sequence(rank: int, world: int) -> dict[str, Any]:
    """A norm layer that works on slices of the batch: its parameters are replicated, its gradients partial sums."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    plan: dict[str, Any] = {
        "0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0), use_local_output=False),
        "1": SequenceParallel(sequence_dim=0),
        "3": ColwiseParallel(input_layouts=Shard(0)),
        "4": RowwiseParallel(),
    }
    model = parallelize_module(build_model(), mesh, plan)
    optimizer = sgd(model)
    with attach(model, optimizer) as agent:
        train(agent, model, optimizer, inputs, steps=[0, 1])
        backward(loss_of(model(inputs(2))))
        gradients = [parameter.grad for parameter in model[1].parameters()]  # type: ignore[index]
        optimizer.zero_grad()
        train(agent, model, optimizer, inputs, steps=[2, 3])
    return {"gradients": [str(gradient.placements) for gradient in gradients]}


def fsdp_tp(rank: int, world: int) -> dict[str, Any]:
    """FSDP over tensor parallelism: shards of shards, and layers that only one of the two shards."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
    model = sharded(tensor_parallel(build_model(), mesh["tp"]), mesh=mesh["dp"])
    optimizer = sgd(model)
    with attach(model, optimizer) as agent:
        return {"collectives": train(agent, model, optimizer, lambda step: mine(step, rank // (world // 2), 2))}


def ddp_tp(rank: int, world: int) -> dict[str, Any]:
    """Tensor parallelism in groups of two, each group a replica that all-reduces its gradients by hand."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
    model = tensor_parallel(build_model(), mesh["tp"])
    optimizer, group = sgd(model), mesh["dp"].get_group()
    with attach(model, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(loss_of(model(mine(step, rank // 2, world // 2))))
            for parameter in model.parameters():
                gradient: Any = parameter.grad
                local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                dist.all_reduce(local, group=group)
                local /= world // 2
            optimizer.step()
    return {}


def pipeline(rank: int, world: int) -> dict[str, Any]:
    """A pipeline of two stages, which name their layers alike: ``parts`` tells them apart."""
    whole = build_model()
    module = whole[:3] if rank == 0 else nn.Sequential(*list(whole)[3:])
    stage = PipelineStage(module, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda output, target: loss_of(output))
    optimizer = sgd(module)
    with attach(module, optimizer, parts=f"stage{rank}", backward="every") as agent:
        for step in range(STEPS):
            optimizer.zero_grad()
            if rank == 0:
                schedule.step(inputs(step))
            else:
                schedule.step(target=torch.zeros(BATCH))
            optimizer.step()
    return {"parameters": gradiometer.open_run(agent.path).parameters}


class Experts(nn.Module):
    """Three experts' weights in one tensor [3, 12, 12]: two ranks hold unequal parts of it, of four one holds none."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(FEATURES, WIDTH, dtype=torch.float64)
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH, dtype=torch.float64) / 3)

    def forward(self, values: Tensor) -> Tensor:
        return torch.einsum("bi,eij->bej", self.dense(values).tanh(), self.experts)


def build_experts() -> Experts:
    torch.manual_seed(1)
    return Experts()


def experts(rank: int, world: int) -> dict[str, Any]:
    """Experts as an uneven DTensor, each rank working out its own; the dense layer is whole on all."""
    model = build_experts()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    model.experts = nn.Parameter(distribute_tensor(model.experts.detach(), mesh, [Shard(0)]))
    optimizer = sgd(model)
    share = 1.0 / (BATCH * 3 * WIDTH)
    with attach(model, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            local = model.experts.to_local()  # type: ignore[attr-defined]  # a DTensor
            output = torch.einsum("bi,eij->bej", model.dense(inputs(step)).tanh(), local)
            backward((output - 1.0).square().sum() * share)
            for parameter in model.dense.parameters():
                dist.all_reduce(parameter.grad)
            optimizer.step()
    return {"here": list(model.experts.to_local().shape)}  # type: ignore[attr-defined]


def own_experts(rank: int, world: int) -> dict[str, Any]:
    """Each rank has experts of its own in plain tensors of one name; the third poisons one rank's data."""
    torch.manual_seed(1)
    model = nn.ModuleDict({"dense": nn.Linear(FEATURES, WIDTH), "experts": nn.Linear(WIDTH, OUTPUTS)})
    device = torch.device(os.environ.get("DEVICE", "cpu"))
    model = model.to(device, torch.float64)
    torch.manual_seed(10 + rank)
    nn.init.normal_(model["experts"].weight)  # type: ignore[arg-type]
    optimizer, norms = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True), list[float]()
    with attach(model, optimizer, parts={"experts.*": f"rank{rank}"}):
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(loss_of(model["experts"](model["dense"](inputs(step).to(device)).tanh())))
            for parameter in model["dense"].parameters():
                dist.all_reduce(parameter.grad)
            if step == 2 and rank == 1:
                model["experts"].weight.grad.view(-1)[0] = torch.nan  # type: ignore[operator, union-attr]
            norms.append(float(torch.stack([p.grad.square().sum() for p in model["experts"].parameters()]).sum()))  # type: ignore[union-attr]
            before = [parameter.detach().clone() for parameter in model.parameters()]
            optimizer.step()
            moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
            norms.append(float(moved))
    return {"norms": norms}


def value(rank: int, world: int) -> dict[str, Any]:
    """Clamp elements where only one rank's shard has one that is too large."""
    model = sharded(build_model())
    optimizer = sgd(model)
    with attach(model, optimizer, policy=[{"value": {"max_abs": 0.1}}]) as agent:
        train(agent, model, optimizer, lambda step: mine(step, rank, world))
    return {}


def group_norm(rank: int, world: int) -> dict[str, Any]:
    model = sharded(build_model())
    optimizer = sgd(model)
    with attach(model, optimizer, policy=[{"group_norm": {"max_norm": 0.1}}]) as agent:
        train(agent, model, optimizer, lambda step: mine(step, rank, world))
    return {}


def nan_on_one_rank(rank: int, world: int) -> dict[str, Any]:
    """A bad shard on one rank only: corrupt memory, not a bad batch, which the reduction would spread."""
    model = sharded(build_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    moved = []
    with attach(model, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            backward(loss_of(model(mine(step, rank, world))))
            if step == 2 and rank == 1:
                next(model.parameters()).grad.to_local().view(-1)[0] = torch.inf
            before = [parameter.detach().clone() for parameter in model.parameters()]
            optimizer.step()
            moved.append(any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
    return {"moved": moved}


def scaler(fused: bool) -> Case:
    """Make a training under a GradScaler, with an Inf in one rank's shard."""

    def case(rank: int, world: int) -> dict[str, Any]:
        model = sharded(build_model())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=fused)
        amp, moved, scales = torch.amp.GradScaler("cpu", init_scale=8.0), [], []
        with attach(model, optimizer):
            for step in range(STEPS):
                optimizer.zero_grad()
                backward(amp.scale(loss_of(model(mine(step, rank, world)))))
                if step == 2 and rank == 1:
                    next(model.parameters()).grad.to_local().view(-1)[0] = torch.inf
                before = [parameter.detach().clone() for parameter in model.parameters()]
                amp.step(optimizer)
                amp.update()
                moved.append(any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)))
                scales.append(amp.get_scale())
        return {"moved": moved, "scales": scales}

    return case


def dies(rank: int, world: int) -> dict[str, Any]:
    """The last rank is killed between two steps; what the others raise is the training's own affair."""
    model = (
        nn.parallel.DistributedDataParallel(build_model()) if os.environ.get("WAY") == "ddp" else sharded(build_model())
    )
    optimizer = sgd(model)
    agent = attach(model, optimizer, policy=None)
    for step in range(STEPS):
        if step == 2 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        train(agent, model, optimizer, lambda step: mine(step, rank, world), steps=[step])
    agent.detach()
    return {}


def measuring_fails(rank: int, world: int) -> dict[str, Any]:
    """One rank cannot measure in one step: it counts an error, and the others do not wait for it."""
    model = sharded(build_model())
    optimizer = sgd(model)
    with attach(model, optimizer, policy=None) as agent:
        meter: Any = agent._stepper._meter
        plan = meter._plan

        def fail(*arguments: Any) -> None:
            raise MemoryError("no room for norms")

        for step in range(3):
            if rank == 1:
                meter._signature, meter._plan = [], fail if step == 1 else plan
            train(agent, model, optimizer, lambda step: mine(step, rank, world), steps=[step])
        return {"errors": agent.errors}


def other_values(rank: int, world: int) -> dict[str, Any]:
    """Models that were never made alike are refused, everywhere and by name."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(3, 3))
    return {"error": refused(model, sgd(model))}


def refused(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> str:
    try:
        attach(model, optimizer, **options)
    except (ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def bad_arguments_on_one_rank(rank: int, world: int) -> dict[str, Any]:
    model = build_model()
    policy = POLICY if rank == 0 else [{"global_norm": {"max_norm": -1}}]
    return {"error": refused(model, sgd(model), policy=policy)}


def one_stays_away(rank: int, world: int) -> dict[str, Any]:
    """Only one rank attaches, as some loops do with their loggers; then the other; then both."""
    model, said = build_model(), "none"
    for who in range(world):
        if who == rank:
            said = refused(model, sgd(model), patience=1.0)
        dist.barrier()
    return {"error": said, "then": refused(model, sgd(model))}


def other_policies(rank: int, world: int) -> dict[str, Any]:
    model = build_model()
    return {"error": refused(model, sgd(model), policy=[{"global_norm": {"max_norm": 1.0 + rank}}])}


def groups_of_their_own(rank: int, world: int) -> dict[str, Any]:
    """Independent trainings in one job, each with its own agent."""
    group = dist.new_group([rank], use_local_synchronization=True)
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(FEATURES, OUTPUTS)).double()
    optimizer = sgd(model)
    with attach(model, optimizer, group=group, run_id=f"alone{rank}") as agent:
        return {"collectives": train(agent, model, optimizer, inputs)}


CASES: dict[str, Case] = {
    case.__name__: case
    for case in (
        ddp,
        zero,
        fsdp2,
        fsdp2_fused,
        fsdp2_offload,
        fsdp2_accumulate,
        fsdp2_bf16,
        fsdp2_own_clip,
        hsdp,
        tp,
        tp_sequence,
        fsdp_tp,
        ddp_tp,
        pipeline,
        experts,
        own_experts,
        value,
        group_norm,
        nan_on_one_rank,
        measuring_fails,
        other_values,
        bad_arguments_on_one_rank,
        one_stays_away,
        other_policies,
        groups_of_their_own,
    )
}
CASES["dies"] = dies
CASES["scaler"] = scaler(fused=False)
CASES["scaler_fused"] = scaler(fused=True)
CASES["fsdp1_full"] = fsdp1(ShardingStrategy.FULL_SHARD, whole=True)
CASES["fsdp1_grad_op"] = fsdp1(ShardingStrategy.SHARD_GRAD_OP, whole=True)
CASES["fsdp1_flat"] = fsdp1(ShardingStrategy.FULL_SHARD, whole=False)
CASES["fsdp1_no_shard"] = fsdp1(ShardingStrategy.NO_SHARD, whole=True)


if __name__ == "__main__":
    run_cases(CASES)
