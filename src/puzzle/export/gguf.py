"""GGUF files for llama.cpp (architecture `deci`), written tensor by tensor.

`puzzle.export.rows` says which tensors a file has; here they get their types, and the model its metadata.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from puzzle.engines.capability import require
from puzzle.errors import PuzzleError
from puzzle.export.checkpoint import open_child
from puzzle.export.gguf_tokenizer import add_tokenizer
from puzzle.export.rows import FileTensor, Row, compile_rows
from puzzle.modeling import PuzzleConfig, empty_model
from puzzle.runs import write_atomically

if TYPE_CHECKING:
    from numpy.typing import NDArray

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
DTYPES: tuple[GGUFType, ...] = get_args(GGUFType)
_NOISE_BLOCKS = 2**15
"""Blocks of 32 random weights, which are repeated in a model that is only timed."""


def export_gguf(source: Path, target: Path, *, dtype: GGUFType = "f16") -> Path:
    """Write the child at `source` as the file `target`, with its tokenizer.

    Args:
        dtype: of matrices; vectors are f32. A matrix whose rows q8_0 cannot divide into blocks of 32 is f16.

    Raises:
        PuzzleError: llama.cpp cannot run a layer or the tokenizer, or the package `gguf` is missing.
    """
    gguf = _import_gguf()
    if target.is_dir():
        raise PuzzleError(f"export to gguf: {target} is a folder; name a file")
    child = open_child(source)
    require(child.config, "gguf")

    def read(name: str) -> Tensor:
        return dict(child.checkpoint.read([name]))[name]

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, "deci")
        writer.add_name(child.path.resolve().name)
        add_tokenizer(writer, child.path, child.config.vocab_size)
        _write(gguf, writer, child.config, dtype, lambda tensor: tensor.value(read))

    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, write)
    return target


def write_random(config: PuzzleConfig, target: Path, *, dtype: GGUFType) -> Path:
    """Write a model of these shapes as the file `target`, to be timed: random weights, and no tokenizer.

    Raises:
        PuzzleError: llama.cpp cannot run a layer, or the package `gguf` is missing.
    """
    gguf = _import_gguf()
    require(config, "gguf")
    noise = np.random.default_rng(0).normal(scale=0.02, size=(_NOISE_BLOCKS, 32)).astype(np.float32)
    encoded = {name: _encoded(gguf, noise, name).view(np.uint8) for name in ("f16", dtype)}

    def value(tensor: FileTensor) -> "Tensor | NDArray[np.uint8]":
        """Norms are ones; of matrices the encoded bytes, which repeat."""
        if isinstance(tensor.source, Tensor) or len(tensor.shape) == 1:
            return tensor.value(lambda _: torch.ones(tensor.shape))
        return encoded[_type_of(tensor.shape, dtype)]

    writer = gguf.GGUFWriter(target, "deci")
    writer.add_name("random")
    writer.add_tokenizer_model("none")
    _write(gguf, writer, config, dtype, value)
    return target


def rope_factors(config: PuzzleConfig) -> Tensor | None:
    """By what each rotary frequency is divided, [head_dim / 2]; None if none is."""
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") == "default":
        return None
    assert config.head_dim is not None
    rotary = type(empty_model(config).model.rotary_emb)(config=config)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    return (rope["rope_theta"] ** -exponents / rotary.inv_freq.double()).float()


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise PuzzleError("export to gguf: the package gguf is missing; `pip install puzzle-llm[gguf]`") from None
    return gguf


def _write(
    gguf: ModuleType,
    writer: Any,
    config: PuzzleConfig,
    dtype: GGUFType,
    value: "Callable[[FileTensor], Tensor | NDArray[np.uint8]]",
) -> None:
    """Metadata and header, then the values one tensor at a time; `value` may give bytes, which are repeated to fill."""
    rows = compile_rows(config)
    _add_metadata(gguf, writer, config, rows, dtype)
    tensors, sizes = _file_tensors(config, rows), []
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[_type_of(tensor.shape, dtype).upper()]
        byte_shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
        sizes.append(int(np.prod(byte_shape)))
        writer.add_tensor_info(tensor.name, byte_shape, np.dtype(np.uint8), sizes[-1], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, size in zip(tensors, sizes, strict=True):
        values = value(tensor)
        if isinstance(values, Tensor):
            encoded = _encoded(gguf, values.float().contiguous().numpy(), _type_of(tensor.shape, dtype))
        else:
            encoded = np.resize(values, size)
        writer.write_tensor_data(encoded)
    writer.close()


def _file_tensors(config: PuzzleConfig, rows: list[Row]) -> list[FileTensor]:
    """Embeddings, last norm, the head unless it is tied, rotary factors where frequencies are scaled, and all rows."""
    matrix = (config.vocab_size, config.hidden_size)
    tensors = [
        FileTensor("token_embd.weight", matrix, "model.embed_tokens.weight"),
        FileTensor("output_norm.weight", (config.hidden_size,), "model.norm.weight"),
    ]
    if not config.tie_word_embeddings:
        tensors.append(FileTensor("output.weight", matrix, "lm_head.weight"))
    if (factors := rope_factors(config)) is not None:
        tensors.append(FileTensor("rope_freqs.weight", tuple(factors.shape), factors))
    tensors += [
        replace(tensor, name=f"blk.{index}.{tensor.name}") for index, row in enumerate(rows) for tensor in row.tensors
    ]
    return tensors


def _type_of(shape: tuple[int, ...], dtype: GGUFType) -> GGUFType:
    if len(shape) == 1:
        return "f32"
    return "f16" if dtype == "q8_0" and shape[-1] % 32 else dtype


def _encoded(gguf: ModuleType, values: "NDArray[np.float32]", dtype: GGUFType) -> "NDArray[Any]":
    encoded: NDArray[Any] = gguf.quants.quantize(values, gguf.GGMLQuantizationType[dtype.upper()])
    return encoded


def _add_metadata(gguf: ModuleType, writer: Any, config: PuzzleConfig, rows: list[Row], dtype: GGUFType) -> None:
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(rows))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    sizes = {
        writer.add_head_count: [row.head_count for row in rows],
        writer.add_head_count_kv: [row.head_count_kv for row in rows],
        writer.add_feed_forward_length: [row.feed_forward_length for row in rows],
    }
    for add, values in sizes.items():
        # Tools that show or quantise a file ask for a scalar where layers agree.
        add(values[0] if len(set(values)) == 1 else values)
