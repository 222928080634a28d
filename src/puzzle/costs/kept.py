"""Measurements on disk at once, for a restart and for later runs: the same stack takes the same time.

They lie in the user's cache folder, one file for each stack and batch size, addressed by the shapes of its blocks, the
scenario, and the engine's versions and device. So parents of one shape share them, whatever their weights.
"""

import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from puzzle.artefacts import Scenario
from puzzle.cache import cache_folder
from puzzle.costs.engine import Sample
from puzzle.modeling import PuzzleConfig
from puzzle.runs import digest, write_json

_NOT_SHAPES = ("_name_or_path", "transformers_version")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is known of a stack at one batch size, and under which conditions it was measured."""

    samples: list[Sample]
    pads_ms: float
    """Request time of the pads then; if they take as long now, so does the stack."""
    measured: str
    """Date and time."""
    load: float
    """Programs that wanted a processor, on average over a minute."""


class KeptMeasurements:
    """A folder of files; one that cannot be read or written is no error, as nothing in it is needed."""

    def __init__(self, folder: Path, scenario: Scenario, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self._setting = {"scenario": asdict(scenario), "environment": dict(environment)}

    def get(self, stack: PuzzleConfig, batch_size: int) -> Kept | None:
        """What was measured earlier; None where nothing was, or the file is damaged."""
        try:
            found = json.loads(self._path(stack, batch_size).read_text(encoding="utf-8"))
            samples = [Sample(prefill_ms=prefill_ms, decode_ms=decode_ms) for prefill_ms, decode_ms in found["samples"]]
            return Kept(samples=samples, **found["conditions"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, stack: PuzzleConfig, batch_size: int, samples: Sequence[Sample], pads_ms: float) -> None:
        """Keep these, a sample a round, in place of what there was."""
        now = {"measured": time.strftime("%Y-%m-%d %H:%M"), "load": round(os.getloadavg()[0], 1)}
        content = {
            **self._setting,
            "blocks": stack.blocks,
            "batch_size": batch_size,
            "conditions": {"pads_ms": pads_ms, **now},
            "samples": [[sample.prefill_ms, sample.decode_ms] for sample in samples],
        }
        with suppress(OSError):
            write_json(self._path(stack, batch_size), content)

    def _path(self, stack: PuzzleConfig, batch_size: int) -> Path:
        identity = {**self._setting, "shapes": model_shapes(stack), "batch_size": batch_size}
        return self.folder / f"{digest(identity)}.json"


def kept_folder(run_folder: Path, shared: bool) -> Path:
    """The folder in the user's cache; `run_folder` if that is not wanted, or cannot be written."""
    if shared:
        with suppress(OSError, RuntimeError):  # a home that is read-only, or that nobody knows
            folder = cache_folder() / "costs"
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
    run_folder.mkdir(exist_ok=True)
    return run_folder


def model_shapes(config: PuzzleConfig) -> str:
    """The digest of a configuration without what says nothing of shapes."""
    return digest({name: value for name, value in config.to_dict().items() if name not in _NOT_SHAPES})
