"""The layers of a GGUF file: rows of llama.cpp's `deci` that compute what the child's layers compute.

A row of `deci` is a decoder layer, with these gaps (llama.cpp 0c1e570, src/models/deci.cpp):

- the attention of a row without FFN is discarded, and such a row aborts if it is the last;
- head sizes are read from row 0, which must have attention, and some row must have keys and values;
- the bias of a linear attention is not added.

So every row has an FFN, if need be of zeros, which carries that bias too. Rows may be more or fewer than layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from puzzle.export.checkpoint import layers_of
from puzzle.modeling import PuzzleConfig, empty_model

ZERO_WIDTH = 32
"""Of an FFN of zeros: the smallest that every quantised type can hold."""
_ATTENTION_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.linear_attn": "attn_output",
}
_FFN_NAMES = {
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file: one of the checkpoint's, or made."""

    name: str
    shape: tuple[int, ...]
    source: str | None = None
    """Its name in the checkpoint."""
    fill: float | Tensor = 0.0
    """Its values, where it has no source."""
    rope_heads: int | None = None
    """Number of heads to reorder: llama.cpp rotates neighbouring channels, Hugging Face the two halves of a head."""

    def value(self, read: Callable[[str], Tensor]) -> Tensor:
        """Its values, from a function that reads a tensor of the checkpoint."""
        if self.source is None:
            return torch.zeros(self.shape) + self.fill
        tensor = read(self.source)
        if self.rope_heads is None:
            return tensor
        return tensor.unflatten(0, (self.rope_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


Tensors = tuple[FileTensor, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A layer of the file; its tensors' names lack the prefix `blk.N.`."""

    head_count: int
    """0: no attention."""
    head_count_kv: int
    """0 with heads: linear attention."""
    feed_forward_length: int
    tensors: Tensors


def compile_rows(config: PuzzleConfig) -> list[Row]:
    """The rows that compute what the layers of the model compute."""
    shapes = {name: tuple(parameter.shape) for name, parameter in empty_model(config).named_parameters()}
    heads = config.num_attention_heads
    rows: list[Row] = []

    def add(kv_heads: int, attention: Tensors, width: int, ffn: Tensors) -> None:
        count = heads if attention else 0
        rows.append(Row(head_count=count, head_count_kv=kv_heads, feed_forward_length=width, tensors=attention + ffn))

    for layer in layers_of(config):
        assert layer.attention is not None
        assert layer.ffn is not None
        prefix = f"model.layers.{layer.index}."
        kv_heads = heads // layer.attention["n_heads_in_group"] if "n_heads_in_group" in layer.attention else 0
        rotated = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}
        attention = _tensors(shapes, prefix, _ATTENTION_NAMES, rotated)
        ffn = _tensors(shapes, prefix, _FFN_NAMES, {})
        if (bias := f"{prefix}self_attn.linear_attn.bias") in shapes:
            without_bias = tuple(tensor for tensor in attention if tensor.source != bias)
            add(0, without_bias, ZERO_WIDTH, _zero_ffn(config, bias))
            if not ffn:
                continue
            attention = ()
        if not attention and not rows:
            attention = _zero_linear_attention(config)
        add(kv_heads, attention, layer.ffn.get("intermediate_size", ZERO_WIDTH), ffn or _zero_ffn(config))
    if not any(row.head_count_kv for row in rows):
        add(1, _zero_attention(config), ZERO_WIDTH, _zero_ffn(config))
        rows.insert(0, rows.pop())
    return rows


def _tensors(
    shapes: Mapping[str, tuple[int, ...]], prefix: str, names: Mapping[str, str], rotated: Mapping[str, int]
) -> Tensors:
    """A layer's tensors of the modules in `names`, by the names that they have in the file."""
    tensors = []
    for source, shape in shapes.items():
        module, _, parameter = source.removeprefix(prefix).rpartition(".")
        if source.startswith(prefix) and module in names:
            tensors.append(FileTensor(f"{names[module]}.{parameter}", shape, source, rope_heads=rotated.get(module)))
    return tuple(tensors)


def _zero_linear_attention(config: PuzzleConfig) -> Tensors:
    hidden = config.hidden_size
    return (FileTensor("attn_norm.weight", (hidden,), fill=1.0), FileTensor("attn_output.weight", (hidden, hidden)))


def _zero_attention(config: PuzzleConfig) -> Tensors:
    """A single KV head that adds nothing."""
    assert config.head_dim is not None
    hidden, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    return (
        FileTensor("attn_norm.weight", (hidden,), fill=1.0),
        FileTensor("attn_q.weight", (inner, hidden)),
        FileTensor("attn_k.weight", (config.head_dim, hidden)),
        FileTensor("attn_v.weight", (config.head_dim, hidden)),
        FileTensor("attn_output.weight", (hidden, inner)),
    )


def _zero_ffn(config: PuzzleConfig, bias: str | None = None) -> Tensors:
    """Adds nothing, or only this bias of the checkpoint."""
    hidden = config.hidden_size
    tensors = (
        FileTensor("ffn_norm.weight", (hidden,), fill=1.0),
        FileTensor("ffn_gate.weight", (ZERO_WIDTH, hidden)),
        FileTensor("ffn_up.weight", (ZERO_WIDTH, hidden)),
        FileTensor("ffn_down.weight", (hidden, ZERO_WIDTH)),
    )
    return tensors if bias is None else (*tensors, FileTensor("ffn_down.bias", (hidden,), bias))
