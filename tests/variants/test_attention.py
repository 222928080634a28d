"""Attention variants: windows, names and sizes; how fewer KV heads and the linear map start."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import pico_puzzle
from tests.variants.conftest import moments, pico_parent
from torch import Tensor

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleForCausalLM
from puzzle.variants import ParentSubblock, Start, State, parse_variant, split_state, variant_from_entry
from puzzle.variants.kinds.grouped_query import GroupedQuery
from puzzle.variants.kinds.linear import LinearAttention
from puzzle.variants.kinds.none import NoAttention

IMPORTANCE = Start(kv_heads="importance")
PAPER = Start(method="paper")
SINKS = st.integers(0, 9)
WINDOWS = st.builds(GroupedQuery, st.integers(1, 99), st.integers(2, 10**6), SINKS)


def subblock(
    model: PuzzleForCausalLM, statistics: State | None = None, heads: int = 4, start: Start = PAPER
) -> ParentSubblock:
    """The attention of layer 1."""
    state = split_state(model.model.layers[1].state_dict(), "attention")
    return ParentSubblock(
        config=model.config, variant=GroupedQuery(heads), state=state, statistics=statistics or {}, start=start
    )


def attention_of(heads: int, bias: bool) -> PuzzleForCausalLM:
    return pico_puzzle(*[f"kv{heads}+w48"] * 2, attention_bias=bias).double()


def output(model: PuzzleForCausalLM, variant: GroupedQuery | LinearAttention, state: State, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    hidden_BTD = torch.randn(2, 7, 32, dtype=torch.float64, generator=generator)
    layer = variant.build(model.config, state)
    return layer.subblock_output("attention", hidden_BTD, **model.model.context(hidden_BTD))


@given(WINDOWS)
def test_a_window_from_its_name_and_from_its_entry(variant: GroupedQuery) -> None:
    assert parse_variant("attention", variant.name) == variant
    assert variant_from_entry("attention", variant.entry()) == variant


def test_names_and_entries() -> None:
    names = {"kv2": GroupedQuery(2), "kv2win1024": GroupedQuery(2, 1024), "kv2win1024s4": GroupedQuery(2, 1024, 4)}
    assert {variant.name: variant for variant in names.values()} == names
    assert GroupedQuery(2).entry() == {"kind": "gqa", "num_key_value_heads": 2}
    entry = {"kind": "gqa", "num_key_value_heads": 2, "window": 1024, "sinks": 4}
    assert GroupedQuery(2, 1024, 4).entry() == entry


@pytest.mark.parametrize("name", ["kv2win", "kv2win0", "kv2win1", "kv2win08", "kv2s4", "kv2win8s", "kv2win8s0", "win8"])
def test_a_wrong_name_says_what_is_right(name: str) -> None:
    with pytest.raises(PuzzleError, match=r"kv<number>\[win<number>\[s<number>\]\]"):
        parse_variant("attention", name)


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
        (LinearAttention(), [], ["kv1", "kv1win4"]),
    ],
    ids=str,
)
def test_what_is_smaller_than_a_layers_own(own: GroupedQuery, fitting: list[str], unfitting: list[str]) -> None:
    """The pico parent's longest text has 128 tokens: a window as long as that shrinks nothing."""
    config = pico_parent().config
    names = fitting + unfitting
    assert [name for name in names if parse_variant("attention", name).fits(own, config)] == fitting


def test_a_window_starts_from_the_parents_weights() -> None:
    model = pico_parent()
    parent = subblock(model)
    for heads in (4, 2):
        full, window = GroupedQuery(heads).initialise(parent), GroupedQuery(heads, 4, 1).initialise(parent)
        assert all(torch.equal(window[name], full[name]) for name in full)
        # Below the window's length nothing has changed; beyond it something has.
        same = (output(model, GroupedQuery(heads), full) == output(model, GroupedQuery(heads, 4, 1), window)).all(-1)
        assert same[0].tolist() == [True] * 5 + [False] * 2


def test_what_is_wider_has_the_same_window() -> None:
    model = pico_parent()
    narrow = GroupedQuery(2, 4, 1)
    state = narrow.initialise(subblock(model))
    widened = narrow.widen(state, GroupedQuery(4, 4, 1), model.config)
    assert widened is not None
    torch.testing.assert_close(output(model, GroupedQuery(4, 4, 1), widened), output(model, narrow, state))
    assert narrow.widen(state, GroupedQuery(4), model.config) is None
    assert narrow.widen(state, GroupedQuery(4, 4), model.config) is None


