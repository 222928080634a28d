"""A child whose layers are all alike, as the plain Llama that it is."""

from pathlib import Path

from transformers import LlamaConfig

from puzzle.errors import PuzzleError
from puzzle.export.checkpoint import Layer, layers_of, open_child, write_checkpoint
from puzzle.modeling import PuzzleConfig

_NOT_LLAMAS = (
    "architectures", "auto_map", "base_model_type", "blocks", "layer_types", "model_type", "per_layer_config",
    "sliding_window", "_name_or_path",
)  # fmt: skip


def export_stock(source: Path, target: Path) -> Path:
    """Write the child at `source` as a `LlamaForCausalLM` checkpoint into the folder `target`; empty layers vanish.

    Raises:
        PuzzleError: its layers differ.
    """
    child = open_child(source)
    config, layers = child.config, layers_of(child.config)
    heads_in_group, width = _sizes(config, layers)
    fields = {name: value for name, value in config.to_dict().items() if name not in _NOT_LLAMAS}
    fields |= {
        "num_hidden_layers": len(layers),
        "num_key_value_heads": config.num_attention_heads // heads_in_group,
        "intermediate_size": width,
    }
    llama = LlamaConfig(**fields).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    return write_checkpoint(child, target, llama, layers)


def _sizes(config: PuzzleConfig, layers: list[Layer]) -> tuple[int, int]:
    """Heads in a group and FFN width, of all layers; a `PuzzleError` that says what makes it no plain Llama."""

    def no_llama(reason: str) -> PuzzleError:
        return PuzzleError(f"export to llama: {reason}; export to hf, deci or gguf, which allow layers to differ")

    if config.base_model_type != "llama":
        raise no_llama(f"a parent of the family {config.base_model_type}")
    if not layers:
        raise no_llama("all layers are empty")
    for layer in layers:
        if "n_heads_in_group" not in (layer.attention or {}) or "intermediate_size" not in (layer.ffn or {}):
            raise no_llama(f"layer {layer.index} has {layer.block}")
        if (layer.attention, layer.ffn) != (layers[0].attention, layers[0].ffn):
            raise no_llama(f"layers {layers[0].index} and {layer.index} differ")
    assert layers[0].attention is not None
    assert layers[0].ffn is not None
    return layers[0].attention["n_heads_in_group"], layers[0].ffn["intermediate_size"]
