"""A fleet's hosts reduced to a series a run: what reaches the central store is what the hosts exposed, and no more."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gradiometer.metrics import CATALOGUE
from gradiometer.metrics.of_monitor import OF_MONITOR
from gradiometer.recorder import Recorder
from gradiometer_dashboards import load, names
from gradiometer_dashboards.evaluation import Answer, Prometheus, View
from gradiometer_dashboards.rules import Settings, fleet
from gradiometer_monitor.config.settings import resolve
from gradiometer_monitor.exposition.exposition import TEXT, Exposition, LayersOf
from gradiometer_monitor.following.runs import Runs
from tests._ports import free_ports
from tests._receivers import Database, prometheus, victoria

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, Promtool, Spawn, WaitUntil

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "deploy" / "fleet"
RULES = ROOT / "dashboards" / "gradiometer_dashboards" / "alerts"
RUNS, FILES = "fleet.rules.yml", ("fleet.rules.yml", "fleet-layers.rules.yml")
LAYERS: tuple[LayersOf, ...] = ("lead", "all")
if not EXAMPLES.is_dir():
    pytest.skip("the examples belong to the repository, not to the wheel", allow_module_level=True)

INTERVAL = 4
"""Seconds that dashboards are told to be between two scrapes: of those that come each second one may be late."""
Key = tuple[str, frozenset[tuple[str, str]]]
"""Name and labels of a series."""
OWN = {metric.name for metric in OF_MONITOR}
SCRAPE = {"up", "scrape_duration_seconds", "scrape_samples_scraped", "scrape_samples_post_metric_relabeling"}
VOLATILE = re.compile(r"rate\(|increase\(|scrape_|collector_|gradiometer_http|process_")
"""Queries whose numbers depend on the instants of the scrapes, which an evaluation does not share."""
TIES = re.compile(r"\b(top|bottom)k\(")
"""Queries in which VictoriaMetrics may choose others of those that are equal. It also lets a counter begin at 0."""


def _shard() -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((EXAMPLES / "prometheus-shard.yml").read_text(encoding="utf-8"))
    return config


def _families(metric: str) -> tuple[str, ...]:
    histogram = CATALOGUE[metric].kind == "histogram"
    return tuple(metric + part for part in ("_bucket", "_count", "_sum")) if histogram else (metric,)


def _relabelling(*, layers_recorded: bool) -> list[dict[str, Any]]:
    """Return the example's write_relabel_configs, with the line that it has for recorded layers or without."""
    found: list[dict[str, Any]] = _shard()["remote_write"][0]["write_relabel_configs"]
    line = re.search(r"# - (\{.*action: drop\})", (EXAMPLES / "prometheus-shard.yml").read_text(encoding="utf-8"))
    assert line
    return [found[0], *([yaml.safe_load(line[1])] if layers_recorded else []), *found[1:]]


def _relabelled(name: str, labels: dict[str, str], *, layers_recorded: bool = False) -> dict[str, str] | None:
    """Do what the example's write_relabel_configs say; None drops the series."""
    found = {"__name__": name, "cluster": "a", **labels}
    for each in _relabelling(layers_recorded=layers_recorded):
        text = ";".join(found.get(label, "") for label in each["source_labels"])
        match = re.fullmatch(each["regex"], text)
        if (each.get("action") == "keep" and not match) or (each.get("action") == "drop" and match):
            return None
        if "target_label" in each and match:
            found[each["target_label"]] = match[1]
    return found


def test_every_metric_is_reduced_or_left() -> None:
    """Whoever declares a metric says how it reduces over the hosts of a run."""
    assert fleet.REDUCTIONS.keys() == CATALOGUE.keys()


def test_rules_can_keep_more_labels() -> None:
    """Labels of targets that are asked for stay beside the job."""
    settings = Settings(by=("rack",))
    assert "max by (job, rack, run_id) (gradiometer_loss)" in fleet.fleet_rules(settings)
    assert "by (job, rack, run_id, layer)" in fleet.fleet_layer_rules(settings)


@pytest.mark.parametrize("layers_recorded", [False, True])
@pytest.mark.parametrize("name", CATALOGUE)
def test_only_what_is_reduced_or_of_a_host_is_sent(name: str, layers_recorded: bool) -> None:
    """What is the same on all hosts is sent as it was recorded, under its own name; all else as it is."""
    labels = dict.fromkeys(CATALOGUE[name].labels, "x") | {"job": "gradiometer"}
    of_layers = fleet.of_layers(CATALOGUE[name])
    for family in _families(name):
        sent = _relabelled(family, labels | {"instance": "host"}, layers_recorded=layers_recorded)
        if fleet.REDUCTIONS[name] == "each" or (of_layers and not layers_recorded):
            assert sent is not None
            assert (sent["__name__"], sent["instance"]) == (family, "host")
        else:
            assert sent is None
            recorded = fleet.recorded(name, family.removeprefix(name))
            reduced = _relabelled(recorded, labels, layers_recorded=layers_recorded)
            assert reduced is not None
            assert (reduced["__name__"], reduced["instance"]) == (family, "a")


