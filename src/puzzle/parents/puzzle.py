"""A Puzzle child as the parent of the next one: its layers differ already."""

from typing import ClassVar

from transformers import PreTrainedConfig

from puzzle.modeling import PuzzleConfig
from puzzle.parents.base import FamilyAdapter


class PuzzleAdapter(FamilyAdapter):
    model_type: ClassVar[str] = "puzzle"

    def configure(self, config: PreTrainedConfig) -> PuzzleConfig:
        assert isinstance(config, PuzzleConfig)
        return config

    def tensor_name(self, name: str) -> str:
        return name
