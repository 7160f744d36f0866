"""A server that behaves as Grafana's documented HTTP API does, and one Grafana, stub or real, that tests work against.

What the stub keeps of Grafana: tokens and basic authentication, roles, uids, versions with messages and the conflict of
two who save, folders, provisioned objects that refuse, alert rules (in a module of their own), and annotations: a
dashboard that is not known makes one of the whole organisation, tags are matched all of them, times overlap, tags are
split at the first colon and made one.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests._grafana_answers import UID, Json, RefusalError
from tests._grafana_answers import require_role as _may
from tests._grafana_answers import require_there as _there
from tests._grafana_rules import DISABLE_PROVENANCE, RULE_ROUTES, RuleStub
from tests._ports import free_ports

VERSION = "12.3.1"
TOKENS = {"glsa_admin_0123456789": "Admin", "glsa_editor_0123456789": "Editor", "glsa_viewer_0123456789": "Viewer"}
USER, PASSWORD = "admin", "pä:ss@wörd"


@dataclass
class Fault:
    """What goes wrong with the next requests that match."""

    method: str
    path: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    before: Callable[[], Any] | None = None
    """Called before the request is done, in the thread that serves it."""
    after: Callable[[], Any] | None = None
    """Called after it is done and before it is answered."""
    drop: bool = False
    """Close the connection instead of an answer; the request is done."""


class Stub(RuleStub):
    """Grafana's state and behaviour."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix
        self.sources: dict[str, Json] = {}
        self.boards: dict[str, Json] = {}
        self.annotations: list[Json] = []
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.page = ""
        """What everything is answered with, as text, instead."""
        self._lock, self._number = threading.RLock(), 0

    def fault(self, method: str = "", path: str = "", times: int = 10**9, **kind: Any) -> Fault:
        """Have the next matching requests fail."""
        self.faults.append(made := Fault(method, path, times, **kind))
        return made

    def number(self) -> int:
        self._number += 1
        return self._number

    def writes(self) -> list[tuple[str, str]]:
        """List the requests that were no GET."""
        return [each for each in self.requests if each[0] != "GET"]

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any, role: str | None) -> Any:
        """Do a request; returns what is answered with 200. Raises RefusalError."""
        if path == "/api/health":
            return {"commit": "0000000000", "database": "ok", "version": VERSION}
        if role is None:
            raise RefusalError(401, "Invalid API key", messageId="api-key.invalid", statusCode=401, traceID="")
        for pattern, handler in ROUTES:
            if (match := re.fullmatch(pattern, f"{method} {path}")) is not None:
                with self._lock:
                    return handler(self, role, query, body, *match.groups())
        raise RefusalError(404, "Not found")

    def get_folder(self, role: str, query: Any, body: Any, uid: str) -> Json:
        return _there(self.folders.get(uid), "folder not found")

    def post_folder(self, role: str, query: Any, body: Json) -> Json:
        _may(role, "folders:create", "Editor")
        uid = body.get("uid") or f"f{self.number()}"
        if uid in self.folders:
            raise RefusalError(412, "a folder with the same UID already exists", status="name-exists")
        if not body.get("title"):
            raise RefusalError(400, "folder title cannot be empty")
        if any(each["title"] == body["title"] for each in self.folders.values()):
            raise RefusalError(409, "a folder with the same name already exists in the current location")
        self.folders[uid] = {"id": self.number(), "uid": uid, "title": body["title"], "version": 1}
        return self.folders[uid]

    def put_folder(self, role: str, query: Any, body: Json, uid: str) -> Json:
        _may(role, "folders:write", "Editor")
        there = _there(self.folders.get(uid), "folder not found")
        if not body.get("overwrite") and body.get("version") != there["version"]:
            raise RefusalError(412, "the folder has been changed by someone else", status="version-mismatch")
        there.update(title=body["title"], version=there["version"] + 1)
        return there

    def delete_folder(self, role: str, query: Any, body: Any, uid: str) -> Json:
        _there(self.folders.get(uid), "folder not found")
        self.delete_rules_of(uid, force=query.get("forceDeleteRules") == ["true"])
        del self.folders[uid]
        for board in [key for key, each in self.boards.items() if each["meta"]["folderUid"] == uid]:
            del self.boards[board]
        return {"message": "Folder deleted"}

    def get_source(self, role: str, query: Any, body: Any, uid: str) -> Json:
        _may(role, "datasources:read", "Admin")
        return _there(self.sources.get(uid), "Data source not found")

    def post_source(self, role: str, query: Any, body: Json) -> Json:
        _may(role, "datasources:create", "Admin")
        if any(each["name"] == body["name"] for each in self.sources.values()):
            raise RefusalError(409, "data source with the same name already exists")
        if not UID.fullmatch(body.get("uid", "")):
            raise RefusalError(400, "Failed to add datasource")
        extra = {"id": self.number(), "version": 1, "readOnly": False, "typeLogoUrl": "", "secureJsonFields": {}}
        self.sources[body["uid"]] = {"basicAuth": False, "isDefault": False, "jsonData": {}, **body, **extra}
        return {"message": "Datasource added", "datasource": self.sources[body["uid"]]}

    def put_source(self, role: str, query: Any, body: Json, uid: str) -> Json:
        _may(role, "datasources:write", "Admin")
        there = _there(self.sources.get(uid), "Data source not found")
        if there["readOnly"]:
            raise RefusalError(403, "Cannot update read-only data source")
        if body.get("version", 0) and body["version"] < there["version"]:
            raise RefusalError(409, "Datasource has already been updated by someone else. Please reload and try again")
        kept = {key: there[key] for key in ("id", "uid", "readOnly", "typeLogoUrl", "secureJsonFields")}
        blank: Json = {"basicAuth": False, "isDefault": False, "jsonData": {}}
        self.sources[uid] = {**blank, **body, **kept, "version": there["version"] + 1}
        return {"message": "Datasource updated", "datasource": self.sources[uid]}

    def delete_source(self, role: str, query: Any, body: Any, uid: str) -> Json:
        _there(self.sources.pop(uid, None), "Data source not found")
        return {"message": "Data source deleted"}

    def get_board(self, role: str, query: Any, body: Any, uid: str) -> Json:
        there = _there(self.boards.get(uid), "Dashboard not found", status="not-found")
        return {"meta": there["meta"], "dashboard": there["dashboard"]}

    def post_board(self, role: str, query: Any, body: Json) -> Json:
        _may(role, "dashboards:write", "Editor")
        model = dict(body["dashboard"])
        if not model.get("title"):
            raise RefusalError(400, "Dashboard title cannot be empty", status="empty-name")
        if not UID.fullmatch(uid := model.get("uid") or f"b{self.number()}"):
            raise RefusalError(400, "uid contains illegal characters")
        if body.get("folderUid") and body["folderUid"] not in self.folders:
            raise RefusalError(400, "Folder not found")
        there = self.boards.get(uid)
        if there and there["meta"]["provisioned"]:
            raise RefusalError(400, "Cannot save provisioned dashboard")
        version = there["dashboard"]["version"] if there else 0
        if there and not body.get("overwrite") and model.get("version", 0) != version:
            message = "The dashboard has been changed by someone else"
            raise RefusalError(412, message, status="version-mismatch")
        number = there["dashboard"]["id"] if there else self.number()
        model.update(id=number, uid=uid, version=version + 1)
        meta = {"folderUid": body.get("folderUid", ""), "provisioned": False, "provisionedExternalId": ""}
        history = [*(there["history"] if there else []), {"version": version + 1, "message": body.get("message", "")}]
        self.boards[uid] = {"meta": meta, "dashboard": model, "history": history}
        return {"id": number, "uid": uid, "version": version + 1, "status": "success"}

    def get_versions(self, role: str, query: Any, body: Any, uid: str) -> Json:
        there = _there(self.boards.get(uid), "Dashboard not found", status="not-found")
        limit = int(query.get("limit", ["1000"])[0])
        return {"continueToken": "", "versions": there["history"][::-1][:limit]}

    def delete_board(self, role: str, query: Any, body: Any, uid: str) -> Json:
        gone = _there(self.boards.pop(uid, None), "Dashboard not found", status="not-found")
        number = gone["dashboard"]["id"]
        self.annotations = [each for each in self.annotations if each["dashboardId"] != number]
        return {"message": "Dashboard deleted"}

    def get_annotations(self, role: str, query: dict[str, list[str]], body: Any) -> list[Json]:
        start, end = (int(query.get(name, ["0"])[0]) for name in ("from", "to"))
        tags, board = _tags(query.get("tags", [])), query.get("dashboardUID", [""])[0]
        found = [
            {**each, "tags": list(each["tags"])}
            for each in self.annotations
            if all(tag in each["tags"] for tag in tags)
            and (not board or each["dashboardUID"] == board)
            and (not (start and end) or (each["time"] <= end and each["timeEnd"] >= start))
        ]
        found.sort(key=lambda each: (each["timeEnd"], each["time"]), reverse=True)
        return found[: int(query.get("limit", ["100"])[0])]

    def post_annotation(self, role: str, query: Any, body: Json) -> Json:
        _may(role, "annotations:create", "Editor")
        if not body.get("text"):
            raise RefusalError(400, "Failed to save annotation")
        board = self.boards.get(body.get("dashboardUID") or "")
        start = body.get("time") or int(time.time() * 1000)
        self.annotations.append(made := {
            "id": self.number(), "dashboardId": board["dashboard"]["id"] if board else 0,
            "dashboardUID": body["dashboardUID"] if board else "", "panelId": body.get("panelId") or 0, "time": start,
            "timeEnd": body.get("timeEnd") or start, "text": body["text"], "tags": _tags(body.get("tags") or []),
        })  # fmt: skip
        return {"message": "Annotation added", "id": made["id"]}

    def put_annotation(self, role: str, query: Any, body: Json, number: str) -> Json:
        _may(role, "annotations:write", "Editor")
        there = _there(next((each for each in self.annotations if each["id"] == int(number)), None), "not found")
        times = {key: body[key] for key in ("time", "timeEnd") if body.get(key)}
        there.update(text=body.get("text", ""), tags=_tags(body.get("tags") or []), **times)
        return {"message": "Annotation updated"}

    def delete_annotation(self, role: str, query: Any, body: Any, number: str) -> Json:
        self.annotations = [each for each in self.annotations if each["id"] != int(number)]
        return {"message": "Annotation deleted"}


