"""With ``compat: reference`` the policies that learn do what the published code did, its faults included.

Every case of every file is run, to 1e-12 in float64. What a case cannot be asked is named in :data:`NOT_EXPRESSED`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from gradiometer.policy.base import Layout
from gradiometer.policy.build import build_pipeline
from gradiometer.policy.pipeline import Outcome, Pipeline, observe
from gradiometer.policy.spec import load_policy
from tests._training import attach

VECTORS = Path(__file__).parent / "vectors"
NAMES = ["a", "b", "c"]
NOT_EXPRESSED = {
    "skip_step_sigma: adam_state_under_skip, gradients with NaN or Inf": (
        "OLMo-core multiplies the update by zero, which keeps NaN; a step is skipped here by not being taken, so "
        "parameters and moments stay as they were, which is what is asserted instead"
    ),
}


def vectors(name: str) -> dict[str, Any]:
    """Read a file of vectors; its non-finite numbers are strings that ``float`` reads."""
    found: dict[str, Any] = json.loads((VECTORS / f"{name}.json").read_text())
    return found


HISTORIES = vectors("norm_histories")["histories"]


def cases(name: str) -> list[Any]:
    """Return the cases of a file as test parameters that say what they are."""
    found = vectors(name)["cases"]
    return [pytest.param(case, id=f"{place}-{case['history'][:12]}") for place, case in enumerate(found)]


def bind(kind: str, **settings: Any) -> Pipeline:
    """Bind one policy, as in the reference, to three parameters of one element."""
    layout = Layout(names=NAMES, layers=NAMES, device=torch.device("cpu"))
    pipeline = build_pipeline(load_policy([{kind: {"compat": "reference", **settings}}]), layout)
    assert pipeline is not None
    return pipeline


def replay(
    pipeline: Pipeline, norms: Sequence[Sequence[Any]], dtype: torch.dtype = torch.float64
) -> list[tuple[list[float], Outcome, dict[str, Tensor]]]:
    """Decide about a history; return for each step the gradients it leaves, the outcome and the state after it."""
    states, found = pipeline.init(), []
    for step, row in enumerate(norms):
        gradients = torch.tensor([float(each) for each in row], dtype=torch.float64).to(dtype)
        outcome, states = pipeline.decide(states, observe(gradients), step)
        assert outcome.coefficient is not None
        left: list[float] = (gradients * outcome.coefficient).tolist()
        found.append((left, outcome, next(iter(states.values()))))
    return found


def history(case: Any) -> list[Any]:
    """Return the norms of a case from step 0 on."""
    first = case.get("first_step", 0)
    earlier = HISTORIES.get(case["history"]) or [[0.3, 0.0, 0.4]] * first  # the other histories begin with a constant
    return [*earlier[:first], *(step["in"] for step in case["steps"])]


def same(found: Sequence[float], wanted: Sequence[Any], rel: float = 1e-12) -> None:
    """Assert that numbers agree, NaN with NaN."""
    assert list(found) == pytest.approx([float(each) for each in wanted], rel=rel, abs=0, nan_ok=True)


@pytest.mark.parametrize("case", cases("zclip"))
def test_zclip(case: Any) -> None:
    """``zclip`` leaves the gradients, and remembers the mean and variance, that ZClip 1.0.0 did."""
    names = {"max_grad_norm": "max_grad_norm", "alpha": "alpha", "z_thresh": "z", "warmup_steps": "warmup_steps"}
    given = case["parameters"]
    settings = {names[key]: value for key, value in given.items() if key in names}
    settings["option"] = {"mean": "mean"}.get(given.get("clip_option"), "reciprocal")
    if given.get("mode") == "percentile":
        settings["option"] = "percentile"
    settings |= {"clip_factor": given.get("clip_factor", 1.0)}
    settings |= {"learn_from_spikes": not given.get("skip_update_on_spike", False)}
    found = replay(bind("zclip", **settings), history(case))[case["first_step"] :]
    for (gradients, outcome, state), step in zip(found, case["steps"], strict=True):
        total, mean, variance, *wanted = step["out"]
        same(gradients, wanted)
        same([outcome.before.total.item()], [total])
        if mean is not None:
            same([state["mean"].item(), state["variance"].item()], [mean, variance])


@pytest.mark.parametrize("case", cases("adagc"))
def test_adagc(case: Any) -> None:
    """``adagc`` leaves the gradients, and remembers the averages, that AdaGC and its global variant did."""
    names = {"max_norm_warmup": "warmup_max_norm", "start_clip_steps": "warmup_steps", "clip_ratio": "ratio"}
    settings = {names.get(key, key): value for key, value in case["parameters"].items()}
    settings["scope"] = {"AdaGC": "parameter", "GlobalAdaGC": "model"}[case["cls"]]
    found = replay(bind("adagc", **settings), history(case))[case["first_step"] :]
    for place, ((gradients, outcome, state), step) in enumerate(zip(found, case["steps"], strict=True)):
        same(gradients, step["out"]["g"])
        same(state["average"].reshape(-1).tolist(), step["out"]["state"])
        total = outcome.before.total.item()
        if case["cls"] == "GlobalAdaGC" and case["first_step"] + place >= settings["warmup_steps"]:
            total = min(total, float(outcome.decisions[0].threshold))
        same([total], [step["out"]["ret"]])


@pytest.mark.parametrize("case", cases("olmo_ema_ratio"))
def test_ema_ratio(case: Any) -> None:
    """``ema_ratio`` leaves the gradients, and remembers the averages, that OLMo did."""
    given = case["parameters"]
    settings = {"ratio": given["max_grad_norm_ratio"], "beta": max(given["betas"])}
    dtype = getattr(torch, given["norm_dtype"])
    # The reference computes the float32 case in float32, whose digits it has; here averages are float64 always.
    rel = 1e-12 if dtype is torch.float64 else 2e-6
    found = replay(bind("ema_ratio", **settings), history(case), dtype)[case["first_step"] :]
    for (gradients, _, state), step in zip(found, case["steps"], strict=True):
        same(gradients, step["out"]["g"], rel)
        same(state["average"].tolist(), [math.nan if e is None else e for e in step["out"]["ema"]], rel)


@pytest.mark.parametrize("case", cases("autoclip"))
def test_percentile(case: Any) -> None:
    """``percentile`` has the thresholds of AutoClip, and leaves the gradients that it did."""
    found = replay(bind("percentile", p=case["percentile"]), history(case))[case["first_step"] :]
    for (gradients, outcome, _), step in zip(found, case["steps"], strict=True):
        total, threshold, *wanted = step["out"]
        same([outcome.before.total.item(), float(outcome.decisions[0].threshold)], [total, threshold])
        same(gradients, wanted)


def judge(pipeline: Pipeline, loss: float | None, norm: float, states: Any) -> tuple[bool, float, Any]:
    """Ask a pipeline of one ``skip`` about a step; return whether it skips, the threshold and the next state."""
    given = None if loss is None else torch.tensor(loss, dtype=torch.float64)
    outcome, states = pipeline.decide(states, observe(torch.tensor([norm, 0.0, 0.0], dtype=torch.float64), given), 0)
    assert outcome.skip is not None
    return bool(outcome.skip), float(outcome.decisions[0].threshold), states


@pytest.mark.parametrize("case", cases("skip_step_sigma"))
def test_skip_sigma(case: Any) -> None:
    """``skip`` of rule sigma skips the steps that OLMo-core skipped, a whole window after a NaN among them."""
    length, sigma = case["parameters"]["rolling_interval_length"], case["parameters"]["sigma_factor"]
    on = ["loss", "global_norm"] if len(case["steps"][0]["in"]) == 2 else ["loss"]
    pipeline = bind("skip", on=on, window=length, sigma=sigma, min_history=max(2, length // 2))
    states = pipeline.init()
    for place, step in enumerate(case["steps"]):
        loss, norm = (*map(float, step["in"]), 0.0)[:2]
        skipped, _, states = judge(pipeline, loss, norm, states)
        assert skipped == (step["out"] == 0), place


@pytest.mark.parametrize("compat", ["reference", "safe"])
@pytest.mark.parametrize("case", cases("median_mad_PROPOSED"))
def test_skip_median_mad(case: Any, compat: str) -> None:
    """``skip`` of rule median_mad has the limits of its definition; safe differs in taking in no zero."""
    given = case["parameters"]
    pipeline = bind(
        "skip", rule="median_mad", window=given["window"], k=given["k"], floor=given["rel_floor"],
        min_history=given["warmup"] + 1, compat=compat, max_consecutive=None,
    )  # fmt: skip
    states, zero_seen = pipeline.init(), False
    for step in case["steps"]:
        threshold, over = step["out"]
        skipped, limit, states = judge(pipeline, None, float(step["in"]), states)
        if compat == "safe" and zero_seen:
            continue
        zero_seen = zero_seen or float(step["in"]) == 0
        same([limit], [math.inf if threshold is None else threshold])
        bad = not math.isfinite(float(step["in"]))
        assert skipped == (over or bad)  # the definition leaves what is not finite to others; it is never a calm step


@pytest.mark.parametrize("case", vectors("skip_step_sigma")["adam_state_under_skip"])
def test_a_skipped_step_moves_nothing(tmp_path: Path, case: Any) -> None:
    """A step that ``skip`` skips leaves AdamW's numbers as they were, also where OLMo-core's NaN spreads."""
    given, wanted = case["in"], case["out"]
    parameter = nn.Parameter(torch.tensor(given["param0"], dtype=torch.float32))
    optimizer = AdamW([parameter], foreach=given["foreach"])
    moments = {"exp_avg": given["exp_avg0"], "exp_avg_sq": given["exp_avg_sq0"]}
    optimizer.state[parameter] = {key: torch.tensor(value) for key, value in moments.items()} | {
        "step": torch.tensor(wanted["step"])
    }
    parameter.grad = torch.tensor([float(each) for each in given["grad"]])
    policy = [{"skip": {"rule": "abs", "threshold": 0.5}}]
    with attach(tmp_path, nn.ParameterList([parameter]), optimizer, policy=policy):
        optimizer.step()
    faulty = "NaN" in wanted["param"]
    assert faulty == (not math.isfinite(float(given["grad"][1])))
    expected = {"param": given["param0"], **moments} if faulty else wanted
    assert parameter.tolist() == pytest.approx(expected["param"])
    for key in moments:
        assert optimizer.state[parameter][key].tolist() == pytest.approx(expected[key])
    assert optimizer.state[parameter]["step"].item() == wanted["step"]
