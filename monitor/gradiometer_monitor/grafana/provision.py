"""Put folder, datasource, dashboards and, if asked, alert rules into a Grafana, and say what that changed.

Guarantees: what is as it should be is not written again; what somebody changed in Grafana, or a file owns, is left as
it is and told of; nothing is deleted. Each dashboard is saved with a message that holds the digest of what was sent, in
Grafana's own history: the newest message tells whether somebody else saved since, from whichever host one looks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from gradiometer.records import installed_version
from gradiometer_dashboards import load, names
from gradiometer_monitor.grafana.alert_rules import apply_group, wanted_groups
from gradiometer_monitor.grafana.change import CHANGED, Change
from gradiometer_monitor.grafana.client import Grafana, GrafanaError
from gradiometer_monitor.grafana.settings import GrafanaSettings

__all__ = ["CHANGED", "Change", "apply", "run_dashboard"]

Json = dict[str, Any]
Taken = TypeVar("Taken")
OWN_PREFIX = "gradiometer"
"""What the uids of the committed dashboards begin with."""
MESSAGE = re.compile(r"gradiometer \S+ \[([0-9a-f]{16})\]")
VOLATILE = ("id", "version", "iteration")
"""What Grafana itself writes into a dashboard."""
SOURCE_ANSWER_ONLY = ("id", "typeLogoUrl", "readOnly", "secureJsonFields", "accessControl", "apiVersion")
REMEDY = "--overwrite, or overwrite: true, sets it back; save a copy under another name to keep the change"
CONFLICTS = (409, 412)
ATTEMPTS = 3
"""Of each step that met a passing failure, where nobody else tries again."""


def run_dashboard(settings: GrafanaSettings) -> str:
    """Return the uid of the dashboard that shows one run."""
    return f"{settings.uid_prefix}-run"


def apply(
    grafana: Grafana, *, dry_run: bool = False, wait: Callable[[float], Any] | None = None
) -> tuple[str, list[Change]]:
    """Make everything as it should be; return Grafana's version and what became of each thing.

    ``dry_run`` only looks. ``wait`` is called with seconds before a step that met a passing failure is tried again,
    without it no step is. Raises GrafanaError if Grafana is not there or lets nobody in.
    """
    version = _patiently(grafana.health, wait)
    changes = [_guarded(step, wait) for step in _steps(grafana, dry_run=dry_run)]
    return version, changes


Step = tuple[Change, Callable[[], Change]]


def _steps(grafana: Grafana, *, dry_run: bool) -> Iterator[Step]:
    settings = grafana.settings
    folder = Change(what="folder", uid=settings.uid_prefix, name=settings.folder, state="unchanged")
    yield folder, lambda: _folder(grafana, folder, dry_run=dry_run)
    if uid := settings.source_uid:
        source = Change(what="datasource", uid=uid, name=uid, state="unchanged")
        yield source, lambda: _datasource(grafana, source, dry_run=dry_run)
    for name in names():
        model = _model(settings, load(name))
        board = Change(what="dashboard", uid=model["uid"], name=model["title"], state="unchanged")
        yield board, lambda board=board, model=model: _dashboard(grafana, board, model, dry_run=dry_run)  # type: ignore[misc]  # mypy cannot infer a lambda with defaults
    for group in wanted_groups(settings) if settings.alerts else ():
        rules = Change(what="alerts", uid=group["title"], name=f"{len(group['rules'])} rules", state="unchanged")
        yield rules, lambda rules=rules, group=group: apply_group(grafana, rules, group, dry_run=dry_run)  # type: ignore[misc]  # as above


def _guarded(step: Step, wait: Callable[[float], Any] | None) -> Change:
    """Take a step; what fails is told of, and the others go on, unless nobody is let in or there."""
    change, take = step
    try:
        try:
            return _patiently(take, wait)
        except GrafanaError as error:
            if error.status not in CONFLICTS:
                raise
            return _patiently(take, wait)  # somebody was there first, perhaps another monitor: it looks again
    except GrafanaError as error:
        if error.status in (0, 401):
            raise
        return replace(change, state="failed", detail=str(error), passing=error.passing)


def _patiently(take: Callable[[], Taken], wait: Callable[[float], Any] | None) -> Taken:
    """Take a step, which looks before it writes, again after a passing failure."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return take()
        except GrafanaError as error:
            if wait is None or not error.passing or attempt == ATTEMPTS:
                raise
            wait(max(2.0 ** (attempt - 1), error.wait_seconds))
    raise AssertionError("the last attempt returns or raises")


def _folder(grafana: Grafana, change: Change, *, dry_run: bool) -> Change:
    there = grafana.folder(change.uid)
    if there is None:
        if not dry_run:
            grafana.create_folder(change.uid, change.name)
        return replace(change, state="created")
    if there.get("title") == change.name:
        return change
    renamed = f"its title is {there.get('title')!r}"
    if not grafana.settings.overwrite:
        return replace(change, state="kept", detail=f"{renamed}: --overwrite, or overwrite: true, sets it back")
    if not dry_run:
        grafana.rename_folder(change.uid, change.name)
    return replace(change, state="updated", detail=f"{renamed} no more")


