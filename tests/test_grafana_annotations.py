"""Events become annotations, each once: a stub of Grafana, or the real one that GRADIOMETER_TEST_GRAFANA names."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gradiometer_monitor.following.events import Events
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.grafana import service as module
from gradiometer_monitor.grafana.service import GrafanaService
from gradiometer_monitor.grafana.settings import GrafanaSettings
from gradiometer_monitor.services import Context
from gradiometer_monitor.store import Event, Store
from tests._grafana import ServedGrafana, Stub, serve_grafana
from tests._grafana_answers import Json

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Spawn, Start, WaitUntil, WriteRun

NOW = time.time_ns()
Serve = Callable[..., GrafanaService]
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
from gradiometer_monitor.following.events import Events
from gradiometer_monitor.grafana.client import Grafana
from gradiometer_monitor.grafana.service import GrafanaService
from gradiometer_monitor.grafana.settings import GrafanaSettings
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.services import Context
from gradiometer_monitor.store import Store

state, settings, point = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

put, add, count = Store.put, Grafana.add_annotation, 0

def dying_put(self, key, value):
    sent = key.endswith("/sent") and value["id"].endswith("/1")
    moved = not key.endswith("/sent") and value == 2
    if (point == "before sending" and sent) or (point == "before moving on" and moved):
        die()
    put(self, key, value)
    if (point == "about to send" and sent) or (point == "moved on" and moved):
        die()

Store.put = dying_put
if point == "answered":
    Grafana.add_annotation = lambda self, *args: (add(self, *args), "/1" in args[3] and die())
store = Store(state)
runs = Runs(state.parent / "runs", retention_seconds=900)
context = Context(runs=runs, events=Events(runs, store), store=store)
service = GrafanaService(GrafanaSettings.model_validate(settings), context)
service.start()
deadline = time.monotonic() + 60
while time.monotonic() < deadline and not (service.healthy and service._cursor >= 3):
    time.sleep(0.02)
service.stop()
"""
"""A monitor's service in a process of its own, which kills itself at a point while it handles the second of three."""


@pytest.fixture
def grafana(tmp_path: Path) -> Iterator[ServedGrafana]:
    """Give the Grafana to test against."""
    with serve_grafana(tmp_path) as served:
        yield served


@pytest.fixture
def stub(grafana: ServedGrafana) -> Stub:
    """Give the stub's inside; tests that need it are skipped against a real Grafana."""
    return grafana.server.stub if grafana.server else pytest.skip("a real Grafana cannot be made to fail")


@pytest.fixture
def context(tmp_path: Path) -> Iterator[Context]:
    """Give runs below ``tmp_path/runs``, events and a store."""
    (tmp_path / "runs").mkdir()
    runs, store = Runs(tmp_path / "runs", retention_seconds=900), Store(tmp_path / "state")
    yield Context(runs=runs, events=Events(runs, store), store=store)
    runs.close()
    store.close()