@pytest.mark.parametrize("name", [*sorted(SCRAPE), "ALERTS"])
def test_what_dashboards_ask_beside_the_catalogue_is_sent(name: str) -> None:
    """Series of Prometheus itself that dashboards name are sent, with a run or without."""
    assert _relabelled(name, {"job": "gradiometer"})
    assert _relabelled(name, {"run_id": "run"})
    assert _relabelled("go_goroutines", {"job": "gradiometer"}) is None


def test_both_receivers_get_the_same() -> None:
    """The example's receivers differ in where they are alone."""
    first, second = _shard()["remote_write"]
    for part in ("queue_config", "write_relabel_configs"):
        assert first[part] == second[part]
    assert _shard()["global"]["evaluation_interval"] == _shard()["global"]["scrape_interval"]


def test_the_monitor_takes_its_example(tmp_path: Path) -> None:
    """The example of a monitor in a fleet is a valid configuration, and sends to the stores that the shard sends to."""
    settings = resolve(tmp_path, EXAMPLES / "monitor.yaml")
    assert settings.layers == "lead"
    assert [each.url for each in settings.remote_write] == [each["url"] for each in _shard()["remote_write"]]


@pytest.mark.native
def test_promtool_accepts_the_examples(promtool: Promtool) -> None:
    """Prometheus finds no fault in the rules and in the configuration of a shard."""
    files = [str(RULES / name) for name in FILES]
    for command in (["rules", *files], ["config", "--syntax-only", str(EXAMPLES / "prometheus-shard.yml")]):
        done = promtool("check", *command)
        assert done.returncode == 0, done.stdout + done.stderr


