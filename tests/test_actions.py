"""Conditions on rows and what is done about them: detectors against references, raises, events, callbacks."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import gradiometer
from gradiometer import ActionCall, Agent, PolicyActionError, PolicyError, open_run
from gradiometer.detect import DelayedMeanDetector, MaxRatioDetector, Seen
from gradiometer.policy.actions import ActionSpec, DelayedMean, MaxRatio
from gradiometer.policy.spec import load_policy
from gradiometer.tail import RankTail, frame
from tests._training import RING_BYTES

VECTORS = Path(__file__).parent / "vectors"
INF, NAN = math.inf, math.nan


def cases(name: str) -> list[Any]:
    found: list[Any] = json.loads((VECTORS / f"{name}.json").read_text())["cases"]
    return found


def seen(norm: float, step: int = 0) -> Seen:
    return Seen(step, norm, False, not math.isfinite(norm), 0)


def history(case: Any, name: str) -> list[float]:
    """Return the norms before those of a case, which are the first of the same history."""
    whole = next(each for each in cases(name) if each["history"] == "spikes")
    return [float(step["in"]) for step in whole["steps"][: case["first_step"]]]


@pytest.mark.parametrize("case", cases("delayed_mean_outlier"), ids=lambda c: f"{c['history']}-{c['parameters']}")
def test_delayed_mean_is_llm_foundrys(case: Any) -> None:
    """With ``compat: reference`` both the verdict and the mean are the reference's, NaN and Inf included."""
    setting = DelayedMean(
        ratio=case["parameters"]["threshold"], delay=case["parameters"]["delay_interval"], compat="reference"
    )
    found = DelayedMeanDetector(setting)
    for norm in history(case, "delayed_mean_outlier"):
        found.see(seen(norm))
    for step in case["steps"]:
        verdict, mean = step["out"]
        assert (found.see(seen(float(step["in"]))) is not None) == verdict
        wanted = NAN if mean is None else float(mean)
        assert found.mean == pytest.approx(wanted, rel=1e-12, nan_ok=True)


@pytest.mark.parametrize("case", cases("megatron_unexpectedly_large"), ids=lambda c: c["history"])
def test_max_ratio_is_megatrons(case: Any) -> None:
    """Both the verdict and the frozen maximum are the reference's; what is not finite is neither seen nor flagged."""
    found = MaxRatioDetector(MaxRatio(ratio=case["parameters"]["threshold"], samples=case["parameters"]["num_samples"]))
    for norm in history(case, "megatron_unexpectedly_large"):
        found.see(seen(norm))
    for step in case["steps"]:
        verdict, largest = step["out"]
        assert (found.see(seen(float(step["in"]))) is not None) == verdict
        assert found.largest == pytest.approx(float(largest), rel=1e-12)


def test_a_safe_delayed_mean_survives_nan() -> None:
    """By default NaN and Inf never enter the mean, and an Inf is an outlier."""
    found = DelayedMeanDetector(DelayedMean(delay=2))
    verdicts = [found.see(seen(norm)) is not None for norm in (1.0, 1.0, NAN, INF, 1.0, 1.0, 8.0, INF, 1.0)]
    assert verdicts == [False, False, False, False, False, False, True, True, False]
    assert found.mean == 1.0


