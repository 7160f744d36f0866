"""``make stack``: the stack of docker-compose.yml without Docker, from Debian's packages, for one user on loopback.

Started are the monitor, Prometheus, Alertmanager, Grafana where it is installed, and a demo job. All end together: at
Ctrl-C, SIGTERM, or when one of them does.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from platformdirs import user_state_path

from deploy.stack.compose import PORTS, Places, load_services
from deploy.stack.parts import PACKAGES, PROGRAMS, find_programs, make_part
from deploy.stack.processes import Part, Processes, StackError
from gradiometer.records import default_root

REPOSITORY = Path(__file__).resolve().parents[2]
HEALTH_SECONDS = 90.0


def main() -> int:
    """Run the stack; return 0 if it was asked to end, 1 if a part of it did, 2 if it cannot be started."""
    options = _options()
    os.umask(0o077)  # data and logs are as private as what they are about, wherever --state is
    for name in [name for name in os.environ if name.startswith("GRADIOMETER_MONITOR_")]:
        del os.environ[name]  # it is the files of the stack that count
    ports = {name: getattr(options, f"{name}_port") for name in PORTS}
    try:
        programs = find_programs()
        if not options.grafana:
            programs.pop("grafana", None)
        started = ["monitor", *programs]
        _check_ports({name: ports[name] for name in started})
        options.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(options.state), Processes(max(map(len, PORTS))) as processes:
            _run(processes, _places(options, ports, programs), programs, demo=options.demo)
    except (StackError, OSError) as error:
        print(f"make stack: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, EndedError) else 2
    return 0


class EndedError(StackError):
    """The stack had been started, and a part of it ended."""


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make stack", description="Run the stack of docker-compose.yml without Docker."
    )
    add = parser.add_argument
    add("--dir", type=Path, default=None, help="where runs live; GRADIOMETER_DIR, or the user's state directory")
    add("--state", type=Path, default=user_state_path("gradiometer") / "stack", help="data and secrets: %(default)s")
    add("--no-demo", dest="demo", action="store_false", help="start no job that trains")
    add("--no-grafana", dest="grafana", action="store_false", help="leave Grafana out, though it is installed")
    for name, port in PORTS.items():
        add(f"--{name}-port", type=int, default=port, metavar="PORT", help=f"of {name}, on loopback: {port}")
    return parser.parse_args()


def _check_ports(ports: Mapping[str, int]) -> None:
    """Raise StackError unless each port is free, and nobody else's here."""
    for name, port in ports.items():
        remedy = f"choose another: make stack STACK_ARGS='--{name}-port PORT'"
        if not 1 <= port <= 65535:
            raise StackError(f"--{name}-port is {port}: expected 1 to 65535")
        if list(ports.values()).count(port) > 1:
            raise StackError(f"--{name}-port is {port}, which another part has as well: {remedy}")
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                service = f" (if it is Debian's: sudo systemctl stop {PACKAGES[name]})" if name in PACKAGES else ""
                raise StackError(
                    f"port {port}, which {name} needs, is taken: stop what listens there{service}, or {remedy}"
                ) from error


def _locked(state: Path) -> TextIO:
    """Hold the state folder for this stack alone, as long as what is returned is open."""
    lock = (state / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise StackError(f"another stack uses {state}: stop it, or choose another folder with --state") from error
    return lock


def _places(options: argparse.Namespace, ports: Mapping[str, int], programs: Mapping[str, str]) -> Places:
    """Make the secrets and the directory of runs, and say where all is."""
    state: Path = options.state.resolve()
    shutil.rmtree(state / "config", ignore_errors=True)  # copies of an earlier start
    secrets = state / "secrets"
    runs = default_root(options.dir).resolve()
    runs.mkdir(parents=True, exist_ok=True, mode=0o700)
    script = REPOSITORY / "deploy" / "prepare.sh"
    environment = os.environ | {"GRADIOMETER_SECRETS": str(secrets)}
    done = subprocess.run(
        ["sh", script, "--only-secrets"], env=environment, check=False, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise StackError(done.stderr.strip())
    return Places(
        repository=REPOSITORY,
        state=state,
        runs=runs,
        secrets=secrets,
        ports=ports,
        without=frozenset(set(PROGRAMS) - set(programs)),
    )


def _run(processes: Processes, places: Places, programs: Mapping[str, str], *, demo: bool) -> None:
    """Start all parts, say where they are once they work, and wait for the end."""
    services = load_services(REPOSITORY / "docker-compose.yml")
    parts = [make_part(services[name], places, programs.get(name)) for name in ("monitor", *programs)]
    if demo:
        command = (sys.executable, "-u", str(REPOSITORY / "deploy" / "demo.py"), "--dir", str(places.runs))
        parts.append(Part(name="demo", command=command))
    for part in parts:
        processes.start(part)
    try:
        processes.await_health(HEALTH_SECONDS)
        if not processes.stopping:
            _introduce(processes, places, demo=demo)
        processes.watch()
    except StackError as error:
        raise EndedError(f"{error}\n(all others were stopped)") from error
    processes.say("stopping")


def _introduce(processes: Processes, places: Places, *, demo: bool) -> None:
    """Say where everything is."""
    secrets, ports = places.secrets, places.ports
    lines = ["ready:"]
    lines.append(
        f"  monitor       http://127.0.0.1:{ports['monitor']}    asks for the token in {secrets}/browser_token"
    )
    lines.append(f"  Prometheus    http://127.0.0.1:{ports['prometheus']}")
    lines.append(f"  Alertmanager  http://127.0.0.1:{ports['alertmanager']}")
    if "grafana" in places.without:
        lines.append(
            "  Grafana       is left out: not installed, or not wanted; the monitor's page shows runs without it"
        )
    else:
        password = secrets / "grafana_admin_password"
        lines.append(f"  Grafana       http://127.0.0.1:{ports['grafana']}    user admin, password in {password}")
    lines.append(f"  runs          {places.runs}{'    a demo job trains there' if demo else ''}")
    lines.append(f"  state         {places.state}")
    lines.append("Ctrl-C stops all.")
    for line in lines:
        processes.say(line)


if __name__ == "__main__":
    sys.exit(main())
