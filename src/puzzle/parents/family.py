"""From a checkpoint's configuration to that of a Puzzle model of the parent's own blocks.

One adapter for all families: they differ in their entry in `puzzle.modeling.FAMILIES`. Parameters keep their names.
"""

from transformers import PreTrainedConfig

from puzzle.errors import PuzzleError
from puzzle.modeling import FAMILIES, PuzzleConfig

_OF_THE_FILE = ("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version")
"""Fields that describe the file, not the model."""


def check_family(model_type: object) -> None:
    """A `PuzzleError` unless checkpoints of this `model_type` can be read."""
    supported = [*FAMILIES, PuzzleConfig.model_type]
    if model_type not in supported:
        raise PuzzleError(f"parent: model_type {model_type!r} is not supported; use one of {', '.join(supported)}")


def puzzle_config(config: PreTrainedConfig) -> PuzzleConfig:
    """The same model as a Puzzle configuration; a child's own as it is.

    Raises:
        PuzzleError: its weights are quantised.
    """
    if isinstance(config, PuzzleConfig):
        return config
    fields = {name: value for name, value in config.to_dict().items() if name not in _OF_THE_FILE}
    if fields.get("quantization_config") is not None:
        raise PuzzleError("parent: config.json has a quantization_config; get a checkpoint that is not quantised")
    return PuzzleConfig(**fields, base_model_type=config.model_type)
