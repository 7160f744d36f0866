"""A scrape as a whole: what a client may ask for, sources that fail or hang, and what the monitor says of itself."""

from __future__ import annotations

import http.client
import signal
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gradiometer.tail import Sample
from gradiometer_monitor.config.settings import SettingsError, resolve
from gradiometer_monitor.exposition import exposition as module
from gradiometer_monitor.exposition.exposition import OPENMETRICS, TEXT, Exposition
from gradiometer_monitor.exposition.health import collectors
from gradiometer_monitor.exposition.layer_lines import LayerLines, LayerValues
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.services import Service
from gradiometer_monitor.web.accept import accepts_gzip, negotiate

if TYPE_CHECKING:
    from tests.conftest import MakeManifest, Start, WaitUntil, WriteRun

PARSERS: dict[str, Callable[[str], Iterable[Family]]] = {TEXT: parse_text, OPENMETRICS: parse_openmetrics}
PERSISTENT = "gradiometer_store_persistent"


@pytest.fixture
def runs(tmp_path: Path, make_manifest: MakeManifest, write_run: WriteRun) -> Iterator[Runs]:
    """Follow one small run."""
    write_run(make_manifest(), np.ones((3, 4)))
    followed = Runs(tmp_path, retention_seconds=1e12)
    followed.poll()
    yield followed
    followed.close()


@pytest.fixture
def exposition(runs: Runs) -> Exposition:
    """Expose the small run."""
    return Exposition(runs, series_budget=10_000)


def _samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    return {(s.name, tuple(s.labels.values())): s.value for family in parse_text(text) for s in family.samples}


def _scrape(exposition: Exposition) -> dict[tuple[str, tuple[str, ...]], float]:
    return _samples(exposition.render().decode())


def _good() -> Iterator[Sample]:
    yield PERSISTENT, (), 1


def _raises() -> Iterator[Sample]:
    yield PERSISTENT, (), 1
    raise ZeroDivisionError


def _unknown() -> Iterator[Sample]:
    yield PERSISTENT, (), 1
    yield "gradiometer_no_such_metric", (), 1


def _mislabelled() -> Iterator[Sample]:
    yield PERSISTENT, (), 1
    yield "gradiometer_gpu_up", ("0",), 1


@pytest.mark.parametrize("broken", [_raises, _unknown, _mislabelled])
def test_a_broken_collector_is_left_out_whole(
    exposition: Exposition, broken: Callable[[], Iterable[Sample]], caplog: pytest.LogCaptureFixture
) -> None:
    """What raises, or gives what the catalogue does not have, gives nothing; it is logged once, and then as well."""
    exposition.collect_from({"broken": broken, "healthy": lambda: [("gradiometer_service_healthy", ("a",), 1)]})
    found = [_scrape(exposition) for _ in range(2)][-1]
    assert found["gradiometer_collector_success", ("broken",)] == 0
    assert found["gradiometer_collector_success", ("healthy",)] == 1
    assert found["gradiometer_service_healthy", ("a",)] == 1
    assert found["gradiometer_steps_total", ("run",)] == 3
    assert (PERSISTENT, ()) not in found
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    exposition.collect_from({"broken": _good})
    assert _scrape(exposition)[PERSISTENT, ()] == 1


