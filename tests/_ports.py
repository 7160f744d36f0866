"""Ports of loopback for programs that must be told theirs before they start."""

from __future__ import annotations

import random
import socket
from pathlib import Path

__all__ = ["free_ports"]

FIRST = 10_000
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Return so many different ports that were free a moment ago, and that this process has not been given before.

    They are below those that the kernel gives to whoever asks for any: between now and the start of the program, or
    while it is down, no other test's server or connection comes by one of them.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(FIRST, _end())
        if port not in _given and _is_free(port):
            _given.add(port)
            ports.append(port)
    return ports


def _end() -> int:
    """Return the first port that the kernel gives to whoever asks for any; 32768 is Linux' usual one."""
    try:
        return max(FIRST + 1000, int(EPHEMERAL.read_text().split()[0]))
    except OSError:
        return 32_768


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True
