"""The drawing of dashboards: numbers as they are spelt, colours as they are stated, tables as they are transformed."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from gradiometer_dashboards.drawing import draw
from gradiometer_dashboards.drawing.looks import curves, setting, worded
from gradiometer_dashboards.drawing.rows import tabulate
from gradiometer_dashboards.drawing.shades import judged, shade
from gradiometer_dashboards.drawing.units import spell
from gradiometer_dashboards.evaluation import Answer, Prometheus, Series, View

Json = dict[str, Any]
BEGAN, ENDED = 1_700_000_000.0, 1_700_000_600.0


@pytest.mark.parametrize(
    ("value", "unit", "decimals", "text"),
    [
        (0.1234, "percentunit", None, "12.3%"),
        (1536.0, "bytes", None, "1.5 KiB"),
        (90.0, "s", None, "1.5 min"),
        (0.0025, "s", None, "2.5 ms"),
        (0.0, "s", None, "0 s"),
        (1234567.0, "locale", None, "1,234,567"),
        (1234567.0, "short", None, "1.23 M"),
        (12.345, "none", 1, "12.3"),
        (1e-7, "sci", None, "1e-07"),
        (math.inf, "none", None, "+Inf"),
        (math.nan, "s", None, "NaN"),
    ],
)
def test_numbers_are_spelt_in_their_unit(value: float, unit: str, decimals: int | None, text: str) -> None:
    """A number has about three digits, and its unit."""
    assert spell(value, unit, decimals) == text


def test_thresholds_judge() -> None:
    """A value has the colour of the last threshold that it reaches; NaN that of the first."""
    steps: list[Json] = [
        {"value": None, "color": "green"},
        {"value": 5, "color": "orange"},
        {"value": 10, "color": "red"},
    ]
    assert [judged(value, steps) for value in (-1.0, 5.0, 9.9, math.inf, math.nan)] == [
        "green", "orange", "orange", "red", "green",
    ]  # fmt: skip


def test_shades_of_a_hue_differ() -> None:
    """Named shades are lighter or darker than their hue; a hex is itself."""
    names = ("super-light-blue", "light-blue", "blue", "semi-dark-blue", "dark-blue")
    brightness = [sum(int(shade(name)[place : place + 2], 16) for place in (1, 3, 5)) for name in names]
    assert brightness == sorted(brightness, reverse=True)
    assert len(set(brightness)) == 5
    assert shade("#123456") == "#123456"


def _series(legend: str, value: float, **labels: str) -> Series:
    return Series(labels=labels, legend=legend, times=[BEGAN, ENDED], values=[1.0, value])


def _answer(letter: str, *series: Series) -> Answer:
    return Answer(ref_id=letter, expr="x", instant=False, series=list(series))


def test_overrides_decide_the_looks() -> None:
    """A colour that an override states is taken, others go round; a mapping's text stands for its number."""
    panel = {
        "fieldConfig": {
            "defaults": {"unit": "s", "custom": {"lineWidth": 2}},
            "overrides": [
                {
                    "matcher": {"id": "byFrameRefID", "options": "B"},
                    "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": "red"}}],
                },
                {
                    "matcher": {"id": "byName", "options": "state"},
                    "properties": [
                        {
                            "id": "mappings",
                            "value": [{"type": "value", "options": {"1": {"text": "up", "color": "green"}}}],
                        }
                    ],
                },
            ],
        }
    }
    found = curves(panel, [_answer("A", _series("a", 2.0)), _answer("B", _series("b", 3.0))])
    assert [curve.colour for curve in found] == [shade("green"), shade("red")]
    assert found[0].own["custom.lineWidth"] == 2
    assert worded(1.0, setting(panel, "state")) == ("up", shade("green"))
    assert worded(90.0, setting(panel, "other")) == ("1.5 min", shade("text"))


