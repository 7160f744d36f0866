"""The live page in a real Chromium: live data, keys, both themes, narrow screens, hostile names, a monitor that goes.

Every page that is opened here must be free of console errors and of requests to another host.
"""

from __future__ import annotations

import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradiometer.recorder import Recorder, RowHeader
from gradiometer.run import open_run
from tests._monitor import Monitor
from tests._web import READ, WRITE, write_config, write_tokens

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

    from tests.conftest import Append, MakeManifest, Spawn, Start, WaitUntil, WriteRun

pytestmark = pytest.mark.native

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 60_000
"""Milliseconds; a Chromium without a GPU draws slowly beside other tests."""
NAN = float("nan")
HOSTILE = '<img src=x onerror="document.title=1">'
TRAINING = """
import sys, time, torch, gradiometer
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
policy = {"pipeline": [{"nonfinite": {}}, {"global_norm": {"max_norm": 0.5}}]}
with gradiometer.attach(model, optimizer, policy=policy, dir=sys.argv[1], run_id="live", ring_bytes=2**20) as agent:
    for step in range(100_000):
        loss = model(torch.randn(16, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        agent.log(loss=loss)
        time.sleep(0.02)
"""

Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser(native_binary: Callable[[str], str]) -> Iterator[Browser]:
    """Give one Chromium for all tests of this file."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=native_binary("chromium"), args=ARGUMENTS)
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Give a function that opens a path of a monitor in a fresh profile; watch over what the page does meanwhile."""
    contexts, errors, asked = [], list[str](), set[str]()

    def go(monitor: Monitor, path: str = "/", *, expected: str = "^$", **options: Any) -> Page:
        context = browser.new_context(**({"viewport": WIDE} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda said: errors.append(said.text) if not re.search(expected, said.text) else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.add(request.url.split("/")[2]))
        page.goto(monitor.url + path)
        ours.add(monitor.url.removeprefix("http://"))
        return page

    ours = set[str]()
    yield go
    for context in contexts:
        context.close()
    assert errors == []
    assert asked <= ours


def run_page(visit: Open, monitor: Monitor, run_id: str = "run", **options: Any) -> Page:
    """Open a run and wait until its charts are drawn."""
    page = visit(monitor, f"/#run={run_id}", **options)
    page.wait_for_selector(".uplot canvas")
    page.wait_for_selector(".layers tbody tr")
    return page


@pytest.fixture(scope="module")
def two_runs(
    shared_start: Start, make_manifest: MakeManifest, append: Append, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Monitor]:
    """Give a monitor over a run with a spike, a step that was not finite and an incident, and over one that is over."""
    norms = np.random.default_rng(0).random((400, 4)) + 0.5
    norms[250, 2], norms[300, 1] = 5000.0, NAN
    norms[:, 3] = -0.0
    policies: dict[str, Any] = {
        "policies": ("global_norm",),
        "policy": {"pipeline": [{"global_norm": {"max_norm": 1.0}}]},
    }
    root = tmp_path_factory.mktemp("runs")
    recorder = Recorder(root, make_manifest(capacity=512, created_ns=time.time_ns(), **policies))
    recorder.policies[:, 0] = 1.0
    now = time.time_ns()
    for step, row in enumerate(norms):
        recorder.stats[:] = row
        recorder.commit(_header(step, row, now + step * 10**6))
    recorder.event("nonfinite", "blocks.0.1 is not finite", step=300)
    recorder.event("backward_order", "of less weight", step=301)
    another = Recorder(root, make_manifest("another", created_ns=time.time_ns()))
    append(another, np.ones((3, 4)))
    another.close()
    yield shared_start(root=root)
    recorder.close()


def _header(step: int, row: Any, time_ns: int) -> RowHeader:
    norm = float(np.sqrt(np.square(row.astype(np.float64)).sum()))
    flags = 128 + (4 if math.isfinite(norm) else 3)
    return RowHeader(step, time_ns, flags, 1, 0, 1, -1, 0, norm, 1.0, 0.5, 0.001, 2.0 - step / 400, NAN, 0.001, 0.0)


def shown_step(page: Page) -> int:
    text = page.locator(".tiles dd").first.inner_text()
    return int(re.sub(r"\D", "", text) or -1)


def test_a_training_run_is_live(start: Start, spawn: Spawn, visit: Open, tmp_path: Path, wait_until: WaitUntil) -> None:
    """A step that a real loop takes is on the page within two seconds, in the list and as a point of the chart."""
    spawn(sys.executable, "-c", TRAINING, tmp_path)
    wait_until(lambda: (tmp_path / "live" / "rank-00000" / "manifest.json").exists())
    monitor = start()
    page = visit(monitor)
    page.wait_for_selector("text=running")
    page.click("text=live >> nth=-1")
    page.wait_for_selector(".uplot canvas")
    took = []
    for _ in range(5):
        newest, asked_at = int(open_run(tmp_path / "live").steps[-1]), time.monotonic()
        while shown_step(page) < newest:
            assert time.monotonic() - asked_at < 30
        took.append(time.monotonic() - asked_at)
    assert min(took) < 2, took
    drawn = page.locator(".toolbar .span").inner_text()
    wait_until(lambda: page.locator(".toolbar .span").inner_text() != drawn)
    assert page.locator(".stages").inner_text().startswith("nonfinite")
    assert "0.5" in page.locator(".stages").inner_text()
    page.click("text=Pause")
    page.wait_for_timeout(600)
    held = page.locator(".toolbar .span").inner_text()
    newest = shown_step(page)
    wait_until(lambda: shown_step(page) > newest + 20)
    assert page.locator(".toolbar .span").inner_text() == held
    page.click("text=Resume")
    wait_until(lambda: page.locator(".toolbar .span").inner_text() != held)


def test_the_heatmap_names_what_is_under_the_cursor(two_runs: Monitor, visit: Open) -> None:
    """Mouse and arrow keys move over layers and steps; cells without gradient and not finite say so."""
    page = run_page(visit, two_runs)
    heat = page.locator(".heat")
    heat.scroll_into_view_if_needed()
    box = heat.locator("canvas").bounding_box()
    assert box is not None
    label = int(heat.locator("canvas").get_attribute("data-label") or 0)
    tip = page.locator(".tip")

    def over(layer: int, share: float) -> str:
        page.mouse.move(box["x"] + label + share * (box["width"] - label), box["y"] + (layer + 0.5) * 22)
        return tip.inner_text()

    assert over(0, 0.01).startswith("embed\nstep")
    assert over(2, 0.5).startswith("head\n")
    assert "no gradient" in over(2, 0.5)
    found = {over(1, place / 300) for place in range(180, 260)}
    assert any("not finite" in text for text in found)
    assert any("5000" in text for text in found)
    page.mouse.move(0, 0)
    heat.focus()
    page.keyboard.press("ArrowRight")
    for _ in range(5):
        page.keyboard.press("ArrowDown")
    assert tip.inner_text().startswith("head")
    assert "head" in page.locator("#say").inner_text()
    page.keyboard.press("Home")
    assert "step 0" in tip.inner_text() or "steps 0" in tip.inner_text()
    page.keyboard.press("Enter")
    assert "step=0" in page.url


def test_keys_alone_lead_to_a_run_and_back(two_runs: Monitor, visit: Open) -> None:
    """Tab reaches every control with a ring that can be seen, Enter opens a run, and Back leads to the list."""
    page = visit(two_runs)
    page.wait_for_selector("text=another")
    seen = []
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.textContent.trim() || document.activeElement.id"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        if seen[-1] == "run":
            break
    assert seen[-1] == "run", seen
    assert "filter" in seen
    page.keyboard.press("Enter")
    page.wait_for_selector(".uplot canvas")
    assert page.locator("h1").inner_text() == "run"
    assert page.evaluate("document.activeElement.id") == "main"
    page.locator(".plot").first.focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#say").inner_text().startswith("step 398: norm 2.143, usual")
    page.go_back()
    page.wait_for_selector("h1:text('Runs')")
    page.go_forward()
    page.wait_for_selector("h1:text('run')")


def test_the_list_sorts_and_filters(two_runs: Monitor, visit: Open) -> None:
    """Running before finished unless another column is asked for; words filter by name and state."""
    page = visit(two_runs)
    page.wait_for_selector("text=another")
    names = page.locator(".runs td.c-run")
    assert names.all_inner_texts() == ["run", "another"]
    of_few_steps = "\u2013"
    assert page.locator(".runs td.c-clipped").all_inner_texts() == ["100 %", of_few_steps]
    page.click("th button:text('Run')")
    assert names.all_inner_texts() == ["another", "run"]
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"
    page.fill("#filter", "finish")
    assert names.all_inner_texts() == ["another"]
    page.fill("#filter", "nothing")
    page.wait_for_selector("text=No run fits the filter")


def test_an_incident_leads_to_its_step(two_runs: Monitor, visit: Open) -> None:
    """A click marks the step, also when it has to be brought into what is shown, and the address says so."""
    page = run_page(visit, two_runs)
    page.select_option("#range", "200")
    page.wait_for_selector(".span:text('steps 200\u2013399')")
    page.evaluate("location.hash = 'run=run&from=0&to=100'")
    page.wait_for_selector(".span:text('steps 0\u2013100')")
    page.click(".incident:has-text('is not finite')")
    page.wait_for_selector(".span:text('steps 100\u2013399')")
    assert "step=300" in page.url
    page.reload()
    page.wait_for_selector(".span:text('steps 100\u2013399')")
    page.click("text=Show the whole run")
    page.wait_for_selector(".span:text('steps 0\u2013399')")
    assert "not finite in 1" in page.locator("figure .said").first.inner_text()
    assert "Largest 5000" in page.locator("figure .said").first.inner_text()


def test_an_incident_leads_to_its_runbook(two_runs: Monitor, visit: Open) -> None:
    """What an alert would tell as well links the page of that alert; other incidents link none."""
    page = run_page(visit, two_runs)
    assert page.locator(".incidents li:has-text('of less weight') a").count() == 0
    page.click(".incidents li:has-text('is not finite') >> text=What to do")
    assert page.locator("h1").inner_text() == "GradiometerNonFinite"


def test_dragging_over_a_chart_zooms(two_runs: Monitor, visit: Open) -> None:
    """What was dragged over is asked for anew, at a finer resolution."""
    page = run_page(visit, two_runs)
    box = page.locator(".u-over").first.bounding_box()
    assert box is not None
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] * 0.25, y)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.5, y, steps=5)
    page.mouse.up()
    page.wait_for_selector(".span:text-matches('steps (9|10)\\\\d\u2013(19|20)\\\\d')")
    assert page.locator("#range").input_value() == "custom"


