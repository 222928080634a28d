"""Parents: a checkpoint found, checked, and read as a Puzzle model whose blocks are its own.

Of a folder of safetensors files the headers are read first, and weights only as they are needed. Nothing is unpickled.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key
from transformers.modeling_utils import local_torch_dtype

from puzzle.engines.environments import cache_folder
from puzzle.errors import PuzzleError, one_line
from puzzle.given import parse_json
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM, empty_model, finish, puzzle_config, refusal
from puzzle.runs import digest, file_digest, remembered, write_tensors, write_text
from puzzle.variants import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "LICENSE*", "NOTICE*", "README.md"]
_NO_REASON = (r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$", r"\.masked_bias$", r"attn\.bias$")
"""Buffers that old versions stored, and that say nothing of the model."""
_PICKLED = r"(?!training_args|optimizer|scheduler|scaler|rng_state).*\.(bin|pt|pth|ckpt)"
_ELSE_THERE = {
    r"adapter_(config|model).*": "an adapter without its model ({}); merge it into that, and give the result",
    r"model\.safetensors(\.index\.json)?": "weights alone ({}); get the whole checkpoint",
    r"model-\d+-of-\d+\.safetensors": "shards, but no model.safetensors.index.json, which says what they hold; copy it",
    r".*\.safetensors": "weights of another name ({}); convert them with transformers",
    _PICKLED: "pickled weights ({}), which are not read; convert them to safetensors",
    r".*\.gguf": "a GGUF file; give that, {}",
    r".*\.(h5|msgpack|onnx)": "weights of another framework ({}); convert them to safetensors",
    r".+/config\.json": "a checkpoint in a folder of its own; give that ({})",
}
"""What stands where a checkpoint's files do not, and what to do."""


