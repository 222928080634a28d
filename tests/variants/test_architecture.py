"""The decision as a file: one line a layer, back again, and what is wrong with it in one line."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import pico_puzzle, random_tokens
from tests.variants.test_variants import ATTENTION, FFN

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleForCausalLM
from puzzle.variants import Architecture, BlockVariant

BLOCKS = ("none+w16", "kv1+none", "linear+linear", "kv4+w48", "none+none")
OTHER = Architecture.parse(["kv2+w16", "none+w48"])


def test_a_person_can_read_it() -> None:
    assert Architecture.parse(["kv2+w512", "none+linear"]).to_json() == (
        "{\n"
        '  "blocks": [\n'
        '    {"layer": 0, "attention": "kv2", "ffn": "w512"},\n'
        '    {"layer": 1, "attention": "none", "ffn": "linear"}\n'
        "  ]\n"
        "}\n"
    )


@given(st.lists(st.builds(BlockVariant, ATTENTION, FFN), min_size=1, max_size=12), st.randoms())
def test_the_round_trip(blocks: list[BlockVariant], random: st.random_module) -> None:
    """Also with the rows in another order."""
    found = Architecture(tuple(blocks))
    assert Architecture.from_json(found.to_json()) == found
    rows = json.loads(found.to_json())["blocks"]
    random.shuffle(rows)
    assert Architecture.from_json(json.dumps({"blocks": rows})) == found


GOOD = {"layer": 0, "attention": "kv2", "ffn": "w512"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((wrong, "architecture: not of the form") for wrong in ("", "{", "[]", {}, {"blocks": 3})),
        ({"blocks": {"0": GOOD}}, "architecture: not of the form"),
        ({"blocks": ["kv2+w512"]}, "architecture: not of the form"),
        ({"blocks": [{"attention": "kv2", "ffn": "w512"}]}, "architecture: not of the form"),
        ({"blocks": []}, "architecture: layers must be numbered from 0, each once; found "),
        ({"blocks": [GOOD, GOOD]}, "architecture: layers must be numbered from 0, each once; found 0, 0"),
        ({"blocks": [GOOD | {"layer": "0"}]}, "architecture: layers must be numbered from 0"),
        ({"blocks": [GOOD, {"layer": 1, "ffn": "w8"}]}, "architecture: layer 1 lacks 'attention'"),
        ({"blocks": [GOOD, GOOD | {"layer": 1, "ffn": "x9"}]}, "architecture: layer 1: ffn variant 'x9' is unknown"),
        ({"blocks": [GOOD | {"attention": None}]}, "architecture: layer 0: attention variant 'None' is unknown"),
    ],
    ids=str,
)
def test_a_file_that_is_wrong(content: object, message: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    with pytest.raises(PuzzleError) as caught:
        Architecture.from_json(text)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_a_configuration_with_other_blocks_is_the_parents_otherwise() -> None:
    """From a parent whose layers differ, with everything but the blocks carried over."""
    rope = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
    parent = pico_puzzle(*BLOCKS, rope_parameters=rope, attention_bias=True).config
    parent._attn_implementation = "eager"
    config = OTHER.configure(parent)
    assert Architecture.of(config) == OTHER
    assert config.num_hidden_layers == 1
    assert config._attn_implementation == "eager"
    changed = {"blocks", "num_hidden_layers", "per_layer_config"}
    before, after = parent.to_dict(), config.to_dict()
    assert {name for name in before if before[name] != after.get(name)} <= changed
    assert Architecture.of(parent) == Architecture.parse(BLOCKS)
    PuzzleForCausalLM(config)(random_tokens(2, 5))
    back = Architecture.parse(BLOCKS).configure(config)
    assert back.to_dict() == before


def test_kv_heads_that_the_attention_heads_cannot_share() -> None:
    wrong = Architecture.parse(["kv4+w48", "kv3+w48"])
    with pytest.raises(PuzzleError, match=r"layer 1 has kv3, which does not divide the parent's 4 attention"):
        wrong.configure(pico_puzzle(*BLOCKS).config)
