"""Who asks: bearer tokens of requests, and what each may do.

Without tokens the monitor serves loopback, where everyone may read and nobody may change anything. With tokens every
path needs one but the probes, the files of the page and the runbooks, and its role must allow what the path's route
declares (:mod:`gradiometer_monitor.web.roles`). After the middleware ``request.state.principal`` is the name of who
asks, None where no tokens are.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from ipaddress import IPv6Address, ip_address
from logging import getLogger
from typing import Annotated

from fastapi import Depends, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from gradiometer_monitor.web.roles import ROLES, WITHOUT_TOKENS, Need, Needs, one_of, roles_for
from gradiometer_monitor.web.tokens import Principal, Tokens

__all__ = ["AuthMiddleware", "Requester", "requester"]

log = getLogger(__name__)

CHALLENGE = 'Bearer realm="gradiometer"'
FAILURES, REFILL_SECONDS = 10, 6.0
"""Failed authentications that one address is told of at once, and in which time it gets another."""
MAX_CLIENTS = 1024
"""Addresses whose failures are remembered; the longest silent one is forgotten beyond."""
READ_ONLY = (
    "nothing can be changed through this monitor, because it has no tokens: set auth.tokens_file to a file of them and "
    "send 'Authorization: Bearer <token>'"
)


class AuthMiddleware:
    """Lets through who may do what the route needs; 401 without a token, 403 with one of a role that does not allow it.

    An address that fails too often is told 429. A valid token is never refused for the failures of others at the same
    address: a proxy has one address for all.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens | None, needs: Needs) -> None:
        self._app, self._tokens, self._needs, self._failures = app, tokens, needs, Failures()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["principal"] = None
        answer = self._decide(scope) or self._app
        await answer(scope, receive, send)

    def _decide(self, scope: Scope) -> JSONResponse | None:
        """Return the refusal of a request, None to let it through; where no route takes it any token will do."""
        route, need = self._needs.find(scope) or (None, None)
        if need == "nothing":
            return None
        found = None
        if self._tokens is not None:
            token = _bearer(scope)
            found = None if token is None else self._tokens.find(token)
            if found is None:
                return self._refuse(scope, token)
            scope["state"]["principal"] = found.name
        if need is None or need in (WITHOUT_TOKENS if found is None else ROLES[found.role]):
            return None
        scope["route"] = route  # for who counts the answers by route
        return _forbidden(found, need)

    def _refuse(self, scope: Scope, token: bytes | None) -> JSONResponse:
        address = client_address(scope)
        wait = self._failures.count(address)
        if wait > 0:
            seconds = math.ceil(wait)
            return JSONResponse(
                {"detail": f"too many requests from {address} without a valid token: try again in {seconds} s"},
                status_code=429,
                headers={"retry-after": str(seconds)},
            )
        reason = "needs 'Authorization: Bearer <token>'" if token is None else "the token is not one of this monitor's"
        if token is not None:
            log.warning("refused %s from %s: its token is not one of auth.tokens_file", scope["method"], address)
        more = "" if token is None else ', error="invalid_token"'
        return JSONResponse({"detail": reason}, status_code=401, headers={"www-authenticate": CHALLENGE + more})


class Failures:
    """Counts failed authentications by address: as many as :data:`FAILURES` at once, then one in a while."""

    def __init__(self) -> None:
        self._full_at: OrderedDict[str, float] = OrderedDict()
        """When (monotonic) each address has all its failures again."""

    def count(self, address: str) -> float:
        """Count one more; return 0, or for how many seconds the address has none left."""
        now = time.monotonic()
        full_at = max(now, self._full_at.pop(address, now))
        over = full_at + REFILL_SECONDS - now - FAILURES * REFILL_SECONDS
        self._full_at[address] = full_at if over > 0 else full_at + REFILL_SECONDS
        while len(self._full_at) > MAX_CLIENTS:
            self._full_at.popitem(last=False)
        return max(0.0, over)

    def __len__(self) -> int:
        return len(self._full_at)


def requester(request: Request) -> str:
    """Say who asks: name of the token, and address."""
    return f"{request.state.principal or 'anonymous'} ({client_address(request.scope)})"


Requester = Annotated[str, Depends(requester)]
"""Who asks, as a parameter of a handler."""


def client_address(scope: Scope) -> str:
    """Return the address of the client; of IPv6 the network of 64 bits, of which a client has all addresses."""
    client = scope.get("client")
    if client is None:
        return "unknown"
    try:
        address = ip_address(client[0])
    except ValueError:
        return "unknown"
    if isinstance(address, IPv6Address):
        mapped = address.ipv4_mapped
        if mapped is not None:
            return str(mapped)
        return str(address) if address.is_loopback else f"{IPv6Address(int(address) >> 64 << 64)}/64"
    return str(address)


def _forbidden(who: Principal | None, need: Need) -> JSONResponse:
    """Name the role that a token has, and those that would do; or say that there are no tokens."""
    if who is None:
        return JSONResponse({"detail": READ_ONLY}, status_code=403)
    detail = f"the token of {who.name} has the role '{who.role}': this needs one with {one_of(roles_for(need))}"
    headers = {"www-authenticate": CHALLENGE + ', error="insufficient_scope"'}
    return JSONResponse({"detail": detail}, status_code=403, headers=headers)


def _bearer(scope: Scope) -> bytes | None:
    """Return the token of the one Authorization header, None if there is none, or more than one."""
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(found) != 1:
        return None
    kind, _, token = found[0].partition(b" ")
    return token.strip() if kind.lower() == b"bearer" else None
