"""What holds for every policy that learns, with ``compat: safe``, whatever the gradients are.

Streams hold what a run can show: ordinary norms, zeros, NaN, Inf, the smallest and largest floats, parameters without a
gradient, steps that an earlier stage skips, losses that are missing, finite or not.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradiometer.policy import KINDS
from gradiometer.policy.base import Decision, Layout, Observation
from gradiometer.policy.build import build_pipeline
from gradiometer.policy.pipeline import Pipeline, observe
from gradiometer.policy.spec import load_policy

pytestmark = pytest.mark.slow

NAMES = ["embed.weight", "block.norm.weight", "block.weight", "block.bias", "head.weight"]
LAYERS = ["embed", "block.norm", "block", "block", "head"]
GROUPS = {"embed": "embed*", "norms": "*norm*"}
SCOPES = ["model", "layer", "parameter", "group"]
BOUNDING: dict[str, dict[str, Any]] = {
    "percentile": {"percentile": {"p": 50, "window": 4}},
    "zclip": {"zclip": {"warmup_steps": 2}},
    "zclip without a bound": {"zclip": {"warmup_steps": 2, "max_grad_norm": None, "option": "mean"}},
    "zclip percentile": {"zclip": {"warmup_steps": 1, "option": "percentile", "learn_from_spikes": False}},
    "zclip without a floor": {"zclip": {"warmup_steps": 2, "clip_factor": 2.0, "floor": 0.0}},
    "adagc": {"adagc": {"warmup_steps": 2}},
    "adagc at once": {"adagc": {"warmup_steps": 0, "ratio": 0.5}},
    "ema_ratio": {"ema_ratio": {}},
    "ema_ratio below 1": {"ema_ratio": {"ratio": 0.5}},
}
SKIPPING: dict[str, dict[str, Any]] = {
    "sigma": {"skip": {"window": 4, "min_history": 3, "on": ["loss", "global_norm"], "max_consecutive": 3}},
    "median_mad": {"skip": {"window": 4, "min_history": 3, "rule": "median_mad", "max_consecutive": 3}},
    "abs": {"skip": {"rule": "abs", "threshold": 2.0, "on": ["loss", "global_norm"], "max_consecutive": 3}},
}
LEARNING = BOUNDING | SKIPPING
ROUNDING = {torch.float32: 3e-7, torch.float64: 1e-12}
"""A coefficient is rounded to the gradients' dtype, and so is its product with the norm: two half units of 1.2e-7, and
as much for composing the norms of a unit's parameters, which is done in float64 and rounded once."""

ORDINARY = st.floats(min_value=2**-6, max_value=10, width=32)
EXTREME = st.sampled_from([0.0, -0.0, math.nan, -math.nan, math.inf, 1e-45, 1e-30, 1e-6, 1e19, 3e38])
NORM = st.one_of(ORDINARY, EXTREME)
LOSS = st.one_of(st.none(), st.floats(-10, 10, width=32), st.sampled_from([math.nan, math.inf, -math.inf, 3e38]))
STEP = st.tuples(st.lists(NORM, min_size=5, max_size=5), LOSS, st.booleans())
STREAM = st.lists(STEP, min_size=1, max_size=14)
F32 = torch.float32
DTYPE = st.sampled_from([torch.float32, torch.float64])


def bind(stage: dict[str, Any], scope: str | None = None, **selection: Any) -> Pipeline:
    """Bind one stage to five parameters in four layers, of which two groups own two."""
    ((kind, given_settings),) = stage.items()
    chosen = dict(given_settings) | ({} if scope is None or kind == "skip" else {"scope": scope}) | selection
    layout = Layout(names=NAMES, layers=LAYERS, device=torch.device("cpu"))
    spec = load_policy({"groups": {"by": GROUPS}, "pipeline": [{kind: chosen}]})
    pipeline = build_pipeline(spec, layout)
    assert pipeline is not None
    return pipeline


def watch(row: tuple[list[float], float | None, bool], dtype: torch.dtype) -> Observation:
    """Make the observation of one step: norms, loss, and whether an earlier stage skips it."""
    norms, loss, skipped = row
    seen = observe(torch.tensor(norms, dtype=dtype), None if loss is None else torch.tensor(loss))
    return replace(seen, skipped=torch.tensor(True) if skipped else None)


