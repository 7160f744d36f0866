"""Scopes, named groups and patterns on real models, against torch's own clipping; what is left out is said."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW

from gradiometer import PolicyError, open_run
from gradiometer.policy.coverage import coverage
from gradiometer.policy.spec import load_policy
from tests._training import assert_same, attach, backward, hand_norms

GROUPS = {"embed": "embed*", "norms": "*norm*", "rest": "*"}
Parameters = Sequence[nn.Parameter]


class Tiny(nn.Module):
    """An embedding, two blocks with a norm each, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(2)])
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            hidden = hidden + torch.tanh(block(norm(hidden)))
        out: Tensor = self.head(hidden)
        return out


def loss_of(model: nn.Module, step: int) -> Tensor:
    """Run the model forward on the tokens of one step."""
    tokens = torch.randint(0, 8, (16,), generator=torch.Generator().manual_seed(step))
    loss: Tensor = model(tokens).square().sum() * (5 if step == 3 else 1)
    return loss


def named(model: nn.Module, wanted: Callable[[str], bool]) -> Parameters:
    """Return the parameters whose name is wanted."""
    return [parameter for name, parameter in model.named_parameters() if wanted(name)]


def by_layer(model: nn.Module) -> list[Parameters]:
    """Return the parameters of each layer: of each module that has some."""
    return [list(module.parameters()) for module in model.modules() if not list(module.children())]


def by_group(model: nn.Module) -> list[Parameters]:
    """Return the parameters of the three named groups; a parameter is in the first that fits."""
    return [
        named(model, lambda name: name.startswith("embed")),
        named(model, lambda name: "norm" in name),
        named(model, lambda name: not name.startswith("embed") and "norm" not in name),
    ]


UNITS: dict[str, Callable[[nn.Module], list[Parameters]]] = {
    "model": lambda model: [list(model.parameters())],
    "layer": by_layer,
    "parameter": lambda model: [[parameter] for parameter in model.parameters()],
    "group": by_group,
}


def train_twins(
    path: Path, policy: Any, clip: Callable[[nn.Module, int], None], *, fused: bool = False
) -> tuple[nn.Module, Any]:
    """Train under a policy, and a twin by hand with torch's clipping; assert that they stay alike."""
    model = Tiny()
    twin = copy.deepcopy(model)
    optimizer, other = (AdamW(each.parameters(), lr=0.01, fused=fused) for each in (model, twin))
    with attach(path, model, optimizer, policy=policy) as agent:
        for step in range(5):
            for each, steps in ((model, optimizer), (twin, other)):
                steps.zero_grad()
                backward(loss_of(each, step))
                if each is twin:
                    clip(twin, step)
                    after = hand_norms(twin)
                steps.step()
    run = open_run(agent.path)
    assert run.stat("grad_norm_postclip")[-1].tolist() == pytest.approx(after.tolist(), rel=1e-4)
    assert_same(model, twin)
    return model, run


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scope", ["layer", "parameter", "group"])
def test_group_norm_is_torch_called_for_each_unit(tmp_path: Path, scope: str, fused: bool) -> None:
    """``group_norm`` is ``clip_grad_norm_`` called once for the parameters of each unit."""

    def clip(model: nn.Module, step: int) -> None:
        for parameters in UNITS[scope](model):
            clip_grad_norm_(parameters, 2.0)

    policy = {"groups": {"by": GROUPS}, "pipeline": [{"group_norm": {"max_norm": 2.0, "scope": scope}}]}
    _, run = train_twins(tmp_path, policy, clip, fused=fused)
    assert run.clipped.any()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scope", UNITS)
def test_ema_ratio_has_an_average_for_each_unit(tmp_path: Path, scope: str, fused: bool) -> None:
    """``ema_ratio`` bounds each unit as ``clip_grad_norm_`` does at the ratio times an average that is kept by hand."""
    averages: dict[int, float] = {}

    def clip(model: nn.Module, step: int) -> None:
        for place, parameters in enumerate(UNITS[scope](model)):
            norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None))
            average = averages.get(place, norm)
            after = min(norm, 1.2 * average)
            clip_grad_norm_(parameters, 1.2 * average)
            if step > 0:
                averages[place] = average + 0.5 * (after - average)

    stage = {"ema_ratio": {"scope": scope, "ratio": 1.2, "beta": 0.5}}
    _, run = train_twins(tmp_path, {"groups": {"by": GROUPS}, "pipeline": [stage]}, clip, fused=fused)
    assert run.clipped[3].all()


@pytest.mark.parametrize("fused", [False, True])
def test_each_part_of_a_model_has_a_policy_of_its_own(tmp_path: Path, fused: bool) -> None:
    """Embeddings, norms and the rest, each with a policy chosen by match and exclude, are clipped as by hand."""

    def clip(model: nn.Module, step: int) -> None:
        embed, norms, rest = by_group(model)
        clip_grad_norm_(embed, 1.0)
        for parameter in norms:
            clip_grad_norm_([parameter], 0.5)
        clip_grad_norm_(rest, 3.0)

    policy = [
        {"global_norm": {"name": "embed", "max_norm": 1.0, "match": "embed*"}},
        {"group_norm": {"name": "norms", "max_norm": 0.5, "scope": "parameter", "match": "re:^norms"}},
        {"global_norm": {"name": "rest", "max_norm": 3.0, "exclude": ["embed*", "norms.*"]}},
    ]
    _, run = train_twins(tmp_path, policy, clip, fused=fused)
    assert run.clipped.all(axis=0).all()


