"""The stack without Docker: what the compose file says, started natively, seen to work, and gone afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil
import pytest

from gradiometer.records import State
from gradiometer.run import open_run
from gradiometer_dashboards.evaluation import Prometheus, View
from tests._ports import free_ports

if TYPE_CHECKING:
    from tests.conftest import Spawn, WaitUntil

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "deploy" / "stack").is_dir():
    pytest.skip("the stack belongs to the repository, not to the wheel", allow_module_level=True)

pytestmark = [pytest.mark.native, pytest.mark.slow]
DASHBOARDS = ROOT / "dashboards" / "gradiometer_dashboards" / "json"
PARTS = ("monitor", "prometheus", "alertmanager", "grafana")
GRAFANA = """
import http.server, json, os, pathlib, sys
variables = {name: value for name, value in os.environ.items() if name.startswith("GF_")}
pathlib.Path(os.environ["GF_PATHS_DATA"], "seen.json").write_text(json.dumps([sys.argv[1:], variables]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b'{"database": "ok"}' if self.path.startswith("/api/health") else b"grafana_up 1\\n"
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_):
        pass
address = os.environ["GF_SERVER_HTTP_ADDR"], int(os.environ["GF_SERVER_HTTP_PORT"])
http.server.ThreadingHTTPServer(address, Handler).serve_forever()
"""
"""Stands for grafana-server, which Debian has not: notes how it was started, is healthy, and has metrics."""


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack that was started."""

    process: subprocess.Popen[str]
    log: Path
    state: Path
    ports: dict[str, int]

    def said(self) -> str:
        return self.log.read_text()

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def child(self, word: str) -> psutil.Process:
        """Find a part by a word of its command."""
        (found,) = (child for child in self.children() if any(word in each for each in child.cmdline()))
        return found

    def get(self, part: str, path: str, token: str | None = None) -> tuple[int, Any]:
        """Ask a part for JSON or text; status 0 where nobody answers."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.ports[part]}{path}")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                text = response.read().decode()
                return response.status, json.loads(text) if text[:1] in "[{" else text
        except urllib.error.HTTPError as error:
            with error:
                return error.code, None
        except OSError:
            return 0, None

    def query(self, expression: str) -> list[Any]:
        """Ask Prometheus."""
        answer = self.get("prometheus", f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}")[1]
        found: list[Any] = answer["data"]["result"]
        return found


def _ports() -> dict[str, int]:
    return dict(zip(PARTS, free_ports(len(PARTS)), strict=True))


def _start(folder: Path, ports: dict[str, int], *options: str, path: str = "", stdout: int | None = None) -> Stack:
    """Start the stack with everything it keeps below ``folder``; what it says goes to a file unless given."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "deploy.stack", "--state", str(folder / "state"), "--dir", str(folder / "runs")]
    for name, port in ports.items():
        command += [f"--{name}-port", str(port)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PATH": path or os.environ["PATH"],
    }  # fmt: skip
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, *options],
            cwd=ROOT,
            env=environment,
            stdout=log if stdout is None else stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )
    return Stack(process=process, log=folder / "log", state=folder / "state", ports=ports)


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, native_binary: Callable[[str], str], wait_until: WaitUntil
) -> Iterator[Stack]:
    """Give a stack that is ready, with a job that trains and a stand-in for Grafana; end it at last."""
    for name in ("prometheus", "prometheus-alertmanager"):
        native_binary(name)
    folder = tmp_path_factory.mktemp("stack")
    (folder / "bin").mkdir()
    grafana = folder / "bin" / "grafana-server"
    grafana.write_text(f"#!{sys.executable}\n{GRAFANA}")
    grafana.chmod(0o755)
    made = _start(folder, _ports(), path=f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    try:
        wait_until(lambda: "| ready:" in made.said() or made.process.poll() is not None, 120)
        assert made.process.poll() is None, made.said()
        yield made
    finally:
        made.process.terminate()
        made.process.wait(60)


def test_every_target_is_up(stack: Stack, wait_until: WaitUntil) -> None:
    """Prometheus scrapes all four with what the compose file gives it, the monitor with its token."""

    def up() -> bool:
        targets = stack.get("prometheus", "/api/v1/targets")[1]["data"]["activeTargets"]
        return {target["labels"]["job"]: target["health"] for target in targets} == {
            "gradiometer": "up", "prometheus": "up", "alertmanager": "up", "grafana": "up",
        }  # fmt: skip

    wait_until(up)


def test_the_monitor_lets_in_who_has_a_token(stack: Stack, wait_until: WaitUntil) -> None:
    """Without a token nothing is told; with the one that was named at the start the runs are."""
    (file,) = re.findall(r"asks for the token in (\S+)", stack.said())
    assert stack.get("monitor", "/api/v1/runs")[0] == 401
    token = Path(file).read_text()
    (run,) = wait_until(lambda: stack.get("monitor", "/api/v1/runs", token)[1]["runs"])
    assert run["run_id"].startswith("stack-demo-")
    assert stack.get("monitor", "/")[0] == 200


def test_each_part_may_do_what_it_needs(stack: Stack) -> None:
    """Of the monitor, the token of Prometheus lets it scrape, and Alertmanager's not even that."""
    secrets = stack.state / "secrets"
    scraping, telling = (
        (secrets / name).read_text() for name in ("prometheus_token", "alertmanager/gradiometer-token")
    )
    for path, expected in (("/metrics", (200, 403)), ("/api/v1/runs", (403, 403)), ("/api/v1/events", (403, 403))):
        assert tuple(stack.get("monitor", path, token)[0] for token in (scraping, telling)) == expected


def test_rules_are_loaded_and_alertmanager_is_told(stack: Stack, wait_until: WaitUntil) -> None:
    """Prometheus evaluates our rules without an error, and knows Alertmanager, which has our routes."""

    def healthy() -> bool:
        groups = stack.get("prometheus", "/api/v1/rules")[1]["data"]["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        return bool(rules) and all(rule["health"] == "ok" for rule in rules)

    def known() -> list[str]:
        found = stack.get("prometheus", "/api/v1/alertmanagers")[1]["data"]["activeAlertmanagers"]
        return [each["url"] for each in found]

    wait_until(healthy)
    assert wait_until(known) == [f"http://127.0.0.1:{stack.ports['alertmanager']}/api/v2/alerts"]
    receivers = {each["name"] for each in stack.get("alertmanager", "/api/v2/receivers")[1]}
    assert "monitor" in receivers


def test_links_lead_to_this_stack(stack: Stack) -> None:
    """Runbooks and dashboards that alerts name are those of the ports that were chosen; runbooks need no token."""
    groups = stack.get("prometheus", "/api/v1/rules")[1]["data"]["groups"]
    alerts = [rule for group in groups for rule in group["rules"] if rule["type"] == "alerting"]
    assert alerts
    for alert in alerts:
        base, _, page = alert["annotations"]["runbook_url"].rpartition("/runbooks/")
        assert base == f"http://127.0.0.1:{stack.ports['monitor']}"
        assert stack.get("monitor", f"/runbooks/{page}")[0] == 200
        assert alert["annotations"]["dashboard_url"].startswith(f"http://127.0.0.1:{stack.ports['grafana']}/d/")


def test_the_job_is_in_prometheus(stack: Stack, wait_until: WaitUntil) -> None:
    """The demo's steps arrive, and the usual norm of its gradients, which the dashboards draw."""
    wait_until(lambda: stack.query('gradiometer_steps_total{run_id=~"stack-demo-.+"} > 5'))
    wait_until(lambda: stack.query('gradiometer_grad_norm_baseline{run_id=~"stack-demo-.+"} > 0'))


@pytest.mark.parametrize("path", sorted(DASHBOARDS.glob("*.json")), ids=lambda path: path.stem)
def test_dashboards_answer(path: Path, stack: Stack, wait_until: WaitUntil) -> None:
    """The first panels of each dashboard that Grafana is given have something to show of the job."""
    prometheus = Prometheus(url=f"http://127.0.0.1:{stack.ports['prometheus']}")
    board = json.loads(path.read_text())

    def shown() -> bool:
        now = time.time()
        view = View(dashboard=board, prometheus=prometheus, start=now - 300, end=now, scrape_interval=5)
        return any(answer.series for panel in view.panels[:4] for answer in view.answers(panel))

    wait_until(shown)


def test_alertmanager_can_tell_the_monitor(stack: Stack, wait_until: WaitUntil) -> None:
    """An alert that asks for an action goes through Alertmanager to the monitor, which accepts it by its token."""
    alert = [{"labels": {"alertname": "Test", "action": "nothing", "run_id": "none", "job": "gradiometer"}}]
    url = f"http://127.0.0.1:{stack.ports['alertmanager']}/api/v2/alerts"
    request = urllib.request.Request(url, json.dumps(alert).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).close()
    token = (stack.state / "secrets" / "prometheus_token").read_text()

    def accepted() -> bool:
        said = stack.get("alertmanager", "/metrics")[1]
        sent = re.search(r'alertmanager_notification_requests_total{integration="webhook"} (\d+)', said)
        failed = re.search(r'notification_requests_failed_total{integration="webhook"} (\d+)', said)
        return sent is not None and failed is not None and int(sent[1]) > int(failed[1])

    wait_until(accepted)
    assert stack.get("monitor", "/metrics", token)[0] == 200


def test_grafana_has_what_the_compose_file_gives_it(stack: Stack) -> None:
    """Grafana listens on loopback, with the same files, its password read from the secret, and its own data folder."""
    arguments, variables = json.loads((stack.state / "data" / "grafana-data" / "seen.json").read_text())
    assert arguments == ["--homepath=/usr/share/grafana"]
    assert variables["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert variables["GF_SERVER_ROOT_URL"] == f"http://127.0.0.1:{stack.ports['grafana']}/"
    assert variables["GF_SECURITY_ADMIN_PASSWORD"] == f"$__file{{{stack.state}/secrets/grafana_admin_password}}"
    assert variables["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert Path(variables["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]).is_file()
    sources = Path(variables["GF_PATHS_PROVISIONING"], "datasources", "gradiometer.yml").read_text()
    assert f"http://127.0.0.1:{stack.ports['prometheus']}" in sources
    provider = Path(variables["GF_PATHS_PROVISIONING"], "dashboards", "gradiometer.yml").read_text()
    assert str(ROOT / "dashboards" / "gradiometer_dashboards" / "json") in provider


def test_nothing_listens_beyond_loopback(stack: Stack) -> None:
    """Each part has the one address that it was given."""
    listening = [
        connection.laddr
        for child in stack.children()
        for connection in child.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert sorted(address.port for address in listening) == sorted(stack.ports.values())
    assert {address.ip for address in listening} == {"127.0.0.1"}


def _ended(tmp_path: Path, ports: dict[str, int], *options: str, path: str = "") -> tuple[int, str]:
    """Start a stack that cannot be; return its exit status, and what it says."""
    made = _start(tmp_path, ports, *options, path=path)
    return made.process.wait(timeout=120), made.said()


def test_what_cannot_be_started_is_said(stack: Stack, tmp_path: Path) -> None:
    """A port or folder that is taken, two parts on one port, and packages that are missing, each with a remedy."""
    free = _ports()
    status, said = _ended(tmp_path, free | {"prometheus": stack.ports["prometheus"]})
    assert status == 2
    assert f"port {stack.ports['prometheus']}, which prometheus needs, is taken" in said
    assert "STACK_ARGS='--prometheus-port PORT'" in said
    status, said = _ended(tmp_path, free | {"monitor": free["prometheus"]})
    assert status == 2
    assert "which another part has as well" in said
    status, said = _ended(tmp_path, free, "--state", str(stack.state))
    assert status == 2
    assert f"another stack uses {stack.state}" in said
    status, said = _ended(tmp_path, free, path=str(tmp_path))
    assert (status, "sudo apt install prometheus prometheus-alertmanager" in said) == (2, True)
    assert "Traceback" not in said
    assert not (tmp_path / "state" / "data").exists()


def _gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_one_that_ends_ends_all(stack: Stack, tmp_path: Path, wait_until: WaitUntil) -> None:
    """When a part is killed the others are stopped, and it is said which it was."""
    made = _start(tmp_path, _ports(), "--no-demo", "--no-grafana")
    try:
        wait_until(lambda: "| ready:" in made.said(), 120)
        children = made.children()
        assert len(children) == 3
        made.child("alertmanager.yml").kill()
        assert made.process.wait(timeout=60) == 1
    finally:
        made.process.kill()
        made.process.wait()
    assert _gone(children)
    assert "alertmanager was killed by SIGKILL" in made.said()
    assert (tmp_path / "state" / "data" / "prometheus-data").is_dir()


@pytest.fixture
def full_pipe() -> Iterator[tuple[int, int]]:
    """Give both ends of a pipe that nobody reads and that takes no further byte."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b".")
    os.set_blocking(writing, True)
    yield reading, writing
    os.close(reading)
    os.close(writing)


def test_it_works_and_ends_though_nobody_reads(
    stack: Stack, tmp_path: Path, wait_until: WaitUntil, full_pipe: tuple[int, int]
) -> None:
    """A pager that shows its first page stops no part while the stack runs, and not the end of it."""
    assert stack.process.poll() is None  # its programs are there
    made = _start(tmp_path, _ports(), "--no-demo", "--no-grafana", stdout=full_pipe[1])
    try:
        wait_until(lambda: all(made.get(part, "/-/ready")[0] == 200 for part in PARTS[:3]))
        children = made.children()
        assert len(children) == 3
        made.process.send_signal(signal.SIGTERM)
        assert made.process.wait(timeout=20) == 0
    finally:
        made.process.kill()
        made.process.wait()
    assert _gone(children)


STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(600)"
)
HOLDER = """
import sys
from deploy.stack import processes as module
module.STOP_SECONDS = 600.0
with module.Processes(8) as processes:
    processes.start(module.Part(name="part", command=[sys.executable, "-c", sys.argv[1]]))
    processes.watch()
    processes.say("stopping")
"""


@pytest.fixture
def held(spawn: Spawn) -> Callable[[str], tuple[subprocess.Popen[str], psutil.Process]]:
    """Give a function that starts a holder with one part, which runs some Python, and returns both once that prints.

    The holder waits for ten minutes for its part to end.
    """

    def start(code: str) -> tuple[subprocess.Popen[str], psutil.Process]:
        holder = spawn(sys.executable, "-c", HOLDER, code, cwd=ROOT, stdout=subprocess.PIPE)
        assert holder.stdout is not None
        assert "| here" in holder.stdout.readline()
        (part,) = psutil.Process(holder.pid).children()
        return holder, part

    return start


def test_a_line_that_never_ends_is_told_in_parts(
    held: Callable[[str], tuple[subprocess.Popen[str], psutil.Process]],
) -> None:
    """What a part prints without an end of line is passed on, and not kept until there is one."""
    holder, _ = held("import time; print('here' + 'x' * 40_000, end='', flush=True); time.sleep(600)")
    holder.send_signal(signal.SIGTERM)
    assert holder.wait(timeout=60) == 0


TALKATIVE = "print('here', flush=True)\nfor number in range({}): print(number)\n"


def _full(stream: IO[str]) -> bool:
    """Tell whether a pipe that is read no further has hardly any room left."""
    (waiting,) = struct.unpack("i", fcntl.ioctl(stream, termios.FIONREAD, bytes(4)))
    return bool(waiting > 0.9 * fcntl.fcntl(stream, fcntl.F_GETPIPE_SZ))


def test_nobody_waits_for_a_reader(held: Any, wait_until: WaitUntil) -> None:
    """A part that says more than anybody reads goes on, and the end comes as ever."""
    holder, part = held(TALKATIVE.format(10**12))
    wait_until(lambda: _full(holder.stdout))
    spent = part.cpu_times().user
    wait_until(lambda: part.cpu_times().user > spent + 0.3)
    holder.send_signal(signal.SIGTERM)
    assert holder.wait(timeout=10) == 0
    assert _gone([part])


def test_what_is_left_out_is_told_in_its_place(held: Any, wait_until: WaitUntil, tmp_path: Path) -> None:
    """Who reads late finds lines whole and in order, and where some are missing, how many."""
    done, lines = tmp_path / "done", 60_000
    code = f"import pathlib, sys, time; sys.stdout.flush(); pathlib.Path({str(done)!r}).touch(); time.sleep(600)"
    holder, _ = held(f"{TALKATIVE.format(lines)}{code}")
    wait_until(done.exists)
    expected, missing = 0, 0
    while expected < lines:
        line = holder.stdout.readline().split("|")[-1].strip()
        if found := re.fullmatch(r"\((\d+) lines were left out here: nothing read them in time\)", line):
            missing += int(found[1])
            expected += int(found[1])
        else:
            assert line == str(expected)
            expected += 1
    assert (expected, missing > 10_000) == (lines, True)
    holder.send_signal(signal.SIGTERM)
    assert holder.wait(timeout=10) == 0


def test_a_reader_that_goes_ends_the_stack(held: Any) -> None:
    """Whoever quits the pager does not leave servers behind."""
    holder, part = held(TALKATIVE.format(10**12))
    holder.stdout.close()
    assert holder.wait(timeout=10) == 0
    assert _gone([part])


def test_a_part_that_does_not_listen_is_killed_when_asked_twice(held: Any) -> None:
    """The first Ctrl-C waits for a part to end in order; the second does not."""
    holder, part = held(STUBBORN)
    holder.send_signal(signal.SIGINT)
    assert "| stopping" in holder.stdout.readline()
    assert part.is_running()
    holder.send_signal(signal.SIGINT)
    assert holder.wait(timeout=60) == 0
    assert not part.is_running()


RESTLESS = """
from deploy.stack import processes as module
module.LOOK_SECONDS = 0.0
with module.Processes(8) as processes:
    processes.say("here")
    processes.watch()
"""


def test_the_end_may_be_asked_for_at_any_moment(spawn: Spawn) -> None:
    """A signal that comes in the midst of a look, as most do where no pause is between two, is one like others."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) * 3:
        holder = spawn(sys.executable, "-c", RESTLESS, cwd=ROOT, stdout=subprocess.PIPE)
        assert holder.stdout is not None
        assert "| here" in holder.stdout.readline()
        holder.send_signal(number)
        assert holder.wait(timeout=60) == 0


def test_parts_do_not_outlive_the_one_that_holds_them(held: Any) -> None:
    """Also after SIGKILL, which nobody can act on, the kernel ends what was started."""
    holder, part = held("import time; print('here', flush=True); time.sleep(600)")
    holder.kill()
    holder.wait()
    assert _gone([part])


def test_it_ends_in_order(stack: Stack) -> None:
    """At Ctrl-C all end within seconds, the job as one that is finished, and no process is left. The last test."""
    children = stack.children()
    stack.process.send_signal(signal.SIGINT)
    assert stack.process.wait(timeout=60) == 0
    assert _gone(children)
    assert "See you next time!" in stack.said()  # Prometheus, which has written what it had
    assert "Traceback" not in stack.said()
    (run,) = (stack.state.parent / "runs").glob("stack-demo-*")
    assert open_run(run).status["state"] == State.FINISHED
