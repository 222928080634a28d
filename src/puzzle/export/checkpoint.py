"""A child as another checkpoint, of DeciLM or a plain Llama, written without loading the model, whole or not at all."""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from puzzle.engines.capability import require
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.parents import Parent, open_parent
from puzzle.runs import read_json, write_json
from puzzle.variants import Architecture, BlockVariant, Subblock, parse_variant

_NO_OP = {"no_op": True}
_NOT_COPIED = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.py", "README.md")
"""Files of a child that every format writes in its own way, or does without."""
_CONFIGURATION = Path(__file__).with_name("configuration_decilm.py")
"""vLLM reads `block_configs` by attribute: the checkpoint carries a class that has them so."""
_DECI_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "num_attention_heads", "head_dim", "attention_bias", "mlp_bias", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters", "dtype",
)  # fmt: skip
_DECI_DEFAULTS = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": None}
_NOT_LLAMAS = (
    "architectures", "auto_map", "base_model_type", "blocks", "layer_types", "model_type", "per_layer_config",
    "sliding_window", "_name_or_path",
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A layer of the child in DeciLM's words (`Variant.deci`)."""

    index: int
    block: BlockVariant
    attention: dict[str, Any]
    """Empty, like `ffn`, where these cannot express it."""
    ffn: dict[str, Any]


def open_child(path: Path) -> Parent:
    """A child's folder, checked as a parent is; a `PuzzleError` if it is not a whole checkpoint in Puzzle's format."""
    child = open_parent(str(path))
    model_type = read_json(path / "config.json")["model_type"]
    if model_type != PuzzleConfig.model_type:
        raise PuzzleError(f"export: {path} holds a {model_type} model; only children in Puzzle's format are exported")
    return child


def layers_of(config: PuzzleConfig) -> list[Layer]:
    """The layers but for empty ones, which are the identity: formats other than `hf` leave them out."""
    layers = [
        Layer(index, block, block.attention.deci(config) or {}, block.ffn.deci(config) or {})
        for index, block in enumerate(Architecture.of(config).blocks)
    ]
    return [layer for layer in layers if (layer.attention, layer.ffn) != (_NO_OP, _NO_OP)]


def silent(subblock: Subblock, name: str, config: PuzzleConfig) -> dict[str, Tensor]:
    """The weights of a variant that adds nothing, by their names in the layer: zeros, and norms of ones; float32."""
    shapes = parse_variant(subblock, name).shapes(config)
    return {tensor: torch.full(shape, 1.0 if "norm" in tensor else 0.0) for tensor, shape in shapes.items()}


def export_deci(source: Path, target: Path) -> Path:
    """Write the child at `source` as a DeciLM checkpoint into the folder `target`, without its empty layers.

    vLLM's decoder adds the residual in the norm of the next subblock, and has none before the first attention. A first
    layer without attention therefore gets one of a single KV head with zero weights.

    Raises:
        PuzzleError: vLLM's DeciLM cannot run a layer.
    """
    child = open_child(source)
    require(child.config, "deci")
    layers, added = layers_of(child.config), dict[str, Tensor]()
    if not layers:
        raise PuzzleError("export to deci: all layers are empty; there is nothing to serve")
    blocks = [{"attention": _DECI_DEFAULTS | each.attention, "ffn": _DECI_DEFAULTS | each.ffn} for each in layers]
    if layers[0].attention == _NO_OP:
        blocks[0]["attention"] = _DECI_DEFAULTS | {"n_heads_in_group": child.config.num_attention_heads}
        one_head = silent("attention", "kv1", child.config)
        added = {f"model.layers.0.{name}": tensor.to(child.config.dtype) for name, tensor in one_head.items()}
    fields = child.config.to_dict()
    config = {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{_CONFIGURATION.stem}.DeciLMConfig"},
        "model_type": "nemotron-nas",
        "num_hidden_layers": len(blocks),
        **{name: fields[name] for name in _DECI_FIELDS},
        "block_configs": blocks,
    }
    return _write_checkpoint(child, target, config, layers, added, [_CONFIGURATION])


def export_stock(source: Path, target: Path) -> Path:
    """Write the child at `source` as a `LlamaForCausalLM` checkpoint into the folder `target`; empty layers vanish.

    Raises:
        PuzzleError: its layers differ.
    """
    child = open_child(source)
    config, layers = child.config, layers_of(child.config)
    problems = [f"a parent of the family {config.base_model_type}"] if config.base_model_type != "llama" else []
    problems += [] if layers else ["all layers are empty"]
    for layer in layers:
        sizes = layer.attention | layer.ffn
        if sizes.keys() != {"n_heads_in_group", "intermediate_size"}:
            problems.append(f"layer {layer.index} has {layer.block}")
        elif layer.block != layers[0].block:
            problems.append(f"layers {layers[0].index} and {layer.index} differ")
    if problems:
        use = "export to hf, deci or gguf, which allow layers to differ"
        raise PuzzleError(f"export to llama: {problems[0]}; {use}")
    fields = {name: value for name, value in config.to_dict().items() if name not in _NOT_LLAMAS}
    fields |= {
        "num_hidden_layers": len(layers),
        "num_key_value_heads": config.num_attention_heads // sizes["n_heads_in_group"],
        "intermediate_size": sizes["intermediate_size"],
    }
    llama = LlamaConfig(**fields).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    return _write_checkpoint(child, target, llama, layers, {}, [])


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `target` at the end of the block; after an error `target` stays."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_checkpoint(
    child: Parent,
    target: Path,
    config: Mapping[str, Any],
    layers: Sequence[Layer],
    added: Mapping[str, Tensor],
    code: Sequence[Path],
) -> Path:
    """Write the child's weights, tokenizer and licence with another config.json into the folder `target`.

    A file with weights is written for each of the child's, so that no more than one is in memory. `target` is replaced
    at the end, if it is a checkpoint.

    Args:
        layers: numbered anew in this order.
        added: tensors that the child does not have.
        code: files that the checkpoint carries.
    """
    is_other = target.exists() and not (target / "config.json").exists()
    if is_other or child.path.resolve().is_relative_to(target.resolve()):
        raise PuzzleError(f"export: {target} is the child itself, or no checkpoint; name another folder")
    numbers = {str(layer.index): str(new) for new, layer in enumerate(layers)}
    entries, weight_map, total_bytes = child.checkpoint.entries, dict[str, str](), 0
    with replaced(target) as folder:
        left_out = {file for pattern in _NOT_COPIED for file in child.path.glob(pattern)}
        for file in {*child.path.iterdir()} - left_out | {*code}:
            if file.is_file() and not file.name.startswith("."):
                shutil.copyfile(file, folder / file.name)
        write_json(folder / "config.json", config)
        for path, names in groupby(
            sorted(entries, key=lambda name: entries[name].file), lambda name: entries[name].file
        ):
            tensors = {
                re.sub(r"(?<=^model\.layers\.)\d+", lambda layer: numbers[layer[0]], name): tensor
                for name, tensor in child.checkpoint.read(names)
            }
            tensors |= {} if weight_map else added
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, path.name)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if len({*weight_map.values()}) > 1:
            index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
            write_json(folder / "model.safetensors.index.json", index)
    return target
