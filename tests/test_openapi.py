"""The OpenAPI document is complete, is the committed one, and is what the API does: schemathesis asks a real daemon."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode

from gradiometer.recorder import Recorder
from tests._monitor import Monitor
from tests._web import AS_WRITER, JOB, made_app, send, with_tokens

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, Spawn, Start, WaitUntil

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "docs" / "openapi.json"
STREAM = "/api/v1/stream"
OWN_REQUESTS = ("ignored_auth", "use_after_free", "ensure_resource_availability")
"""Checks that make requests of their own, in a session that is not ours; what they ask is tested below."""
EXAMPLES = 8
"""Generated requests for each operation, of valid data and of wrong data each."""


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Give the document of an application with default settings, of the version that is being built."""
    with made_app(tmp_path_factory.mktemp("runs")) as made:
        found: dict[str, Any] = made.openapi()
    found["info"]["version"] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return found


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def test_the_committed_document_is_the_one_served(document: dict[str, Any], request: pytest.FixtureRequest) -> None:
    """docs/openapi.json is what the code makes; ``make golden`` writes it anew."""
    if not COMMITTED.parent.is_dir():
        pytest.skip("the documentation is not beside the tests")
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    if request.config.getoption("--update-golden"):
        COMMITTED.write_text(text)
    assert COMMITTED.read_text() == text


def test_everything_is_described(document: dict[str, Any]) -> None:
    """Each operation has summary, description, tag, token and errors; each parameter a description."""
    for path, method, operation in operations(document):
        where = f"{method} {path}"
        assert operation["summary"], where
        assert operation["description"].endswith("."), where
        assert set(operation["tags"]) <= {tag["name"] for tag in document["tags"]}, where
        roles = [role for each in operation["security"] for role in each.get("token", ())]
        assert roles == {"get": ["read", "write"], "post": ["alerts", "write"], "put": ["write"]}[method], where
        assert all(f"`{role}`" in operation["responses"]["403"]["description"] for role in roles), where
        assert ({} in operation["security"]) == (method == "get"), where
        assert {"400", "401", "403", "413", "414", "429", "431", "504"} <= operation["responses"].keys(), where
        for parameter in operation.get("parameters", ()):
            assert parameter.get("description"), f"{where}: {parameter['name']}"


def _bounded(schema: dict[str, Any]) -> bool:
    """Tell whether every number and text that a parameter may be has bounds."""
    if "anyOf" in schema:
        return all(_bounded(each) for each in schema["anyOf"])
    match schema.get("type"):
        case "integer" | "number":
            return "maximum" in schema and ("minimum" in schema or "exclusiveMinimum" in schema)
        case "string":
            return any(name in schema for name in ("maxLength", "pattern", "enum", "const"))
        case "array":
            return "maxItems" in schema and _bounded(schema["items"])
        case _:
            return True


def test_every_parameter_is_bounded(document: dict[str, Any]) -> None:
    """Numbers have a range, texts a length or pattern, lists a length."""
    for path, method, operation in operations(document):
        for parameter in operation.get("parameters", ()):
            assert _bounded(parameter["schema"]), f"{method} {path}: {parameter['name']} {parameter['schema']}"


@pytest.fixture(scope="module")
def served(
    shared_start: Start, shared_spawn: Spawn, make_manifest: MakeManifest, append: Append, wait_until: WaitUntil,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Monitor]:  # fmt: skip
    """Start a daemon over a job that trains, a run that is over, and one of non-finite norms."""
    root = tmp_path_factory.mktemp("runs")
    process = shared_spawn(sys.executable, "-c", JOB, root, stdout=subprocess.PIPE)
    over, bad = (Recorder(root, make_manifest(name, created_ns=time.time_ns())) for name in ("over", "bad"))
    append(over, [[1.0] * 4] * 100)
    over.close()
    append(bad, [[float("nan"), 1.0, float("inf"), 0.0]] * 3)
    assert process.stdout is not None
    assert process.stdout.readline() == "attached\n"
    monitor = shared_start(*with_tokens(tmp_path_factory.mktemp("config")), root=root)
    wait_until(lambda: monitor.get("/api/v1/runs", **AS_WRITER)[1].count(b"run_id") == 3)
    yield monitor
    bad.close()


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "wrong"])
def test_the_api_does_what_the_document_says(served: Monitor, mode: GenerationMode) -> None:
    """Over generated requests to every path but the stream, statuses, bodies, types and tokens are as documented."""
    load_all_checks()
    checks: list[Any] = [check for check in CHECKS.get_all() if check.__name__ not in OWN_REQUESTS]
    schema = schemathesis.openapi.from_url(f"{served.url}/api/v1/openapi.json", headers=AS_WRITER).exclude(path=STREAM)
    schema.config.generation.update(modes=[mode])
    rejected = schema.config.checks.negative_data_rejection
    rejected.expected_statuses = [*rejected.expected_statuses, "414", "431"]  # wrong, and longer than may be sent
    asked: set[str] = set()
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        with requests.Session() as session:
            _ask(found.ok(), mode, checks, asked, session)
    assert len(asked) >= 5
    assert served.process.poll() is None


class _Adapter(requests.adapters.BaseAdapter):
    """Sends as requests does. Schemathesis looks into requests' own for what another urllib3 than its own has not."""

    def __init__(self) -> None:
        super().__init__()
        self._inner = requests.adapters.HTTPAdapter()

    def send(self, request: Any, *args: Any, **kwargs: Any) -> requests.Response:
        return self._inner.send(request, *args, **kwargs)

    def close(self) -> None:
        self._inner.close()


def _ask(operation: Any, mode: GenerationMode, checks: list[Any], asked: set[str], session: requests.Session) -> None:
    strategy = operation.as_strategy(generation_mode=mode)
    session.adapters.clear()
    # What a body, or a range, asks for can be of the schema and still not fit the run, or itself.
    whole = operation.method == "get" and not operation.path.endswith("/rows")
    fitting = [each for each in checks if whole or each.__name__ != "positive_data_acceptance"]
    session.mount("http://", _Adapter())
    runs = itertools.cycle(("job", "over", "bad", "none"))

    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @hypothesis.given(strategy)
    def run(case: schemathesis.Case[Any]) -> None:
        asked.add(operation.label)
        if mode is GenerationMode.POSITIVE and (case.path_parameters or {}).get("run_id"):
            case.path_parameters["run_id"] = next(runs)  # of any other there is nothing to be seen but a 404
        case.call_and_validate(headers=AS_WRITER, checks=fitting, session=session, timeout=60)

    call: Callable[[], None] = run
    call()


def test_every_operation_wants_its_token_and_method(
    start: Start, document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Without a token each is 401; with one, a method that a path has not is 405 and told which it has."""
    served = start(*with_tokens(tmp_path_factory.mktemp("config")))  # one that has refused nobody yet
    for path, method, _ in operations(document):
        where = path.replace("{run_id}", "job")
        assert send(served, method.upper(), where)[0] == 401
        for other in {"get", "put", "post", "patch", "delete"} - document["paths"][path].keys():
            status, body, headers = send(served, other.upper(), where, **AS_WRITER)
            assert (status, body["detail"]) == (405, "Method Not Allowed"), (other, path)
            assert method.upper() in headers["allow"]
