"""What the formats share: a child's folder is read without loading the model, and a new one appears whole or not."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.parents import Parent, open_parent
from puzzle.runs import read_json, write_json
from puzzle.variants import Architecture, BlockVariant, Subblock, parse_variant

NO_OP = {"no_op": True}
_NOT_COPIED = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.py", "README.md")
"""Files of a child that every format writes in its own way, or does without."""


@dataclass(frozen=True)
class Layer:
    """A layer of the child in DeciLM's words (`Variant.deci`); None: they cannot express it."""

    index: int
    """In the child."""
    block: BlockVariant
    attention: dict[str, Any] | None
    ffn: dict[str, Any] | None


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
        Layer(index, block, block.attention.deci(config), block.ffn.deci(config))
        for index, block in enumerate(Architecture.of(config).blocks)
    ]
    return [layer for layer in layers if (layer.attention, layer.ffn) != (NO_OP, NO_OP)]


def silent(subblock: Subblock, name: str, config: PuzzleConfig) -> dict[str, Tensor]:
    """The weights of a variant that adds nothing, by their names in the layer: zeros, and norms of ones; float32."""
    return {
        tensor: torch.full(shape, 1.0 if "norm" in tensor else 0.0)
        for tensor, shape in parse_variant(subblock, name).shapes(config).items()
    }


def write_checkpoint(
    child: Parent,
    target: Path,
    config: Mapping[str, Any],
    layers: Sequence[Layer],
    *,
    added: Mapping[str, Tensor] | None = None,
    code: Sequence[Path] = (),
) -> Path:
    """Write the child's weights, tokenizer and licence with another config.json into the folder `target`.

    A file with weights is written for each of the child's, so that no more than one is in memory. `target` is replaced
    at the end, if it is a checkpoint; after an error it is as it was.

    Args:
        layers: numbered anew in this order.
        added: tensors that the child does not have.
        code: files that the checkpoint carries.
    """
    if child.path.resolve().is_relative_to(target.resolve()):
        raise PuzzleError(f"export: {target} is where the child itself is; name another folder")
    if target.exists() and not (target / "config.json").exists():
        raise PuzzleError(f"export: {target} is there already and is no checkpoint; name another folder")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        left_out = {file for pattern in _NOT_COPIED for file in child.path.glob(pattern)}
        for file in {*child.path.iterdir()} - left_out | {*code}:
            if file.is_file() and not file.name.startswith("."):
                shutil.copyfile(file, partial / file.name)
        write_json(partial / "config.json", config)
        _write_weights(child, partial, {layer.index: new for new, layer in enumerate(layers)}, added or {})
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write_weights(child: Parent, folder: Path, numbers: Mapping[int, int], added: Mapping[str, Tensor]) -> None:
    """The child's tensors, those of its layers numbered anew, and what is added in the first file."""
    names: dict[str, list[str]] = {}
    for name, entry in child.checkpoint.entries.items():
        names.setdefault(entry.file.name, []).append(name)
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for file, stored in names.items():
        tensors = {
            re.sub(r"(?<=^model\.layers\.)\d+", lambda layer: str(numbers[int(layer[0])]), name): tensor
            for name, tensor in child.checkpoint.read(stored)
        }
        tensors |= added if not weight_map else {}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(names) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
