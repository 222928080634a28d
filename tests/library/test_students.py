"""What students learn, one subblock or a whole block; and the narrowed space that whole blocks are for."""

from typing import Any

import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens
from torch import nn

from puzzle.library import Student, narrow_space
from puzzle.streams import LayerPass
from puzzle.variants import BlockVariant, LayerSpace, Space, State, parse_variant


@pytest.fixture
def seen() -> LayerPass:
    """One layer of a random model on random tokens."""
    model = pico_puzzle("kv4+w32").requires_grad_(False)
    layer, input_BTD = model.model.layers[0], model.embed(random_tokens(2, 5))
    context = model.model.context(input_BTD)
    attention_BTD = layer.subblock_output("attention", input_BTD, **context)
    middle_BTD = input_BTD + attention_BTD
    ffn_BTD = layer.subblock_output("ffn", middle_BTD, **context)
    inputs_BTD, added_BTD = {"attention": input_BTD, "ffn": middle_BTD}, {"attention": attention_BTD, "ffn": ffn_BTD}
    return LayerPass(0, layer, context, inputs_BTD, added_BTD, middle_BTD + ffn_BTD)


def student(seen: LayerPass, block: str, power: float = 0.7, **options: Any) -> tuple[Student, State]:
    """A student of the layer's own weights, as far as the block has them, and these weights."""
    parsed = BlockVariant.parse(block)
    kept = {"self_attn": not parsed.attention.absent, "mlp": not parsed.ffn.absent}
    kept |= {"input_layernorm": kept["self_attn"], "post_attention_layernorm": kept["mlp"]}
    state = {name: value for name, value in seen.layer.state_dict().items() if kept[name.partition(".")[0]]}
    config = pico_puzzle("kv4+w32").config
    return Student(0, [parsed.attention, parsed.ffn], config, state, power, torch.device("cpu"), **options), state


def test_the_parents_own_block_has_no_loss(seen: LayerPass) -> None:
    assert float(student(seen, "kv4+w32")[0].loss(seen).detach()) < 1e-12


@pytest.mark.parametrize(("loss", "power"), [("subblock", 0.7), ("block", 3.0)])
def test_the_loss_is_that_of_the_blocks_output(seen: LayerPass, loss: str, power: float) -> None:
    """Both kinds have the same error; they differ in what it is relative to."""
    ffn_alone, _ = student(seen, "none+w32", power, loss=loss)
    output_BTD = seen.inputs_BTD["attention"] + seen.layer.subblock_output(
        "ffn", seen.inputs_BTD["attention"], **seen.context
    )
    expected = (output_BTD - seen.output_BTD).square().mean() / power
    torch.testing.assert_close(ffn_alone.loss(seen), expected)
    learnt_BTD = ffn_alone.target(seen) + (seen.inputs_BTD["attention"] if loss == "subblock" else 0)
    torch.testing.assert_close(learnt_BTD, seen.output_BTD)


def test_both_subblocks_are_trained_in_copies(seen: LayerPass) -> None:
    whole, state = student(seen, "kv4+w32")
    assert whole.parameters().keys() == state.keys()
    kept = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        for value in whole.parameters().values():
            value.add_(0.1)
    whole.loss(seen).backward()
    assert all(value.grad is not None and value.grad.any() for value in whole.parameters().values())
    assert all(torch.equal(state[name], kept[name]) for name in state)
    assert all(torch.equal(value, kept[name] + 0.1) for name, value in whole.state().items())


def test_a_subblocks_output_comes_from_its_projection(seen: LayerPass) -> None:
    for which, variant in (("attention", "kv4"), ("ffn", "w32")):
        state = {
            k: v
            for k, v in seen.layer.state_dict().items()
            if k.startswith(("self_attn", "input_l")) == (which[0] == "a")
        }
        config = pico_puzzle("kv4+w32").config
        one = Student(0, [parse_variant(which, variant)], config, state, 1.0, torch.device("cpu"))  # type: ignore[arg-type]
        assert isinstance(one.projection, nn.Linear)
        output_BTD = one.projection(one.projection_input(seen))
        torch.testing.assert_close(output_BTD, seen.added_BTD[which])  # type: ignore[arg-type]


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
