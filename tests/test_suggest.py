"""Suggest: proposals for histories whose answers are known, and nothing where it is too early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from gradiometer.cli import app
from gradiometer.policy.spec import load_policy
from gradiometer.records import Flag
from gradiometer.replay.suggest import find, propose
from tests.test_replay import live_run

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, WriteRun

LAYERS = np.array([0.5, 0.5, 0.5, 0.5])
STEPS = 600


def level(sigma: float = 0.1) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return norms of the whole model about 1, [STEPS]."""
    return np.random.default_rng(0).lognormal(0, sigma, STEPS)


@pytest.fixture
def suggest(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> Any:
    """Give a function that writes a run of the norms [T] or [T, P] and returns what ``suggest --json`` says."""

    def ask(norms: Any, *options: str, status: int = 0, **columns: Any) -> dict[str, Any]:
        whole = np.asarray(norms)
        parts = whole[:, None] * LAYERS if whole.ndim == 1 else whole
        write_run(make_manifest(capacity=2000), parts, **columns)
        done = CliRunner().invoke(app, ["suggest", str(tmp_path / "run"), "--json", *options])
        assert done.exit_code == status, (done.output, done.exception)
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    return ask


def stages(result: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the proposal by kind."""
    return {kind: each for entry in result["proposal"]["policy"]["pipeline"] for kind, each in entry.items()}


def test_a_level_run_with_spikes(suggest: Any) -> None:
    """A fixed norm between the ordinary steps and the spikes, which catches them all and little else."""
    norms = level()
    norms[[200, 350, 500]] = 8, 20, 5
    result = suggest(norms)
    found, figures = result["findings"], result["proposal"]["replay"]
    assert found["spikes"] == [200, 350, 500]
    assert found["warmup"] == 0
    assert found["highest"] == pytest.approx(20, rel=0.1)
    assert 1.2 < stages(result)["global_norm"]["max_norm"] <= 3.1
    assert (figures["spikes_caught"], figures["spikes"]) == (3, 3)
    assert figures["clip_rate"] < 0.02
    assert figures["open_loop"] is True


def test_warm_up_is_left_out(suggest: Any) -> None:
    """A start at twenty times the level ends where it has come down, and does not raise the bound."""
    norms = level() * (1 + 19 * np.exp(-np.arange(STEPS) / 15))
    result = suggest(norms)
    assert 30 <= result["findings"]["warmup"] <= 90
    assert stages(result)["global_norm"]["max_norm"] < 2


@pytest.mark.parametrize("factor", [6.0, 1 / 6])
def test_a_drifting_norm(suggest: Any, factor: float) -> None:
    """Where the norm drifts, something that follows it is proposed, with the reason."""
    result = suggest(level() * factor ** (np.arange(STEPS) / STEPS))
    assert 4 < result["findings"]["drift"] < 8
    assert result["findings"]["warmup"] == 0
    assert stages(result).keys() == {"nonfinite", "zclip"}
    assert ("rises" if factor > 1 else "falls") in result["proposal"]["reasons"][1]


def test_a_drifting_norm_with_heavy_tails(suggest: Any) -> None:
    """Where tails are heavy too, a percentile is proposed."""
    result = suggest(level(1.0) * 20 ** (np.arange(STEPS) / STEPS))
    assert stages(result).keys() == {"nonfinite", "percentile"}


def test_heavy_tails_without_drift(suggest: Any) -> None:
    """Heavy tails alone keep a fixed bound, and the deviation is that of the norms."""
    result = suggest(level(0.8))
    assert result["findings"]["deviation"] == pytest.approx(0.8, rel=0.15)
    assert "global_norm" in stages(result)


def test_bursts_of_nonfinite_steps(suggest: Any) -> None:
    """Non-finite steps are counted, are in no statistic, and more in a row than were seen are allowed."""
    norms = level()
    norms[100:108], norms[300] = np.nan, np.inf
    result = suggest(norms)
    assert (result["findings"]["nonfinite"], result["findings"]["longest_nonfinite"]) == (9, 8)
    assert stages(result)["nonfinite"] == {"action": "skip", "max_consecutive": 16}
    assert result["findings"]["median"] == pytest.approx(1, rel=0.05)
    assert result["proposal"]["replay"]["steps_skipped"] == 9


def test_weights_that_were_lost_to_a_nonfinite_step(suggest: Any) -> None:
    """Steps after one that the optimizer used do not tell how many in a row are usual, nor count as clipped."""
    norms = level()
    norms[100:103], norms[400:] = np.nan, np.nan
    flags = [int(Flag.NONFINITE)] * STEPS
    flags[:400] = [int(Flag.NONFINITE | Flag.SKIPPED) if np.isnan(norm) else 0 for norm in norms[:400]]
    result = suggest(norms, flags=flags)
    found = result["findings"]
    assert (found["lost_at"], found["longest_nonfinite"], found["nonfinite"]) == (400, 3, 203)
    assert stages(result)["nonfinite"]["max_consecutive"] == 10
    assert "step 400" in result["proposal"]["reasons"][0]
    said = " ".join(result["proposal"]["yaml"].replace("#", "").split())
    assert "skips 203" in said
    scaled = result["proposal"]["replay"]["steps_clipped"] - 203
    assert f"it clips {scaled / STEPS:.2%} of them" in said


def test_bad_steps_at_the_end_that_were_skipped(suggest: Any) -> None:
    """A burst at the end that moved nothing is a burst like another."""
    norms = level()
    norms[-7:] = np.nan
    result = suggest(norms)
    assert result["findings"]["lost_at"] is None
    assert stages(result)["nonfinite"]["max_consecutive"] == 14


def test_a_layer_that_dominates_spikes(suggest: Any) -> None:
    """A layer whose norm makes the spikes is bounded by itself."""
    norms = level()[:, None] * LAYERS
    norms[[150, 250, 350, 450], 0] = 12
    result = suggest(norms)
    assert result["findings"]["layer"] == "embed"
    stage = stages(result)["group_norm"]
    assert stage["match"] == ["embed.0"]
    assert 0.5 < stage["max_norm"] < 1


@pytest.mark.parametrize("steps", [0, 1, 150])
def test_too_early(suggest: Any, tmp_path: Path, steps: int) -> None:
    """Few steps give no proposal, exit status 1, and the number that is wanted; no file is written."""
    result = suggest(level()[:steps], "--output", str(tmp_path / "p.yaml"), status=1)
    assert (result["enough"], result["proposal"], result["wanted_steps"]) == (False, None, 200)
    assert not (tmp_path / "p.yaml").exists()


def test_the_yaml_is_ready_to_use(suggest: Any, tmp_path: Path) -> None:
    """What is written passes ``policy check``, has the reasons as comments, and replays to the figures it names."""
    norms = level()
    norms[400] = 30
    path = tmp_path / "p.yaml"
    result = suggest(norms, "--output", str(path))
    text = path.read_text()
    assert result["proposal"]["yaml"] == text
    assert yaml.safe_load(text) == result["proposal"]["policy"]
    runner, run = CliRunner(), str(tmp_path / "run")
    assert runner.invoke(app, ["policy", "check", str(path), "--run", run]).exit_code == 0
    again = json.loads(runner.invoke(app, ["replay", run, "--policy", str(path), "--json"]).stdout)["replayed"][0]
    assert again["clip_rate"] == result["proposal"]["replay"]["clip_rate"]
    comment = " ".join(line.strip("# ") for line in text.splitlines())
    assert f"clips {again['clip_rate']:.2%} of them" in comment
    assert "published recipes" in comment
    plain = runner.invoke(app, ["suggest", run])
    assert plain.stdout == text


def test_a_run_that_really_trained(tmp_path: Path) -> None:
    """A small model's own run: its bad step and its spike are found, and what is proposed loads."""
    run = live_run(tmp_path, {"pipeline": ["nonfinite"]}, steps=300)
    found = find(run)
    assert (found.steps, found.nonfinite, found.longest_nonfinite) == (300, 1, 1)
    assert found.warmup <= 75
    assert (20 in found.spikes) == (found.warmup <= 20)
    norms = run.grad_norm_preclip[found.warmup :]
    assert found.median == pytest.approx(np.median(norms[np.isfinite(norms)]))
    proposal = propose(found, {layer: [layer] for layer in run.layers})
    assert proposal is not None
    assert load_policy(proposal.policy).names[0] == "nonfinite"
