"""The heterogeneous model, its checkpoints, and the two files that travel inside every one of them.

Importing this package registers the model with transformers, so that `AutoModelForCausalLM.from_pretrained` loads a
child without `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from puzzle.modeling.checkpoint import empty_model as empty_model
from puzzle.modeling.checkpoint import finish as finish
from puzzle.modeling.checkpoint import save_checkpoint as save_checkpoint
from puzzle.modeling.checkpoint import save_configuration as save_configuration
from puzzle.modeling.configuration_puzzle import Block as Block
from puzzle.modeling.configuration_puzzle import PuzzleConfig as PuzzleConfig
from puzzle.modeling.modeling_puzzle import FAMILIES as FAMILIES
from puzzle.modeling.modeling_puzzle import MODULE_NAMES as MODULE_NAMES
from puzzle.modeling.modeling_puzzle import MODULES as MODULES
from puzzle.modeling.modeling_puzzle import PuzzleDecoderLayer as PuzzleDecoderLayer
from puzzle.modeling.modeling_puzzle import PuzzleForCausalLM as PuzzleForCausalLM
from puzzle.modeling.modeling_puzzle import PuzzleModel

AutoConfig.register("puzzle", PuzzleConfig, exist_ok=True)
AutoModel.register(PuzzleConfig, PuzzleModel, exist_ok=True)
AutoModelForCausalLM.register(PuzzleConfig, PuzzleForCausalLM, exist_ok=True)
