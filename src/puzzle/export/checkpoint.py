"""A child as a checkpoint of DeciLM or of its own family, written without loading the model, whole or not at all."""

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, LlamaConfig
from transformers.core_model_loading import revert_weight_conversion

from puzzle.engines.capability import require
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig, family_config, own_blocks, puzzle_config
from puzzle.parents import Parent, open_parent
from puzzle.runs import write_json
from puzzle.variants import Architecture, BlockVariant, parse_variant

_NO_OP = {"no_op": True}
_CONFIGURATION = Path(__file__).with_name("configuration_decilm.py")
"""vLLM reads `block_configs` by attribute: the checkpoint carries a class that has them so."""
_DECI_DEFAULTS = {"no_op": False, "replace_with_linear": False, "n_heads_in_group": None}
_NOT_LLAMAS = (
    "architectures", "auto_map", "base_model_type", "blocks", "layer_types", "model_type", "parent", "per_layer_config",
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

    @property
    def types(self) -> tuple[str, str]:
        """Of the matrices of both subblocks in a GGUF file, where they are twins."""
        return self.block.attention.type, self.block.ffn.type


def layers_of(config: PuzzleConfig) -> list[Layer]:
    """The layers but for empty ones, which are the identity: formats other than `hf` leave them out."""
    layers = [
        Layer(index, block, block.attention.deci(config) or {}, block.ffn.deci(config) or {})
        for index, block in enumerate(Architecture.of(config).blocks)
    ]
    return [layer for layer in layers if (layer.attention, layer.ffn) != (_NO_OP, _NO_OP)]


def export_deci(source: Path, target: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the child at `source` as a DeciLM checkpoint, without its empty layers; a `PuzzleError` if that cannot be.

    vLLM's decoder adds the residual in the norm of the next subblock, and has none before the first attention. A first
    layer without attention therefore gets one of a single KV head with zero weights.
    """
    child = open_parent(str(source))
    require(child.config, "deci")
    layers, added = layers_of(child.config), dict[str, Tensor]()
    if not layers:
        raise PuzzleError("export to deci: all layers are empty; there is nothing to serve")
    blocks = [{"attention": _DECI_DEFAULTS | each.attention, "ffn": _DECI_DEFAULTS | each.ffn} for each in layers]
    if layers[0].attention == _NO_OP:
        blocks[0]["attention"] = _DECI_DEFAULTS | {"n_heads_in_group": child.config.num_attention_heads}
        for name, shape in parse_variant("attention", "kv1").shapes(child.config).items():
            added[f"model.layers.0.{name}"] = torch.full(shape, float("norm" in name), dtype=child.config.dtype)
    fields = {name: value for name, value in child.config.to_dict().items() if name not in _NOT_LLAMAS}
    config = LlamaConfig(**fields | {"num_hidden_layers": len(layers)}).to_dict() | {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{_CONFIGURATION.stem}.DeciLMConfig"},
        "model_type": "nemotron-nas",
        "block_configs": blocks,
    }
    return _write_checkpoint(child, target, config, layers, added, dtype)


def export_stock(source: Path, target: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the child at `source` as a plain model of its family, without its empty layers; a `PuzzleError` if the
    family has none of these layers.
    """
    child = open_parent(str(source))
    config, layers = child.config, layers_of(child.config)
    family = family_config(config)
    kept = [layer.index for layer in layers]
    fields = {"num_hidden_layers": len(kept), "tie_word_embeddings": config.tie_word_embeddings, "dtype": config.dtype}
    for name, value in (config.parent or {}).items():
        if "layer" in name and isinstance(value, list) and len(value) == config.num_layers:
            fields[name] = [value[index] for index in kept]
    for entry in (entry for layer in layers for entry in layer.block.entry().values()):
        fields |= {"sliding_window" if name == "window" else name: size for name, size in entry.items()}
    fields.pop("kind", None)
    stock = AutoConfig.for_model(family.model_type, **(config.parent or {}) | fields)
    if not layers or own_blocks(puzzle_config(stock)) != [layer.block.entry() for layer in layers]:
        names = ", ".join(dict.fromkeys(layer.block.name for layer in layers)) or "no layers"
        raise PuzzleError(
            f"export to stock: found {names}; a model of the family {family.model_type} has layers of one size, with "
            "windows where the parent has them; export to hf, deci or gguf"
        )
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(stock)](stock)
    stock.architectures = [type(model).__name__]
    as_stored = partial(revert_weight_conversion, model)
    return _write_checkpoint(child, target, stock.to_dict(), layers, {}, dtype, as_stored)


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
    dtype: torch.dtype | None,
    as_stored: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> Path:
    """Write the child's weights, with those added and layers numbered anew, and other files into the folder `target`.

    A file with weights is written for each of the child's, so that no more than one is in memory. `target` is replaced
    at the end, if it is a checkpoint. `as_stored`: from a family's tensors, how its checkpoints store them.
    """
    is_other = target.exists() and not (target / "config.json").exists()
    if is_other or child.path.resolve().is_relative_to(target.resolve()):
        raise PuzzleError(f"export: {target} is the child itself, or no checkpoint; name another folder")
    numbers = {str(layer.index): str(new) for new, layer in enumerate(layers)}

    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        own = re.compile(r"(?<=^model\.layers\.)\d+")
        return as_stored({own.sub(lambda layer: numbers[layer[0]], name): each for name, each in tensors.items()})

    with replaced(target) as folder:
        ignored = shutil.ignore_patterns("config.json", "*.safetensors*", "*.py", "README.md", ".*")
        shutil.copytree(child.path, folder, ignore=ignored, dirs_exist_ok=True)
        write_json(folder / "config.json", {**config, "dtype": str(dtype or child.config.dtype).removeprefix("torch.")})
        if "auto_map" in config:
            shutil.copy(_CONFIGURATION, folder)
        write_weights(child, folder, dtype, renamed, added)
    return target


def write_weights(
    child: Parent,
    folder: Path,
    dtype: torch.dtype | None,
    as_stored: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    added: Mapping[str, Tensor] | None = None,
) -> None:
    """Write files with weights into `folder`, one for each of the child's, in their dtype or in `dtype`."""
    entries, weight_map, total_bytes = child.checkpoint.entries, dict[str, str](), 0
    for path in sorted({entry.file for entry in entries.values()}):
        stored = dict(child.checkpoint.read(name for name, entry in entries.items() if entry.file == path))
        tensors = {name: tensor.to(child.kept_dtype(name, dtype or tensor.dtype)) for name, tensor in stored.items()}
        tensors = as_stored(tensors) | {name: each.to(dtype or each.dtype) for name, each in (added or {}).items()}
        added = None
        save_file({name: each.contiguous() for name, each in tensors.items()}, folder / path.name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len({*weight_map.values()}) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
