"""The Llama family: Puzzle's own parameter names are Llama's."""

from typing import ClassVar

from transformers import PreTrainedConfig

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.parents.base import FamilyAdapter

_NOT_CARRIED = ("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version")
"""What describes the file, not the model."""


class LlamaAdapter(FamilyAdapter):
    model_type: ClassVar[str] = "llama"

    def configure(self, config: PreTrainedConfig) -> PuzzleConfig:
        fields = {name: value for name, value in config.to_dict().items() if name not in _NOT_CARRIED}
        if fields.get("quantization_config") is not None:
            raise PuzzleError("parent: config.json has a quantization_config; get a checkpoint that is not quantised")
        return PuzzleConfig(**fields, base_model_type=self.model_type)

    def tensor_name(self, name: str) -> str:
        return name
