"""What a request may cost: sizes, time, connections; and what a page of the web may not do."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import pytest

from tests._monitor import Monitor
from tests._web import AS_WRITER, connect, read_to_end, send, with_tokens, write_config

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Start, WaitUntil

    Limited = Callable[..., Monitor]

POLICY = "/api/v1/runs/run/policy"
HEAD = b"GET /-/ready HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def limited(shared_start: Start, tmp_path_factory: pytest.TempPathFactory) -> Limited:
    """Give a function that starts a daemon with these limits, or gives the one that has been."""
    started: dict[tuple[Any, ...], Monitor] = {}

    def launch(**limits: Any) -> Monitor:
        key = tuple(limits.items())
        if key not in started:
            config = write_config(tmp_path_factory.mktemp("config") / "monitor.yaml", limits=limits)
            started[key] = shared_start("--config", config)
        return started[key]

    return launch


@pytest.fixture(scope="module")
def tight(limited: Limited) -> Monitor:
    """Give a daemon that takes little of each part of a request."""
    return limited(max_body_bytes=2048, max_header_bytes=4096, max_query_bytes=300)


@pytest.fixture(scope="module")
def writable(shared_start: Start, tmp_path_factory: pytest.TempPathFactory) -> Monitor:
    """Give a daemon that a token may write to."""
    return shared_start(*with_tokens(tmp_path_factory.mktemp("config")))


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


@pytest.mark.parametrize("chunked", [False, True])
def test_a_long_body_is_413(tight: Monitor, chunked: bool) -> None:
    """A body beyond the limit is refused, said by its length or found while it comes, and one within it is not."""
    for size, expected in ((2049, 413), (2000, 405)):
        head = "PUT /api/v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        body = json.dumps({"policy": None, "note": ""}).encode().ljust(size)
        with connect(tight) as connection:
            if chunked:
                chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:1000], body[1000:]))
                connection.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n")
            else:
                connection.sendall(f"{head}Content-Length: {size}\r\n\r\n".encode() + body)
            assert status(connection.recv(4096)) == expected


def test_a_body_is_not_waited_for_from_who_may_not(tight: Monitor) -> None:
    """Who may not change anything is told so by the headers alone, whatever the length of the body."""
    for length in (10, 10**9):
        with connect(tight) as connection:
            connection.sendall(f"PUT {POLICY} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode())
            assert status(connection.recv(4096)) == 403


@pytest.mark.parametrize("parts", [1, 40], ids=["at once", "in parts"])
def test_long_headers_are_431(tight: Monitor, parts: int) -> None:
    """Headers beyond the limit are refused however they come, as JSON that names the limit."""
    with connect(tight) as connection:
        text = HEAD + b"X-Long: " + b"a" * 8000 + b"\r\n\r\n"
        size = -(-len(text) // parts)
        try:
            for place in range(0, len(text), size):
                connection.sendall(text[place : place + size])
                time.sleep(0.002)  # so that they are not put together on the way
        except ConnectionError:
            pass  # refused before the last part
        answer = b""
        while not answer.endswith(b"}") and (part := connection.recv(4096)):  # head and body come apart
            answer += part
    assert status(answer) == 431
    assert b"the headers are longer than 4096 bytes" in answer


def test_a_long_query_is_414(tight: Monitor) -> None:
    """A query beyond the limit is refused."""
    assert tight.get("/api/v1/runs?" + "a" * 301)[0] == 414
    assert tight.get("/metrics?" + "a" * 300)[0] == 200


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (b"", 0),
        (b"GET /-/ready HT", 408),
        (HEAD, 408),
        (b"PUT /api/v1/runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{", 408),
        (HEAD + b"Content-Length: 1000000\r\n\r\n", 408),
    ],
    ids=["nothing", "part of a line", "part of the headers", "part of a body", "no body"],
)
def test_a_slow_client_is_cut_off(limited: Limited, said: bytes, expected: int) -> None:
    """A request that does not arrive whole in time is 408 or just closed, though bytes of it keep coming."""
    monitor = limited(request_seconds=0.6)
    with connect(monitor) as connection:
        connection.sendall(said)
        connection.settimeout(0.1)
        answer, began = b"", time.monotonic()
        while time.monotonic() - began < 30:
            with suppress(ConnectionError):  # cut off: what was answered before is there to be read
                if said:
                    connection.sendall(b"a")
            try:
                part = connection.recv(4096)
            except TimeoutError:
                continue
            except ConnectionError:
                break
            if not part:
                break
            answer += part
        else:
            pytest.fail("the connection is still open after 30 s")
    assert status(answer) == expected


def test_what_is_no_request_is_400(start: Start) -> None:
    """Bytes that are no HTTP are answered and closed, in the middle of a connection too, and logged seldom."""
    monitor = start()
    for before in (b"", HEAD + b"\r\n"):
        with connect(monitor) as connection:
            connection.sendall(before + b"\x16\x03\x01 nonsense\r\n\r\n")
            answer = read_to_end(connection)
        assert status(answer.split(b"healthy")[-1].split(b"ready\n")[-1]) == 400
    for _ in range(50):
        with connect(monitor) as connection:
            connection.sendall(b"\0\r\n\r\n")
            read_to_end(connection)
    log = monitor.end()
    assert 1 <= log.count("Invalid HTTP request") <= 12
    assert "Traceback" not in log


def test_who_takes_nothing_is_cut_off(limited: Limited, wait_until: WaitUntil) -> None:
    """A client that asks again and again and reads nothing is cut off; nobody else notices."""
    monitor = limited(answer_seconds=1)
    with connect(monitor) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(0.2)

        def cut() -> bool:
            try:
                connection.sendall(b"GET /api/v1/openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 50)
            except TimeoutError:
                return False
            except ConnectionError:
                return True
            return False

        wait_until(cut)
    assert monitor.get("/metrics")[0] == 200


@pytest.mark.parametrize("said", [b"", HEAD, HEAD + b"\r\n"], ids=["silent", "slow", "idle"])
def test_who_holds_connections_keeps_nobody_out(limited: Limited, said: bytes) -> None:
    """With every connection taken by clients that are waited for, a scrape is served at once."""
    monitor = limited(max_connections=16, max_connections_per_client=12, request_seconds=60)
    with ExitStack() as stack:
        held = [stack.enter_context(connect(monitor)) for _ in range(12)]
        for connection in held:
            connection.sendall(said)
        for _ in range(20):
            assert monitor.get("/metrics")[0] == 200
        held[0].settimeout(20)
        assert b"HTTP/1.1 200" not in read_to_end(held[0])[20:] or said  # the longest waiting made room


def test_requests_that_are_worked_on_are_bounded() -> None:
    """Of more requests to the API than have a place the others wait, and are served when one is free."""
    import anyio

    from gradiometer_monitor.web.guards import CONCURRENT, TimeGuard
    from gradiometer_monitor.web.settings import LimitSettings

    begun, served = 0, 0

    async def main() -> None:
        gate = anyio.Event()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            nonlocal begun
            begun += 1
            await gate.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def collect(message: Any) -> None:
            nonlocal served
            served += message["status"] == 200

        async def receive() -> Any:
            return {"type": "http.request"}

        guard = TimeGuard(slow, LimitSettings())
        async with anyio.create_task_group() as group:
            for _ in range(CONCURRENT + 5):
                group.start_soon(guard, {"type": "http", "path": "/api/v1/runs"}, receive, collect)
            await anyio.wait_all_tasks_blocked()
            assert (begun, served) == (CONCURRENT, 0)
            gate.set()

    anyio.run(main)
    assert begun == served == CONCURRENT + 5


def test_a_slow_answer_is_given_up() -> None:
    """An answer of the API that does not begin in time is 504, and what comes after it reaches nobody."""
    import anyio

    from gradiometer_monitor.web.guards import TimeGuard
    from gradiometer_monitor.web.settings import LimitSettings

    sent: list[Any] = []
    release = anyio.Event

    async def main() -> None:
        gate = release()

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            await gate.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def collect(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request"}

        guard = TimeGuard(slow, LimitSettings(answer_seconds=1.0))
        await guard({"type": "http", "path": "/api/v1/runs", "method": "GET", "headers": []}, receive, collect)
        gate.set()
        await anyio.sleep(0.05)

    anyio.run(main)
    assert [message.get("status") for message in sent] == [504, None]


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({}, 404),
    ],
)
def test_a_page_of_the_web_cannot_write(writable: Monitor, headers: dict[str, str], expected: int) -> None:
    """A write that a foreign page could make a browser send is refused, even if it had a token."""
    found, body, _ = send(writable, "PUT", POLICY, {"policy": None}, **AS_WRITER, **headers)
    assert found == expected, body


def test_the_own_page_may_write(writable: Monitor) -> None:
    """The page that the monitor itself serves sends its own Origin, and is let through."""
    headers = {"Origin": writable.url, "Sec-Fetch-Site": "same-origin"}
    assert send(writable, "PUT", POLICY, {"policy": None}, **AS_WRITER, **headers)[0] == 404


@pytest.mark.parametrize("path", ["/", "/metrics", "/api/v1/runs", "/-/ready", "/nothing", "/api/v1/runs?limit=x"])
def test_every_answer_has_the_headers_that_guard_a_browser(tight: Monitor, path: str) -> None:
    """No type is guessed, no frame and no foreign page may show it, no script of elsewhere runs, nothing is shared."""
    headers = tight.get(path, Origin="https://evil.example")[2]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    policy = headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert "cache-control" in headers
    assert not [name for name in headers if name.lower().startswith("access-control-")]
