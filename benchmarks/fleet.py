"""What a fleet costs its Prometheus, and what dashboards cost there: as scraped, and reduced to a series a run.

Simulated hosts (:mod:`benchmarks._hosts` says what of them is real) are scraped by a real Prometheus as
``deploy/fleet/prometheus-shard.yml`` has it: it records ``fleet.rules.yml`` and remote-writes what is reduced to a
VictoriaMetrics, and, with one run over all hosts, to a second Prometheus too. Then each panel of each dashboard is
asked for the last hour, of which there are only the minutes that were scraped: twice as scraped, once of each central
store, in turn; once where it takes longer than 3 s. How far the two times as scraped are apart is the noise.

The mixes: ``one`` run over all hosts, each of which exports its layers, so that they are recorded too; ``lead``, the
same run where only the host of rank 0 does (the monitors' setting ``layers: lead``); ``many``, a run a host.

    python -m benchmarks.fleet [--hosts 200] [--minutes 4] [--mix one …] [--rounds 5] [--json FILE] [--dry-run]
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks._hosts import Fleet, serving
from benchmarks._stores import Store, prometheus, shard_config, victoria
from gradiometer_dashboards import load, names
from gradiometer_dashboards.evaluation import QueryError, View

VIEW_SECONDS = 3600.0
DRY = {"hosts": 3, "ranks": 2, "layers": 5, "minutes": 0.2, "interval": 2.0, "rounds": 1}
SLOW_SECONDS = 3.0
"""A panel that took longer is not asked again: what was meant to warm up is what it took."""
RAW, AGAIN = "as scraped", "as scraped, again (A/A)"

Details = dict[str, Any]


def say(message: str) -> None:
    """Tell how far it is, on stderr."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {message}\n")


