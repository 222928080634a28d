"""What all formats are written from and into: a child's files, and a folder that is there only when it is whole."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.parents import Parent, open_parent
from puzzle.runs import write_json

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_NOT_COPIED = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.py", "README.md")
"""Of a child's folder: what every format writes in its own way, or does without."""


@dataclass(frozen=True)
class ChildFiles:
    """A child's checkpoint, its weights not loaded."""

    files: Parent
    """It is read, and checked, as the parent of another child would be."""

    @property
    def path(self) -> Path:
        return self.files.path

    @property
    def config(self) -> PuzzleConfig:
        return self.files.config

    @property
    def names(self) -> list[str]:
        """Of the tensors on disk."""
        return list(self.files.checkpoint.entries)

    def dtype(self, name: str) -> str:
        """As safetensors names it."""
        return self.files.checkpoint.entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return self.files.checkpoint.entries[name].shape

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        return dict(self.files.checkpoint.read([name]))[name]


@dataclass(frozen=True)
class Stored:
    """A tensor of the new checkpoint, made only when it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it."""
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * _BYTES[self.dtype]


def open_child(path: Path) -> ChildFiles:
    """A child's folder; a `PuzzleError` if it is not a whole checkpoint in Puzzle's own format."""
    try:
        model_type = json.loads((path / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PuzzleError(f"export: {path} has no readable config.json; name the folder of a child") from None
    if model_type != PuzzleConfig.model_type:
        raise PuzzleError(f"export: {path} holds a {model_type} model; only children in Puzzle's format are exported")
    return ChildFiles(open_parent(str(path)))


def stored(child: ChildFiles, name: str, new_name: str | None = None) -> Stored:
    """One of the child's tensors, under its own name or another."""
    return Stored(new_name or name, child.shape(name), child.dtype(name), lambda: child.read(name))


def outer_tensors(child: ChildFiles) -> list[Stored]:
    """Embeddings, the last norm, and the head unless it is tied to the embeddings."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    if not child.config.tie_word_embeddings:
        names.append("lm_head.weight")
    return [stored(child, name) for name in names]


def layer_tensors(child: ChildFiles, layer: int, new_layer: int) -> list[Stored]:
    """The tensors of a layer, under the names of the layer `new_layer`."""
    prefix = f"model.layers.{layer}."
    names = [name for name in child.names if name.startswith(prefix)]
    return [stored(child, name, f"model.layers.{new_layer}.{name.removeprefix(prefix)}") for name in names]


@contextmanager
def whole_folder(path: Path, child: ChildFiles) -> Iterator[Path]:
    """A folder to write into, which takes the place of `path` at the end and is gone if an error comes before.

    Only a checkpoint is ever replaced, and never the child itself.
    """
    if child.path.resolve().is_relative_to(path.resolve()):
        raise PuzzleError(f"export: {path} is where the child itself is; name another folder")
    if path.exists() and not (path / "config.json").exists():
        raise PuzzleError(f"export: {path} is there already and is no checkpoint; name another folder")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def copy_extra_files(child: ChildFiles, folder: Path) -> None:
    """Tokenizer, chat template, generation defaults, licence and `architecture.json`."""
    left_out = {file for pattern in _NOT_COPIED for file in child.path.glob(pattern)}
    for file in child.path.iterdir():
        if file.is_file() and file not in left_out and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    write_json(folder / "config.json", config)


def write_shards(folder: Path, tensors: Sequence[Stored], max_shard_bytes: int) -> None:
    """Write safetensors files of at most so many bytes each, or one tensor, with an index if there are several."""
    shards = _split(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        values = {tensor.name: tensor.make().contiguous() for tensor in shard}
        save_file(values, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(values, file)
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _split(tensors: Sequence[Stored], max_bytes: int) -> list[list[Stored]]:
    shards: list[list[Stored]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.num_bytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.num_bytes
    return shards