ROUTES: list[tuple[str, Callable[..., Any]]] = [
    (r"GET /api/folders/([^/]+)", Stub.get_folder),
    (r"POST /api/folders", Stub.post_folder),
    (r"PUT /api/folders/([^/]+)", Stub.put_folder),
    (r"DELETE /api/folders/([^/]+)", Stub.delete_folder),
    (r"GET /api/datasources/uid/([^/]+)", Stub.get_source),
    (r"POST /api/datasources", Stub.post_source),
    (r"PUT /api/datasources/uid/([^/]+)", Stub.put_source),
    (r"DELETE /api/datasources/uid/([^/]+)", Stub.delete_source),
    (r"GET /api/dashboards/uid/([^/]+)", Stub.get_board),
    (r"POST /api/dashboards/db", Stub.post_board),
    (r"GET /api/dashboards/uid/([^/]+)/versions", Stub.get_versions),
    (r"DELETE /api/dashboards/uid/([^/]+)", Stub.delete_board),
    (r"GET /api/annotations", Stub.get_annotations),
    (r"POST /api/annotations", Stub.post_annotation),
    (r"PUT /api/annotations/(\d+)", Stub.put_annotation),
    (r"DELETE /api/annotations/(\d+)", Stub.delete_annotation),
    *RULE_ROUTES,
]


