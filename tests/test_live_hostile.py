"""What a change of policy must survive: requests nobody should write, full disks, agents that are forgotten."""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from gradiometer import ActionCall, Agent, open_run
from gradiometer.actions import Actions
from gradiometer.live import chronicle, revisions
from gradiometer.live.control import await_answer, request_policy
from gradiometer.live.revisions import Slot, SlotTable, write_atomically
from gradiometer.policy.spec import PolicyError, load_policy
from gradiometer.recorder import RowHeader
from gradiometer.tail import RankTail, frame
from tests._training import PATIENCE_SECONDS, attach, small_model, train, train_until

if TYPE_CHECKING:
    from tests.conftest import WaitUntil

pytestmark = pytest.mark.slow
CLIP: list[Any] = [{"global_norm": {"max_norm": 1.0}}]
HUGE = "9" * 400
NAN = float("nan")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def written(policy: str, request: str = "a") -> str:
    return f'{{"version": 1, "id": "{request}", "policy": {policy}}}'


def events(agent: Agent, kind: str) -> list[dict[str, Any]]:
    return [event for event in open_run(agent.path).events if event["kind"] == kind]


def put(text: str) -> Callable[[Path], object]:
    return lambda path: write_atomically(path / "control.json", text)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (lambda path: os.mkfifo(path / "control.json"), "not a regular file"),
    "a device": (lambda path: (path / "control.json").symlink_to("/dev/zero"), "not a regular file"),
    "ten megabytes": (put("x" * 10**7), "more than"),
    "deep": (put(written('{"pipeline":' + "[" * 100_000 + "]" * 100_000 + "}")), "recursion"),
    "forty thousand stages": (put(written(json.dumps({"pipeline": [{"clip": {}}] * 40_000}))), "hold 40000 policies"),
    "a thousand things wrong": (
        put(written(json.dumps({f"setting{place}": 1 for place in range(1000)} | {"pipeline": ["zclip"]}))),
        "no such setting",
    ),
    "a count beyond all tensors": (put(written(f'{{"pipeline": [{{"zclip": {{"warmup_steps": {HUGE}}}}}]}}')), "less"),
    "a number beyond float32": (put(written('{"pipeline": [{"agc": {"eps": 1e308}}]}')), "less"),
    "no such callback": (
        put(written('{"actions": [{"when": {"norm_above": 1}, "do": {"callback": "nope"}}]}')),
        "was given none",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_request_that_nobody_should_write(tmp_path: Path, what: str) -> None:
    """It is refused in few words, in good time, and training goes on under the old policy."""
    write, said = HOSTILE[what]
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=CLIP) as agent:
        write(agent.path)
        train_until(model, optimizer, lambda: events(agent, "policy_rejected"))
        (event,) = events(agent, "policy_rejected")
        assert said in str(event["reasons"])
        assert len(event["reasons"]) <= 21
        assert len(json.dumps(event)) < 30_000
        (agent.path / "control.json").unlink()
        assert await_change(agent, model, optimizer, None) == 1  # it still listens
    assert agent.errors == 0


def await_change(agent: Agent, model: nn.Module, optimizer: torch.optim.Optimizer, policy: Any) -> int | None:
    """Ask, train until it is answered, and return the revision."""
    request = request_policy(agent.path, policy)
    before = int(open_run(agent.path).status["policy_changes"])
    train_until(model, optimizer, lambda: open_run(agent.path).status["policy_changes"] > before)
    return await_answer(agent.path, request, PATIENCE_SECONDS).revision


STOPPED = """
import os, signal, subprocess, sys, threading, time
from pathlib import Path
import torch
from gradiometer.live import thread as live
from tests._training import attach, small_model, train
live.WAIT_SECONDS = 6.0
model = small_model()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
agent = attach(Path(sys.argv[1]), model, optimizer, policy=None)
train(model, optimizer, [0])
agent._live._horizon, agent._live.due = 1, True

def stop():
    time.sleep(0.5)
    subprocess.Popen(["/bin/sh", "-c", f"sleep 7; kill -CONT {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
    with agent._live._changed:
        agent._live._horizon = None
        agent._live._changed.notify_all()

threading.Thread(target=stop).start()
train(model, optimizer, [0])
print("steps", agent.step)
agent.detach()
"""