def test_a_hanging_collector_holds_up_nothing(
    exposition: Exposition, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    """It is waited for once, costs one thread however often it is scraped, and is asked again when it has answered."""
    monkeypatch.setattr(module, "COLLECT_SECONDS", 2.0)
    release, asked = threading.Event(), []

    def hang() -> Iterator[Sample]:
        asked.append(threading.current_thread())
        release.wait(120)
        yield PERSISTENT, (), 1

    exposition.collect_from({"hanging": hang, "healthy": lambda: [("gradiometer_service_healthy", ("a",), 1)]})
    for _ in range(3):
        found = _scrape(exposition)
        assert found["gradiometer_collector_success", ("hanging",)] == 0
        assert found["gradiometer_collector_seconds", ("hanging",)] > 0.1
        assert found["gradiometer_service_healthy", ("a",)] == 1
        assert found["gradiometer_steps_total", ("run",)] == 3
        assert (PERSISTENT, ()) not in found
    assert len(asked) == 1
    release.set()
    wait_until(lambda: not asked[0].is_alive())
    assert _scrape(exposition)[PERSISTENT, ()] == 1
    assert len(asked) == 2


def test_runs_that_cannot_be_had_lose_nothing_else(
    exposition: Exposition, runs: Runs, monkeypatch: pytest.MonkeyPatch, wait_until: WaitUntil
) -> None:
    """When a poll hangs with the lock, as on a dead file system, a scrape ends, and says which collector failed."""
    monkeypatch.setattr(module, "COLLECT_SECONDS", 2.0)
    exposition.watch("store", _good)
    with runs.snapshot():
        found = _scrape(exposition)
    assert found["gradiometer_collector_success", ("runs",)] == 0
    assert found[PERSISTENT, ()] == 1
    assert ("gradiometer_steps_total", ("run",)) not in found
    monkeypatch.undo()
    wait_until(lambda: ("gradiometer_steps_total", ("run",)) in _scrape(exposition))


def test_text_is_made_without_the_lock(exposition: Exposition, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a scrape writes the lines of layers, a poll can go on."""
    render, polled = LayerLines.render, []

    def poll_meanwhile(lines: LayerLines, values: LayerValues) -> Iterator[tuple[str, str]]:
        thread = threading.Thread(target=runs.poll, daemon=True)
        thread.start()
        thread.join(60)
        polled.append(not thread.is_alive())
        return render(lines, values)

    monkeypatch.setattr(LayerLines, "render", poll_meanwhile)
    assert ("gradiometer_layer_grad_norm_last", ("run", "embed")) in _scrape(exposition)
    assert polled == [True]


@pytest.mark.parametrize("content_type", [TEXT, OPENMETRICS])
def test_labels_that_no_utf8_holds_stay_apart(exposition: Exposition, content_type: str) -> None:
    """Lone surrogates, as from a name that was no UTF-8, are written as escapes; what is long stays whole."""
    names = ["\udcff", "\udcfe", '\N{LATIN SMALL LETTER E WITH ACUTE}\n"\\', "x" * 10_000]
    exposition.collect_from({"odd": lambda: [("gradiometer_service_healthy", (name,), 1) for name in names]})
    families = PARSERS[content_type](exposition.render(content_type).decode())
    found = [s.labels["service"] for f in families for s in f.samples if s.name == "gradiometer_service_healthy"]
    assert found == ["\\udcff", "\\udcfe", *names[2:]]


class _Ailing(Service):
    """A service whose rounds fail."""

    name = "ailing"

    def work(self) -> float:
        raise OSError(5, "Input/output error")

    def samples(self) -> Iterable[Sample]:
        return _good()


def test_health_of_services_is_told(exposition: Exposition, wait_until: WaitUntil) -> None:
    """Each service has its samples, failures and health; two of one name are told together."""
    services = [_Ailing(), _Ailing()]
    exposition.collect_from(collectors(services[:1]))
    assert _scrape(exposition)["gradiometer_service_failures_total", ("ailing",)] == 0
    services[0].start()
    wait_until(lambda: services[0].failures)
    services[0].stop()
    found = _scrape(exposition)
    assert found["gradiometer_service_failures_total", ("ailing",)] == services[0].failures
    assert found["gradiometer_service_healthy", ("ailing",)] == 0
    assert found[PERSISTENT, ()] == 1
    exposition.collect_from(collectors(services))
    assert _scrape(exposition)["gradiometer_service_healthy", ("ailing",)] == 0


def test_the_monitor_tells_of_itself(start: Start) -> None:
    """Scrapes, requests by route and code, the store and the services of a daemon are in its own metrics."""
    monitor = start()
    statuses = [monitor.get(path)[0] for path in ("/metrics", "/api/v1/runs", "/no/such", "/metrics?x=1")]
    assert statuses == [200, 200, 404, 200]
    assert monitor.get("/metrics", Host="evil.example")[0] == 400
    found = monitor.samples()
    requests = {labels: value for (name, labels), value in found.items() if name == "gradiometer_http_requests_total"}
    expected = {("/metrics", "200"): 2, ("/api/v1/runs", "200"): 1, ("other", "404"): 1, ("other", "400"): 1}
    assert {labels: requests[labels] for labels in expected} == expected
    assert found["gradiometer_scrape_seconds_count", ()] == 2
    assert found["gradiometer_scrape_size_bytes", ()] > 1000
    assert found[PERSISTENT, ()] == 1
    assert found["gradiometer_service_healthy", ("gpu",)] == 1
    assert found["gradiometer_collector_success", ("gpu",)] == 1


def test_the_budget_of_all_runs_is_a_setting(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon keeps ``total_series``, from the environment too, and refuses what is out of its range."""
    write_run(make_manifest(layers=[f"layer{place}" for place in range(300)]), np.ones((2, 300)))
    monkeypatch.setenv("GRADIOMETER_MONITOR_TOTAL_SERIES", "200")
    found = start().samples()
    assert found["gradiometer_series_omitted", ("run",)] > 0
    assert sum(labels[:1] == ("run",) for _, labels in found) <= 200
    monkeypatch.setenv("GRADIOMETER_MONITOR_TOTAL_SERIES", "1")
    with pytest.raises(SettingsError, match=r"GRADIOMETER_MONITOR_TOTAL_SERIES.*'1': expected a number from 100"):
        resolve()


def test_a_reload_changes_budgets_and_forgets_no_request(
    start: Start,
    make_manifest: MakeManifest,
    write_run: WriteRun,
    wait_until: WaitUntil,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """After SIGHUP scrapes keep to the new budget, and counters go on from where they were."""
    write_run(make_manifest(layers=[f"layer{place}" for place in range(300)]), np.ones((2, 300)))
    config = tmp_path_factory.mktemp("config") / "monitor.yaml"
    config.write_text("total_series: 100000")
    monitor = start("--config", str(config))
    assert monitor.samples()["gradiometer_series_omitted", ("run",)] == 0
    config.write_text("total_series: 200\ngpu: {enabled: false}")
    monitor.process.send_signal(signal.SIGHUP)
    found = wait_until(lambda: (s := monitor.samples())["gradiometer_series_omitted", ("run",)] and s)
    assert found["gradiometer_http_requests_total", ("/metrics", "200")] >= 1
    assert found["gradiometer_http_requests_total", ("/-/ready", "200")] >= 1
    wait_until(lambda: ("gradiometer_service_healthy", ("gpu",)) not in monitor.samples())  # the last of a reload


def test_headers_in_several_lines_count(start: Start) -> None:
    """Every line of a header is read, and the body is what the answer's headers say."""
    monitor = start()
    connection = http.client.HTTPConnection(monitor.url.removeprefix("http://"), timeout=60)
    connection.putrequest("GET", "/metrics", skip_accept_encoding=True)
    lines = [("Accept", "text/plain;q=0.5"), ("Accept", PROMETHEUS_3)]
    for name, value in [*lines, ("Accept-Encoding", "br"), ("Accept-Encoding", "gzip")]:
        connection.putheader(name, value)
    connection.endheaders()
    with closing(connection), connection.getresponse() as response:
        body = response.read()
        assert response.headers["content-type"] == OPENMETRICS
        assert response.headers["content-encoding"] == "gzip"
        assert response.headers["vary"] == "accept, accept-encoding"
    assert zlib.decompressobj(31).decompress(body).endswith(b"# EOF\n"), "one member, as not every reader takes more"


PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", TEXT),
        ("*/*", TEXT),
        ("application/*", OPENMETRICS),
        ("text/*, application/*;q=0.9", TEXT),
        ("text/html,application/xhtml+xml;q=0.9,*/*;q=0.8", TEXT),
        ("application/openmetrics-text", OPENMETRICS),
        ("application/openmetrics-text, */*", OPENMETRICS),
        ("application/openmetrics-text, text/plain", TEXT),
        ("*/*, application/openmetrics-text;q=0.5", TEXT),
        ("*/*;q=0.1, application/openmetrics-text;q=0", TEXT),
        ("text/plain;version=1.0.0, application/openmetrics-text;q=0.1", OPENMETRICS),
        (
            "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
            "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
            OPENMETRICS,
        ),
        (PROMETHEUS_3, OPENMETRICS),
        ("text/plain;version=0.0.4;q=0.5,*/*;q=0.1", TEXT),
        ('Application/OpenMetrics-Text; Version="1.0.0"; Q=0.9, text/plain; q=0.8', OPENMETRICS),
        ("application/openmetrics-text; version=1.0.0; q=0.4, text/plain; q=0.6", TEXT),
        ("application/openmetrics-text;version=2.0.0", TEXT),
        ("application/openmetrics-text;q=what, text/plain;q=0", TEXT),
        ("application/openmetrics-text;q=nan", TEXT),
        ("application/openmetrics-text;q=-1, text/plain;q=0.1", TEXT),
        ("image/png", TEXT),
        (";;,=,;q", TEXT),
    ],
)
def test_content_negotiation(accept: str, content_type: str) -> None:
    """OpenMetrics is served to who prefers it, plain text to everyone else."""
    assert negotiate(accept) == content_type


@pytest.mark.parametrize(
    ("accept_encoding", "accepted"),
    [
        ("", False),
        ("gzip", True),
        ("GZIP;q=0.5", True),
        ("deflate, gzip;q=1.0, *;q=0.5", True),
        ("br, zstd", False),
        ("*", True),
        ("x-gzip", True),
        ("gzip;q=0", False),
        ("gzip;q=0.000", False),
        ("*, gzip;q=0", False),
        ("gzip;q=0.2, identity;q=0.8", False),
        ("gzip;q=x", False),
    ],
)
def test_gzip_is_sent_to_who_takes_it(accept_encoding: str, accepted: bool) -> None:
    """A weight of 0 refuses, and the bare body may be preferred."""
    assert accepts_gzip(accept_encoding) is accepted
