"""``gradiometer top`` in a real terminal: it shows what runs do, obeys its keys, and leaves the terminal as it was."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradiometer.recorder import Recorder
from gradiometer_monitor.following.runs import Runs
from gradiometer_monitor.logs import escape
from gradiometer_monitor.top.draw import ASCII, UNICODE, Glyphs, age, chart, fit, number, peaks, spark
from gradiometer_monitor.top.follower import Follower
from gradiometer_monitor.top.keys import _split
from gradiometer_monitor.top.screen import State, render
from tests._terminal import Terminal

if TYPE_CHECKING:
    from tests.conftest import Append, MakeManifest, Spawn, WaitUntil, WriteRun

Open = Callable[..., Terminal]
LAYERS = ("embed", "blocks.0", "blocks.0", "head")
WaitForText = Callable[..., None]
ALTERNATE, BACK = b"\x1b[?1049h", b"\x1b[?1049l"
HIDE, SHOW = b"\x1b[?25l", b"\x1b[?25h"


@pytest.fixture
def open_top(tmp_path: Path) -> Iterator[Open]:
    """Give a function that starts ``gradiometer top`` over ``tmp_path`` in a terminal, and end what it started."""
    opened: list[Terminal] = []

    def start(*options: str, **keywords: object) -> Terminal:
        command = (sys.executable, "-m", "gradiometer.cli", "top", "--dir", str(tmp_path), "--interval", "0.1")
        opened.append(terminal := Terminal(*command, *options, **keywords))  # type: ignore[arg-type]
        return terminal

    yield start
    for terminal in opened:
        terminal.close()


@pytest.fixture
def wait_for_text(wait_until: WaitUntil) -> WaitForText:
    """Give a function that waits until a screen has matches of all of these: it may be read half drawn."""

    def wait(terminal: Terminal, *patterns: str) -> None:
        def shown() -> bool:
            text = terminal.text()
            return all(re.search(pattern, text, re.MULTILINE) for pattern in patterns)

        wait_until(shown)

    return wait


@pytest.fixture
def record(write_run: WriteRun, make_manifest: MakeManifest) -> Callable[..., Recorder]:
    """Give a function that writes a run of now, with some steps a tenth of a second apart."""

    def write(run_id: str, steps: int = 50, layers: Sequence[str] = LAYERS, **columns: Any) -> Recorder:
        manifest = make_manifest(run_id, layers=layers, capacity=1024, created_ns=time.time_ns())
        times = [time.time_ns() - (steps - step) * 10**8 for step in range(steps)]
        norms = np.exp(np.random.default_rng(0).normal(size=(steps, 4)) * 0.1)
        return write_run(manifest, norms, **({"time_ns": times} | columns))

    return write


def test_it_shows_live_data(
    open_top: Open, record: Callable[..., Recorder], append: Append, wait_for_text: WaitForText
) -> None:
    """The list shows each run's numbers, and a step that is written while it is shown."""
    recorder = record("alpha", loss=2.5)
    record("beta").close()
    terminal = open_top()
    told = r"beta +finished +49 ", "1 running, 1 finished, 0 lost"
    wait_for_text(terminal, r"alpha +running +49 .* 2\.5 ", *told)
    append(recorder, [[1.0] * 4] * 3, loss=1.25, time_ns=time.time_ns())
    wait_for_text(terminal, r"alpha +running +52 .* 1\.25 ", *told)


def test_what_runs_comes_first(open_top: Open, record: Callable[..., Recorder], wait_until: WaitUntil) -> None:
    """However many runs ended since, the cursor begins on one that is running."""
    record("alpha")
    for name in ("beta", "gamma"):
        record(name).close()
    terminal = open_top()
    wait_until(lambda: re.search(rf"{UNICODE.mark} alpha .*\n +gamma .*\n +beta ", terminal.text()))


def test_numbers_are_short() -> None:
    """An exponent of ten is for what would be long without."""
    assert [number(value) for value in (2480.0, 123456.0, 1.5e7, 0.25, 1e-9, None)] == [
        "2480", "123456", "1.5e+07", "0.25", "1e-09", "-",
    ]  # fmt: skip


def test_a_run_is_looked_at_and_left(
    open_top: Open, record: Callable[..., Recorder], wait_until: WaitUntil, wait_for_text: WaitForText
) -> None:
    """Enter shows the chosen run: its chart, its layers, its incidents and its policy; ESC goes back to the list."""
    recorder = record("alpha")
    recorder.event("nonfinite", step=12, message="blocks.0 went non-finite")
    record("beta")
    terminal = open_top()
    wait_until(lambda: "alpha" in terminal.text() and "beta" in terminal.text())
    terminal.press("ss")
    wait_until(lambda: "sorted by ratio" in terminal.text())
    terminal.press("s" * 4)
    wait_until(lambda: "sorted by name" in terminal.text())
    terminal.press("\x1b[B\x1b[A\r")
    incident, level = r"step 12 nonfinite: blocks\.0 went non-finite", f"[{''.join(UNICODE.levels).strip()}]"
    wait_for_text(terminal, r"\Aalpha  running, step 49", r"^embed +[\d.]+ ", incident, "policy observes only", level)
    terminal.press("\x1b")
    wait_until(lambda: "sorted by name" in terminal.text())
    terminal.press("j\x1b[C")
    wait_until(lambda: terminal.text().startswith("beta  running"))


