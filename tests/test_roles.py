"""What each role may do: every route with every role, roles that change, and what is said of a refusal."""

from __future__ import annotations

import http.client
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route
from typer.testing import CliRunner

from gradiometer.cli import app as cli
from gradiometer_monitor.web.roles import PERMISSIONS, ROLES, Needs, needs
from gradiometer_monitor.web.tokens import Tokens
from tests._monitor import Monitor
from tests._web import made_app, send, write_config, write_tokens

if TYPE_CHECKING:
    from tests.conftest import Start, WaitUntil

TOKENS = {role: f"a-token-for-{role}-0123456789-ABCDEFGHIJ" for role in ("metrics", "alerts", "read", "write")}
READERS = {"read", "write"}
MAY = {
    "GET /metrics": {"metrics", "read", "write"},
    "POST /api/v1/alerts": {"alerts", "write"},
    "PUT /api/v1/runs/{run_id}/policy": {"write"},
    "GET /api/v1/runs/{run_id}/policy": READERS,
    "GET /api/v1/openapi.json": READERS,
    "GET /api/v1/runs": READERS,
    "GET /api/v1/runs/{run_id}": READERS,
    "GET /api/v1/runs/{run_id}/events": READERS,
    "GET /api/v1/runs/{run_id}/layers": READERS,
    "GET /api/v1/runs/{run_id}/rows": READERS,
    "GET /api/v1/events": READERS,
    "GET /api/v1/stream": READERS,
}
"""Who may use what is not open; another route needs a line here."""
OPEN = {"/", "/-/healthy", "/-/ready", "/runbooks", "/runbooks/", "/runbooks/{name}"}
"""What needs no token, beside the files of the page."""


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> list[Route]:
    """Give all routes of the application."""
    with made_app(tmp_path_factory.mktemp("app")) as made:
        found = [route for route in made.routes if isinstance(route, Route)]
        assert len(found) == len(made.routes)
    return found


@pytest.fixture(scope="module")
def monitor(shared_start: Start, tmp_path_factory: pytest.TempPathFactory) -> Monitor:
    """Start a daemon that has a token of each role."""
    directory = tmp_path_factory.mktemp("config")
    tokens = write_tokens(directory / "tokens", *(f"{role} a-{role} {token}" for role, token in TOKENS.items()))
    return shared_start("--config", write_config(directory / "monitor.yaml", auth={"tokens_file": str(tokens)}))


def ask(monitor: Monitor, method: str, path: str, role: str | None) -> tuple[int, str, str]:
    """Ask with the token of a role, or with none: status, what is told of a refusal, and the challenge."""
    connection = http.client.HTTPConnection(monitor.url.removeprefix("http://"), timeout=60)
    headers = {} if role is None else {"authorization": f"Bearer {TOKENS[role]}"}
    if method in ("PUT", "POST"):
        headers["content-type"] = "application/json"
    try:
        connection.request(method, path, b"{}" if method in ("PUT", "POST") else None, headers)
        with connection.getresponse() as answer:  # of a stream no more than its beginning
            refused = answer.status in (401, 403, 429) and method != "HEAD"
            detail = json.loads(answer.read())["detail"] if refused else ""
            return answer.status, detail, answer.headers.get("www-authenticate", "")
    finally:
        connection.close()


def test_every_route_is_in_the_matrix(routes: list[Route]) -> None:
    """No route but those above and the files of the page is served, and of the open ones nothing can be changed."""
    found = {f"{method} {route.path}" for route in routes for method in (route.methods or set()) - {"HEAD"}}
    files = {each for each in found if each.startswith("GET /static/")}
    assert len(files) > 10
    assert found - files == MAY.keys() | {f"GET {path}" for path in OPEN}


@pytest.mark.parametrize("role", [None, *TOKENS])
def test_every_role_is_held_to_at_every_route(monitor: Monitor, routes: list[Route], role: str | None) -> None:
    """What a role may is answered; the rest is 403 with the role that the token has and those that would do."""
    for route in routes:
        path = route.path.replace("{run_id}", "run").replace("{name}", "Spike")
        for method in route.methods or ():
            allowed = MAY.get(f"{'GET' if method == 'HEAD' else method} {route.path}")
            status, detail, challenge = ask(monitor, method, path, role)
            where = f"{method} {path} as {role}: {status} {detail}"
            if allowed is None or role in allowed:
                assert status not in (401, 403, 429, 500, 503), where
            elif role is None:
                assert status in (401, 429), where
            else:
                assert status == 403, where
                assert challenge.endswith('error="insufficient_scope"'), where
                if method != "HEAD":
                    has, _, wanted = detail.partition(": this needs one with ")
                    assert has == f"the token of a-{role} has the role '{role}'"
                    assert {each for each in TOKENS if f"'{each}'" in wanted} == allowed, where


