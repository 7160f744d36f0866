"""What each role may do, and what each route needs: the only place where either is decided.

A handler declares its need by :func:`needs`. A route whose handler declares none cannot be served: :class:`Needs` is
made of all routes before the first request, and refuses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar

from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope

__all__ = [
    "PERMISSIONS", "ROLES", "WITHOUT_TOKENS", "Need", "Needs", "Permission", "Role", "describe_roles", "needed_by",
    "needs", "one_of", "roles_for",
]  # fmt: skip

Role = Literal["metrics", "alerts", "read", "write"]
Permission = Literal["metrics", "alerts", "read", "write"]
Need = Permission | Literal["nothing"]
"""What a route asks for; ``nothing`` where it is open, also to who has no token."""

PERMISSIONS: Mapping[Permission, str] = {
    "metrics": "scrape /metrics",
    "alerts": "post to Alertmanager's webhook",
    "read": "see runs, rows, events and policies",
    "write": "change the policy of any run",
}
ROLES: Mapping[Role, tuple[Permission, ...]] = {
    "metrics": ("metrics",),
    "alerts": ("alerts",),
    "read": ("metrics", "read"),
    "write": ("metrics", "alerts", "read", "write"),
}
WITHOUT_TOKENS = ROLES["read"]
"""What everybody may who reaches a monitor that has no tokens."""

DECLARED = "_gradiometer_need"
Handler = TypeVar("Handler", bound=Callable[..., Any])


def roles_for(need: Need) -> list[Role]:
    """Return the roles that are enough for a need, the narrowest first."""
    return [role for role, may in ROLES.items() if need in may]


def one_of(roles: Iterable[Role], quote: str = "'") -> str:
    """Write roles as one may be chosen: ``'metrics', 'read' or 'write'``."""
    *others, last = (f"{quote}{role}{quote}" for role in roles)
    return f"{', '.join(others)} or {last}" if others else last


def describe_roles(quote: str = "") -> str:
    """Write what each role may do: ``metrics: scrape /metrics; alerts: …``."""
    return "; ".join(
        f"{quote}{role}{quote}: {', '.join(PERMISSIONS[each] for each in may)}" for role, may in ROLES.items()
    )


def needs(need: Need) -> Callable[[Handler], Handler]:
    """Declare what the routes of a handler need; for any function that a route is made of."""

    def declare(handler: Handler) -> Handler:
        setattr(handler, DECLARED, need)
        return handler

    return declare


def needed_by(route: BaseRoute) -> Need:
    """Return what a route needs. Raises TypeError if its handler does not say."""
    need: Need | None = getattr(route.endpoint, DECLARED, None) if isinstance(route, Route) else None
    if need is None:
        raise TypeError(f"{route!r} does not say what it needs: put @needs(...) on its handler")
    return need


class Needs:
    """What requests need, by the routes that take them."""

    def __init__(self, routes: Iterable[BaseRoute]) -> None:
        self._routes = [(route, needed_by(route)) for route in routes]

    def find(self, scope: Scope) -> tuple[BaseRoute, Need] | None:
        """Return the route that takes a request, and what it needs; None where there is none for the path.

        Where a path has not the method, it is the first route of the path that answers so.
        """
        other = None
        for found in self._routes:
            match, _ = found[0].matches(scope)
            if match is Match.FULL:
                return found
            if match is Match.PARTIAL and other is None:
                other = found
        return other
