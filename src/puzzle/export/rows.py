"""The layers of a GGUF file: rows of llama.cpp's `deci` that compute what the child's layers compute.

A row of `deci` is a decoder layer, with these gaps (llama.cpp 0c1e570, src/models/deci.cpp):

- the attention of a row without FFN is discarded, and such a row aborts if it is the last;
- head sizes are read from row 0, which must have attention, and some row must have keys and values;
- the bias of a linear attention is not added.

So every row has an FFN, if need be of zeros, which carries that bias too. Rows may be more or fewer than layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from puzzle.export.checkpoint import layers_of, silent
from puzzle.modeling import PuzzleConfig
from puzzle.variants import Subblock

ZERO_WIDTH = 32
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
class FileTensor:
    """A tensor of the file."""

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
    heads = config.num_attention_heads
    zero_ffn = _silent("ffn", f"w{ZERO_WIDTH}", config)

    def row(attention: Tensors, kv_heads: int, ffn: Tensors, width: int) -> Row:
        count = heads if attention else 0
        return Row(head_count=count, head_count_kv=kv_heads, feed_forward_length=width, tensors=attention + ffn)

    rows: list[Row] = []
    for layer in layers_of(config):
        assert layer.attention is not None
        assert layer.ffn is not None
        kv_heads = heads // layer.attention["n_heads_in_group"] if "n_heads_in_group" in layer.attention else 0
        rotated = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}
        attention, ffn = (
            tuple(
                FileTensor(_named(name), tuple(shape), f"model.layers.{layer.index}.{name}", rotated.get(_module(name)))
                for name, shape in variant.shapes(config).items()
            )
            for variant in layer.block.subblocks
        )
        biases = [tensor for tensor in attention if not kv_heads and tensor.name == "attn_output.bias"]
        if biases:
            others = tuple(tensor for tensor in zero_ffn if tensor.name != "ffn_down.bias")
            with_bias = (*others, replace(biases[0], name="ffn_down.bias"))
            rows.append(row(tuple(tensor for tensor in attention if tensor not in biases), 0, with_bias, ZERO_WIDTH))
            if not ffn:
                continue
            attention = ()
        if not attention and not rows:
            zero_linear = _silent("attention", "linear", config)
            attention = tuple(tensor for tensor in zero_linear if tensor.name != "attn_output.bias")
        rows.append(row(attention, kv_heads, ffn or zero_ffn, layer.ffn.get("intermediate_size", ZERO_WIDTH)))
    if not any(row.head_count_kv for row in rows):
        rows.insert(0, row(_silent("attention", "kv1", config), 1, zero_ffn, ZERO_WIDTH))
    return rows


def _silent(subblock: Subblock, name: str, config: PuzzleConfig) -> Tensors:
    tensors = silent(subblock, name, config).items()
    return tuple(FileTensor(_named(name), tuple(tensor.shape), tensor) for name, tensor in tensors)


def _named(name: str) -> str:
    """A tensor's name in its row, from that in its layer."""
    return f"{_NAMES[_module(name)]}.{name.rpartition('.')[2]}"


def _module(name: str) -> str:
    return name.rpartition(".")[0]
