"""DeciLM checkpoints (`block_configs`, as NVIDIA's Nemotron 51B has them), for vLLM's own implementation."""

from pathlib import Path
from typing import Any

from torch import Tensor

from puzzle.engines.capability import require
from puzzle.errors import PuzzleError
from puzzle.export.checkpoint import NO_OP, layers_of, open_child, silent, write_checkpoint

_CONFIGURATION = Path(__file__).with_name("configuration_decilm.py")
"""vLLM reads `block_configs` by attribute: the checkpoint carries a class that has them so."""
_COPIED_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "num_attention_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters", "dtype",
)  # fmt: skip
_FFN = {"no_op": False, "replace_with_linear": False}
_ATTENTION = _FFN | {"n_heads_in_group": None}


def export_deci(source: Path, target: Path) -> Path:
    """Write the child at `source` as a DeciLM checkpoint into the folder `target`, without its empty layers.

    vLLM's decoder adds the residual in the norm of the next subblock, and has none before the first attention. A first
    layer without attention therefore gets one of a single KV head with zero weights.

    Raises:
        PuzzleError: vLLM's DeciLM cannot run a layer.
    """
    child = open_child(source)
    require(child.config, "deci")
    layers = layers_of(child.config)
    if not layers:
        raise PuzzleError("export to deci: all layers are empty; there is nothing to serve")
    blocks: list[dict[str, Any]] = [
        {
            "attention": _ATTENTION | {"n_heads_in_group": None} | (layer.attention or {}),
            "ffn": _ATTENTION | (layer.ffn or {}),
        }
        for layer in layers
    ]
    added: dict[str, Tensor] = {}
    if layers[0].attention == NO_OP:
        blocks[0]["attention"] = _ATTENTION | {"n_heads_in_group": child.config.num_attention_heads}
        one_head = silent("attention", "kv1", child.config)
        added = {f"model.layers.0.{name}": tensor.to(child.config.dtype) for name, tensor in one_head.items()}
    fields = child.config.to_dict()
    config = {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{_CONFIGURATION.stem}.DeciLMConfig"},
        "model_type": "nemotron-nas",
        "num_hidden_layers": len(blocks),
        **{name: fields[name] for name in _COPIED_FIELDS},
        "block_configs": blocks,
    }
    return write_checkpoint(child, target, config, layers, added=added, code=[_CONFIGURATION])
