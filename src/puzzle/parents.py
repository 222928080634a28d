"""Parents: a checkpoint found, checked, and read as a Puzzle model whose blocks are its own.

Of a folder of safetensors files the headers are read first, and weights only as they are needed. Nothing is unpickled.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from puzzle.errors import PuzzleError, one_line
from puzzle.modeling import FAMILIES, PuzzleConfig, PuzzleForCausalLM, empty_model, finish
from puzzle.runs import digest, file_digest, remembered
from puzzle.variants import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "LICENSE*", "NOTICE*"]
_OF_THE_FILE = ("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version")
"""Fields of a configuration that describe the file, not the model."""
_DTYPES = ("F64", "F32", "F16", "BF16")
"""As safetensors names them; anything else is quantised, and its scales would be lost."""


class Entry(NamedTuple):
    """One stored tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files, their headers read and checked, no weights loaded."""

    path: Path
    entries: dict[str, Entry]
    _finite: set[str] = field(default_factory=set, repr=False, compare=False)
    """Tensors that were read before and found finite: streamed layers are read again and again."""

    def check(self, name: str, shape: Sequence[int]) -> None:
        """A `PuzzleError` unless the tensor is there, in floating point, with this shape."""
        entry = self.entries.get(name)
        if entry is None:
            raise PuzzleError(f"parent: {self.path} lacks the tensor {name}; get the whole checkpoint")
        if entry.dtype not in _DTYPES:
            raise PuzzleError(f"parent: {name} is stored as {entry.dtype}; get a checkpoint that is not quantised")
        if entry.shape != tuple(shape):
            raise PuzzleError(f"parent: {name} has shape {list(entry.shape)}, its config.json asks for {list(shape)}")

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors as they are stored, file by file; a `PuzzleError` if one is not finite."""

        def file_of(name: str) -> Path:
            return self.entries[name].file

        for file, wanted in groupby(sorted(names, key=file_of), file_of):
            with safe_open(file, framework="pt") as handle:
                for name in wanted:
                    tensor = handle.get_tensor(name)
                    if name not in self._finite and not tensor.isfinite().all():
                        raise PuzzleError(f"parent: {file.name} has NaN or infinity in {name}; get a sound checkpoint")
                    self._finite.add(name)
                    yield name, tensor

    def address(self, digests: Path | None) -> str:
        """Hash of the configuration and the weights; the file `digests` remembers those of files."""
        with remembered(digests) as known:
            files = sorted({entry.file for entry in self.entries.values()})
            return digest([file_digest(file, known) for file in (self.path / "config.json", *files)])


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of `model.safetensors`, or of the files that `model.safetensors.index.json` names."""
    files, index = [path / "model.safetensors"], path / "model.safetensors.index.json"
    if not files[0].exists():
        if not index.exists():
            raise PuzzleError(f"parent: {path} has no model.safetensors; pickled weights are not read, convert them")
        try:
            files = sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PuzzleError(f"parent: {index} cannot be read ({one_line(error)}); get the whole checkpoint") from None
    entries: dict[str, Entry] = {}
    for file in files:
        if not file.exists():
            raise PuzzleError(f"parent: {file} is missing, though the checkpoint's index names it")
        try:
            with safe_open(file, framework="pt") as handle:
                slices = {name: handle.get_slice(name) for name in handle.keys()}
                entries |= {name: Entry(file, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        except (SafetensorError, OSError) as error:
            raise PuzzleError(f"parent: {file} is truncated or damaged ({one_line(error)}); get it again") from None
    return Checkpoint(path, entries)


@dataclass(frozen=True)
class Parent:
    """The model we start from."""

    path: Path
    config: PuzzleConfig
    checkpoint: Checkpoint
    address: str
    """Hash of its configuration and weights."""

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @cached_property
    def architecture(self) -> Architecture:
        """Its own blocks."""
        return Architecture.of(self.config)

    @cached_property
    def num_params(self) -> int:
        """Parameters, tied ones counted once."""
        return empty_model(self.config).num_parameters()

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

        Only `layers` get weights, if given: the others stay on `meta` (see `puzzle.streams`).
        """
        model = empty_model(self.config)
        held = range(self.num_layers) if layers is None else layers
        names = [name for layer in (None, *held) for name in self._names[layer]]
        state = {name: tensor.to(device, dtype) for name, tensor in self.checkpoint.read(names)}
        model.load_state_dict(state, strict=False, assign=True)
        file = self.path / "generation_config.json"
        if file.exists():
            try:
                model.generation_config = GenerationConfig.from_pretrained(self.path)
            except (OSError, ValueError) as error:
                raise PuzzleError(f"parent: {file} cannot be read ({one_line(error)})") from None
        return finish(model, device)

    def layer_state(
        self, layer: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """One layer's tensors by their names within the layer; no others are read."""
        tensors = self.checkpoint.read(self._names[layer])
        return {name.split(".", 3)[3]: tensor.to(device, dtype) for name, tensor in tensors}

    def embeddings_and_head(self) -> dict[str, Tensor]:
        """Embeddings, final norm and untied head in float32, by their names in the model."""
        return {name: tensor.float() for name, tensor in self.checkpoint.read(self._names[None])}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by its name in the model, as it is stored, one at a time."""
        return self.checkpoint.read(chain.from_iterable(self._names.values()))

    @cached_property
    def _names(self) -> dict[int | None, list[str]]:
        """Every parameter once, a tied one under the name that checkpoints keep; those outside of layers by None."""
        names: dict[int | None, list[str]] = defaultdict(list)
        for name, _ in empty_model(self.config).named_parameters():
            names[int(name.split(".")[2]) if name.startswith("model.layers.") else None].append(name)
        return names


def open_parent(source: str, digests: Path | None = None, address: str | None = None) -> Parent:
    """Find and check a checkpoint, in a folder or by its hub name, without loading its weights.

    Those are hashed, which the file `digests` remembers, unless the address is known, as that of a child is.
    """
    path = _locate(source, _HUB_FILES)
    checkpoint = open_checkpoint(path)
    return Parent(path, _read_config(path, checkpoint), checkpoint, address or checkpoint.address(digests))


def read_config(source: str) -> PuzzleConfig:
    """The configuration alone, of a folder with config.json or a hub name: no weights are needed."""
    return _read_config(_locate(source, ["config.json"]), None)


def _locate(source: str, wanted: list[str]) -> Path:
    """A folder, or that of a hub's snapshot with the wanted files, whose `model_type` is of a family that is known."""
    path = Path(source).expanduser()
    if not path.is_dir():
        if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
            use = "give one of a Hugging Face checkpoint, or a hub name such as org/model"
            raise PuzzleError(f"parent: {source} is not a folder; {use}")
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(source, allow_patterns=wanted))
        except Exception as error:  # whatever the hub client raises, the reader needs one line
            reason = f"neither a folder nor a model that the hub gives ({one_line(error)})"
            raise PuzzleError(f"parent: {source} is {reason}") from None
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise PuzzleError(f"parent: {path / 'config.json'} cannot be read ({one_line(error)})") from None
    supported = [*FAMILIES, "puzzle"]
    found = config.get("model_type") if isinstance(config, dict) else None
    if found not in supported:
        raise PuzzleError(f"parent: model_type {found!r} is not supported; use one of {', '.join(supported)}")
    return path


