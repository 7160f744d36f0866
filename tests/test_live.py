"""The policy of a job is changed while it runs: by the command line, in a real process, and refused where it is bad."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import nn
from torch.amp.grad_scaler import GradScaler

import gradiometer
import gradiometer.exporter
from gradiometer import Agent, open_run
from gradiometer.live.control import RequestError, await_answer, request_policy
from gradiometer.live.revisions import Slot, SlotTable, describe_change, write_atomically
from gradiometer.live.thread import PolicyChangeError
from gradiometer.policy.spec import PolicyError
from gradiometer.records import find_ranks
from gradiometer.replay.history import recorded
from gradiometer.report import summarize
from tests._training import PATIENCE_SECONDS, assert_same, attach, backward, loss_of, small_model, train

CLIP: list[Any] = [{"nonfinite": {}}, {"global_norm": {"max_norm": 1.0}}]
TIGHT: list[Any] = [{"nonfinite": {}}, {"global_norm": {"max_norm": 0.01}}]
JOB = """
    import sys, time
    from tests._training import attach, small_model, train
    import torch
    from pathlib import Path
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    clip = [{"global_norm": {"max_norm": 1.0}}]
    with attach(Path(sys.argv[1]), model, optimizer, policy=clip, run_id="job", ring_bytes=2**24):
        print("go", flush=True)
        for step in range(100000):
            train(model, optimizer, [step % 50])
            time.sleep(0.02)
"""
"""Its ring holds every step of a quarter of an hour, however long the command line takes."""


pytestmark = pytest.mark.slow


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def step_until(agent: Agent, model: nn.Module, optimizer: torch.optim.Optimizer, kinds: list[str]) -> list[Any]:
    """Train until the agent has written these kinds of policy events; return the events."""
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        train(model, optimizer, [0])
        events = [each for each in open_run(agent.path).events if each["kind"].startswith("policy_")]
        if [each["kind"] for each in events] == kinds:
            return events
        assert time.monotonic() < end, events


def await_due(agent: Agent) -> None:
    """Wait until the agent has read a request, which the next step is to take up."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not agent._live.due:
        assert time.monotonic() < end
        time.sleep(0.01)


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gradiometer.cli", "policy", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def job(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a training process that goes on until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(JOB), str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_apply_and_show(tmp_path: Path, job: subprocess.Popen[str]) -> None:
    """The command line changes the policy of a running process, takes it away, and tells the story."""
    file = tmp_path / "tight.yaml"
    file.write_text("version: 1\npipeline:\n  - nonfinite: {}\n  - global_norm: {max_norm: 0.5}\n")
    place = ("--dir", str(tmp_path))
    done = cli("apply", "job", str(file), *place, "--note", "too wild")
    assert (done.returncode, done.stdout.startswith("in force from step ")) == (0, True), done.stderr
    shown = cli("show", "job", *place)
    assert "max_norm: 0.5" in shown.stdout
    assert "+nonfinite, global_norm.max_norm 1.0 -> 0.5" in shown.stdout
    assert cli("apply", "job", "none", *place).returncode == 0
    found = json.loads(cli("show", "job", *place, "--json").stdout)
    assert [each["policy"] is None for each in found["revisions"]] == [False, False, True]
    rows = open_run(tmp_path / "job").rows
    for each in found["revisions"]:
        mine = rows["step"][rows["policy_revision"] == each["revision"]]
        assert mine[0] == each["step"]
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert cli("apply", "job", "none", *place).returncode == 2  # it was killed
    assert len(open_run(tmp_path / "job").history.revisions) == 3


