"""GGUF files for llama.cpp (architecture `deci`), written tensor by tensor.

A row of `deci` is a decoder layer, with these gaps (llama.cpp 0c1e570, src/models/deci.cpp):

- the attention of a row without FFN is discarded, and such a row aborts if it is the last;
- head sizes are read from row 0, which must have attention, and some row must have keys and values;
- the bias of a linear attention is not added.

So every row has an FFN, if need be of zeros, which carries that bias too. Rows may be more or fewer than layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from puzzle.engines.capability import require
from puzzle.errors import PuzzleError
from puzzle.export.checkpoint import layers_of, open_child, silent
from puzzle.export.gguf_tokenizer import add_tokenizer
from puzzle.modeling import PuzzleConfig, empty_model
from puzzle.runs import write_atomically
from puzzle.variants import Subblock

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
DTYPES: tuple[GGUFType, ...] = get_args(GGUFType)
_NOISE_BLOCKS = 2**15
"""Blocks of 32 random weights, which are repeated in a model that is only timed."""
_ZERO_WIDTH = 32
"""Of an FFN of zeros: the smallest that every quantised type can hold."""
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.linear_attn": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""Of a layer's modules, in the file."""


@dataclass(frozen=True)
class _FileTensor:
    name: str
    shape: tuple[int, ...]
    source: str | Tensor
    """Its name in the checkpoint, or its values."""
    rope_heads: int | None = None
    """Number of heads to reorder: llama.cpp rotates neighbouring channels, Hugging Face the two halves of a head."""

    def value(self, read: Callable[[str], Tensor]) -> Tensor:
        """Its values, from a function that reads a tensor of the checkpoint."""
        tensor = read(self.source) if isinstance(self.source, str) else self.source
        if self.rope_heads is None:
            return tensor
        return tensor.unflatten(0, (self.rope_heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def type(self, dtype: GGUFType) -> GGUFType:
        """Vectors are f32; a matrix whose rows q8_0 cannot divide into blocks of 32 is f16."""
        if len(self.shape) == 1:
            return "f32"
        return "f16" if dtype == "q8_0" and self.shape[-1] % 32 else dtype


@dataclass(frozen=True)
class _Row:
    """A layer of the file; its tensors' names lack the prefix `blk.N.`."""

    attention: list[_FileTensor]
    kv_heads: int
    """0 with attention: a linear one."""
    ffn: list[_FileTensor]
    width: int


def export_gguf(source: Path, target: Path, *, dtype: GGUFType = "f16") -> Path:
    """Write the child at `source` as the file `target`, with its tokenizer.

    Args:
        dtype: of matrices; vectors are f32. A matrix whose rows q8_0 cannot divide into blocks of 32 is f16.

    Raises:
        PuzzleError: llama.cpp cannot run a layer or the tokenizer, or the package `gguf` is missing.
    """
    writer_of = _writer_class()
    if target.is_dir():
        raise PuzzleError(f"export to gguf: {target} is a folder; name a file")
    child = open_child(source)
    require(child.config, "gguf")

    def encoded(tensor: _FileTensor) -> NDArray[Any]:
        values = tensor.value(lambda name: dict(child.checkpoint.read([name]))[name])
        return _quantised(values, tensor.type(dtype))

    def write(path: Path) -> None:
        writer = writer_of(path, "deci")
        writer.add_name(child.path.resolve().name)
        add_tokenizer(writer, child.path, child.config.vocab_size)
        _write(writer, child.config, dtype, encoded)

    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, write)
    return target


def write_random(config: PuzzleConfig, target: Path, *, dtype: GGUFType) -> Path:
    """Write a model of these shapes as the file `target`, to be timed: random weights, and no tokenizer.

    Raises:
        PuzzleError: llama.cpp cannot run a layer, or the package `gguf` is missing.
    """
    writer = _writer_class()(target, "deci")
    require(config, "gguf")
    noise = torch.from_numpy(np.random.default_rng(0).normal(scale=0.02, size=(_NOISE_BLOCKS, 32)))
    noise_bytes = {name: _quantised(noise, name).view(np.uint8) for name in ("f16", dtype)}

    def encoded(tensor: _FileTensor) -> NDArray[Any]:
        """Of matrices bytes that repeat; norms are ones."""
        if isinstance(tensor.source, Tensor) or len(tensor.shape) == 1:
            return _quantised(tensor.value(lambda _: torch.ones(tensor.shape)), tensor.type(dtype))
        kind = tensor.type(dtype)
        return np.resize(noise_bytes[kind], int(np.prod(_byte_shape(tensor, dtype))))

    writer.add_name("random")
    writer.add_tokenizer_model("none")
    _write(writer, config, dtype, encoded)
    return target


def _writer_class() -> type:
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise PuzzleError("export to gguf: the package gguf is missing; `pip install puzzle-llm[gguf]`") from None
    return GGUFWriter


def _write(writer: Any, config: PuzzleConfig, dtype: GGUFType, encoded: Callable[[_FileTensor], NDArray[Any]]) -> None:
    """Metadata and header, then the tensors' encoded values one at a time."""
    import gguf

    rows = _rows(config)
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
        writer.add_head_count: [config.num_attention_heads if row.attention else 0 for row in rows],
        writer.add_head_count_kv: [row.kv_heads for row in rows],
        writer.add_feed_forward_length: [row.width for row in rows],
    }
    for add, values in sizes.items():
        # Tools that show or quantise a file ask for a scalar where layers agree.
        add(values[0] if len(set(values)) == 1 else values)
    tensors = _file_tensors(config, rows)
    for tensor in tensors:
        shape, kind = _byte_shape(tensor, dtype), gguf.GGMLQuantizationType[tensor.type(dtype).upper()]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(encoded(tensor))
    writer.close()


