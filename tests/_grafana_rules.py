"""Alert rules as the stub of Grafana keeps them: its provisioning API, as documented and as its source has it.

What is kept of it: a group is replaced as a whole, what a rule may be, titles once in a folder, uids once in all, who
may, provenances that do not mix, and which only the answer about one rule tells; defaults that Grafana adds to a query.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from tests._grafana_answers import UID, Json, RefusalError, require_role, require_there

DISABLE_PROVENANCE = "X-Disable-Provenance"
"""A header: what is written with it may be edited in Grafana."""
KNOWN = (
    *("id", "uid", "orgID", "folderUID", "ruleGroup", "title", "condition", "data", "updated", "noDataState"),
    *("execErrState", "for", "keep_firing_for", "annotations", "labels", "provenance", "isPaused"),
    *("notification_settings", "record", "missingSeriesEvalsToResolve"),
)
"""Fields of a rule; what else is sent is passed over."""
READ_BY_RULE_ONLY = "provenance"
NO_DATA, ERROR = ("Alerting", "NoData", "OK", "KeepLast"), ("OK", "Alerting", "Error", "KeepLast")
UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000, "y": 31_536_000_000}
BASE_INTERVAL_SECONDS = 10


class RuleStub:
    """Alert rules, by uid, and the folders they are in."""

    def __init__(self) -> None:
        self.folders: dict[str, Json] = {}
        self.rules: dict[str, Json] = {}
        self.intervals: dict[tuple[str, str], int] = {}
        self.unknown_fields: tuple[str, ...] = ()
        """Fields that this Grafana is too old for."""

    def get_rule(self, role: str, query: Any, body: Any, uid: str) -> Json:
        require_role(role, "alert.rules:read", "Viewer")
        return require_there(self.rules.get(uid), "")

    def get_rule_group(self, role: str, query: Any, body: Any, folder: str, title: str) -> Json:
        require_role(role, "alert.rules:read", "Viewer")
        found = [rule for rule in self.rules.values() if (rule["folderUID"], rule["ruleGroup"]) == (folder, title)]
        if not found:
            raise RefusalError(404, "rule group not found", messageId="alerting.alert-rule-group.notFound")
        shown = [{key: value for key, value in rule.items() if key != READ_BY_RULE_ONLY} for rule in found]
        return {"title": title, "folderUid": folder, "interval": self.intervals[folder, title], "rules": shown}

    def put_rule_group(self, role: str, query: dict[str, list[str]], body: Json, folder: str, title: str) -> Json:
        require_role(role, "alert.provisioning:write", "Editor")
        provenance = "" if DISABLE_PROVENANCE in query else "api"
        if body["interval"] <= 0 or body["interval"] % BASE_INTERVAL_SECONDS:
            raise RefusalError(400, f"interval ({body['interval']}s) should be divided by the scheduler interval 10s")
        if not 1 <= len(title) <= 190:
            raise RefusalError(400, "rule group name is too long")
        if folder not in self.folders:
            raise RefusalError(400, "invalid alert rule: folder does not exist")
        made = [self._made(rule, folder, title, provenance) for rule in body["rules"]]
        uids = {rule["uid"] for rule in made}
        gone = [
            uid
            for uid, rule in self.rules.items()
            if uid not in uids and (rule["folderUID"], rule["ruleGroup"]) == (folder, title)
        ]
        for uid in [*gone, *(uid for uid in uids if uid in self.rules)]:
            stored = self.rules[uid][READ_BY_RULE_ONLY]
            if stored not in ("", provenance) and not (stored == "api" and provenance == ""):
                raise RefusalError(500, f"cannot update with provided provenance '{provenance}', needs '{stored}'")
        kept = [rule for uid, rule in self.rules.items() if uid not in uids and uid not in gone]
        titles = [rule["title"] for rule in (*kept, *made) if rule["folderUID"] == folder]
        if len(set(titles)) < len(titles):
            raise RefusalError(400, "an alert rule with the same title already exists in this folder")
        self.rules = {rule["uid"]: rule for rule in (*kept, *made)}
        self.intervals[folder, title] = body["interval"]
        return body | {"title": title, "folderUid": folder}

    def delete_rules_of(self, folder: str, *, force: bool) -> None:
        """Delete the rules of a folder that is to be deleted."""
        there = [uid for uid, rule in self.rules.items() if rule["folderUID"] == folder]
        if there and not force:
            raise RefusalError(400, "folder cannot be deleted: folder is not empty")
        for uid in there:
            del self.rules[uid]

    def _made(self, sent: Json, folder: str, title: str, provenance: str) -> Json:
        known = [name for name in KNOWN if name not in self.unknown_fields]
        rule = {name: copy.deepcopy(sent[name]) for name in known if name in sent}
        _check(rule)
        for query in rule["data"]:
            query.setdefault("queryType", "")
            query["model"] = {"intervalMs": 1000, "maxDataPoints": 43200, **query["model"]}
        durations = {name: _normal(rule.get(name, "0s")) for name in ("for", "keep_firing_for") if name in known}
        fixed = {
            "id": len(self.rules) + 1,
            "orgID": 1,
            "folderUID": folder,
            "ruleGroup": title,
            "provenance": provenance,
        }
        blank = {"isPaused": False, "updated": "2026-01-01T00:00:00Z", "notification_settings": None, "record": None}
        return blank | rule | durations | fixed


def _check(rule: Json) -> None:
    """Refuse what cannot be a rule."""
    refs = [query["refId"] for query in rule["data"]]
    wrong = {
        "uid": not UID.fullmatch(rule["uid"]),
        "title": not 1 <= len(rule["title"]) <= 190,
        "condition": rule["condition"] not in refs,
        "data": len(set(refs)) < len(refs),
        "noDataState": rule["noDataState"] not in NO_DATA,
        "execErrState": rule["execErrState"] not in ERROR,
        "datasourceUid": not all(query["datasourceUid"] for query in rule["data"]),
        "relativeTimeRange": not all(
            query["datasourceUid"] == "__expr__"
            or query["relativeTimeRange"]["from"] > query["relativeTimeRange"]["to"] >= 0
            for query in rule["data"]
        ),
        "annotations": not all(isinstance(text, str) for text in rule.get("annotations", {}).values()),
        "panel": "__panelId__" in rule["annotations"] and "__dashboardUid__" not in rule["annotations"],
        "missingSeriesEvalsToResolve": rule.get("missingSeriesEvalsToResolve", 1) < 1,
    }
    if said := [name for name, is_so in wrong.items() if is_so]:
        raise RefusalError(400, f"invalid alert rule {rule['uid']}: {', '.join(said)}")


def _normal(text: Any) -> str:
    """Write a duration as Grafana does, in the largest units that leave whole numbers."""
    if not isinstance(text, str) or not re.fullmatch(r"(\d+(ms|[smhdwy]))+|0", text):
        raise RefusalError(400, f"bad request data: not a valid duration string: {text!r}")
    rest = sum(int(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhdwy])", text))
    written = ""
    for unit in ("d", "h", "m", "s", "ms"):
        number, rest = divmod(rest, UNITS[unit])
        written += f"{number}{unit}" if number else ""
    return written or "0s"


PROVISIONING = "/api/v1/provisioning"
RULE_ROUTES: list[tuple[str, Callable[..., Any]]] = [
    (rf"GET {PROVISIONING}/alert-rules/([^/]+)", RuleStub.get_rule),
    (rf"GET {PROVISIONING}/folder/([^/]+)/rule-groups/([^/]+)", RuleStub.get_rule_group),
    (rf"PUT {PROVISIONING}/folder/([^/]+)/rule-groups/([^/]+)", RuleStub.put_rule_group),
]