def test_a_process_that_is_stopped_while_it_waits(tmp_path: Path) -> None:
    """The time in which it was stopped is not time that it has waited: the verdict is there when it wakes."""
    command = [sys.executable, "-c", STOPPED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.stdout == "steps 2\n", done.stderr


def test_a_policy_that_builds_and_cannot_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would fail in the first step is found on the thread, and the step never meets it."""

    def decide(*_: object) -> None:
        raise OverflowError("too big")

    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=None) as agent:
        monkeypatch.setattr("gradiometer.policy.value.Value.decide", decide)
        request_policy(agent.path, [{"value": {"max_abs": 1.0}}])
        train_until(model, optimizer, lambda: events(agent, "policy_rejected"))
        assert "OverflowError: too big" in str(events(agent, "policy_rejected")[0]["reasons"])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_request_of_another_users_file(tmp_path: Path) -> None:
    """Root's request is the directory's owner's to read."""
    model = small_model()
    with attach(tmp_path, model, sgd(model), policy=None) as agent:
        os.chown(agent.path, 12345, 12345)
        request_policy(agent.path, CLIP)
        found = (agent.path / "control.json").stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (12345, 12345, 0o600)


def test_a_request_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil) -> None:
    """A file that this user may not read is refused, rather than passed over."""

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    model = small_model()
    with attach(tmp_path, model, sgd(model), policy=None) as agent:
        monkeypatch.setattr("gradiometer.live.thread.read_request", refuse)
        request_policy(agent.path, CLIP)
        (event,) = wait_until(lambda: events(agent, "policy_rejected"))
        assert "ask as the user who trains" in str(event["reasons"])


def test_a_request_that_is_put_back(tmp_path: Path) -> None:
    """An old request that comes again, from a copy, is not asked again."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=None) as agent:
        await_change(agent, model, optimizer, CLIP)
        old = (agent.path / "control.json").read_text()
        await_change(agent, model, optimizer, None)
        write_atomically(agent.path / "control.json", old)
        deadline = time.monotonic() + 1.5
        train_until(model, optimizer, lambda: time.monotonic() > deadline)
        assert open_run(agent.path).status["policy_changes"] == 2


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy changes, nothing is said that is not so, and the history is written when there is room."""
    full, write = threading.Event(), revisions.write_history
    full.set()

    def write_history(*arguments: Any) -> Any:
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer, policy=None) as agent:
        monkeypatch.setattr(chronicle, "write_history", write_history)
        request = request_policy(agent.path, CLIP)
        train_until(model, optimizer, lambda: open_run(agent.path).status["policy_revision"] == 1)
        tail = RankTail(agent.path)
        assert tail.revision is None  # not known, and so not named
        assert not [sample for sample in frame([tail], "running").samples if "clip_events" in sample[0]]
        full.clear()
        assert await_answer(agent.path, request, PATIENCE_SECONDS).revision == 1
        assert tail.revision is not None
        tail.close()
    assert agent.errors == 1


def test_no_thread_holds_a_model(tmp_path: Path) -> None:
    """An agent that is forgotten with its model ends its threads and its run, whatever its callbacks hold."""
    model = small_model()

    def save(call: ActionCall, held: nn.Module = model) -> nn.Module:
        return held

    action = {"when": {"norm_above": 1e-9}, "do": {"callback": "save"}}
    optimizer = sgd(model)
    agent = attach(tmp_path, model, optimizer, policy={"actions": [action]}, callbacks={"save": save})
    train(model, optimizer, [0])
    path, seen = agent.path, weakref.ref(model)
    del model, optimizer, agent, save
    end = time.monotonic() + PATIENCE_SECONDS
    while seen() is not None or any(thread.name.startswith("gradiometer") for thread in threading.enumerate()):
        gc.collect()
        assert time.monotonic() < end, threading.enumerate()
        time.sleep(0.05)
    assert int(open_run(path).status["state"]) == 2


def test_a_callback_that_detaches(tmp_path: Path) -> None:
    """It is told at once that it must not, it counts as failed, and training goes on with the agent."""
    model, agents, seconds = small_model(), list[Agent](), list[float]()
    optimizer = sgd(model)

    def stop(call: ActionCall) -> None:
        began = time.monotonic()
        try:
            agents[0].detach()
        finally:
            seconds.append(time.monotonic() - began)

    policy = {"actions": [{"when": {"norm_above": 1e-9}, "do": {"callback": "stop"}, "cooldown": 10**6}]}
    with attach(tmp_path, model, optimizer, policy=policy, callbacks={"stop": stop}) as agent:
        agents.append(agent)
        train_until(model, optimizer, lambda: events(agent, "callback_failed"))
        assert "set a flag for the loop" in events(agent, "callback_failed")[0]["message"]
        assert seconds[0] < 10
        steps = len(open_run(agent.path).rows)
        train(model, optimizer, [0])
        assert len(open_run(agent.path).rows) == steps + 1


def test_a_checkpoint_whose_policy_calls_what_is_not_there(tmp_path: Path) -> None:
    """The policy in force then cannot be restored: the one attached stays, whole, and a warning says why."""
    keeping = {"pipeline": CLIP, "actions": [{"when": {"norm_above": 1e9}, "do": {"callback": "keep"}}]}
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path / "a", model, optimizer, policy=CLIP, callbacks={"keep": print}) as agent:
        await_change(agent, model, optimizer, keeping)
        train(model, optimizer, [0])
        state = agent.state_dict()
    with attach(tmp_path / "b", model, sgd(model), policy=CLIP) as agent:
        agent.load_state_dict(state)
        assert agent.step == state["step"]
        assert agent.state_dict()["in_force"] == load_policy(CLIP).to_dict()
        assert "calls 'keep'" in events(agent, "policy_state")[0]["message"]


