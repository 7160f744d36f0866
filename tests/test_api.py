"""The API as a user sees it: runs, events and policies of real runs, asked of a real daemon."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradiometer.records import Flag
from tests._monitor import WRITER, Monitor
from tests._web import AS_READER, AS_WRITER, JOB, send, with_tokens

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Spawn, Start, Train, WaitUntil, WriteRun

Working = tuple[Monitor, "subprocess.Popen[str]"]
CLIP = {"pipeline": [{"nonfinite": {}}, {"global_norm": {"max_norm": 1.0}}]}


def ask(monitor: Monitor, path: str) -> Any:
    """Ask for a path of the API as a reader, and return the answer's body."""
    status, body, headers = monitor.get(f"/api/v1{path}", **AS_READER)
    assert status == 200, body
    assert headers["cache-control"] == "no-store"
    return json.loads(body)


@pytest.fixture
def served(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Monitor:
    """Start a daemon with a reader and a writer."""
    return start(*with_tokens(tmp_path_factory.mktemp("config")))


@pytest.fixture(scope="module")
def working(
    shared_start: Start, shared_spawn: Spawn, make_manifest: MakeManifest, wait_until: WaitUntil,
    tmp_path_factory: pytest.TempPathFactory,
) -> Working:  # fmt: skip
    """Start a daemon with tokens over ``job``, which trains, ``still``, which only runs, and ``over``; give the job."""
    root = tmp_path_factory.mktemp("runs")
    job = shared_spawn(sys.executable, "-c", JOB, root, stdout=subprocess.PIPE)
    for run_id, end in (("still", "stay"), ("over", "finish")):
        manifest = make_manifest(run_id).model_dump_json()
        writer = shared_spawn(sys.executable, "-c", WRITER, root, manifest, "3", end, stdout=subprocess.PIPE)
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
    assert job.stdout is not None
    assert job.stdout.readline() == "attached\n"
    monitor = shared_start(*with_tokens(tmp_path_factory.mktemp("config")), root=root)
    states = {"job": "running", "still": "running", "over": "finished"}
    wait_until(lambda: {run["run_id"]: run["state"] for run in ask(monitor, "/runs")["runs"]} == states)
    return monitor, job


def test_runs_are_chosen_sorted_and_paged(
    served: Monitor, train: Train, make_manifest: MakeManifest, wait_until: WaitUntil
) -> None:
    """State, order, limit and offset do as they say, and the total counts what fits."""
    for run_id, end in (("b", "finish"), ("a", "stay"), ("c", "finish")):
        train(make_manifest(run_id), 3, end)
    wait_until(lambda: len(ask(served, "/runs?state=finished")["runs"]) == 2 and ask(served, "/runs")["total"] == 3)

    def names(query: str) -> list[str]:
        return [run["run_id"] for run in ask(served, f"/runs?{query}")["runs"]]

    assert names("") == ["a", "b", "c"]
    assert names("sort=newest") == ["c", "a", "b"]
    assert names("state=finished&state=lost") == ["b", "c"]
    assert names("limit=1&offset=1") == ["b"]
    assert ask(served, "/runs?limit=1")["total"] == 3


def test_one_run_in_detail(
    served: Monitor, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil
) -> None:
    """What the manifest, the ring and the policy say is told, and nothing of the disk."""
    manifest = make_manifest(
        "run", capacity=4, created_ns=time.time_ns(), policies=("clip", "wider"), shadow=("wider",), job="pretrain",
        labels={"team": "vision"}, world_size=1,
    )  # fmt: skip
    write_run(manifest, [[1.0, 2.0, 2.0, 4.0]] * 10)
    wait_until(lambda: [run["last_step"] for run in ask(served, "/runs")["runs"]] == [9])
    found = ask(served, "/runs/run")
    expected = {
        "run_id": "run", "state": "running", "steps": 10, "last_step": 9, "grad_norm": 5.0, "job": "pretrain",
        "labels": {"team": "vision"}, "world_size": 1, "device": "cpu", "torch_version": "2.13.0", "parameters": 4,
        "layers": ["embed", "blocks.0", "head"],
        "policy": {"revision": 0, "acting": ["clip"], "shadow": ["wider"]},
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert found["ring"] | {"first_step": 0} == {"capacity": 4, "first_step": 0, "last_step": 9}
    assert found["ring"]["first_step"] in (6, 7)
    assert found["created"] == pytest.approx(time.time(), abs=120)
    assert "/" not in json.dumps(found)


def test_windows_are_those_of_the_rows(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Baseline, deviation, clip ratio and what vanishes are as NumPy has them; null before there is enough to say."""
    norms = np.random.default_rng(0).random((300, 4)) + 0.5
    norms[:, 3] = 0.0
    flags = [int(Flag.CLIPPED) * (step % 4 == 0) for step in range(300)]
    write_run(make_manifest("run", capacity=200, created_ns=time.time_ns()), norms, flags=flags)
    write_run(make_manifest("short", created_ns=time.time_ns()), norms[:20])
    served = start(*with_tokens(tmp_path_factory.mktemp("config")))  # once all is written: what it counts begins there
    totals = np.sqrt(np.square(norms[100:].astype(np.float32).astype(np.float64)).sum(axis=1))
    found = ask(served, "/runs/run")
    windows = found["windows"]
    uncounted = windows["uncounted_steps"]
    assert uncounted in (100, 101)
    totals = totals[uncounted - 100 :]
    assert windows["grad_norm_baseline"] == pytest.approx(np.median(totals))
    assert windows["grad_norm_mad"] == pytest.approx(np.median(np.abs(totals - np.median(totals))))
    assert windows["grad_norm_window_max"] == pytest.approx(totals[-61:].max(), rel=0.05)
    assert windows["clip_ratio"] == found["clip_ratio"] == pytest.approx(0.25, abs=0.02)
    assert (windows["layers_vanishing"], windows["layers_exploding"]) == (1, 0)
    windows = ask(served, "/runs/short")["windows"]
    unknown = ("grad_norm_mad", "clip_ratio", "layers_vanishing", "layers_exploding")
    assert [windows[name] for name in unknown] == [None] * 4
    assert windows["uncounted_steps"] == 0


def test_what_is_not_there_is_answered_with_what_is(
    served: Monitor, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil
) -> None:
    """A run that is not followed is 404 and names those that are; a name that is none is 422."""
    for number in range(12):
        write_run(make_manifest(f"run-{number:02d}", created_ns=time.time_ns()), [[1.0] * 4])
    wait_until(lambda: ask(served, "/runs")["total"] == 12)
    for path in ("/runs/nope", "/runs/nope/events", "/runs/nope/policy"):
        status, body, _ = served.get(f"/api/v1{path}", **AS_READER)
        named = ", ".join(f"run-{number:02d}" for number in range(2, 12))
        assert status == 404
        assert json.loads(body)["detail"] == f"no run 'nope' is followed; there are: {named}, and 2 more"
    for name in ("..", "%2e%2e", ".monitor", "a%2Fb", "..%2F..%2Fetc", "a%00b", "-x", "x" * 129):
        assert served.get(f"/api/v1/runs/{name}/policy", **AS_READER)[0] in (404, 422)


def test_events_by_run_kind_and_number(
    served: Monitor, tmp_path: Path, train: Train, make_manifest: MakeManifest, wait_until: WaitUntil
) -> None:
    """Events are chosen by run and kind, and paged by their number in both directions."""
    for run_id in ("one", "two"):
        train(make_manifest(run_id), 3)
        lines = [{"kind": kind, "step": step, "message": "m"} for step, kind in enumerate(["a", "b", "a"])]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with (tmp_path / run_id / "rank-00000" / "events.jsonl").open("a") as file:
            file.write(text)
    wait_until(lambda: len(ask(served, "/events?kind=a&kind=b")["events"]) == 6)
    wait_until(lambda: len(ask(served, "/events?kind=run_started")["events"]) == 2)
    numbers = [event["number"] for event in ask(served, "/events")["events"]]
    assert numbers == sorted(numbers)
    found = ask(served, "/runs/one/events")["events"]
    assert [event["kind"] for event in found if event["rank"] is not None] == ["a", "b", "a"]
    assert [event["step"] for event in ask(served, "/runs/two/events?kind=a")["events"]] == [0, 2]
    found = ask(served, f"/events?after={numbers[1]}&limit=2")["events"]
    assert [event["number"] for event in found] == numbers[2:4]
    found = ask(served, f"/events?before={numbers[4]}&limit=1")["events"]
    assert [event["number"] for event in found] == [numbers[3]]


def test_a_policy_is_put_and_got(working: Working) -> None:
    """A running job takes up a policy; its history and an event say who asked, by his token and address."""
    served, _ = working
    known = ask(served, "/runs/job/policy")["revisions"]
    path, policy = (
        "/api/v1/runs/job/policy?wait=30",
        {"pipeline": [{"nonfinite": {}}, {"global_norm": {"max_norm": 5}}]},
    )
    assert send(served, "PUT", path, {"policy": policy}, **AS_WRITER)[0] == 200
    status, body, _ = send(served, "PUT", path, {"policy": CLIP, "note": "why"}, **AS_WRITER)
    assert (status, body["status"], body["revision"]) == (200, "applied", len(known) + 1)
    found = ask(served, "/runs/job/policy")
    assert [revision["source"] for revision in found["revisions"]] == ["attach", *["request"] * (len(known) + 1)]
    assert found["in_force"] == found["revisions"][-1]
    assert found["in_force"]["policy"]["pipeline"][1]["global_norm"]["max_norm"] == 1.0
    assert found["in_force"]["change"] == "global_norm.max_norm 5.0 -> 1.0"
    assert found["in_force"]["by"] == "oncall (127.0.0.1)"
    assert found["in_force"]["request"] == body["request"]
    assert found["in_force"]["step"] == body["step"]
    event = ask(served, "/runs/job/events?kind=policy_requested")["events"][-1]
    assert event["data"]["by"] == "oncall (127.0.0.1)"
    assert event["data"]["note"] == "why"
    request = served.root / "job" / "rank-00000" / "control.json"
    assert request.stat().st_mode & 0o777 == 0o600


def test_a_job_that_refuses_is_409(working: Working) -> None:
    """What only the job can know to be wrong comes back with its reason, and the old policy stays."""
    served, _ = working
    before = ask(served, "/runs/job/policy")["in_force"]
    path = "/api/v1/runs/job/policy?wait=30"
    impossible = CLIP | {"actions": [{"when": {"consecutive_skips": 10}, "do": {"callback": "save"}}]}
    status, body, _ = send(served, "PUT", path, {"policy": impossible}, **AS_WRITER)
    assert status == 409, body
    assert "and its old policy stays: " in body["detail"]
    assert "attach(callbacks=...)" in body["detail"]
    assert ask(served, "/runs/job/policy")["in_force"] == before


def test_without_waiting_it_is_202(working: Working, wait_until: WaitUntil) -> None:
    """A request that is not waited for, or not answered in time, is 202, and stands."""
    served, job = working
    job.send_signal(19)  # it is stopped, so it cannot answer
    for path in ("/api/v1/runs/job/policy", "/api/v1/runs/job/policy?wait=0.2"):
        status, body, _ = send(served, "PUT", path, {"policy": None}, **AS_WRITER)
        assert (status, body["status"]) == (202, "pending")
    job.send_signal(18)
    wait_until(lambda: ask(served, "/runs/job/policy")["in_force"]["request"] == body["request"])
    assert ask(served, "/runs/job/policy")["in_force"]["policy"] is None


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"pipeline": [{"global_norm": {"max_norm": -1}}]}, "max_norm is -1"),
        ({"pipeline": [{"global_norm": {"max_norm": 1.0, "match": ["nowhere.*"]}}]}, "nowhere.*"),
        ({"pipelines": []}, "pipelines"),
    ],
)
def test_a_wrong_policy_is_422_and_reaches_no_job(working: Working, policy: dict[str, Any], said: str) -> None:
    """What is wrong is told by its path, before anything is written; a dry run says the same."""
    served, _ = working
    for query in ("", "?dry_run=true"):
        status, body, _ = send(served, "PUT", f"/api/v1/runs/still/policy{query}", {"policy": policy}, **AS_WRITER)
        assert status == 422
        assert said in body["detail"]
    assert not (served.root / "still" / "rank-00000" / "control.json").exists()


def test_a_dry_run_tells_what_is_covered(working: Working) -> None:
    """A check needs no job, writes nothing, tells no event, and counts parameters and units of each stage."""
    served, _ = working
    policy = CLIP | {"shadow": [{"group_norm": {"max_norm": 1.0, "scope": "layer"}}]}
    status, body, _ = send(served, "PUT", "/api/v1/runs/over/policy?dry_run=true", {"policy": policy}, **AS_WRITER)
    assert (status, body["status"], body["request"]) == (200, "valid", None)
    assert body["stages"][1:] == [
        {"name": "global_norm", "mode": "act", "parameters": 4, "units": 1},
        {"name": "group_norm", "mode": "shadow", "parameters": 4, "units": 3},
    ]
    assert not (served.root / "over" / "rank-00000" / "control.json").exists()
    assert ask(served, "/runs/over/events?kind=policy_requested")["events"] == []


def test_a_misspelt_dry_run_is_422_and_reaches_no_job(working: Working) -> None:
    """A parameter that the operation has not is told with the one that was meant, and changes nothing."""
    served, _ = working
    status, body, _ = send(served, "PUT", "/api/v1/runs/still/policy?dryrun=true", {"policy": CLIP}, **AS_WRITER)
    assert (status, [each["loc"] for each in body["detail"]]) == (422, [["query", "dryrun"]])
    assert body["detail"][0]["msg"] == "no such parameter; there are wait, dry_run, did you mean 'dry_run'?"
    assert not (served.root / "still" / "rank-00000" / "control.json").exists()


def test_a_run_that_is_over_is_409(working: Working) -> None:
    """A finished run takes up no policy, which is said without a path of the disk."""
    served, _ = working
    status, body, _ = send(served, "PUT", "/api/v1/runs/over/policy", {"policy": None}, **AS_WRITER)
    assert status == 409
    assert body["detail"].startswith("the run in over/rank-00000 does not run any more")
    status, body, _ = send(served, "PUT", "/api/v1/runs/over/policy", {"policy": None, "rank": 7}, **AS_WRITER)
    assert (status, body["detail"]) == (404, "no rank 7 in over")
