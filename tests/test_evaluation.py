"""What Grafana makes of a dashboard's queries, by literal values that its source and documentation give."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from gradiometer_dashboards import evaluation, interpolation
from gradiometer_dashboards.evaluation import Prometheus, QueryError, Resolution, View

Json = dict[str, Any]
HOUR, DAY = 3_600_000.0, 86_400_000.0
NOON = 1_700_049_600.0


def _variable(name: str, query: str, **more: Any) -> Json:
    return {"name": name, "type": "query", "query": query, "sort": 1} | more


MANY: Json = {"multi": True, "includeAll": True, "allValue": ".+"}
VARIABLES = [
    {"name": "datasource", "type": "datasource", "query": "prometheus", "current": {"value": "main"}},
    _variable("job", "label_values(gradiometer_run_info, job)", **MANY),
    _variable("run_id", 'label_values(gradiometer_run_info{job=~"$job"}, run_id)', sort=2),
    _variable("rank", 'label_values(up{run_id="$run_id"}, rank)', sort=3, **MANY),
]
PANEL: Json = {"id": 1, "type": "timeseries", "title": "Norm", "gridPos": {"w": 12}}
TARGET: Json = {"refId": "A", "expr": "up", "range": True}


class Stub:
    """A Prometheus that gives the same answer to every query, knows values of labels, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.result: list[Json] = []
        self.labels = {"job": ["a"], "run_id": ["2026-01", "2026-02"], "rank": ["10", "9", "0"]}
        self.url = ""

    def answer(self, path: str) -> Json:
        kind = path.removeprefix("/api/v1/")
        if kind.startswith("label/"):
            return {"status": "success", "data": self.labels[kind.split("/")[1]]}
        shape = "matrix" if kind == "query_range" else "vector"
        return {"status": "success", "data": {"resultType": shape, "result": self.result}}

    @property
    def newest(self) -> dict[str, str]:
        return self.asked[-1][2]