def _datasource(grafana: Grafana, change: Change, *, dry_run: bool) -> Change:
    wanted = _source_wanted(grafana.settings)
    try:
        there = grafana.datasource(change.uid)
    except GrafanaError as error:
        if wanted or error.status != 403:
            raise
        return replace(change, detail="nobody looked whether it is there: that needs datasources:read")
    if there is None:
        if not wanted:
            detail = "there is none: --prometheus-url, or prometheus_url, makes it"
            return replace(change, state="failed", detail=detail)
        if not dry_run:
            grafana.create_datasource({"uid": change.uid, "name": change.name, **wanted})
        return replace(change, state="created")
    if "prometheus" not in str(there.get("type")):
        detail = f"it is there and of type {there.get('type')}: choose another --datasource-uid"
        return replace(change, state="failed", detail=detail)
    differing = list(_differing(there, wanted))
    if not differing:
        return change
    said = "; ".join(differing)
    if there.get("readOnly"):
        return replace(change, state="kept", detail=f"{said}: it is of a provisioning file, change it there")
    if not dry_run:
        kept = {key: value for key, value in there.items() if key not in SOURCE_ANSWER_ONLY}
        options = {**(there.get("jsonData") or {}), **wanted["jsonData"]}
        grafana.update_datasource(change.uid, {**kept, "url": wanted["url"], "jsonData": options})
    return replace(change, state="updated", detail=said)


def _source_wanted(settings: GrafanaSettings) -> Json:
    """Say what of a datasource is ours; nothing if no datasource is to be made."""
    if settings.prometheus_url is None:
        return {}
    options: Json = {"httpMethod": "POST"}
    if settings.scrape_interval_seconds is not None:
        options["timeInterval"] = f"{settings.scrape_interval_seconds}s"
    return {"type": "prometheus", "access": "proxy", "url": settings.prometheus_url, "jsonData": options}


def _differing(there: Json, wanted: Json) -> Iterator[str]:
    """Tell what of ours a datasource has otherwise; how it was made to log in is not ours."""
    if not wanted:
        return
    if there.get("url") != wanted["url"]:
        yield f"url {there.get('url')} → {wanted['url']}"
    options = there.get("jsonData") or {}
    for name, value in wanted["jsonData"].items():
        if options.get(name) != value:
            yield f"{name} {options.get(name)} → {value}"


def _model(settings: GrafanaSettings, dashboard: Json) -> Json:
    """Adapt a committed dashboard: uids with the prefix, and the datasource it opens with."""
    text = json.dumps(dashboard)
    for name in names():
        text = re.sub(rf"\b{OWN_PREFIX}-{re.escape(name)}\b(?![-.])", f"{settings.uid_prefix}-{name}", text)
    model: Json = json.loads(text)
    model.pop("id", None)
    model.pop("version", None)
    uid = settings.source_uid
    for variable in model.get("templating", {}).get("list", ()):
        if uid and variable.get("type") == "datasource":
            variable["current"] = {"selected": False, "text": uid, "value": uid}
    return model


def _digest(model: Json) -> str:
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()[:16]


def _dashboard(grafana: Grafana, change: Change, model: Json, *, dry_run: bool) -> Change:
    settings, digest = grafana.settings, _digest(model)
    folder_uid = settings.uid_prefix
    there = grafana.dashboard(change.uid)
    if there is None:
        change = replace(change, state="created")
    else:
        change = _judge(grafana, change, there, model, digest)
        model = {**model, "version": (there.get("dashboard") or {}).get("version", 0)}
        folder_uid = folder_uid if settings.overwrite else (there.get("meta") or {}).get("folderUid", folder_uid)
    if change.state in CHANGED and not dry_run:
        message = f"gradiometer {installed_version()} [{digest}]"
        grafana.save_dashboard(model, folder_uid, message, overwrite=settings.overwrite)
    return change


def _judge(grafana: Grafana, change: Change, there: Json, model: Json, digest: str) -> Change:
    """Tell what a dashboard that is there is: as it should be, an older one of ours, or changed by somebody else."""
    meta, overwrite = there.get("meta") or {}, grafana.settings.overwrite
    same = _plain(there.get("dashboard")) == _plain(model)
    if meta.get("provisioned"):
        if same:
            return replace(change, detail="of a provisioning file")
        file = f" {meta['provisionedExternalId']}" if meta.get("provisionedExternalId") else ""
        return replace(change, state="kept", detail=f"it is of the provisioning file{file}, which alone may change it")
    home = meta.get("folderUid", grafana.settings.uid_prefix)
    moved = "" if home == grafana.settings.uid_prefix else f"somebody moved it to the folder {home or 'General'}"
    saved = None if same else MESSAGE.fullmatch(grafana.dashboard_message(change.uid) or "")
    if same or (saved and saved[1] == digest):  # Grafana may show it in a newer schema than it was sent in
        return replace(change, state="updated" if moved and overwrite else "unchanged", detail=moved)
    if saved:
        return replace(change, state="updated", detail="it was of another version or other settings of gradiometer")
    if not overwrite:
        return replace(change, state="kept", detail=f"it was changed in Grafana: {REMEDY}")
    return replace(change, state="updated", detail="it was changed in Grafana; what it was stays in its history there")


def _plain(value: Any) -> Any:
    """Leave out of a model what Grafana adds or leaves out: its own numbers, and what is empty."""
    if isinstance(value, dict):
        own = VOLATILE if "schemaVersion" in value else ()  # a panel's id is ours
        plain = {key: _plain(each) for key, each in value.items() if key not in own}
        return {key: each for key, each in plain.items() if each not in (None, [], {}, "")}
    return [_plain(each) for each in value] if isinstance(value, list) else value