class Entry(NamedTuple):
    """One stored tensor."""

    file: Path
    stored: str
    """Its name in the file."""
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files, their headers read and checked, no weights loaded."""

    path: Path
    entries: dict[str, Entry]
    """By the names that the model has."""
    stacked: dict[str, list[list[str]]] = field(default_factory=dict)
    """Tensors that are stored apart, expert by expert: of each, the entries to be stacked, and these joined by rows."""
    _finite: set[str] = field(default_factory=set, repr=False, compare=False)
    """Tensors that were read before and found finite: streamed layers are read again and again."""

    def fault(self, name: str, shape: Sequence[int]) -> str | None:
        """What is wrong with a tensor, unless it is there, in floating point, with this shape."""
        parts = self.stacked.get(name, [[name]])
        if missing := [each for some in parts for each in some if each not in self.entries]:
            return f"{self.path} lacks the tensor {missing[0]}; get the whole checkpoint"
        entry = self.entries[parts[0][0]]
        if entry.dtype not in ("F64", "F32", "F16", "BF16"):  # else it has scales, which would be lost
            return f"{name} is stored as {entry.dtype}; get a checkpoint that is not quantised"
        found = entry.shape
        if name in self.stacked:
            found = (len(parts[0]), entry.shape[0] * len(parts), *entry.shape[1:])
        asked = f"its config.json asks for {list(shape)}"
        return None if found == tuple(shape) else f"{name} has shape {list(found)}, {asked}"

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors as they are stored, file by file; a `PuzzleError` if one is not finite."""
        wanted = list(names)
        file_of = {name: self.entries[name].file for name in wanted if name in self.entries}
        for file, some in groupby(sorted(file_of, key=file_of.__getitem__), file_of.__getitem__):
            with safe_open(file, framework="pt") as handle:
                for name in some:
                    tensor = handle.get_tensor(self.entries[name].stored)
                    if name not in self._finite and not tensor.isfinite().all():
                        raise PuzzleError(f"parent: {file.name} has NaN or infinity in {name}; get a sound checkpoint")
                    self._finite.add(name)
                    yield name, tensor
        for name in self.stacked.keys() & set(wanted):
            experts = dict(self.read(each for some in self.stacked[name] for each in some))
            stacks = [torch.stack([experts[each] for each in some]) for some in self.stacked[name]]
            yield name, torch.cat(stacks, dim=1)

    def named_as(self, model_type: str, text_model: bool) -> "Checkpoint":
        """The same by the names in a family's model; `text_model`: as the text part of a model that also sees."""
        transforms = get_checkpoint_conversion_mapping(model_type) or []
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
        entries: dict[str, Entry] = {}
        stacked: dict[str, dict[str, list[str]]] = {}
        base = "" if any(name.startswith("model.") for name in self.entries) else "model."  # saved by the base class
        for stored in sorted(self.entries, key=dot_natural_key):
            name = stored if text_model or stored.startswith("lm_head.") else base + stored
            if text_model:
                name = re.sub(r"^(model\.)?language_model\.(?=lm_head)", "", name)
                name = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name)
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            entries[name] = self.entries[stored]
            for converter in converters:
                target, pattern = converter.rename_source_key(name)
                if pattern is not None:
                    patterns = stacked.setdefault(target, {each: [] for each in converter.source_patterns})
                    patterns[pattern].append(name)
        return Checkpoint(self.path, entries, {name: [*patterns.values()] for name, patterns in stacked.items()})


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the headers of `model.safetensors`, or of the files that `model.safetensors.index.json` names."""
    files, index = [path / "model.safetensors"], path / "model.safetensors.index.json"
    weight_map: dict[str, str] = {}
    if not files[0].exists():
        if not index.exists():
            raise PuzzleError(f"parent: {path} {_lies_there(path)}")
        try:
            weight_map = parse_json(index.read_text("utf-8"))["weight_map"]
            files = sorted({path / name for name in weight_map.values()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PuzzleError(f"parent: {index} cannot be read ({one_line(error)}); get the whole checkpoint") from None
    entries: dict[str, Entry] = {}
    for file in files:
        if not file.exists():
            raise PuzzleError(f"parent: {file} is missing, though the checkpoint's index names it")
        try:
            with safe_open(file, framework="pt") as handle:
                names = (name for name in handle.keys() if weight_map.get(name, file.name) == file.name)
                slices = {name: handle.get_slice(name) for name in names}
                entries |= {name: Entry(file, name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
        except (SafetensorError, OSError) as error:
            with file.open("rb") as opened:
                if opened.read(20).startswith(b"version https://git"):
                    raise PuzzleError(f"parent: {file} is a pointer of Git LFS; `git lfs pull` gets the file") from None
            raise PuzzleError(f"parent: {file} is truncated or damaged ({one_line(error)}); get it again") from None
    return Checkpoint(path, entries)


def _lies_there(path: Path) -> str:
    """Why a folder is no whole checkpoint, as far as what lies in it tells."""
    found = sorted(file.relative_to(path).as_posix() for file in (*path.glob("*"), *path.glob("*/config.json")))
    if links := [name for name in found if not (path / name).exists()]:
        return f"holds {links[0]}, a link to nothing; get it again"
    for pattern, what in _ELSE_THERE.items():
        if names := [name for name in found if re.fullmatch(pattern, name)]:
            return f"holds {what.format(names[0])}"
    return "holds no weights; get the whole checkpoint, online if it is a hub's"


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
        state = {name: tensor.to(device, self.kept_dtype(name, dtype)) for name, tensor in self.checkpoint.read(names)}
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
        return {name.split(".", 3)[3]: tensor.to(device, self.kept_dtype(name, dtype)) for name, tensor in tensors}

    def kept_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Of a tensor in a model of this dtype."""
        return torch.float32 if dtype.itemsize < 4 and name in self._float32 else dtype

    @cached_property
    def _float32(self) -> set[str]:
        """Tensors that the family keeps in float32 in models of half precision, such as a router's."""
        with local_torch_dtype(torch.bfloat16):
            model = empty_model(self.config)
        strict = model.family._keep_in_fp32_modules_strict or ()
        tensors = stored_tensors(model).items()
        return {name for name, each in tensors if each.dtype == torch.float32 or any(part in name for part in strict)}

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
        for name in stored_tensors(empty_model(self.config)):
            names[int(name.split(".")[2]) if name.startswith("model.layers.") else None].append(name)
        return names


