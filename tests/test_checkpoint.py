"""What an agent takes from a checkpoint: all of it, what fits an edited policy, or nothing and an error."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

import gradiometer
from gradiometer import Agent, open_run
from gradiometer.policy.base import Decision, Observation, State
from gradiometer.policy.group_norm import GroupNorm
from tests._training import attach, backward, loss_of, small_model, train

GUARD: dict[str, Any] = {"nonfinite": {}}
CLIP: dict[str, Any] = {"global_norm": {"max_norm": 2.0}}
POLICY: dict[str, Any] = {"pipeline": [GUARD, CLIP], "shadow": [{"nonfinite": {"name": "watching"}}]}


def begin(tmp_path: Path, policy: Any, model: nn.Module | None = None) -> tuple[Agent, nn.Module, SGD]:
    model = model or small_model()
    optimizer = SGD(model.parameters(), lr=0.01)
    return attach(tmp_path, model, optimizer, policy=policy), model, optimizer


def checkpoint(tmp_path: Path, policy: Any, *, bad: int = 2) -> dict[str, Any]:
    """Train three good steps and some bad ones, and return the agent's state."""
    agent, model, optimizer = begin(tmp_path, policy)
    with agent:
        train(model, optimizer, range(3))
        for _ in range(bad):
            backward(loss_of(model, 0) * float("nan"))
            optimizer.step()
        return agent.state_dict()


def said(agent: Agent) -> list[dict[str, Any]]:
    return [event for event in open_run(agent.path).events if event["kind"] == "policy_state"]


def test_the_state_is_plain(tmp_path: Path) -> None:
    """It goes through ``torch.save`` and a reader of weights only, and holds what is documented."""
    state = checkpoint(tmp_path, POLICY)
    torch.save(state, tmp_path / "agent.pt")
    found = torch.load(tmp_path / "agent.pt", weights_only=True)
    assert found["states"].keys() == {"nonfinite", "global_norm", "watching"}
    assert found["states"]["watching"]["consecutive"].device.type == "cpu"
    del found["states"], state["states"]
    written = {"version": 1, "pipeline": [GUARD, CLIP], "shadow": [{"nonfinite": {"name": "watching"}}]}
    assert found == state == json.loads(json.dumps(state))
    assert state == {
        "version": 2,
        "step": 5,
        "parameters": 4,
        "attached": written,
        "in_force": written,
        "born": {"nonfinite": 0, "global_norm": 0, "watching": 0},
    }


def test_the_same_policy_goes_on(tmp_path: Path) -> None:
    """Under the policy of the checkpoint everything goes on, and nothing is said."""
    state = checkpoint(tmp_path, POLICY)
    agent, model, optimizer = begin(tmp_path, POLICY)
    with agent:
        agent.load_state_dict(state)
        backward(loss_of(model, 0) * float("nan"))
        optimizer.step()
        states = agent.state_dict()["states"]
    assert agent.step == 6
    assert states["nonfinite"]["consecutive"] == states["watching"]["consecutive"] == 3
    assert said(agent) == []


def test_a_policy_that_was_changed_live_comes_back(tmp_path: Path) -> None:
    """Where the policy in force was not the one attached, it is in force again; a new agent's state says the same."""
    state = checkpoint(tmp_path, POLICY)
    wider = {"version": 1, "pipeline": [GUARD, {"global_norm": {"max_norm": 3.0}}, {"group_norm": {"max_norm": 1.0}}]}
    state |= {"in_force": wider, "born": {"nonfinite": 0, "global_norm": 4, "group_norm": 4}}
    state["states"] = {"nonfinite": state["states"]["nonfinite"], "global_norm": {}, "group_norm": {}}
    agent, model, optimizer = begin(tmp_path, POLICY)
    with agent:
        agent.load_state_dict(state)
        train(model, optimizer, [5])
        after = agent.state_dict()
    assert after["attached"] == state["attached"]
    assert after["in_force"] == wider
    assert after["born"] == state["born"]
    run = open_run(agent.path)
    assert run.rows["policy_threshold"][0, 1] == 3.0
    assert run.grad_norm_postclip[0] <= 2**0.5 + 1e-6  # two layers of at most 1
    assert agent.errors == 0


def test_an_edited_policy_keeps_what_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stages that kept name and kind keep their memory, from shadow to pipeline too; the rest is said, not raised."""
    state = checkpoint(tmp_path, POLICY)
    edited = {"pipeline": [{"nonfinite": {"name": "watching"}}], "shadow": [{"nonfinite": {"name": "new"}}, CLIP]}
    agent, _, _ = begin(tmp_path, edited)
    with agent:
        agent.load_state_dict(state)
        after = agent.state_dict()
    assert after["states"]["watching"]["consecutive"] == 2
    assert after["states"]["new"]["consecutive"] == 0
    assert after["born"] == {"watching": 0, "new": 5, "global_norm": 0}
    (event,) = said(agent)
    assert (event["step"], event["anew"], event["unused"]) == (5, ["new"], ["nonfinite"])
    assert event["message"] in caplog.text
    assert "policies begin anew at step 5: new" in event["message"]


def test_a_kind_that_changed_begins_anew(tmp_path: Path) -> None:
    """A stage of the same name and another kind takes nothing over."""
    state = checkpoint(tmp_path, [{"nonfinite": {"name": "one"}}])
    agent, _, _ = begin(tmp_path, [{"global_norm": {"name": "one", "max_norm": 1.0}}])
    with agent:
        agent.load_state_dict(state)
        assert agent.state_dict()["states"] == {"one": {}}
    assert said(agent)[0]["unused"] == ["one"]


class Remembering(GroupNorm):
    """A policy that keeps the norms of its units, in the width of what it sees."""

    def init(self) -> State:
        return {"norms": self.units.fill(0.0)}

    def decide(self, state: State, observation: Observation, step: int) -> tuple[Decision, State]:
        return super().decide(state, observation, step)[0], {"norms": self.units.norms(observation)}


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let ``group_norm`` remember, and give a policy of it."""
    monkeypatch.setattr("gradiometer.policy.build.GroupNorm", Remembering)

    def policy(**settings: Any) -> dict[str, Any]:
        return {"shadow": [{"group_norm": {"max_norm": 1.0, **settings}}]}

    return policy


