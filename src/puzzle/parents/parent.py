"""A parent checkpoint on disk: found, checked, and read tensor by tensor from safetensors."""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.parents.base import FamilyAdapter
from puzzle.parents.llama import LlamaAdapter
from puzzle.runs import digest, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTERS: dict[str, FamilyAdapter] = {adapter.model_type: adapter for adapter in (LlamaAdapter(),)}


@dataclass(frozen=True)
class Parent:
    """The model we start from."""

    path: Path
    config: PuzzleConfig
    adapter: FamilyAdapter
    address: str
    """Hash of its configuration and weights."""

    @cached_property
    def num_params(self) -> int:
        return sum(parameter.numel() for parameter in _on_meta(self.config).parameters())

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path)
        except (OSError, ValueError) as error:
            raise PuzzleError(f"parent: {self.path} has no usable tokenizer: {_first_line(error)}") from None

    def load(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> PuzzleForCausalLM:
        """The whole parent, for inference."""
        model = _on_meta(self.config)
        state = {name: tensor.to(device, dtype) for name, tensor in self._tensors(_parameter_names(model))}
        model.load_state_dict(state, strict=False, assign=True)
        return finish(model, device)

    def layer_state(self, layer: int) -> dict[str, Tensor]:
        """One layer's tensors in float32 by their names within the layer."""
        prefix = f"model.layers.{layer}."
        names = [name for name in _parameter_names(_on_meta(self.config)) if name.startswith(prefix)]
        return {name.removeprefix(prefix): tensor.float() for name, tensor in self._tensors(names)}

    def _tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[self.adapter.tensor_name(name)], []).append(name)
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt") as handle:
                for name in wanted:
                    tensor = handle.get_tensor(self.adapter.tensor_name(name))
                    if not tensor.isfinite().all():
                        raise PuzzleError(
                            f"parent: {file.name} holds NaN or infinity in {name}; get a sound checkpoint"
                        )
                    yield name, tensor

    @cached_property
    def _files(self) -> dict[str, Path]:
        return _tensor_files(self.path)


def open_parent(source: str, digests: Path | None = None) -> Parent:
    """Find and check a checkpoint without loading its weights.

    Args:
        source: a local folder, or a hub name.
        digests: file in which the weights' hashes are remembered by size and time of change.
    """
    path = _locate(source)
    adapter = ADAPTERS[_model_type(path)]
    parent = Parent(path, adapter.configure(AutoConfig.from_pretrained(path)), adapter, _address(path, digests))
    _check_tensors(parent)
    return parent


def finish(model: PuzzleForCausalLM, device: torch.device | str) -> PuzzleForCausalLM:
    """Tie what is tied and make the buffers that a model built without memory lacks."""
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(device)
    return model.eval().requires_grad_(False)


def _on_meta(config: PuzzleConfig) -> PuzzleForCausalLM:
    with torch.device("meta"):
        return PuzzleForCausalLM(config)


def _parameter_names(model: PuzzleForCausalLM) -> list[str]:
    """Every parameter once: a tied one under the name that checkpoints keep."""
    return [name for name, _ in model.named_parameters(remove_duplicate=True)]


def _locate(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise PuzzleError(f"parent: {source} is not a folder with a checkpoint")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model"]))
    except Exception as error:  # whatever the hub client raises, the reader needs one line
        raise PuzzleError(
            f"parent: {source} is neither a folder nor a model the hub gives: {_first_line(error)}"
        ) from None


def _model_type(path: Path) -> str:
    try:
        found = json.loads((path / "config.json").read_text()).get("model_type")
    except (OSError, ValueError) as error:
        raise PuzzleError(f"parent: {path / 'config.json'} cannot be read: {_first_line(error)}") from None
    if found not in ADAPTERS:
        raise PuzzleError(f"parent: model_type {found!r} has no adapter; supported: {', '.join(sorted(ADAPTERS))}")
    return str(found)


def _tensor_files(path: Path) -> dict[str, Path]:
    """Which file holds which tensor, from the index or from the only file."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        return {name: path / file for name, file in json.loads(index.read_text())["weight_map"].items()}
    single = path / "model.safetensors"
    if not single.exists():
        raise PuzzleError(f"parent: {path} has no model.safetensors (pickled weights are not read; convert them)")
    return dict.fromkeys(_header(single), single)


def _header(file: Path) -> dict[str, list[int]]:
    """Shapes by tensor name; a PuzzleError if the file is missing, truncated or not safetensors."""
    if not file.exists():
        raise PuzzleError(f"parent: {file} is missing, though the checkpoint's index names it")
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_slice(name).get_shape() for name in handle.keys()}
    except (SafetensorError, struct.error, OSError) as error:
        raise PuzzleError(f"parent: {file} is truncated or damaged: {_first_line(error)}") from None


def _check_tensors(parent: Parent) -> None:
    """Every parameter there, with the shape that the configuration asks for."""
    files = parent._files
    headers: dict[Path, dict[str, list[int]]] = {file: _header(file) for file in sorted(set(files.values()))}
    for name, parameter in _on_meta(parent.config).named_parameters(remove_duplicate=True):
        stored = parent.adapter.tensor_name(name)
        if stored not in files or stored not in headers[files[stored]]:
            raise PuzzleError(f"parent: {parent.path} lacks the tensor {stored}; get the whole checkpoint")
        found, wanted = headers[files[stored]][stored], list(parameter.shape)
        if found != wanted:
            raise PuzzleError(f"parent: {stored} has shape {found}, its config.json asks for {wanted}")


def _address(path: Path, digests: Path | None) -> str:
    known: dict[str, str] = json.loads(digests.read_text()) if digests is not None and digests.exists() else {}
    hashes = [hashlib.sha256((path / "config.json").read_bytes()).hexdigest()]
    for file in sorted(set(_tensor_files(path).values())):
        if not file.exists():
            raise PuzzleError(f"parent: {file} is missing, though the checkpoint's index names it")
        stat = file.stat()
        key = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        if key not in known:
            with file.open("rb") as handle:
                known[key] = hashlib.file_digest(handle, "sha256").hexdigest()
        hashes.append(known[key])
    if digests is not None:
        write_json(digests, known)
    return digest(hashes)


def _first_line(error: Any) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
