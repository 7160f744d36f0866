"""The OpenAPI document of the API: what every operation has in common, beside what its handler says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gradiometer.records import installed_version
from gradiometer_monitor.web.parameters import refuse_others
from gradiometer_monitor.web.roles import WITHOUT_TOKENS, Role, describe_roles, needed_by, needs, one_of, roles_for
from gradiometer_monitor.web.schemas import Error
from gradiometer_monitor.web.settings import LimitSettings

__all__ = ["api_router", "documented"]

PREFIX = "/api/v1"

DESCRIPTION = """\
Runs of one host, their events and policies, as [gradiometer](https://pypi.org/project/gradiometer/) records them.

Where the monitor has tokens (`auth.tokens_file`), every request needs `Authorization: Bearer <token>`, of one of the
roles that `security` of the operation names. Where it has none it serves loopback only, everybody there may read, and
nothing can be changed. A number that is not known, or not finite, is null. Errors are `{"detail": "…"}`; where a
parameter or a body is not of its schema, `detail` is a list.
"""
TAGS = [
    {"name": "runs", "description": "What is followed, and what was recorded."},
    {"name": "events", "description": "What happened to runs: incidents, changes of policy, actions."},
    {"name": "policy", "description": "What is done to gradients, and the request for something else."},
    {"name": "alerts", "description": "What Alertmanager may ask for."},
]
SCHEME = "token"
SECURITY_SCHEMES = {
    SCHEME: {
        "type": "http",
        "scheme": "bearer",
        "description": f"A line of `auth.tokens_file`. What its role may do: {describe_roles('`')}. "
        "Each operation names the roles of which it needs one.",
    }
}
ANSWERS = {
    "400": "The Host is not this monitor's, or the request is no HTTP.",
    "401": "There is no valid token.",
    "404": "There is no such run, or rank.",
    "408": "The request did not arrive whole in time.",
    "413": "The body is too long.",
    "414": "The query is too long.",
    "429": "Too many requests without a valid token came from this address.",
    "431": "The headers are too long.",
    "503": "The directory of the run cannot be used just now.",
    "504": "The answer did not begin in time.",
}
"""Of every operation."""
CHANGE_ANSWERS = {"415": "The body is not `application/json`."}
"""Of those that change something."""
READS = ("get", "head", "options")


def api_router(*tags: str) -> APIRouter:
    """Make a router for what is below ``/api/v1``; its routes, which become the application's own, have these tags.

    A parameter that an operation does not declare is refused.
    """
    return APIRouter(
        prefix=PREFIX,
        tags=list(tags),
        dependencies=[Depends(refuse_others)],
        generate_unique_id_function=lambda route: route.name,
    )


def documented(limits: LimitSettings) -> FastAPI:
    """Make an application whose document will be complete, and is the only thing that it serves yet."""
    made = FastAPI(
        title="gradiometer monitor",
        summary="What is known of the training runs of one host.",
        description=DESCRIPTION,
        version=installed_version(),
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        openapi_url=None,  # it needs a token too: its route is below
        openapi_tags=TAGS,
        docs_url=None,  # its page loads scripts from the web
        redoc_url=None,
        redirect_slashes=False,  # or a page could be sent elsewhere by the Host it asked for
    )

    def document() -> dict[str, Any]:
        if made.openapi_schema is None:
            made.openapi_schema = _complete(made, limits)
        return made.openapi_schema

    @needs("read")
    async def serve(_: Request) -> Response:
        return JSONResponse(made.openapi())

    made.openapi = document  # type: ignore[method-assign]  # as FastAPI's documentation has it
    made.routes.append(Route(f"{PREFIX}/openapi.json", serve))
    return made


def _complete(app: FastAPI, limits: LimitSettings) -> dict[str, Any]:
    """Add to what FastAPI knows the token and the answers that come before any handler."""
    found = get_openapi(
        title=app.title, version=app.version, summary=app.summary, description=app.description, routes=app.routes,
        tags=app.openapi_tags, license_info=app.license_info, separate_input_output_schemas=False,
    )  # fmt: skip
    components = found.setdefault("components", {})
    components["securitySchemes"] = SECURITY_SCHEMES
    schema = Error.model_json_schema()
    components.setdefault("schemas", {})["Error"] = schema
    declared = {
        (route.path_format, method.lower()): needed_by(route)
        for route in app.routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
    }
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            changes, need = method not in READS, declared[path, method]
            roles = roles_for(need)
            operation["security"] = [{SCHEME: [role]} for role in roles] + [{}] * (need in WITHOUT_TOKENS)
            answers = ANSWERS | _forbidden(roles, changes) | (CHANGE_ANSWERS if changes else {})
            for status, description in answers.items():
                if status == "404" and "{" not in path:
                    continue
                if status == "413":
                    description = f"{description} It may have {limits.max_body_bytes} bytes unless set otherwise."
                operation["responses"].setdefault(status, _answer(status, description))
            _widen_422(operation["responses"])
    return found


def _forbidden(roles: Sequence[Role], changes: bool) -> dict[str, str]:
    reason = f"The token's role is not {one_of(roles, '`')}"
    return {"403": f"{reason}, there are no tokens, or a page of another origin asks." if changes else f"{reason}."}


def _answer(status: str, description: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    answer: dict[str, Any] = {"description": description, "content": content}
    if status in ("401", "403"):
        answer["headers"] = {"WWW-Authenticate": {"schema": {"type": "string"}, "description": "`Bearer …`"}}
    if status == "429":
        answer["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return answer


def _widen_422(responses: dict[str, Any]) -> None:
    """Say that what is wrong beyond the schema, as in a policy, is told in a sentence."""
    if "422" in responses:
        kinds = [{"$ref": "#/components/schemas/HTTPValidationError"}, {"$ref": "#/components/schemas/Error"}]
        responses["422"] = {
            "description": "A parameter or the body is not what is expected.",
            "content": {"application/json": {"schema": {"anyOf": kinds}}},
        }