def test_a_memory_of_another_model_is_refused(tmp_path: Path, remembering: Any) -> None:
    """Tensors that do not fit the model are an error that says what is expected, and nothing is changed."""
    state = checkpoint(tmp_path, remembering(scope="parameter"))
    agent, _, _ = begin(tmp_path, remembering(scope="parameter"), nn.Linear(4, 2))
    with agent:
        before = agent.state_dict()
        with pytest.raises(ValueError, match=r"\(4,\).*expected.*\(2,\).*has 2 parameters, the checkpoint's had 4"):
            agent.load_state_dict(state)
        after = agent.state_dict()
    assert after.pop("states")["group_norm"]["norms"].tolist() == before.pop("states")["group_norm"]["norms"].tolist()
    assert after == before


def test_a_memory_of_other_settings_begins_anew(tmp_path: Path, remembering: Any) -> None:
    """Settings that give a stage's memory another shape let it begin anew; those that do not let it be kept."""
    state = checkpoint(tmp_path, remembering(scope="parameter"), bad=0)
    for settings, kept in (({"scope": "layer"}, False), ({"scope": "parameter", "max_norm": 7.0}, True)):
        agent, _, _ = begin(tmp_path, remembering(**settings))
        with agent:
            agent.load_state_dict(state)
            found = agent.state_dict()
        assert bool(found["states"]["group_norm"]["norms"].any()) == kept
        assert found["born"] == {"group_norm": 0 if kept else 3}
        assert said(agent)[0]["anew"] == ([] if kept else ["group_norm"])


def test_a_memory_of_other_parameters_begins_anew(tmp_path: Path) -> None:
    """As many averages as before, of other parameters, are nothing to go on from; of the same ones they are."""

    def policy(exclude: str, ratio: float = 1.04) -> Any:
        return [{"adagc": {"warmup_steps": 1, "exclude": exclude, "ratio": ratio}}]

    state = checkpoint(tmp_path, policy("0.*"), bad=0)
    for given, kept in ((policy("2.*"), False), (policy("0.*", 2.0), True), (policy("re:^0"), True)):
        agent, _, _ = begin(tmp_path, given)
        with agent:
            agent.load_state_dict(state)
            found = agent.state_dict()
        assert bool(found["states"]["adagc"]["average"].isfinite().all()) == kept
        assert found["born"] == {"adagc": 0 if kept else 3}


def test_a_memory_keeps_its_width(tmp_path: Path, remembering: Any) -> None:
    """What a policy has come to know in float64 is float64 after a restart."""
    policy = remembering(scope="parameter")
    agent, model, optimizer = begin(tmp_path, policy, nn.Linear(4, 2).double())
    with agent:
        backward(model(torch.ones(3, 4, dtype=torch.float64)).square().sum())
        optimizer.step()
        state = agent.state_dict()
    agent, _, _ = begin(tmp_path, policy, nn.Linear(4, 2).double())
    with agent:
        agent.load_state_dict(state)
        found = agent.state_dict()["states"]["group_norm"]["norms"]
    assert found.dtype == torch.float64
    assert torch.equal(found, state["states"]["group_norm"]["norms"])


def test_a_first_version_still_loads(tmp_path: Path) -> None:
    """A checkpoint of version 1, which knew steps and states alone, goes on; of another policy it says so."""
    old = {"version": 1, "step": 7, "policy": {"nonfinite": {"consecutive": torch.tensor(2.0)}, "global_norm": {}}}
    for policy, states, events in (
        ([GUARD, CLIP], {"nonfinite": {"consecutive": 2.0}, "global_norm": {}}, 0),
        ([CLIP], {"global_norm": {}}, 1),
    ):
        agent, _, _ = begin(tmp_path, policy)
        with agent:
            agent.load_state_dict(copy.deepcopy(old))
            assert agent.step == 7
            assert agent.state_dict()["states"] == states
        assert len(said(agent)) == events


def test_a_policy_in_force_that_cannot_be_bound_is_said(tmp_path: Path) -> None:
    """If the policy that was in force cannot be restored, the one attached is, with what it can take over."""
    state = checkpoint(tmp_path, POLICY)
    state["in_force"] = {"version": 1, "pipeline": [GUARD, {"global_norm": {"max_norm": 1.0, "match": "gone.*"}}]}
    agent, _, _ = begin(tmp_path, POLICY)
    with agent:
        agent.load_state_dict(state)
        after = agent.state_dict()
    assert after["in_force"] == after["attached"]
    assert after["states"]["nonfinite"]["consecutive"] == 2
    assert "cannot be restored" in said(agent)[0]["message"]


def test_limits_come_back_with_the_policy(tmp_path: Path) -> None:
    """A restored policy's own limit of bad steps is in force, with those counted before the restart."""
    state = checkpoint(tmp_path, [GUARD])
    state["in_force"] = {"version": 1, "pipeline": [{"nonfinite": {"max_consecutive": 3}}]}
    agent, model, optimizer = begin(tmp_path, [GUARD])
    with agent:
        agent.load_state_dict(state)
        backward(loss_of(model, 0) * float("nan"))
        with pytest.raises(gradiometer.NonFiniteGradientError, match="3 step"):
            optimizer.step()
