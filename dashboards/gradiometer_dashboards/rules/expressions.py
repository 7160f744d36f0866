"""The pieces that the rules' PromQL is made of.

Guarantees: each metric is in the catalogue. What a run exports from several hosts is reduced with ``max``; a target
that was not scraped for some minutes neither hides what was counted meanwhile nor counts anything twice.
"""

from __future__ import annotations

from collections.abc import Iterable

from gradiometer_dashboards.promql import metric

__all__ = ["all_of", "gained", "highest", "indented", "moved", "newest", "peak_norm", "running"]


def highest(name: str, by: Iterable[str], *, of: str = "", over: str = "", reduce: str = "max_over_time") -> str:
    """Take the largest of the series that differ in other labels than ``by``; ``over`` a range, each one's largest."""
    selected = metric(name) + (f"{{{of}}}" if of else "")
    return f"max by ({', '.join(by)}) ({f'{reduce}({selected}[{over}])' if over else selected})"


def newest(name: str, by: Iterable[str], over: str, *, of: str = "") -> str:
    """Take the newest sample within a range: it bridges a gap that the usual lookback does not."""
    return highest(name, by, of=of, over=over, reduce="last_over_time")


def peak_norm(by: Iterable[str]) -> str:
    """Take the largest finite norm of 3 minutes: a GradScaler that finds its scale makes one Inf now and then."""
    return highest("gradiometer_grad_norm_finite_window_max", by, over="3m")


def moved(name: str, by: Iterable[str], *, of: str = "", born: bool = True) -> str:
    """Count what a counter gained in the last 10 minutes, or since it was last seen before them; 0 if nothing.

    ``increase`` alone sees neither what a counter held when it was first scraped, unless ``born`` is false, nor what it
    gained while nobody scraped.
    """
    by = tuple(by)
    selected = metric(name) + (f"{{{of}}}" if of else "")
    now, grouped = highest(name, by, of=of), f"max by ({', '.join(by)})"
    before = f"{grouped} (last_over_time({selected}[1h] offset 10m))"
    since = [f"({now} - {before}) > 0", f"{grouped} (increase({selected}[10m])) > 0"]
    since += [f"({now} unless {before})"] if born else []
    return "\nor ".join([*since, f"0 * {now}"])


def gained(name: str, label: str) -> str:
    """Select, for the ``expr`` of a ``Who``, the series of a run's sparse counter that gained some in 10 minutes.

    Such a counter is born with what it has counted by then, which ``increase`` alone does not see, nor what it gained
    while nobody scraped. In a run that was begun anew it may have no more than it had before: that is told by the run's
    steps, which fell, or ten minutes later by the run having been there without it. A gap that is going on changes
    nothing, nor does a host that leaves or comes: ``label`` tells the series of a run apart, whichever host has them.
    """
    selected, steps, grouped = f"{metric(name)}<of>", f"{metric('gradiometer_steps_total')}<of>", "max by (<by>)"
    now, before = "last_over_time(%s[10m])", "last_over_time(%s[1h] offset 10m)"
    each, of_run = f"max by (job, run_id, {label})", "and on (job, run_id)"
    ways = (
        f"{grouped} ({now % selected}) - {grouped} ({before % selected}) > 0",
        f"{grouped} (increase({selected}[10m])) > 0",
        f"{grouped} ({selected} {of_run} ({now % steps} < {before % steps}))",
        f"{grouped} ({each} ({now % selected}) unless {each} ({selected} offset 10m) {of_run} {steps} offset 10m)",
        f"{grouped} ({now % selected}) unless {grouped} ({before % selected})",
    )
    return f"({' or '.join(ways)})"


def running(by: Iterable[str]) -> str:
    """Select the runs that are running now."""
    return highest("gradiometer_run_state", by, of='state="running"') + " == 1"


def all_of(*parts: str) -> str:
    """Keep the first part's series that are in all others as well."""
    return "\nand ".join(_bracketed(part) for part in parts)


def indented(text: str) -> str:
    """Put an expression in brackets, on lines of its own if it has several."""
    if "\n" not in text:
        return f"({text})"
    return "(\n" + "\n".join(f"  {line}" for line in text.splitlines()) + "\n)"


def _bracketed(part: str) -> str:
    return part if part.replace(":", "").replace("_", "").isalnum() else indented(part)
