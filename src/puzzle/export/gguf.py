"""GGUF files for llama.cpp (architecture `deci`), written tensor by tensor.

A row of `deci` is a decoder layer, with these gaps (llama.cpp 0c1e570, src/models/deci.cpp):

- the attention of a row without FFN is discarded, and such a row aborts if it is the last;
- head sizes are read from row 0, which must have attention, and some row must have keys and values;
- the bias of a linear attention is not added.

So every row has an FFN, if need be of zeros, which carries that bias too. Rows may be more or fewer than layers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from puzzle.engines.capability import require
from puzzle.export.checkpoint import layers_of, silent
from puzzle.export.gguf_tokenizer import add_tokenizer
from puzzle.modeling import PuzzleConfig, empty_model
from puzzle.parents import open_parent
from puzzle.runs import write_atomically

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
Source = str | Tensor
"""A tensor's name in the checkpoint, or its values."""
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


class _Row(NamedTuple):
    """A layer of the file."""

    tensors: dict[str, Source]
    """By their names in a layer of the child."""
    heads: int
    """0 without attention."""
    kv_heads: int
    """0 with attention: a linear one."""
    width: int


def export_gguf(source: Path, target: Path, *, dtype: GGUFType = "f16") -> Path:
    """Write the child at `source` as the file `target`, with its tokenizer.

    Matrices have the `dtype`, but f16 where q8_0 cannot divide rows into blocks of 32; vectors are f32. A `PuzzleError`
    if llama.cpp cannot run a layer or the tokenizer.
    """
    child = open_parent(str(source))
    require(child.config, "gguf")
    head_dim = child.config.head_dim
    assert head_dim is not None

    def encoded(name: str, source: Source, shape: torch.Size, kind: Type) -> NDArray[Any]:
        values = source if isinstance(source, Tensor) else dict(child.checkpoint.read([source]))[source]
        if "attn_q." in name or "attn_k." in name:
            # llama.cpp rotates neighbouring channels, Hugging Face the two halves of a head.
            values = values.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(shape)
        return _quantised(values, kind)

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, "deci")
        writer.add_name(child.path.resolve().name)
        add_tokenizer(writer, child.path, child.config.vocab_size)
        _write(writer, child.config, dtype, encoded)

    write_atomically(target, write)
    return target


def write_random(config: PuzzleConfig, target: Path, *, dtype: GGUFType) -> Path:
    """Write a model of these shapes as the file `target`, to be timed: random weights, and no tokenizer."""
    require(config, "gguf")
    noise = torch.from_numpy(np.random.default_rng(0).normal(scale=0.02, size=(_NOISE_BLOCKS, 32)))
    noise_bytes = {kind: _quantised(noise, kind).view(np.uint8) for kind in (Type.F16, Type[dtype.upper()])}

    def encoded(name: str, source: Source, shape: torch.Size, kind: Type) -> NDArray[Any]:
        """Of matrices bytes that repeat; vectors are ones."""
        if len(shape) == 1:
            return _quantised(torch.ones(shape), kind)
        return np.resize(noise_bytes[kind], int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind))))

    writer = gguf.GGUFWriter(target, "deci")
    writer.add_name("random")
    writer.add_tokenizer_model("none")
    _write(writer, config, dtype, encoded)
    return target


def _write(writer: Any, config: PuzzleConfig, dtype: GGUFType, encoded: Callable[..., NDArray[Any]]) -> None:
    """Metadata and header, then the tensors one at a time, as `encoded` from name, source, shape and type."""
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
    for add, values in (
        (writer.add_head_count, [row.heads for row in rows]),
        (writer.add_head_count_kv, [row.kv_heads for row in rows]),
        (writer.add_feed_forward_length, [row.width for row in rows]),
    ):
        # Tools that show or quantise a file ask for a scalar where layers agree.
        add(values[0] if len(set(values)) == 1 else values)
    parameters, tensors = dict(empty_model(config).named_parameters()), []
    for name, source in _tensors(config, rows).items():
        shape = (parameters[source] if isinstance(source, str) else source).shape
        kind = Type.F32 if len(shape) == 1 else Type.F16 if dtype == "q8_0" and shape[-1] % 32 else Type[dtype.upper()]
        byte_shape = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), int(np.prod(byte_shape)), raw_dtype=kind)
        tensors.append((name, source, shape, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(encoded(*tensor))
    writer.close()


def _quantised(values: Tensor, kind: Type) -> NDArray[Any]:
    return gguf.quantize(values.float().contiguous().numpy(), kind)


def _tensors(config: PuzzleConfig, rows: list[_Row]) -> dict[str, Source]:
    """Embeddings, last norm, the head unless it is tied, rotary factors where frequencies are scaled, and all rows."""
    tensors: dict[str, Source] = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if not config.tie_word_embeddings:
        tensors["output.weight"] = "lm_head.weight"
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        assert config.head_dim is not None
        # By what each rotary frequency is divided, [head_dim / 2].
        rotary = type(empty_model(config).model.rotary_emb)(config=config)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        tensors["rope_freqs.weight"] = (rope["rope_theta"] ** -exponents / rotary.inv_freq.double()).float()
    for index, row in enumerate(rows):
        for name, source in row.tensors.items():
            module, _, tensor = name.rpartition(".")
            tensors[f"blk.{index}.{_NAMES[module]}.{tensor}"] = source
    return tensors


def _rows(config: PuzzleConfig) -> list[_Row]:
    """The rows that compute what the layers of the model compute."""
    heads, zero_ffn = config.num_attention_heads, silent("ffn", f"w{_ZERO_WIDTH}", config)
    rows: list[_Row] = []
    for layer in layers_of(config):
        attention, ffn = (
            dict[str, Source]({name: f"model.layers.{layer.index}.{name}" for name in variant.shapes(config)})
            for variant in layer.block.subblocks
        )
        bias = attention.pop("self_attn.linear_attn.bias", None)
        if bias is not None:
            rows.append(_Row({**attention, **zero_ffn, "mlp.down_proj.bias": bias}, heads, 0, _ZERO_WIDTH))
            if not ffn:
                continue
            attention = {}
        elif not attention and not rows:
            attention.update(silent("attention", "linear", config))
            attention.pop("self_attn.linear_attn.bias", None)
        kv_heads = heads // layer.attention["n_heads_in_group"] if "n_heads_in_group" in layer.attention else 0
        width = layer.ffn.get("intermediate_size", _ZERO_WIDTH)
        rows.append(_Row({**attention, **(ffn or zero_ffn)}, heads if attention else 0, kv_heads, width))
    if not any(row.kv_heads for row in rows):
        rows.insert(0, _Row({**silent("attention", "kv1", config), **zero_ffn}, heads, 1, _ZERO_WIDTH))
    return rows
