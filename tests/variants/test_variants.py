"""Names, configuration entries, and what a variant weighs."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import pico_llama, pico_puzzle
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

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

ATTENTION = st.one_of(st.builds(GroupedQuery, st.integers(1, 256)), st.sampled_from([LinearAttention(), NoAttention()]))
FFN = st.one_of(
    st.builds(GatedFFN, st.integers(1, 10**6)),
    st.builds(LowRankFFN, st.integers(1, 10**6)),
    st.sampled_from([LinearFFN(), NoFFN()]),
)


@given(st.one_of(ATTENTION, FFN))
def test_a_variant_from_its_name_and_from_its_entry(variant: Variant) -> None:
    assert parse_variant(variant.subblock, variant.name) == variant
    assert variant_from_entry(variant.subblock, variant.entry()) == variant
    assert str(variant) == variant.name


@given(st.builds(BlockVariant, ATTENTION, FFN))
def test_a_block_from_its_name(block: BlockVariant) -> None:
    assert BlockVariant.parse(block.name) == block
    assert (block.subblock("attention"), block.subblock("ffn")) == block.subblocks == (block.attention, block.ffn)
    assert BlockVariant.alone(block.attention) == BlockVariant(block.attention, NoFFN())
    assert BlockVariant.alone(block.ffn) == BlockVariant(NoAttention(), block.ffn)


@given(st.sampled_from(["attention", "ffn"]), st.text(alphabet="kvwins0123456789linearonek+ -", max_size=12))
def test_no_other_name_is_taken(subblock: Subblock, name: str) -> None:
    """What is accepted is written just so."""
    with suppress(PuzzleError):
        assert parse_variant(subblock, name).name == name


@pytest.mark.parametrize("name", ["kv0", "kv", "kv02", "kv2 ", "kv-1", "w8", "gqa", "", "KV2", "kv²"])
def test_a_wrong_name_says_what_is_right(name: str) -> None:
    with pytest.raises(PuzzleError, match=r"attention variant '.*' is unknown; use kv<.*, linear, none"):
        parse_variant("attention", name)


@pytest.mark.parametrize("name", ["w0", "w", "w08", "rank0", "rank", "kv2", "gated", "low_rank", "W8", "rank-1"])
def test_a_wrong_ffn_name_says_what_is_right(name: str) -> None:
    with pytest.raises(PuzzleError, match=r"use w<number>, linear, rank<number>, none"):
        parse_variant("ffn", name)


def test_a_kind_that_nobody_registered() -> None:
    with pytest.raises(PuzzleError, match=r"blocks: ffn kind 'moe' is unknown; use gated, .*, or import the module"):
        variant_from_entry("ffn", {"kind": "moe"})
    config = pico_puzzle("kv4+w48").config
    for subblock in SUBBLOCKS:
        blocks = [{"attention": {"kind": "none"}, "ffn": {"kind": "none"}} | {subblock: {"kind": "moe"}}]
        with pytest.raises(ValueError, match=rf"blocks: {subblock} kind 'moe' is unknown; import the module"):
            PuzzleForCausalLM(PuzzleConfig(**config.to_dict() | {"blocks": blocks}))


def test_a_kind_of_another_class_is_not_replaced() -> None:
    class Mine(LinearFFN):
        kind = "gated"

    with pytest.raises(PuzzleError, match=r"register: ffn kind 'gated' is taken; name yours differently"):
        register(Mine)
    assert REGISTRY["ffn"]["gated"] is GatedFFN


class UsesMore(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        kept = [2 * part for part in hidden_states.unbind()]
        return torch.stack(kept).mul(len(SUBBLOCKS))


class SomeAttention(nn.Module):
    pass


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            UsesMore,
            "UsesMore uses SUBBLOCKS, but a checkpoint carries the class alone; use Any",
        ),
        (SomeAttention, "SomeAttention says Attention in its name"),
        (type("Unwritten", (nn.Module,), {}), "the source of Unwritten is not to be found"),
    ],
)
def test_a_module_that_a_checkpoint_cannot_carry(module: type[nn.Module], message: str) -> None:
    class Mine(LinearFFN):
        kind = "mine"

    Mine.module = module
    with pytest.raises(PuzzleError, match=message):
        register(Mine)
    assert "mine" not in REGISTRY["ffn"]


@pytest.mark.parametrize("name", ["kv2", "kv2-w8", "", "kv2w8"])
def test_a_block_needs_both_subblocks(name: str) -> None:
    with pytest.raises(PuzzleError, match="not of the form attention"):
        BlockVariant.parse(name)


def test_kinds_are_registered_by_their_names() -> None:
    for subblock, kinds in REGISTRY.items():
        assert all(kind.subblock == subblock and kind.kind == name for name, kind in kinds.items())


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
    architecture = Architecture.of(model.config)
    counts = [
        variant.num_params(model.config) for block in architecture.blocks for variant in (block.attention, block.ffn)
    ]
    for layer, block in zip(model.model.layers, architecture.blocks, strict=True):
        state = layer.state_dict()
        for subblock in ("attention", "ffn"):
            expected = sum(tensor.numel() for tensor in split_state(state, subblock).values())
            assert block.subblock(subblock).num_params(model.config) == expected
            assert block.subblock(subblock).weight_bytes(model.config, torch.bfloat16) == 2 * expected
    outer = model.model.embed_tokens.weight.numel() + model.model.norm.weight.numel()
    outer += 0 if model.config.tie_word_embeddings else model.lm_head.weight.numel()
    assert sum(counts) + outer == model.num_parameters()
    llama = pico_llama(**overrides | {"num_key_value_heads": 2})
    assert counts[0] + counts[1] == sum(parameter.numel() for parameter in llama.model.layers[0].parameters())


def test_sizes_are_those_of_the_configuration_not_derived() -> None:
    """Llama 3.2 1B's layer has 60.8 M parameters; with an explicit head size it has others."""
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
    attention, ffn = GroupedQuery(8), GatedFFN(8192)
    config = PuzzleConfig(**sizes, num_hidden_layers=1)
    assert attention.num_params(config) == 2 * 2048 * 2048 + 2 * 512 * 2048 + 2048
    assert ffn.num_params(config) == 3 * 2048 * 8192 + 2048
    config = PuzzleConfig(**sizes, num_hidden_layers=1, head_dim=128)
    assert attention.num_params(config) == 2 * 4096 * 2048 + 2 * 1024 * 2048 + 2048
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, head_dim=128, vocab_size=8))
    expected = sum(parameter.numel() for parameter in llama.model.layers[0].parameters())
    assert attention.num_params(config) + ffn.num_params(config) == expected


