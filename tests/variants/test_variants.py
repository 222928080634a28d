"""Names, configuration entries, what a variant weighs and does, and what is smaller than what."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import pico_llama, pico_puzzle
from torch import Tensor, nn

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.variants import (
    REGISTRY,
    SUBBLOCKS,
    Architecture,
    BlockVariant,
    Subblock,
    Variant,
    parse_variant,
    register,
    split_state,
    variant_from_entry,
)
from puzzle.variants.kinds.gated import GatedFFN
from puzzle.variants.kinds.grouped_query import GroupedQuery
from puzzle.variants.kinds.linear import LinearAttention, LinearFFN, LowRankFFN
from puzzle.variants.kinds.none import NoAttention, NoFFN

SIZES = st.integers(1, 10**6)
ATTENTION = st.one_of(
    st.builds(GroupedQuery, SIZES),
    st.builds(GroupedQuery, SIZES, st.integers(2, 10**6), st.integers(0, 9)),
    st.sampled_from([LinearAttention(), NoAttention()]),
)
FFN = st.one_of(st.builds(GatedFFN, SIZES), st.builds(LowRankFFN, SIZES), st.sampled_from([LinearFFN(), NoFFN()]))


@given(st.builds(BlockVariant, ATTENTION, FFN))
def test_back_from_names_and_entries(block: BlockVariant) -> None:
    assert BlockVariant.parse(block.name) == block
    assert block.subblocks == (block.attention, block.ffn)
    for subblock, variant in zip(SUBBLOCKS, block.subblocks, strict=True):
        assert block.subblock(subblock) == variant
        assert parse_variant(subblock, str(variant)) == variant
        assert variant_from_entry(subblock, variant.entry()) == variant
    assert GroupedQuery(2, 9).entry() == {"kind": "gqa", "num_key_value_heads": 2, "window": 9}


@given(st.sampled_from(["attention", "ffn"]), st.text(alphabet="kvwins0123456789linearonek+ -", max_size=12))
def test_no_other_name_is_taken(subblock: Subblock, name: str) -> None:
    """What is accepted is written just so."""
    with suppress(PuzzleError):
        assert parse_variant(subblock, name).name == name


ATTENTION_FORMS = r"use kv<number>\[q<number>\]\[win<number>\]\[s<number>\], linear, none"
WRONG = ["kv0", "kv", "kv02", "kv2 ", "kv-1", "w8", "gqa", "", "KV2", "kv²", "win8"]
WRONG += ["kv2win", "kv2win0", "kv2win1", "kv2win08", "kv2s4", "kv2win8s", "kv2win8s0"]
FFN_FORMS = "use experts, w<number>, linear, rank<number>, none"


@pytest.mark.parametrize(
    ("subblock", "name", "forms"),
    [("attention", name, ATTENTION_FORMS) for name in WRONG]
    + [("ffn", name, FFN_FORMS) for name in ["w0", "w", "w08", "rank0", "rank", "kv2", "gated", "W8", "rank-1"]],
)
def test_a_wrong_name_says_what_is_right(subblock: Subblock, name: str, forms: str) -> None:
    with pytest.raises(PuzzleError, match=rf"{subblock} variant '.*' is unknown; {forms}"):
        parse_variant(subblock, name)


@pytest.mark.parametrize("name", ["kv2", "kv2-w8", "", "kv2w8"])
def test_a_block_needs_both_subblocks(name: str) -> None:
    with pytest.raises(PuzzleError, match="not of the form attention"):
        BlockVariant.parse(name)


def test_a_kind_that_nobody_registered() -> None:
    with pytest.raises(
        PuzzleError, match=r"blocks: ffn kind 'moe' is unknown; use experts, gated, .*, or import the module"
    ):
        variant_from_entry("ffn", {"kind": "moe"})
    for subblock in SUBBLOCKS:
        blocks = [{"attention": {"kind": "none"}, "ffn": {"kind": "none"}, subblock: {"kind": "moe"}}]
        with pytest.raises(ValueError, match=rf"blocks: {subblock} kind 'moe' is unknown; import the module"):
            PuzzleForCausalLM(PuzzleConfig(hidden_size=32, num_attention_heads=4, vocab_size=8, blocks=blocks))


class UsesMore(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        kept = [2 * part for part in hidden_states.unbind()]
        return torch.stack(kept).mul(len(SUBBLOCKS))


class SomeAttention(nn.Module):
    pass


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("gated", None, "register: ffn kind 'gated' is taken; name yours differently"),
        ("mine", UsesMore, "UsesMore uses SUBBLOCKS, but a checkpoint carries the class alone; use Any"),
        ("mine", SomeAttention, "SomeAttention says Attention in its name"),
        ("mine", type("Unwritten", (nn.Module,), {}), "Unwritten has no source that a checkpoint could carry"),
    ],
)
def test_a_kind_that_cannot_be_registered(name: str, module: type[nn.Module] | None, message: str) -> None:
    before = dict(REGISTRY["ffn"])
    with pytest.raises(PuzzleError, match=message):
        register(type("Mine", (LinearFFN,), {"kind": name, "module": module}))
    assert REGISTRY["ffn"] == before


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"head_dim": None},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 2, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_a_variants_parameters_are_its_modules(overrides: dict[str, object]) -> None:
    """The subblocks of a model and what lies outside its layers are the whole, and a layer is Llama's own."""
    model = pico_puzzle("kv2+w48", "kv1+w5", "linear+linear", "none+rank3", "none+none", **overrides)
    counts = []
    for layer, block in zip(model.model.layers, Architecture.of(model.config).blocks, strict=True):
        for subblock, variant in zip(SUBBLOCKS, block.subblocks, strict=True):
            counts.append(
                sum(tensor.numel() for tensor in split_state(layer.state_dict(), subblock, model.config).values())
            )
            assert variant.num_params(model.config) == counts[-1]
            assert variant.weight_bytes(model.config, torch.bfloat16) == 2 * counts[-1]
    outside = sum(value.numel() for name, value in model.named_parameters() if not name.startswith("model.layers."))
    assert sum(counts) + outside == model.num_parameters()
    llama = pico_llama(**overrides | {"num_key_value_heads": 2})
    assert counts[0] + counts[1] == sum(parameter.numel() for parameter in llama.model.layers[0].parameters())


