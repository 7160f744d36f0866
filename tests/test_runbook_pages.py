"""The runbooks as the monitor serves them: by name, without a token, as text that loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gradiometer_monitor.web import runbooks as served
from gradiometer_monitor.web.guards import HEADERS as OF_ALL
from gradiometer_monitor.web.page import HEADERS
from gradiometer_monitor.web.runbooks import INDEX, runbooks
from tests._monitor import Monitor
from tests._web import AS_READER, with_tokens

if TYPE_CHECKING:
    from tests.conftest import Start

ROOT = Path(__file__).parent.parent


class Links(HTMLParser):
    """Collects what a page refers to, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(tag, value or "") for name, value in attrs if name in ("href", "src")]
        self.anchors |= {value or "" for name, value in attrs if name == "id"}


@pytest.fixture(scope="module")
def monitor(shared_start: Start, tmp_path_factory: pytest.TempPathFactory) -> Monitor:
    """Start a monitor that lets nobody in without a token, over no runs."""
    return shared_start(*with_tokens(tmp_path_factory.mktemp("config")))


def text_of(monitor: Monitor, path: str) -> str:
    status, body, headers = monitor.get(path)
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8"), path
    return body.decode()


def test_every_page_is_served(monitor: Monitor) -> None:
    """The index and each alert's page, with a title, headings to link to, and the file's own words."""
    for name in runbooks():
        text = text_of(monitor, "/runbooks/" if name == INDEX else f"/runbooks/{name}")
        assert text.startswith('<!doctype html>\n<html lang="en">')
        title = "Runbooks" if name == INDEX else f"Gradiometer{name}"
        assert f"<title>{title} · gradiometer</title>" in text
        assert f">{title}</h1>" in text
        assert name == INDEX or '<h2 id="what-to-do-now">' in text


@pytest.mark.parametrize(
    "name", ["NonFinite", "nonfinite", "GradiometerNonFinite", "GRADIOMETERNONFINITE", "nonFinite"]
)
def test_a_page_has_more_than_one_name(monitor: Monitor, name: str) -> None:
    """In whatever case, and as the alert is called; the answer is the same."""
    assert text_of(monitor, f"/runbooks/{name}") == text_of(monitor, "/runbooks/NonFinite")


@pytest.mark.parametrize(
    "name", ["nothing", "Gradiometer", "NonFinite.md", "%00", "x" * 4000, "%3Cb%3E", "gradiometergradiometernonfinite"]
)
def test_what_is_no_runbook_is_404(monitor: Monitor, name: str) -> None:
    """A name that is not in the list is answered with the list, and is not repeated."""
    status, body, headers = monitor.get(f"/runbooks/{name}")
    assert (status, headers["content-type"]) == (404, "text/html; charset=utf-8")
    assert body == monitor.get("/runbooks/")[1]


@pytest.mark.parametrize(
    "name", ["..%2fmonitor.md", "%2e%2e%2f%2e%2e%2fpyproject.toml", "..", "x/metrics", "..%2fmetrics"]
)
def test_a_name_is_never_a_path(monitor: Monitor, name: str) -> None:
    """Nothing is read that is not in the list, and no other path of the monitor is opened by the prefix."""
    status, body, _ = monitor.get(f"/runbooks/{name}")
    assert status == (404 if name == ".." else 401)  # what is below a page is no route, and so not open
    status, body_of_reader, _ = monitor.get(f"/runbooks/{name}", **AS_READER)
    assert status == 404
    body += body_of_reader
    assert b"gradiometer_" not in body
    assert b"hatchling" not in body


def test_runbooks_are_open_and_tell_nothing_of_runs(monitor: Monitor) -> None:
    """They need no token, and open no other path; every monitor's are the same, with the headers of the live page."""
    for path in ("/runbooks/", "/runbooks", "/runbooks/NonFinite"):
        status, _, headers = monitor.get(path)
        assert status == 200
        assert {name: headers[name] for name in HEADERS} == HEADERS
        assert headers["x-frame-options"] == OF_ALL["x-frame-options"]
    assert monitor.get("/runbooksmetrics")[0] == 401
    assert monitor.get("/metrics")[0] == 401
    tag = monitor.get("/runbooks/Spike")[2]["etag"]
    assert monitor.get("/runbooks/Spike", **{"If-None-Match": tag})[0] == 304


