"""What of a row is sent: the series of one rank, and their values in a number of rows."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gradiometer.layer_norms import LayerNorms
from gradiometer.live.revisions import read_history
from gradiometer.records import OWN_CLIPPING, STATS, Flag, Manifest, Rows, RunFormatError
from gradiometer_monitor.remote_write.protocol import Block, LabelError, Series, make_series, normal
from gradiometer_monitor.remote_write.settings import RemoteWriteSettings

__all__ = ["Columns", "Key", "own_labels"]

PREFIX = "gradiometer_step_"
SCALARS = {
    "grad_norm": "grad_norm_preclip",
    "grad_norm_postclip": "grad_norm_postclip",
    "clip_coefficient": "coefficient",
    "learning_rate": "learning_rate",
    "loss_scale": "loss_scale",
    "duration_seconds": "step_seconds",
    "agent_seconds": "agent_seconds",
}
"""Metrics, without their prefix, and the fields of a row, of which NaN is no value."""
FLAGS = {"nonfinite": Flag.NONFINITE, "skipped": Flag.SKIPPED, "clipped": Flag.CLIPPED}
LAYER_METRICS = {
    "grad_norm_preclip": "gradiometer_step_layer_grad_norm",
    "grad_norm_postclip": "gradiometer_step_layer_grad_norm_postclip",
    "microbatch_norm": "gradiometer_step_layer_microbatch_norm",
}
KEY_LABELS: tuple[tuple[str, ...], ...] = ((), ("layer",), ("mode", "policy"))
"""Labels that tell the series of a rank apart, by how many there are."""
Key = tuple[str, ...]
"""Name of the metric, then the values of those labels."""
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Column = tuple[Floats, Mask]
"""Values [T], and whether they are there."""


def own_labels(settings: RemoteWriteSettings) -> dict[str, str]:
    """Return the labels that every series of this receiver has."""
    return {"job": "gradiometer", "instance": socket.gethostname()} | settings.labels


@dataclass(frozen=True, kw_only=True, slots=True)
class _Group:
    """K series at T instants."""

    keys: Sequence[Key]
    values: Floats
    """[T, K]"""
    present: Mask
    """[T, K]"""

    @classmethod
    def of(cls, columns: dict[Key, Column]) -> _Group:
        values, present = zip(*columns.values(), strict=True)
        return cls(keys=list(columns), values=np.column_stack(values), present=np.column_stack(present))


class Columns:
    """The series of one rank; those of its layers only while :attr:`with_layers` is set.

    Series that are not valid are left out, and :attr:`invalid` says why; layers beyond the budget as well.
    """

    def __init__(self, path: Path, run_id: str, rank: int, manifest: Manifest, settings: RemoteWriteSettings) -> None:
        self._path, self._manifest = path, manifest
        self._base = own_labels(settings) | {"run_id": run_id, "rank": str(rank)}
        self._budget = settings.series_budget
        self._stats = settings.layer_stats
        self.with_layers = True
        self.invalid: dict[str, str] = {}
        """Why a series cannot be sent, by what tells it from the others of its rank."""
        self._known: dict[Key, Series | None] = {}
        self._keys: dict[Series, Key] = {}
        self._norms = LayerNorms(manifest)
        chosen = np.array([_matches(settings.layers, name) for name in manifest.layers], np.bool_)
        places = max(0, self._budget - self._fixed) // max(1, len(self._stats))
        self._chosen = chosen & (np.cumsum(chosen) <= places)
        self.layers_over_budget = int(np.count_nonzero(chosen & ~self._chosen))
        """Layers that were asked for and are left out."""
        names = [name for name, chosen in zip(manifest.layers, self._chosen.tolist(), strict=True) if chosen]
        self._layer_keys: dict[str, list[Key]] = {
            stat: [(LAYER_METRICS[stat], name) for name in names] for stat in self._stats
        }
        self._policies: dict[int, tuple[tuple[int, str, str], ...]] = {}

    @property
    def _fixed(self) -> int:
        """Most series that are not of layers."""
        return len(SCALARS) + len(FLAGS) + 2 + 2 * 16

    @property
    def width(self) -> int:
        """Series in a row, about: what to plan a batch with."""
        layers = int(np.count_nonzero(self._chosen)) * len(self._stats) if self.with_layers else 0
        return len(SCALARS) + len(FLAGS) + 6 + layers

    def block(self, rows: Rows, times: npt.NDArray[np.int64]) -> tuple[Block, int]:
        """Take the samples of rows [T] that were decided by one revision of the policy.

        Return them with how many more there were, of series that are not valid or beyond the budget.
        """
        groups = list(self._groups(rows))
        values = np.concatenate([group.values for group in groups], axis=1)
        present = np.concatenate([group.present for group in groups], axis=1)
        made = [self.series(key) for group in groups for key in group.keys]
        valid = np.array([each is not None for each in made], np.bool_)
        lost = int(np.count_nonzero(present[:, ~valid]))
        if self.with_layers:
            lost += self.layers_over_budget * len(self._stats) * len(rows)
        series = tuple(each for each in made if each is not None)
        block = Block(times=times, series=series, values=normal(values[:, valid]), present=present[:, valid])
        return block.compact(), lost

    def keys(self, block: Block) -> frozenset[Key]:
        """Return the keys of the series of a block."""
        return frozenset(map(self._keys.__getitem__, block.series))

    def policies(self, revision: int) -> frozenset[tuple[str, str]]:
        """Return name and mode of the policies that a revision has, the loop's own clipping among them."""
        return frozenset((name, mode) for _, name, mode in self._slots(revision))

    def series(self, key: Key) -> Series | None:
        """Return the series of a key; None if it is not valid."""
        if key not in self._known:
            labels = self._base | dict(zip(KEY_LABELS[len(key) - 1], key[1:], strict=True))
            try:
                made = make_series(key[0], labels)
                self._keys[made] = key
            except LabelError as error:
                made, self.invalid["/".join(key)[:80]] = None, str(error)
            self._known[key] = made
        return self._known[key]

    def _groups(self, rows: Rows) -> Iterator[_Group]:
        every, flags = np.ones(len(rows), np.bool_), rows["flags"]
        bad = (flags & np.uint32(Flag.NONFINITE)) != 0
        columns = {"number": (rows["step"].astype(np.float64), every)}
        for name, field in SCALARS.items():
            values = rows[field].astype(np.float64)
            known = ~np.isnan(values)
            # A norm that is NaN is the norm of gradients that held NaN.
            columns[name] = values, known | bad if field.startswith("grad_norm") else known
        columns["loss"] = rows["loss"].astype(np.float64), (flags & np.uint32(Flag.LOSS)) != 0
        for name, flag in FLAGS.items():
            columns[name] = ((flags & np.uint32(flag)) != 0).astype(np.float64), every
        yield _Group.of({(PREFIX + name,): column for name, column in columns.items()})
        policies = self._policy_columns(rows)
        if policies:
            yield _Group.of(policies)
        if self.with_layers and self._chosen.any():
            for stat in self._stats:
                yield self._layer_group(stat, rows)

    def _policy_columns(self, rows: Rows) -> dict[Key, Column]:
        found: dict[Key, Column] = {}
        for slot, policy, mode in self._slots(int(rows["policy_revision"][0])):
            threshold, coefficient = (
                rows[f"policy_{x}"][:, slot].astype(np.float64) for x in ("threshold", "coefficient")
            )
            if slot in OWN_CLIPPING.values():
                known = threshold > 0
                found[f"{PREFIX}clip_threshold", mode, policy] = threshold, known
                found[f"{PREFIX}policy_coefficient", mode, policy] = coefficient, known & ~np.isnan(coefficient)
            else:
                found[f"{PREFIX}clip_threshold", mode, policy] = threshold, ~np.isnan(threshold)
                found[f"{PREFIX}policy_coefficient", mode, policy] = coefficient, ~np.isnan(coefficient)
        return found

    def _layer_group(self, stat: str, rows: Rows) -> _Group:
        """Compose the norms of layers as the monitor does; one without a gradient in a step has no sample there."""
        norms, absent = self._norms.compose(rows["parameters"][:, STATS.index(stat), :])
        chosen = self._chosen
        return _Group(keys=self._layer_keys[stat], values=norms[:, chosen], present=~absent[:, chosen])

    def _slots(self, revision: int) -> tuple[tuple[int, str, str], ...]:
        """Return slot, name and mode of the policies of a revision; where it is forgotten, of the loop's own only."""
        if revision not in self._policies:
            try:
                found = read_history(self._path, self._manifest).find(revision)
            except (OSError, RunFormatError):
                found = None
            own = tuple((slot, name, "act") for name, slot in OWN_CLIPPING.items())
            if found is None:
                return own  # asked again: a row can be there before the file
            self._policies[revision] = (*((place, slot.name, slot.mode) for place, slot in found.named), *own)
        return self._policies[revision]


def _matches(layers: str, name: str) -> bool:
    return layers == "all" or (layers != "none" and re.fullmatch(layers, name) is not None)