def test_nothing_is_wider_than_the_screen(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, visit: Open
) -> None:
    """Long names break or are cut; there is no horizontal scrolling, in the list or in a run."""
    name = "a" * 120
    layers = ["layer." + "x" * 200, "b.c"]
    recorder = write_run(make_manifest(name, layers=layers, created_ns=time.time_ns()), np.ones((20, 2)))
    recorder.event("nonfinite", "y" * 300, step=3)
    monitor = start()
    for viewport in (WIDE, NARROW):
        page = visit(monitor, viewport=viewport)
        page.wait_for_selector(".runs tbody tr")
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        page = run_page(visit, monitor, name, viewport=viewport)
        page.wait_for_selector(".incident")
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


def test_a_lost_run_stands_out(start: Start, make_manifest: MakeManifest, write_run: WriteRun, visit: Open) -> None:
    """The incident of a process that is gone is as red as one of a gradient that was not finite."""
    gone = make_manifest("gone", created_ns=time.time_ns(), pid=2**22 + 1, process_start=1)
    write_run(gone, np.ones((20, 4))).event("nonfinite", "blocks.0.1 is not finite", step=3)
    page = run_page(visit, start(), "gone")
    page.wait_for_selector(".incident .chip:text-is('run lost')")
    assert set(page.locator(".chip[data-level=high]").all_inner_texts()) == {"run lost", "nonfinite"}