@pytest.fixture
def serve(grafana: ServedGrafana, context: Context, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Give a function that starts a service, with short pauses, and stop those that were started."""
    monkeypatch.setattr(module, "FIRST_WAIT_SECONDS", 0.05)
    monkeypatch.setattr(module, "LAST_WAIT_SECONDS", 0.2)
    started: list[GrafanaService] = []

    def start(where: Context = context, annotations: Json | None = None, **more: Any) -> GrafanaService:
        section = grafana.settings | {"timeout_seconds": 30, "annotations": {"per_second": 1000} | (annotations or {})}
        made = GrafanaService(GrafanaSettings.model_validate(section | more), where)
        started.append(made)
        made.start()
        return made

    yield start
    for service in started:
        service.stop(20)


def happened(number: int, kind: str = "policy_changed", **fields: Any) -> Event:
    """Make an event; each number is a millisecond of its own."""
    made = Event(id=f"run/0/abc/{number}", run_id="run", rank=0, time_ns=NOW + number * 10**6, kind=kind, step=number)
    return replace(made, **({"message": f"event/{number} of the test"} | fields))


def numbers(grafana: ServedGrafana) -> list[int]:
    """Return which events the annotations of the dashboard are of."""
    return [round(each["time"] - NOW // 10**6) for each in grafana.annotations()]


def counted(service: GrafanaService) -> dict[str, float]:
    """Return what became of events, without the zeros."""
    results = {labels[0]: value for name, labels, value in service.samples() if name.endswith("annotations_total")}
    return {name: value for name, value in results.items() if value}


def there(service: GrafanaService) -> float:
    """Return how many events Grafana has: one whose answer came too late, as of a slow machine, was found there."""
    return sum(counted(service).get(result, 0) for result in ("created", "present"))


def value(service: GrafanaService, name: str) -> float:
    return next(value for known, _, value in service.samples() if known == f"gradiometer_{name}")


def test_what_an_annotation_says(
    grafana: ServedGrafana,
    serve: Serve,
    context: Context,
    tmp_path: Path,
    make_manifest: MakeManifest,
    wait_until: WaitUntil,
) -> None:
    """It names run, rank, step, layer and what happened, as text, at the time of the event; the end makes a region."""
    from gradiometer.recorder import Recorder

    recorder = Recorder(tmp_path / "runs", make_manifest("job-7"))
    recorder.event("nonfinite", "the gradient of blocks.0.1 <went> bad", step=12, parameter="blocks.0.1")
    service = serve()
    while context.runs.poll():
        pass
    context.events.follow()
    wait_until(lambda: len(grafana.annotations()) == 1)
    [made] = grafana.annotations()
    [event] = context.store.events(kinds=("nonfinite",))
    said = "job-7, rank 0, step 12, layer blocks.0: the gradient of blocks.0.1 &lt;went&gt; bad"
    assert made["text"] == said
    assert made["tags"][:3] == ["gradiometer", "nonfinite", "job-7"]
    assert made["dashboardUID"] == grafana.board
    assert made["time"] == made["timeEnd"] == event.time_ns // 10**6
    time.sleep(0.005)
    recorder.event("finite_again", "gradients are finite again at step 15, after 3 bad steps", step=15, steps=3)
    context.events.follow()
    wait_until(lambda: counted(service) == {"created": 1, "extended": 1})
    [region] = grafana.annotations()
    assert region["id"] == made["id"]
    assert region["text"] == f"{said}; gradients are finite again at step 15, after 3 bad steps"
    assert region["timeEnd"] == context.store.events(kinds=("finite_again",))[0].time_ns // 10**6
    assert region["tags"] == made["tags"]
    recorder.close()


def test_each_is_annotated_once_over_restarts(
    grafana: ServedGrafana, serve: Serve, context: Context, tmp_path: Path, wait_until: WaitUntil
) -> None:
    """A service that starts anew goes on where the last one was; one without its state finds what is there."""
    context.store.add(happened(number) for number in range(3))
    first = serve()
    wait_until(lambda: counted(first) == {"created": 3})
    first.stop()
    context.store.add([happened(3)])
    second = serve()
    wait_until(lambda: counted(second) == {"created": 1})
    second.stop()
    fresh = Store(None)
    fresh.add(happened(number) for number in range(4))
    third = serve(Context(runs=context.runs, events=Events(context.runs, fresh), store=fresh))
    wait_until(lambda: counted(third) == {"present": 4})
    third.stop()
    fresh.close()
    assert numbers(grafana) == [0, 1, 2, 3]


def test_two_services_at_once(grafana: ServedGrafana, serve: Serve, context: Context, wait_until: WaitUntil) -> None:
    """While the service before a reload still works, the new one makes nothing twice."""
    context.store.add(happened(number) for number in range(20))
    services = [serve(check_seconds=number + 1) for number in range(2)]
    wait_until(lambda: all(value(service, "annotations_waiting") == 0 for service in services))
    for service in services:
        service.stop(20)
    assert numbers(grafana) == list(range(20))
    assert sum(counted(service).get("created", 0) for service in services) == 20


def test_events_wait_while_grafana_is_away(
    stub: Stub, grafana: ServedGrafana, serve: Serve, context: Context, wait_until: WaitUntil
) -> None:
    """What happens before Grafana is there, and while it is away, comes in order once it is back; and it is told."""
    assert grafana.server is not None
    grafana.server.down()
    service = serve()
    context.store.add(happened(number) for number in range(3))
    service.wake()
    wait_until(lambda: value(service, "annotations_waiting") == 3)
    assert value(service, "grafana_up") == 0
    grafana.server.up()
    wait_until(lambda: counted(service) == {"created": 3})
    assert value(service, "grafana_up") == 1
    grafana.server.down()
    context.store.add(happened(number) for number in range(3, 6))
    service.wake()
    wait_until(lambda: value(service, "grafana_up") == 0)
    grafana.server.up()
    wait_until(lambda: counted(service) == {"created": 6})
    assert [each["id"] for each in grafana.annotations()] == sorted(each["id"] for each in stub.annotations)
    assert numbers(grafana) == list(range(6))


@pytest.mark.parametrize(
    "point", ["before sending", "about to send", "answered", "before moving on", "moved on"], ids=lambda p: p
)
@pytest.mark.slow
def test_killed_at_any_point(
    grafana: ServedGrafana, context: Context, tmp_path: Path, spawn: Spawn, point: str
) -> None:
    """A monitor that is killed between a request and its own note of it loses nothing, and makes nothing twice."""
    context.store.add(happened(number) for number in range(3))
    context.store.close()
    section = grafana.settings | {"timeout_seconds": 5, "annotations": {"per_second": 1000}}
    codes = []
    for where in (point, "nowhere"):
        process = spawn(sys.executable, "-c", CHILD, str(tmp_path / "state"), json.dumps(section), where)
        codes.append(process.wait(timeout=90))
    assert codes == [-9, 0]
    assert numbers(grafana) == [0, 1, 2]


def test_killed_while_grafana_is_busy(
    stub: Stub, grafana: ServedGrafana, context: Context, tmp_path: Path, spawn: Spawn, wait_until: WaitUntil
) -> None:
    """A request that Grafana still works on when its sender is killed and started again makes nothing twice."""
    context.store.add(happened(number) for number in range(3))
    context.store.close()
    section = grafana.settings | {"timeout_seconds": 60, "annotations": {"per_second": 1000}}
    line = (sys.executable, "-c", CHILD, str(tmp_path / "state"), json.dumps(section), "nowhere")
    arrived, go, done = threading.Event(), threading.Event(), threading.Event()

    def hold() -> None:
        arrived.set()
        go.wait(60)

    stub.fault("POST", "/annotations", times=1, before=hold, after=done.set)
    first = spawn(*line)
    wait_until(arrived.is_set)
    first.kill()
    first.wait()
    board = ("GET", f"/api/dashboards/uid/{grafana.board}")
    before = stub.requests.count(board)
    second = spawn(*line)
    wait_until(lambda: stub.requests.count(board) >= before + 2, 50)  # of apply, and of annotating, which waits now
    time.sleep(1.0)  # without that it would look, find nothing, and send
    go.set()
    assert second.wait(timeout=90) == 0
    assert done.wait(30)
    assert numbers(grafana) == [0, 1, 2]


def test_an_answer_that_was_lost(
    stub: Stub, grafana: ServedGrafana, serve: Serve, context: Context, wait_until: WaitUntil
) -> None:
    """When the connection ends, or time runs out, after Grafana did it, it is found and not done again."""
    answer = threading.Event()
    stub.fault("POST", "/annotations", times=1, drop=True)
    late = stub.fault("POST", "/annotations", times=0, after=lambda: answer.wait(60))
    context.store.add([happened(0), happened(1)])
    service = serve(timeout_seconds=3)
    wait_until(lambda: there(service) == 2)
    assert counted(service)["present"] >= 1
    late.times = 1
    context.store.add([happened(2)])
    service.wake()
    wait_until(lambda: there(service) == 3)
    answer.set()
    assert numbers(grafana) == [0, 1, 2]


@pytest.mark.parametrize("status", [500, 502, 503, 429, 401, 403, 408])
def test_refusals_that_pass_keep_the_order(
    stub: Stub, grafana: ServedGrafana, serve: Serve, context: Context, wait_until: WaitUntil, status: int
) -> None:
    """What may succeed later holds the queue until it does."""
    # After these an event is looked for as long as Grafana may take, before it is sent again.
    proxy = status in module.UNSURE
    stub.fault("POST", "/annotations", times=1 if proxy else 3, status=status)
    context.store.add(happened(number) for number in range(3))
    service = serve(timeout_seconds=3 if proxy else 30)
    wait_until(lambda: there(service) == 3)
    assert counted(service).keys() <= {"created", "present"}
    assert numbers(grafana) == [0, 1, 2]
    assert [each["id"] for each in grafana.annotations()] == sorted(each["id"] for each in stub.annotations)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_grafana_never_takes_is_passed_over(
    stub: Stub, grafana: ServedGrafana, serve: Serve, context: Context, wait_until: WaitUntil, status: int
) -> None:
    """A refusal for good is counted, and the next events go on."""
    stub.fault("POST", "/annotations", times=1, status=status)
    context.store.add(happened(number) for number in range(3))
    service = serve()
    wait_until(lambda: counted(service) == {"rejected": 1, "created": 2})
    assert numbers(grafana) == [1, 2]


def test_an_event_that_only_fails_does_not_block_the_others(
    stub: Stub, grafana: ServedGrafana, serve: Serve, context: Context, wait_until: WaitUntil
) -> None:
    """A Grafana that is well, and answers one event with 500 again and again, gets the next ones."""
    stub.fault("POST", "/annotations", times=module.POISON_TRIES, status=500)
    context.store.add(happened(number) for number in range(2))
    service = serve()
    wait_until(lambda: counted(service) == {"rejected": 1, "created": 1})
    assert numbers(grafana) == [1]


def test_grafana_says_when_to_come_again(
    stub: Stub, grafana: ServedGrafana, serve: Serve, context: Context, wait_until: WaitUntil
) -> None:
    """A pause that Grafana asks for is kept, whatever happens meanwhile."""
    asked: list[float] = []

    def note() -> None:
        asked.append(time.monotonic())

    stub.fault("POST", "/annotations", times=1, before=note, status=429, headers={"Retry-After": "2"})
    stub.fault("POST", "/annotations", before=note)
    context.store.add([happened(0)])
    service = serve()

    def made() -> bool:
        service.wake()
        return counted(service) == {"created": 1}

    wait_until(made)
    first, second = asked
    assert second - first >= 2


def test_a_token_that_was_rotated_is_used(
    stub: Stub, grafana: ServedGrafana, serve: Serve, context: Context, wait_until: WaitUntil
) -> None:
    """Events wait while the token is not let in, or there is none, and go on when its file has a good one."""
    assert grafana.token_file is not None
    good = grafana.token_file.read_text()
    grafana.token_file.write_text("glsa_revoked")
    context.store.add([happened(0)])
    service = serve()
    wait_until(lambda: stub.requests)
    grafana.token_file.unlink()
    time.sleep(0.3)  # in which it tries again
    assert counted(service) == {}
    grafana.token_file.write_text(good)
    wait_until(lambda: counted(service) == {"created": 1})


def test_without_the_dashboard_nothing_is_made(
    stub: Stub, grafana: ServedGrafana, serve: Serve, context: Context, wait_until: WaitUntil
) -> None:
    """Grafana would make an annotation of the whole organisation: events wait until the dashboard is there."""
    context.store.add([happened(0)])
    idle = serve(apply=False)
    wait_until(lambda: stub.requests.count(("GET", f"/api/dashboards/uid/{grafana.board}")) >= 2)
    assert stub.annotations == []
    idle.stop()
    service = serve()
    wait_until(lambda: counted(service) == {"created": 1})
    del stub.boards[grafana.board]
    context.store.add([happened(1)])
    service.wake()
    wait_until(lambda: counted(service) == {"created": 2})
    assert all(each["dashboardUID"] == grafana.board for each in stub.annotations)


def test_a_dashboard_that_goes_meanwhile_is_made_again(
    stub: Stub, grafana: ServedGrafana, serve: Serve, context: Context, wait_until: WaitUntil
) -> None:
    """Somebody deletes it while events are annotated: those that come after it wait until it is there again."""

    def delete() -> None:
        del stub.boards[grafana.board]
        context.store.add([happened(1)])

    stub.fault("POST", "/annotations", times=1, after=delete)
    context.store.add([happened(0)])
    service = serve()
    wait_until(lambda: counted(service) == {"created": 2})
    assert [each["dashboardUID"] for each in stub.annotations] == [grafana.board] * 2


def test_old_events_and_too_many_are_skipped(
    grafana: ServedGrafana, serve: Serve, context: Context, wait_until: WaitUntil
) -> None:
    """What is older than the bound, and the oldest of more than may wait, are counted and not annotated."""
    context.store.add([happened(number) for number in range(5)])
    context.store.add([happened(9, time_ns=NOW - 3 * 86400 * 10**9)])
    service = serve(annotations={"max_waiting": 4, "max_age_days": 2})
    wait_until(lambda: counted(service) == {"skipped": 3, "created": 3})
    assert numbers(grafana) == [2, 3, 4]


def test_only_the_kinds_that_were_asked_for(
    grafana: ServedGrafana, serve: Serve, context: Context, wait_until: WaitUntil
) -> None:
    """Other kinds are neither annotated nor waiting."""
    context.store.add([happened(0, "scalars"), happened(1), happened(2, "run_lost", rank=None)])
    service = serve(annotations={"kinds": ["run_lost"]})
    wait_until(lambda: counted(service) == {"created": 1})
    assert numbers(grafana) == [2]
    wait_until(lambda: value(service, "annotations_waiting") == 0)
    context.store.add([happened(3, "scalars")])
    service.wake()
    assert value(service, "annotations_waiting") == 0


def test_what_all_ranks_tell_is_one_annotation(
    grafana: ServedGrafana, serve: Serve, context: Context, wait_until: WaitUntil
) -> None:
    """Ranks that tell of the same step are one; a job that was started again and fails alike is another one."""
    start = [happened(rank, "nonfinite", rank=rank, step=7, id=f"run/{rank}/a/0") for rank in (1, 0, 2)]
    again = [happened(10 + rank, "nonfinite", rank=rank, step=7, id=f"run/{rank}/b/0") for rank in (2, 1, 0)]
    end = [happened(20 + rank, "finite_again", rank=rank, step=9, id=f"run/{rank}/b/1") for rank in (0, 1)]
    context.store.add([*start, *again, *end])
    service = serve()
    wait_until(lambda: counted(service) == {"created": 2, "echo": 5, "extended": 1})
    assert numbers(grafana) == [1, 11]
    assert [round(each["timeEnd"] - each["time"]) for each in grafana.annotations()] == [0, 9]


def test_long_names_and_messages_are_cut(
    grafana: ServedGrafana, serve: Serve, context: Context, wait_until: WaitUntil
) -> None:
    """A tag fits Grafana's column, a text stays readable, and the next event is not held up."""
    context.store.add([happened(0, run_id="r" * 128, message="a\0b\n" + "x" * 100_000), happened(1)])
    service = serve()
    wait_until(lambda: counted(service) == {"created": 2})
    made = grafana.annotations()[0]
    assert made["tags"][2] == "r" * 100
    assert len(made["text"]) < 1300
    assert ": a b xxx" in made["text"]


def test_the_monitor_annotates_what_a_job_tells(
    grafana: ServedGrafana,
    start: Start,
    tmp_path: Path,
    write_run: WriteRun,
    make_manifest: MakeManifest,
    wait_until: WaitUntil,
) -> None:
    """A daemon with a section on Grafana puts the dashboards there, and an incident of a job that it follows."""
    config = tmp_path.with_name(f"{tmp_path.name}-config.yaml")
    config.write_text(json.dumps({"grafana": grafana.settings}))
    monitor = start("--config", str(config))
    wait_until(lambda: grafana.ask("GET", f"/dashboards/uid/{grafana.board}"))
    recorder = write_run(make_manifest("job", created_ns=time.time_ns()), [[1.0] * 4] * 3)
    recorder.event("policy_changed", "from step 2 on another policy is in force", step=2)
    wait_until(lambda: {each["tags"][1] for each in grafana.annotations()} == {"run_started", "policy_changed"})

    def counted() -> float:
        # A Grafana that answers too late has made it all the same: then it is found there.
        samples = monitor.samples()
        return sum(samples["gradiometer_annotations_total", (result,)] for result in ("created", "present"))

    wait_until(lambda: counted() == 2)
    samples = monitor.samples()
    assert samples["gradiometer_annotations_waiting", ()] == 0
    assert samples["gradiometer_grafana_up", ()] == 1
    logged = monitor.end()
    assert f"dashboard {grafana.board} created" in logged
    if grafana.token_file:
        assert grafana.token_file.read_text().strip() not in logged
