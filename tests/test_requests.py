"""A training loop is asked for a checkpoint, or to stop: by the command line, by files, and not where it is deaf."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

import gradiometer
from gradiometer import Agent, LoopRequest, open_run
from gradiometer.live import loop, thread
from gradiometer.live.control import RequestError, await_answer, request_policy
from gradiometer.live.requests import MAX_WAITING, request_loop, waiting
from gradiometer.live.revisions import write_atomically
from tests._training import attach, backward, loss_of, small_model, train, train_until

pytestmark = pytest.mark.slow

JOB = """
    import sys, time
    from tests._training import attach, small_model, train
    import torch
    from pathlib import Path
    root = Path(sys.argv[1])
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with attach(root, model, optimizer, run_id="job") as agent:
        print("go", flush=True)
        while not agent.requested("stop"):
            train(model, optimizer, [agent.step % 50])
            if request := agent.requested("checkpoint"):
                torch.save({"step": agent.step, "note": request.note}, root / "saved.pt")
                agent.done("checkpoint", "saved.pt")
            time.sleep(0.002)
    print("left", flush=True)
"""


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def told(agent: Agent) -> list[dict[str, Any]]:
    return [event for event in open_run(agent.path).events if event["kind"].startswith("request_")]


def train_scaled(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: GradScaler) -> None:
    for step in range(10**6):
        optimizer.zero_grad()
        backward(scaler.scale(loss_of(model, step % 7)))
        scaler.step(optimizer)
        scaler.update()


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradiometer.cli", "request", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a training process that saves when it is asked, and goes on until it is asked to stop."""
    command = [sys.executable, "-c", textwrap.dedent(JOB), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "go\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_command_line_asks(tmp_path: Path, job: subprocess.Popen[str]) -> None:
    """A running process saves a checkpoint, then leaves its loop, and whoever asked is told of both."""
    place = ("--dir", str(tmp_path))
    done = cli("job", "checkpoint", *place, "--note", "before the storm")
    assert (done.returncode, done.stdout.endswith(": saved.pt\n")) == (0, True), done
    saved = torch.load(tmp_path / "saved.pt")
    assert saved["note"] == "before the storm"
    assert f"done after step {saved['step'] - 1}" in done.stdout
    done = cli("job", "stop", *place)
    assert (done.returncode, "training ended" in open_run(tmp_path / "job").events[-1]["message"]) == (0, True), done
    assert job.wait(timeout=60) == 0
    done = cli("job", "stop", *place)
    assert (done.returncode, "does not run any more" in done.stderr) == (2, True)
    assert cli("other", "stop", *place).returncode == 2


def test_a_checkpoint_is_shown_once_and_a_stop_stays(tmp_path: Path) -> None:
    """A loop that forgets to say done saves once; one that leaves two loops sees the stop in both."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        assert (agent.requested("checkpoint"), agent.requested("stop")) == (None, None)
        first = request_loop(agent.path, "checkpoint", by="me", note="why")
        request = train_until(model, optimizer, lambda: agent.requested("checkpoint"))
        assert isinstance(request, LoopRequest)
        assert (request.id, request.by, request.note) == (first, "me", "why")
        train(model, optimizer)
        assert agent.requested("checkpoint") is None
        second = request_loop(agent.path, "stop")
        train_until(model, optimizer, lambda: agent.requested("stop"))
        assert agent.requested("stop")
        assert waiting(agent.path) == {}
    assert agent.requested("stop")
    kinds = [(event["kind"], event["request"]) for event in told(agent)]
    assert kinds == [
        ("request_taken", first),
        ("request_taken", second),
        ("request_failed", first),
        ("request_done", second),
    ]
    assert not await_answer(agent.path, first, 1, of_policy=False).applied
    assert await_answer(agent.path, second, 1, of_policy=False).applied


def test_functions_are_called_as_the_last_act_of_the_step(tmp_path: Path) -> None:
    """A function of on_request sees the parameters after the step, and its failure costs the request only."""
    model, seen = small_model(), []
    optimizer = sgd(model)

    def save(request: LoopRequest) -> None:
        seen.append((request.id, [each.detach().clone() for each in model.parameters()]))
        if len(seen) == 2:
            raise OSError("no space")

    with attach(tmp_path, model, optimizer, on_request={"checkpoint": save}) as agent:
        for count in (1, 2, 3):
            asked = request_loop(agent.path, "checkpoint")
            train_until(model, optimizer, lambda: len(seen) >= count)  # noqa: B023
            assert seen[-1][0] == asked
            assert all(torch.equal(a, b) for a, b in zip(seen[-1][1], model.parameters(), strict=True))
    kinds = [event["kind"] for event in told(agent)]
    assert kinds == ["request_taken", "request_done", "request_taken", "request_failed", *kinds[:2]]
    assert "OSError: no space" in told(agent)[3]["reasons"]
    assert open_run(agent.path).status["agent_errors"] == 0


def test_a_stop_is_raised_where_that_was_asked_for(tmp_path: Path) -> None:
    """StopTraining leaves the loop after a whole step, also under a GradScaler, and is the answer."""
    model = small_model()
    optimizer, scaler = sgd(model), GradScaler("cpu", init_scale=4.0)
    with attach(tmp_path, model, optimizer, on_request={"stop": "raise"}) as agent:
        asked = request_loop(agent.path, "stop", by="me")
        with pytest.raises(gradiometer.StopTraining, match="of me"):
            train_scaled(model, optimizer, scaler)
        steps = agent.step
    answer = await_answer(agent.path, asked, 1, of_policy=False)
    assert (answer.applied, answer.step) == (True, steps - 1)
    assert len(open_run(agent.path)) == steps


def test_a_loop_that_does_not_listen_is_asked_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request waits for a loop that may yet look for it, and is refused with what to write when it does not."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        asked = request_loop(agent.path, "stop")
        write_atomically(agent.path / "request-z.json", "{")
        (other,) = train_until(model, optimizer, lambda: told(agent))
        assert (other["kind"], other["request"]) == ("request_refused", "z")
        assert list(waiting(agent.path)) == [asked], "which was looked at before the other"
        monkeypatch.setattr(thread, "LISTEN_SECONDS", 0.0)
        _, event = train_until(model, optimizer, lambda: len(found := told(agent)) == 2 and found)
        assert event["kind"] == "request_refused"
        assert "agent.requested('stop')" in event["reasons"][0]
        assert waiting(agent.path) == {}
        assert agent.requested("stop") is None


def test_requests_do_not_displace_one_another(tmp_path: Path) -> None:
    """A policy, a checkpoint and a stop that are asked for at once are all answered, in that order."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        agent.requested("checkpoint")
        policy = request_policy(agent.path, [{"global_norm": {"max_norm": 0.1}}])
        first, second = (request_loop(agent.path, kind) for kind in ("checkpoint", "stop"))
        saved = []
        while not agent.requested("stop"):
            train(model, optimizer, [0])
            if request := agent.requested("checkpoint"):
                saved.append(request.id)
                agent.done("checkpoint")
        assert saved == [first]
        assert open_run(agent.path).history.answer(policy) is not None
    answers = [event["request"] for event in told(agent) if event["kind"] == "request_done"]
    assert answers == [first, second]


def test_one_at_a_time(tmp_path: Path) -> None:
    """A checkpoint that is asked for again before the loop has looked is refused, with the request that is open."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        agent.requested("checkpoint")
        first, second = (request_loop(agent.path, "checkpoint", by="me") for _ in range(2))
        train_until(model, optimizer, lambda: len(told(agent)) == 2)
        taken, refused = told(agent)
        assert (taken["kind"], taken["request"]) == ("request_taken", first)
        assert (refused["kind"], refused["request"]) == ("request_refused", second)
        assert refused["reasons"] == [f"it is asked for already, by request {first} of me"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not a request"),
        ("[]", "valid dictionary"),
        ('{"id": "a", "kind": "dance"}', "kind"),
        ('{"id": "b", "kind": "stop"}', "holds the request b"),
        ('{"id": "a", "kind": "stop", "version": 9}', "version"),
        (" " * 20_000, "request"),
    ],
)
def test_what_is_no_request(tmp_path: Path, text: str, said: str) -> None:
    """A file that is no request, or of a kind that this agent does not know, is refused once and removed."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        (agent.path / "request-no name.json").write_text(text)
        write_atomically(agent.path / "request-a.json", text)
        (event,) = train_until(model, optimizer, lambda: told(agent))
        assert (event["kind"], event["request"]) == ("request_refused", "a")
        assert said in " ".join(event["reasons"])
        assert waiting(agent.path) == {}


def test_a_request_that_is_put_back_is_passed_over(tmp_path: Path) -> None:
    """What was done under an id is not done again, whoever restores its file."""
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        agent.requested("checkpoint")
        asked = request_loop(agent.path, "checkpoint")
        request = train_until(model, optimizer, lambda: agent.requested("checkpoint"))
        agent.done("checkpoint")
        write_atomically(agent.path / f"request-{asked}.json", request.model_dump_json())
        train_until(model, optimizer, lambda: not waiting(agent.path))
        train(model, optimizer)
        assert agent.requested("checkpoint") is None
    assert [event["kind"] for event in told(agent)] == ["request_taken", "request_done"]


def test_a_loop_that_does_not_answer_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event says, once, that the loop has not answered; it may still, and what never was is said at the end."""
    monkeypatch.setattr(loop, "UNANSWERED_SECONDS", 0.2)
    model = small_model()
    optimizer = sgd(model)
    with attach(tmp_path, model, optimizer) as agent:
        agent.requested("checkpoint")
        request_loop(agent.path, "checkpoint")
        train_until(model, optimizer, lambda: len(told(agent)) == 2)
        assert told(agent)[1]["kind"] == "request_unanswered"
        assert agent.requested("checkpoint")
        agent.done("checkpoint", "late")
        request_loop(agent.path, "checkpoint")
        train_until(model, optimizer, lambda: len(told(agent)) >= 4)
    assert [event["kind"] for event in told(agent)][2:] in (
        ["request_done", "request_taken", "request_failed"],
        ["request_done", "request_taken", "request_unanswered", "request_failed"],
    )


def test_what_is_refused_before_it_is_asked(tmp_path: Path) -> None:
    """An agent that is too old, too many requests, and wrong settings are told at once."""
    model = small_model()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="on_request has 'dance'"):
        attach(tmp_path, model, optimizer, on_request={"dance": print})
    with pytest.raises(TypeError, match="expected a function of one argument, the request, or 'raise'"):
        attach(tmp_path, model, optimizer, on_request={"stop": "leave"})
    with pytest.raises(TypeError, match=r"on_request\['checkpoint'\] is 'raise'"):
        attach(tmp_path, model, optimizer, on_request={"checkpoint": "raise"})
    with attach(tmp_path, model, optimizer) as agent:
        with pytest.raises(ValueError, match="expected 'checkpoint' or 'stop'"):
            agent.requested("dance")  # type: ignore[arg-type]  # that is the point
        for _ in range(MAX_WAITING):
            request_loop(agent.path, "stop")
        with pytest.raises(RequestError, match="wait"):
            request_loop(agent.path, "stop")
        history = agent.path / "policy.json"
        history.write_text(json.dumps(json.loads(history.read_text()) | {"takes": []}))
        with pytest.raises(RequestError, match="newer gradiometer"):
            request_loop(agent.path, "stop")
