"""Policies that learn against plain NumPy, written anew from their definitions: to the letter, and with the guards.

Histories have spikes, dips and a change of level, and nothing that guards reject: what is left of a guard is then a
floor, the division by the bare norm, and what an outlier enters a window as.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from gradiometer.policy.base import Layout
from gradiometer.policy.build import build_pipeline
from gradiometer.policy.pipeline import observe
from gradiometer.policy.spec import load_policy
from tests._training import Floats

STEPS, EPSILON = 220, 1e-6
NAMES, LAYERS = ["a.weight", "a.bias", "b.weight"], ["a", "a", "b"]
COMPAT = pytest.mark.parametrize("compat", ["safe", "reference"])
SCOPE = pytest.mark.parametrize("scope", ["model", "layer", "parameter"])


def history(seed: int) -> Floats:
    """Make norms [T, 3] with spikes and dips, five times higher from step 120 on."""
    random = np.random.default_rng(seed)
    rows = np.exp(random.normal(-1.0, 0.3, (STEPS, 3)))
    rows[random.integers(30, STEPS, 8)] *= 30.0
    rows[random.integers(30, STEPS, 4)] *= 0.01
    rows[120:] *= 5.0
    return rows


def of_units(rows: Floats, scope: str) -> tuple[Floats, list[int]]:
    """Return the norms of the units [T, U], and which of them each parameter is in."""
    if scope == "model":
        return np.sqrt(np.square(rows).sum(axis=1, keepdims=True)), [0, 0, 0]
    if scope == "layer":
        return np.stack([np.hypot(rows[:, 0], rows[:, 1]), rows[:, 2]], axis=1), [0, 0, 1]
    return rows, [0, 1, 2]


def decide(rows: Floats, kind: str, **settings: Any) -> list[Any]:
    """Return what one stage decides about each step."""
    layout = Layout(names=NAMES, layers=LAYERS, device=torch.device("cpu"))
    pipeline = build_pipeline(load_policy([{kind: settings}]), layout)
    assert pipeline is not None
    states, decisions = pipeline.init(), []
    for step, row in enumerate(rows):
        outcome, states = pipeline.decide(states, observe(torch.tensor(row)), step)
        decisions.append(outcome.decisions[0])
    return decisions


def assert_factors(rows: Floats, scope: str, wanted: Floats, kind: str, **settings: Any) -> None:
    """Assert that a stage scales the three parameters by the factors that their units [T, U] should have."""
    found = [decision.coefficient.expand(3).tolist() for decision in decide(rows, kind, scope=scope, **settings)]
    assert (wanted < 1).any()
    np.testing.assert_allclose(found, wanted[:, of_units(rows, scope)[1]], rtol=1e-12)


def each(units: Floats, one: Callable[[Sequence[float]], list[float]]) -> Floats:
    return np.stack([one(column.tolist()) for column in units.T], axis=1)


@COMPAT
@SCOPE
@pytest.mark.parametrize("learn", [True, False])
@pytest.mark.parametrize(("option", "factor", "most"), [
    ("reciprocal", 1.0, 1.0), ("reciprocal", 0.8, None), ("reciprocal", 3.0, None), ("mean", 1.0, None),
    ("percentile", 1.0, 2.0),
])  # fmt: skip
def test_zclip(compat: str, scope: str, learn: bool, option: str, factor: float, most: float | None) -> None:
    """Spikes are cut to what the option says, and feed that; the bound in any case feeds nothing."""

    def one(norms: Sequence[float]) -> list[float]:
        mean, variance, factors = 0.0, 0.0, []
        for step, norm in enumerate(norms):
            if step == 25:
                mean, variance = float(np.mean(norms[:25])), float(np.var(norms[:25]))
            cut = norm
            if step >= 25:
                spread = math.sqrt(variance) if compat == "reference" else max(math.sqrt(variance), 0.01 * mean)
                score = (norm - mean) / (spread + (EPSILON if compat == "reference" else 0.0))
                spike = norm > mean + 2.5 * spread if option == "percentile" else score > 2.5
                reciprocal = factor * (mean + 2.5 * spread / (score / 2.5)) if score else mean
                if spike:
                    cut = {"reciprocal": reciprocal, "mean": mean, "percentile": mean + 2.5 * spread}[option]
                if compat == "safe":
                    cut = min(cut, norm)
                if learn or not spike:
                    mean = 0.97 * mean + 0.03 * cut
                    variance = 0.97 * variance + 0.03 * (cut - mean) ** 2
            bound = cut if most is None else min(cut, most)
            factors.append(bound / (norm + (EPSILON if compat == "reference" else 0.0)) if norm > bound else 1.0)
        return factors

    rows = history(1)
    assert_factors(
        rows, scope, each(of_units(rows, scope)[0], one), "zclip",
        compat=compat, option=option, clip_factor=factor, max_grad_norm=most, learn_from_spikes=learn,
    )  # fmt: skip


@COMPAT
@SCOPE
def test_percentile(compat: str, scope: str) -> None:
    """The threshold is NumPy's percentile of the window, this norm included, once there are enough."""

    def one(norms: Sequence[float]) -> list[float]:
        small = EPSILON if compat == "reference" else 0.0
        thresholds = [np.percentile(norms[max(0, place - 49) : place + 1], 37) for place in range(len(norms))]
        return [
            1.0 if place < 6 else min(1.0, threshold / (norm + small))
            for place, (norm, threshold) in enumerate(zip(norms, thresholds, strict=True))
        ]

    rows = history(2)
    wanted = each(of_units(rows, scope)[0], one)
    assert_factors(rows, scope, wanted, "percentile", compat=compat, p=37, window=50, min_history=7)