def scrape_size(port: int) -> Details:
    """Take one scrape of one host: its series, and its bytes."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/0", timeout=60) as response:
        packed = response.read()
    text = gzip.decompress(packed)
    found = {"series": text.count(b"\n") - text.count(b"\n#"), "bytes": len(text), "bytes_gzip": len(packed)}
    for label in ("layer", "rank", "gpu"):
        found[f"series_with_{label}"] = sum(f'{label}="'.encode() in line for line in text.splitlines())
    return found


class Usage:
    """What each process used from one moment to another."""

    def __init__(self, stores: list[Store]) -> None:
        self._stores, self._began = stores, time.monotonic()
        self._cpu = [store.cpu_seconds for store in stores]
        self._samples = [self._taken(store) for store in stores]

    @staticmethod
    def _taken(store: Store) -> float:
        names = ("prometheus_tsdb_head_samples_appended_total", "vm_rows_inserted_total")
        return sum(map(store.own, names))

    def details(self) -> dict[str, Details]:
        """Return series, samples a second, cores, memory and disk of each store."""
        seconds, found = time.monotonic() - self._began, {}
        for store, cpu, samples in zip(self._stores, self._cpu, self._samples, strict=True):
            found[store.name] = {
                "series": store.series,
                "samples_per_second": (self._taken(store) - samples) / seconds,
                "cores": (store.cpu_seconds - cpu) / seconds,
                "disk_bytes": store.disk_bytes,
                **store.memory,
            }
        return found


def rules(shard: Store) -> Details:
    """Return how long each group of rules took when it was last evaluated."""
    groups = shard.get("rules")["groups"]
    failed = [rule["name"] for group in groups for rule in group["rules"] if rule["health"] == "err"]
    seconds = {group["name"]: group["evaluationTime"] for group in groups}
    return {"seconds": seconds, "failed": failed}


def panels(stores: dict[str, Store], fleet: Fleet, interval: float, rounds: int) -> Iterator[Details]:
    """Time each panel of each dashboard on each store, in turn, ``rounds`` times after one to warm up.

    One that takes long is asked once.
    """
    now = time.time() - 2 * interval  # what is reduced arrives an evaluation and a batch later
    for board in names():
        views = {
            name: View(
                dashboard=load(board), prometheus=store.api, start=now - VIEW_SECONDS, end=now,
                chosen={"run_id": fleet.run_id}, scrape_interval=interval,
            )
            for name, store in stores.items()
        }  # fmt: skip
        for panel in views[RAW].panels:
            found = _panel(views, panel, rounds)
            yield {"dashboard": board, "panel": panel["title"], **found}
        say(f"{board}: asked")


def _panel(views: dict[str, View], panel: Details, rounds: int) -> Details:
    seconds: dict[str, list[float]] = {name: [] for name in views}
    series, errors = {}, {}
    for place in range(rounds + 1):
        order = list(views)[place % len(views) :] + list(views)[: place % len(views)]
        for name in order:
            if name in errors or seconds[name][:1] > [SLOW_SECONDS]:
                continue
            started = time.perf_counter()
            try:
                series[name] = sum(len(answer.series) for answer in views[name].answers(panel))
            except QueryError as error:
                errors[name] = str(error)[-300:]
                continue
            took = time.perf_counter() - started
            if place or took > SLOW_SECONDS:
                seconds[name].append(took)
    times = {name: {"median": statistics.median(taken), "max": max(taken)} for name, taken in seconds.items() if taken}
    return {"seconds": times, "series": series, "errors": errors}


def measure(folder: Path, fleet: Fleet, options: argparse.Namespace) -> Details:
    """Run one mix: start everything, scrape for some minutes, ask every panel."""
    interval: float = options.interval
    with ExitStack() as stack:
        port, hosts = stack.enter_context(serving(fleet))
        central = [stack.enter_context(victoria("reduced, VictoriaMetrics", folder))]
        if fleet.mix != "many":
            central.append(stack.enter_context(prometheus("reduced, Prometheus", folder)))
        targets = [
            {
                "targets": [f"127.0.0.1:{port}"],
                "labels": {"__metrics_path__": f"/{place}", "instance": fleet.name(place)},
            }
            for place in range(fleet.hosts)
        ]
        size = scrape_size(port)
        receivers = [f"{store.url}/api/v1/write" for store in central]
        config = shard_config(targets, interval, receivers, layers=fleet.mix == "one")
        shard = stack.enter_context(prometheus(RAW, folder, config))
        _wait_for(shard, fleet, interval)
        usage, began = Usage([shard, *central]), time.monotonic()
        while (left := options.minutes * 60 - (time.monotonic() - began)) > 0:
            say(f"{fleet.mix}: {left:.0f} s to go, {shard.number('sum(up)'):.0f} hosts up")
            time.sleep(min(left, 30.0))
        found: Details = {"fleet": asdict(fleet), "scrape": size, "stores": usage.details(), "rules": rules(shard)}
        found["hosts_up"] = shard.number("sum(up)")
        found["scrape_seconds"] = shard.number("max(scrape_duration_seconds)")
        found["series_scraped"] = shard.number("sum(scrape_samples_post_metric_relabeling)")
        found["simulation_cores"] = psutil.Process(hosts.pid).cpu_times().user / (time.monotonic() - began)
        time.sleep(2 * interval)
        asked = {RAW: shard, AGAIN: shard} | {store.name: store for store in central}
        found["panels"] = list(panels(asked, fleet, interval, options.rounds))
        found["stores_after_queries"] = {store.name: store.memory for store in (shard, *central)}
    return found


def _wait_for(shard: Store, fleet: Fleet, interval: float) -> None:
    """Wait until every host was scraped."""
    deadline = time.monotonic() + 4 * interval + 60
    while (up := shard.number("sum(up)")) < fleet.hosts:
        if time.monotonic() > deadline:
            raise SystemExit(f"{up:.0f} of {fleet.hosts} hosts are scraped: the machine is too slow for this fleet")
        time.sleep(0.5)


def noise(asked: list[Details]) -> float:
    """Compare the sums of the two medians of the same store over all panels."""
    both = [each["seconds"] for each in asked if {RAW, AGAIN} <= each["seconds"].keys()]
    first, second = (sum(each[name]["median"] for each in both) for name in (RAW, AGAIN))
    return abs(first / second - 1) if second else 0.0


def show(mix: str, found: Details) -> None:
    """Print what was measured of one mix."""
    fleet, size = found["fleet"], found["scrape"]
    runs = {"one": "one run", "lead": "one run, its layers from the host of rank 0,", "many": "a run a host"}[mix]
    print(f"\n{runs} over {fleet['hosts']} hosts of {fleet['ranks']} ranks, {fleet['layers']} layers")
    kinds = ", ".join(f"{size[f'series_with_{label}']} with {label}" for label in ("layer", "rank", "gpu"))
    text, packed = size["bytes"] / 1024, size["bytes_gzip"] / 1024
    print(f"  the first host: {size['series']} series ({kinds}), {text:.0f} KiB, {packed:.0f} KiB compressed")
    slowest = found["scrape_seconds"] * 1e3
    print(f"  {found['hosts_up']:.0f} hosts up, {found['series_scraped']:.0f} series; slowest scrape {slowest:.0f} ms")
    for name, store in found["stores"].items():
        rss, peak = store["rss_bytes"] / 2**20, found["stores_after_queries"][name]["peak_rss_bytes"] / 2**20
        print(f"  {name:26} {store['series']:8} series {store['samples_per_second']:8.0f} samples/s", end=" ")
        print(f"{store['cores']:5.2f} cores {rss:6.0f} MiB, {peak:.0f} at most with the queries")
    for name, seconds in found["rules"]["seconds"].items():
        print(f"  rules {name:46} {seconds * 1e3:8.1f} ms")
    for name in found["rules"]["failed"]:
        print(f"  rule {name} FAILED")
    _show_panels(found)


def _show_panels(found: Details) -> None:
    asked, stores = found["panels"], list(found["stores"])
    print(f"  panels, median (max) in ms; A/A noise {found['noise']:.1%}")
    print(f"  {'':52}" + "".join(f"{name:>26}" for name in stores))
    for each in asked:
        cells = [each["seconds"].get(name) for name in stores]
        texts = [f"{cell['median'] * 1e3:.0f} ({cell['max'] * 1e3:.0f})" if cell else "failed" for cell in cells]
        print(f"  {each['dashboard'] + ': ' + each['panel']:52.52}" + "".join(f"{text:>26}" for text in texts))
    for board in dict.fromkeys(each["dashboard"] for each in asked):
        sums = [_sum(asked, board, name) for name in stores]
        print(f"  {board + ', all panels':52}" + "".join(f"{total:>23.0f} ms" for total in sums))


def _sum(asked: list[Details], board: str, store: str) -> float:
    total: float = sum(
        1e3 * each["seconds"][store]["median"]
        for each in asked
        if each["dashboard"] == board and store in each["seconds"]
    )
    return total


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Fleet()
    for name in ("hosts", "ranks", "layers"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help="default %(default)s")
    parser.add_argument("--minutes", type=float, default=4.0, help="of scraping, for each mix (default %(default)s)")
    parser.add_argument("--interval", type=float, default=15.0, help="seconds between scrapes (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of asking each panel (default %(default)s)")
    parser.add_argument("--mix", choices=("one", "lead", "many"), action="append", help="default all three")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument("--dry-run", action="store_true", help="a tiny fleet for seconds: shows that it runs")
    options = parser.parse_args()
    if options.dry_run:
        vars(options).update(DRY)
    return options


def main() -> None:
    """Measure each mix, and keep what was measured after each."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    options = arguments()
    fleet, results = Fleet(hosts=options.hosts, ranks=options.ranks, layers=options.layers), {}
    for mix in options.mix or ("one", "lead", "many"):
        with tempfile.TemporaryDirectory() as folder:
            results[mix] = found = measure(Path(folder), replace(fleet, mix=mix), options)
        found["noise"] = noise(found["panels"])
        show(mix, found)
        sys.stdout.flush()
        if options.json is not None:
            _write(options, results)


def _write(options: argparse.Namespace, results: dict[str, Details]) -> None:
    machine = {"python": platform.python_version(), "machine": platform.machine(), "cores": psutil.cpu_count()}
    settings = {name: getattr(options, name) for name in ("minutes", "interval", "rounds", "dry_run")}
    body = {"benchmark": "fleet", "machine": machine, "settings": settings, "results": results}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