def test_tables_are_transformed() -> None:
    """Columns are joined on their label, sorted, hidden, put in order and renamed, as the panel states."""
    panel = {
        "title": "Runs",
        "transformations": [
            {"id": "filterFieldsByName", "options": {"include": {"names": ["run_id", "Value #A", "Value #B"]}}},
            {"id": "joinByField", "options": {"byField": "run_id", "mode": "outer"}},
            {"id": "sortBy", "options": {"sort": [{"field": "Value #A", "desc": True}]}},
            {
                "id": "organize",
                "options": {
                    "excludeByName": {"Value #A": True},
                    "indexByName": {"Value #B": 1, "run_id": 0},
                    "renameByName": {"Value #B": "Norm", "run_id": "Run"},
                },
            },
        ],
    }
    order = _answer("A", _series("", 1.0, run_id="calm"), _series("", 2.0, run_id="hurt"))
    norms = _answer("B", _series("", 7.0, run_id="hurt", instance="h:1"))
    rows = tabulate(panel, [order, norms])
    assert rows == [{"Run": "hurt", "Norm": 7.0}, {"Run": "calm"}]
    assert list(rows[0]) == ["Run", "Norm"]
    with pytest.raises(ValueError, match="'pivot', which is not drawn"):
        tabulate({"title": "Runs", "transformations": [{"id": "pivot", "options": {}}]}, [norms])


@contextmanager
def _answering(data: Json) -> Iterator[str]:
    """Answer every query alike, on loopback."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.dumps({"status": "success", "data": data}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


def _board(kind: str = "timeseries") -> Json:
    panel = {
        "id": 1, "type": kind, "title": "Norm", "gridPos": {"x": 0, "y": 0, "w": 24, "h": 8},
        "options": {"legend": {"showLegend": True, "calcs": ["max"]}},
        "fieldConfig": {"defaults": {"unit": "none", "color": {"mode": "fixed", "fixedColor": "red"}}, "overrides": []},
        "targets": [{"refId": "A", "expr": "x", "range": True, "legendFormat": "norm"}],
    }  # fmt: skip
    return {"title": "Board", "templating": {"list": []}, "panels": [panel]}


def test_a_line_is_where_its_values_are(tmp_path: Path) -> None:
    """What rises from left to right is drawn in its colour from below left to above right."""
    points = [[BEGAN + 15 * place, str(place)] for place in range(40)]
    with _answering({"resultType": "matrix", "result": [{"metric": {}, "values": points}]}) as url:
        view = View(dashboard=_board(), prometheus=Prometheus(url=url), start=BEGAN, end=ENDED)
        draw(view, tmp_path / "board.png")
    pixels = imread(tmp_path / "board.png")[:, :1000, :3]
    high, wide = np.nonzero(np.abs(pixels - np.array([0xE0, 0x2F, 0x44]) / 255).max(axis=2) < 0.02)
    assert len(wide) > 300
    assert np.corrcoef(wide, high)[0, 1] < -0.95


def test_what_cannot_be_drawn_is_told(tmp_path: Path) -> None:
    """A kind of panel that is not known here is an error; a Prometheus that is away is told of in the panel's place."""
    nobody = Prometheus(url="http://127.0.0.1:9", timeout_seconds=1.0)
    with pytest.raises(ValueError, match="'Norm' is a piechart, which is not drawn"):
        draw(View(dashboard=_board("piechart"), prometheus=nobody, start=BEGAN, end=ENDED), tmp_path / "a.png")
    draw(View(dashboard=_board(), prometheus=nobody, start=BEGAN, end=ENDED), tmp_path / "b.png")
    assert (imread(tmp_path / "b.png")[:, :, :3] == [1.0, 0.0, 0.0]).all(axis=2).any()


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_are_no_formulas(tmp_path: Path) -> None:
    """Dollars, braces and control characters of a layer's name, or of a query that fails, are drawn as they are."""
    name = "$x$ \\frac{ <b> {{layer}} \n \x00 \u202e"
    series = [{"metric": {"layer": name}, "values": [[BEGAN + 15 * place, "1"] for place in range(40)]}]
    board = _board()
    board["title"] = board["panels"][0]["title"] = name
    board["panels"][0]["targets"][0]["legendFormat"] = "{{layer}}"
    with _answering({"resultType": "matrix", "result": series}) as url:
        view = View(dashboard=board, prometheus=Prometheus(url=url), start=BEGAN, end=ENDED)
        draw(view, tmp_path / "board.png")
        table = _board("table")
        table["panels"][0]["transformations"] = []
        draw(View(dashboard=table, prometheus=Prometheus(url=url), start=BEGAN, end=ENDED), tmp_path / "table.png")
    with _answering({"resultType": "$\\frac{$"}) as url:
        draw(View(dashboard=board, prometheus=Prometheus(url=url), start=BEGAN, end=ENDED), tmp_path / "c.png")
    assert (imread(tmp_path / "c.png")[:, :, :3] == [1.0, 0.0, 0.0]).all(axis=2).any()