@torch.no_grad()
def test_two_subblocks_are_one_layer() -> None:
    """Built apart, they share the given weights and allocate none."""
    model = pico_puzzle("kv4+w48", "kv2+w16")
    layer, hidden_BTD = model.model.layers[1], torch.randn(2, 5, 32)
    context = model.model.context(hidden_BTD)
    states = {which: split_state(layer.state_dict(), which, model.config) for which in SUBBLOCKS}
    attention = GroupedQuery(2).build(model.config, states["attention"])
    ffn = GatedFFN(16).build(model.config, states["ffn"])
    assert torch.equal(ffn(attention(hidden_BTD, **context), **context), layer(hidden_BTD, **context))
    assert ffn.mlp.down_proj.weight.data_ptr() == states["ffn"]["mlp.down_proj.weight"].data_ptr()
    assert [*ffn.norm_names] == ["ffn"]
    assert not ffn.training
    assert all(parameter.is_meta for parameter in GatedFFN(48).build(model.config).parameters())


@pytest.mark.parametrize("name", ["kv4", "kv2", "kv1win6", "kv2win5s3"])
@pytest.mark.parametrize(("new", "context"), [(1, 1), (1, 20), (4, 20), (20, 20), (5, 7)])
def test_operations_are_matrices_and_the_keys_each_query_sees(name: str, new: int, context: int) -> None:
    config, variant = PuzzleConfig(hidden_size=32, num_attention_heads=4, head_dim=12), parse_variant("attention", name)
    held = variant.kv_bytes(config, 10**6, torch.bfloat16) // variant.kv_bytes(config, 1, torch.bfloat16)
    pairs = sum(min(query + 1, held) for query in range(context - new, context))
    assert variant.operations(config, new, context) == 2 * variant.num_params(config) * new + 4 * pairs * 4 * 12
    assert variant.kv_bytes(config, context, torch.bfloat16) == 2 * 2 * int(name[2]) * 12 * min(context, held)


@pytest.mark.parametrize(
    ("own", "fitting", "unfitting"),
    [
        (
            GroupedQuery(4),
            ["kv2", "kv1", "kv4win64", "kv1win64s4", "kv4win127"],
            ["kv4", "kv3", "kv8", "kv8win4", "kv3win4", "kv4win128", "kv4win120s8"],
        ),
        (
            GroupedQuery(4, 64, 4),
            ["kv2win64s4", "kv4win32", "kv4win63s4", "kv1win60s7"],
            ["kv4win64s4", "kv2", "kv2win65s4", "kv4win60s8", "kv2win66s2"],
        ),
        (LinearAttention(), ["none"], ["kv1", "kv1win4"]),
    ],
    ids=str,
)
def test_what_is_smaller_than_the_parent_variant(own: Variant, fitting: list[str], unfitting: list[str]) -> None:
    """A window as long as the longest text shrinks nothing."""
    config = PuzzleConfig(hidden_size=32, num_attention_heads=8, max_position_embeddings=128)
    names = fitting + unfitting
    assert [name for name in names if parse_variant("attention", name).fits(own, config)] == fitting