def test_what_is_refused_before_it_is_asked(tmp_path: Path, job: subprocess.Popen[str]) -> None:
    """What can be seen to be wrong is said at once, with where and what, and the job hears nothing of it."""
    file, place = tmp_path / "bad.yaml", ("--dir", str(tmp_path))
    for text, said in {
        "pipeline: [{global_norm: {max_norm: .nan}}]": "max_norm is nan",
        "pipeline: [": "is not YAML",
        "pipeline: [{global_norm: {max_norm: 1, match: 'head.*'}}]": "a pattern that matches no parameter",
        "pipeline: [{global_nrom: {max_norm: 1}}]": "policies: nonfinite",
    }.items():
        file.write_text(text)
        done = cli("apply", "job", str(file), *place)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
    assert "no run 'other'" in cli("apply", "other", "none", *place).stderr
    assert not (tmp_path / "job" / "rank-00000" / "control.json").exists()


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ([{"global_norm": {"max_norm": float("nan")}}], "finite number"),
        ([{"global_norm": {"max_norm": 1, "match": "head.*"}}], "'head.*' matches no parameter"),
        ([{"clip": {}}], "policies: nonfinite"),
        (17, "policy"),
    ],
)
def test_a_bad_request_is_refused_by_the_agent(tmp_path: Path, policy: Any, said: str) -> None:
    """A request that somebody else wrote, and is wrong, is an event that says why; the old policy stays."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        asked = policy if isinstance(policy, int) else {"pipeline": policy}
        text = json.dumps({"version": 1, "id": "x1", "kind": "policy", "policy": asked})
        write_atomically(agent.path / "control.json", text)
        (event,) = step_until(agent, model, optimizer, ["policy_rejected"])
        assert said in " ".join(event["reasons"])
        train(model, optimizer)
    run = open_run(agent.path)
    assert run.status["policy_rejections"] == 1
    assert not run.rows["policy_revision"].any()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "id": "a", "kind": "stop"}'])
def test_what_is_no_request(tmp_path: Path, text: str) -> None:
    """A file that is no request, or one of a later version, is refused once."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        write_atomically(agent.path / "control.json", text)
        step_until(agent, model, optimizer, ["policy_rejected"])


def test_two_requests_in_quick_succession(tmp_path: Path) -> None:
    """Of two requests the later is in force in the end, and who asked the earlier is told if it was passed over."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        request_policy(agent.path, CLIP)
        await_due(agent)  # it looks for no other until the next step has taken this one up
        first, second = (request_policy(agent.path, policy) for policy in (None, TIGHT))
        step_until(agent, model, optimizer, ["policy_changed"] * 2)
        assert await_answer(agent.path, second, PATIENCE_SECONDS).applied
        with pytest.raises(RequestError, match="took the place of this one"):
            await_answer(agent.path, first, 0.2)
        assert open_run(agent.path).history.newest.policy == {"version": 1, "pipeline": TIGHT}


def test_a_finished_run(tmp_path: Path) -> None:
    """A run that is over takes no requests, and a new one of its name does not take up an old request."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, run_id="same") as agent:
        request_policy(agent.path, TIGHT)
    with pytest.raises(RequestError, match="does not run any more"):
        request_policy(agent.path, TIGHT)
    with attach(tmp_path, model, optimizer, run_id="same") as agent:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            train(model, optimizer, [0])
        assert not open_run(agent.path).rows["policy_revision"].any()


def test_a_run_directory_that_is_removed(tmp_path: Path) -> None:
    """Training goes on when the directory goes, and so does the thread."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        request_policy(agent.path, TIGHT)
        for path in agent.path.iterdir():
            path.unlink()
        agent.path.rmdir()
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            train(model, optimizer, [0])


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_leaves_the_policy_alone(tmp_path: Path) -> None:
    """A child that trains with its parent's agent neither waits nor writes."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        agent._live.due = True
        child = os.fork()
        if child == 0:
            train(model, optimizer)
            agent.detach()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        request_policy(agent.path, TIGHT)
        step_until(agent, model, optimizer, ["policy_changed"])


def test_from_nothing_to_a_policy_and_back(tmp_path: Path) -> None:
    """Each step is clipped as the policy in force at it says, to the bit as torch would."""
    model, twin = small_model(), small_model()
    optimizer, other = sgd(model), sgd(twin)
    with attach(tmp_path, model, optimizer, ring_bytes=2**24) as agent:  # which holds every step
        for policy in (TIGHT, None, CLIP):
            request_policy(agent.path, policy)
            count = len(open_run(agent.path).history.revisions)
            end = time.monotonic() + PATIENCE_SECONDS
            while len(open_run(agent.path).history.revisions) == count:
                train(model, optimizer, [agent.step])
                assert time.monotonic() < end
            train(model, optimizer, range(agent.step, agent.step + 3))
        steps = agent.step
    run, limits = open_run(agent.path), (None, 0.01, None, 1.0)
    for step in range(steps):
        other.zero_grad()
        backward(loss_of(twin, step))
        limit = limits[int(run.rows["policy_revision"][step])]
        if limit is not None:
            nn.utils.clip_grad_norm_(twin.parameters(), limit)
        other.step()
    assert_same(model, twin)
    assert run.policies == ["nonfinite", "global_norm"]
    assert (run.clipped[:, 1] == (run.coefficient < 1)).all()
    assert set(run.rows["policy_revision"]) == {0, 1, 2, 3}