def open_parent(source: str, digests: Path | None = None, address: str | None = None) -> Parent:
    """Find and check a checkpoint, in a folder or by its hub name, without loading its weights.

    Those are hashed, which the file `digests` remembers, unless the address is known, as that of a child is.
    """
    path = _locate(source, _HUB_FILES)
    checkpoint = open_checkpoint(path)
    config, named = _read_config(path, checkpoint)
    assert named is not None
    if address is None:
        files = sorted({entry.file for entry in checkpoint.entries.values()})
        with remembered(digests) as known:
            address = digest([file_digest(file, known) for file in (path / "config.json", *files)])
    return Parent(path, config, named, address)


def read_config(source: str) -> PuzzleConfig:
    """The configuration alone, of a folder with config.json or a hub name: no weights are needed."""
    return _read_config(_locate(source, ["config.json"]), None)[0]


def _locate(source: str, wanted: list[str]) -> Path:
    """A folder with a `model_type`: as given, as a GGUF file was read, or of a hub's snapshot of the wanted files."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        path = _from_gguf(path)
    if not path.is_dir():
        if path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
            use = "give one of a Hugging Face checkpoint, a GGUF file, or a hub name such as org/model"
            raise PuzzleError(f"parent: {source} is not a folder; {use}")
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(source, allow_patterns=wanted))
        except Exception as error:  # whatever the hub client raises, the reader needs one line
            found = f"{source} is neither a folder nor a model that the hub gives ({one_line(error)})"
            raise PuzzleError(f"parent: {found}") from None
    try:
        config = parse_json((path / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise PuzzleError(f"parent: {path} has no config.json; it {_lies_there(path)}") from None
    except (OSError, ValueError) as error:
        raise PuzzleError(f"parent: {path / 'config.json'} cannot be read ({one_line(error)})") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise PuzzleError(f"parent: {path / 'config.json'} has no model_type; get the whole checkpoint")
    return path


def _from_gguf(file: Path) -> Path:
    """A GGUF file as a checkpoint in the user's cache folder, read once, by transformers; `gguf.txt` says from what.

    What is not stored as F32 or F16 is rounded to bfloat16.
    """
    folder = cache_folder() / "parents"
    folder.mkdir(parents=True, exist_ok=True)
    with remembered(folder / "digests.json") as known:
        folder /= f"{file.stem}-{file_digest(file, known)[:12]}"
    if folder.exists():
        return folder
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    try:
        reader = GGUFReader(file)
        types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
        dtype = "float32" if {*types} == {"F32"} else "float16" if {*types} <= {"F32", "F16"} else "bfloat16"
        with TemporaryDirectory() as alone:  # what lies beside the file may belong to another model
            (Path(alone) / "gguf").symlink_to(file.resolve())
            config, tokenizer = (each.from_pretrained(alone, gguf_file="gguf") for each in (AutoConfig, AutoTokenizer))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        options = {"model_to_load": model, "torch_dtype": getattr(torch, dtype)}
        tensors = load_gguf_checkpoint(str(file), return_tensors=True, **options)["tensors"]
        names = [*reader.fields, *(tensor.name for tensor in reader.tensors)]
        if lost := [name for name in names if ".rope.scaling." in name or name.startswith("rope_")]:
            raise ValueError(f"it leaves out {lost[0]}")
        facts = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
        split = facts.get("tokenizer.ggml.pre")
        if split in {"smollm", "starcoder", "refact", "command-r", "codeshell"}:  # single digits, then as GPT-2 does
            steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
        elif facts["tokenizer.ggml.model"] == "gpt2" and split not in {"gpt-2", "phi-2", *GGUF_PRE_TOKENIZER_SPLITS}:
            raise ValueError(f"it does not know how {split} splits text")
    except Exception as error:  # whatever the libraries raise, the reader needs one line
        found = f"{file} cannot be read back by transformers ({one_line(error)})"
        raise PuzzleError(f"parent: {found}; give the checkpoint that it was made from") from None
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    for part in (config, tokenizer):
        part.save_pretrained(partial)
    write_tensors(partial / "model.safetensors", tensors)
    stored = ", ".join(f"{count} of {name}" for name, count in types.most_common())
    write_text(partial / "gguf.txt", f"parent: {file.name} (tensors: {stored}) is read as {dtype}, into {folder}")
    partial.rename(folder)
    return folder


def _read_config(path: Path, checkpoint: Checkpoint | None) -> tuple[PuzzleConfig, Checkpoint | None]:
    """The configuration as a Puzzle model's; and by the names of that, the checkpoint, in which all of it was found."""
    file, text_model = path / "config.json", False
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if not isinstance(config, PuzzleConfig):
            if getattr(config, "quantization_config", None) is not None:
                raise PuzzleError(f"parent: {file} has a quantization_config; get a checkpoint that is not quantised")
            text_model = hasattr(config, "text_config")
            config = config.get_text_config()
            if why := refusal(config.model_type):
                raise PuzzleError(f"parent: model_type {config.model_type!r} is not supported: {why}")
            heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or 1
            if heads % groups:
                raise PuzzleError(f"parent: {file} asks for {heads} attention heads on {groups} KV heads, no divisor")
            config = puzzle_config(config)
        if checkpoint is not None:
            checkpoint = checkpoint.named_as(config.base_model_type, text_model)
            embeddings, head = names = ("model.embed_tokens.weight", "lm_head.weight")
            if config.tie_word_embeddings and head in checkpoint.entries:
                checkpoint.entries.setdefault(embeddings, checkpoint.entries[head])
                # Where both are stored and differ, transformers does not tie them either.
                config.tie_word_embeddings = torch.equal(*(tensor for _, tensor in checkpoint.read(names)))
            model = empty_model(config)
            tensors = stored_tensors(model)
    except PuzzleError:
        raise
    except Exception as error:  # a wrong value can surface anywhere in the library's validation or the model's modules
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise PuzzleError(f"parent: {file} does not describe a model ({reason})") from None
    if not config.blocks:
        raise PuzzleError(f"parent: {file} asks for no layers; num_hidden_layers must be at least 1")
    if checkpoint is not None:
        apart = (name for parts in checkpoint.stacked.values() for part in parts for name in part)
        known = re.compile("|".join([*_NO_REASON, *(model.family._keys_to_ignore_on_load_unexpected or ())]))
        others = sorted(checkpoint.entries.keys() - tensors.keys() - {*names, *apart})
        # Of a model that also sees, other parts lie beside its text part.
        ours = "model.layers." if text_model else ""
        more = [name for name in others if not known.search(name) and name.startswith(ours)]
        stored = checkpoint.entries[more[0]].stored if more else ""
        found = f"stores {len(more)} tensors that its config.json does not ask for, such as {stored}"
        for name, tensor in tensors.items():
            if fault := checkpoint.fault(name, tensor.shape):
                raise PuzzleError(f"parent: {fault}; it also {found}" if more else f"parent: {fault}")
        if more:
            raise PuzzleError(f"parent: {path} {found}; correct config.json, or get the checkpoint that belongs to it")
    if adapters := sorted(file.name for file in path.glob("adapter_*")):
        found = f"{path} holds an adapter beside the weights ({adapters[0]})"
        raise PuzzleError(f"parent: {found}; merge it, or take it away")
    return config, checkpoint


def stored_tensors(model: PuzzleForCausalLM) -> dict[str, Tensor]:
    """What a checkpoint holds: parameters, tied ones once, and the buffers that are kept."""
    kept = model.state_dict().keys()
    return {**dict(model.named_parameters()), **{name: each for name, each in model.named_buffers() if name in kept}}
