"""The heterogeneous model: the two files that also travel inside every checkpoint.

Importing this package registers the model with transformers, so that `AutoModelForCausalLM.from_pretrained` loads a child without
`trust_remote_code`.
"""

from pathlib import Path

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from puzzle.modeling.configuration_puzzle import Block, PuzzleConfig
from puzzle.modeling.modeling_puzzle import FAMILIES, PuzzleDecoderLayer, PuzzleForCausalLM, PuzzleModel

AutoConfig.register("puzzle", PuzzleConfig, exist_ok=True)
AutoModel.register(PuzzleConfig, PuzzleModel, exist_ok=True)
AutoModelForCausalLM.register(PuzzleConfig, PuzzleForCausalLM, exist_ok=True)

REMOTE_CODE = (
    Path(__file__).with_name("configuration_puzzle.py"),
    Path(__file__).with_name("modeling_puzzle.py"),
)
"""What a checkpoint carries so that it loads without this package."""

__all__ = [
    "FAMILIES",
    "REMOTE_CODE",
    "Block",
    "PuzzleConfig",
    "PuzzleDecoderLayer",
    "PuzzleForCausalLM",
    "PuzzleModel",
]
