"""What BLD trains on, and that variants neither share weights nor disturb each other."""

import dataclasses

import torch

from puzzle.blocks import GatedFFN, GroupedQuery, LayerSpace, Space
from puzzle.data import TokenData
from puzzle.library import Library, Statistics, build_library
from puzzle.parents import Parent
from puzzle.runs import Run


def test_the_library_gives_the_parents_own_weights_for_its_own_variants(
    pico_parent: Parent, pico_library: Library
) -> None:
    block = pico_parent.architecture.blocks[1]
    state = pico_library.block_state(1, block)
    expected = pico_parent.layer_state(1)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_variants_have_their_own_sizes(pico_library: Library) -> None:
    narrow = pico_library.state(0, GatedFFN(16))
    assert narrow["mlp.gate_proj.weight"].shape == (16, 32)
    assert narrow["mlp.down_proj.weight"].shape == (32, 16)
    assert pico_library.state(0, GroupedQuery(2))["self_attn.k_proj.weight"].shape == (2 * 12, 32)


def test_a_variant_trains_to_the_same_weights_alone_and_among_others(
    pico_run: Run,
    pico_parent: Parent,
    pico_data: TokenData,
    pico_statistics: Statistics,
    pico_space: Space,
    pico_library: Library,
) -> None:
    alone = Space(
        tuple(
            LayerSpace(layer.attention[:2] if i == 2 else layer.attention[:1], layer.ffn[:1])
            for i, layer in enumerate(pico_space.layers)
        )
    )
    library = build_library(pico_run, pico_parent, pico_data, pico_statistics, alone)
    assert [row.variant for row in library.index.rows] == ["kv2"]
    found, expected = library.state(2, GroupedQuery(2)), pico_library.state(2, GroupedQuery(2))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_tokens_give_another_library(
    pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_statistics: Statistics, pico_space: Space
) -> None:
    settings = pico_run.recipe.library.model_copy(update={"tokens": 256})
    recipe = pico_run.recipe.model_copy(update={"library": settings})
    other = dataclasses.replace(pico_run, recipe=recipe)
    layers = tuple(LayerSpace(layer.attention[:2], layer.ffn[:1]) for layer in pico_space.layers)
    first = build_library(pico_run, pico_parent, pico_data, pico_statistics, Space(layers))
    second = build_library(other, pico_parent, pico_data, pico_statistics, Space(layers))
    assert first.address != second.address
    assert first.index.row(0, "attention", "kv2").loss < second.index.row(0, "attention", "kv2").loss