def test_pages_load_nothing_and_lead_to_each_other(monitor: Monitor) -> None:
    """No script or style stands in a page, files come from this server, and every link is answered, and its anchor."""
    pages = {name: text_of(monitor, "/runbooks/" if name == INDEX else f"/runbooks/{name}") for name in runbooks()}
    links = {name: Links(text) for name, text in pages.items()}
    assets, targets = set[str](), set[tuple[str, str]]()
    for name, text in pages.items():
        assert not re.search(r"<style|style=|<script(?![^>]*\bsrc=)| on\w+=|<img", text)
        for tag, link in links[name].found:
            page, _, anchor = link.partition("#")
            if tag != "a" or page == "../":
                assets.add(link)
            else:
                targets.add(({"": name, "./": INDEX}.get(page, page), anchor))
    assert len(assets) == 6
    for asset in assets:
        assert asset.startswith("../")
        assert monitor.get(asset.removeprefix(".."))[0] == 200, asset
    assert {page for page, _ in targets} == set(runbooks())
    assert [(page, anchor) for page, anchor in targets if anchor and anchor not in links[page].anchors] == []


def test_markup_in_a_page_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw HTML is shown as it is written; links to scripts or to elsewhere lose their target and keep their text."""
    links = "[a](javascript:alert(1)) [b](https://x.test) [c](../security.md#limits)"
    page = f"# A <b>\n\n<script>alert(1)</script>\n\n{links}\n"
    monkeypatch.setattr(served, "runbooks", lambda: {"A": page})
    text = served._render.__wrapped__("A").content.decode()
    assert "<title>A &lt;b&gt; · gradiometer</title>" in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "b [https://x.test] c [docs/security.md]" in text
    assert 'href="javascript' not in text
    assert 'https://x.test"' not in text


def test_a_monitor_without_runbooks_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the documentation is not installed, every page is a 404 that says where it is, and no failure."""
    for folder in (tmp_path / "none", tmp_path):
        monkeypatch.setattr(served, "_folder", lambda folder=folder: folder)
        monkeypatch.setattr(served, "runbooks", served.runbooks.__wrapped__)
        client = TestClient(Starlette(routes=served.routes()))
        for path in ("/runbooks", "/runbooks/", "/runbooks/NonFinite", "/runbooks/README"):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["x-content-type-options"]) == (404, "nosniff")
            assert "docs/runbooks of gradiometer's repository" in answer.text
        monkeypatch.undo()


def test_the_checkout_serves_its_documentation() -> None:
    """Installed editable, a page is what stands in docs/runbooks at the start of the monitor."""
    folder = ROOT / "docs" / "runbooks"
    if not folder.is_dir():
        pytest.skip("the documentation is not beside the tests")
    assert runbooks() == {path.stem: path.read_text() for path in folder.glob("*.md")}


def test_the_wheel_has_them(tmp_path: Path) -> None:
    """Built as it is published, the wheel holds every page, and its code finds them there."""
    if not (ROOT / "pyproject.toml").is_file() or not (ROOT / "docs").is_dir():
        packaged = Path(served.__file__).parents[1] / "runbooks"
        assert {path.stem for path in packaged.glob("*.md")} == set(runbooks())
        return
    build = f"import hatchling.build as b; print(b.build_wheel({str(tmp_path)!r}))"
    made = subprocess.run(
        [sys.executable, "-c", build], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    )
    with zipfile.ZipFile(tmp_path / made.stdout.split()[-1]) as wheel:
        wheel.extractall(tmp_path / "site")
    ask = "from gradiometer_monitor.web import runbooks as r; print(r._folder(), len(r.runbooks()))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-P", "-c", ask]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "site" / "gradiometer_monitor" / "runbooks"), str(len(runbooks()))]
