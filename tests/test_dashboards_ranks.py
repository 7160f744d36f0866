"""The *Ranks* dashboard before a real Prometheus: of three ranks, of one, and of 1600 on 200 hosts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gradiometer.recorder import Recorder
from gradiometer.records import Flag
from gradiometer_dashboards import load
from gradiometer_dashboards.evaluation import Answer, Prometheus, QueryError, View
from gradiometer_dashboards.queries.ranks import IN_GRAPH, IN_MAP
from tests._ports import free_ports

if TYPE_CHECKING:
    from tests._monitor import Monitor
    from tests.conftest import Append, MakeManifest, Spawn, WaitUntil

pytestmark = pytest.mark.native
FINE, BAD = int(Flag.HOOKED | Flag.OWN_WATCHED), int(Flag.HOOKED | Flag.OWN_WATCHED | Flag.OWN_NONFINITE)
HOSTS, RANKS_A_HOST = 200, 8
"""Of the large run."""
Ask = Callable[..., list[Answer]]
Scraped = tuple[Prometheus, float]
"""A Prometheus, and the instant at which it is asked."""
SETTLED = (
    'gradiometer_rank_nonfinite_total{run_id="three"} offset 1500ms == 4',
    'count(gradiometer_rank_steps_behind{run_id="three"}) == 3',
    'gradiometer_steps_total{run_id="single"}',
    'count(count_over_time(gradiometer_rank_lag_seconds{run_id="large"}[1m] offset 1500ms) > 1) == 1600',
    'count(gradiometer_rank_lag_seconds{run_id="large"}) == 1600',
)


NOW = "the time"
"""In the place of the time of a scrape, in what was written once: a scrape must be answered in half a second."""


@cache
def _large_run() -> str:
    """Write what the monitors of all hosts would say: rank 777 differs, host 5 has another baseline, 1599 is behind."""
    lines = []

    def add(name: str, value: float | str, host: int, **labels: Any) -> None:
        pairs = {"run_id": "large", "instance": f"host{host}:9477"} | labels
        text = ",".join(f'{label}="{each}"' for label, each in pairs.items())
        lines.append(f"gradiometer_{name}{{{text}}} {value}\n")

    for host in range(HOSTS):
        add("run_info", 1, host, world_size=HOSTS * RANKS_A_HOST)
        add("grad_norm_baseline", 2.0 if host == 5 else 1.0, host)
        add("steps_total", 90 if host == 6 else 100, host)
        for name in ("nonfinite_steps", "skipped_steps", "nonfinite_updates", "rows_dropped"):
            add(f"{name}_total", 0, host)
        for rank in range(host * RANKS_A_HOST, (host + 1) * RANKS_A_HOST):
            add("last_step_timestamp_seconds", NOW, host, rank=rank)
            add("grad_norm_last", 1.0, host, rank=rank)
            add("rank_microbatch_norm_last", 1.0 + rank / 1000, host, rank=rank)
            add("rank_nonfinite_total", 0, host, rank=rank)
            add("rank_norm_deviation", 0.5 if rank == 777 else 0.0, host, rank=rank)
            add("rank_steps_behind", 7 if rank == 1599 else 0, host, rank=rank)
            add("rank_lag_seconds", rank / 1e4, host, rank=rank)
    return "".join(lines)


class _Exporter(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = _large_run().replace(NOW, repr(time.time())).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing of requests."""


@pytest.fixture(scope="module")
def large() -> Iterator[str]:
    """Serve the large run, and give the address."""
    _large_run()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Exporter)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


class _Written:
    """Runs of this process: one of three ranks, and one of one."""

    def __init__(self, root: Path, make_manifest: MakeManifest, append: Append) -> None:
        self._append = append
        several: dict[str, Any] = {"world_size": 3, "created_ns": time.time_ns(), "layers": ("a",)}
        self.ranks = [Recorder(root, make_manifest("three", rank=rank, **several)) for rank in range(3)]
        self.single = Recorder(root, make_manifest("single", layers=("a",)))
        self._began = time.time_ns()

    def write(self, rank: Recorder, norms: list[float], flags: int = FINE, late: float = 0.0) -> None:
        """Append a row a norm, a hundredth of a second apart."""
        steps = [rank.status.steps + place for place in range(len(norms))]
        times = [self._began + step * 10**7 + int(late * 1e9) for step in steps]
        self._append(rank, [[norm] for norm in norms], flags=flags, time_ns=times)

    def close(self) -> None:
        for recorder in (*self.ranks, self.single):
            recorder.close()


