"""A parent: a checkpoint found, checked, and read as a Puzzle model whose blocks are its own."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from puzzle.errors import PuzzleError, one_line
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM, empty_model, finish
from puzzle.parents.base import FamilyAdapter
from puzzle.parents.checkpoint import Checkpoint, open_checkpoint
from puzzle.parents.llama import LlamaAdapter
from puzzle.parents.puzzle import PuzzleAdapter
from puzzle.variants import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTERS: dict[str, FamilyAdapter] = {adapter.model_type: adapter for adapter in (LlamaAdapter(), PuzzleAdapter())}
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "LICENSE*", "NOTICE*"]


@dataclass(frozen=True)
class Parent:
    """The model we start from."""

    path: Path
    config: PuzzleConfig
    adapter: FamilyAdapter
    checkpoint: Checkpoint
    address: str
    """Hash of its configuration and weights."""

    @cached_property
    def architecture(self) -> Architecture:
        """Its own blocks."""
        return Architecture.of(self.config)

    @cached_property
    def num_params(self) -> int:
        """Parameters, tied ones counted once."""
        return sum(parameter.numel() for parameter in empty_model(self.config).parameters())

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
        except Exception as error:  # whatever a tokenizer library raises, the reader needs one line
            raise PuzzleError(f"parent: {self.path} has no usable tokenizer ({one_line(error)})") from None

    def load(
        self,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        layers: Collection[int] | None = None,
    ) -> PuzzleForCausalLM:
        """The parent for inference; tensors are read once and cast one by one, so memory is the model's size.

        Args:
            layers: those that get weights, the others stay on `meta` until `hold` asks for them; None: all.
        """
        model = empty_model(self.config)
        held = range(len(model.model.layers)) if layers is None else layers
        outer = [name for name in self._names if not name.startswith("model.layers.")]
        inner = [name for layer in held for name in self._layer_names(layer)]
        state = {name: tensor.to(device, dtype) for name, tensor in self._tensors(outer + inner)}
        model.load_state_dict(state, strict=False, assign=True)
        if (self.path / "generation_config.json").exists():
            model.generation_config = _generation_config(self.path)
        return finish(model, device, partly=layers is not None)

    def hold(self, model: PuzzleForCausalLM, layers: Collection[int]) -> None:
        """Let exactly these layers of the loaded `model` have weights: others go, those that lack them are read."""
        for index, layer in enumerate(model.model.layers):
            if index not in layers:
                layer.to("meta")
        for index in layers:
            layer = model.model.layers[index]
            if any(parameter.is_meta for parameter in layer.parameters()):
                prefix = f"model.layers.{index}."
                state = {
                    name.removeprefix(prefix): tensor.to(model.device, model.dtype)
                    for name, tensor in self._tensors(self._layer_names(index))
                }
                layer.load_state_dict(state, assign=True)
                layer.requires_grad_(False)

    def layer_state(self, layer: int) -> dict[str, Tensor]:
        """One layer's tensors in float32 by their names within the layer; no others are read."""
        prefix = f"model.layers.{layer}."
        return {name.removeprefix(prefix): tensor.float() for name, tensor in self._tensors(self._layer_names(layer))}

    def outer_state(self) -> dict[str, Tensor]:
        """What belongs to no layer (embeddings, final norm, untied head) in float32, by its names in the model."""
        names = [name for name in self._names if not name.startswith("model.layers.")]
        return {name: tensor.float() for name, tensor in self._tensors(names)}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by its name in the model, as it is stored, one at a time."""
        return self._tensors(self._names)

    @cached_property
    def _names(self) -> list[str]:
        """Every parameter once, a tied one under the name that checkpoints keep."""
        return [name for name, _ in empty_model(self.config).named_parameters()]

    def _layer_names(self, layer: int) -> list[str]:
        return [name for name in self._names if name.startswith(f"model.layers.{layer}.")]

    def _tensors(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        by_stored_name = {self.adapter.tensor_name(name): name for name in names}
        for stored_name, tensor in self.checkpoint.read(by_stored_name):
            yield by_stored_name[stored_name], tensor


def open_parent(source: str, digests: Path | None = None) -> Parent:
    """Find and check a checkpoint without loading its weights.

    Args:
        source: a local folder, or a hub name.
        digests: file in which the weights' hashes are remembered by size and time of change.
    """
    path = locate(source, _HUB_FILES)
    adapter = ADAPTERS[_model_type(path)]
    checkpoint = open_checkpoint(path)
    config = _configure(path, adapter, checkpoint)
    return Parent(path, config, adapter, checkpoint, checkpoint.address(digests))


def read_config(source: str) -> PuzzleConfig:
    """The configuration alone, of a folder with config.json or a hub name: no weights are needed."""
    path = locate(source, ["config.json"])
    adapter = ADAPTERS[_model_type(path)]
    try:
        return adapter.configure(AutoConfig.from_pretrained(path, trust_remote_code=False))
    except PuzzleError:
        raise
    except Exception as error:  # as below
        raise _no_model(path, error) from None


def _configure(path: Path, adapter: FamilyAdapter, checkpoint: Checkpoint) -> PuzzleConfig:
    """The configuration, after every parameter that it asks for was found in the checkpoint."""
    try:
        config = adapter.configure(AutoConfig.from_pretrained(path, trust_remote_code=False))
        if config.tie_word_embeddings and _stores_another_head(adapter, checkpoint):
            config.tie_word_embeddings = False
        parameters = dict(empty_model(config).named_parameters())
    except PuzzleError:
        raise
    except Exception as error:  # a wrong value can surface anywhere in the library's validation or the model's modules
        raise _no_model(path, error) from None
    if not config.blocks:
        raise PuzzleError(f"parent: {path / 'config.json'} asks for no layers; num_hidden_layers must be at least 1")
    for name, parameter in parameters.items():
        checkpoint.check(adapter.tensor_name(name), parameter.shape)
    return config


def _no_model(path: Path, error: Exception) -> PuzzleError:
    reason = f"{type(error).__name__}: {one_line(error)}"
    return PuzzleError(f"parent: {path / 'config.json'} does not describe a model ({reason})")


def _stores_another_head(adapter: FamilyAdapter, checkpoint: Checkpoint) -> bool:
    """Whether head and embeddings are both stored and differ; transformers then does not tie them either."""
    names = [adapter.tensor_name(name) for name in ("model.embed_tokens.weight", "lm_head.weight")]
    if not all(name in checkpoint.entries for name in names):
        return False
    tensors = dict(checkpoint.read(names))
    return not torch.equal(tensors[names[0]], tensors[names[1]])


def locate(source: str, wanted: list[str]) -> Path:
    """A folder, or that of a hub's snapshot with the wanted files.

    Raises:
        PuzzleError: `source` is neither.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise PuzzleError(
            f"parent: {source} is not a folder; give one of a Hugging Face checkpoint, or a hub name such as org/model"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=wanted))
    except Exception as error:  # whatever the hub client raises, the reader needs one line
        raise PuzzleError(
            f"parent: {source} is neither a folder nor a model that the hub gives ({one_line(error)})"
        ) from None


def _model_type(path: Path) -> str:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise PuzzleError(f"parent: {path / 'config.json'} cannot be read ({one_line(error)})") from None
    found = config.get("model_type") if isinstance(config, dict) else None
    if found not in ADAPTERS:
        raise PuzzleError(f"parent: model_type {found!r} has no adapter; supported: {', '.join(sorted(ADAPTERS))}")
    return str(found)


def _generation_config(path: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise PuzzleError(f"parent: {path / 'generation_config.json'} cannot be read ({one_line(error)})") from None
