"""The rows of a GGUF file compute what the layers compute, under llama.cpp's own rules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import pico_puzzle, random_tokens
from tests.export.deci_reference import RefusedError, run
from torch import Tensor

from puzzle.export.rows import Row, compile_rows
from puzzle.modeling import PuzzleForCausalLM

ATTENTIONS = ("kv4", "kv2", "kv1", "linear", "none")
FFNS = ("w48", "w16", "rank5", "linear", "none")
BLOCKS = st.builds("{}+{}".format, st.sampled_from(ATTENTIONS), st.sampled_from(FFNS))


def weights_of(model: PuzzleForCausalLM, rows: list[Row]) -> list[dict[str, Tensor]]:
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    return [{tensor.name: tensor.value(state.__getitem__).double() for tensor in row.tensors} for row in rows]


@torch.no_grad()
def error_of(model: PuzzleForCausalLM, rows: list[Row]) -> float:
    """Largest difference of the residual stream after all layers and all rows, as a share of its scale."""
    model = model.double()
    hidden_1TD = model.model.embed_tokens(random_tokens(1, 9))
    expected_1TD = hidden_1TD
    for layer in model.model.layers:
        expected_1TD = layer(expected_1TD, **model.model.context(hidden_1TD))
    found_TD = run(rows, weights_of(model, rows), model.config, hidden_1TD[0])
    return float((found_TD - expected_1TD[0]).abs().max() / expected_1TD.abs().max())


@settings(max_examples=60, deadline=None)
@given(blocks=st.lists(BLOCKS, min_size=1, max_size=6), attention_bias=st.booleans(), mlp_bias=st.booleans())
def test_every_mixture_is_exact(blocks: list[str], attention_bias: bool, mlp_bias: bool) -> None:
    model = pico_puzzle(*blocks, attention_bias=attention_bias, mlp_bias=mlp_bias)
    assert error_of(model, compile_rows(model.config)) < 1e-6  # rotary angles are float32 in the model


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_every_block_in_every_position(attention: str, ffn: str, position: int) -> None:
    blocks = ["kv4+w48"] * 3
    blocks[position] = f"{attention}+{ffn}"
    model = pico_puzzle(*blocks)
    assert error_of(model, compile_rows(model.config)) < 1e-6


def test_layers_that_differ_in_sizes_alone_are_rows_as_they_are() -> None:
    rows = compile_rows(pico_puzzle("kv4+w48", "kv2+w16", "none+w16", "linear+w48").config)
    sizes = [(row.head_count, row.head_count_kv, row.feed_forward_length) for row in rows]
    assert sizes == [(4, 4, 48), (4, 2, 16), (0, 0, 16), (4, 0, 48)]


def test_a_linear_ffn_shares_the_row_of_a_next_layer_without_attention() -> None:
    rows = compile_rows(pico_puzzle("kv4+linear", "none+w16").config)
    assert [(row.head_count_kv, row.feed_forward_length) for row in rows] == [(4, 32), (0, 16)]


def test_empty_layers_are_no_rows() -> None:
    rows = compile_rows(pico_puzzle("none+none", "kv4+w48", "none+none").config)
    assert len(rows) == 1


def test_the_reference_has_the_gaps_that_the_rows_avoid() -> None:
    model = pico_puzzle("kv4+w48", "kv2+w16")
    rows = compile_rows(model.config)

    def without_ffn(row: Row) -> Row:
        attention = tuple(tensor for tensor in row.tensors if tensor.name.startswith("attn"))
        return Row(head_count=4, head_count_kv=row.head_count_kv, feed_forward_length=0, tensors=attention)

    discarded = [without_ffn(rows[0]), rows[1]]
    hidden_TD = torch.randn(5, 32, dtype=torch.float64)
    found = run(discarded, weights_of(model, discarded), model.config, hidden_TD)
    alone = run(rows[1:], weights_of(model, rows[1:]), model.config, hidden_TD)
    assert torch.equal(found, alone)  # as if the first row were not there
    aborts = [rows[0], without_ffn(rows[1])]
    with pytest.raises(RefusedError, match="last row"):
        run(aborts, weights_of(model, aborts), model.config, hidden_TD)
