"""Parameters of a query: one that the operation has not is refused, and never passed over."""

from __future__ import annotations

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.requests import Request

from gradiometer.problems import guess

__all__ = ["refuse_others"]

MOST_NAMED = 8
"""Parameters that one answer says to be wrong."""


def refuse_others(request: Request) -> None:
    """Refuse parameters that the route of a request does not declare: ``dryrun=true`` would change a policy in earnest.

    Raises RequestValidationError, which is answered as every other parameter that is wrong.
    """
    route: APIRoute = request.scope["route"]
    known = [each.alias for each in route.dependant.query_params]
    others = list(dict.fromkeys(name for name in request.query_params if name not in known))
    if others:
        there = f"there are {', '.join(known)}" if known else "this operation has none"
        raise RequestValidationError(
            [
                {
                    "type": "extra_forbidden",
                    "loc": ("query", name),
                    "msg": f"no such parameter; {there}{guess(name, known)}",
                    "input": request.query_params[name],
                }
                for name in others[:MOST_NAMED]
            ]
        )