@pytest.fixture(scope="module")
def prometheus(
    shared_start: Callable[..., Monitor],
    shared_spawn: Spawn,
    native_binary: Callable[[str], str],
    make_manifest: MakeManifest,
    append: Append,
    wait_until: WaitUntil,
    large: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Scraped]:
    """Scrape a monitor and the large run until both were seen, then let ranks of the small run go apart."""
    binary, root, own = native_binary("prometheus"), tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("own")
    written = _Written(root, make_manifest, append)
    for place, rank in enumerate(written.ranks):
        written.write(rank, [1.0] * 10, late=0.25 * place)
    written.write(written.single, [1.0] * 10)
    monitor = shared_start(root=root)
    jobs = [
        {"job_name": name, "honor_labels": name == "large", "static_configs": [{"targets": [target]}]}
        for name, target in (("gradiometer", monitor.url.removeprefix("http://")), ("large", large))
    ]
    (own / "p.yml").write_text(json.dumps({"global": {"scrape_interval": "500ms"}, "scrape_configs": jobs}))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    options = (f"--config.file={own / 'p.yml'}", f"--storage.tsdb.path={own / 'tsdb'}")
    with (own / "log").open("w") as log:
        shared_spawn(binary, *options, f"--web.listen-address={address}", stderr=log)
    found = Prometheus(url=f"http://{address}")

    def known(query: str, at: float | None = None) -> bool:
        try:
            return bool(found.ask("query", query=query, time=f"{at or time.time():.3f}")["result"])
        except QueryError:
            return False

    def settled() -> float:
        """Return an instant at which both runs were scraped, and all scrapes before it are over; 0 for none."""
        at = time.time() - 1.5
        return at if all(known(query, at) for query in SETTLED) else 0.0

    wait_until(lambda: known('gradiometer_rank_nonfinite_total{run_id="three"}'))
    written.write(written.ranks[0], [1.0] * 4)
    written.write(written.ranks[1], [2.0] * 4, BAD, late=0.25)
    written.write(written.ranks[2], [1.0], late=0.5)
    yield found, wait_until(settled, 120)
    written.close()


@pytest.fixture
def ask(prometheus: Scraped) -> Ask:
    """Give a function that opens the dashboard for a run and answers one of its panels, by id."""

    def asked(run_id: str, panel: int, **chosen: Any) -> list[Answer]:
        database, now = prometheus
        view = View(
            dashboard=load("ranks"),
            prometheus=database,
            start=now - 300,
            end=now,
            chosen={"run_id": run_id, **chosen},
            scrape_interval=1.0,
        )
        (found,) = [each for each in view.panels if each["id"] == panel]
        return view.answers(found)

    return asked


def _shown(answers: list[Answer]) -> dict[str, float]:
    """Map the legends of all queries to their newest values."""
    return {series.legend: series.values[-1] for answer in answers for series in answer.series}


def _cells(answers: list[Answer], key: str) -> dict[str, dict[str, Any]]:
    """Map each row of a table to its cells, by the header of their column."""
    rows: dict[str, dict[str, Any]] = {}
    for answer in answers[1:]:
        for series in answer.series:
            text = [value for label, value in series.labels.items() if label != key]
            rows.setdefault(series.labels[key], {})[series.legend] = text[0] if text else series.values[-1]
    return rows


def test_three_ranks_at_a_glance(ask: Ask) -> None:
    """The first row counts the ranks and names the one that differs, the one that is behind and how many were bad."""
    assert _shown(ask("three", 1)) == {"reporting": 3, "seen": 3}
    assert list(_shown(ask("three", 2))) == ["3"]
    assert list(_shown(ask("three", 3))) == ["ranks of a host are compared"]
    assert _shown(ask("three", 4)) == {"rank 2": 3}
    assert _shown(ask("three", 5)) == {"rank 1": pytest.approx(1.0)}
    assert _shown(ask("three", 6)) == {"ranks": 1}


