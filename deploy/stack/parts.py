"""Which programs the stack is made of, where they are installed, and how each is started without its container."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from deploy.stack.compose import Places, Service
from deploy.stack.processes import Part, StackError

__all__ = ["PACKAGES", "PROGRAMS", "find_programs", "make_part"]

PROGRAMS = {
    "prometheus": ("prometheus",),
    "alertmanager": ("prometheus-alertmanager", "alertmanager"),
    "grafana": ("grafana-server", "grafana"),
}
"""What each program is called, by Debian or by those who make it."""
PACKAGES = {"prometheus": "prometheus", "alertmanager": "prometheus-alertmanager"}
ELSEWHERE = ("/usr/sbin", "/usr/share/grafana/bin", "/usr/local/bin")
"""Where programs are that may not be in a user's PATH."""
GRAFANA_HOMES = ("/usr/share/grafana", "/usr/local/share/grafana", "/opt/grafana")
HEALTH_PATHS = {"monitor": "/-/ready", "prometheus": "/-/ready", "alertmanager": "/-/ready", "grafana": "/api/health"}


def find_programs() -> dict[str, str]:
    """Return the path of each program that is installed. Raises StackError if one that must be there is missing."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *ELSEWHERE])
    found = {service: next(filter(None, (shutil.which(name, path=path) for name in names)), None)
             for service, names in PROGRAMS.items()}  # fmt: skip
    missing = [PACKAGES[service] for service in PACKAGES if found[service] is None]
    if missing:
        raise StackError(
            f"{' and '.join(missing)} must be installed: sudo apt install {' '.join(missing)}\n"
            "(Debian starts them as services, which take the ports: sudo systemctl disable --now "
            f"{' '.join(missing)}, or choose other ports)"
        )
    return {service: program for service, program in found.items() if program is not None}


def make_part(service: Service, places: Places, program: str | None) -> Part:
    """Prepare the files of a service, and say how it is started here."""
    paths = places.prepare(service)
    port = places.ports[service.name]
    command = [places.rewrite(word, paths) for word in service.command]
    environment = {name: places.rewrite(value, paths) for name, value in service.environment.items()}
    listen = [f"--web.listen-address=127.0.0.1:{port}"]
    if service.name == "monitor":
        whole = [sys.executable, "-m", "gradiometer_monitor", *command, "--host", "127.0.0.1", "--port", str(port)]
    elif service.name == "grafana":
        whole, environment = _grafana(str(program), port, paths, environment)
    else:
        whole = [str(program), *command, *listen]
    health = f"http://127.0.0.1:{port}{HEALTH_PATHS[service.name]}"
    return Part(name=service.name, command=whole, environment=environment, health=health)


def _grafana(
    program: str, port: int, paths: Mapping[str, str], environment: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return command and variables of Grafana, for what its image has as defaults and its packages have not."""
    data = paths["/var/lib/grafana"]
    given = {
        "GF_PATHS_DATA": data,
        "GF_PATHS_LOGS": f"{data}/log",
        "GF_PATHS_PLUGINS": f"{data}/plugins",
        "GF_PATHS_PROVISIONING": str(Path(paths["/etc/grafana/provisioning/datasources"]).parent),
        "GF_LOG_MODE": "console",
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(port),
    }
    for name, value in environment.items():  # __FILE is the image's; Grafana itself reads files so
        given[name.removesuffix("__FILE")] = f"$__file{{{value}}}" if name.endswith("__FILE") else value
    home = next((home for home in GRAFANA_HOMES if (Path(home) / "conf" / "defaults.ini").exists()), GRAFANA_HOMES[0])
    start = [program] if Path(program).name == "grafana-server" else [program, "server"]
    return [*start, f"--homepath={home}"], given