def _tags(given: list[str]) -> list[str]:
    """Parse tags as Grafana does: key and value around the first colons, without spaces around, each once."""
    pairs = [tuple(part.strip() for part in each.split(":")[:2]) for each in given]
    return list(dict.fromkeys(":".join(filter(None, pair)) for pair in pairs if pair[0]))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer is two writes, of which the second would wait 40 ms
    server: _Server

    def _serve(self) -> None:
        stub = self.server.stub
        parts = urllib.parse.urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length) or b"null")
        stub.requests.append((self.command, parts.path))
        if stub.page:
            return self._send(200, stub.page, **{"Content-Type": "text/html"})
        fault = self._fault(parts.path)
        if fault and fault.before:
            fault.before()
        if fault and fault.status:
            return self._send(fault.status, {"message": "injected"}, **fault.headers)
        try:
            path = parts.path.removeprefix(stub.prefix) if parts.path.startswith(stub.prefix) else "/outside"
            query = urllib.parse.parse_qs(parts.query)
            if DISABLE_PROVENANCE in self.headers:
                query[DISABLE_PROVENANCE] = [str(self.headers[DISABLE_PROVENANCE])]
            status, answer = 200, stub.answer(self.command, path, query, body, self._role())
        except RefusalError as refusal:
            status, answer = refusal.status, refusal.body
        if fault and fault.after:
            fault.after()
        if fault and fault.drop:
            self.close_connection = True
            return None
        return self._send(status, answer)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815 - what the base class looks for

    def _fault(self, path: str) -> Fault | None:
        for fault in self.server.stub.faults:
            if fault.times > 0 and fault.method in ("", self.command) and fault.path in path:
                fault.times -= 1
                return fault
        return None

    def _role(self) -> str | None:
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        if scheme == "Basic":
            return "Admin" if base64.b64decode(given).decode() == f"{USER}:{PASSWORD}" else None
        return TOKENS.get(given) if scheme == "Bearer" else None

    def _send(self, status: int, answer: Any, **headers: str) -> None:
        text = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - named by the base class
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    stub: Stub
    connections: set[socket.socket]

    def get_request(self) -> tuple[socket.socket, Any]:
        """Remember the connection: it is kept alive between requests."""
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        """Forget it."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError | ssl.SSLError):
            super().handle_error(request, client_address)


class StubServer:
    """A stub behind a port of loopback, that can go away and come back."""

    def __init__(self, prefix: str = "") -> None:
        self.stub, self._server = Stub(prefix), None
        (self.port,) = free_ports(1)
        self.up()
        self.url = f"http://127.0.0.1:{self.port}{prefix}"

    _server: _Server | None

    def up(self, tls: ssl.SSLContext | None = None) -> None:
        """Listen, on the same port as before."""
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.stub, self._server.connections = self.stub, set()
        self.port = self._server.server_address[1]
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def down(self) -> None:
        """Refuse connections; what is kept is kept."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            for connection in tuple(server.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