def test_a_run_that_is_not_there(start: Start, make_manifest: MakeManifest, write_run: WriteRun, visit: Open) -> None:
    """The page says so, not that the monitor is away, and shows the run once it begins."""
    monitor = start()
    page = visit(monitor, "/#run=later", expected="404")
    page.wait_for_selector(".notice:text-matches('No run later is followed here')")
    page.wait_for_selector("#link:text-is('live')")
    assert not page.locator(".board").is_visible()
    write_run(make_manifest("later", created_ns=time.time_ns()), np.ones((20, 4)))
    page.wait_for_selector(".uplot canvas")
    page.wait_for_selector(".layers tbody tr")
    page.wait_for_selector(".notice", state="hidden")


CONTRASTS = """() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return text.startsWith("color(srgb")
    ? [...n.slice(0, 3).map((v) => 255 * v), n[3] ?? 1] : [n[0], n[1], n[2], n[3] ?? 1]; };
  const behind = (element) => { for (let e = element; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => { const [r, g, b] = c.slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.closest("noscript, option, .hidden")) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text, element.className]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_themes(two_runs: Monitor, visit: Open, scheme: str) -> None:
    """Every text has at least 4.5 to 1 against what is behind it (WCAG AA); the switch changes the theme."""
    for path in ("/", "/#run=run"):
        page = visit(two_runs, path, color_scheme=scheme)
        page.wait_for_selector(".runs tbody tr" if path == "/" else ".layers tbody tr")
        found = page.evaluate(CONTRASTS)
        assert len(found) > 20
        assert [each for each in found if each[0] < 4.5] == []
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
        page.reload()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_runbooks_read_well_in_both_themes_and_on_a_phone(two_runs: Monitor, visit: Open, scheme: str) -> None:
    """A runbook is no wider than the screen, has contrast, follows the theme of the live page, and can switch it."""
    for viewport in (WIDE, NARROW):
        page = visit(two_runs, "/runbooks/NonFiniteUpdate", color_scheme=scheme, viewport=viewport)
        assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
        assert [each for each in page.evaluate(CONTRASTS) if each[0] < 4.5] == []
    page.click("nav >> text=Runbooks")
    page.click("table >> text=Spike")
    assert page.locator("h1").inner_text() == "GradiometerSpike"
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.click(".brand")
    page.wait_for_selector(".runs tbody tr")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_hostile_names_are_text(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, visit: Open, tmp_path: Path
) -> None:
    """What a job calls its layers, labels and incidents is shown as it is, and never becomes markup."""
    fields: dict[str, Any] = {"labels": {"team": HOSTILE}, "job": HOSTILE, "device": HOSTILE}
    recorder = write_run(make_manifest(layers=[HOSTILE, "b"], created_ns=time.time_ns(), **fields), np.ones((5, 2)))
    recorder.event(HOSTILE, HOSTILE, step=1)
    (tmp_path / "broken" / "rank-00000").mkdir(parents=True)
    (tmp_path / "broken" / "rank-00000" / "manifest.json").write_text("{")
    monitor = start()
    page = visit(monitor)
    page.wait_for_selector("text=broken/rank-00000")
    page = run_page(visit, monitor)
    page.wait_for_selector(".incident:has-text('onerror')")
    for place in (".facts", ".incidents", ".layers tbody"):
        assert HOSTILE in page.locator(place).inner_text()
    page.locator(".heat").focus()
    page.keyboard.press("Home")
    assert page.locator(".tip").inner_text().startswith(HOSTILE)
    assert page.locator("img").count() == 0
    assert page.title() == "run · gradiometer"


def test_no_runs_yet_says_what_to_do(start: Start, visit: Open) -> None:
    """An empty monitor explains itself, and so does the address of a run that is not there."""
    monitor = start()
    page = visit(monitor)
    page.wait_for_selector("text=gradiometer demo")
    page = visit(monitor, "/#run=gone", expected="404")
    page.wait_for_selector("text=No run gone is followed here")


def test_a_monitor_that_goes_is_told_and_found_again(
    start: Start, spawn: Spawn, make_manifest: MakeManifest, write_run: WriteRun, visit: Open, tmp_path: Path
) -> None:
    """The page says that it hears nothing, keeps what it has, and goes on by itself when the monitor is back."""
    write_run(make_manifest(created_ns=time.time_ns()), np.ones((5, 4)))
    monitor = start()
    page = visit(monitor, expected="ERR_|Failed to load")
    page.wait_for_selector("#link[data-state=live]")
    page.wait_for_selector(".runs tbody tr")
    monitor.process.terminate()
    page.wait_for_selector("#link:text('monitor not reachable')")
    assert page.locator(".runs tbody tr").count() == 1
    monitor.process.communicate(timeout=60)
    port = monitor.url.rpartition(":")[2]
    spawn(sys.executable, "-m", "gradiometer_monitor", "--dir", tmp_path, "--port", port)
    page.wait_for_selector("#link[data-state=live]")


def test_a_token_is_asked_for(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, visit: Open, tmp_path: Path
) -> None:
    """Where the monitor has tokens the page asks for one, again if it is wrong, and keeps it out of every URL."""
    write_run(make_manifest(created_ns=time.time_ns()), np.ones((5, 4)))
    tokens = write_tokens(tmp_path.with_name(f"{tmp_path.name}-tokens"))
    config = write_config(tmp_path.with_name(f"{tmp_path.name}-config.yaml"), auth={"tokens_file": str(tokens)})
    monitor = start("--config", config)
    page = visit(monitor, expected="401")
    page.wait_for_selector("dialog[open]")
    page.fill("#token-value", "not-a-token-of-this-monitor")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=That token is not")
    page.fill("#token-value", READ)
    page.keyboard.press("Enter")
    page.wait_for_selector(".runs tbody tr")
    assert page.evaluate("sessionStorage.getItem('gradiometer-token')") == READ
    assert page.evaluate("localStorage.length") == 0
    page.click("td a")
    page.wait_for_selector(".uplot canvas")
    assert READ not in page.url + json.dumps(
        page.evaluate("performance.getEntriesByType('resource').map((e) => e.name)")
    )


@pytest.mark.parametrize("role", ["metrics", "alerts"])
def test_a_token_for_something_else_is_said(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, visit: Open, tmp_path: Path, role: str
) -> None:
    """With the token of a machine the page says which role it has and which it needs, and goes on with a better one."""
    write_run(make_manifest(created_ns=time.time_ns()), np.ones((5, 4)))
    lines = (f"{role} machine {WRITE}", f"read somebody {READ}")
    tokens = write_tokens(tmp_path.with_name(f"{tmp_path.name}-tokens"), *lines)
    config = write_config(tmp_path.with_name(f"{tmp_path.name}-config.yaml"), auth={"tokens_file": str(tokens)})
    monitor = start("--config", config)
    page = visit(monitor, "/#run=run", expected="40[13]")
    page.wait_for_selector("dialog[open]")
    page.fill("#token-value", WRITE)
    page.keyboard.press("Enter")
    page.wait_for_selector(f"text=the token of machine has the role '{role}': this needs one with 'read' or 'write'.")
    page.reload()
    page.wait_for_selector(f"dialog[open] >> text=the token of machine has the role '{role}'")
    page.fill("#token-value", READ)
    page.keyboard.press("Enter")
    page.wait_for_selector(".uplot canvas")
    assert page.locator("dialog[open]").count() == 0


def test_new_rows_continue_a_chart_at_every_range(
    start: Start, make_manifest: MakeManifest, write_run: WriteRun, append: Append, visit: Open
) -> None:
    """As rows come the last steps move on, also where a job went back to a checkpoint."""
    recorder = write_run(make_manifest(capacity=4096, created_ns=time.time_ns()), np.ones((1500, 4)))
    page = run_page(visit, start())
    page.wait_for_selector(".span:text('steps 0\u20131\u202f499')")
    page.select_option("#range", "200")
    page.wait_for_selector(".span:text('steps 1 300\u20131\u202f499')")
    append(recorder, np.ones((50, 4)))
    page.wait_for_selector(".span:text('steps 1\u202f350\u20131\u202f549')")
    append(recorder, np.ones((30, 4)), step=list(range(1400, 1430)))
    page.wait_for_selector(".span:text('\u20131\u202f429')")


def test_the_page_loads_nothing_it_does_not_bring(two_runs: Monitor) -> None:
    """Its files say so themselves: no script or style in the document, a policy that allows none, and the licence."""
    status, body, headers = two_runs.get("/")
    text = body.decode()
    assert status == 200
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert "://" not in text
    assert not re.search(r"<style|style=|<script(?![^>]*\bsrc=)| on\w+=", text)
    for name in re.findall(r'(?:src|href)="(static/[^"]+)"', text):
        assert two_runs.get(f"/{name}")[0] == 200
    assert b"MIT License" in two_runs.get("/static/uPlot.LICENSE.txt")[1]
    assert two_runs.get("/static/..%2f..%2fapp.py")[0] == 404
    assert two_runs.get("/", **{"If-None-Match": headers["etag"]})[0] == 304