@pytest.fixture
def stub() -> Iterator[Stub]:
    """Serve a stub on loopback."""
    made = Stub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._do("GET", self.path.partition("?")[2])

        def do_POST(self) -> None:
            self._do("POST", self.rfile.read(int(self.headers["Content-Length"])).decode())

        def _do(self, method: str, parameters: str) -> None:
            path = self.path.partition("?")[0]
            made.asked.append((method, path, dict(urllib.parse.parse_qsl(parameters))))
            bad = made.newest.get("query") == "bad"
            body = json.dumps({"status": "error", "error": "no"} if bad else made.answer(path)).encode()
            self.send_response(400 if bad else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


def _view(stub: Stub, *panels: Json, **more: Any) -> View:
    dashboard = {"panels": list(panels), "templating": {"list": VARIABLES}} | more.pop("board", {})
    settings: Json = {"start": NOON - 3600, "end": NOON} | more
    return View(dashboard=dashboard, prometheus=Prometheus(url=stub.url), **settings)


def _with(*targets: Json, **more: Any) -> Json:
    return {**PANEL, "targets": list(targets), **more}


@pytest.mark.parametrize(
    ("milliseconds", "rounded"),
    [
        (9, 1), (10, 10), (1499, 1000), (1500, 2000), (3750, 5000), (12_500, 15_000), (17_499, 15_000),
        (60_000, 60_000), (90_000, 120_000), (120_000, 120_000), (1_500_000, 1_800_000), (86_400_000, 86_400_000),
        (604_800_000, 604_800_000), (2_000_000_000, 2_592_000_000), (4e9, 31_536_000_000),
    ],
)  # fmt: skip
def test_round_interval(milliseconds: float, rounded: int) -> None:
    """What a range and a width come to is rounded by Grafana's table."""
    assert interpolation.round_interval(milliseconds) == rounded


@pytest.mark.parametrize(
    ("milliseconds", "points", "scrape", "target", "step", "rate"),
    [
        pytest.param(HOUR, 720, 15, {}, 15, 60, id="an hour: the scrape interval"),
        pytest.param(6 * HOUR, 720, 15, {}, 30, 60, id="six hours"),
        pytest.param(DAY, 720, 15, {}, 120, 135, id="a day: a step and a scrape"),
        pytest.param(DAY, 240, 15, {}, 300, 315, id="a day in few columns"),
        pytest.param(HOUR, 720, 5, {}, 5, 20, id="scraped often"),
        pytest.param(HOUR, 720, 60, {}, 60, 240, id="scraped seldom"),
        pytest.param(HOUR, 720, 15, {"interval": "1m"}, 60, 240, id="a target's min step is its scrape interval too"),
        pytest.param(DAY, 720, 15, {"interval": "1m"}, 120, 240, id="a min step below the step"),
        pytest.param(DAY, 720, 15, {"interval": "$__rate_interval"}, 135, 135, id="step of the rate"),
        pytest.param(HOUR, 720, 15, {"intervalFactor": 2}, 30, 60, id="a factor, which the rate does not see"),
        pytest.param(30 * DAY, 10**6, 15, {}, 300, 60, id="never more than 11 000 points"),
        pytest.param(19_000.0 * 720, 720, 17, {}, 20, 68, id="a scrape interval that is not round"),
    ],
)
def test_resolution(milliseconds: float, points: int, scrape: float, target: Json, step: float, rate: float) -> None:
    """``$__interval`` and ``$__rate_interval`` follow range, width, the scrape interval and the target's minimum."""
    found = Resolution.of(milliseconds, points, scrape=scrape, target=target)
    assert (found.step, found.rate) == (step, rate)


def test_min_interval_of_a_panel() -> None:
    """A panel's own minimum replaces that of the data source, for the step, and not for the rate."""
    found = Resolution.of(HOUR, 720, scrape=15, panel_minimum="2m", target={})
    assert (found.step, found.rate) == (120, 135)


@pytest.mark.parametrize(
    ("seconds", "interval", "rate"),
    [
        (0.2, "200ms", "200ms"), (1.5, "1s", "1.5s"), (15, "15s", "15s"), (60, "1m", "1m0s"), (75, "1m", "1m15s"),
        (315, "5m", "5m15s"), (7215, "2h", "2h0m15s"), (86_400, "1d", "24h0m0s"), (604_800, "7d", "168h0m0s"),
    ],
)  # fmt: skip
def test_text_of_spans(seconds: float, interval: str, rate: str) -> None:
    """``$__interval`` is cut to whole units, ``$__rate_interval`` is written as Go does."""
    assert (interpolation.span(seconds), interpolation.go_duration(seconds)) == (interval, rate)


def test_seconds_of() -> None:
    """Spans are read with and without a unit; what is none is named."""
    assert [interpolation.seconds_of(text) for text in ("30", "15s", "1m30s", "500ms", "2h")] == [30, 15, 90, 0.5, 7200]
    with pytest.raises(ValueError, match="'soon' is no span"):
        interpolation.seconds_of("soon")


@pytest.mark.parametrize(
    ("values", "many", "written"),
    [
        (("a.b",), False, "a.b"),
        (("a\\b",), False, r"a\\b"),
        (("it's",), False, r"it\\'s"),
        (("blocks.0",), True, r"blocks\\.0"),
        (("h1:9477", "h2.example:9477"), True, r"(h1:9477|h2\\.example:9477)"),
        (("a/b", "c+d"), True, r"(a/b|c\\+d)"),
        (("a\\b",), True, r"a\\\\b"),
        ((), False, ""),
    ],
)
def test_values_in_promql(values: tuple[str, ...], many: bool, written: str) -> None:
    """One value is escaped for a string, those of a variable that may have many for a regular expression within it."""
    assert interpolation.formatted(values, many=many) == written


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        (0, ["b10", "a2", "B1", "b9", "c"]), (1, ["B1", "a2", "b10", "b9", "c"]), (2, ["c", "b9", "b10", "a2", "B1"]),
        (3, ["c", "B1", "a2", "b9", "b10"]), (4, ["b10", "b9", "a2", "B1", "c"]), (5, ["a2", "B1", "b10", "b9", "c"]),
        (6, ["c", "b9", "b10", "B1", "a2"]), (7, ["a2", "B1", "b9", "b10", "c"]), (8, ["c", "b10", "b9", "B1", "a2"]),
    ],
)  # fmt: skip
def test_order_of_choices(sort: int, order: list[str]) -> None:
    """As it comes, alphabetical, by the first number, without case, natural; each also descending."""
    assert interpolation.ordered(["b10", "a2", "B1", "b9", "c", "a2"], sort) == order


