"""GGUF files for llama.cpp, written tensor by tensor: of the architecture `deci` for what is another spelling of Llama,
`openelm` for Qwen3, whose queries and keys are normed, if its head is tied; `step35` for both if there are windows, a
head of its own, or layers without positions, but only one width of FFNs.

A row of `deci` is a decoder layer, with these gaps (llama.cpp 0c1e570, src/models/deci.cpp):

- the attention of a row without FFN is discarded, and such a row aborts if it is the last;
- head sizes are read from row 0, which must have attention, and some row must have keys and values;
- the bias of a linear attention is not added.

So every row has an FFN, if need be of zeros, which carries that bias too. Rows may be more or fewer than layers.

A row of the others needs both subblocks: an attention of one head, or an FFN, of zeros where there is none. They have
no biases. In `openelm` the head is tied, and queries, keys and values are one matrix. In `step35` the head is its own
matrix, all FFNs are as wide as the first, so that one of zeros is a mixture of one narrow expert; and rows are of two
sorts, of which the first must occur:

- with a window, which is the context where none has one: `rope.dimension_count_swa` channels are rotated;
- without: half of `rope.dimension_count`, by frequencies divided by `rope_freqs.weight`. A divisor of 1e30 leaves out
  positions, in models that have no windows.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import cache
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
from puzzle.library import ROUNDED, encode
from puzzle.modeling import Plain, PuzzleConfig, PuzzleForCausalLM, empty_model, family_config, plain_tensors, rotates
from puzzle.parents import open_parent
from puzzle.runs import read_tensors, write_atomically

GGUFType = Literal["f32", "f16", "bf16", "q8_0"]
Source = Plain | Tensor
"""How a tensor follows from one of the checkpoint, or its values."""
_ZERO_WIDTH = 32
"""Of an FFN of zeros: the smallest that every quantised type can hold."""


class _Row(NamedTuple):
    """A layer of the file."""

    tensors: dict[str, list[Source]]
    """By their names in a layer of a plain model; of several sources the rows one after another."""
    heads: int
    """0 without attention."""
    kv_heads: int
    """0 with attention: a linear one."""
    width: int
    slides: bool = False
    """Whether it is of the sort that has a window."""
    types: tuple[str, str] = ("", "")
    """Of the matrices of attention and FFN, where they are twins."""


def export_gguf(source: Path, target: Path, *, dtype: GGUFType = "f16") -> Path:
    """Write the child at `source` as the file `target`, with its tokenizer.

    Matrices have the `dtype`, but f16 where q8_0 cannot divide rows into blocks of 32; vectors are f32. A `PuzzleError`
    if llama.cpp cannot run a layer or the tokenizer.
    """
    child = open_parent(str(source))
    require(child.config, "gguf")
    head_dim, rotates_neighbours = child.config.head_dim, _architecture(child.config) == "deci"
    assert head_dim is not None
    rounded = read_tensors(source / ROUNDED) if (source / ROUNDED).exists() else {}

    def stored(name: str) -> Tensor:
        return rounded[name] if name in rounded else dict(child.checkpoint.read([name]))[name]

    def encoded(name: str, sources: list[Source], shape: torch.Size, kind: Type) -> NDArray[Any]:
        values = torch.cat([each if isinstance(each, Tensor) else each.of(stored(each.source)) for each in sources])
        if rotates_neighbours and ("attn_q." in name or "attn_k." in name):
            # Here llama.cpp rotates neighbouring channels, Hugging Face the two halves of a head.
            values = values.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).reshape(values.shape)
        return (values if values.dtype == torch.uint8 else encode(values, kind.name)).numpy()

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
    noise = torch.from_numpy(np.random.default_rng(0).normal(scale=0.02, size=(2**12, 256)))  # rows of whole blocks

    @cache
    def noise_bytes(kind: Type) -> NDArray[Any]:
        return encode(noise, kind.name).numpy().view(np.uint8)

    def encoded(name: str, sources: list[Source], shape: torch.Size, kind: Type) -> NDArray[Any]:
        """Of matrices bytes that repeat; vectors are ones."""
        if len(shape) == 1:
            return encode(torch.ones(shape), kind.name).numpy()
        return np.resize(noise_bytes(kind), int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind))))

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
    rows = _deci_rows(model) if writer.arch == "deci" else _rows(model, writer.arch)
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(rows))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    theta = float((config.rope_parameters or {}).get("rope_theta", 10000.0))
    writer.add_rope_dimension_count((config.head_dim or 0) * (2 if writer.arch == "step35" else 1))
    writer.add_rope_freq_base(theta)
    if writer.arch == "step35":
        writer.add_rope_dimension_count_swa(config.head_dim)
        writer.add_rope_freq_base_swa(theta)
        windows = (block["attention"].get("window") for block in config.blocks or [])
        writer.add_sliding_window(next(filter(None, windows), config.max_position_embeddings))
        writer.add_sliding_window_pattern([row.slides for row in rows])
        writer.add_expert_count(1)
        writer.add_expert_used_count(1)
        writer.add_expert_feed_forward_length(_ZERO_WIDTH)
        writer.add_expert_shared_feed_forward_length(_ZERO_WIDTH)
    writer.add_vocab_size(config.vocab_size)
    for add, values in (
        (writer.add_head_count, [row.heads for row in rows]),
        (writer.add_head_count_kv, [row.kv_heads for row in rows]),
        (writer.add_feed_forward_length, [row.width for row in rows]),
    ):
        # Tools that show or quantise a file ask for a scalar where layers agree.
        add(values[0] if len(set(values)) == 1 else values)
    parameters, tensors = dict(model.named_parameters()), []
    for name, sources in _tensors(model, rows, writer.arch).items():
        parts = [each if isinstance(each, Tensor) else each.of(parameters[each.source]).to("meta") for each in sources]
        shape = torch.cat([part.to("meta") for part in parts]).shape
        kind = Type.F32 if len(shape) == 1 else Type.F16 if dtype == "q8_0" and shape[-1] % 32 else Type[dtype.upper()]
        block, index, local = (*name.split("."), "")[:3]
        types = rows[int(index)].types if block == "blk" else (getattr(config, "outer_type", ""), "")
        if len(shape) > 1 and (type := types[local.startswith("ffn")]):
            kind = Type[type.upper()]
        byte_shape = gguf.quant_shape_to_byte_shape(shape, kind)
        writer.add_tensor_info(name, byte_shape, np.dtype(np.uint8), int(np.prod(byte_shape)), raw_dtype=kind)
        tensors.append((name, sources, shape, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(encoded(*tensor))
    writer.close()


def _tensors(model: PuzzleForCausalLM, rows: list[_Row], architecture: str) -> dict[str, list[Source]]:
    """Embeddings, last norm, the head unless it is tied, rotary factors where frequencies are scaled, and all rows."""
    config, rope, head_dim = model.config, model.config.rope_parameters or {}, model.config.head_dim or 0
    outer = {name: each for name, each in plain_tensors(model).items() if not name.startswith("model.layers.")}
    if architecture == "step35":
        outer.setdefault("lm_head.weight", outer["model.embed_tokens.weight"])
    tensors: dict[str, list[Source]] = {name: [each] for name, each in outer.items()}
    for index, row in enumerate(rows):
        tensors |= {f"model.layers.{index}.{name}": sources for name, sources in row.tensors.items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], len(rows))
    tensors = {names.get_name(name, (".weight", ".bias")) or name: sources for name, sources in tensors.items()}
    if architecture == "step35" and not all(rotates(config, layer) for layer in range(config.num_layers)):
        tensors["rope_freqs.weight"] = [torch.full((head_dim // 2,), 1e30)]
    elif rope.get("rope_type", "default") != "default":
        # By what each rotary frequency is divided, [head_dim / 2].
        rotary = type(model.model.rotary_emb)(config=family_config(config))
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        tensors["rope_freqs.weight"] = [(rope["rope_theta"] ** -exponents / rotary.inv_freq.double()).float()]
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
    heads, config = family_config(model.config).num_attention_heads, model.config
    hidden, queries = config.hidden_size, heads * (config.head_dim or 0)
    zero_ffn = _zero_ffn(hidden)
    rows: list[_Row] = []
    for layer, attention, ffn in _subblocks(model):
        bias = attention.pop("self_attn.linear_attn.bias", None)
        if bias is not None:
            zeros = {**zero_ffn, "mlp.down_proj.bias": bias}
            rows.append(_Row({**attention, **zeros}, heads, 0, _ZERO_WIDTH, types=(layer.types[0], "")))
            if not ffn:
                continue
            attention = {}
        elif not attention and not rows:
            attention = _zeros("input_layernorm", hidden, {"self_attn.linear_attn": (hidden, hidden)})
        kv_heads = layer.block.attention.size or 0
        width = layer.ffn.get("intermediate_size", _ZERO_WIDTH)
        types = layer.types if attention else ("", layer.types[1])
        its_heads = _heads(layer, model.config) if attention else 0
        rows.append(_Row({**attention, **(ffn or zero_ffn)}, its_heads, kv_heads, width, types=types))
    if not any(row.kv_heads for row in rows):
        one_head = {f"self_attn.{name}_proj": (queries // heads, hidden) for name in "kv"}
        one_head |= {"self_attn.q_proj": (queries, hidden), "self_attn.o_proj": (hidden, queries)}
        rows.insert(0, _Row({**_zeros("input_layernorm", hidden, one_head), **zero_ffn}, heads, 1, _ZERO_WIDTH))
    return rows


def _rows(model: PuzzleForCausalLM, architecture: str) -> list[_Row]:
    """Of `openelm` or `step35`: the layers as they are, with one head and a narrow FFN of zeros for what is absent."""
    config, hidden, head_dim = model.config, model.config.hidden_size, model.config.head_dim or 0
    layers, one_width = list(_subblocks(model)), architecture == "step35"
    width = next((layer.ffn["intermediate_size"] for layer, _, ffn in layers if ffn), _ZERO_WIDTH)
    zero_ffn = _zero_ffn(hidden, of_experts=one_width)
    windows = any("window" in layer.block.attention.entry() for layer, _, _ in layers)
    rows: list[_Row] = []
    for layer, attention, ffn in layers:
        heads, kv_heads = _heads(layer, config), layer.block.attention.size or 0
        if not attention:
            heads = kv_heads = 1
            zeros = {f"self_attn.{name}_proj": (head_dim, hidden) for name in "qkv"}
            attention = _zeros("input_layernorm", hidden, zeros | {"self_attn.o_proj": (hidden, head_dim)})
            if not one_width:  # whose norms of queries and keys are optional
                attention |= {f"self_attn.{name}_norm.weight": [torch.ones(head_dim)] for name in "qk"}
        if not one_width:
            parts = (attention.pop(f"self_attn.{name}_proj.weight") for name in "qkv")
            attention["self_attn.qkv_proj.weight"] = [source for part in parts for source in part]
        slides = "window" in layer.block.attention.entry() if windows else rotates(config, layer.index)
        slides |= layer.block.attention.absent  # which caches less, of what is multiplied by zeros
        its_width = width if one_width else layer.ffn.get("intermediate_size", _ZERO_WIDTH)
        rows.append(_Row({**attention, **(ffn or zero_ffn)}, heads, kv_heads, its_width, slides, layer.types))
    return rows


def _heads(layer: Layer, config: PuzzleConfig) -> int:
    """Of queries, where there is attention."""
    return int(layer.block.attention.entry().get("num_attention_heads", family_config(config).num_attention_heads))


def _zeros(norm: str, hidden: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Source]]:
    """Matrices that add nothing, after a norm of ones."""
    zeros: dict[str, list[Source]] = {f"{name}.weight": [torch.zeros(shape)] for name, shape in shapes.items()}
    return zeros | {f"{norm}.weight": [torch.ones(hidden)]}


def _zero_ffn(hidden: int, *, of_experts: bool = False) -> dict[str, list[Source]]:
    """An FFN of width 32; or a mixture of one expert, and of one that is shared, of this width."""
    shapes: dict[str, tuple[int, ...]] = {"mlp.gate": (1, hidden)} if of_experts else {}  # the router
    for sort, number in (("experts.", (1,)), ("shared_expert.", ())) if of_experts else (("", ()),):
        shapes |= dict.fromkeys((f"mlp.{sort}gate_proj", f"mlp.{sort}up_proj"), (*number, _ZERO_WIDTH, hidden))
        shapes[f"mlp.{sort}down_proj"] = (*number, hidden, _ZERO_WIDTH)
    return _zeros("post_attention_layernorm", hidden, shapes)