def pruned(parent: ParentSubblock, heads: int, gone: list[int]) -> State:
    """The parent with these KV groups' part of the output taken away, and all else as it is."""
    state = dict(parent.state)
    columns = state["self_attn.o_proj.weight"].clone().unflatten(1, (heads, -1))
    columns[:, gone] = 0
    return state | {"self_attn.o_proj.weight": columns.flatten(1)}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("own", "contribution", "kept"),
    [
        (4, [0.3, 0.9, 0.1, 0.5], {4: [0, 1, 2, 3], 2: [1, 3], 1: [1]}),
        (4, [0.3, 0.2, 0.9, 0.1], {2: [0, 2], 1: [2]}),
        (2, [0.3, 0.9], {1: [1]}),  # two query heads each
        (4, [0.5, 0.5, 0.5, 0.5], {2: [0, 1]}),
    ],
)
def test_the_most_important_groups_stay_and_the_others_are_pruned(
    own: int, contribution: list[float], kept: dict[int, list[int]], bias: bool
) -> None:
    model = attention_of(own, bias)
    parent = subblock(model, {"group_contribution": torch.tensor(contribution)}, own, IMPORTANCE)
    before = {name: tensor.clone() for name, tensor in parent.state.items()}
    for heads, groups in kept.items():
        start = GroupedQuery(heads).initialise(parent)
        gone = [group for group in range(own) if group not in groups]
        expected_BTD = output(model, GroupedQuery(own), pruned(parent, own, gone))
        torch.testing.assert_close(output(model, GroupedQuery(heads), start), expected_BTD)
        for name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight"):
            rows = parent.state[name].unflatten(0, (own, -1))[groups].flatten(0, 1)
            assert torch.equal(start[name], rows)
        assert {name: tensor.shape for name, tensor in start.items() if ".q_proj." in name or ".o_proj." in name} == {
            name: tensor.shape for name, tensor in before.items() if ".q_proj." in name or ".o_proj." in name
        }
    assert all(torch.equal(parent.state[name], before[name]) for name in before)


def test_spare_query_heads_are_silent_and_can_wake() -> None:
    """They are there, of other queries than the leading ones, and their part of the output gets a gradient."""
    model = pico_parent()
    parent = subblock(model, {"group_contribution": torch.tensor([0.3, 0.9, 0.1, 0.5])}, start=IMPORTANCE)
    start = GroupedQuery(2).initialise(parent)
    queries, own = (state["self_attn.q_proj.weight"].unflatten(0, (4, -1)) for state in (start, parent.state))
    assert all(torch.equal(queries[i], own[head]) for i, head in enumerate([1, 0, 3, 2]))
    silent = start["self_attn.o_proj.weight"].unflatten(1, (4, -1)).abs().amax((0, 2)) == 0
    assert silent.tolist() == [False, True, False, True]
    layer = GroupedQuery(2).build(model.config, start)
    hidden_BTD = torch.randn(2, 7, 32, dtype=torch.float64)
    layer.subblock_output("attention", hidden_BTD, **model.model.context(hidden_BTD)).square().sum().backward()
    gradient = layer.self_attn.o_proj.weight.grad.unflatten(1, (4, -1))
    assert (gradient.abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("heads", [4, 2])
def test_the_papers_linear_map_is_attention_to_itself(heads: int, bias: bool) -> None:
    """A sequence of one token has nothing else to attend to."""
    model = attention_of(heads, bias)
    parent = subblock(model, heads=heads)
    start = LinearAttention().initialise(parent)
    hidden_BTD = torch.randn(3, 1, 32, dtype=torch.float64)
    context = model.model.context(hidden_BTD)
    linear = LinearAttention().build(model.config, start)
    expected_BTD = model.model.layers[1].subblock_output("attention", hidden_BTD, **context)
    torch.testing.assert_close(linear.subblock_output("attention", hidden_BTD, **context), expected_BTD)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("start", [PAPER, Start()], ids=["paper", "closed form"])
def test_the_expected_loss_is_that_on_the_calibration_text(start: Start, bias: bool) -> None:
    model = pico_parent(attention_bias=bias)
    layer = model.model.layers[1]
    hidden_BTD = torch.randn(4, 30, 32, dtype=torch.float64) + 0.3
    with torch.no_grad():
        wanted_BTD = layer.subblock_output("attention", hidden_BTD, **model.model.context(hidden_BTD))
        normed_ND = layer.input_layernorm(hidden_BTD).flatten(0, 1)
        statistics = moments(normed_ND, wanted_BTD.flatten(0, 1)) | {"output_power": wanted_BTD.square().mean()}
        parent = replace(subblock(model, statistics), start=start)
        state = LinearAttention().initialise(parent)
        found_BTD = LinearAttention().build(model.config, state).subblock_output("attention", hidden_BTD)
        error = float((found_BTD - wanted_BTD).square().sum() / wanted_BTD.square().sum())
    assert LinearAttention().expected_loss(parent, state) == pytest.approx(error, rel=1e-9)
    assert NoAttention().expected_loss(parent, {}) == 1.0
    assert GroupedQuery(4).expected_loss(parent, parent.state) == 0.0
    assert GroupedQuery(2).expected_loss(parent, parent.state) is None


def test_dtypes_are_the_parents() -> None:
    model = pico_parent().to(torch.bfloat16)
    parent = subblock(model, {"group_contribution": torch.tensor([0.3, 0.9, 0.1, 0.5])}, start=IMPORTANCE)
    starts = [GroupedQuery(2, 8).initialise(parent), LinearAttention().initialise(replace(parent, start=PAPER))]
    assert {tensor.dtype for start in starts for tensor in start.values()} == {torch.bfloat16}
