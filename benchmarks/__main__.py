"""Run the benchmarks, or those that are named, each in a process of its own, and keep their results as JSON.

python -m benchmarks [NAME ...] [--quick] [--rounds N] [--json FOLDER]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = ("step_overhead", "parallel", "policies", "ring", "exposition", "ingest", "conditions", "remote_write")
BY_NAME = ("gpu", "fleet")
"""Only where they are named: one needs a CUDA device, the other two databases and a quarter of an hour."""
LOCAL = Path(__file__).parent / "results" / "local"


def command(name: str, folder: Path, *, rounds: int | None, quick: bool) -> list[str]:
    """Return the command that runs one benchmark; a quick one shows only that it runs."""
    parts = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(folder / f"{name}.json")]
    if quick and name in ("step_overhead", "parallel", "exposition", "ingest"):
        parts.append("--quick")
    if quick and name == "fleet":
        parts.append("--dry-run")
    if rounds or quick:
        parts += ["--rounds", str(rounds or 1)]
    return parts


def read_options(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; leave with a message where a benchmark is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help=f"any of {', '.join(NAMES + BY_NAME)}")
    parser.add_argument("--quick", action="store_true", help="one round, small models: only to see that they run")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default: each benchmark's own)")
    parser.add_argument("--json", type=Path, default=LOCAL, metavar="FOLDER", help="default benchmarks/results/local")
    options = parser.parse_args(words)
    unknown = set(options.names) - {*NAMES, *BY_NAME}
    if unknown:
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}: expected any of {NAMES + BY_NAME}")
    return options


def main() -> int:
    """Run the benchmarks and return the first exit code that is not 0."""
    options = read_options()
    codes = []
    for name in options.names:
        print(f"== {name}", flush=True)
        parts = command(name, options.json, rounds=options.rounds, quick=options.quick)
        codes.append(subprocess.run(parts, check=False).returncode)
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main())
