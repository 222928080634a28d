"""The heterogeneous model, its checkpoints, and the two files that travel inside every one of them.

Importing this package registers the model with transformers, so that `AutoModelForCausalLM.from_pretrained` loads a
child without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from puzzle.modeling.checkpoint import empty_model, finish, save_checkpoint, save_configuration
from puzzle.modeling.configuration_puzzle import Block, PuzzleConfig
from puzzle.modeling.modeling_puzzle import (
    FAMILIES,
    MODULE_NAMES,
    MODULES,
    PuzzleDecoderLayer,
    PuzzleForCausalLM,
    PuzzleModel,
    norm_name,
)

AutoConfig.register("puzzle", PuzzleConfig, exist_ok=True)
AutoModel.register(PuzzleConfig, PuzzleModel, exist_ok=True)
AutoModelForCausalLM.register(PuzzleConfig, PuzzleForCausalLM, exist_ok=True)

__all__ = [
    "FAMILIES",
    "MODULES",
    "MODULE_NAMES",
    "Block",
    "PuzzleConfig",
    "PuzzleDecoderLayer",
    "PuzzleForCausalLM",
    "PuzzleModel",
    "empty_model",
    "finish",
    "norm_name",
    "save_checkpoint",
    "save_configuration",
]
