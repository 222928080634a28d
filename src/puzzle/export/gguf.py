"""GGUF files for llama.cpp (architecture `deci`), written tensor by tensor.

`puzzle.export.rows` says which tensors a file has; here they get their types, and the model its metadata.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from puzzle.errors import PuzzleError
from puzzle.export.capability import require
from puzzle.export.checkpoint import ChildFiles, open_child
from puzzle.export.gguf_tokenizer import Vocabulary, read_vocabulary
from puzzle.export.rows import Row, RowTensor, compile_rows
from puzzle.modeling import FAMILIES, PuzzleConfig
from puzzle.runs import write_atomically

if TYPE_CHECKING:
    from numpy.typing import NDArray

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_MAX_ROWS = 512
"""LLAMA_MAX_LAYERS."""
_NOISE_ROWS = 2**15
"""Of 32 random weights, which are repeated in a model that is only timed."""


@dataclass(frozen=True)
class _FileTensor:
    """A tensor of the file: what it is made from, and the type it is stored in."""

    name: str
    tensor: RowTensor
    type: str


def export_gguf(source: Path, target: Path, *, dtype: GGUFType = "f16") -> Path:
    """Write the child at `source` as the file `target`, with its tokenizer.

    Args:
        dtype: of matrices; vectors are f32. A matrix whose rows q8_0 cannot divide into blocks of 32 is f16.

    Raises:
        PuzzleError: llama.cpp cannot run a layer or the tokenizer, or the package `gguf` is missing.
    """
    gguf = _import_gguf()
    if dtype not in _FILE_TYPES:
        raise PuzzleError(f"export to gguf: type {dtype!r} is unknown; use one of {', '.join(_FILE_TYPES)}")
    if target.is_dir():
        raise PuzzleError(f"export to gguf: {target} is a folder; name a file")
    child = open_child(source)
    rows = _rows(child.config)
    vocabulary = read_vocabulary(child.path, child.config)
    frequencies = rope_factors(child.config)

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, "deci")
        _add_metadata(gguf, writer, child.path.resolve().name, child.config, rows, dtype)
        _add_vocabulary(gguf, writer, vocabulary)
        tensors = list(_file_tensors(child.config, rows, dtype, frequencies))
        _write_header(gguf, writer, tensors)
        _write_tensors(gguf, writer, tensors, _reader(child, frequencies))
        writer.close()

    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, write)
    return target


def write_random(config: PuzzleConfig, target: Path, *, dtype: GGUFType) -> Path:
    """Write a model of these shapes as the file `target`, to be timed: random weights, and no tokenizer.

    Raises:
        PuzzleError: llama.cpp cannot run a layer, or the package `gguf` is missing.
    """
    gguf, rows = _import_gguf(), _rows(config)
    writer = gguf.GGUFWriter(target, "deci")
    _add_metadata(gguf, writer, "random", config, rows, dtype)
    writer.add_tokenizer_model("none")
    tensors = list(_file_tensors(config, rows, dtype, rope_factors(config)))
    noise = np.random.default_rng(0).normal(scale=0.02, size=(_NOISE_ROWS, 32)).astype(np.float32)
    encoded = {kind: _encoded(gguf, noise, kind).view(np.uint8) for kind in {tensor.type for tensor in tensors}}
    for tensor, size in zip(tensors, _write_header(gguf, writer, tensors), strict=True):
        if tensor.tensor.source is None:
            writer.write_tensor_data(_encoded(gguf, tensor.tensor.value(_no_read).numpy(), tensor.type))
        elif len(tensor.tensor.shape) == 1:
            writer.write_tensor_data(np.ones(tensor.tensor.shape, np.float32))
        else:
            writer.write_tensor_data(np.resize(encoded[tensor.type], size))
    writer.close()
    return target


def _no_read(name: str) -> Tensor:
    raise AssertionError(f"{name} is filled")


def _rows(config: PuzzleConfig) -> list[Row]:
    require(config, "gguf")
    rows = compile_rows(config)
    if len(rows) > _MAX_ROWS:
        raise PuzzleError(f"export to gguf: {len(rows)} rows are needed and llama.cpp allows {_MAX_ROWS}")
    return rows


def rope_factors(config: PuzzleConfig) -> Tensor | None:
    """By what each rotary frequency is divided, [head_dim / 2]; None if none is."""
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") == "default":
        return None
    assert config.head_dim is not None
    rotary = FAMILIES[config.base_model_type].rotary(config=config)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    unscaled = rope["rope_theta"] ** -exponents
    return (unscaled / rotary.inv_freq.double()).float()


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise PuzzleError("export to gguf: the package gguf is missing; `pip install puzzle-llm[gguf]`") from None
    return gguf


def _file_tensors(
    config: PuzzleConfig, rows: list[Row], dtype: str, frequencies: Tensor | None
) -> Iterator[_FileTensor]:
    matrix = (config.vocab_size, config.hidden_size)
    outer = [
        RowTensor("token_embd.weight", matrix, "model.embed_tokens.weight"),
        RowTensor("output_norm.weight", (config.hidden_size,), "model.norm.weight"),
    ]
    if not config.tie_word_embeddings:
        outer.append(RowTensor("output.weight", matrix, "lm_head.weight"))
    if frequencies is not None:
        outer.append(RowTensor("rope_freqs.weight", tuple(frequencies.shape), "rope_freqs"))
    named = [(tensor.name, tensor) for tensor in outer]
    named += [(f"blk.{index}.{tensor.name}", tensor) for index, row in enumerate(rows) for tensor in row.tensors]
    for name, tensor in named:
        yield _FileTensor(name, tensor, _type_of(tensor.shape, dtype))


def _type_of(shape: tuple[int, ...], dtype: str) -> str:
    if len(shape) == 1:
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % 32 else dtype


def _reader(child: ChildFiles, frequencies: Tensor | None) -> Callable[[str], Tensor]:
    def read(name: str) -> Tensor:
        if name == "rope_freqs":
            assert frequencies is not None
            return frequencies
        return child.read(name)

    return read


def _write_header(gguf: ModuleType, writer: Any, tensors: list[_FileTensor]) -> list[int]:
    """All that comes before the tensors' values; how many bytes those have."""
    sizes = []
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.type.upper()]
        byte_shape = gguf.quants.quant_shape_to_byte_shape(tensor.tensor.shape, kind)
        sizes.append(int(np.prod(byte_shape)))
        writer.add_tensor_info(tensor.name, byte_shape, np.dtype(np.uint8), sizes[-1], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return sizes


def _write_tensors(gguf: ModuleType, writer: Any, tensors: list[_FileTensor], read: Callable[[str], Tensor]) -> None:
    for tensor in tensors:
        values = tensor.tensor.value(read).float().contiguous().numpy()
        writer.write_tensor_data(_encoded(gguf, values, tensor.type))


def _encoded(gguf: ModuleType, values: "NDArray[np.float32]", dtype: str) -> "NDArray[Any]":
    encoded: NDArray[Any] = gguf.quants.quantize(values, gguf.GGMLQuantizationType[dtype.upper()])
    return encoded


def _add_metadata(gguf: ModuleType, writer: Any, name: str, config: PuzzleConfig, rows: list[Row], dtype: str) -> None:
    rope = config.rope_parameters or {}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(rows))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(_scalar_if_equal([row.head_count for row in rows]))
    writer.add_head_count_kv(_scalar_if_equal([row.head_count_kv for row in rows]))
    writer.add_feed_forward_length(_scalar_if_equal([row.feed_forward_length for row in rows]))


def _scalar_if_equal(values: list[int]) -> int | list[int]:
    """Tools that show or quantise a file ask for a scalar where layers agree."""
    return values[0] if len(set(values)) == 1 else values


def _add_vocabulary(gguf: ModuleType, writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([gguf.TokenType[kind.upper()] for kind in vocabulary.kinds])
    writer.add_token_merges(vocabulary.merges)
    for name, token_id in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(vocabulary.adds_eos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
