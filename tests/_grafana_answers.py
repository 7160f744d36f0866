"""What the parts of the stub of Grafana share: how it refuses."""

from __future__ import annotations

import re
from typing import Any

Json = dict[str, Any]
UID = re.compile(r"[A-Za-z0-9_-]{1,40}")


class RefusalError(Exception):
    """An answer that is an error, as Grafana words it."""

    def __init__(self, code: int, message: str, /, **more: Any) -> None:
        super().__init__(message)
        self.status, self.body = code, {"message": message, **more} if message else ""


def require_there(found: Json | None, message: str, **more: Any) -> Json:
    """Return what was found; refuse if that is nothing."""
    if found is None:
        raise RefusalError(404, message, **more)
    return found


def require_role(role: str, permission: str, least: str) -> None:
    """Refuse whoever has less than a role."""
    order = ("Viewer", "Editor", "Admin")
    if order.index(role) < order.index(least):
        message = f"You'll need additional permissions to perform this action. Permissions needed: {permission}"
        raise RefusalError(403, message, title="Access denied", accessErrorId="ACE0000000000")