@COMPAT
@SCOPE
def test_adagc(compat: str, scope: str) -> None:
    """A hundred steps of one bound for all, the least norm of which each average starts from."""
    rows = history(3)
    units, _ = of_units(rows, scope)
    averages, wanted = np.full(units.shape[1], np.inf), []
    for step, norms in enumerate(units):
        if step < 100:
            factors = np.full(len(norms), min(1.0, 1.0 / (math.sqrt(np.square(norms).sum()) + EPSILON)))
            averages = np.minimum(averages, norms * factors)
        else:
            bounds = 1.04 * averages
            small = EPSILON if compat == "reference" else 0.0
            factors = np.where(norms > bounds, bounds / (norms + small), 1.0)
            averages = 0.99 * averages + 0.01 * np.minimum(norms, bounds)
        wanted.append(factors)
    assert_factors(rows, scope, np.stack(wanted), "adagc", compat=compat)


@COMPAT
@SCOPE
def test_ema_ratio(compat: str, scope: str) -> None:
    """The average begins with the second norm, and learns what was left of each."""

    def one(norms: Sequence[float]) -> list[float]:
        average, factors = math.nan, []
        for step, norm in enumerate(norms):
            known = norm if math.isnan(average) else average
            factors.append(min(1.0, 2.0 * known / (norm + (EPSILON if compat == "reference" else 0.0))))
            if step:
                average = 0.95 * known + 0.05 * norm * factors[-1]
        return factors

    rows = history(4)
    assert_factors(rows, scope, each(of_units(rows, scope)[0], one), "ema_ratio", compat=compat)


@COMPAT
@pytest.mark.parametrize("rule", ["sigma", "median_mad"])
def test_skip(compat: str, rule: str) -> None:
    """The limit is that of the steps before, with the unbiased deviation; an outlier enters as the limit if it may."""
    rows = history(5)
    past, limits, skips = list[float](), [], []
    for norm in of_units(rows, "model")[0][:, 0].tolist():
        window, limit = np.array(past[-32:]), math.inf
        if len(window) >= 7 and rule == "sigma":
            least = 0.01 * window.mean() if compat == "safe" else 0.0
            limit = window.mean() + 3.0 * max(window.std(ddof=1), least)
        elif len(window) >= 7:
            middle = np.median(window)
            limit = middle + 3.0 * max(1.482602218505602 * np.median(np.abs(window - middle)), 0.01 * middle)
        limits.append(float(limit))
        skips.append(norm > limit)
        past.append(min(norm, float(limit)) if rule == "sigma" and compat == "safe" else norm)
    found = decide(
        rows, "skip", compat=compat, rule=rule, window=32, min_history=8, sigma=3.0, k=3.0, max_consecutive=None
    )
    np.testing.assert_allclose([float(decision.threshold) for decision in found], limits, rtol=1e-12)
    assert [bool(decision.skip) for decision in found] == skips
    assert any(skips)
