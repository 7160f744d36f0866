"""The rows and the layers of a run under ``/api/v1``: columnar, down-sampled, of any rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Literal, get_args

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, HTTPException, Query, Response

from gradiometer.live.revisions import History as PolicyHistory
from gradiometer.live.revisions import read_history
from gradiometer.records import OWN_CLIPPING, RunFormatError, rank_of
from gradiometer.summary import LayerSummary
from gradiometer.tail import RankTail
from gradiometer_monitor.following.runs import Run
from gradiometer_monitor.services import Context
from gradiometer_monitor.web.buckets import Buckets
from gradiometer_monitor.web.history import HistoryCache, Selection, Source, Window
from gradiometer_monitor.web.lookup import MAX_NUMBER, MAX_RANK, RunId, chosen
from gradiometer_monitor.web.openapi import api_router
from gradiometer_monitor.web.roles import needs
from gradiometer_monitor.web.schemas import Model, Number

__all__ = ["Rank", "Rows", "answer", "router", "source_of"]

MAX_POINTS = 10_000
"""Buckets that an answer may have; where the policy changes one more begins."""
MAX_CELLS = 1_000_000
"""Values of layers that an answer may have: with more layers it has fewer buckets."""

Column = Literal[
    "grad_norm_preclip", "grad_norm_postclip", "grad_norm_baseline", "coefficient", "loss", "loss_max",
    "learning_rate", "loss_scale", "step_seconds",
]  # fmt: skip
Stat = Literal["grad_norm_preclip", "grad_norm_postclip", "microbatch_norm"]
Rank = Annotated[int, Query(ge=0, le=MAX_RANK, description="Of this rank.")]
MAX_NAMED = 64
"""Layers that a request may name; ``*`` names all."""
FromStep = Annotated[int | None, Query(ge=0, le=MAX_NUMBER, description="First step.")]
ToStep = Annotated[int | None, Query(ge=0, le=MAX_NUMBER, description="Last step; none before the first has rows.")]
AfterStep = Annotated[int | None, Query(ge=0, le=MAX_NUMBER, description="Step before the first.")]
AfterSequence = Annotated[
    int | None, Query(ge=0, le=MAX_NUMBER, description="Only what came after this row, for who follows a run.")
]
Points = Annotated[int, Query(ge=1, le=MAX_POINTS, description="At most so many buckets.")]
BucketSteps = Annotated[
    int, Query(ge=1, le=2**40, description="Rows of a bucket at least, as in an earlier answer that is continued.")
]
Columns = Annotated[
    list[Column] | None,
    Query(max_length=len(get_args(Column)), description="These columns only; all if none is named."),
]
Layers = Annotated[
    list[Annotated[str, Query(max_length=1024)]] | None,
    Query(max_length=MAX_NAMED, description="Norms of these layers, or * for all.", examples=[["*"]]),
]
StatOf = Annotated[Stat, Query(description="Which norms of the layers.")]


class PolicyColumn(Model):
    """What one policy, or the loop's own clipping, decided."""

    name: str
    mode: Literal["act", "shadow"]
    threshold: list[Number]
    """Of the last step of each bucket; null where it did not decide or has none."""
    clipped_steps: list[int]
    """Steps of each bucket in which it changed the gradients, or in shadow would have."""


class LayerColumn(Model):
    """Norms of one layer."""

    name: str
    values: list[Number]
    """Largest finite norm of each bucket; null where the layer had no gradient, or no finite one."""
    nonfinite: list[int]
    """Places of the buckets in which the layer was NaN or Inf in some step."""