@dataclass(kw_only=True)
class ServedGrafana:
    """A Grafana that tests work against, and the uids that are theirs."""

    __test__ = False
    url: str
    token_file: Path | None
    prefix: str
    server: StubServer | None = None

    @property
    def settings(self) -> Json:
        """What the settings of the section must say."""
        mine: Json = {"url": self.url, "uid_prefix": self.prefix, "folder": f"Test {self.prefix}"}
        return mine | ({"token_file": str(self.token_file)} if self.token_file else {})

    @property
    def options(self) -> list[str]:
        """The same as options of the command."""
        return [part for name, value in self.settings.items() for part in (f"--{name.replace('_', '-')}", value)]

    @property
    def board(self) -> str:
        return f"{self.prefix}-run"

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request of our own, past the code under test; None where nothing is found."""
        parts = urllib.parse.urlsplit(self.url)
        login = f"{urllib.parse.unquote(parts.username or '')}:{urllib.parse.unquote(parts.password or '')}"
        token = self.token_file.read_text().strip() if self.token_file else ""
        how = f"Bearer {token}" if token else f"Basic {base64.b64encode(login.encode()).decode()}"
        url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/api{path}"
        headers = {"Authorization": how, "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=20) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 404:
                    return None
                raise

    def annotations(self) -> list[Json]:
        """List the annotations of our run dashboard, oldest first, in the order they were made where times are one."""
        found = self.ask("GET", f"/annotations?dashboardUID={self.board}&limit=5000")
        return sorted(found or [], key=lambda each: (each["time"], each["id"]))

    def edit(self, **fields: Any) -> None:
        """Save the run dashboard as a person does who changes it."""
        model = self.ask("GET", f"/dashboards/uid/{self.board}")
        body = {
            "dashboard": {**model["dashboard"], **fields},
            "folderUid": model["meta"]["folderUid"],
            "message": "mine",
        }
        self.ask("POST", "/dashboards/db", body)

    def clean(self) -> None:
        """Remove what may have been made."""
        for each in self.annotations():
            self.ask("DELETE", f"/annotations/{each['id']}")
        self.ask("DELETE", f"/dashboards/uid/{self.board}")
        self.ask("DELETE", f"/datasources/uid/{self.prefix}-prometheus")
        self.ask("DELETE", f"/folders/{self.prefix}?forceDeleteRules=true")


@contextlib.contextmanager
def serve_grafana(folder: Path, *, prefix: str = "", role: str = "Admin") -> Iterator[ServedGrafana]:
    """Give the Grafana that GRADIOMETER_TEST_GRAFANA names, or serve a stub for as long as the context lasts."""
    uid, token = f"t-{uuid.uuid4().hex[:12]}", folder / "grafana-token"
    if url := os.environ.get("GRADIOMETER_TEST_GRAFANA"):
        if given := os.environ.get("GRADIOMETER_TEST_GRAFANA_TOKEN"):
            token.write_text(given)
        real = ServedGrafana(url=url, token_file=token if given else None, prefix=uid)
        try:
            yield real
        finally:
            real.clean()
        return
    server = StubServer(prefix)
    token.write_text(f"{token_of(role)}\n")
    yield ServedGrafana(url=server.url, token_file=token, prefix=uid, server=server)
    server.down()


def token_of(role: str) -> str:
    """Return the stub's token of a role."""
    return next(token for token, its in TOKENS.items() if its == role)
