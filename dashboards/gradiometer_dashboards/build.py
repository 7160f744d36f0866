"""Generate the dashboards' JSON and the alert rules: ``python -m gradiometer_dashboards.build [--check]``.

Guarantees: the same Python gives the same bytes, so a difference between the two is an edit on one side only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from gradiometer_dashboards.boards.fleet import fleet
from gradiometer_dashboards.boards.layers import layers
from gradiometer_dashboards.boards.monitor import monitor
from gradiometer_dashboards.boards.ranks import ranks
from gradiometer_dashboards.boards.run import run
from gradiometer_dashboards.rules import (
    Settings,
    fleet_layer_rules,
    fleet_rules,
    grafana_rules,
    prometheus_rules,
)

__all__ = ["DASHBOARDS", "main", "render"]

DASHBOARDS: dict[str, Callable[[], Dashboard]] = {
    "fleet": fleet,
    "run": run,
    "layers": layers,
    "ranks": ranks,
    "monitor": monitor,
}
RULES: dict[str, Callable[[Settings], str]] = {
    "gradiometer.rules.yml": prometheus_rules,
    "grafana.yml": grafana_rules,
    "fleet.rules.yml": fleet_rules,
    "fleet-layers.rules.yml": fleet_layer_rules,
}
FOLDER = Path(__file__).parent / "json"
RULES_FOLDER = Path(__file__).parent / "alerts"


def render(name: str) -> str:
    """Return the text of ``json/<name>.json``."""
    return JSONEncoder(indent=2, sort_keys=True, ensure_ascii=False).encode(DASHBOARDS[name]().build()) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, or with ``--check`` only compare; the exit status is 1 if one differs."""
    parser = argparse.ArgumentParser(prog="python -m gradiometer_dashboards.build", description="Generate dashboards.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a file is not what would be written"
    )
    return _check() if parser.parse_args(arguments).check else _write()


def _check() -> int:
    expected = {FOLDER / f"{name}.json": render(name) for name in DASHBOARDS} | _rules()
    stray = sorted({*FOLDER.glob("*.json"), *RULES_FOLDER.glob("*.yml")} - set(expected))
    drifted = stray + [path for path, text in expected.items() if _read(path) != text]
    for path in drifted:
        sys.stderr.write(f"{path} is not what its Python generates: run `make dashboards`\n")
    return 1 if drifted else 0


def _rules() -> dict[Path, str]:
    return {RULES_FOLDER / name: make(Settings()) for name, make in RULES.items()}


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _write() -> int:
    expected = {FOLDER / f"{name}.json": render(name) for name in DASHBOARDS} | _rules()
    for path in {*FOLDER.glob("*.json"), *RULES_FOLDER.glob("*.yml")} - set(expected):
        path.unlink()
    for path, text in expected.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