def train(agent_options: dict[str, Any], norms: list[float], root: Path, policy: dict[str, Any]) -> Agent:
    """Take a step for each norm, which is that of the only gradient; detach."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = SGD([parameter], lr=0.0)
    options: dict[str, Any] = {"dir": root, "ring_bytes": RING_BYTES, "backward": "off", "policy": policy}
    options |= agent_options
    with gradiometer.attach(nn.ParameterList([parameter]), optimizer, **options) as agent:
        for norm in norms:
            parameter.grad = torch.tensor([float(norm)])
            optimizer.step()
    return agent


def fired(agent: Agent) -> list[tuple[int, str]]:
    return [(e["step"], e["condition"]) for e in open_run(agent.path).events if e["kind"] == "policy_action"]


CONDITIONS: list[tuple[dict[str, Any], list[float], list[int]]] = [
    ({"consecutive_skips": 2}, [1, NAN, 1, NAN, NAN, 1], [4]),
    ({"consecutive_nonfinite": 3}, [NAN, NAN, 1, INF, NAN, INF, NAN], [5]),
    ({"norm_above": 5.0}, [1, 5, 6, NAN, 7], [2]),
    ({"clip_rate": {"policy": "global_norm", "above": 0.5, "window": 4}}, [1, 3, 3, 1, 3, 3, 3], [4]),
    ({"skip_rate": {"above": 0.4, "window": 2}}, [NAN, 1, 1, NAN], [1]),
    ({"max_ratio": {"samples": 2}}, [1, 2, 19, 20, 30], [3]),
    ({"delayed_mean": {"delay": 2}}, [1, 1, 1, 1, 8], [4]),
]


@pytest.mark.parametrize(("when", "norms", "steps"), CONDITIONS, ids=[next(iter(when)) for when, _, _ in CONDITIONS])
def test_a_condition_is_met_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, when: Any, norms: list[float], steps: list[int]
) -> None:
    """Each condition fires in the step that meets it, as an event and a warning, and rests while it lasts."""
    policy = {
        "pipeline": [{"nonfinite": {}}, {"global_norm": {"max_norm": 2.0}}],
        "actions": [{"when": when, "do": "event"}],
    }
    agent = train({}, norms, tmp_path, policy)
    assert fired(agent) == [(step, next(iter(when))) for step in steps]
    assert sum("action" in record.message for record in caplog.records) == len(steps)
    event = next(e for e in open_run(agent.path).events if e["kind"] == "policy_action")
    assert event["name"] == f"{next(iter(when))}_event"
    assert event["numbers"]


def test_a_lasting_condition_fires_again_after_its_cooldown(tmp_path: Path) -> None:
    """Every ``cooldown`` steps, and no more often."""
    policy = {"actions": [{"when": {"norm_above": 1.0}, "do": "event", "cooldown": 3}]}
    assert [step for step, _ in fired(train({}, [2.0] * 8, tmp_path, policy))] == [0, 3, 6]


def test_raise_stops_the_job_from_the_step(tmp_path: Path) -> None:
    """The error comes out of ``optimizer.step()`` with the numbers, once; whoever catches it may go on."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = SGD([parameter], lr=0.0)
    policy = {"actions": [{"name": "stop", "when": {"norm_above": 3.0}, "do": "raise"}]}
    options: dict[str, Any] = {"dir": tmp_path, "ring_bytes": RING_BYTES, "policy": policy}
    with gradiometer.attach(nn.ParameterList([parameter]), optimizer, **options) as agent:
        parameter.grad = torch.tensor([4.0])
        with pytest.raises(PolicyActionError, match=r"'stop': norm_above at step 0 \(norm 4, limit 3\)"):
            optimizer.step()
        optimizer.step()
    assert fired(agent) == [(0, "norm_above")]


def test_a_skip_with_a_limit_raises(tmp_path: Path) -> None:
    """A policy ``skip`` that allows so many in a row stops the job, as ``nonfinite`` does, by an error of its own."""
    spec = load_policy([{"skip": {"rule": "abs", "threshold": 5.0, "max_consecutive": 2, "then": "raise"}}])
    with pytest.raises(PolicyActionError, match=r"2 step\(s\) in a row, up to step 3; policy 'skip' allows 1"):
        train({}, [9.0, 1.0, 9.0, 9.0, 1.0], tmp_path, spec)  # type: ignore[arg-type]  # a spec is a policy