def row(step: int, revision: int, clipped: int) -> RowHeader:
    return RowHeader(step, step, 0, clipped, 0, 1, -1, revision, 1.0, 1.0, 1.0, NAN, NAN, NAN, NAN, 0.0)


def test_rows_of_an_earlier_policy_call_for_nothing(tmp_path: Path) -> None:
    """Rows that were under way when the policy changed are not judged by actions that came with the new one."""
    model = small_model()
    rate = {"when": {"clip_rate": {"policy": "b", "above": 0.5, "window": 1}}, "do": "raise"}
    spec = load_policy({"pipeline": [{"global_norm": {"max_norm": 1, "name": "b"}}], "actions": [rate]})
    with attach(tmp_path, model, sgd(model), policy=None) as agent:
        actions: Actions = agent._actions
        actions.replace(spec.actions, {"b": 0}, 3)
        actions.see(row(0, 2, 1))  # the slot was another's
        actions.check()
        actions.see(row(1, 3, 1))
        with pytest.raises(RuntimeError, match="clip_rate at step 1"):
            actions.check()


def test_an_event_that_cannot_be_written_stops_no_action(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a full disk the job is stopped at the same step as without."""

    def event(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = small_model()
    optimizer = sgd(model)
    watched = [{"when": {"consecutive_nonfinite": 1}, "do": what} for what in ("event", "raise")]
    with attach(tmp_path, model, optimizer, policy={"pipeline": ["nonfinite"], "actions": watched}) as agent:
        train(model, optimizer, [0])
        monkeypatch.setattr(type(agent._telemetry.recorder), "event", event)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, NAN)
        with pytest.raises(RuntimeError, match="consecutive_nonfinite at step 1"):
            optimizer.step()
        monkeypatch.undo()


def test_a_counter_never_falls_or_leaps(tmp_path: Path) -> None:
    """Over many policies, kinds that take turns under one name, and slots used again, no label set counts wrongly."""
    model = small_model()
    optimizer = sgd(model)
    kinds: list[Any] = [
        {"global_norm": {"max_norm": 1e-6, "name": "clip"}},
        {"value": {"max_abs": 1e-9, "name": "clip"}},
    ]
    seen: dict[tuple[str, ...], float] = {}
    with attach(tmp_path, model, optimizer, policy=[kinds[0]]) as agent:
        for turn in range(5):
            others: list[Any] = [{"global_norm": {"max_norm": 1e9, "name": f"n{turn}x{place}"}} for place in range(4)]
            await_change(agent, model, optimizer, [*others, kinds[(turn + 1) % 2]])
            train(model, optimizer, [0])
            tail = RankTail(agent.path)
            samples = frame([tail], "running").samples
            tail.close()
            found = {labels: value for name, labels, value in samples if name == "gradiometer_clip_events_total"}
            assert len(found) == 5
            assert {labels[1]: value for labels, value in found.items()}["clip"] == agent.step
            assert all(value >= seen.get(labels, 0) for labels, value in found.items())
            assert all(value == 0 for labels, value in found.items() if labels[1] != "clip")
            seen |= found


def test_a_name_keeps_its_slot_when_its_kind_changes() -> None:
    """Name and mode are the labels of the counter: it goes on under another kind, and comes back with its count."""
    first, second = Slot(name="clip", kind="global_norm"), Slot(name="clip", kind="value")
    table = SlotTable([first])
    assert table.change([second]) == frozenset()
    assert table.slots[0] == second
    shadow = Slot(name="clip", kind="value", mode="shadow")
    table.change([shadow])
    assert table.slots[:2] == (None, shadow)


def test_what_a_retired_shadow_counted_is_nobodys(tmp_path: Path) -> None:
    """The number of steps in which something acted does not grow by what once watched."""
    model = small_model()
    optimizer = sgd(model)
    shadow = {"pipeline": ["nonfinite"], "shadow": [{"global_norm": {"max_norm": 1e-6}}]}
    with attach(tmp_path, model, optimizer, policy=shadow) as agent:
        train(model, optimizer, range(3))
        await_change(agent, model, optimizer, ["nonfinite"])
        tail = RankTail(agent.path)
        assert int(tail.clip_events.sum()) == 0
        tail.close()


def test_numbers_that_no_tensor_holds_are_refused_at_attach() -> None:
    """What torch could not make a tensor of is said with the file, and not by the first step."""
    for stage in ({"zclip": {"warmup_steps": 10**25}}, {"skip": {"max_consecutive": 10**25}}, {"agc": {"eps": 1e300}}):
        with pytest.raises(PolicyError, match="less than or equal"):
            load_policy([stage])
