"""Settings of a remote-write receiver."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from gradiometer_monitor.config.section import Section, between, is_loopback

__all__ = ["RemoteWriteReceivers", "RemoteWriteSettings"]

OWN_LABELS = ("run_id", "rank", "layer", "policy", "mode", "receiver")
LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
OUR_HEADERS = ("host", "content-length", "content-type", "content-encoding", "transfer-encoding", "connection")
MAX_LABELS = 16
"""Labels that the settings may add to every series."""
DAYS = 86400.0
LayerStat = Literal["grad_norm_preclip", "grad_norm_postclip", "microbatch_norm"]


class RemoteWriteSettings(Section):
    """A receiver, and how rows are sent to it."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]
    """Names the receiver in metrics, logs and the store: under another name everything is sent anew."""
    url: str
    """Where to push to, as ``http://127.0.0.1:9090/api/v1/write``."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Added to every series. ``job`` is gradiometer and ``instance`` the host's name unless given; empty leaves out."""
    layers: str = "all"
    """Layers whose norms are sent: ``all``, ``none``, or a regular expression that the whole name must match."""
    layer_stats: tuple[LayerStat, ...] = ("grad_norm_preclip",)
    """Which norms of a layer."""
    series_budget: Annotated[int, between(100, 1_000_000)] = 10_000
    """Series that one rank may have; layers beyond it are left out, and their samples counted."""
    backfill: bool = True
    """Begin a run that was there before with what its ring holds, as far as ``max_age_seconds``; else with now."""
    max_age_seconds: Annotated[float, between(10, 366 * DAYS)] = 3600.0
    """Rows that are older are not sent: set it to what the receiver takes. Prometheus refuses what is an hour old."""
    out_of_order_seconds: Annotated[float, between(0, 366 * DAYS)] = 0.0
    """How far back the receiver takes samples that are older than their series' newest, after a clock was set back."""
    rewind_seconds: Annotated[float, between(0, 3600)] = 0.0
    """After the receiver was away, send again what it had taken in so many seconds before: for one that acknowledges
    what it has not written yet. VictoriaMetrics needs 10, Prometheus and Mimir 0."""
    batch_samples: Annotated[int, between(100, 100_000)] = 5000
    """Samples in one request, if one step has not more."""
    flush_seconds: Annotated[float, between(0.05, 3600)] = 1.0
    """Pause between two looks at the rings."""
    timeout_seconds: Annotated[float, between(0.1, 300)] = 30.0
    """How long the receiver may take to connect, and to answer."""
    backoff_max_seconds: Annotated[float, between(0.1, 3600)] = 60.0
    """Longest pause after a failure; it doubles from half a second on."""
    bearer_token_file: Path | None = None
    """Read again for every request, so that it can be rotated."""
    username: str | None = None
    """For basic authentication, with ``password_file``."""
    password_file: Path | None = None
    """Read again for every request."""
    tenant: str | None = None
    """Sent as ``X-Scope-OrgID``, for Mimir, Cortex and Thanos."""
    header_files: dict[str, Path] = Field(default_factory=dict)
    """Further headers, by name, each from a file."""
    ca_file: Path | None = None
    """Certificates to trust in place of the system's."""
    certificate_file: Path | None = None
    """Shown to the receiver, with ``key_file``."""
    key_file: Path | None = None
    """Key of ``certificate_file``."""
    plain_credentials: bool = False
    """Allow credentials over plain http to another host, where whoever is on the way can read them."""

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("expected a URL as http://127.0.0.1:9090/api/v1/write")
        if parts.username or parts.password:
            raise ValueError("holds credentials: give them by username and password_file, a URL is logged")
        return url

    @field_validator("labels")
    @classmethod
    def _are_labels(cls, labels: dict[str, str]) -> dict[str, str]:
        if len(labels) > MAX_LABELS:
            raise ValueError(f"expected at most {MAX_LABELS} labels")
        for name in labels:
            if not LABEL_NAME.fullmatch(name) or name.startswith("__"):
                raise ValueError(f"{name!r} cannot be a label: expected letters, digits and _, not __ at the beginning")
            if name in OWN_LABELS:
                raise ValueError(f"{name!r} is a label of gradiometer's own: choose another name")
        return labels

    @field_validator("layers")
    @classmethod
    def _compiles(cls, layers: str) -> str:
        try:
            re.compile(layers)
        except re.error as error:
            raise ValueError(f"expected all, none or a regular expression: {error}") from error
        return layers

    @field_validator("header_files")
    @classmethod
    def _are_headers(cls, files: dict[str, Path]) -> dict[str, Path]:
        for name in files:
            if not HEADER_NAME.fullmatch(name) or name.lower() in OUR_HEADERS:
                raise ValueError(f"{name!r} is not the name of a header that can be added")
        return files

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.username is None) != (self.password_file is None):
            raise ValueError("username and password_file need each other: give both or neither")
        if self.bearer_token_file and self.username:
            raise ValueError("bearer_token_file and username exclude each other: give one")
        if self.key_file and not self.certificate_file:
            raise ValueError("key_file needs certificate_file")
        secret = self.bearer_token_file or self.username or self.header_files
        parts = urlsplit(self.url)
        if secret and parts.scheme == "http" and not self.plain_credentials and not is_loopback(parts.hostname or ""):
            raise ValueError(
                "credentials would go over plain http to another host: use https, or plain_credentials: true if the "
                "network is one you trust"
            )
        return self


def _names_are_unique(receivers: tuple[RemoteWriteSettings, ...]) -> tuple[RemoteWriteSettings, ...]:
    names = [receiver.name for receiver in receivers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"receivers of one name: {', '.join(twice)}; each needs a name of its own")
    return receivers


RemoteWriteReceivers = Annotated[tuple[RemoteWriteSettings, ...], AfterValidator(_names_are_unique)]
