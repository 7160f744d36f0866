"""Remote write: what is sent of a run, when, and as what."""

from __future__ import annotations

import base64
import math
import ssl
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import trustme

from gradiometer.live.revisions import History, Revision, Slot, write_history
from gradiometer.metrics import CATALOGUE, PUSHED
from gradiometer.records import Flag
from gradiometer.run import open_run
from gradiometer_monitor.config.settings import SettingsError, resolve
from gradiometer_monitor.remote_write.clock import MAX_SHIFT_MS, place
from gradiometer_monitor.remote_write.protocol import MAX_VALUE_BYTES, LabelError, make_series
from gradiometer_monitor.store import Store
from tests._push import NAN, OK, STALE, Push, is_stale, pushing, recent, values
from tests._receivers import Stub, serve

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, WaitUntil, WriteRun


@pytest.fixture
def push(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Push]:
    """Give a function that makes a service for a receiver's URL."""
    with pushing(tmp_path, monkeypatch) as make:
        yield make


@pytest.fixture
def taking() -> Iterator[Stub]:
    """Give a receiver that takes everything."""
    with serve(lambda _: OK) as stub:
        yield stub


def test_every_step_with_its_own_time(
    push: Push, taking: Stub, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """Scalars, flags and norms of layers of each step arrive with the step's millisecond, once, with all labels."""
    times = recent(5)
    norms = np.random.default_rng(0).random((5, 4))
    norms[3, 0] = NAN
    write_run(make_manifest("run"), norms, close=True, time_ns=times, loss=[1.0, 2.0, NAN, 4.0, math.inf])
    pusher = push(taking.url, labels={"cluster": "a", "instance": "here"})
    pusher.work()
    pusher.work()
    run, ms = open_run(tmp_path / "run"), [each // 10**6 for each in times]
    assert values(taking, "gradiometer_step_number") == run.steps.tolist()
    assert values(taking, "gradiometer_step_grad_norm") == pytest.approx(run.grad_norm_preclip.tolist(), nan_ok=True)
    assert values(taking, "gradiometer_step_nonfinite") == [0, 0, 0, 1, 0]
    assert values(taking, "gradiometer_step_loss") == [1.0, 2.0, 4.0, math.inf]
    layers = {dict(labels)["layer"]: samples for labels, samples in taking.taken.items() if "layer" in dict(labels)}
    assert layers.keys() == set(run.layers)
    for place_of, layer in enumerate(run.layers):
        assert [time for time, _ in layers[layer][:5]] == ms
        expected = run.layer_norms()[:, place_of].tolist()
        assert [value for _, value in layers[layer][:5]] == pytest.approx(expected, rel=0, nan_ok=True)
    (labels,) = [dict(each) for each in taking.taken if ("__name__", "gradiometer_step_loss") in each]
    assert labels == {
        "__name__": "gradiometer_step_loss", "cluster": "a", "instance": "here", "job": "gradiometer", "rank": "0",
        "run_id": "run",
    }  # fmt: skip
    assert pusher.count("rows_sent_total") == 5


def test_what_is_sent_is_in_the_catalogue(
    push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """Every name and label that is sent is declared, and no name is one that is scraped."""
    manifest = make_manifest("run", policies=("clip",), policy={"pipeline": [{"global_norm": {"max_norm": 1.0}}]})
    recorder = write_run(manifest, np.empty((0, 4)))
    recorder.policies[:, 0] = 1.0, 0.5
    recorder.policies[:, 14] = 3.0, 0.25
    more = {"loss_scale": 8.0, "flags": int(Flag.CLIPPED | Flag.HOOKED)}
    append(recorder, np.ones((1, 4)), time_ns=recent(1), step_seconds=0.1, **more)
    recorder.close()
    stats = ("grad_norm_preclip", "grad_norm_postclip", "microbatch_norm")
    push(taking.url, layer_stats=stats, labels={"job": "", "instance": ""}).work()
    sent = {dict(labels)["__name__"]: set(dict(labels)) - {"__name__"} for labels in taking.taken}
    assert sent == {name: set(metric.labels) for name, metric in PUSHED.items()}
    families = {metric.family for metric in CATALOGUE.values()}
    assert not families & PUSHED.keys()


def test_a_run_that_is_over_is_marked_stale_once(
    push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """After its last sample every series gets the one NaN that ends it, and no other NaN has these bits."""
    loss = struct.unpack("<d", struct.pack("<Q", STALE))[0]
    write_run(make_manifest("run"), np.ones((3, 4)), close=True, time_ns=recent(3), loss=loss, flags=int(Flag.LOSS))
    pusher = push(taking.url)
    for _ in range(3):
        pusher.work()
    probe = taking.taken.pop(next(each for each in taking.taken if "probe" in dict(each)["__name__"]))
    assert [value for _, value in probe] == [1.0]
    for samples in taking.taken.values():
        assert [is_stale(value) for _, value in samples] == [False] * (len(samples) - 1) + [True]
        assert samples[-1][0] - samples[-2][0] == 15_000
    assert [math.isnan(value) for _, value in taking.named("gradiometer_step_loss")[0]] == [True] * 4


def test_the_newest_row_waits_for_its_loss(
    push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """A row that its job may still amend is held back, and is sent with what came late."""
    recorder = write_run(make_manifest("run"), np.ones((2, 4)), time_ns=recent(2), loss=NAN)
    pusher = push(taking.url)
    pusher.work()
    assert values(taking, "gradiometer_step_number") == [0]
    recorder.amend(7.0)
    append(recorder, np.ones((1, 4)), time_ns=recent(3)[2:], loss=NAN)
    pusher.work()
    assert values(taking, "gradiometer_step_number") == [0, 1]
    assert values(taking, "gradiometer_step_loss") == [7.0]


def test_a_quiet_runs_newest_row_is_sent_and_again_if_amended(
    push: Push,
    taking: Stub,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    append: Append,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A job that pauses shows its last step; a loss that comes after that is not lost."""
    monkeypatch.setattr("gradiometer_monitor.remote_write.feed.SETTLE_SECONDS", 0.0)
    recorder = write_run(make_manifest("run"), np.ones((1, 4)), time_ns=recent(1), loss=NAN)
    pusher = push(taking.url)
    for _ in range(3):
        pusher.work()
    assert values(taking, "gradiometer_step_number") == [0]
    assert pusher.count("pending_rows") == 0
    recorder.amend(7.0)
    append(recorder, np.ones((1, 4)), time_ns=recent(2)[1:], loss=NAN)
    pusher.work()
    assert values(taking, "gradiometer_step_number") == [0, 0, 1]
    assert values(taking, "gradiometer_step_loss") == [7.0]
    assert pusher.count("rows_sent_total") == 1


@pytest.mark.parametrize(("backfill", "expected"), [(True, [2, 3, 4]), (False, [4])])
def test_where_a_run_that_was_there_begins(
    push: Push,
    taking: Stub,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    append: Append,
    backfill: bool,
    expected: list[int],
) -> None:
    """With what the ring holds, as far as the receiver takes it; or with now. History is not counted as lost."""
    old = recent(2, ago=7200.0)
    recorder = write_run(make_manifest("run"), np.ones((4, 4)), time_ns=[*old, *recent(2)])
    pusher = push(taking.url, backfill=backfill)
    pusher.work()
    append(recorder, np.ones((1, 4)), time_ns=recent(3)[2:])
    recorder.close()
    pusher.work()
    assert values(taking, "gradiometer_step_number") == expected
    assert pusher.count("rows_dropped_total", "too_old") == 0


def test_a_run_started_again_goes_on_in_its_series(
    push: Push, taking: Stub, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """The rows of the earlier start come first, though its directory was moved aside before they were sent."""
    now = time.time_ns()
    write_run(make_manifest("run", created_ns=now), np.ones((3, 4)), time_ns=recent(3), close=True)
    pusher = push(taking.url)
    pusher.runs.poll()
    pusher.service._discover()
    write_run(make_manifest("run", created_ns=now + 1), np.ones((3, 4)), time_ns=recent(9)[6:], close=True)
    for _ in range(3):
        pusher.work()
    assert values(taking, "gradiometer_step_number") == [0, 1, 2, 0, 1, 2]
    (samples,) = taking.named("gradiometer_step_number")
    assert [time for time, _ in samples] == sorted(time for time, _ in samples)


def test_a_clock_that_is_ahead(push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun) -> None:
    """A step of next year is counted and not sent, and those after it are not held up by it."""
    times = recent(5)
    times[2] += 365 * 86400 * 10**9
    write_run(make_manifest("run"), np.ones((5, 4)), time_ns=times, close=True)
    pusher = push(taking.url, backfill=True)
    pusher.work()
    assert values(taking, "gradiometer_step_number") == [0, 1, 3, 4]
    assert pusher.count("rows_dropped_total", "future") == 1


def test_layers_come_from_the_lowest_rank(
    push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """What all ranks know alike is sent by one, what each has of its own by each."""
    for rank in (1, 3):
        write_run(make_manifest("run", rank=rank, world_size=4), np.ones((2, 4)), time_ns=recent(2), close=True)
    push(taking.url).work()
    ranks = {
        name: {dict(labels)["rank"] for labels in taking.taken if dict(labels)["__name__"] == name}
        for name in ("gradiometer_step_layer_grad_norm", "gradiometer_step_loss")
    }
    assert ranks == {"gradiometer_step_layer_grad_norm": {"1"}, "gradiometer_step_loss": {"1", "3"}}


def test_a_policy_that_is_taken_out_ends(
    push: Push, taking: Stub, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """Its series gets a staleness marker where the first step without it is; the policy after it begins there."""
    recorder = write_run(make_manifest("run"), np.empty((0, 4)))
    slots: list[tuple[Slot | None, ...]] = [(Slot(name="old"), None), (None, Slot(name="new"))]
    revisions = [
        Revision(revision=place, step=3 * place, time_ns=0, policy=None, slots=slot, source="attach")
        for place, slot in enumerate(slots)
    ]
    write_history(tmp_path / "run" / "rank-00000", History(revisions=tuple(revisions)))
    times = recent(5)
    for revision, chosen in ((0, times[:3]), (1, times[3:])):
        recorder.policies[:] = NAN
        recorder.policies[:, revision] = 1.0 + revision, 0.5
        append(recorder, np.ones((len(chosen), 4)), time_ns=chosen, policy_revision=revision)
    pusher = push(taking.url)
    pusher.work()
    found = {
        dict(labels)["policy"]: samples
        for labels, samples in taking.taken.items()
        if dict(labels)["__name__"] == "gradiometer_step_clip_threshold"
    }
    ms = [time_ns // 10**6 for time_ns in times]
    assert found["old"][:3] == [(time, 1.0) for time in ms[:3]]
    assert [(time, is_stale(value)) for time, value in found["old"][3:]] == [(ms[3], True)]
    assert found["new"] == [(ms[3], 2.0)]


def test_tls_is_verified(
    push: Push, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, wait_until: WaitUntil
) -> None:
    """A certificate of an authority that the settings name is believed, and no other."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusted = tmp_path.with_name(f"{tmp_path.name}-ca.pem")
    authority.cert_pem.write_to_path(str(trusted))
    write_run(make_manifest("run"), np.ones((3, 4)), time_ns=recent(3), close=True)
    with serve(lambda _: OK, context) as stub:
        stranger = push(stub.url)
        stranger.work()
        assert (stranger.count("up"), stub.requests) == (0, [])
        pusher = push(stub.url, name="db", ca_file=trusted)
        pusher.work()
        assert values(stub, "gradiometer_step_number") == [0, 1, 2]


def test_layers_that_are_chosen_and_the_budget(
    push: Push, taking: Stub, make_manifest: MakeManifest, write_run: WriteRun
) -> None:
    """A pattern chooses layers; what the budget or the labels do not allow is counted and told."""
    layers = [f"block.{place}" for place in range(100)] + ["head", "block.\u00e9" + "x" * MAX_VALUE_BYTES]
    write_run(make_manifest("run", layers=layers), np.ones((2, 102)), time_ns=recent(2), close=True)
    pusher = push(taking.url, layers=r"block\..*", series_budget=144)
    pusher.work()
    sent = [dict(labels)["layer"] for labels in taking.taken if "layer" in dict(labels)]
    assert sorted(sent) == sorted(layers[:100])
    assert pusher.count("samples_failed_total", "invalid") == 2
    (event,) = [event for event in pusher.context.store.events() if event.kind == "series_not_pushed"]
    assert "series_budget" in event.message
    push(taking.url, store=Store(None), name="other", layers="none").work()


@pytest.mark.parametrize(
    ("name", "labels"),
    [("0up", {}), ("up", {"a-b": "x"}), ("up", {"__x": "x"}), ("up", {"a": "\ud800"}), ("up", {"a": "x" * 3000})],
)
def test_labels_that_no_receiver_takes_as_they_are(name: str, labels: dict[str, str]) -> None:
    """They are refused here, where it can be said why."""
    with pytest.raises(LabelError):
        make_series(name, labels)
    with pytest.raises(LabelError, match="labels, receivers take"):
        make_series("up", {f"l{place}": "x" for place in range(40)})


def test_steps_of_one_millisecond() -> None:
    """They are moved to the next free one, by a second at most; what finds none is counted."""
    start = 1_000_000 * 10**6
    few = place(np.array([start, start + 1, start + 2]), 0)
    assert few.ms.tolist() == [1_000_000, 1_000_001, 1_000_002]
    many = place(start + np.arange(3000, dtype=np.int64) * 100, 0)
    assert many.kept.sum() == MAX_SHIFT_MS + 1
    assert many.dropped == {"same_millisecond": 3000 - MAX_SHIFT_MS - 1}
    assert (np.diff(many.ms[many.kept]) > 0).all()


def test_a_clock_that_is_set_back() -> None:
    """By little, rows are moved behind the newest; by more, they keep their time where the receiver takes it."""
    back = np.array([10**6 * 1_000_500, 10**6 * 900_000])
    refused = place(back, 1_001_000)
    assert (int(refused.ms[0]), refused.kept.tolist(), refused.dropped) == (
        1_001_001,
        [True, False],
        {"out_of_order": 1},
    )
    taken = place(back, 1_001_000, window_ms=200_000)
    assert (taken.ms.tolist(), taken.kept.tolist(), taken.newest) == ([1_001_001, 900_000], [True, True], 1_001_001)


def test_credentials_come_from_files_that_may_change(
    push: Push, taking: Stub, tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun, append: Append
) -> None:
    """Each request carries what the files hold then; none of it is in what the settings print."""
    secrets = tmp_path.with_name(f"{tmp_path.name}-secrets")
    secrets.mkdir()
    (secrets / "mounted").mkdir()
    for name in ("token", "key"):
        (secrets / "mounted" / name).write_text("first-secret\n")
        (secrets / name).symlink_to(f"mounted/{name}")  # as Kubernetes mounts them
    recorder = write_run(make_manifest("run"), np.ones((2, 4)), time_ns=recent(2))
    files = {"bearer_token_file": secrets / "token", "header_files": {"X-Key": secrets / "key"}, "tenant": "team"}
    pusher = push(taking.url, **files)
    pusher.work()
    (secrets / "token").write_text("second-secret")
    append(recorder, np.ones((1, 4)), time_ns=recent(3)[2:])
    pusher.work()
    first, last = taking.headers[0], taking.headers[-1]
    assert (first["Authorization"], last["Authorization"]) == ("Bearer first-secret", "Bearer second-secret")
    assert (last["X-Key"], last["X-Scope-OrgID"]) == ("first-secret", "team")
    assert last["X-Prometheus-Remote-Write-Version"] == "0.1.0"
    (secrets / "token").write_text("two\nlines")
    append(recorder, np.ones((1, 4)), time_ns=recent(4)[3:])
    pusher.work()
    assert pusher.count("up") == 0
    basic = push(taking.url, name="other", username="me", password_file=secrets / "key")
    basic.work()
    assert taking.headers[-1]["Authorization"] == "Basic " + base64.b64encode(b"me:first-secret").decode()


@pytest.mark.parametrize(
    ("receiver", "said"),
    [
        ({"url": "ftp://x"}, "expected a URL"),
        ({"url": "http://u:p@x/"}, "holds credentials"),
        ({"labels": {"rank": "1"}}, "label of gradiometer's own"),
        ({"labels": {"a-b": "1"}}, "cannot be a label"),
        ({"layers": "("}, "regular expression"),
        ({"username": "me"}, "need each other"),
        ({"url": "http://db.example/", "bearer_token_file": "token"}, "plain http"),
        ({"header_files": {"Host": "file"}}, "header"),
        ({"batch_samples": 1}, "expected a number from 100"),
        ({"name": "Not good"}, "name"),
    ],
)
def test_settings_that_cannot_be(tmp_path: Path, receiver: dict[str, Any], said: str) -> None:
    """Each is refused with its reason."""
    with pytest.raises(SettingsError, match=said):
        resolve(tmp_path, remote_write=[{"name": "db", "url": "http://127.0.0.1/"} | receiver])


def test_receivers_have_names_of_their_own(tmp_path: Path) -> None:
    """Two of one name would share their cursors."""
    one = {"name": "db", "url": "http://127.0.0.1/"}
    with pytest.raises(SettingsError, match="receivers of one name: db"):
        resolve(tmp_path, remote_write=[one, one])