@pytest.mark.parametrize(
    ("form", "labels", "name"),
    [
        ("rank {{ rank }}", {"rank": "3"}, "rank 3"), ("{{gone}}x", {"rank": "3"}, "x"), ("steps", {}, "steps"),
        ("", {"__name__": "up", "job": "a", "b": "c"}, 'up{b="c", job="a"}'), ("", {"job": "a"}, '{job="a"}'),
        ("", {}, "max(up)"), ("__auto", {}, "max(up)"), ("__auto", {"rank": "3"}, ""),
    ],
)  # fmt: skip
def test_legend(form: str, labels: dict[str, str], name: str) -> None:
    """A legend is a template; without one it is the series' labels, or the query where it has none."""
    assert interpolation.legend(form, labels, "max(up)") == name


def test_automatic_legend() -> None:
    """With ``__auto`` a single label's value is the name, several labels are all told."""
    assert interpolation.named_by_labels([{"rank": "0"}, {"rank": "1"}]) == ["0", "1"]
    assert interpolation.named_by_labels([{"rank": "0", "b": "c"}]) == ['{b="c", rank="0"}']


def test_variables_by_default(stub: Stub) -> None:
    """*All* is its own value, a single choice the first offered; a variable sees those before it."""
    assert _view(stub).variables == {"datasource": "main", "job": ".+", "run_id": "2026-02", "rank": ".+"}
    method, path, asked = stub.asked[0]
    assert (method, path) == ("GET", "/api/v1/label/run_id/values")
    assert asked == {"match[]": 'gradiometer_run_info{job=~".+"}', "start": "1700046000", "end": "1700049600"}


def test_variables_chosen(stub: Stub) -> None:
    """What is chosen stands in the query, several as an alternation."""
    view = _view(stub, chosen={"job": "a.b", "run_id": "x", "rank": ("0", "1")})
    assert view.variables == {"datasource": "main", "job": r"a\\.b", "run_id": "x", "rank": "(0|1)"}
    assert view.options("rank") == ["0", "9", "10"]


def test_stored_choice(stub: Stub) -> None:
    """A choice that the dashboard has stored is kept while there is such a value."""
    kept, gone = (_variable("run_id", "label_values(run_id)", current={"value": v}) for v in ("2026-02", "2025"))
    assert [_view(stub, board={"templating": {"list": [each]}}).variables for each in (kept, gone)] == [
        {"run_id": "2026-02"},
        {"run_id": "2026-01"},
    ]
    assert "match[]" not in stub.newest


def test_all_without_its_own_value(stub: Stub) -> None:
    """Without an ``allValue``, *All* lists the values."""
    ranks = _variable("rank", "label_values(rank)", includeAll=True)
    assert _view(stub, board={"templating": {"list": [ranks]}}).variables == {"rank": "(0|10|9)"}


def test_range_query(stub: Stub) -> None:
    """A range is asked in steps that begin at whole steps, with spans as texts; unknown variables stay."""
    expr = 'max_over_time(x{run_id="$run_id"}[$__interval]) + rate(y[${__rate_interval}]) + $__range_s + $nothing'
    view = _view(stub, _with({**TARGET, "expr": expr}), start=NOON - DAY / 1000 - 7, end=NOON - 7)
    (answer,) = view.answers(view.panels[0])
    filled = 'max_over_time(x{run_id="2026-02"}[2m]) + rate(y[2m15s]) + 86400 + $nothing'
    assert answer.expr == filled
    assert not answer.instant
    assert stub.asked[-1][:2] == ("POST", "/api/v1/query_range")
    assert stub.newest == {"query": filled, "start": "1699963080.000", "end": "1700049480.000", "step": "120.000"}


def test_range_is_aligned_to_the_clock_of_whoever_looks(stub: Stub) -> None:
    """Steps of half a day begin at the local midnight."""
    view = _view(stub, _with({**TARGET, "interval": "12h"}), start=NOON - 4 * 86_400, end=NOON, utc_offset=19_800)
    view.answers(view.panels[0])
    assert (stub.newest["step"], stub.newest["end"]) == ("43200.000", "1700029800.000")  # 12:00 in India