def test_the_keys_of_the_list(
    open_top: Open, record: Callable[..., Recorder], wait_until: WaitUntil, wait_for_text: WaitForText
) -> None:
    """The filter leaves some runs, the help is shown and left, a pause holds the picture, and q leaves."""
    for name in ("alpha", "alter", "beta"):
        record(name)
    terminal = open_top()
    wait_until(lambda: "beta" in terminal.text())
    terminal.press("/al\r")
    wait_until(lambda: "beta" not in terminal.text())
    wait_for_text(terminal, "alpha", "alter")
    terminal.press("\x1b")
    wait_until(lambda: "beta" in terminal.text())
    terminal.press("?")
    wait_until(lambda: "this help" in terminal.text())
    terminal.press("?p")
    wait_until(lambda: "PAUSED" in terminal.text())
    record("gamma")
    terminal.press("x")
    terminal.press("p")
    wait_until(lambda: "gamma" in terminal.text() and "PAUSED" not in terminal.text())
    terminal.press("q")
    wait_until(lambda: (terminal.text(), terminal.process.poll())[1] is not None)
    assert terminal.process.returncode == 0


def _left_alone(terminal: Terminal) -> None:
    """Check that the terminal is as it was before."""
    terminal.text()
    assert terminal.modes() == terminal.before
    assert terminal.raw.count(ALTERNATE) == terminal.raw.count(BACK) == 1
    assert terminal.raw.rindex(SHOW) > terminal.raw.rindex(HIDE)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (None, 0)]
)
def test_the_terminal_is_left_as_it_was(
    open_top: Open, record: Callable[..., Recorder], wait_until: WaitUntil, number: signal.Signals | None, code: int
) -> None:
    """However it ends, echo and lines are back, the cursor is shown, and the screen of before is there again."""
    record("alpha")
    terminal = open_top()
    wait_until(lambda: "alpha" in terminal.text())
    assert terminal.modes() != terminal.before
    if number is None:
        terminal.press("q")
    elif number is signal.SIGINT:
        terminal.press("\x03")
    else:
        terminal.process.send_signal(number)
    wait_until(lambda: (terminal.text(), terminal.process.poll())[1] is not None)
    assert terminal.process.returncode == code
    _left_alone(terminal)
    assert b"Traceback" not in terminal.raw


BROKEN = """
import gradiometer_monitor.top.command as command
shown = []
def render(*arguments, **keywords):
    shown.append(1)
    if len(shown) > 3:
        raise RuntimeError("of the test")
    return original(*arguments, **keywords)
original, command.render = command.render, render
from gradiometer.cli import app
app()
"""


def test_an_exception_leaves_the_terminal_as_it_was(
    tmp_path: Path, record: Callable[..., Recorder], wait_until: WaitUntil
) -> None:
    """What goes wrong is told on a terminal that can be used."""
    record("alpha")
    terminal = Terminal(sys.executable, "-c", BROKEN, "top", "--dir", tmp_path, "--interval", "0.1")
    try:
        wait_until(lambda: (terminal.text(), terminal.process.poll())[1] is not None)
        assert terminal.process.returncode == 1
        _left_alone(terminal)
        assert terminal.raw.index(b"of the test") > terminal.raw.index(BACK)
    finally:
        terminal.close()


def test_it_follows_the_size_of_the_terminal(
    open_top: Open, record: Callable[..., Recorder], wait_until: WaitUntil
) -> None:
    """A wider terminal shows more columns at once, and no line is wider than it."""
    record("alpha")
    terminal = open_top("--interval", "60")
    wait_until(lambda: "alpha" in terminal.text())
    assert "usual" not in terminal.text()
    terminal.resize(130, 40)
    wait_until(lambda: re.search(r"run +state +step +steps/s +norm +usual +times", terminal.text()))
    terminal.resize(80, 24)
    wait_until(lambda: "usual" not in terminal.text() and "alpha" in terminal.text())


def test_without_colours(open_top: Open, record: Callable[..., Recorder], wait_until: WaitUntil) -> None:
    """NO_COLOR is heeded, and what a colour would say is in words."""
    record("alpha").close()
    terminal = open_top(NO_COLOR="1")
    wait_until(lambda: "finished" in terminal.text())
    colours = {terminal.screen.buffer[row][column].fg for row in range(24) for column in range(80)}
    assert colours == {"default"}


def test_a_dumb_terminal_gets_one_snapshot(
    open_top: Open, record: Callable[..., Recorder], wait_until: WaitUntil
) -> None:
    """Where lines cannot be drawn anew the runs are printed once, without a code for the terminal."""
    record("alpha")
    terminal = open_top(TERM="dumb")
    wait_until(lambda: (terminal.text(), terminal.process.poll())[1] is not None)
    assert terminal.process.returncode == 0
    assert "alpha" in terminal.text()
    assert b"\x1b" not in terminal.raw


