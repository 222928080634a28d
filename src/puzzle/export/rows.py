"""The row compiler: a stack of any subblocks as rows of llama.cpp's `deci`, which computes the same.

A row of `deci` is a decoder layer, but for this (llama.cpp 0c1e570, src/models/deci.cpp):

- the attention of a row without FFN is discarded, and such a row aborts if it is the last;
- no tensors describe a linear map in place of the FFN;
- head sizes are read only if row 0 has attention, and no context can be made if no row has keys and values;
- a linear attention's bias is not added.

So every row is written with an FFN, if need be of zeros; a linear FFN is the linear attention of the next row; and its
bias is that of a zero FFN's last projection. There may be more or fewer rows than layers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from puzzle.modeling import PuzzleConfig

ZERO_WIDTH = 32
"""Of an FFN of zeros: the smallest that every quantised type can hold."""
UNIT_GATE = 1.278464542761074
"""silu(UNIT_GATE) = 1."""


@dataclass(frozen=True)
class RowTensor:
    """A tensor of a row: one of the checkpoint's, or filled."""

    name: str
    """In its row, such as `attn_q.weight`."""
    shape: tuple[int, ...]
    source: str | None = None
    fill: float = 0.0
    rope_heads: int | None = None
    """Rows are re-ordered in so many heads: llama.cpp rotates neighbours, Hugging Face subblocks of a head."""

    def value(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor, from a function that reads one of the checkpoint."""
        if self.source is None:
            return torch.full(self.shape, self.fill)
        tensor = read(self.source)
        assert tensor.shape == self.shape, f"{self.source} has shape {tuple(tensor.shape)}, not {self.shape}"
        if self.rope_heads is None:
            return tensor
        return tensor.unflatten(0, (self.rope_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A layer of the file."""

    head_count: int
    """0: no attention."""
    head_count_kv: int
    """0 with heads: linear attention."""
    feed_forward_length: int
    tensors: tuple[RowTensor, ...]


@dataclass(frozen=True)
class _Attention:
    head_count: int
    head_count_kv: int
    tensors: tuple[RowTensor, ...]
    bias: str | None = None
    """Of a linear map; it cannot be held by the row's attention."""


@dataclass(frozen=True)
class _FFN:
    width: int
    tensors: tuple[RowTensor, ...]


def compile_rows(config: PuzzleConfig) -> list[Row]:
    """The rows that compute what the layers of `config.blocks` compute, for every mixture of the kinds in them."""
    rows: list[Row] = []
    open_attention: _Attention | None = None
    for subblock in _subblocks(config):
        if isinstance(subblock, _FFN):
            rows.append(_row(open_attention or (None if rows else _zero_attention(config)), subblock))
            open_attention = None
            continue
        if open_attention is not None:
            rows.append(_row(open_attention, _zero_ffn(config)))
        open_attention = subblock
        if subblock.bias is not None:
            rows.append(_row(subblock, _zero_ffn(config, subblock.bias)))
            open_attention = None
    if open_attention is not None or not rows:
        rows.append(_row(open_attention or _zero_attention(config), _zero_ffn(config)))
    if not any(row.head_count_kv for row in rows):
        rows.insert(0, _row(_zero_grouped_query(config), _zero_ffn(config)))
    return rows


def _row(attention: _Attention | None, ffn: _FFN) -> Row:
    attention = attention or _Attention(0, 0, ())
    return Row(
        head_count=attention.head_count,
        head_count_kv=attention.head_count_kv,
        feed_forward_length=ffn.width,
        tensors=attention.tensors + ffn.tensors,
    )


def _subblocks(config: PuzzleConfig) -> Iterator[_Attention | _FFN]:
    """What the layers do, one after another; what is `none` is not there."""
    for layer, block in enumerate(config.blocks or []):
        name = f"model.layers.{layer}."
        attention, ffn = block["attention"], block["ffn"]
        match attention["kind"]:
            case "gqa":
                yield _grouped_query(config, name, attention)
            case "linear":
                norm = f"{name}input_layernorm.weight"
                yield _linear(config, norm, f"{name}self_attn.linear_attn", bias=config.attention_bias)
        match ffn["kind"]:
            case "gated":
                yield _gated(config, name, ffn["intermediate_size"])
            case "low_rank":
                yield _low_rank(config, name, ffn["rank"])
            case "linear":
                norm = f"{name}post_attention_layernorm.weight"
                yield _linear(config, norm, f"{name}mlp.linear_mlp", bias=config.mlp_bias)


def _grouped_query(config: PuzzleConfig, layer: str, entry: dict[str, Any]) -> _Attention:
    assert config.head_dim is not None
    assert not entry.get("window"), "llama.cpp's deci has no windows"
    heads, kv_heads, hidden = config.num_attention_heads, entry["num_key_value_heads"], config.hidden_size
    inner, kv_inner = heads * config.head_dim, kv_heads * config.head_dim
    tensors = [RowTensor("attn_norm.weight", (hidden,), f"{layer}input_layernorm.weight")]
    projections = [
        ("attn_q", "q_proj", (inner, hidden), heads),
        ("attn_k", "k_proj", (kv_inner, hidden), kv_heads),
        ("attn_v", "v_proj", (kv_inner, hidden), None),
        ("attn_output", "o_proj", (hidden, inner), None),
    ]
    for name, projection, shape, rope_heads in projections:
        source = f"{layer}self_attn.{projection}"
        tensors.append(RowTensor(f"{name}.weight", shape, f"{source}.weight", rope_heads=rope_heads))
        if config.attention_bias:
            tensors.append(RowTensor(f"{name}.bias", shape[:1], f"{source}.bias", rope_heads=rope_heads))
    return _Attention(heads, kv_heads, tuple(tensors))


def _linear(config: PuzzleConfig, norm: str, linear: str, *, bias: bool) -> _Attention:
    hidden = config.hidden_size
    tensors = (
        RowTensor("attn_norm.weight", (hidden,), norm),
        RowTensor("attn_output.weight", (hidden, hidden), f"{linear}.weight"),
    )
    return _Attention(config.num_attention_heads, 0, tensors, f"{linear}.bias" if bias else None)


def _zero_attention(config: PuzzleConfig) -> _Attention:
    hidden = config.hidden_size
    tensors = (RowTensor("attn_norm.weight", (hidden,), fill=1.0), RowTensor("attn_output.weight", (hidden, hidden)))
    return _Attention(config.num_attention_heads, 0, tensors)


def _zero_grouped_query(config: PuzzleConfig) -> _Attention:
    """A single KV head that adds nothing."""
    assert config.head_dim is not None
    hidden, inner = config.hidden_size, config.num_attention_heads * config.head_dim
    tensors = (
        RowTensor("attn_norm.weight", (hidden,), fill=1.0),
        RowTensor("attn_q.weight", (inner, hidden)),
        RowTensor("attn_k.weight", (config.head_dim, hidden)),
        RowTensor("attn_v.weight", (config.head_dim, hidden)),
        RowTensor("attn_output.weight", (hidden, inner)),
    )
    return _Attention(config.num_attention_heads, 1, tensors)


def _gated(config: PuzzleConfig, layer: str, width: int) -> _FFN:
    hidden = config.hidden_size
    tensors = [RowTensor("ffn_norm.weight", (hidden,), f"{layer}post_attention_layernorm.weight")]
    for part, shape in (("gate", (width, hidden)), ("up", (width, hidden)), ("down", (hidden, width))):
        tensors.append(RowTensor(f"ffn_{part}.weight", shape, f"{layer}mlp.{part}_proj.weight"))
        if config.mlp_bias:
            tensors.append(RowTensor(f"ffn_{part}.bias", shape[:1], f"{layer}mlp.{part}_proj.bias"))
    return _FFN(width, tuple(tensors))


def _low_rank(config: PuzzleConfig, layer: str, rank: int) -> _FFN:
    """Gated by ones: zero weights, and a bias whose silu is 1."""
    hidden = config.hidden_size
    tensors = [
        RowTensor("ffn_norm.weight", (hidden,), f"{layer}post_attention_layernorm.weight"),
        RowTensor("ffn_gate.weight", (rank, hidden)),
        RowTensor("ffn_gate.bias", (rank,), fill=UNIT_GATE),
        RowTensor("ffn_up.weight", (rank, hidden), f"{layer}mlp.reduce_proj.weight"),
        RowTensor("ffn_down.weight", (hidden, rank), f"{layer}mlp.expand_proj.weight"),
    ]
    if config.mlp_bias:
        tensors.append(RowTensor("ffn_down.bias", (hidden,), f"{layer}mlp.expand_proj.bias"))
    return _FFN(rank, tuple(tensors))


def _zero_ffn(config: PuzzleConfig, bias: str | None = None) -> _FFN:
    """Adds nothing, or only this bias."""
    hidden = config.hidden_size
    tensors = [
        RowTensor("ffn_norm.weight", (hidden,), fill=1.0),
        RowTensor("ffn_gate.weight", (ZERO_WIDTH, hidden)),
        RowTensor("ffn_up.weight", (ZERO_WIDTH, hidden)),
        RowTensor("ffn_down.weight", (hidden, ZERO_WIDTH)),
    ]
    if bias is not None:
        tensors.append(RowTensor("ffn_down.bias", (hidden,), bias))
    return _FFN(ZERO_WIDTH, tuple(tensors))
