"""Replay: the decisions of the live run to the bit, beside what else policies would have done."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import gradiometer
from gradiometer.cli import app
from gradiometer.policy.kinds import KINDS
from gradiometer.policy.spec import load_policy
from gradiometer.records import Flag
from gradiometer.replay.driver import UNREPLAYABLE, replay
from gradiometer.replay.history import notes, recorded, rolling_median, spikes
from tests._training import attach, backward, loss_of, small_model, train

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, WriteRun

NEEDED: dict[str, dict[str, Any]] = {"global_norm": {"max_norm": 1.0}, "group_norm": {"max_norm": 0.3}}
SETTINGS: dict[str, dict[str, Any]] = NEEDED | {
    "percentile": {"p": 40, "window": 20},
    "zclip": {"warmup_steps": 5, "z": 0.5, "max_grad_norm": None},
    "adagc": {"warmup_steps": 4, "ratio": 0.9},
    "ema_ratio": {"ratio": 0.8},
    "skip": {"on": ["global_norm", "loss"], "window": 16, "min_history": 4, "sigma": 1.5},
}
REPLAYABLE = [kind for kind, model in KINDS.items() if model not in UNREPLAYABLE]


def spec_of(kind: str) -> dict[str, Any]:
    """Return a policy of ``nonfinite`` and one kind."""
    return {"pipeline": ["nonfinite"] + ([] if kind == "nonfinite" else [{kind: SETTINGS.get(kind, {})}])}


def live_run(tmp_path: Path, policy: dict[str, Any], steps: int = 40, **options: Any) -> gradiometer.Run:
    """Train under a policy, with a spike and a non-finite step, the loss logged before the step; return the run."""
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    with attach(tmp_path, model, optimizer, policy=policy, **options) as agent:
        for step in range(steps):
            optimizer.zero_grad()
            loss = loss_of(model, step) * {20: 50.0, 30: float("nan")}.get(step, 1.0)
            agent.log(loss=loss)
            backward(loss)
            optimizer.step()
        path = agent.path
    return gradiometer.open_run(path)


@pytest.mark.parametrize("kind", REPLAYABLE)
def test_replaying_the_live_policy_gives_its_decisions_to_the_bit(tmp_path: Path, kind: str) -> None:
    """Thresholds, factors and skips of a replay are those that the live run recorded."""
    policy = spec_of(kind)
    run = live_run(tmp_path, policy)
    ran, live = replay(run, load_policy(policy), "again"), recorded(run)
    np.testing.assert_array_equal(ran.skipped, run.skipped)
    assert ran.skipped[30]
    for mine, its in zip(ran.stages, live.stages, strict=True):
        assert mine.name == its.name
        np.testing.assert_array_equal(mine.threshold, its.threshold)
        np.testing.assert_array_equal(mine.coefficient, its.coefficient)
    bits = np.stack([stage.clipped for stage in ran.stages], axis=1)
    np.testing.assert_array_equal(bits, run.clipped)
    assert bits[:, -1].any()


@pytest.mark.parametrize("pipeline", [["nonfinite"], []], ids=["beside another", "alone"])
def test_what_was_in_shadow_is_replayed_as_such(tmp_path: Path, pipeline: list[str]) -> None:
    """Policies that only watched are told from those that acted, to the bit; actions are left to live runs."""
    shadow = [{kind: SETTINGS[kind]} for kind in ("zclip", "skip", "group_norm")]
    actions = [{"when": {"norm_above": 1e9}, "do": "event"}]
    policy = {"pipeline": pipeline, "shadow": shadow, "actions": actions}
    run = live_run(tmp_path, policy)
    ran, live = replay(run, load_policy(policy), "again"), recorded(run)
    acts = [True] * len(pipeline) + [False] * len(shadow)
    assert [stage.acts for stage in ran.stages] == [stage.acts for stage in live.stages] == acts
    for mine, its in zip(ran.stages, live.stages, strict=True):
        np.testing.assert_array_equal(mine.threshold, its.threshold)
        np.testing.assert_array_equal(mine.coefficient, its.coefficient)
    np.testing.assert_array_equal(ran.clipped, live.clipped)


def test_steps_that_a_grad_scaler_skipped(tmp_path: Path) -> None:
    """Steps that a GradScaler skips by itself are taken note of, and are nobody's decision, live and in a replay."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    policy = {"pipeline": ["nonfinite", {"global_norm": {"max_norm": 1.0}}]}
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        for step in range(12):
            optimizer.zero_grad()
            backward(scaler.scale(loss_of(model, step) * (float("inf") if step == 5 else 1.0)))
            scaler.step(optimizer)
            scaler.update()
        path = agent.path
    run = gradiometer.open_run(path)
    assert run.rows["flags"][5] & Flag.SCALER
    ran, live = replay(run, load_policy(policy), "again"), recorded(run)
    for mine, its in zip(ran.stages, live.stages, strict=True):
        np.testing.assert_array_equal(mine.threshold, its.threshold)
        np.testing.assert_array_equal(mine.coefficient, its.coefficient)
    assert not ran.skipped.any()