class Rows(Model):
    """Rows of one rank in buckets, oldest first: every list has one value for each bucket."""

    run_id: str
    rank: int
    created_ns: int
    """Tells this start of the run from another: sequences begin anew."""
    stat: Stat
    """Of the layers' norms."""
    bucket_steps: int
    """Rows of a whole bucket, a power of two; 1 if every row stands for itself."""
    complete: bool
    """False where the ring has overwritten rows of the range, or lost some in a crash."""
    first_step: int | None
    """Lowest step of the answer."""
    last_step: int | None
    """Highest step of the answer."""
    last_sequence: int
    """Of the newest row: pass it as ``after_sequence`` for what comes next."""
    sequences: list[int]
    """Number, since the run began, of the first row of each bucket."""
    steps: list[int]
    """First step of each bucket. Where a job went back to a checkpoint, so do the steps."""
    last_steps: list[int]
    times: list[float]
    """Wall clock of the last row of each bucket, seconds since the epoch."""
    rows: list[int]
    flags: list[int]
    """Bits of every row of the bucket: 1 non-finite, 2 skipped, 4 clipped, 8 zeroed, 16 skipped by a scaler,
    32 hooks armed, 64 the step failed, 128 a loss was logged, 256 and 512 of the rank's own gradients."""
    nonfinite_steps: list[int]
    skipped_steps: list[int]
    clipped_steps: list[int]
    loss_nonfinite: list[int]
    """Losses of the bucket that were logged as NaN or Inf."""
    columns: dict[str, list[Number]]
    """The columns asked for: norms, ``loss_max`` and ``step_seconds`` are the largest finite of the bucket,
    ``coefficient`` the smallest, ``loss`` the mean, ``learning_rate`` and ``loss_scale`` the last, and
    ``grad_norm_baseline`` is the median of the last 512 finite norms up to the end of the bucket."""
    policies: list[PolicyColumn]
    layers: list[LayerColumn]


class LayerRow(Model):
    """One layer, as it is now."""

    name: str
    last: Number
    """Norm before clipping in the newest step; null where there was no gradient, or none that was finite."""
    window_max: Number
    """Largest norm in the last 60 s of the run."""
    nonfinite_steps: int
    share: Number
    """Of the squared norm of the newest step, 0 to 1."""
    anomaly: Number
    """By how many robust deviations the log of the window's largest norm is above its usual, or, until there is a usual
    norm, above the mean of the first logs."""
    weight_norm: Number
    update_ratio: Number
    """Norm of the update over that of the weights; as the weights' norm, of the newest step that was sampled."""
    median: Number
    """Usual norm; null until there is one."""
    mad: Number
    """Median absolute deviation of the log norm from that of the usual one."""
    vanishing: bool
    """Its gradient has been vanishing up to the newest step."""
    exploding: bool
    """Its gradient has been exploding up to the newest step."""


class LayerTable(Model):
    """The layers of a run in the order of the model, those that can have a gradient."""

    run_id: str
    rank: int
    last_step: int | None
    layers: list[LayerRow]