def test_instant_query(stub: Stub) -> None:
    """An instant is asked at the end of the range as it is; a target of both kinds is asked twice."""
    stub.result = [{"metric": {"rank": "1"}, "value": [NOON, "+Inf"], "values": [[NOON, "NaN"]]}]
    view = _view(stub, _with({**TARGET, "instant": True, "legendFormat": "r{{rank}}"}), end=NOON + 0.5)
    both = view.answers(view.panels[0])
    assert [(answer.instant, answer.series[0].legend) for answer in both] == [(False, "r1"), (True, "r1")]
    assert stub.newest["time"] == "1700049600.500"


def test_hidden_targets_are_not_asked(stub: Stub) -> None:
    """A hidden target is not asked; one that says neither range nor instant is a range."""
    view = _view(stub, _with({"refId": "A", "expr": "up"}, {**TARGET, "refId": "B", "hide": True}))
    assert [(a.ref_id, a.instant) for a in view.answers(view.panels[0])] == [("A", False)]


def test_panels_of_collapsed_rows(stub: Stub) -> None:
    """Panels that a collapsed row hides are panels; texts and rows are none."""
    hidden = {"type": "row", "collapsed": True, "panels": [_with(TARGET, title="within")]}
    view = _view(stub, {"type": "row", "panels": []}, {"type": "text"}, hidden, _with(TARGET))
    assert [panel["title"] for panel in view.panels] == ["within", "Norm"]


def test_repeated_panels(stub: Stub) -> None:
    """A repeated panel is one for each value, the variable escaped; *All* is each value and not its own."""
    panel = _with({**TARGET, "expr": 'x{rank=~"$rank", job=~"$job"}'}, title="Rank $rank", repeat="rank")
    view = _view(stub, panel)
    assert [each["title"] for each in view.panels] == ["Rank 0", "Rank 9", "Rank 10"]
    assert view.answers(view.panels[1])[0].expr == 'x{rank=~"9", job=~".+"}'
    assert len(_view(stub, panel, chosen={"rank": ("9", "10")}).panels) == 2


def test_annotations(stub: Stub) -> None:
    """An annotation's query is asked a point a minute, or a hundredth of the range; those switched off are not."""
    listed = [
        {"name": "Alerts", "expr": 'ALERTS{run_id="$run_id"}', "enable": True},
        {"name": "off", "expr": "up", "enable": False},
        {"name": "Incidents", "target": {"type": "tags"}, "enable": True},
    ]
    board = {"annotations": {"list": listed}}
    assert list(_view(stub, board=board).annotations()) == ["Alerts"]
    assert (stub.newest["query"], stub.newest["step"]) == ('ALERTS{run_id="2026-02"}', "60.000")
    _view(stub, board=board, start=NOON - 86_400).annotations()
    assert stub.newest["step"] == "900.000"


def test_links(stub: Stub) -> None:
    """A link hands over variables as the address has them, the time range, and what the row says."""
    url = (
        "/d/x?${__url_time_range}&${rank:queryparam}&${job:queryparam}&var-run_id=${__data.fields.run_id:percentencode}"
    )
    view = _view(stub, chosen={"rank": ("0", "1 a")})
    assert view.link(url, {"run_id": "a&b"}) == (
        "/d/x?from=1700046000000&to=1700049600000&var-rank=0&var-rank=1%20a&var-job=$__all&var-run_id=a%26b"
    )
    assert view.link('${__data.fields["run id"]} ${__field.labels.rank}', {"run id": "r", "rank": "0"}) == "r 0"


def test_a_refusal_says_what_was_asked(stub: Stub) -> None:
    """A query that Prometheus refuses, or nobody to ask, is an error that names it."""
    view = _view(stub, _with({**TARGET, "expr": "bad"}))
    with pytest.raises(QueryError, match=r"query_range.*bad.*400.*no"):
        view.answers(view.panels[0])
    with pytest.raises(QueryError, match="does not answer query"):
        Prometheus(url="http://127.0.0.1:1", timeout_seconds=1).ask("query", query="up")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"timeFrom": "2h"}, "'Norm' has a time range of its own"),
        ({"type": "row", "repeat": "rank"}, "row 'Norm' repeats"),
    ],
)
def test_what_is_not_evaluated_is_refused(change: Json, said: str, stub: Stub) -> None:
    """What Grafana would do and this does not is an error, not another answer."""
    view = _view(stub, _with(TARGET, **change))
    with pytest.raises(ValueError, match=said):
        view.answers(view.panels[0])