@pytest.mark.parametrize("role", ["metrics", "alerts"])
def test_what_is_not_there_is_no_way_around(monitor: Monitor, role: str) -> None:
    """A method that a path has not is refused as the path's own is; a path that is not there is 404, as for all."""
    assert ask(monitor, "DELETE", "/api/v1/runs/run/policy", role)[0] == 403
    assert ask(monitor, "OPTIONS", "/api/v1/runs", role)[0] == 403
    assert ask(monitor, "GET", "/api/v1/runs/", role)[0] == 404
    for path in ("/metrics/../api/v1/runs", "//api/v1/runs", "/api/v1/alerts/../runs", "/static/../api/v1/runs"):
        assert ask(monitor, "GET", path, role)[0] == 404, path
    for path in ("/api/v1/%72uns", "/api/v1/runs?x=/metrics", "/api/v1/runs#/metrics", "/api/v1/runs;/metrics"):
        assert ask(monitor, "GET", path, role)[0] in (403, 404), path


def test_a_refusal_is_counted_at_its_route(monitor: Monitor) -> None:
    """The metrics tell at which route a role did not suffice."""
    assert ask(monitor, "PUT", "/api/v1/runs/run/policy", "alerts")[0] == 403
    text = monitor.get("/metrics", Authorization=f"Bearer {TOKENS['metrics']}")[1].decode()
    (line,) = [each for each in text.splitlines() if "/policy" in each and 'code="403"' in each]
    assert line.startswith('gradiometer_http_requests_total{path="/api/v1/runs/{run_id}/policy"')


def test_a_token_is_given_another_role(
    start: Start, wait_until: WaitUntil, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The same token may do what its line says now, within a second and without a restart, less as well as more."""
    directory = tmp_path_factory.mktemp("config")
    path, token = directory / "tokens", TOKENS["write"]
    write_tokens(path, f"write alertmanager {token}")
    monitor = start("--config", write_config(directory / "monitor.yaml", auth={"tokens_file": str(path)}))
    header = {"Authorization": f"Bearer {token}"}

    def statuses() -> tuple[int, ...]:
        changing = ("PUT", "/api/v1/runs/run/policy"), ("POST", "/api/v1/alerts")
        changed = (send(monitor, method, where, {}, **header)[0] for method, where in changing)
        return (*changed, *(monitor.get(where, **header)[0] for where in ("/metrics", "/api/v1/runs")))

    def held(expected: tuple[int, ...]) -> bool:
        return statuses() == expected

    assert held((422, 422, 200, 200))
    for role, expected in (
        ("alerts", (403, 422, 403, 403)),
        ("metrics", (403, 403, 200, 403)),
        ("read", (403, 403, 200, 200)),
        ("write", (422, 422, 200, 200)),
    ):
        write_tokens(path, f"{role} alertmanager {token}")
        wait_until(partial(held, expected))


def test_a_route_that_declares_nothing_is_no_route() -> None:
    """A handler that does not say what it needs, or a part whose routes cannot be asked, ends the start."""

    async def forgotten(_: Request) -> Response:
        return PlainTextResponse("all that there is")

    for route in (Route("/forgotten", forgotten), Mount("/part", routes=[])):
        with pytest.raises(TypeError, match=r"put @needs"):
            Needs([route])
    assert Needs([Route("/said", needs("read")(forgotten))]).find({"type": "http", "path": "/other"}) is None


def test_the_command_makes_tokens_of_each_role(tmp_path: Path) -> None:
    """``gradiometer token`` knows each role and tells what it may; another is refused with those there are."""
    path, runner = tmp_path / "tokens", CliRunner()
    for role in TOKENS:
        made = runner.invoke(cli, ["token", role, f"a-{role}", "--file", str(path)])
        assert made.exit_code == 0, made.output
        found = Tokens(path).find(made.stdout.strip().encode())
        assert found is not None
        assert (found.name, found.role) == (f"a-{role}", role)
    refused = runner.invoke(cli, ["token", "admin", "somebody", "--file", str(path)])
    assert refused.exit_code == 2
    said = " ".join(runner.invoke(cli, ["token", "--help"]).output.split())
    for role, may in ROLES.items():
        assert f"'{role}'" in refused.output
        assert f"{role}: {', '.join(PERMISSIONS[each] for each in may)}" in said
    assert len(path.read_text().splitlines()) == 4