def live(pipeline: Pipeline, stream: Any, dtype: torch.dtype) -> Iterator[tuple[Observation, Decision, Any]]:
    """Decide about a stream; yield each step's observation, decision and the state after it."""
    states = pipeline.init()
    for step, row in enumerate(stream):
        observation = watch(row, dtype)
        outcome, states = pipeline.decide(states, observation, step)
        yield observation, outcome.decisions[0], next(iter(states.values()))


def bits(tensor: Tensor | float | None) -> bytes:
    """Return a tensor's bits, NaN included."""
    return b"" if tensor is None else torch.as_tensor(tensor).contiguous().numpy().tobytes()


def test_every_learning_kind_is_here() -> None:
    """A kind that is added to the file without a place in these properties fails here."""
    covered = {next(iter(stage)) for stage in LEARNING.values()}
    assert covered == set(KINDS) - {"nonfinite", "global_norm", "group_norm", "value", "agc"}


@pytest.mark.parametrize("name", LEARNING)
@settings(max_examples=60)
@given(stream=STREAM, scope=st.sampled_from(SCOPES), dtype=DTYPE)
def test_coefficients_are_factors(name: str, stream: Any, scope: str, dtype: torch.dtype) -> None:
    """Coefficients and strengths are in [0, 1] and never NaN, of the gradients' dtype; thresholds are never NaN."""
    for _, decision, _ in live(bind(LEARNING[name], scope), stream, dtype):
        for part in (decision.coefficient, decision.strength):
            if part is not None:
                assert bool(((part >= 0) & (part <= 1)).all())
                assert part.dtype == dtype
        assert not math.isnan(float(decision.threshold))


@pytest.mark.parametrize("name", LEARNING)
@settings(max_examples=60)
@given(stream=STREAM, scope=st.sampled_from(SCOPES), dtype=DTYPE)
def test_only_finite_norms_enter_a_statistic(name: str, stream: Any, scope: str, dtype: torch.dtype) -> None:
    """State is finite where something was learned; scales are positive; what taught nothing is counted."""
    pipeline = bind(LEARNING[name], scope)
    before = next(iter(pipeline.init().values()))
    for observation, _, state in live(pipeline, stream, dtype):
        for key in set(state) & {"mean", "variance", "average"}:
            changed = (state[key] != before[key]) & ~(state[key].isnan() & before[key].isnan())
            assert bool((state[key][changed].isfinite() & (state[key][changed] >= 0)).all())
        if "window" in state:
            filled = state["count"].clamp(max=state["window"].shape[-1])
            assert torch.equal(state["window"].isfinite().sum(-1), filled)
        if observation.skipped is not None:
            for key in set(state) - {"rejected"}:
                assert bits(state[key]) == bits(before[key])
        assert bool((state["rejected"] >= before["rejected"]).all())
        before = state


@pytest.mark.parametrize("name", BOUNDING)
@settings(max_examples=60)
@given(stream=STREAM, scope=st.sampled_from(["model", "parameter"]), dtype=DTYPE)
def test_the_norm_is_bounded_afterwards(name: str, stream: Any, scope: str, dtype: torch.dtype) -> None:
    """The unit that is scaled the most has, after it, at most the norm that the threshold says."""
    for observation, decision, _ in live(bind(BOUNDING[name], scope), stream, dtype):
        assert decision.coefficient is not None
        norms = observation.total.reshape(1) if decision.coefficient.dim() == 0 else observation.norms
        if not bool(norms.isfinite().all()):
            continue
        strongest = decision.coefficient.reshape(-1).argmin()
        after = float((norms * decision.coefficient).reshape(-1)[strongest])
        coarse = 1.5e-45 * float(norms.reshape(-1)[strongest]) + 1e-44  # a coefficient or a norm that is subnormal
        assert after <= float(decision.threshold) * (1 + ROUNDING[dtype]) + coarse


