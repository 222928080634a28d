"""Finished variants on disk: written at once, never trained twice, shared by every library of the run folder.

    variants/DIGEST.json                       what came of one student
    variants/DIGEST.VARIANT.safetensors        a variant's weights; none for a variant without weights

The digest is that of everything that the result follows from.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from puzzle.runs import Run, digest, read_json, write_json, write_tensors
from puzzle.variants import State


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One variant with the weights that did best on held-out text."""

    variant: str
    file: str
    """Relative to the run folder; empty without weights."""
    initial_loss: float
    loss: float
    tokens: int


class VariantStore:
    """The finished variants that follow from `identity`, beside what names a student.

    Args:
        starts: by layer and variants, what else a student follows from.
    """

    def __init__(
        self, run: Run, identity: dict[str, Any], starts: Mapping[tuple[int, tuple[str, ...]], Any] | None = None
    ) -> None:
        self._root, self._identity, self._starts = run.path, identity, starts or {}

    def finished(self, layer: int, subblock: str, variants: tuple[str, ...]) -> list[Trained] | None:
        """What came of the student of these variants; None if it is not finished."""
        file = self._file(layer, subblock, variants)
        return [Trained(**row) for row in read_json(file)] if file.exists() else None

    def write(
        self,
        layer: int,
        subblock: str,
        states: dict[str, State],
        losses: dict[str, tuple[float, float]],
        tokens: int,
    ) -> None:
        """Keep what came of a student.

        Args:
            losses: by variant, before and after training.
        """
        file = self._file(layer, subblock, tuple(states))
        file.parent.mkdir(exist_ok=True)
        rows = []
        for variant, state in states.items():
            weights = file.with_name(f"{file.stem}.{variant}.safetensors")
            if state:
                write_tensors(weights, state)
            name = str(weights.relative_to(self._root)) if state else ""
            initial, loss = losses[variant]
            rows.append(Trained(variant=variant, file=name, initial_loss=initial, loss=loss, tokens=tokens))
        write_json(file, [asdict(row) for row in rows])

    def _file(self, layer: int, subblock: str, variants: tuple[str, ...]) -> Path:
        identity = self._identity | {"layer": layer, "subblock": subblock, "variants": sorted(variants)}
        if (start := self._starts.get((layer, variants))) is not None:
            identity["start"] = start
        return self._root / "variants" / f"{digest(identity)[:24]}.json"
