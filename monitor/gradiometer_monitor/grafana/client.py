"""One Grafana over its HTTP API: grafana-client with time limits, and errors that say what to do.

Guarantees: no message holds a password or a token; no request follows a redirect, which would turn a POST into a GET
and take the token elsewhere. grafana-client tries each request once: who calls decides whether to try again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import niquests.exceptions
from grafana_client.api import GrafanaApi
from grafana_client.client import GrafanaException, GrafanaTimeoutError

from gradiometer_monitor.grafana.settings import GrafanaSettings
from gradiometer_monitor.retrying import retry_after

__all__ = ["Grafana", "GrafanaError"]

Json = dict[str, Any]
Request = Callable[[Any], Any]
"""What is asked of a GrafanaApi, whose methods have no types."""
PROVISIONING = "/v1/provisioning"
"""Of alerting; without the header X-Disable-Provenance what is written there cannot be edited in Grafana."""
READS_RULES = "alert.rules:read with folders:read, or alert.provisioning:read"
WRITES_RULES = (
    "the role Editor, or alert.rules:read, :create, :write and :delete, folders:read, datasources:query and "
    "alert.provisioning.provenance:write, or alert.provisioning:write"
)
SHOWN_CHARACTERS = 300
"""As much of Grafana's own words is passed on."""
MAX_WAIT_SECONDS = 300.0
"""A Grafana that asks for a longer pause is not heeded for longer."""