def router(context: Context, cache: HistoryCache) -> APIRouter:
    """Make the routes of rows and layers."""
    made = api_router()

    @made.get("/runs/{run_id}/rows", tags=["runs"], response_model=Rows)
    @needs("read")
    def rows(
        run_id: RunId,
        rank: Rank = 0,
        from_step: FromStep = None,
        to_step: ToStep = None,
        after_step: AfterStep = None,
        after_sequence: AfterSequence = None,
        points: Points = 1000,
        bucket_steps: BucketSteps = 1,
        columns: Columns = None,
        layers: Layers = None,
        stat: StatOf = "grad_norm_preclip",
    ) -> Response:
        """Give the rows of a rank, down-sampled so that no spike is lost.

        Buckets are aligned: with ``bucket_steps`` and ``after_sequence`` of an earlier answer, the buckets returned
        replace the last of that one and continue it.
        """
        if after_step is not None:
            from_step = min(MAX_NUMBER, max(from_step or 0, after_step + 1))
        source = source_of(context, run_id, rank)
        places = _places(source, layers or [])
        selection = Selection(
            from_step=from_step,
            to_step=to_step,
            after_sequence=after_sequence,
            points=min(points, max(1, MAX_CELLS // max(1, len(places)))),
            level=(bucket_steps - 1).bit_length(),
        )
        found = answer(cache, source, stat, selection, columns or get_args(Column), places)
        return Response(found.model_dump_json(), media_type="application/json")

    @made.get("/runs/{run_id}/layers", tags=["runs"])
    @needs("read")
    def layer_table(run_id: RunId, rank: Rank = 0) -> LayerTable:
        """List the layers of a run with what is known of each."""
        with context.runs.snapshot() as runs:
            tail = _tail(runs, run_id, rank)
            newest = tail.summary.newest
            last_step = None if newest is None else int(newest["step"])
            return LayerTable(
                run_id=run_id, rank=rank, last_step=last_step, layers=list(_layer_rows(tail.summary.layers))
            )

    return made


def source_of(context: Context, run_id: str, rank: int) -> Source:
    """Find the ring of a rank that is followed. Raises HTTPException."""
    with context.runs.snapshot() as runs:
        tail = _tail(runs, run_id, rank)
        return Source(path=tail.path, identity=tail.identity, manifest=tail.manifest)


def _tail(runs: Iterable[Run], run_id: str, rank: int) -> RankTail:
    run = chosen(run_id, list(runs))
    for tail in run.ranks:
        if tail.rank == rank:
            return tail
    known = ", ".join(str(tail.rank) for tail in run.ranks)
    raise HTTPException(404, f"rank {rank} of run {run_id!r} is not followed: those that are, are {known}")


def _places(source: Source, names: list[str]) -> list[int]:
    """Find layers by name. Raises HTTPException that names some there are."""
    known = source.manifest.layers
    if "*" in names:
        return list(range(len(known)))
    places = {name: place for place, name in enumerate(known)}
    for name in names:
        if name not in places:
            some = ", ".join(known[:5]) + (", …" if len(known) > 5 else "")
            raise HTTPException(404, f"layers {name!r}: the run has {len(known)} layers: {some}; * gives all")
    return sorted({places[name] for name in names})


def answer(
    cache: HistoryCache, source: Source, stat: Stat, selection: Selection, columns: Iterable[str], layers: list[int]
) -> Rows:
    """Select from a history and put it in columns. Raises HTTPException where the ring cannot be read."""
    manifest, run_id, rank = source.manifest, source.path.parent.name, rank_of(source.path)
    try:
        window = cache.select(source, stat, selection)
        policies = list(_policies(window.buckets, read_history(source.path, manifest)))
    except (OSError, RunFormatError) as error:
        detail = f"rank {rank} of run {run_id!r} cannot be read ({type(error).__name__}): the monitor's log says why"
        raise HTTPException(503, detail) from error
    scalars = window.buckets.scalars
    return Rows.model_construct(
        run_id=run_id,
        rank=rank,
        created_ns=manifest.created_ns,
        stat=stat,
        bucket_steps=2**window.level,
        complete=window.complete,
        first_step=int(scalars["step"].min()) if len(scalars) else None,
        last_step=int(scalars["last_step"].max()) if len(scalars) else None,
        last_sequence=window.head,
        sequences=scalars["first"].tolist(),
        steps=scalars["step"].tolist(),
        last_steps=scalars["last_step"].tolist(),
        times=(scalars["time_ns"] / 1e9).tolist(),
        rows=scalars["rows"].tolist(),
        flags=scalars["flags"].tolist(),
        nonfinite_steps=scalars["nonfinite_steps"].tolist(),
        skipped_steps=scalars["skipped_steps"].tolist(),
        clipped_steps=scalars["clipped_steps"].tolist(),
        loss_nonfinite=scalars["loss_nonfinite"].tolist(),
        columns={name: _column(window, name).tolist() for name in columns},
        policies=policies,
        layers=list(_layer_columns(window.buckets, manifest.layers, layers)),
    )


def _column(window: Window, name: str) -> npt.NDArray[np.float64]:
    scalars = window.buckets.scalars
    if name == "grad_norm_baseline":
        return window.baseline
    if name == "loss":
        count = scalars["loss_count"]
        mean: npt.NDArray[np.float64] = np.full(len(scalars), np.nan)
        np.divide(scalars["loss_sum"], count, out=mean, where=count > 0)
        return mean
    column: npt.NDArray[np.float64] = scalars[name]
    return column


def _policies(buckets: Buckets, history: PolicyHistory) -> Iterator[PolicyColumn]:
    """Yield the policies that decided about a row, in the order of their revisions and slots, then the loop's own."""
    scalars = buckets.scalars
    places: dict[tuple[str, Literal["act", "shadow"]], list[tuple[int, npt.NDArray[np.bool_]]]] = {}
    for revision in history.revisions:
        decided = scalars["policy_revision"] == revision.revision
        if decided.any():
            for slot, owner in revision.named:
                places.setdefault((owner.name, owner.mode), []).append((slot, decided))
    for name, slot in OWN_CLIPPING.items():
        if (scalars["thresholds"][:, slot] > 0).any() or scalars["clipped"][:, slot].any():
            places.setdefault((name, "act"), []).append((slot, np.ones(len(scalars), np.bool_)))
    for (name, mode), parts in places.items():
        threshold, clipped = np.full(len(scalars), np.nan), np.zeros(len(scalars), np.int64)
        for slot, decided in parts:
            threshold[decided] = scalars["thresholds"][decided, slot]
            clipped[decided] = scalars["clipped"][decided, slot]
        yield PolicyColumn.model_construct(
            name=name, mode=mode, threshold=_short(threshold).tolist(), clipped_steps=clipped.tolist()
        )


def _layer_columns(buckets: Buckets, names: tuple[str, ...], chosen: list[int]) -> Iterator[LayerColumn]:
    if not chosen:
        return
    layers = buckets.layers[:, chosen]
    absent = (layers == 0) & np.signbit(layers)
    values = _short(np.where(absent, np.nan, layers).astype(np.float64)).T.tolist()
    bad = buckets.bad[:, chosen]
    for column, place in enumerate(chosen):
        nonfinite = np.flatnonzero(bad[:, column]).tolist()
        yield LayerColumn.model_construct(name=names[place], values=values[column], nonfinite=nonfinite)


def _short(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Round to the 7 digits that a float32 has, so that an answer is half as long."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        exponent = np.floor(np.log10(np.abs(values)))
        scale = 10.0 ** (6 - exponent)
        rounded = np.rint(values * scale) / scale
    return np.where(np.isfinite(rounded), rounded, values)


def _layer_rows(summary: LayerSummary) -> Iterator[LayerRow]:
    """Yield the layers that are exported; valid while the lock of the runs is held."""
    none = np.full(len(summary.names), np.nan)
    last = none if summary.last is None else summary.last
    total = float(np.square(last[np.isfinite(last)]).sum())
    columns = summary.columns()
    peak, anomaly, median, mad = summary.window_max(), summary.anomaly(), summary.median, summary.mad
    vanishing, exploding = summary.vanishing, summary.exploding
    weight, ratio = (columns.get(f"gradiometer_layer_{name}", (none,))[0] for name in ("weight_norm", "update_ratio"))
    for place in np.flatnonzero(summary.exported):
        yield LayerRow(
            name=summary.names[place],
            last=float(last[place]) if summary.present[place] else None,
            window_max=float(peak[place]),
            nonfinite_steps=int(summary.nonfinite[place]),
            share=float(np.square(last[place]) / total) if total else None,
            anomaly=float(anomaly[place]),
            weight_norm=float(weight[place]),
            update_ratio=float(ratio[place]),
            median=float(median[place]),
            mad=float(mad[place]),
            vanishing=bool(vanishing[place]),
            exploding=bool(exploding[place]),
        )
