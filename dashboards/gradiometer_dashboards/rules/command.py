"""``gradiometer rules``: write the alert rules for the place where they are installed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from gradiometer_dashboards.rules.catalogue import alerts
from gradiometer_dashboards.rules.fleet import fleet_layer_rules, fleet_rules
from gradiometer_dashboards.rules.grafana import grafana_rules
from gradiometer_dashboards.rules.model import Settings
from gradiometer_dashboards.rules.prometheus import operator_rules, prometheus_rules
from gradiometer_dashboards.thresholds import THRESHOLDS, Thresholds

__all__ = ["rules"]

Form = Literal["prometheus", "grafana", "operator", "fleet", "fleet-layers"]
FORMS: dict[str, Callable[[Settings], str]] = {
    "prometheus": prometheus_rules,
    "grafana": grafana_rules,
    "operator": operator_rules,
    "fleet": fleet_rules,
    "fleet-layers": fleet_layer_rules,
}
DEFAULTS = Settings()
WIDTH = 160
OWN_LABELS = ("alertname", "severity", "layer", "rank", "policy", "job", "run_id", "instance", "gpu", "receiver")
"""Labels that an alert has already, or must not have."""


def rules(
    form: Annotated[Form, typer.Argument(help="Who is to read them.")] = "prometheus",
    grafana_url: Annotated[
        str, typer.Option(help="Where people open Grafana: links begin with it.")
    ] = DEFAULTS.grafana_url,
    runbook_url: Annotated[str, typer.Option(help="What runbooks' addresses begin with.")] = DEFAULTS.runbook_url,
    job: Annotated[str, typer.Option(help="Regular expression of the scrape jobs that are monitors.")] = DEFAULTS.job,
    by: Annotated[list[str] | None, typer.Option(help="Label that alerts keep, as 'cluster'; may be repeated.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="THRESHOLD=VALUE, as spike_ratio=20; may be repeated.")
    ] = None,
    datasource_uid: Annotated[
        str, typer.Option(help="Uid in Grafana of the Prometheus that Grafana's rules ask.")
    ] = DEFAULTS.datasource_uid,
    keep_firing: Annotated[
        bool,
        typer.Option(
            "--keep-firing/--no-keep-firing",
            help="Write keep_firing_for, which Prometheus before 2.42 and vmalert before 1.92 refuse.",
        ),
    ] = True,
    out: Annotated[Path | None, typer.Option(help="File to write, instead of the standard output.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Only list the alerts and what they mean.")] = False,
) -> None:
    """Write the alert rules, for Prometheus and what reads its files, for Grafana's own alerting, or the operator.

    fleet and fleet-layers are the recording rules of docs/scaling.md.
    """
    settings = Settings(
        grafana_url=_url("--grafana-url", grafana_url),
        runbook_url=_url("--runbook-url", runbook_url),
        job=_pattern(job),
        by=_labels(by or ()),
        thresholds=_thresholds(set_ or ()),
        datasource_uid=_uid(datasource_uid),
        keep_firing=keep_firing,
    )
    if list_:
        Console(width=WIDTH).print(_table(settings))
        return
    text = FORMS[form](settings)
    if out is None:
        typer.echo(text, nl=False)
    else:
        _write(out, text)


def _write(out: Path, text: str) -> None:
    """Write all of it or nothing: Prometheus may read the file that is there at any time."""
    file = out.resolve()
    whole = file.is_file() or not file.exists()  # what is no file, as /dev/stdout, cannot be replaced
    place = file.with_name(f".{file.name}.{os.getpid()}.tmp") if whole else file
    try:
        place.write_text(text, encoding="utf-8")
        if whole:
            if file.exists():
                shutil.copymode(file, place)
            place.replace(file)
    except OSError as error:
        if whole:
            with suppress(OSError):
                place.unlink()
        raise ValueError(
            f"--out: {str(out)!r} cannot be written ({error.strerror}); give a file in a folder that is there, where "
            "you may write, and that has room"
        ) from error


def _url(option: str, value: str) -> str:
    if "@" in value:
        raise ValueError(
            f"{option}: it holds a user or a password, which links would show to everybody; leave them out"
        )
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.netloc or re.search(r"[\s{}?#]", value):
        usual = DEFAULTS.grafana_url if option == "--grafana-url" else DEFAULTS.runbook_url
        raise ValueError(f"{option}: {value!r} is no address that a path can follow; give one like {usual}")
    return value


def _pattern(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"--job: {value!r} is no regular expression ({error}); give one like gradiometer.*") from error
    if not value or re.search(r'["\\\n]', value):
        raise ValueError(f"--job: {value!r} is empty, or holds a quote or a backslash; give one like gradiometer.*")
    return value


def _labels(given: Sequence[str]) -> tuple[str, ...]:
    for name in given:
        if not re.fullmatch(r"[a-zA-Z_][a-zA-Z0-9_]*", name) or name.startswith("__"):
            raise ValueError(f"--by: {name!r} is no name of a label; give one that your scrapes add, like cluster")
        if name in OWN_LABELS:
            raise ValueError(f"--by: {name!r} is a label that alerts have, or that would split them; leave it out")
    return tuple(dict.fromkeys(given))


def _thresholds(given: Sequence[str]) -> Thresholds:
    known = {field.name: getattr(THRESHOLDS, field.name) for field in fields(Thresholds)}
    chosen: dict[str, Any] = {}
    for item in given:
        name, _, text = item.partition("=")
        if name not in known:
            raise ValueError(
                f"--set: there is no threshold {name!r}; give THRESHOLD=VALUE of one of these: {', '.join(known)}"
            )
        chosen[name] = _number(name, text, whole=isinstance(known[name], int))
    return replace(THRESHOLDS, **chosen)


def _number(name: str, text: str, *, whole: bool) -> float:
    """Read a threshold; shares are at most 1."""
    most = 1.0 if name in ("clip_ratio", "scaled_nonfinite_ratio") else 1e9
    try:
        value = int(text) if whole else float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= most:
        kind = "a whole number" if whole else "a number"
        usual = getattr(THRESHOLDS, name)
        raise ValueError(f"--set: {name}={text!r} is not {kind} from 0 to {most:g}; by default it is {usual:g}")
    return value


def _uid(value: str) -> str:
    if not re.fullmatch(r"[a-zA-Z0-9_-]{1,40}", value):
        raise ValueError(f"--datasource-uid: {value!r} is no uid: at most 40 letters, digits, hyphens and underscores")
    return value


def _table(settings: Settings) -> Table:
    table = Table(title="Alerts of gradiometer", title_justify="left", title_style="bold", box=SIMPLE, padding=0)
    for heading in ("alert", "severity", "for", "what it means"):
        table.add_column(heading, no_wrap=heading != "what it means")
    for alert in alerts(settings):
        table.add_row(alert.alertname, alert.severity, alert.lasting, alert.meaning)
    return table
