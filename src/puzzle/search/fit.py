"""A cost table fitted to whole models that were timed: a scale for all its rows, and an offset of what is fixed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from puzzle.artefacts import CostRow, CostTable

TIMES = ("prefill_ms", "decode_ms")


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A whole model's prefill and decode step in ms, by the table and on the engine."""

    predicted: tuple[float, float]
    measured: tuple[float, float]
    uncertainty: tuple[float, float] = (0.0, 0.0)
    """Two relative standard errors of the measured ones."""

    @property
    def errors(self) -> tuple[float, float]:
        """The predictions' relative errors, without sign; 0 where nothing was measured."""
        pairs = zip(self.predicted, self.measured, strict=True)
        prefill, decode = (abs(predicted / measured - 1) if measured else 0.0 for predicted, measured in pairs)
        return prefill, decode

    def agrees(self, within: float) -> bool:
        """Whether the predictions are right to this share, or to what the measurement can tell."""
        return all(error <= max(within, known) for error, known in zip(self.errors, self.uncertainty, strict=True))


def fitted(table: CostTable, batch_size: int, models: Sequence[Timed]) -> CostTable:
    """The table whose rows at this batch size predict these models best, by least squares of relative errors."""
    fixed = table.fixed(batch_size)
    lines = {
        name: _line([(model.predicted[i], model.measured[i]) for model in models], getattr(fixed, name))
        for i, name in enumerate(TIMES)
    }

    def row(row: CostRow) -> CostRow:
        if row.batch_size != batch_size:
            return row
        times = {
            name: scale * getattr(row, name) + (offset if row.part == "fixed" else 0.0)
            for name, (scale, offset) in lines.items()
        }
        return replace(row, **times)

    return replace(table, rows=tuple(map(row, table.rows)))


def _line(points: Sequence[tuple[float, float]], fixed: float) -> tuple[float, float]:
    """Scale and offset; a scale alone where predictions are too close to tell both, or nothing fixed would be left."""
    predicted, measured = np.array(points).T
    if not measured.all():
        return 1.0, 0.0
    relative = predicted / measured
    if np.ptp(predicted) > 0.1 * predicted.max():
        (scale, offset), *_ = np.linalg.lstsq(np.stack([relative, 1 / measured], axis=1), np.ones(len(points)))
        if scale > 0 and scale * fixed + offset >= 0:
            return float(scale), float(offset)
    return float(relative.sum() / (relative**2).sum()), 0.0
