"""The receiver: one connection that is kept, a request at a time, and what its answers mean."""

from __future__ import annotations

import base64
import ssl
import time
from dataclasses import dataclass
from typing import Literal

import httpx

from gradiometer.records import installed_version
from gradiometer_monitor.config.secret import read_secret
from gradiometer_monitor.logs import one_line
from gradiometer_monitor.remote_write.settings import RemoteWriteSettings
from gradiometer_monitor.retrying import retry_after

__all__ = ["Answer", "Receiver"]

MAX_ANSWER_BYTES = 16 * 1024
"""More of an answer is not read."""
MAX_WORDS = 300
"""Characters of an answer that are logged."""
MAX_RETRY_AFTER_SECONDS = 600.0
"""A receiver that asks for a longer pause is asked again after this."""
BUSY = (408, 425, 429, 502, 503, 504)
MISCONFIGURED = (401, 402, 403, 404, 405, 406, 407, 410, 415)
"""What says more of the settings than of the samples: they wait in the ring until somebody has put it right."""
TOO_LARGE = 413


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of a request."""

    verdict: Literal["accepted", "refused", "later"]
    """Refused is what may be the fault of the samples, later what is not."""
    status: int = 0
    """0 where there was no answer."""
    words: str = ""
    """What the receiver, or the network, had to say."""
    retry_after_seconds: float = 0.0
    connection: object = None
    """Tells one connection from the next."""


class Receiver:
    """Posts to one receiver; not for several threads at once. Redirects are not followed: they would take the
    credentials along."""

    def __init__(self, settings: RemoteWriteSettings) -> None:
        self._settings = settings
        self._client: httpx.Client | None = None

    def post(self, body: bytes, timeout_seconds: float | None = None) -> Answer:
        """Send one body; whatever goes wrong is an answer."""
        seconds = timeout_seconds or self._settings.timeout_seconds
        try:
            client = self._client = self._client or self._connect()
            headers = self._headers()
            with client.stream("POST", self._settings.url, content=body, headers=headers, timeout=seconds) as response:
                # Asked for first: a receiver may close at the end of its answer, as VictoriaMetrics does now and then.
                stream = response.extensions.get("network_stream")
                connection = stream.get_extra_info("client_addr") if stream is not None else None
                words = _words(response, time.monotonic() + seconds)  # read to its end, or the connection is lost
                return _judge(response, words, connection)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError) as error:
            # A connection is not used again after an answer that was cut short.
            self.close()
            return Answer(verdict="later", words=one_line(f"{type(error).__name__}: {error}")[:MAX_WORDS])

    def close(self) -> None:
        """Close the connection. Idempotent; another post opens one."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    def _connect(self) -> httpx.Client:
        settings = self._settings
        context = ssl.create_default_context(cafile=settings.ca_file)
        if settings.certificate_file:
            context.load_cert_chain(settings.certificate_file, settings.key_file)
        # trust_env would read proxies from the environment, and credentials from ~/.netrc.
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1)
        return httpx.Client(verify=context, trust_env=False, follow_redirects=False, limits=limits)

    def _headers(self) -> dict[str, str]:
        settings = self._settings
        headers = {name: read_secret(path) for name, path in settings.header_files.items()}
        if settings.tenant:
            headers["X-Scope-OrgID"] = settings.tenant
        if settings.bearer_token_file:
            headers["Authorization"] = f"Bearer {read_secret(settings.bearer_token_file)}"
        if settings.username is not None and settings.password_file:
            pair = f"{settings.username}:{read_secret(settings.password_file)}"
            headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        return headers | {
            "Content-Type": "application/x-protobuf",
            "Content-Encoding": "snappy",
            "X-Prometheus-Remote-Write-Version": "0.1.0",
            "User-Agent": f"gradiometer/{installed_version()}",
        }


def _words(response: httpx.Response, deadline: float) -> str:
    """Read the beginning of an answer, for as long as it may take."""
    taken = b""
    for part in response.iter_raw():
        taken += part
        if len(taken) > MAX_ANSWER_BYTES or time.monotonic() > deadline:
            break
    return one_line(taken.decode("utf-8", "replace"))[:MAX_WORDS]


def _judge(response: httpx.Response, words: str, connection: object) -> Answer:
    status = response.status_code
    if response.is_success:
        return Answer(verdict="accepted", status=status, connection=connection)
    if response.is_redirect:
        target = one_line(response.headers.get("location", ""))[:MAX_WORDS]
        words = f"redirects to {target}, which is not followed: give the url that it leads to"
    later = status < 400 or status in BUSY or status in MISCONFIGURED
    wait = retry_after(response.headers.get("retry-after", ""), MAX_RETRY_AFTER_SECONDS)
    return Answer(verdict="later" if later else "refused", status=status, words=words, retry_after_seconds=wait)