def test_a_subblock_shares_the_given_weights_and_allocates_none() -> None:
    model = pico_puzzle("kv4+w48")
    state = split_state(model.model.layers[0].state_dict(), "ffn")
    layer = GatedFFN(48).build(model.config, state)
    assert layer.mlp.down_proj.weight.data_ptr() == state["mlp.down_proj.weight"].data_ptr()
    assert not layer.has("attention")
    assert not layer.training
    assert all(parameter.is_meta for parameter in GatedFFN(48).build(model.config).parameters())


@torch.no_grad()
def test_two_subblocks_are_one_layer() -> None:
    model = pico_puzzle("kv4+w48", "kv2+w16")
    hidden_BTD = torch.randn(2, 5, 32)
    context = model.model.context(hidden_BTD)
    layer = model.model.layers[1]
    attention = GroupedQuery(2).build(model.config, split_state(layer.state_dict(), "attention"))
    ffn = GatedFFN(16).build(model.config, split_state(layer.state_dict(), "ffn"))
    assert torch.equal(ffn(attention(hidden_BTD, **context), **context), layer(hidden_BTD, **context))


def test_a_subblock_asks_for_a_configuration_whose_masks_are_settled() -> None:
    """Without an implementation, attention would run without a causal mask, silently."""
    state = split_state(pico_puzzle("kv4+w48").model.layers[0].state_dict(), "attention")
    config = PuzzleConfig(hidden_size=32, num_attention_heads=4, head_dim=12, num_hidden_layers=1)
    with pytest.raises(AssertionError, match="build a model with this configuration first"):
        GroupedQuery(4).build(config, state)
    PuzzleForCausalLM(config)
    GroupedQuery(4).build(config, state)


@pytest.mark.parametrize("name", ["kv4", "kv2", "kv1win6", "kv2win5s3"])
@pytest.mark.parametrize(("new", "context"), [(1, 1), (1, 20), (4, 20), (20, 20), (5, 7)])
def test_operations_of_attention_are_its_matrices_and_the_keys_each_query_sees(
    name: str, new: int, context: int
) -> None:
    config, variant = pico_puzzle("kv4+w48").config, parse_variant("attention", name)
    held = variant.kv_values(config, 10**6) // variant.kv_values(config, 1)
    pairs = sum(min(query + 1, held) for query in range(context - new, context))
    assert variant.operations(config, new, context) == 2 * variant.num_params(config) * new + 4 * pairs * 4 * 12
    assert variant.kv_bytes(config, context, torch.bfloat16) == 2 * variant.kv_values(config, context)


def test_how_they_are_listed_and_drawn() -> None:
    names = ["kv4", "kv2win8s1", "kv2", "kv1", "none", "linear"]
    variants = sorted((parse_variant("attention", name) for name in names), key=lambda variant: variant.order)
    assert [variant.name for variant in variants] == ["kv4", "kv2", "kv2win8s1", "kv1", "linear", "none"]
    parent = GroupedQuery(4)
    assert [variant.share(parent) for variant in variants] == [1, 0.5, 0.5, 0.25, None, 0]
    assert GatedFFN(12).share(GatedFFN(48)) == 0.25
    descriptions = {variant.description for variant in (*variants, GatedFFN(12), LowRankFFN(3))}
    assert descriptions >= {"2 KV heads, window 8, first 1 kept", "1 KV head", "left out", "width 12", "linear map"}
