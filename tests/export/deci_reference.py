"""What llama.cpp's `deci` computes from the rows of a file, its gaps included (0c1e570, src/models/deci.cpp)."""

import torch
from torch import Tensor
from torch.nn import functional

from puzzle.export.rows import Row
from puzzle.modeling import PuzzleConfig


class RefusedError(Exception):
    """llama.cpp does not load such a file, or aborts."""


def run(rows: list[Row], weights: list[dict[str, Tensor]], config: PuzzleConfig, hidden_TD: Tensor) -> Tensor:
    """The residual stream after all rows, [T, D]; `weights` are each row's tensors by name."""
    if not any(row.head_count_kv for row in rows):
        raise RefusedError("no row has keys and values to cache")
    if rows[0].head_count == 0:
        raise RefusedError("head sizes are read from row 0")
    residual_TD = hidden_TD
    for index, (row, tensors) in enumerate(zip(rows, weights, strict=True)):
        _check_shapes(row, tensors, config)
        current_TD = residual_TD
        if row.head_count > 0:
            normed_TD = _norm(residual_TD, tensors["attn_norm.weight"], config)
            if row.head_count_kv == 0:
                current_TD = normed_TD @ tensors["attn_output.weight"].T  # its bias is never added
            else:
                current_TD = _attention(row, tensors, config, normed_TD)
        if row.feed_forward_length == 0:
            if index == len(rows) - 1:
                raise RefusedError("the last row has no FFN")
            continue  # the bug: what attention computed is not added
        ffn_input_TD = current_TD + residual_TD if row.head_count > 0 else current_TD
        residual_TD = ffn_input_TD + _ffn(tensors, _norm(ffn_input_TD, tensors["ffn_norm.weight"], config))
    return residual_TD


def _attention(row: Row, tensors: dict[str, Tensor], config: PuzzleConfig, normed_TD: Tensor) -> Tensor:
    assert config.head_dim is not None
    tokens = len(normed_TD)

    def heads(name: str, count: int) -> Tensor:
        return _linear(tensors, name, normed_TD).view(tokens, count, config.head_dim).transpose(0, 1)

    query_HTK = _rotate_neighbours(heads("attn_q", row.head_count), config)
    repeats = row.head_count // row.head_count_kv
    key_HTK = _rotate_neighbours(heads("attn_k", row.head_count_kv), config).repeat_interleave(repeats, 0)
    value_HTK = heads("attn_v", row.head_count_kv).repeat_interleave(repeats, 0)
    mixed_HTK = functional.scaled_dot_product_attention(query_HTK, key_HTK, value_HTK, is_causal=True)
    return _linear(tensors, "attn_output", mixed_HTK.transpose(0, 1).flatten(1))


def _ffn(tensors: dict[str, Tensor], normed_TD: Tensor) -> Tensor:
    gate = functional.silu(_linear(tensors, "ffn_gate", normed_TD))
    return _linear(tensors, "ffn_down", gate * _linear(tensors, "ffn_up", normed_TD))


def _linear(tensors: dict[str, Tensor], name: str, inputs: Tensor) -> Tensor:
    return functional.linear(inputs, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"))


def _norm(hidden_TD: Tensor, weight: Tensor, config: PuzzleConfig) -> Tensor:
    return functional.rms_norm(hidden_TD, weight.shape, weight, config.rms_norm_eps)


def _rotate_neighbours(heads_HTK: Tensor, config: PuzzleConfig) -> Tensor:
    """Rotary embeddings on pairs of neighbouring channels, as llama.cpp has them for this architecture."""
    assert config.head_dim is not None
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = (config.rope_parameters or {}).get("rope_theta", 10000.0) ** -exponents
    angles = torch.outer(torch.arange(heads_HTK.shape[1], dtype=torch.float64), frequencies)
    even, odd = heads_HTK[..., 0::2], heads_HTK[..., 1::2]
    rotated = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
    return torch.stack(rotated, dim=-1).flatten(-2)


def _check_shapes(row: Row, tensors: dict[str, Tensor], config: PuzzleConfig) -> None:
    """What the loader asks for, and that nothing else is in the file."""
    hidden, width = config.hidden_size, row.feed_forward_length
    inner, kv_inner = row.head_count * (config.head_dim or 0), row.head_count_kv * (config.head_dim or 0)
    shapes: dict[str, tuple[int, ...]] = {}
    if row.head_count > 0 and row.head_count_kv == 0:
        shapes |= {"attn_norm": (hidden,), "attn_output": (hidden, hidden)}
    elif row.head_count > 0:
        shapes |= {"attn_norm": (hidden,), "attn_q": (inner, hidden), "attn_k": (kv_inner, hidden)}
        shapes |= {"attn_v": (kv_inner, hidden), "attn_output": (hidden, inner)}
    if width > 0:
        shapes |= {"ffn_norm": (hidden,), "ffn_gate": (width, hidden), "ffn_up": (width, hidden)}
        shapes |= {"ffn_down": (hidden, width)}
    assert {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")} == set(shapes)
    for name, tensor in tensors.items():
        part, _, kind = name.partition(".")
        assert tensor.shape == (shapes[part] if kind == "weight" else shapes[part][:1]), name