@pytest.mark.parametrize("name", LEARNING)
@settings(max_examples=30)
@given(stream=STREAM, cut=st.integers(0, 13), scope=st.sampled_from(SCOPES))
def test_a_resumed_run_decides_the_same(name: str, stream: Any, cut: int, scope: str) -> None:
    """A state saved at any step, and loaded into a new pipeline, gives the same bits for ever after."""
    pipeline = bind(LEARNING[name], scope)
    unbroken = [(bits(d.coefficient), bits(d.skip), bits(d.threshold)) for _, d, _ in live(pipeline, stream, F32)]
    states, resumed = pipeline.init(), []
    for step, row in enumerate(stream):
        if step == cut:
            file = io.BytesIO()
            torch.save(states, file)
            file.seek(0)
            pipeline, states = bind(LEARNING[name], scope), torch.load(file)
        outcome, states = pipeline.decide(states, watch(row, F32), step)
        (decision,) = outcome.decisions
        resumed.append((bits(decision.coefficient), bits(decision.skip), bits(decision.threshold)))
    assert resumed == unbroken


@pytest.mark.parametrize("name", LEARNING)
@settings(max_examples=20)
@given(stream=STREAM, scope=st.sampled_from(SCOPES))
def test_ranks_with_the_same_numbers_decide_the_same(name: str, stream: Any, scope: str) -> None:
    """Two pipelines bound apart give the same bits, and deciding twice changes nothing: it is pure."""
    first, second = bind(LEARNING[name], scope), bind(LEARNING[name], scope)
    states, others = first.init(), second.init()
    for step, row in enumerate(stream):
        kept = copy.deepcopy(states)
        one, following = first.decide(states, watch(row, F32), step)
        two, others = second.decide(others, watch(row, F32), step)
        assert (bits(one.coefficient), bits(one.skip)) == (bits(two.coefficient), bits(two.skip))
        for stage, tensors in kept.items():
            assert {k: bits(t) for k, t in tensors.items()} == {k: bits(t) for k, t in states[stage].items()}
            assert {k: bits(t) for k, t in following[stage].items()} == {k: bits(t) for k, t in others[stage].items()}
        states = following


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", BOUNDING)
@pytest.mark.parametrize("nothing", [0.0, -0.0, math.nan, math.inf])
def test_a_zero_gradient_locks_nothing_out(name: str, scope: str, nothing: float) -> None:
    """Whatever of this fills the first steps, gradients that come later get through, from the first one on."""
    stream = [([nothing] * 5, None, False)] * 5 + [([0.1] * 5, None, False)] * 12
    coefficients = [
        float(d.strength) for _, d, _ in live(bind(BOUNDING[name], scope), stream, F32) if d.strength is not None
    ]
    ratio = 0.5 if "below" in name or "once" in name else 1.0
    assert min(coefficients[5:]) > 0.9 * ratio**8
    if ratio == 1:
        assert min(coefficients[5:]) > 0.95


@pytest.mark.parametrize("name", ["adagc", "ema_ratio"])
def test_an_average_has_a_floor(name: str) -> None:
    """However small norms have been, and for however long, one of the floor's size gets through."""
    stream = [([1e-30, 0.0, 0.0, 0.0, 0.0], None, False)] * 60 + [([1e-8, 0.0, 0.0, 0.0, 0.0], None, False)]
    *_, (_, last, _) = live(bind(BOUNDING[name], "parameter"), stream, F32)
    assert last.strength is not None
    assert float(last.strength) == 1
    assert float(last.threshold) >= 1e-8


@pytest.mark.parametrize("name", ["zclip", "adagc", "ema_ratio"])
def test_guards_change_nothing_of_a_healthy_run(name: str) -> None:
    """Where norms are ordinary, safe and reference agree, but for the 1e-6 that references add to a norm."""
    generator = torch.Generator().manual_seed(0)
    norms = (0.3 + 0.2 * torch.rand(60, 5, generator=generator)).tolist()
    norms[40] = [each * 5 for each in norms[40]]
    stream = [(row, None, False) for row in norms]
    found = []
    for compat in ("safe", "reference"):
        stage = copy.deepcopy(BOUNDING[name])
        stage[name]["compat"] = compat
        decisions = [decision for _, decision, _ in live(bind(stage, "model"), stream, torch.float64)]
        found.append(torch.stack([each.strength for each in decisions if each.strength is not None]))
    assert bool((found[0] < 1).any())
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["adagc", "ema_ratio", "zclip", "percentile"])
@pytest.mark.parametrize("scope", ["model", "parameter"])
@pytest.mark.parametrize("exclude", [[], ["embed*"]], ids=["of all", "of others"])
def test_a_step_that_is_not_all_finite_teaches_nobody(name: str, scope: str, exclude: list[str]) -> None:
    """One parameter's Inf keeps all norms out, also of those whose policy leaves it out: such a step is not taken."""
    stage = copy.deepcopy(BOUNDING[name])
    rows = [([1.0] * 5, None, False)] * 4 + [([math.inf, 9.0, 9.0, 9.0, 9.0], None, False)]
    *_, (_, _, before), (_, _, after) = live(bind(stage, scope, exclude=exclude), rows, F32)
    assert bool((after["rejected"] - before["rejected"] == 1).all())
    for key in set(after) - {"rejected"}:
        assert bits(after[key]) == bits(before[key])


