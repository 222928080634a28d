"""The heterogeneous model, its checkpoints, and the two files that travel inside every one of them.

Importing this package registers the model with transformers, so that `AutoModelForCausalLM.from_pretrained` loads a
child without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from puzzle.modeling.checkpoint import (
    empty_model as empty_model,
    finish as finish,
    save_checkpoint as save_checkpoint,
    save_configuration as save_configuration,
)
from puzzle.modeling.configuration_puzzle import Block as Block, PuzzleConfig as PuzzleConfig
from puzzle.modeling.modeling_puzzle import (
    FAMILIES as FAMILIES,
    MODULE_NAMES as MODULE_NAMES,
    MODULES as MODULES,
    PuzzleDecoderLayer as PuzzleDecoderLayer,
    PuzzleForCausalLM as PuzzleForCausalLM,
    PuzzleModel as PuzzleModel,
    norm_name as norm_name,
)

AutoConfig.register("puzzle", PuzzleConfig, exist_ok=True)
AutoModel.register(PuzzleConfig, PuzzleModel, exist_ok=True)
AutoModelForCausalLM.register(PuzzleConfig, PuzzleForCausalLM, exist_ok=True)
