"""Generate the dashboards' JSON: ``python -m gradiometer_dashboards.build [--check]``.

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
from gradiometer_dashboards.boards.monitor import monitor
from gradiometer_dashboards.boards.run import run

__all__ = ["DASHBOARDS", "main", "render"]

DASHBOARDS: dict[str, Callable[[], Dashboard]] = {
    "fleet": fleet,
    "run": run,
    "monitor": monitor,
}
FOLDER = Path(__file__).parent / "json"


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
    drifted = sorted({path.stem for path in FOLDER.glob("*.json")} - set(DASHBOARDS))
    drifted += [name for name in DASHBOARDS if _read(FOLDER / f"{name}.json") != render(name)]
    for name in drifted:
        sys.stderr.write(f"{FOLDER / name}.json is not what its Python generates: run `make dashboards`\n")
    return 1 if drifted else 0


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _write() -> int:
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.json"):
        if path.stem not in DASHBOARDS:
            path.unlink()
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(render(name), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