def test_variables_that_are_not_evaluated_are_refused(stub: Stub) -> None:
    """A variable with a regex, or that asks something else, is named."""
    for query, more, said in (("label_values(x)", {"regex": "/a/"}, "'v' has a regex"), ("metrics(x)", {}, "expected")):
        with pytest.raises(ValueError, match=said):
            _ = _view(stub, board={"templating": {"list": [_variable("v", query, **more)]}}).variables


WRONG = {
    "a page of a login": b"<!doctype html><title>Sign in</title>",
    "no object": b"[1, 2]",
    "no data": b'{"status": "success"}',
    "no result": b'{"data": {"resultType": "matrix"}}',
    "another shape": b'{"data": {"resultType": "matrix", "result": [{"metric": {}, "values": [1, 2]}]}}',
    "a word for a value": b'{"data": {"resultType": "matrix", "result": [{"metric": {}, "values": [[1, "x"]]}]}}',
    "no time": b'{"data": {"resultType": "matrix", "result": [{"metric": {}, "values": [[NaN, "1"]]}]}}',
    "a native histogram": b'{"data": {"resultType": "matrix", "result": [{"metric": {}, "histograms": []}]}}',
    "no text": b"\xff\xfe",
    "brackets without end": b"[" * 200_000,
}


@contextlib.contextmanager
def _serving(head: str, body: bytes, *, endless: bool = False) -> Iterator[str]:
    """Answer whoever asks with some bytes, or with them over and over until he goes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            with contextlib.suppress(OSError):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))  # what is left unread resets the connection
                self.wfile.write(f"{head}\r\n\r\n".encode() + body)
                while endless:
                    self.wfile.write(body)
                    time.sleep(0.01)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("body", WRONG.values(), ids=list(WRONG))
def test_what_is_no_prometheus_is_said_to_be_none(body: bytes) -> None:
    """An answer of another form is an error of the query, whatever it holds."""
    with _serving("HTTP/1.0 200 OK", body) as url:
        view = View(
            dashboard={"panels": [], "templating": {"list": []}}, prometheus=Prometheus(url=url), start=0, end=9
        )
        with pytest.raises(QueryError, match=r"as no Prometheus does|not of Prometheus' form"):
            view.answers(_with(TARGET))


def test_a_series_without_points_is_none(stub: Stub) -> None:
    """A series of nothing, which Prometheus does not give, is left out: nobody who draws need think of it."""
    stub.result = [{"metric": {"rank": "0"}, "values": []}, {"metric": {"rank": "1"}, "values": [[NOON, "1"]]}]
    panel = _with({**TARGET, "legendFormat": "__auto"})
    (answer,) = _view(stub, panel).answers(panel)
    assert [series.legend for series in answer.series] == ["1"]


def test_values_of_a_variable_are_texts(stub: Stub) -> None:
    """A list of something else is an error of the query."""
    stub.labels["job"] = [1]  # type: ignore[list-item]  # that is the error
    with pytest.raises(QueryError, match=r"label_values\(gradiometer_run_info, job\): .* no list of texts"):
        _view(stub).options("job")


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("HTTP/1.0 200 OK\r\nContent-Length: 100", "answers query_range as no Prometheus does"),
        ("SSH-2.0-OpenSSH", "does not answer query_range: SSH-2.0-OpenSSH"),
        ("HTTP/1.0 502 Bad Gateway\r\nContent-Length: 100", "502"),
        ("HTTP/1.0 302 Found\r\nLocation: file:///etc/passwd", "302"),
    ],
)
def test_what_breaks_off_is_an_error_of_the_query(head: str, said: str) -> None:
    """An answer that is cut short, of another protocol, or that leads away from HTTP."""
    with _serving(head, b"x") as url, pytest.raises(QueryError, match=said):
        Prometheus(url=url).ask("query_range", query="up")


def test_an_answer_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that goes on for ever is given up by its time, one that is too large by its size."""
    with _serving("HTTP/1.0 200 OK", b" " * 100, endless=True) as url:
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, "time", SimpleNamespace(monotonic=count(0.0, 9.0).__next__))
            with pytest.raises(QueryError, match="has not ended after 20 s"):
                Prometheus(url=url, timeout_seconds=20.0).ask("query", query="up")
        monkeypatch.setattr(evaluation, "MAX_BYTES", 500)
        with pytest.raises(QueryError, match="it has more than 500 bytes"):
            Prometheus(url=url).ask("query", query="up")
