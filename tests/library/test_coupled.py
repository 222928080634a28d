"""Coupled BLD: blocks that learn as wholes, and the narrowed space that they are for."""

from typing import Any

import pytest
import torch
from tests.library.test_elastic import layer_pass

from puzzle.data import TokenData
from puzzle.library import Statistics, build_library, narrow_space
from puzzle.library.coupled import CoupledStudent
from puzzle.parents import Parent
from puzzle.runs import Run, read_tensors
from puzzle.variants import BlockVariant, LayerSpace, Space, State, parse_variant

CPU = torch.device("cpu")


def block_student(block: str, power: float = 0.7, **options: Any) -> tuple[CoupledStudent, State]:
    """A student of a block of the tiny layer's own weights, and these weights."""
    config, _, seen = layer_pass(bias=False)
    parsed = BlockVariant.parse(block)
    subblocks = {"attention": parsed.attention.name != "none", "ffn": parsed.ffn.name != "none"}
    state = {
        name: value
        for name, value in seen.layer.state_dict().items()
        if subblocks["attention" if name.startswith(("input_layernorm.", "self_attn.")) else "ffn"]
    }
    return CoupledStudent(0, parsed, config, state, power, CPU, **options), state


def test_the_parents_own_block_has_no_loss() -> None:
    _, _, seen = layer_pass(bias=False)
    student, _ = block_student("kv4+w32")
    assert float(student.losses(seen)["kv4+w32"].detach()) < 1e-12


@pytest.mark.parametrize(("target", "power"), [("contribution", 0.7), ("block", 3.0)])
def test_the_loss_is_that_of_the_blocks_output(target: str, power: float) -> None:
    """Both targets have the same error; they differ in what it is relative to."""
    _, _, seen = layer_pass(bias=False)
    student, _ = block_student("none+w32", power, target=target)
    output_BTD = seen.entered_BTD + seen.layer.ffn_contribution(seen.entered_BTD)
    expected = (output_BTD - seen.left_BTD).square().mean() / power
    torch.testing.assert_close(student.losses(seen)["none+w32"], expected)
    learnt_BTD = student.target(seen) + (seen.entered_BTD if target == "contribution" else 0)
    torch.testing.assert_close(learnt_BTD, seen.left_BTD)


def test_both_halves_are_trained_in_copies() -> None:
    _, _, seen = layer_pass(bias=False)
    student, state = block_student("kv4+w32")
    assert student.parameters().keys() == state.keys()
    kept = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        for value in student.parameters().values():
            value.add_(0.1)
    student.losses(seen)["kv4+w32"].backward()
    assert all(value.grad is not None and value.grad.any() for value in student.parameters().values())
    assert all(torch.equal(state[name], kept[name]) for name in state)
    assert all(torch.equal(value, kept[name] + 0.1) for name, value in student.states()["kv4+w32"].items())


def narrow_layers(space: Space) -> Space:
    """Two attention and two FFN variants in layer 1, the parent's own elsewhere."""
    layers = [LayerSpace(layer.attention[:1], layer.ffn[:1]) for layer in space.layers]
    attention, ffn = space.layers[1].attention[0], space.layers[1].ffn[0]
    layers[1] = LayerSpace(
        (attention, parse_variant("attention", "kv1"), parse_variant("attention", "none")),
        (ffn, parse_variant("ffn", "w16"), parse_variant("ffn", "none")),
    )
    return Space(tuple(layers))


def test_blocks_trained_as_wholes_end_no_worse_and_are_preferred(
    pico_run: Run, pico_parent: Parent, pico_data: TokenData, pico_statistics: Statistics, pico_space: Space
) -> None:
    space = narrow_layers(pico_space)
    subblocks = build_library(pico_run, pico_parent, pico_data, pico_statistics, space)
    library = build_library(pico_run, pico_parent, pico_data, pico_statistics, space, coupled=True)
    rows = [row for row in library.index.rows if row.subblock == "block"]
    # All but the parent's own, and that of nothing at all.
    assert {row.variant for row in rows} == {b.name for b in space.layers[1].blocks()} - {"kv4+w64", "none+none"}
    assert len(rows) == 3 * 3 - 2
    assert all(row.loss <= row.initial_loss for row in rows)
    assert sum(row.loss < row.initial_loss for row in rows) > 4
    block = BlockVariant.parse("kv1+w16")
    row = next(row for row in rows if row.variant == block.name)
    trained, before = library.block_state(1, block), subblocks.block_state(1, block)
    assert trained.keys() == before.keys()
    assert not all(torch.equal(trained[name], before[name]) for name in trained)
    expected = read_tensors(pico_run.path / row.file)
    assert all(torch.equal(trained[name], expected[name]) for name in expected)


SOLUTIONS = [("kv4+w32", "kv4+none"), ("kv2+w32", "kv4+none"), ("kv2+w16", "kv4+w16"), ("none+w8", "kv4+w8")]


def two_layers() -> Space:
    attention = tuple(parse_variant("attention", name) for name in ("kv4", "kv2", "kv1", "none"))
    ffn = tuple(parse_variant("ffn", name) for name in ("w64", "w32", "w16", "w8", "none"))
    return Space((LayerSpace(attention, ffn),) * 2)


@pytest.mark.parametrize(
    ("keep", "first", "second"),
    [
        # Where uses are equal, the first in the space is taken; the parent's own is there, used or not.
        (1, ("kv4 kv2", "w64 w32"), ("kv4", "w64 none")),
        (2, ("kv4 kv2", "w64 w32 w16"), ("kv4 kv2", "w64 w16 none")),
        (3, ("kv4 kv2 none", "w64 w32 w16 w8"), ("kv4 kv2 kv1", "w64 w16 w8 none")),
        (9, ("kv4 kv2 kv1 none", "w64 w32 w16 w8 none"), ("kv4 kv2 kv1 none", "w64 w32 w16 w8 none")),
    ],
)
def test_the_narrowed_space_keeps_what_is_used_most(keep: int, first: tuple[str, str], second: tuple[str, str]) -> None:
    narrowed = narrow_space(two_layers(), SOLUTIONS, keep)
    found = [
        (" ".join(v.name for v in layer.attention), " ".join(v.name for v in layer.ffn)) for layer in narrowed.layers
    ]
    assert found == [first, second]