def test_metrics_name_the_policies_in_force(tmp_path: Path) -> None:
    """Counters and thresholds are those of the policies in force; a stage that stays goes on counting."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=TIGHT, run_id="run", ring_bytes=2**24) as agent:  # holds every step
        registry, exporter = CollectorRegistry(), gradiometer.exporter.collector(agent)
        registry.register(exporter)
        train(model, optimizer, range(5))
        request_policy(agent.path, [{"value": {"max_abs": 1e-6}}, *TIGHT[1:]][::-1])
        step_until(agent, model, optimizer, ["policy_changed"])

        def value(name: str, **labels: str) -> float | None:
            return registry.get_sample_value(f"gradiometer_{name}", {"run_id": "run", **labels})

        run = open_run(agent.path)
        clips = dict(zip(run.policies, run.clipped.sum(axis=0).tolist(), strict=True))
        assert value("clip_events_total", policy="global_norm", mode="act") == clips["global_norm"] > 5
        assert value("clip_events_total", policy="value", mode="act") == clips["value"] > 0
        assert value("clip_events_total", policy="nonfinite", mode="act") is None
        assert value("clip_threshold", policy="value", mode="act") == pytest.approx(1e-6)
        assert value("policy_changes_total") == value("policy_revision") == 1
        assert value("policy_rejections_total") == 0
        assert summarize(run)["clip_events"] == {name: clips[name] for name in ("global_norm", "value")}
        assert np.isnan(run.thresholds[: int(run.history.newest.step), run.policies.index("value")]).all()
        assert run.thresholds[-1, run.policies.index("value")] == pytest.approx(1e-6)
        live = {stage.name: int(stage.clipped.sum()) for stage in recorded(run).stages}
        assert live == clips  # what a replay is set beside knows whose slot it was
        exporter.close()


def test_a_stage_that_stays_keeps_its_memory(tmp_path: Path) -> None:
    """Steps in a row that were not finite are counted on over a change of the limit, and a new stage begins anew."""
    model = small_model()
    optimizer = sgd(model)
    policy: list[Any] = [{"nonfinite": {"max_consecutive": 10**9}}]
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        request_policy(agent.path, [{"nonfinite": {"max_consecutive": 10**6}}, {"global_norm": {"max_norm": 1}}])
        end = time.monotonic() + PATIENCE_SECONDS
        while open_run(agent.path).status["policy_revision"] == 0:
            optimizer.zero_grad()
            backward(loss_of(model, 0) * float("nan"))
            optimizer.step()
            assert time.monotonic() < end
        assert float(agent.state_dict()["states"]["nonfinite"]["consecutive"]) == agent.step
        (event,) = [e for e in open_run(agent.path).events if e["kind"] == "policy_changed"]
        assert (event["kept"], event["anew"]) == (["nonfinite"], ["global_norm"])


@pytest.mark.parametrize(("exclude", "kept"), [("0.*", True), ("2.*", False), ("0.bias", False)])
def test_a_memory_of_other_parameters_begins_anew(tmp_path: Path, exclude: str, kept: bool) -> None:
    """Averages go on only if they are of the same parameters, not if there are merely as many."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=[{"adagc": {"exclude": "0.*"}}, *CLIP[1:]]) as agent:
        train(model, optimizer, range(3))
        request_policy(agent.path, [{"adagc": {"exclude": exclude, "ratio": 2.0}}, *CLIP[1:]])
        (event,) = step_until(agent, model, optimizer, ["policy_changed"])
        assert ("adagc" in event["kept"], "adagc" in event["anew"]) == (kept, not kept)
        assert len(agent.state_dict()["states"]["adagc"]["average"]) == (3 if exclude == "0.bias" else 2)