def _case(of: str, name: str, series: dict[str, str], expected: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Write a test of promtool: samples each 15 s, and what is recorded when; of no series where it is empty."""
    return {
        "name": of,
        "interval": "15s",
        "input_series": [{"series": key, "values": values} for key, values in series.items()],
        "promql_expr_test": [
            {
                "expr": name,
                "eval_time": at,
                "exp_samples": [{"labels": f"{name}{labels}", "value": value} for labels, value in samples.items()],
            }
            for at, samples in expected.items()
        ],
    }


COUNTER, GAUGE, RUN = "gradiometer_policy_changes_total", "gradiometer_clip_threshold", '{job="g", run_id="r"}'
CASES = [
    _case(
        "a counter stays where it was when the host that counted most leaves, and goes on when it is overtaken",
        fleet.recorded(COUNTER),
        {
            f'{COUNTER}{{job="g", instance="a", run_id="r"}}': "0+10x3 stale",
            f'{COUNTER}{{job="g", instance="b", run_id="r"}}': "0+9x8",
        },
        {"45s": {RUN: 30}, "60s": {RUN: 36}, "90s": {RUN: 54}},
    ),
    _case(
        "a counter does not fall behind what it was",
        fleet.recorded(COUNTER),
        {
            f'{COUNTER}{{job="g", instance="a", run_id="r"}}': "100+0x1 stale",
            f'{COUNTER}{{job="g", instance="b", run_id="r"}}': "99+0x4",
        },
        {"15s": {RUN: 100}, "60s": {RUN: 100}},
    ),
    _case(
        "a run that began anew counts from there",
        fleet.recorded(COUNTER),
        {f'{COUNTER}{{job="g", instance="a", run_id="r"}}': "100 110 3 13"},
        {"15s": {RUN: 110}, "30s": {RUN: 3}, "45s": {RUN: 13}},
    ),
    _case(
        "a run that leaves is not recorded any more",
        fleet.recorded(COUNTER),
        {f'{COUNTER}{{job="g", instance="a", run_id="r"}}': "100 110 stale"},
        {"15s": {RUN: 110}, "60s": {}},
    ),
    _case(
        "policies stay apart",
        fleet.recorded(GAUGE),
        {
            f'{GAUGE}{{job="g", instance="a", run_id="r", policy="p", mode="act"}}': "1 2",
            f'{GAUGE}{{job="g", instance="b", run_id="r", policy="q", mode="act"}}': "3 1",
        },
        {
            "15s": {
                '{job="g", run_id="r", policy="p", mode="act"}': 2,
                '{job="g", run_id="r", policy="q", mode="act"}': 1,
            }
        },
    ),
]


@pytest.mark.native
def test_recorded_counters_fall_only_with_their_run(tmp_path: Path, promtool: Promtool) -> None:
    """Promtool evaluates the rules over hosts that leave, runs that begin anew, and runs that end."""
    file = tmp_path / "cases.yml"
    file.write_text(json.dumps({"rule_files": [str(RULES / RUNS)], "evaluation_interval": "15s", "tests": CASES}))
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True, kw_only=True)
class _Fleet:
    """Two hosts that were scraped, and stores that hold what they exposed."""

    hosts: dict[str, Exposition]
    shard: Database
    central: Database
    victoria: Database
    start: float
    """Unix seconds: before the runs moved for the last time, and at least half a minute before the end."""
    end: float
    """Unix seconds: when the runs had stood still for long enough that every store held their newest numbers."""


def _runs(root: Path, make_manifest: MakeManifest, append: Append) -> dict[str, list[Recorder]]:
    """Write a run of four ranks on two hosts, and one of the second host alone."""
    recorders: dict[str, list[Recorder]] = {"a": [], "b": []}
    for place, (run_id, rank) in enumerate([("wide", 0), ("wide", 1), ("wide", 2), ("wide", 3), ("solo", 0)]):
        host = "a" if place < 2 else "b"
        described: dict[str, Any] = {
            "job": "train.py",
            "created_ns": time.time_ns(),
            "policies": ("clip",),
        }
        manifest = make_manifest(run_id, rank=rank, world_size=4, capacity=512, **described)
        recorder = Recorder(root / host, manifest)
        recorder.policies[:] = np.nan
        recorder.policies[:, 0] = 1.5, 0.5 / (1 + place)
        norms = np.random.default_rng(0).random((200, 4)) + 1
        now = time.time_ns()
        append(recorder, norms, time_ns=[now + step * 10**6 for step in range(200)], clipped=1, loss=2.0 + place)
        recorders[host].append(recorder)
    return recorders


def _serve(hosts: dict[str, Exposition]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = hosts[self.path.strip("/")].render()
            self.send_response(200)
            self.send_header("Content-Type", TEXT)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


def _config(port: int, receivers: list[str], layers: LayersOf) -> str:
    """Fill in the example of a shard: whom it scrapes, each second, and where it sends."""
    config = _shard()
    config["global"] |= {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES / name) for name in (FILES if layers == "all" else FILES[:1])]
    (job,) = config["scrape_configs"]
    del job["authorization"], job["file_sd_configs"]
    job["static_configs"] = [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"__metrics_path__": f"/{host}", "instance": f"host-{host}"}}
        for host in ("a", "b")
    ]
    relabel = _relabelling(layers_recorded=layers == "all")
    quick = config["remote_write"][0]["queue_config"] | {"batch_send_deadline": "500ms"}
    config["remote_write"] = [
        {"url": url, "queue_config": quick, "write_relabel_configs": relabel} for url in receivers
    ]
    return json.dumps(config)


@pytest.fixture(scope="module")
def fleets(
    tmp_path_factory: pytest.TempPathFactory,
    make_store: Callable[[Path, LayersOf, int], dict[str, Database]],
    make_manifest: MakeManifest,
    append: Append,
    wait_until: WaitUntil,
) -> Iterator[dict[LayersOf, _Fleet]]:
    """The same two hosts, exporting all layers and those of rank 0, each behind a shard with central stores."""
    folder = tmp_path_factory.mktemp("fleet")
    recorders = _runs(folder, make_manifest, append)
    followed = {host: Runs(folder / host, retention_seconds=1e12) for host in recorders}
    _read(followed)
    started: dict[LayersOf, tuple[dict[str, Exposition], ThreadingHTTPServer, dict[str, Database]]] = {}
    for layers in LAYERS:
        hosts = {host: Exposition(runs, series_budget=10_000, layers=layers) for host, runs in followed.items()}
        server = _serve(hosts)
        started[layers] = hosts, server, make_store(folder / layers, layers, server.server_address[1])
    for layers, (hosts, _, stores) in started.items():
        for store in (stores["central"], stores["victoria"]):
            _wait_for(_exposed(hosts, layers), store)
    moving = time.time()
    for _ in range(20):
        for place, recorder in enumerate([*recorders["a"], *recorders["b"]]):
            recorder.status.agent_errors, recorder.status.rows_dropped = 1 + place, place
            append(recorder, [[1.0, 2.0, 3.0, 4.0]], time_ns=time.time_ns(), clipped=1)
        time.sleep(0.1)
        _read(followed)
    newest = [
        (store, _scraped(hosts) if name == "shard" else _exposed(hosts, layers))
        for layers, (hosts, _, stores) in started.items()
        for name, store in stores.items()
    ]
    end = wait_until(partial(_settled, newest, time.time()), 90)
    start = min(moving - 5, end - 30)
    yield {
        layers: _Fleet(hosts=hosts, start=start, end=end, **stores) for layers, (hosts, _, stores) in started.items()
    }
    for _, server, _ in started.values():
        server.shutdown()
        server.server_close()
    for runs in followed.values():
        runs.close()
    for recorder in [*recorders["a"], *recorders["b"]]:
        recorder.close()


def _read(followed: dict[str, Runs]) -> None:
    for runs in followed.values():
        while runs.poll():
            pass


@pytest.fixture(scope="module")
def make_store(
    native_binary: Callable[[str], str], shared_spawn: Spawn, wait_until: WaitUntil
) -> Callable[[Path, LayersOf, int], dict[str, Database]]:
    """Give a function that starts a shard, which scrapes the hosts behind a port, and its central stores."""

    def make(folder: Path, layers: LayersOf, port: int) -> dict[str, Database]:
        stores, ports = {}, free_ports(3)
        for name, own in zip(("central", "shard"), ports, strict=False):
            (folder / name).mkdir(parents=True)
            stores[name] = prometheus(native_binary("prometheus"), folder / name, own, shared_spawn, wait_until)
        stores["victoria"] = victoria(native_binary("victoria-metrics"), folder, ports[2], shared_spawn, wait_until)
        stores["victoria"].command.append("-search.latencyOffset=0s")  # else it answers of half a minute ago
        receivers = [stores[name].write_url for name in ("central", "victoria")]
        (folder / "shard" / "prometheus.yml").write_text(_config(port, receivers, layers))
        for store in stores.values():
            store.start()
        return stores

    return make


def _exposed(hosts: dict[str, Exposition], layers: LayersOf) -> dict[Key, float]:
    """Reduce what the hosts expose, as the table says, by hand."""
    found: dict[Key, list[float]] = {}
    reductions = {part: fleet.REDUCTIONS[name] for name in CATALOGUE for part in _families(name)}
    if layers == "lead":
        reductions |= dict.fromkeys([name for name in CATALOGUE if fleet.of_layers(CATALOGUE[name])], "each")
    for host, exposition in hosts.items():
        for family in parse_text(exposition.render().decode()):
            for sample in family.samples:
                if sample.name in reductions:
                    instance = f"host-{host}" if reductions[sample.name] == "each" else "a"
                    labels = sample.labels | {"instance": instance, "cluster": "a", "job": "gradiometer"}
                    found.setdefault((sample.name, frozenset(labels.items())), []).append(sample.value)
    return {key: (min if reductions[key[0]] == "min" else max)(values) for key, values in found.items()}


def _scraped(hosts: dict[str, Exposition]) -> dict[Key, float]:
    """Return what the shard itself has of what the hosts expose, without what they tell of themselves."""
    found = {}
    for host, exposition in hosts.items():
        for family in parse_text(exposition.render().decode()):
            for sample in family.samples:
                labels = sample.labels | {"instance": f"host-{host}", "job": "gradiometer"}
                found[sample.name, frozenset(item for item in labels.items() if item[1])] = sample.value
    return _still(found)


def _still(expected: dict[Key, float]) -> dict[Key, float]:
    """Leave out what monitors tell of themselves, which differs from scrape to scrape."""
    return {key: value for key, value in expected.items() if key[0] in CATALOGUE.keys() - OWN}


def _settled(newest: list[tuple[Database, dict[Key, float]]], stood: float) -> float | None:
    """Return a time until which, for an interval of the dashboards, every store had the newest that it should have.

    The runs have stood still since ``stood``; there is none before two intervals are over.
    """
    at = time.time() - 1
    times = [at - back for back in range(INTERVAL + 1)]
    quiet = times[-1] - INTERVAL > stood + 2  # what is scraped is evaluated a second later
    return at if quiet and all(_holds(store, each, when) for store, each in newest for when in times) else None


def _holds(store: Database, expected: dict[Key, float], at: float) -> bool:
    found = _stored(store, at)
    return expected.keys() <= found.keys() and all(
        math.isclose(found[key], value, rel_tol=1e-9) for key, value in _still(expected).items()
    )


def _stored(store: Database, at: float) -> dict[Key, float]:
    """Return every series of the store and its value at a time, in unix seconds."""
    body = store.get("/api/v1/query", query='{__name__!=""}', time=f"{at:.3f}")
    found = json.loads(body)["data"]["result"] if body else []
    return {
        (each["metric"].pop("__name__"), frozenset(each["metric"].items())): float(each["value"][1]) for each in found
    }


def _wait_for(expected: dict[Key, float], store: Database) -> None:
    """Wait until the store holds every series that is expected."""
    deadline = time.monotonic() + 90
    while missing := expected.keys() - _stored(store, time.time()).keys():
        assert time.monotonic() < deadline, (len(missing), sorted(map(str, missing))[:5])
        time.sleep(0.1)


@pytest.mark.native
@pytest.mark.slow
@pytest.mark.parametrize("store", ["central", "victoria"])
@pytest.mark.parametrize("layers", LAYERS)
def test_what_arrives_is_what_the_hosts_exposed(fleets: dict[LayersOf, _Fleet], layers: LayersOf, store: str) -> None:
    """The central stores hold each series of the hosts, reduced as the table says, and of the shard's the few named."""
    scraped = fleets[layers]
    expected = _exposed(scraped.hosts, layers)
    assert sum(key[0] == "gradiometer_agent_errors_total" for key in expected) == 3
    found = _stored(getattr(scraped, store), scraped.end)
    assert expected.keys() <= found.keys()
    assert {name for name, _ in found.keys() - expected.keys()} == SCRAPE
    still = _still(expected)
    assert {key: found[key] for key in still} == pytest.approx(still, rel=1e-9)


def _told(answer: Answer) -> dict[tuple[str, str], float]:
    """Return the last value of each series of an answer, by its labels and its legend; VictoriaMetrics tells no NaN."""
    told = {(str(sorted(each.labels.items())), each.legend): _numbers(each.values) for each in answer.series}
    return {name: numbers[-1] for name, numbers in told.items() if numbers}


def _numbers(values: list[float]) -> list[float]:
    return [value for value in values if not math.isnan(value)]


@pytest.mark.native
@pytest.mark.slow
@pytest.mark.parametrize("board", names())
@pytest.mark.parametrize("store", ["central", "victoria"])
@pytest.mark.parametrize("layers", LAYERS)
def test_dashboards_say_the_same_of_both(
    fleets: dict[LayersOf, _Fleet], board: str, layers: LayersOf, store: str
) -> None:
    """Each query of a dashboard gives, of what is reduced, the series and numbers that it gives of the hosts."""
    scraped = fleets[layers]
    views = [
        View(
            dashboard=load(board), prometheus=Prometheus(url=each.url), start=scraped.start, end=scraped.end,
            chosen={"run_id": "wide"}, scrape_interval=INTERVAL,
        )
        for each in (scraped.shard, getattr(scraped, store))
    ]  # fmt: skip
    for panel in views[0].panels:
        for raw, reduced in zip(*(view.answers(panel) for view in views), strict=True):
            told, again, where = _told(raw), _told(reduced), (panel["title"], raw.expr)
            if store == "victoria" and TIES.search(raw.expr):
                assert len(again) == len(told), where
                continue
            assert told.keys() == again.keys(), where
            if not VOLATILE.search(raw.expr):
                assert again == pytest.approx(told, rel=1e-6), where
            elif store == "central" and raw.instant and "increase(" in raw.expr:
                assert again == pytest.approx(told, rel=0.3), where


def test_figures_of_the_page_on_scaling(tmp_path: Path, make_manifest: MakeManifest, append: Append) -> None:
    """A run, a policy, a rank and a layer have as many series as docs/scaling.md computes with."""
    recorders = _runs(tmp_path, make_manifest, append)
    runs = Runs(tmp_path / "a", retention_seconds=1e12)
    _read({"a": runs})
    text = Exposition(runs, series_budget=10_000).render().decode()
    runs.close()
    for recorder in [*recorders["a"], *recorders["b"]]:
        recorder.close()
    found = [sample for family in parse_text(text) for sample in family.samples if "run_id" in sample.labels]
    of = {label: [s for s in found if label in s.labels] for label in ("layer", "rank", "mode")}
    layers = {sample.labels["layer"] for sample in of["layer"]}
    assert len(of["layer"]) == 4 * len(layers)
    assert len(of["mode"]) == 3
    assert 2 <= len(of["rank"]) / 2 <= 7
    assert len(found) - sum(map(len, of.values())) == pytest.approx(80, abs=6)
