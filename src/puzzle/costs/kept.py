"""Measurements that later runs use again: the same stack on the same engine and machine takes the same time.

They lie in the user's cache folder, one file for each stack, addressed by the shapes of its blocks, the scenario, the
batch size, and the engine's versions and device. So parents of one shape share them, whatever their weights.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from puzzle.artefacts import Scenario
from puzzle.cache import cache_folder
from puzzle.costs.engine import Sample
from puzzle.costs.slopes import Stack
from puzzle.modeling import PuzzleConfig
from puzzle.runs import digest, read_json, write_json
from puzzle.variants import Architecture

_NOT_SHAPES = ("_name_or_path", "transformers_version")


class KeptMeasurements:
    """What earlier runs measured of stacks between the embeddings and head that `config` describes."""

    def __init__(self, config: PuzzleConfig, scenario: Scenario, environment: Mapping[str, str]) -> None:
        self._config, self._setting = config, {"scenario": asdict(scenario), "environment": dict(environment)}
        self.folder = cache_folder() / "costs"

    def get(self, stack: Stack, batch_size: int) -> list[Sample]:
        """One sample a round, in order; empty if there are none."""
        path = self._path(stack, batch_size)
        return [Sample(**sample) for sample in read_json(path)] if path.exists() else []

    def put(self, stack: Stack, batch_size: int, samples: Sequence[Sample]) -> None:
        """Keep these in place of what there was."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(stack, batch_size), [asdict(sample) for sample in samples])

    def _path(self, stack: Stack, batch_size: int) -> Path:
        shapes = model_shapes(Architecture(stack).configure(self._config))
        return self.folder / f"{digest({**self._setting, 'shapes': shapes, 'batch_size': batch_size})}.json"


def model_shapes(config: PuzzleConfig) -> str:
    """The digest of a configuration without what says nothing of shapes."""
    return digest({name: value for name, value in config.to_dict().items() if name not in _NOT_SHAPES})