def _byte_shape(tensor: _FileTensor, dtype: GGUFType) -> tuple[int, ...]:
    import gguf

    kind = gguf.GGMLQuantizationType[tensor.type(dtype).upper()]
    shape: tuple[int, ...] = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
    return shape


def _quantised(values: Tensor, dtype: GGUFType) -> NDArray[Any]:
    import gguf

    kind = gguf.GGMLQuantizationType[dtype.upper()]
    quantised: NDArray[Any] = gguf.quants.quantize(values.float().contiguous().numpy(), kind)
    return quantised


def _file_tensors(config: PuzzleConfig, rows: list[_Row]) -> list[_FileTensor]:
    """Embeddings, last norm, the head unless it is tied, rotary factors where frequencies are scaled, and all rows."""
    matrix = (config.vocab_size, config.hidden_size)
    tensors = [
        _FileTensor("token_embd.weight", matrix, "model.embed_tokens.weight"),
        _FileTensor("output_norm.weight", (config.hidden_size,), "model.norm.weight"),
    ]
    if not config.tie_word_embeddings:
        tensors.append(_FileTensor("output.weight", matrix, "lm_head.weight"))
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") != "default":
        assert config.head_dim is not None
        # By what each rotary frequency is divided, [head_dim / 2].
        rotary = type(empty_model(config).model.rotary_emb)(config=config)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        factors = (rope["rope_theta"] ** -exponents / rotary.inv_freq.double()).float()
        tensors.append(_FileTensor("rope_freqs.weight", tuple(factors.shape), factors))
    return tensors + [
        replace(tensor, name=f"blk.{index}.{tensor.name}")
        for index, row in enumerate(rows)
        for tensor in (*row.attention, *row.ffn)
    ]


def _rows(config: PuzzleConfig) -> list[_Row]:
    """The rows that compute what the layers of the model compute."""
    heads, zero_ffn = config.num_attention_heads, _zeros("ffn", f"w{_ZERO_WIDTH}", config)
    rows: list[_Row] = []
    for layer in layers_of(config):
        assert layer.attention is not None
        assert layer.ffn is not None
        kv_heads = heads // layer.attention["n_heads_in_group"] if "n_heads_in_group" in layer.attention else 0
        rotated = {f"self_attn.q_proj.{tensor}": heads for tensor in ("weight", "bias")}
        rotated |= {f"self_attn.k_proj.{tensor}": kv_heads for tensor in ("weight", "bias")}
        attention, ffn = (
            [
                _FileTensor(_named(name), tuple(shape), f"model.layers.{layer.index}.{name}", rotated.get(name))
                for name, shape in variant.shapes(config).items()
            ]
            for variant in layer.block.subblocks
        )
        if not kv_heads and (biases := [tensor for tensor in attention if tensor.name == "attn_output.bias"]):
            with_bias = [tensor for tensor in zero_ffn if tensor.name != "ffn_down.bias"]
            with_bias.append(replace(biases[0], name="ffn_down.bias"))
            rows.append(_Row([tensor for tensor in attention if tensor not in biases], 0, with_bias, _ZERO_WIDTH))
            if not ffn:
                continue
            attention = []
        if not attention and not rows:
            zero_linear = _zeros("attention", "linear", config)
            attention = [tensor for tensor in zero_linear if tensor.name != "attn_output.bias"]
        rows.append(_Row(attention, kv_heads, ffn or zero_ffn, layer.ffn.get("intermediate_size", _ZERO_WIDTH)))
    if not any(row.kv_heads for row in rows):
        rows.insert(0, _Row(_zeros("attention", "kv1", config), 1, zero_ffn, _ZERO_WIDTH))
    return rows


def _zeros(subblock: Subblock, name: str, config: PuzzleConfig) -> list[_FileTensor]:
    """The tensors of a variant that adds nothing."""
    tensors = silent(subblock, name, config).items()
    return [_FileTensor(_named(name), tuple(tensor.shape), tensor) for name, tensor in tensors]


def _named(name: str) -> str:
    """A tensor's name in its row, from that in its layer."""
    module, _, tensor = name.rpartition(".")
    return f"{_NAMES[module]}.{tensor}"
