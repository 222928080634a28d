"""The heterogeneous model, its checkpoints, and the two files that travel inside every one of them.

Importing this package registers the model with transformers, so that `AutoModelForCausalLM.from_pretrained` loads a
child without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from puzzle.modeling.checkpoint import REMOTE_CODE, empty_model, finish, save_checkpoint, save_configuration
from puzzle.modeling.configuration_puzzle import Block, PuzzleConfig
from puzzle.modeling.modeling_puzzle import (
    ATTENTION_MODULES,
    FAMILIES,
    FFN_MODULES,
    ModuleBuilder,
    PuzzleDecoderLayer,
    PuzzleForCausalLM,
    PuzzleModel,
)

AutoConfig.register("puzzle", PuzzleConfig, exist_ok=True)
AutoModel.register(PuzzleConfig, PuzzleModel, exist_ok=True)
AutoModelForCausalLM.register(PuzzleConfig, PuzzleForCausalLM, exist_ok=True)

__all__ = [
    "ATTENTION_MODULES",
    "FAMILIES",
    "FFN_MODULES",
    "REMOTE_CODE",
    "Block",
    "ModuleBuilder",
    "PuzzleConfig",
    "PuzzleDecoderLayer",
    "PuzzleForCausalLM",
    "PuzzleModel",
    "empty_model",
    "finish",
    "save_checkpoint",
    "save_configuration",
]
