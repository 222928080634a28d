"""GGUF files for llama.cpp, written tensor by tensor: of the architecture `deci` for what is another spelling of Llama,
`openelm` for Qwen3, whose queries and keys are normed.

A row of `deci` is a decoder layer, with these gaps (llama.cpp 0c1e570, src/models/deci.cpp):

- the attention of a row without FFN is discarded, and such a row aborts if it is the last;
- head sizes are read from row 0, which must have attention, and some row must have keys and values;
- the bias of a linear attention is not added.

So every row has an FFN, if need be of zeros, which carries that bias too. Rows may be more or fewer than layers.

A row of `openelm` needs both subblocks: an attention of one head, or an FFN, of zeros where there is none. Its head is
tied, queries, keys and values are one matrix, and there are no biases.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from puzzle.engines.capability import reader_of, require
from puzzle.export.checkpoint import Layer, layers_of
from puzzle.export.gguf_tokenizer import add_tokenizer
from puzzle.modeling import Plain, PuzzleConfig, PuzzleForCausalLM, empty_model, plain_tensors
from puzzle.parents import open_parent
from puzzle.runs import write_atomically

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
Source = Plain | Tensor
"""How a tensor follows from one of the checkpoint, or its values."""
_NOISE_BLOCKS = 2**15
"""Blocks of 32 random weights, which are repeated in a model that is only timed."""
_ZERO_WIDTH = 32
"""Of an FFN of zeros: the smallest that every quantised type can hold."""
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
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

    tensors: dict[str, list[Source]]
    """By their names in a layer of a plain model; of several sources the rows one after another."""
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

    def values_of(source: Source) -> Tensor:
        if isinstance(source, Tensor):
            return source
        ((_, stored),) = child.checkpoint.read([source.source])
        return source.of(stored)

    def encoded(name: str, sources: list[Source], shape: torch.Size, kind: Type) -> NDArray[Any]:
        values = torch.cat([values_of(source) for source in sources])
        if "attn_q." in name or "attn_k." in name:
            # llama.cpp rotates neighbouring channels, Hugging Face the two halves of a head.
            values = values.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(shape)
        return _quantised(values, kind)

    def write(path: Path) -> None:
        writer = gguf.GGUFWriter(path, _architecture(child.config))
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

    def encoded(name: str, sources: list[Source], shape: torch.Size, kind: Type) -> NDArray[Any]:
        """Of matrices bytes that repeat; vectors are ones."""
        if len(shape) == 1:
            return _quantised(torch.ones(shape), kind)
        return np.resize(noise_bytes[kind], int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind))))

    writer = gguf.GGUFWriter(target, _architecture(config))
    writer.add_name("random")
    writer.add_tokenizer_model("none")
    _write(writer, config, dtype, encoded)
    return target


def _architecture(config: PuzzleConfig) -> str:
    return reader_of(config, "gguf").engine.rpartition(" ")[2]


def _write(writer: Any, config: PuzzleConfig, dtype: GGUFType, encoded: Callable[..., NDArray[Any]]) -> None:
    """Metadata and header, then the tensors one at a time, as `encoded` from name, source, shape and type."""
    model = empty_model(config)
    rows = _deci_rows(model) if writer.arch == "deci" else _openelm_rows(model)
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
    parameters, tensors = dict(model.named_parameters()), []
    for name, sources in _tensors(model, rows).items():
        parts = [each if isinstance(each, Tensor) else each.of(parameters[each.source]).to("meta") for each in sources]
        shape = torch.cat([part.to("meta") for part in parts]).shape
        kind = Type.F32 if len(shape) == 1 else Type.F16 if dtype == "q8_0" and shape[-1] % 32 else Type[dtype.upper()]
        byte_shape = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), int(np.prod(byte_shape)), raw_dtype=kind)
        tensors.append((name, sources, shape, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(encoded(*tensor))
    writer.close()


def _quantised(values: Tensor, kind: Type) -> NDArray[Any]:
    return gguf.quantize(values.float().contiguous().numpy(), kind)


def _tensors(model: PuzzleForCausalLM, rows: list[_Row]) -> dict[str, list[Source]]:
    """Embeddings, last norm, the head unless it is tied, rotary factors where frequencies are scaled, and all rows."""
    config, plain = model.config, plain_tensors(model)
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    tensors: dict[str, list[Source]] = {
        f"{name}.weight": [plain[f"{own}.weight"]] for name, own in outer.items() if f"{own}.weight" in plain
    }
    rope = config.rope_parameters or {}
    if rope.get("rope_type", "default") != "default":
        assert config.head_dim is not None
        # By what each rotary frequency is divided, [head_dim / 2].
        rotary = type(empty_model(config).model.rotary_emb)(config=config)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        tensors["rope_freqs.weight"] = [(rope["rope_theta"] ** -exponents / rotary.inv_freq.double()).float()]
    for index, row in enumerate(rows):
        for name, sources in row.tensors.items():
            module, _, tensor = name.rpartition(".")
            tensors[f"blk.{index}.{_NAMES[module]}.{tensor}"] = sources
    return tensors


def _subblocks(model: PuzzleForCausalLM) -> Iterator[tuple[Layer, dict[str, list[Source]], dict[str, list[Source]]]]:
    """The layers that are not empty, with the plain tensors of their attention and FFN by their names in the layer."""
    plain = plain_tensors(model)
    for layer in layers_of(model.config):
        prefix = f"model.layers.{layer.index}."
        own: dict[str, list[Source]] = {}
        own |= {name.removeprefix(prefix): [each] for name, each in plain.items() if name.startswith(prefix)}
        ffn = {name: each for name, each in own.items() if name.startswith(("mlp.", "post_attention_layernorm."))}
        yield layer, {name: each for name, each in own.items() if name not in ffn}, ffn


def _deci_rows(model: PuzzleForCausalLM) -> list[_Row]:
    """The rows that compute what the layers of the model compute."""
    heads, config = model.config.num_attention_heads, model.config
    hidden, queries = config.hidden_size, heads * (config.head_dim or 0)
    zero_ffn = _zero_ffn(hidden)
    rows: list[_Row] = []
    for layer, attention, ffn in _subblocks(model):
        bias = attention.pop("self_attn.linear_attn.bias", None)
        if bias is not None:
            rows.append(_Row({**attention, **zero_ffn, "mlp.down_proj.bias": bias}, heads, 0, _ZERO_WIDTH))
            if not ffn:
                continue
            attention = {}
        elif not attention and not rows:
            attention = _zeros("input_layernorm", hidden, {"self_attn.linear_attn": (hidden, hidden)})
        kv_heads = heads // layer.attention["n_heads_in_group"] if "n_heads_in_group" in layer.attention else 0
        width = layer.ffn.get("intermediate_size", _ZERO_WIDTH)
        rows.append(_Row({**attention, **(ffn or zero_ffn)}, heads if attention else 0, kv_heads, width))
    if not any(row.kv_heads for row in rows):
        one_head = {f"self_attn.{name}_proj": (queries // heads, hidden) for name in "kv"}
        one_head |= {"self_attn.q_proj": (queries, hidden), "self_attn.o_proj": (hidden, queries)}
        rows.insert(0, _Row({**_zeros("input_layernorm", hidden, one_head), **zero_ffn}, heads, 1, _ZERO_WIDTH))
    return rows


def _openelm_rows(model: PuzzleForCausalLM) -> list[_Row]:
    """The layers as they are, with one head of zeros for no attention, and a narrow FFN of zeros for none."""
    config, hidden, head_dim = model.config, model.config.hidden_size, model.config.head_dim or 0
    rows: list[_Row] = []
    for layer, attention, ffn in _subblocks(model):
        heads, kv_heads = config.num_attention_heads, layer.block.attention.size or 0
        if attention:
            joint = [source for name in "qkv" for source in attention.pop(f"self_attn.{name}_proj.weight")]
            attention["self_attn.qkv.weight"] = joint
        else:
            heads = kv_heads = 1
            zeros = {"self_attn.qkv": (3 * head_dim, hidden), "self_attn.o_proj": (hidden, head_dim)}
            attention = _zeros("input_layernorm", hidden, zeros)
            attention |= {f"self_attn.{name}_norm.weight": [torch.ones(head_dim)] for name in "qk"}
        width = layer.ffn.get("intermediate_size", _ZERO_WIDTH)
        rows.append(_Row({**attention, **(ffn or _zero_ffn(hidden))}, heads, kv_heads, width))
    return rows


def _zeros(norm: str, hidden: int, shapes: dict[str, tuple[int, int]]) -> dict[str, list[Source]]:
    """Matrices that add nothing, after a norm of ones."""
    zeros: dict[str, list[Source]] = {f"{name}.weight": [torch.zeros(shape)] for name, shape in shapes.items()}
    return zeros | {f"{norm}.weight": [torch.ones(hidden)]}


def _zero_ffn(hidden: int) -> dict[str, list[Source]]:
    wide = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (_ZERO_WIDTH, hidden))
    return _zeros("post_attention_layernorm", hidden, wide | {"mlp.down_proj": (hidden, _ZERO_WIDTH)})