class GrafanaError(Exception):
    """A request to Grafana failed; the message is one sentence for the user, with a remedy.

    ``status`` is the HTTP status, 0 where no answer came; ``wait_seconds`` is how long Grafana asked to wait.
    """

    def __init__(self, message: str, *, status: int = 0, wait_seconds: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.wait_seconds = status, wait_seconds

    @property
    def passing(self) -> bool:
        """Whether the same request may succeed later without anybody doing anything."""
        return self.status in (0, 408, 425, 429) or self.status >= 500

    @property
    def lasting(self) -> bool:
        """Whether this request will never succeed, whoever is let in: it is Grafana that does not want it."""
        return not self.passing and self.status not in (401, 403, 404)


class Grafana:
    """A session with the Grafana of ``settings``; for one thread at a time.

    Raises OSError or ValueError if the token or the password cannot be read.
    """

    def __init__(self, settings: GrafanaSettings) -> None:
        self.settings, self.credentials = settings, settings.read_credentials()
        login = self.credentials
        parts = urlsplit(settings.address)
        connect: Any = GrafanaApi
        self._api = connect(
            auth=login if isinstance(login, str) else tuple(each.encode() for each in login),
            protocol=parts.scheme,
            host=f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname,
            port=parts.port,
            url_path_prefix=f"{parts.path.strip('/')}/" if parts.path.strip("/") else "",
            verify=str(settings.ca_file) if settings.ca_file else True,
            timeout=settings.timeout_seconds,
            organization_id=settings.org_id,
            user_agent="gradiometer",
        )
        self._asked_wait = 0.0
        session = self._api.client.s
        session.max_redirects = 0
        session.hooks["response"].append(self._note_wait)

    def close(self) -> None:
        """Let go of the connections."""
        self._api.client.s.close()

    def health(self) -> str:
        """Ask whether Grafana is well, and return its version."""
        answer = self._call("ask for its health", "", lambda api: api.client.GET("/health"))
        if not isinstance(answer, dict) or "database" not in answer:
            raise GrafanaError(
                f"what answers at {self.settings.address} is not Grafana: check the URL, also its sub path", status=404
            )
        return str(answer.get("version", "unknown"))

    def folder(self, uid: str) -> Json | None:
        return self._found("read folders", "folders:read", lambda api: api.folder.get_folder(uid))

    def create_folder(self, uid: str, title: str) -> None:
        self._call("make a folder", "folders:create", lambda api: api.folder.create_folder(title, uid))

    def rename_folder(self, uid: str, title: str) -> None:
        rename = "change a folder"
        self._call(rename, "folders:write", lambda api: api.folder.update_folder(uid, title, overwrite=True))

    def datasource(self, uid: str) -> Json | None:
        read = "read datasources"
        return self._found(read, "datasources:read", lambda api: api.datasource.get_datasource_by_uid(uid))

    def create_datasource(self, model: Json) -> None:
        create = "make a datasource"
        self._call(create, "datasources:create", lambda api: api.datasource.create_datasource(model))

    def update_datasource(self, uid: str, model: Json) -> None:
        update = "change a datasource"
        self._call(update, "datasources:write", lambda api: api.datasource.update_datasource_by_uid(uid, model))

    def dashboard(self, uid: str) -> Json | None:
        return self._found("read dashboards", "dashboards:read", lambda api: api.dashboard.get_dashboard(uid))

    def dashboard_message(self, uid: str) -> str | None:
        """Return what was said of the newest version of a dashboard; None if Grafana does not tell."""
        path = f"/dashboards/uid/{uid}/versions"
        try:
            answer = self._call("read versions", "dashboards:read", lambda api: api.client.GET(f"{path}?limit=1"))
        except GrafanaError as error:
            if error.passing or error.status == 401:
                raise
            return None
        versions = answer.get("versions") if isinstance(answer, dict) else answer
        known = [each for each in versions or () if isinstance(each, dict) and isinstance(each.get("version"), int)]
        return str(max(known, key=lambda each: each["version"]).get("message", "")) if known else None

    def save_dashboard(self, model: Json, folder_uid: str, message: str, *, overwrite: bool) -> None:
        body = {"dashboard": model, "folderUid": folder_uid, "message": message, "overwrite": overwrite}
        needs = "dashboards:create and dashboards:write"
        self._call("save a dashboard", needs, lambda api: api.dashboard.update_dashboard(body))

    def rule_group(self, folder_uid: str, title: str) -> Json | None:
        """Return a group of alert rules; its rules may lack their provenance."""
        path = f"{PROVISIONING}/folder/{folder_uid}/rule-groups/{title}"
        return self._found("read alert rules", READS_RULES, lambda api: api.client.GET(path))

    def alert_rule(self, uid: str) -> Json | None:
        """Return an alert rule with its provenance, wherever it is."""
        path = f"{PROVISIONING}/alert-rules/{uid}"
        return self._found("read alert rules", READS_RULES, lambda api: api.client.GET(path))

    def save_rule_group(self, folder_uid: str, title: str, group: Json) -> None:
        """Make a group what is given, and nothing else; its rules are the API's from then on."""
        path = f"{PROVISIONING}/folder/{folder_uid}/rule-groups/{title}"
        self._call("save alert rules", WRITES_RULES, lambda api: api.client.PUT(path, json=group))

    def find_annotation(self, tag: str, time_ms: int) -> Json | None:
        """Find the annotation that has a tag, which must need no quoting, and holds at a time."""
        found = self._call(
            "read annotations",
            "annotations:read",
            lambda api: api.annotations.find_annotations(
                time_from=time_ms - 1, time_to=time_ms + 1, tags=[tag], limit=1
            ),
        )
        if not isinstance(found, list):
            raise self._strange()
        return next((each for each in found if isinstance(each, dict) and tag in (each.get("tags") or ())), None)

    def add_annotation(self, dashboard_uid: str, time_ms: int, tags: list[str], text: str) -> None:
        self._call(
            "make an annotation",
            "annotations:create",
            lambda api: api.annotations.add_annotation(
                dashboard_uid=dashboard_uid, time_from=time_ms, tags=tags, text=text
            ),
        )

    def update_annotation(self, number: int, times_ms: tuple[int, int], tags: list[str], text: str) -> None:
        self._call(
            "change an annotation",
            "annotations:write",
            lambda api: api.annotations.update_annotation(
                number, time_from=times_ms[0], time_to=times_ms[1], tags=tags, text=text
            ),
        )

    def _found(self, doing: str, needs: str, request: Request) -> Json | None:
        """Ask for an object; None if there is none."""
        try:
            answer = self._call(doing, needs, request)
        except GrafanaError as error:
            if error.status == 404:
                return None
            raise
        if not isinstance(answer, dict):
            raise self._strange()
        return answer

    def _call(self, doing: str, needs: str, request: Request) -> Any:
        self._asked_wait = 0.0
        try:
            answer = request(self._api)
        except GrafanaTimeoutError as error:
            raise self._silent("did not answer in time", "is it up, and timeout_seconds long enough?") from error
        except GrafanaException as error:
            raise self._refused(doing, needs, error) from error
        except niquests.exceptions.TooManyRedirects as error:
            raise GrafanaError(
                f"{self.settings.address} sends elsewhere: give the URL that it redirects to", status=404
            ) from error
        except niquests.exceptions.SSLError as error:
            remedy = "if its certificate is of your own authority, give that as ca_file"
            raise self._silent("could not prove who it is by TLS", remedy) from error
        except (niquests.exceptions.JSONDecodeError, ValueError) as error:
            raise self._strange() from error
        except OSError as error:  # whatever else niquests raises is one
            raise self._silent(_reason(error), "is it up, and is the URL right?") from error
        if not isinstance(answer, dict | list):  # a page, as of a proxy that asks for a login
            raise self._strange()
        return answer

    def _silent(self, reason: str, remedy: str) -> GrafanaError:
        return GrafanaError(f"Grafana at {self.settings.address} {reason}: {remedy}")

    def _strange(self) -> GrafanaError:
        return GrafanaError(
            f"{self.settings.address} answers, but not as Grafana does: check the URL, also its sub path", status=404
        )

    def _refused(self, doing: str, needs: str, error: GrafanaException) -> GrafanaError:
        status, where = int(error.status_code or 0), self.settings.address
        said = error.response.get("message") if isinstance(error.response, dict) else None
        words = f" ({str(said)[:SHOWN_CHARACTERS]})" if said else ""
        what = f"Grafana at {where} would not {doing}, status {status}{words}"
        login = self.settings.token_file or self.settings.password_file or "the URL"
        remedies = {
            401: f"{where} lets nobody in with the token or password of {login}: make a new one{words}",
            403: f"{what}: the account of {login} needs {needs or 'more rights'}",
            404: f"{what}: if Grafana is served below a sub path, the URL must end with it",
        }
        return GrafanaError(remedies.get(status, what), status=status, wait_seconds=self._asked_wait)

    def _note_wait(self, response: Any, **_: Any) -> None:
        """Take down what an answer says of when to come again."""
        self._asked_wait = retry_after(str(response.headers.get("Retry-After") or ""), MAX_WAIT_SECONDS)


def _reason(error: BaseException) -> str:
    """Say why no answer came, as the operating system has it."""
    for cause in _causes(error):
        if isinstance(cause, OSError) and cause.strerror:
            return f"cannot be reached ({cause.strerror})"
    return "cannot be reached"


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        each = waiting.pop()
        if isinstance(each, BaseException) and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [each.__cause__, each.__context__, getattr(each, "reason", None), *each.args]
