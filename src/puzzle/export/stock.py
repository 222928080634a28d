"""A child whose layers are all alike, as the plain Llama that it is."""

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from puzzle.errors import PuzzleError
from puzzle.export.capability import is_empty
from puzzle.export.checkpoint import (
    copy_extra_files,
    layer_tensors,
    open_child,
    outer_tensors,
    whole_folder,
    write_config,
    write_shards,
)
from puzzle.modeling import Block, PuzzleConfig

_NOT_LLAMAS = (
    "architectures", "auto_map", "base_model_type", "blocks", "layer_types", "model_type", "per_layer_config",
    "sliding_window", "_name_or_path",
)  # fmt: skip


def is_stock(config: PuzzleConfig) -> bool:
    """Whether the child is a Llama: apart from empty layers, all have the same full attention and gated FFN."""
    return _difference(config) is None


def export_stock(source: Path, target: Path, *, max_shard_bytes: int = 5_000_000_000) -> Path:
    """Write the child at `source` as a `LlamaForCausalLM` checkpoint into the folder `target`; empty layers vanish.

    Raises:
        PuzzleError: its layers differ.
    """
    child = open_child(source)
    difference = _difference(child.config)
    if difference is not None:
        raise PuzzleError(f"export to llama: {difference}; export to hf, deci or gguf, which allow layers to differ")
    layers = [layer for layer, block in enumerate(child.config.blocks or []) if not is_empty(block)]
    tensors = outer_tensors(child)
    for new_layer, layer in enumerate(layers):
        tensors += layer_tensors(child, layer, new_layer)
    with whole_folder(target, child) as folder:
        write_config(folder, _config(child.config))
        write_shards(folder, tensors, max_shard_bytes)
        copy_extra_files(child, folder)
    return target


def _difference(config: PuzzleConfig) -> str | None:
    """What makes it no stock Llama, None if nothing does."""
    if config.base_model_type != "llama":
        return f"a parent of the family {config.base_model_type}"
    kept = [(layer, block) for layer, block in enumerate(config.blocks or []) if not is_empty(block)]
    if not kept:
        return "all layers are empty"
    for layer, block in kept:
        if not _is_plain(block):
            return f"layer {layer} has {block['attention']} and {block['ffn']}"
        if block != kept[0][1]:
            return f"layers {kept[0][0]} and {layer} differ"
    return None


def _is_plain(block: Block) -> bool:
    attention, ffn = block["attention"], block["ffn"]
    return attention["kind"] == "gqa" and not attention.get("window") and ffn["kind"] == "gated"


def _config(config: PuzzleConfig) -> dict[str, Any]:
    blocks = [block for block in config.blocks or [] if not is_empty(block)]
    fields = {name: value for name, value in config.to_dict().items() if name not in _NOT_LLAMAS}
    fields |= {
        "num_hidden_layers": len(blocks),
        "num_key_value_heads": blocks[0]["attention"]["num_key_value_heads"],
        "intermediate_size": blocks[0]["ffn"]["intermediate_size"],
    }
    llama: dict[str, Any] = LlamaConfig(**fields).to_dict()
    return llama | {"architectures": ["LlamaForCausalLM"]}
