"""The space that a model's own sizes give, sizes from a recipe that do not fit, and architectures."""

import pytest
import torch
from tests.conftest import pico_puzzle, random_tokens

from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.variants import Architecture, derive_space, parse_variant

BLOCKS = ("none+w16", "kv1+none", "linear+linear", "kv4+w48", "none+none")
OTHER = Architecture.parse(["kv2+w16", "none+w48"])


def config(heads: int = 8, kv_heads: int = 8, width: int = 512, layers: int = 2) -> PuzzleConfig:
    return PuzzleConfig(
        hidden_size=16 * heads,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=width,
        num_hidden_layers=layers,
    )


def names(config: PuzzleConfig, layer: int = 0, **sizes: object) -> tuple[list[str], list[str]]:
    space = derive_space(config, **sizes).layers[layer]
    return [variant.name for variant in space.attention], [variant.name for variant in space.ffn]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "expected"),
    [
        (8, 8, ["kv8", "kv4", "kv2", "kv1"]),
        (8, 2, ["kv2", "kv1"]),
        (8, 1, ["kv1"]),
        (6, 6, ["kv6", "kv3", "kv1"]),
        (15, 15, ["kv15", "kv5", "kv1"]),
        (14, 7, ["kv7", "kv1"]),
        (40, 10, ["kv10", "kv5", "kv1"]),
    ],
)
def test_kv_heads(heads: int, kv_heads: int, expected: list[str]) -> None:
    assert names(config(heads, kv_heads))[0] == [*expected, "linear", "none"]


@pytest.mark.parametrize(
    ("width", "expected"),
    [
        (14336, [12544, 10752, 7168, 3584, 2816, 1536]),  # Llama 3 8B, in steps of 256
        (512, [448, 384, 256, 128, 96, 64]),
        (50, [44, 38, 24, 12, 10, 4]),
        (3, [2, 1]),
        (1, []),
    ],
)
def test_ffn_widths(width: int, expected: list[int]) -> None:
    assert names(config(width=width))[1] == [f"w{width}", *(f"w{size}" for size in expected), "linear", "none"]


def test_given_sizes_and_kinds() -> None:
    found = names(config(), kv_heads=[2, 4, 2, 8], ffn_widths=[100, 512, 300], attention=["none"], ffn=[])
    assert found == (["kv8", "kv4", "kv2", "none"], ["w512", "w300", "w100"])
    assert names(config(), kv_heads=[], ffn_widths=[], attention=[]) == (["kv8"], ["w512", "linear", "none"])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"kv_heads": [4, 3]}, r"kv_heads: 3 is no smaller form of what the parent has \(kv8\); use smaller sizes"),
        ({"kv_heads": [16]}, r"kv_heads: 16 is no"),
        ({"ffn_widths": [256, 513]}, r"ffn_widths: 513 is no smaller form of what the parent has \(w512\); use"),
        ({"attention": ["mamba"]}, r"attention: attention variant 'mamba' is unknown; use kv<"),
        (
            {"ffn": ["linear", "moe"]},
            r"ffn: ffn variant 'moe' is unknown; use experts, w<number>, linear, rank<number>, none",
        ),
        ({"ffn": ["rank64"]}, r"ffn: rank64 is no smaller form of what the parent has \(w512\); use smaller sizes"),
        ({"attention": ["kv3"]}, r"attention: kv3 is no smaller form of what the parent has \(kv8\)"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(sizes: dict[str, object], message: str) -> None:
    with pytest.raises(PuzzleError, match=rf"space\.{message}"):
        derive_space(config(), **sizes)


def test_layers_that_differ_get_what_is_below_their_own() -> None:
    parent = pico_puzzle("kv4+w48", "kv2+w16", "linear+linear", "none+none").config
    assert names(parent, 0) == (
        ["kv4", "kv2", "kv1", "linear", "none"],
        ["w48", "w42", "w36", "w24", "w12", "w10", "w4", "linear", "none"],
    )
    assert names(parent, 1, ffn_widths=[24, 8]) == (["kv2", "kv1", "linear", "none"], ["w16", "w8", "linear", "none"])
    assert names(parent, 2) == (["linear", "none"], ["linear", "none"])
    assert derive_space(parent).num_architectures == 5 * 9 * 4 * len(names(parent, 1)[1]) * 2 * 2
    assert names(parent, 3) == (["none"], ["none"])
    assert names(parent, 1, kv_heads=[4])[0] == ["kv2", "linear", "none"]
    with pytest.raises(PuzzleError, match=r"space\.kv_heads: 3 is no smaller form of what the parent has \(kv4, kv2\)"):
        derive_space(parent, kv_heads=[3])


def test_variants_by_name_go_into_the_layers_they_fit() -> None:
    """Sizes come first, then what is named, in that order; each once, and none that is the layer's own or larger."""
    parent = pico_puzzle("kv4+w48", "kv2+w4", "linear+linear", "none+rank5", "none+none").config
    attention, ffn = ["none", "kv2", "kv1", "linear"], ["w8", "rank9", "rank3", "none", "linear"]
    given = {"kv_heads": [2], "ffn_widths": [24], "attention": attention, "ffn": ffn}
    assert [names(parent, layer, **given) for layer in range(5)] == [
        (["kv4", "kv2", "none", "kv1", "linear"], ["w48", "w24", "w8", "rank9", "rank3", "none", "linear"]),
        (["kv2", "none", "kv1", "linear"], ["w4", "rank3", "none", "linear"]),
        (["linear", "none"], ["linear", "rank9", "rank3", "none"]),
        (["none"], ["rank5", "rank3", "none"]),
        (["none"], ["none"]),
    ]


def test_a_person_can_read_it() -> None:
    assert Architecture.parse(["kv2+w512", "none+linear"]).to_json() == (
        "{\n"
        '  "blocks": [\n'
        '    {"layer": 0, "attention": "kv2", "ffn": "w512"},\n'
        '    {"layer": 1, "attention": "none", "ffn": "linear"}\n'
        "  ]\n"
        "}\n"
    )


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


def test_what_several_gpus_can_share() -> None:
    """Widths that they divide; KV heads too, or as many of them to each head."""
    names = {
        "attention": ("kv4", "kv2", "kv6", "kv3", "kv2q8", "kv2q6", "none", "linear"),
        "ffn": ("w48", "w50", "none"),
    }
    shared = [
        [name for name in names[which] if parse_variant(which, name).shared_by(4)] for which in ("attention", "ffn")
    ]
    assert shared == [["kv4", "kv2", "kv2q8", "none", "linear"], ["w48", "none"]]
