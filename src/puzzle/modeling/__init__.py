"""The heterogeneous model, its checkpoints, and the two files that travel inside every one of them.

Importing this package registers the model with transformers, so that `AutoModelForCausalLM.from_pretrained` loads a
child without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from puzzle.modeling.checkpoint import TOKENIZER_FILES, empty_model, finish, save_checkpoint, save_configuration
from puzzle.modeling.configuration_puzzle import Block, PuzzleConfig
from puzzle.modeling.modeling_puzzle import FAMILIES, MODULE_NAMES, MODULES, PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.modeling.modeling_puzzle import PuzzleModel as _PuzzleModel

__all__ = ["FAMILIES", "MODULES", "MODULE_NAMES", "TOKENIZER_FILES", "Block", "PuzzleConfig", "PuzzleDecoderLayer"]
__all__ += ["PuzzleForCausalLM", "empty_model", "finish", "save_checkpoint", "save_configuration"]

AutoConfig.register("puzzle", PuzzleConfig, exist_ok=True)
AutoModel.register(PuzzleConfig, _PuzzleModel, exist_ok=True)
AutoModelForCausalLM.register(PuzzleConfig, PuzzleForCausalLM, exist_ok=True)