def test_one_multi_tensor_call_for_all_coefficients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many policies give each unit a factor, the gradients are multiplied in one multi-tensor call a step."""
    calls: list[int] = []
    original = torch._foreach_mul_

    def counting(tensors: Any, factors: Any) -> Any:
        calls.append(len(tensors))
        return original(tensors, factors)

    monkeypatch.setattr(torch, "_foreach_mul_", counting)
    model = Tiny()
    optimizer = SGD(model.parameters(), lr=0.01, foreach=False)
    policy = [{"group_norm": {"max_norm": 0.1}}, {"adagc": {"warmup_steps": 0, "ratio": 0.5, "warmup_max_norm": 0.01}}]
    with attach(tmp_path, model, optimizer, policy=policy):
        for step in range(3):
            optimizer.zero_grad()
            backward(loss_of(model, step))
            optimizer.step()
    assert calls == [len(list(model.parameters()))] * 3


def test_units_that_appear_late_or_now_and_then(tmp_path: Path) -> None:
    """Parameters without a gradient in some steps keep their averages, and are clipped when they come."""
    model = nn.ModuleList([nn.Linear(2, 1, bias=False) for _ in range(2)])
    optimizer = SGD(model.parameters(), lr=0.0)
    policy = [{"adagc": {"warmup_steps": 1, "warmup_max_norm": 1.0, "ratio": 1.5, "beta": 0.5}}]
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        for size in (None, None, 10.0, None, 10.0):
            for place, parameter in enumerate(model.parameters()):
                here = None if place and size is None else torch.tensor([[size if place and size else 0.5, 0.0]])
                parameter.grad = here
            optimizer.step()
        state = agent.state_dict()["states"]["adagc"]
    after = open_run(agent.path).stat("grad_norm_postclip")[:, 1].tolist()
    assert after == pytest.approx([0, 0, 1.0, 0, 1.5])
    assert state["rejected"].tolist() == [0, 0]
    assert state["average"].tolist() == pytest.approx([0.5, 0.5 * 1.0 + 0.5 * 1.5])


NAMES = ["embed.weight", "block.norm.weight", "block.weight", "block.bias", "head.weight"]
COVERAGE: dict[str, tuple[Any, list[list[str]]]] = {
    "everything": ([{"global_norm": {"max_norm": 1}}], []),
    "only nonfinite": (["nonfinite"], []),
    "excluded": (
        [{"global_norm": {"max_norm": 1, "exclude": "head.*"}}], [["no policy", "head.weight (1 parameters)"]],
    ),
    "excluded by groups": (
        {"groups": {"exclude": "block.*"}, "pipeline": [{"value": {"max_abs": 1}}]},
        [["no policy", "block.norm.weight, block.weight, block.bias (3 parameters)"]],
    ),
    "more than three": (
        [{"global_norm": {"max_norm": 1, "match": "embed.*"}}], [["block.weight, block.bias, … (4 p"]],
    ),
    "covered by another": (
        [{"global_norm": {"max_norm": 1, "match": "embed.*"}}, {"group_norm": {"max_norm": 1, "exclude": "embed*"}}],
        [],
    ),
    "a skip covers nothing": (
        [{"skip": {}}, {"global_norm": {"max_norm": 1, "exclude": "embed.*"}}], [["no policy", "embed.weight"]],
    ),
    "only in shadow": (
        {"pipeline": [{"global_norm": {"max_norm": 1, "exclude": "embed.*"}}], "shadow": [{"zclip": {}}]},
        [["no policy", "embed.weight"]],
    ),
    "groups": (
        {"groups": {"by": {"all": "*", "head": "head*"}}, "pipeline": [{"global_norm": {"max_norm": 1}}]},
        [["groups without a parameter", "head (1 groups)"]],
    ),
    "no group": (
        {"groups": {"by": {"b": "block*"}}, "pipeline": [{"zclip": {"scope": "group"}}]},
        [["no policy", "embed.weight, head.weight"], ["in no named group: embed.weight, head.weight (2 parameters)"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COVERAGE)
def test_what_is_left_out_is_said(case: str) -> None:
    """Parameters that no policy clips, groups that own none, and parameters in no group each have a message."""
    source, wanted = COVERAGE[case]
    messages = coverage(load_policy(source), NAMES)
    assert len(messages) == len(wanted)
    for message, parts in zip(messages, wanted, strict=True):
        for part in parts:
            assert part in message


def test_what_is_left_out_is_said_at_attach(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At attach it is a warning in the log, and an event of the run."""
    model = Tiny()
    policy = [{"global_norm": {"max_norm": 1.0, "exclude": "head.*"}}]
    with (
        caplog.at_level(logging.WARNING),
        attach(tmp_path, model, SGD(model.parameters(), lr=0.1), policy=policy) as agent,
    ):
        pass
    (event,) = [event for event in open_run(agent.path).events if event["kind"] == "policy_coverage"]
    assert "head.weight, head.bias (2 parameters)" in event["message"]
    assert event["message"] in caplog.text


@pytest.mark.parametrize(
    "policy",
    [
        {"groups": {"by": {"head": "head*"}}, "pipeline": [{"zclip": {"scope": "group", "match": "embed*"}}]},
        [{"percentile": {"scope": "parameter", "window": 100_000, "name": "wide"}}],
    ],
)
def test_what_cannot_be_bound_is_refused(tmp_path: Path, policy: Any) -> None:
    """A policy whose groups own nothing it covers, or whose windows have no bound, is a PolicyError that names it."""
    model = nn.Module()
    for place in range(200):
        model.register_parameter(f"embed{place}", nn.Parameter(torch.ones(1)))
    model.register_parameter("head", nn.Parameter(torch.ones(1)))
    with pytest.raises(PolicyError, match=r"policy (zclip|wide): "):
        attach(tmp_path, model, SGD(model.parameters(), lr=0.1), policy=policy)