def test_against_numpy(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A norm bound over made-up norms clips what NumPy says, layer by layer."""
    norms = np.random.default_rng(0).lognormal(size=(50, 4)).astype(np.float32)
    write_run(make_manifest(), norms)
    run = gradiometer.open_run(tmp_path / "run")
    ran = replay(run, load_policy([{"group_norm": {"max_norm": 1.5}}]), "p")
    layers = np.stack([norms[:, 0], np.hypot(norms[:, 1], norms[:, 2]), norms[:, 3]], axis=1)
    np.testing.assert_allclose(ran.stages[0].coefficient, np.minimum(1, 1.5 / (layers + 1e-6)).min(axis=1), rtol=1e-6)


def replayed(tmp_path: Path, policies: list[Any], *options: str) -> dict[str, Any]:
    """Run ``gradiometer replay --json`` on the run below ``tmp_path``."""
    arguments = []
    for place, policy in enumerate(policies):
        path = tmp_path / f"p{place}.yaml"
        path.write_text(yaml.safe_dump({"pipeline": policy}))
        arguments += ["--policy", str(path)]
    done = CliRunner().invoke(app, ["replay", str(tmp_path / "run"), *arguments, "--json", *options])
    assert done.exit_code == 0, (done.output, done.exception)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_policies_stand_side_by_side(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """Figures of each policy, and of the run itself: clip rate, skips, thresholds, spikes caught."""
    norms = np.ones((60, 4))
    norms[40], norms[50, 2] = 10, np.nan
    write_run(make_manifest(policies=("nonfinite",), policy={"pipeline": ["nonfinite"]}), norms)
    found = replayed(tmp_path, [["nonfinite", {"global_norm": {"max_norm": 4}}], [{"global_norm": {"max_norm": 1}}]])
    assert found["open_loop"] is True
    assert found["notes"][0].startswith("open-loop")
    assert (found["steps"], found["spikes"], found["nonfinite_steps"]) == (60, 1, 1)
    first, second = found["replayed"]
    assert (first["steps_clipped"], first["steps_skipped"], first["spikes_caught"]) == (2, 1, 1)
    assert first["clip_rate"] == pytest.approx(2 / 60)
    assert first["stages"][1]["threshold"] == {"min": 4, "median": 4, "last": 4}
    assert first["stages"][1]["smallest_coefficient"] == pytest.approx(0.2, rel=1e-5)
    assert (second["steps_clipped"], second["steps_skipped"]) == (59, 0)  # NaN cannot be scaled


def test_what_cannot_be_replayed_is_said(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """``value`` and ``agc`` are named with the reason; what stands before them is replayed."""
    write_run(make_manifest(), np.full((5, 4), 2.0))
    policies: list[Any] = [[{"global_norm": {"max_norm": 1}}, {kind: settings}] for kind, settings in (
        ("value", {"max_abs": 1}), ("agc", {}),
    )]  # fmt: skip
    found = replayed(tmp_path, policies)["replayed"]
    assert [list(each["not_replayed"]) for each in found] == [["value"], ["agc"]]
    assert "norms do not tell" in found[0]["not_replayed"]["value"]
    assert [each["steps_clipped"] for each in found] == [5, 5]
    alone = replayed(tmp_path, [[{"value": {"max_abs": 1}}]])["replayed"][0]
    assert (alone["stages"], alone["steps_clipped"]) == ([], 0)


def test_what_must_be_known_is_noted(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A late start, missing rows, several optimizers and a loss are told; --last and --settle choose the steps."""
    steps = [*range(100, 110), *range(115, 125)]
    write_run(make_manifest(), np.ones((20, 4)), step=steps, optimizer=[0, 1] * 10)
    notes = "\n".join(replayed(tmp_path, [["nonfinite"]])["notes"])
    for said in ("the first step is 100", "5 steps between", "several optimizers"):
        assert said in notes
    found = replayed(tmp_path, [["nonfinite"]], "--last", "6", "--settle", "2")
    assert (found["first_step"], found["steps"]) == (121, 4)


def test_a_replay_is_the_same_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are read a few at a time, and memory goes on from one piece to the next, in force and in shadow."""
    policy = {"pipeline": ["nonfinite", {"zclip": SETTINGS["zclip"]}], "shadow": [{"skip": SETTINGS["skip"]}]}
    run, spec = live_run(tmp_path, policy), load_policy(policy)
    whole = replay(run, spec, "whole")
    monkeypatch.setattr("gradiometer.replay.driver.CHUNK", 7)
    for one, other in zip(whole.stages, replay(run, spec, "pieces").stages, strict=True):
        assert len(other.threshold) == len(run) == 40
        np.testing.assert_array_equal(one.threshold, other.threshold)
        np.testing.assert_array_equal(one.coefficient, other.coefficient)


def test_a_policy_that_was_changed_is_noted(tmp_path: Path) -> None:
    """Where the run's policy was changed between two steps, the notes say at which, and what a replay is then."""
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    policy: list[Any] = [{"zclip": {"warmup_steps": 2}}]
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        train(model, optimizer, range(5))
        state = agent.state_dict()
    state["in_force"] = load_policy([{"global_norm": {"max_norm": 0.1}}]).to_dict()
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        train(model, optimizer, range(3))
        agent.load_state_dict(state)
        train(model, optimizer, range(5, 9))
    run = gradiometer.open_run(agent.path)
    said = notes(run, [recorded(run)])
    assert any("policy was changed at step 5:" in note for note in said)
    spec = load_policy([{"global_norm": {"max_norm": 0.1}}])
    (ran,) = replay(run, spec, "new").stages
    live = next(stage for stage in recorded(run).stages if stage.name == "global_norm")
    np.testing.assert_array_equal(ran.coefficient[3:], live.coefficient[3:])
    assert not any("policy was changed" in note for note in notes(replace(run, rows=run.rows[3:]), []))


def test_what_is_said_of_the_loss(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A policy that looks at the loss gets a word on which loss that is, and on other ranks."""
    write_run(make_manifest(world_size=2), np.ones((3, 4)), loss=[2.0, float("nan"), 1.0])
    run, spec = gradiometer.open_run(tmp_path / "run"), load_policy([{"skip": {"on": "loss"}}])
    asked = replace(recorded(run), policy=spec.to_dict())
    said = "\n".join(notes(run, [asked]))
    assert "which 2 of 3 steps have" in said
    assert "the mean over the ranks" in said
    assert "loss" not in "\n".join(notes(run, [recorded(run)]))


def test_a_policy_begins_where_the_window_does(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """Steps are counted from the first that is replayed, as for a policy that is new."""
    write_run(make_manifest(), np.ones((30, 4)))
    run = gradiometer.open_run(tmp_path / "run")
    late = replace(run, rows=run.rows[10:])
    for kind in REPLAYABLE:
        policy = load_policy(spec_of(kind))
        mine, its = replay(late, policy, "late").stages[-1], replay(run, policy, "whole").stages[-1]
        np.testing.assert_array_equal(mine.threshold, its.threshold[:20])


def test_a_run_without_steps(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A run that holds nothing yet cannot be replayed, in one line."""
    write_run(make_manifest(), np.empty((0, 4)))
    path = tmp_path / "p.yaml"
    path.write_text("pipeline: [nonfinite]")
    done = CliRunner().invoke(app, ["replay", str(tmp_path / "run"), "--policy", str(path)])
    assert "holds no step" in str(done.exception)


def test_the_table_for_people(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """Without --json there is a table, and the notes below it."""
    write_run(make_manifest(), np.full((5, 4), 2.0))
    path = tmp_path / "p.yaml"
    path.write_text("pipeline: [nonfinite, {global_norm: {max_norm: 1}}]\nshadow: [{group_norm: {max_norm: 3}}]")
    done = CliRunner().invoke(app, ["replay", str(tmp_path / "run"), "--policy", str(path)])
    assert done.exit_code == 0, done.exception
    for said in ("the run itself", "group_norm (shadow)", "100.00%", "open-loop"):
        assert said in done.stdout


def test_the_plot_is_a_picture(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """--plot writes a PNG, one panel for each policy."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    norms = np.random.default_rng(0).lognormal(size=(50, 4))
    norms[7] = np.nan
    write_run(make_manifest(), norms)
    policies: list[Any] = [["nonfinite"], ["nonfinite", {"global_norm": {"max_norm": 1}}]]
    replayed(tmp_path, policies[1:], "--plot", str(tmp_path / "one.png"))
    replayed(tmp_path, policies, "--plot", str(tmp_path / "two.png"))
    one, two = ((tmp_path / name).read_bytes() for name in ("one.png", "two.png"))
    assert one[:8] == two[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(one[20:24], "big") < int.from_bytes(two[20:24], "big")


def test_rolling_median_and_spikes() -> None:
    """The median is of up to 100 finite norms before each step, as NumPy has it; spikes stand three times above."""
    norms = np.random.default_rng(0).lognormal(sigma=0.2, size=400)
    norms[::37], norms[300] = np.nan, 9.0
    medians = rolling_median(norms)
    for step in (0, 10, 11, 50, 137, 399):
        before = norms[:step][np.isfinite(norms[:step])][-100:]
        assert medians[step] == pytest.approx(np.median(before)) if len(before) >= 10 else np.isnan(medians[step])
    assert np.flatnonzero(spikes(norms)).tolist() == [300]


def test_ctrl_c_ends_in_one_line(
    tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a long replay is one line and exit status 130."""
    write_run(make_manifest(), np.ones((5, 4)))
    path = tmp_path / "p.yaml"
    path.write_text("pipeline: [nonfinite]")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gradiometer.replay.driver.replay", interrupt)
    done = CliRunner().invoke(app, ["replay", str(tmp_path / "run"), "--policy", str(path)])
    assert (done.exit_code, done.stderr) == (130, "stopped by Ctrl-C\n")


def test_the_plot_says_what_part_a_threshold_is_for() -> None:
    """A bound on some parameters is drawn over the norm of all: its label says of which it is."""
    plotting = pytest.importorskip(
        "gradiometer.replay.plot", reason="matplotlib is not installed", exc_type=ImportError
    )
    policy = {
        "pipeline": [{"zclip": {"match": ["embed.*", "pos.*"]}}, {"global_norm": {"name": "all", "max_norm": 1.0}}],
        "shadow": [{"percentile": {"exclude": ["head.*"]}}],
    }
    said = [plotting._part(policy, name) for name in ("zclip", "all", "percentile")]
    assert said == [" on embed.*, …", "", " on all but head.*"]
