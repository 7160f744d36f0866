"""Put our alert rules into a Grafana, as groups of rules over the provisioning API of its alerting.

Guarantees: a group that is as it should be is not written; only rules of ours that came over the same API are changed
or leave their group, because nobody can have edited them: Grafana's editor refuses rules of provenance ``api``. A group
with anybody else's rule in it, and rules that a provisioning file or nobody owns, are left as they are and told of.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from gradiometer_dashboards.rules.grafana import INTERVAL_SECONDS, groups
from gradiometer_monitor.grafana.change import Change
from gradiometer_monitor.grafana.client import Grafana, GrafanaError
from gradiometer_monitor.grafana.settings import GrafanaSettings

__all__ = ["apply_group", "wanted_groups"]

Json = dict[str, Any]
OURS = "api"
"""Provenance of what was written over the provisioning API."""
OF_FILES = ("dashboardUid", "panelId", "keepFiringFor", "missing_series_evals_to_resolve")
"""What only provisioning files have, or name otherwise; dashboard and panel are among the annotations too."""
NEWER = ("isPaused", "keep_firing_for", "missingSeriesEvalsToResolve")
"""What a Grafana that does not know it passes over, and leaves out of its answers."""
DURATIONS = ("for", "keep_firing_for")
WHOLE = ("labels", "annotations")
"""In which there must be nothing else, so that what a rule no longer says goes."""
DURATION = re.compile(r"(\d+)(ms|s|m|h|d|w|y)")
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
SHOWN_DIFFERENCES = 3
REMEDY = (
    "delete it there, or leave out --alerts, or alerts: true; under another uid prefix everything would alert twice"
)


def wanted_groups(settings: GrafanaSettings) -> list[Json]:
    """Write the groups as the API takes them."""
    folder = settings.uid_prefix
    return [
        {
            "title": group["name"],
            "folderUid": folder,
            "interval": INTERVAL_SECONDS,
            "rules": [_rule(rule, folder, group["name"]) for rule in group["rules"]],
        }
        for group in groups(settings.rules)
    ]


def _rule(of_file: Json, folder: str, group: str) -> Json:
    """Turn a rule of a provisioning file into one of the API, which names some things otherwise."""
    rule = {name: value for name, value in of_file.items() if name not in OF_FILES}
    rule |= {"folderUID": folder, "ruleGroup": group, "keep_firing_for": of_file.get("keepFiringFor", "0s")}
    missing = of_file.get("missing_series_evals_to_resolve")
    return rule | ({} if missing is None else {"missingSeriesEvalsToResolve": missing})


def apply_group(grafana: Grafana, change: Change, wanted: Json, *, dry_run: bool) -> Change:
    """Make a group of rules as it should be, in the folder of the dashboards."""
    folder, title = wanted["folderUid"], wanted["title"]
    there = grafana.rule_group(folder, title)
    differing = [] if there is None else list(_differing(there, wanted))
    if there is not None and not differing:
        return change
    if hindrance := _hindrance(grafana, there or {}, wanted):
        return replace(change, state="kept", detail=hindrance)
    if not dry_run:
        if grafana.folder(folder) is None:  # some releases would make rules in a folder that nobody can open
            raise GrafanaError(f"there is no folder {folder} for the rules: see why it could not be made", status=404)
        grafana.save_rule_group(folder, title, wanted)
    if there is None:
        return replace(change, state="created")
    more = len(differing) - SHOWN_DIFFERENCES
    said = "; ".join(differing[:SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
    return replace(change, state="updated", detail=said)


def _differing(there: Json, wanted: Json) -> Iterator[str]:
    """Tell what of ours a group has otherwise; the order of the rules is of no account."""
    if there.get("interval") != wanted["interval"]:
        yield f"interval {there.get('interval')} → {wanted['interval']} s"
    known, ours = _by_uid(there), _by_uid(wanted)
    yield from (f"{uid} was missing" for uid in ours if uid not in known)
    yield from (f"{uid} is no rule of ours any more" for uid in known if uid not in ours)
    for uid in (uid for uid in ours if uid in known):
        fields = [
            name for name in (*ours[uid], *_surplus(known[uid], ours[uid])) if not _same(name, known[uid], ours[uid])
        ]
        if fields:
            yield f"{uid}: {', '.join(fields)}"


def _by_uid(group: Json) -> dict[str, Json]:
    return {str(rule.get("uid")): rule for rule in group.get("rules") or ()}


def _surplus(there: Json, wanted: Json) -> list[str]:
    return [name for name in NEWER if name not in wanted and there.get(name) is not None]


def _same(name: str, there: Json, wanted: Json) -> bool:
    its, ours = there.get(name), wanted.get(name)
    if name in NEWER and its is None:
        return True
    if name in DURATIONS:
        return bool(_seconds(its) == _seconds(ours))
    return bool((its or {}) == ours) if name in WHOLE else _covers(its, ours)


def _seconds(text: Any) -> Any:
    """Read ``1h30m``; whatever else it is stays as it is."""
    parts = DURATION.findall(str(text))
    if "".join(map("".join, parts)) != str(text):
        return text
    return sum(int(number) * SECONDS[unit] for number, unit in parts)


def _covers(there: Any, wanted: Any) -> bool:
    """Tell whether everything wanted is there; Grafana adds defaults of its own to a query."""
    if isinstance(wanted, dict):
        return isinstance(there, dict) and all(_covers(there.get(name), each) for name, each in wanted.items())
    if isinstance(wanted, list):
        return isinstance(there, list) and len(there) == len(wanted) and all(map(_covers, there, wanted))
    return bool(there == wanted)


def _hindrance(grafana: Grafana, there: Json, wanted: Json) -> str:
    """Say whose rule is in the way, and what to do; a group's answer does not tell provenances, its rules' do."""
    folder, ours = wanted["folderUid"], _by_uid(wanted)
    for uid in (*_by_uid(there), *(uid for uid in ours if uid not in _by_uid(there))):
        if uid not in ours and not uid.startswith(f"{folder}-"):
            return f"the rule {uid} in it is not ours, and would be deleted: move it to a group of its own"
        rule = grafana.alert_rule(uid)
        if rule is None:
            continue
        if (provenance := rule.get("provenance") or "") != OURS:
            owner = {"": "somebody's own", "file": "of a provisioning file"}.get(provenance, f"of {provenance}")
            return f"the rule {uid} is {owner}: {REMEDY}"
        if rule.get("folderUID") != folder:
            return f"the rule {uid} is in the folder {rule.get('folderUID')}: {REMEDY}"
    return ""