def _read_config(path: Path, checkpoint: Checkpoint | None) -> PuzzleConfig:
    """The configuration as a Puzzle model's, after every parameter that it asks for was found in the checkpoint."""
    file = path / "config.json"
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not isinstance(config, PuzzleConfig):
            fields = {name: value for name, value in config.to_dict().items() if name not in _OF_THE_FILE}
            if fields.get("quantization_config") is not None:
                raise PuzzleError(f"parent: {file} has a quantization_config; get a checkpoint that is not quantised")
            config = PuzzleConfig(**fields, base_model_type=config.model_type)
        if checkpoint is not None:
            names = {"model.embed_tokens.weight", "lm_head.weight"}
            if config.tie_word_embeddings and names <= checkpoint.entries.keys():
                # Where both are stored and differ, transformers does not tie them either.
                config.tie_word_embeddings = torch.equal(*(tensor for _, tensor in checkpoint.read(names)))
            parameters = dict(empty_model(config).named_parameters())
    except PuzzleError:
        raise
    except Exception as error:  # a wrong value can surface anywhere in the library's validation or the model's modules
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise PuzzleError(f"parent: {file} does not describe a model ({reason})") from None
    if not config.blocks:
        raise PuzzleError(f"parent: {file} asks for no layers; num_hidden_layers must be at least 1")
    if checkpoint is not None:
        for name, parameter in parameters.items():
            checkpoint.check(name, parameter.shape)
    return config