def calling(function: Callable[[ActionCall], object], **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options and the policy that call a function at norms above 1."""
    action = {"when": {"norm_above": 1.0}, "do": {"callback": "save"}, "cooldown": 1} | settings
    return {"callbacks": {"save": function}}, {"actions": [action]}


def test_a_callback_is_told_what_happened_on_a_thread_of_its_own(tmp_path: Path) -> None:
    """It gets run, rank, step, names, numbers and path; detaching waits for it; it is counted."""
    calls: list[tuple[ActionCall, str]] = []
    before = set(threading.enumerate())

    def save(call: ActionCall) -> None:
        time.sleep(0.1)
        calls.append((call, threading.current_thread().name))

    agent = train(*_split(calling(save), [0.5, 2.0], tmp_path))
    ((call, thread),) = calls
    wanted = ActionCall(
        run_id=agent.run_id,
        rank=0,
        step=1,
        action="norm_above_save",
        condition="norm_above",
        numbers={"norm": 2.0, "limit": 1.0},
        path=agent.path,
    )
    assert call == wanted
    assert thread != threading.main_thread().name
    status = open_run(agent.path).status
    assert (status["callbacks"], status["callback_failures"]) == (1, 0)
    assert not any(t.name.startswith("gradiometer") for t in set(threading.enumerate()) - before)


def _split(
    called: tuple[dict[str, Any], dict[str, Any]], norms: list[float], root: Path
) -> tuple[dict[str, Any], list[float], Path, dict[str, Any]]:
    return called[0], norms, root, called[1]


def test_a_callback_that_raises_is_logged_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Training goes on; the log has the traceback, the run an event and a count."""

    def save(call: ActionCall) -> None:
        raise OSError("no space")

    agent = train(*_split(calling(save), [2.0], tmp_path))
    run = open_run(agent.path)
    (event,) = [e for e in run.events if e["kind"] == "callback_failed"]
    assert "OSError: no space" in event["message"]
    assert run.status["callback_failures"] == 1
    assert any(record.exc_info for record in caplog.records)


def test_a_callback_that_outstays_its_time_is_left_behind(tmp_path: Path) -> None:
    """It counts as failed, is not started again while it runs, and holds up no other callback and no detach."""
    release, others = threading.Event(), list[ActionCall]()
    options, policy = calling(lambda call: release.wait(30), timeout=0.05)
    options["callbacks"]["other"] = others.append
    policy["actions"].append({"when": {"norm_above": 3.0}, "do": {"callback": "other"}})
    agent = train(options, [2.0, 4.0], tmp_path, policy)
    release.set()
    run = open_run(agent.path)
    messages = [e["message"] for e in run.events if e["kind"] == "callback_failed"]
    assert len(messages) == 2
    assert "still running after 0.05 s" in messages[0]
    assert "not started again" in messages[1]
    assert [call.step for call in others] == [1]
    assert (run.status["callbacks"], run.status["callback_failures"]) == (2, 2)


def test_a_callback_does_not_hold_up_the_step(tmp_path: Path) -> None:
    """Steps go on while a callback runs: the one that it waits for comes after it began."""
    steps, waited = threading.Semaphore(0), []
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = SGD([parameter], lr=0.0)
    options, policy = calling(lambda call: waited.append(steps.acquire(timeout=50)), cooldown=100)
    with gradiometer.attach(
        nn.ParameterList([parameter]), optimizer, dir=tmp_path, ring_bytes=RING_BYTES, policy=policy, **options
    ):
        for _ in range(3):
            parameter.grad = torch.tensor([2.0])
            optimizer.step()
        steps.release()
    assert waited == [True]


def test_unknown_callbacks_are_refused_at_attach(tmp_path: Path) -> None:
    """The error lists those that were given, and leaves no run behind; what is no function is refused too."""
    _, policy = calling(print)
    with pytest.raises(PolicyError, match=r"calls 'save', but attach\(callbacks=\.\.\.\) was given keep"):
        train({"callbacks": {"keep": print}}, [], tmp_path, policy)
    with pytest.raises(TypeError, match=r"callbacks\['save'\] is 5"):
        train({"callbacks": {"save": 5}}, [], tmp_path, policy)
    assert not list(tmp_path.iterdir())


FORKING = """
import os, sys, torch, gradiometer
parameter = torch.nn.Parameter(torch.zeros(1))
optimizer = torch.optim.SGD([parameter], lr=0.0)
def save(call): open(f"{sys.argv[1]}/called-{os.getpid()}", "w").close()
policy = {"actions": [{"when": {"norm_above": 1.0}, "do": {"callback": "save"}, "cooldown": 1}]}
agent = gradiometer.attach(torch.nn.ParameterList([parameter]), optimizer, dir=sys.argv[1], run_id="run",
                           policy=policy, callbacks={"save": save}, ring_bytes=2**20)
child = os.fork()
parameter.grad = torch.tensor([2.0])
optimizer.step()
if child:
    assert os.waitpid(child, 0)[1] == 0
    print(os.getpid())
"""


def test_a_forked_child_calls_nothing_and_exit_waits(tmp_path: Path) -> None:
    """Only the process that attached calls back, also where the interpreter ends without a detach."""
    done = subprocess.run(
        [sys.executable, "-c", FORKING, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ,
    )
    assert [path.name for path in tmp_path.glob("called-*")] == [f"called-{done.stdout.strip()}"]
    assert open_run(tmp_path / "run").status["callbacks"] == 1


def test_replacing_actions_keeps_what_is_unchanged(tmp_path: Path) -> None:
    """An action that stays keeps its count of steps; a new one starts anew; a bad one changes nothing."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = SGD([parameter], lr=0.0)
    stays = ActionSpec.model_validate({"when": {"consecutive_nonfinite": 3}, "do": "event"})
    policy = {"pipeline": [{"nonfinite": {}}], "actions": [stays.to_dict()]}
    options: dict[str, Any] = {"dir": tmp_path, "ring_bytes": RING_BYTES, "policy": policy}
    with gradiometer.attach(nn.ParameterList([parameter]), optimizer, **options) as agent:
        for step in range(3):
            parameter.grad = torch.tensor([NAN])
            optimizer.step()
            if step == 1:
                new = ActionSpec.model_validate({"when": {"consecutive_skips": 2}, "do": "event"})
                bad = ActionSpec.model_validate({"when": {"consecutive_skips": 2}, "do": {"callback": "none"}})
                with pytest.raises(PolicyError):
                    agent._actions.replace([bad], {"nonfinite": 0})
                agent._actions.replace([new, stays], {"nonfinite": 0})
    assert fired(agent) == [(2, "consecutive_nonfinite")]


def test_counters_are_there_before_anything_happens(tmp_path: Path) -> None:
    """The metrics have a counter for each action of the policy from the start, and one of failed callbacks."""
    policy = {"actions": [{"when": {"norm_above": 1.0}, "do": do} for do in ("event", {"callback": "save"})]}
    for norms, count in (([], 0), ([2.0], 1)):
        agent = train({"callbacks": {"save": lambda call: 1 / 0}}, norms, tmp_path, policy)
        with contextlib.closing(RankTail(agent.path)) as tail:
            found = frame([tail], "running").samples
        samples = {(name, *labels): value for name, labels, value in found}
        for action in ("event", "callback"):
            assert samples["gradiometer_policy_actions_total", agent.run_id, "norm_above", action] == count
        assert samples["gradiometer_callback_failures_total", agent.run_id] == count
        assert sum(name[0] == "gradiometer_policy_actions_total" for name in samples) == 2


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({"do": "raise"}, r"actions\[0\]\.when"),
        ({"when": {}, "do": "raise"}, "conditions given: none; expected exactly one of consecutive_skips"),
        ({"when": {"norm_above": 1, "skip_rate": {"above": 0.5}}, "do": "raise"}, "expected exactly one"),
        ({"when": {"norm_above": -1}, "do": "raise"}, r"actions\[0\]\.when\.norm_above is -1: .*greater than 0"),
        ({"when": {"norm_above": 1}, "do": "stop"}, r"actions\[0\]\.do is 'stop': expected raise, event, or"),
        ({"when": {"norm_above": 1}, "do": {"call": "x"}}, r"actions\[0\]\.do: expected raise, event, or"),
        (
            {"when": {"clip_rate": {"policy": "nonfinit", "above": 0.5}}, "do": "event"},
            r"actions\[0\]\.when\.clip_rate\.policy is 'nonfinit': no such policy, .* did you mean 'nonfinite'",
        ),
        ({"when": {"clip_rate": {"over": 0.5}}, "do": "event"}, "no such setting; there are policy, above, window"),
        ({"when": {"norm_above": 1}, "do": "event", "rest": 3}, "no such setting; there are name, when, do, cooldown"),
        ({"when": {"norm_above": 1}, "do": "event", "cooldown": 0}, r"actions\[0\]\.cooldown is 0"),
    ],
)
def test_a_bad_action_is_said_where_it_stands(action: Any, message: str) -> None:
    """An error names the path, the value and what was expected."""
    with pytest.raises(PolicyError, match=message):
        load_policy({"pipeline": [{"nonfinite": {}}], "actions": [action]})


def test_actions_are_written_as_they_were_read() -> None:
    """``to_dict`` gives back the actions, and reading that gives the same; two of one name are refused."""
    actions = [
        {"when": {"max_ratio": {}}, "do": {"callback": "save"}, "timeout": 5.0},
        {"name": "often", "when": {"clip_rate": {"policy": "nonfinite", "above": 0.9}}, "do": "event", "cooldown": 7},
    ]
    spec = load_policy({"pipeline": [{"nonfinite": {}}], "actions": actions})
    assert spec.to_dict()["actions"] == actions
    assert load_policy(spec.to_dict()) == spec
    with pytest.raises(PolicyError, match="2 actions are named 'max_ratio_save'"):
        load_policy({"actions": [actions[0]] * 2})
