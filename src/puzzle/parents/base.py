"""The contract of a family adapter: how a family's checkpoint is read as a Puzzle model of the parent's own blocks."""

from abc import ABC, abstractmethod
from typing import ClassVar

from transformers import PreTrainedConfig

from puzzle.modeling import PuzzleConfig


class FamilyAdapter(ABC):
    """One model family; a family's modules themselves are named in `puzzle.modeling.FAMILIES`."""

    model_type: ClassVar[str]
    """As in the checkpoint's config.json."""

    @abstractmethod
    def configure(self, config: PreTrainedConfig) -> PuzzleConfig:
        """The same model as a Puzzle configuration; a `PuzzleError` if it uses what the adapter does not carry over."""

    @abstractmethod
    def tensor_name(self, name: str) -> str:
        """The checkpoint's name of the Puzzle model's parameter `name`."""