def test_three_ranks_in_graphs(ask: Ask) -> None:
    """Own norms, their spread, deviation, bad batches, age, steps behind and lag are those that were written."""
    assert _shown(ask("three", 8)) == {"rank 0": 1, "rank 1": 2, "rank 2": 1}
    spread = _shown(ask("three", 9))
    assert spread["largest / smallest"] == 2
    assert spread["standard deviation / mean"] == pytest.approx((2 / 9) ** 0.5 / (4 / 3))
    # Of three ranks the median is theirs who agree; of the last three steps two ranks only are there.
    deviation = _shown(ask("three", 10))
    assert deviation == pytest.approx({"rank 0": 1 / 3, "rank 1": 1.0, "rank 2": 1e-9})
    assert list(_shown(ask("three", 11))) == ["rank 1"]
    assert set(_shown(ask("three", 12))) == {"rank 0", "rank 1", "rank 2"}
    assert _shown(ask("three", 13)) == {"rank 0": 0, "rank 1": 0, "rank 2": 3}
    lag = _shown(ask("three", 14))
    assert lag == pytest.approx({"rank 0": 0, "rank 1": 0.25, "rank 2": 0.5}, abs=1e-6)


def test_the_table_of_three_ranks(ask: Ask) -> None:
    """Each rank has one row with all that is known of it, and the run's only host one of its own."""
    rows = _cells(ask("three", 15), "rank")
    assert set(rows) == {"0", "1", "2"}
    assert len({row["Host"] for row in rows.values()}) == 1
    assert {rank: (row["Behind"], row["Own norm"]) for rank, row in rows.items()} == {
        "0": (0, 1),
        "1": (0, 2),
        "2": (3, 1),
    }
    assert rows["1"]["Bad batches"] >= 4 - 1e-9
    (host,) = _cells(ask("three", 16), "instance").values()
    assert (host["Ranks"], host["Steps"], host["Baseline"]) == (3, 14, 1)


def test_chosen_ranks_alone_are_shown(ask: Ask) -> None:
    """Ranks that were chosen at the top are the only ones in graphs and table; names are taken whole."""
    assert set(_shown(ask("three", 8, rank=("0", "2")))) == {"rank 0", "rank 2"}
    assert set(_cells(ask("large", 15, rank=("1", "15")), "rank")) == {"1", "15"}


def test_a_single_rank(ask: Ask) -> None:
    """One rank is shown with its age and own norm, and the board says that there is nothing to compare it with."""
    assert list(_shown(ask("single", 3))) == ["single rank: nothing to compare"]
    assert _shown(ask("single", 1)) == {"reporting": 1, "seen": 1}
    for panel in (4, 5, 10, 13, 14):
        assert _shown(ask("single", panel)) == {}
    assert set(_cells(ask("single", 15), "rank")) == {"0"}


@pytest.mark.parametrize("panel", [8, 10, 11, 12, 13, 14, 17, 18])
def test_a_graph_of_1600_ranks_is_bounded(ask: Ask, panel: int) -> None:
    """However many ranks and hosts, a graph has so many series that it can be read."""
    (answer,) = ask("large", panel)
    assert len(answer.series) == (0 if panel == 11 else IN_GRAPH)


def test_the_one_of_1600_is_found(ask: Ask) -> None:
    """The rank that differs, the one that is behind and the host of another model are among those shown, by name."""
    assert _shown(ask("large", 1)) == {"reporting": 1600, "seen": 1600}
    assert _shown(ask("large", 4)) == {"rank 1599": 7}
    assert _shown(ask("large", 5)) == {"rank 777": 0.5}
    assert _shown(ask("large", 10))["rank 777"] == 0.5
    assert _shown(ask("large", 13))["rank 1599"] == 7
    assert set(_shown(ask("large", 14))) == {f"rank {rank}" for rank in range(1580, 1600)}
    assert _shown(ask("large", 17))["host5:9477"] == 1
    assert _shown(ask("large", 18))["host6:9477"] == 10
    assert len(_cells(ask("large", 15), "rank")) == 1600
    assert len(_cells(ask("large", 16), "instance")) == HOSTS


def test_the_map_is_in_order_of_ranks(ask: Ask) -> None:
    """Rows of the heatmap go by number, 99 before 100 before 1000, as many as can be drawn."""
    (several,) = ask("large", 7, rank=("1000", "2", "100", "99", "10", "1"))
    assert [series.legend for series in several.series] == ["1", "2", "10", "99", "100", "1000"]
    (answer,) = ask("large", 7)
    assert [series.legend for series in answer.series] == [str(rank) for rank in range(1600 - IN_MAP, 1600)]
