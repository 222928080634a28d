"""The heterogeneous model, its checkpoints, and the two files that travel inside every one of them.

Importing this package registers the model with transformers, so that `AutoModelForCausalLM.from_pretrained` loads a
child without `trust_remote_code`.
"""

# isort: off
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from puzzle.modeling.checkpoint import TOKENIZER_FILES as TOKENIZER_FILES, empty_model as empty_model, finish as finish
from puzzle.modeling.checkpoint import save_checkpoint as save_checkpoint, save_configuration as save_configuration
from puzzle.modeling.configuration_puzzle import Block as Block, PuzzleConfig as PuzzleConfig
from puzzle.modeling.family import first_layer as first_layer, own_blocks as own_blocks, puzzle_config as puzzle_config
from puzzle.modeling.family import refusal as refusal, rotates as rotates, tiny_config as tiny_config
from puzzle.modeling.modeling_puzzle import MODULE_NAMES as MODULE_NAMES, MODULES as MODULES, OWN_NORMS as OWN_NORMS
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer as PuzzleDecoderLayer
from puzzle.modeling.modeling_puzzle import PuzzleForCausalLM as PuzzleForCausalLM, PuzzleMasks as PuzzleMasks
from puzzle.modeling.modeling_puzzle import PuzzleModel as _PuzzleModel, capped as capped
from puzzle.modeling.modeling_puzzle import family_config as family_config, family_form as family_form
from puzzle.modeling.plain import Plain as Plain, plain_shape as plain_shape, plain_tensors as plain_tensors

AutoConfig.register("puzzle", PuzzleConfig, exist_ok=True)
AutoModel.register(PuzzleConfig, _PuzzleModel, exist_ok=True)
AutoModelForCausalLM.register(PuzzleConfig, PuzzleForCausalLM, exist_ok=True)

_save = PuzzleForCausalLM.save_pretrained


def _save_with_code(model: PuzzleForCausalLM, save_directory: str | Path, **options: Any) -> None:
    """What is saved here loads where this package is not installed."""
    _save(model, save_directory, **options)
    save_configuration(model.config, Path(save_directory))


PuzzleForCausalLM.save_pretrained = _save_with_code