def judge(stage: dict[str, Any], norms: list[float], losses: list[float] | None = None) -> list[bool]:
    """Return which steps of a stream of global norms a ``skip`` skips."""
    rows = [([norm, 0.0, 0.0, 0.0, 0.0], losses[place] if losses else None, False) for place, norm in enumerate(norms)]
    return [bool(decision.skip) for _, decision, _ in live(bind(stage), rows, F32)]


def wave(steps: int, level: float = 1.0) -> list[float]:
    """Make a calm history around a level."""
    return [level * (1 + 0.05 * math.sin(place)) for place in range(steps)]


@pytest.mark.parametrize("rule", ["sigma", "median_mad"])
def test_a_spike_neither_passes_nor_blinds(rule: str) -> None:
    """Of two spikes the second is skipped as well: the first has not widened the window to let it through."""
    skipped = judge(
        {"skip": {"rule": rule, "window": 32, "min_history": 8}}, [*wave(40), 1e6, *wave(5), 100.0, *wave(5)]
    )
    assert [place for place, skip in enumerate(skipped) if skip] == [40, 46]


@pytest.mark.parametrize(("rule", "within"), [("sigma", 60), ("median_mad", 40)])
@pytest.mark.parametrize("limit", [None, 20])
def test_a_shift_of_level_is_learned(rule: str, within: int, limit: int | None) -> None:
    """Norms that stay ten times higher are skipped for a while and not for ever, also without a limit to it."""
    stage = {"skip": {"rule": rule, "window": 32, "min_history": 8, "max_consecutive": limit}}
    skipped = judge(stage, [*wave(40), *wave(100, 10.0)])[40:]
    assert skipped[0]
    assert not any(skipped[within:])


def test_so_many_skips_in_a_row_and_no_more() -> None:
    """After ``max_consecutive`` skips a step is taken, and the count begins anew; ``then: raise`` goes on skipping."""
    stage: dict[str, Any] = {"skip": {"rule": "abs", "threshold": 1.0, "max_consecutive": 3}}
    assert judge(stage, [2.0] * 9) == [True, True, True, False] * 2 + [True]
    stage["skip"]["then"] = "raise"
    assert judge(stage, [2.0] * 5) == [True] * 5
    *_, (_, _, state) = live(bind(stage), [([2.0, 0, 0, 0, 0], None, False)] * 5, F32)
    assert state["consecutive"].item() == 5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_never_accepted(bad: float) -> None:
    """However many were skipped in a row, and however little history there is, NaN and Inf are skipped."""
    assert judge({"skip": {"max_consecutive": 2}}, [bad] * 6) == [True] * 6


def test_a_loss_that_was_not_logged_says_nothing() -> None:
    """NaN for a loss skips nothing and enters no window; an infinite loss is skipped."""
    stage = {"skip": {"on": "loss", "window": 8, "min_history": 3}}
    losses = [*wave(6), math.nan, *wave(3), 50.0, math.inf]
    assert judge(stage, [1.0] * 12, losses) == [False] * 10 + [True, True]


def test_zero_variance_is_no_reason_to_skip_or_clip() -> None:
    """After a constant history a move of one percent passes, where the published rules would have acted."""
    history = [0.5] * 30 + [0.505]
    assert not any(judge({"skip": {"window": 16, "min_history": 4}}, history))
    stream = [([norm, 0.0, 0.0, 0.0, 0.0], None, False) for norm in history]
    assert all(float(d.strength) == 1 for _, d, _ in live(bind({"zclip": {}}), stream, F32) if d.strength is not None)
