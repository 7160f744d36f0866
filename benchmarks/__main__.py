"""Run every benchmark, or those that are named, each in a process of its own.

python -m benchmarks [NAME ...] [--rounds N] [--json FOLDER]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def main() -> int:
    """Run the benchmarks and return the first exit code that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, help=f"any of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write FOLDER/NAME.json as well")
    options = parser.parse_args()
    codes = []
    for name in options.names:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--rounds", str(options.rounds)]
        command += ["--json", str(options.json / f"{name}.json")] if options.json else []
        print(f"== {name}", flush=True)
        codes.append(subprocess.run(command, check=False).returncode)
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main())