def _run(spawn: Spawn, tmp_path: Path, *options: str) -> tuple[int, str, str]:
    command = (sys.executable, "-m", "gradiometer.cli", "top", "--dir", tmp_path, *options)
    process = spawn(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_pipe_gets_one_snapshot(spawn: Spawn, tmp_path: Path, record: Callable[..., Recorder]) -> None:
    """In a pipe the runs are printed once; one run is shown whole; JSON has every number; an unknown run is told."""
    record("alpha")
    record("beta")
    code, out, _ = _run(spawn, tmp_path)
    assert code == 0
    assert "\x1b" not in out
    assert re.search(r"alpha +running +49", out)
    code, out, _ = _run(spawn, tmp_path, "alpha")
    assert out.startswith("alpha  running, step 49")
    listed = json.loads(_run(spawn, tmp_path, "--json")[1])
    assert {line["run_id"]: line["step"] for line in listed} == {"alpha": 49, "beta": 49}
    assert listed[0]["steps_per_second"] == pytest.approx(1.0)
    code, _, err = _run(spawn, tmp_path, "gamma", "--once")
    assert (code, "run 'gamma' is not among those of" in err) == (2, True)


HOSTILE = "bad\x1b]0;owned\x07\x1b[2J\nforged\u202e"


def test_hostile_words_are_shown_and_not_obeyed(
    open_top: Open, record: Callable[..., Recorder], wait_for_text: WaitForText
) -> None:
    """Control characters in names of layers, kinds and messages are shown escaped: none reaches the terminal."""
    layers = ("al\x1b[5mpha\x07", "b", "c", "d")
    record("run", layers=layers).event("odd\x1b[31m", message=HOSTILE, step=1)
    terminal = open_top("run", columns=130)
    escaped = r"al\x1b[5mpha\x07", r"odd\x1b[31m: bad\x1b]0;owned\x07\x1b[2J\nforged\u202e"
    wait_for_text(terminal, *map(re.escape, escaped))
    assert terminal.screen.title == ""
    for code in (b"\x1b]0;", b"\x07", b"\x1b[2Jforged", "\u202e".encode(), b"\x1b[5m", b"\x1b[31m: "):
        assert code not in terminal.raw


SIZES = ((80, 24), (132, 43), (40, 10), (20, 5), (5, 2), (300, 80))


@pytest.mark.parametrize("mode", ["runs", "run", "help"])
@pytest.mark.parametrize("glyphs", [UNICODE, ASCII], ids=["unicode", "ascii"])
def test_every_size_is_filled_and_not_overrun(
    tmp_path: Path, record: Callable[..., Recorder], mode: Any, glyphs: Glyphs
) -> None:
    """No line is wider, and no screen higher, than the terminal, whatever its size and however long the names."""
    run_id, layers = "r" * 100, tuple(f"名前{place}" * 40 for place in range(4))
    record(run_id, layers=layers).event("nonfinite", message="x" * 500)
    follower = Follower(Runs(tmp_path, retention_seconds=3600), 1.0)
    follower.select(run_id)
    try:
        follower.look()
    finally:
        follower.stop()
    assert follower.snapshot.view is not None
    for width, height in SIZES:
        lines = render(State(mode=mode, selected=run_id, glyphs=glyphs), follower.snapshot, width, height)
        assert len(lines) == (1 if height < 5 else height)
        assert all(line.cell_len <= width for line in lines)
        assert glyphs is UNICODE or all(line.plain.isascii() for line in lines)


def test_a_spike_of_one_step_stays() -> None:
    """However many steps share a column, the largest is drawn; what is not finite is marked."""
    norms = np.ones(1000)
    norms[517] = 100.0
    assert peaks(norms, 50).max() == 100.0
    assert spark(norms, 50, UNICODE).count("█") == 1
    norms[3] = np.nan
    assert spark(norms, 50, ASCII).startswith("!")
    lines = chart(norms, 60, 5, UNICODE, 10.0)
    assert lines[0].count("█") + sum(lines[0].count(level) for level in UNICODE.levels[:-1]) == 1
    assert sum(UNICODE.dash in line for line in lines) == 1


def test_texts_that_fit() -> None:
    """Texts are cut by the cells that they take, and padded to them."""
    assert fit("名前名前", 5, UNICODE) == "名前…"
    assert fit("ab", 4, UNICODE, right=True) == "  ab"
    assert fit("a\tb", 9, UNICODE) == escape("a\tb").ljust(9)
    assert [age(seconds) for seconds in (-1, 59, 61, 7300, 200000)] == ["0s", "59s", "1m", "2h", "2d"]


def test_keys_are_told_apart() -> None:
    """Arrows, letters and ESC alone are what they are, and a sequence that means nothing is nothing."""
    assert _split("\x1b[Aj\x1bOB\x1b") == ["up", "j", "down", "escape"]
    assert _split("\x1b[15~q\x1b[1;5Cx") == ["q", "x"]