@pytest.mark.parametrize(("window", "kept"), [(4, True), (5, False)])
def test_a_memory_of_another_shape_begins_anew(tmp_path: Path, window: int, kept: bool) -> None:
    """A window of another length cannot go on with what the old one holds."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=[{"percentile": {"window": 4}}]) as agent:
        train(model, optimizer, range(6))
        request_policy(agent.path, [{"percentile": {"window": window, "p": 50}}])
        (event,) = step_until(agent, model, optimizer, ["policy_changed"])
        assert event["kept"] == (["percentile"] if kept else [])
        assert agent.state_dict()["states"]["percentile"]["window"].shape == (window,)
        assert agent.errors == 0


@pytest.mark.parametrize("policy", [None, CLIP])
def test_a_rank_that_has_lost_the_others(tmp_path: Path, policy: Any) -> None:
    """A rank that has pledged and cannot learn the verdict raises at its pledged step, and says what to do."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=policy) as agent:
        agent._live._horizon, agent._live.due = 2, True
        agent._live.give_up("the store cannot be reached")
        train(model, optimizer, range(2))
        with pytest.raises(PolicyChangeError, match=r"store cannot be reached.*start again from a checkpoint"):
            train(model, optimizer, [2])


def test_between_the_optimizers_of_a_round_nothing_changes(tmp_path: Path) -> None:
    """Two optimizers that step on the same gradients step by the same policy."""
    model = small_model()
    optimizers: Any = [sgd(layer) for layer in (model[0], model[2])]
    with attach(tmp_path, model, optimizers, policy=CLIP) as agent:
        train(model, optimizers[0], [0])
        request_policy(agent.path, None)
        await_due(agent)
        optimizers[1].step()
        assert agent._live.due
        optimizers[0].step()
        assert not agent._live.due


def test_a_step_that_a_scaler_skips_is_a_boundary(tmp_path: Path) -> None:
    """A change comes into force also where every step is skipped by a GradScaler."""
    model = small_model()
    optimizer, scaler = sgd(model), GradScaler("cpu")
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        request = request_policy(agent.path, TIGHT)
        end = time.monotonic() + PATIENCE_SECONDS
        while open_run(agent.path).status["policy_changes"] == 0:
            optimizer.zero_grad()
            backward(scaler.scale(loss_of(model, 0) * float("inf")))
            scaler.step(optimizer)
            scaler.update(1.0)
            assert time.monotonic() < end
        assert await_answer(agent.path, request, PATIENCE_SECONDS).applied


def test_an_old_run_reads_without_a_history(tmp_path: Path) -> None:
    """A run directory of an earlier version has no ``policy.json``: the manifest names its policies."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        train(model, optimizer)
    (agent.path / "policy.json").unlink()
    run = open_run(agent.path)
    assert run.policies == ["nonfinite", "global_norm"]
    assert run.history.newest.policy == run.manifest.policy
    assert run.clipped.shape == (5, 2)


def test_patterns_are_checked_before_they_are_asked_for(tmp_path: Path) -> None:
    """A policy that covers nothing of the model is an error of the caller."""
    model = small_model()
    with attach(tmp_path, model, sgd(model)) as agent:
        with pytest.raises(PolicyError, match="matches no parameter"):
            request_policy(agent.path, [{"global_norm": {"max_norm": 1, "match": "head.*"}}])
        assert find_ranks(tmp_path / agent.run_id) == [agent.path]
    assert gradiometer.open_run(agent.path).events[-1]["kind"] == "attached"


def test_slots_are_kept_and_taken_over() -> None:
    """A stage that comes back has its old slot; when none is free, the longest retired loses its own."""
    many = [Slot(name=f"p{place}", kind="global_norm") for place in range(16)]
    table = SlotTable(many[:14])
    assert table.change(many[1:14]) == frozenset()
    assert table.change(many[2:14]) == frozenset()
    assert table.change(many[1:14]) == frozenset()
    assert table.places["p1"] == 1
    assert table.change([*many[1:14], many[14]]) == {0}
    assert table.change([many[15]]) == {0}
    assert table.slots[0] == many[15]
    assert table.slots.count(None) == 13


def test_changes_in_words() -> None:
    """What is different is named, and what is not is not."""
    old = {"pipeline": [{"nonfinite": {}}, {"global_norm": {"max_norm": 1.0}}]}
    new = {"pipeline": [{"global_norm": {"max_norm": 2.0}}], "shadow": [{"zclip": {}}], "groups": {"by": "parameter"}}
    assert describe_change(old, new) == (
        '-nonfinite, global_norm.max_norm 1.0 -> 2.0, +zclip (shadow), groups: null -> {"by": "parameter"}'
    )
    assert describe_change(old, old) == "the same policy again"
