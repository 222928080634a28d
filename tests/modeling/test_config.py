"""The configuration: what engines size their caches by, and its way to JSON and back."""

import json
from pathlib import Path

import pytest
from tests.conftest import pico_puzzle
from transformers import DynamicCache

from puzzle.modeling import PuzzleConfig, PuzzleForCausalLM
from puzzle.variants import Architecture

BLOCKS = ("none+w16", "kv1+none", "linear+linear", "kv4+w48", "kv2+w16", "none+none")


@pytest.fixture(scope="module")
def config() -> PuzzleConfig:
    return pico_puzzle(*BLOCKS).config


def test_caches_are_numbered_by_the_layers_that_have_one(config: PuzzleConfig) -> None:
    assert len(config.blocks) == 6
    assert config.num_hidden_layers == 3
    assert config.num_layers == 6
    assert [layer.num_key_value_heads for layer in config.per_layer_config] == [1, 4, 2]
    assert config.to_dict()["per_layer_config"] == {"0": {"num_key_value_heads": 1}, "2": {"num_key_value_heads": 2}}
    assert len(DynamicCache(config=config).layers) == 3


def test_the_round_trip(config: PuzzleConfig, tmp_path: Path) -> None:
    """Through config.json, and once more from what was read."""
    for _ in range(2):
        config.save_pretrained(tmp_path)
        found = PuzzleConfig.from_pretrained(tmp_path)
        assert found.blocks == config.blocks
        assert found.num_hidden_layers == 3
        assert [layer.num_key_value_heads for layer in found.per_layer_config] == [1, 4, 2]
        assert found.to_diff_dict() | {"dtype": None} == config.to_diff_dict() | {"dtype": None}
        config = found
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "puzzle"


def test_without_blocks_it_is_homogeneous() -> None:
    config = PuzzleConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2)
    assert [block.name for block in Architecture.of(config).blocks] == ["kv4+w48"] * 2
    assert config.head_dim == 8
    assert config.num_key_value_heads == 4


def test_no_layer_with_a_cache() -> None:
    config = pico_puzzle("none+w48", "linear+none").config
    assert config.num_hidden_layers == 0
    assert list(config.per_layer_config) == []


@pytest.mark.parametrize("subblock", ["attention", "ffn"])
def test_an_unknown_kind_is_refused(subblock: str) -> None:
    block = {"attention": {"kind": "none"}, "ffn": {"kind": "none"}, subblock: {"kind": "mamba"}}
    config = PuzzleConfig(hidden_size=32, num_attention_heads=4, vocab_size=8, blocks=[block])
    with pytest.raises(ValueError, match=f"blocks: {subblock} kind 'mamba' is unknown"):
        PuzzleForCausalLM(config)


def test_windows_in_the_terms_that_engines_read(tmp_path: Path) -> None:
    """Attention with sinks has no name there: it is full attention, which takes no less memory than it says."""
    config = pico_puzzle("none+w16", "kv1win5+none", "kv4win5s2+w48", "kv2+w16", "kv2win5+w16").config
    kinds = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    for _ in range(2):
        assert config.layer_types == kinds
        assert config.sliding_window == 5
        layers = DynamicCache(config=config).layers
        assert [getattr(layer, "sliding_window", None) for layer in layers] == [5, None, None, 5]
        config.save_pretrained(tmp_path)
        config = PuzzleConfig.from_pretrained(tmp_path)


def test_windows_of_several_lengths(tmp_path: Path) -> None:
    config = pico_puzzle("kv4win5+w48", "kv2win7+w16", "kv2+w16").config
    config.save_pretrained(tmp_path)
    for found in (config, PuzzleConfig.from_pretrained(tmp_path)):
        layers = DynamicCache(config=found).layers
        assert [getattr(layer, "sliding_window", None) for layer in layers] == [5, 7, None]


def test_a_configuration_without_windows_says_nothing_of_them() -> None:
    windowed = pico_puzzle("kv4win5+w48", "kv2win7+w16").config
    config = Architecture.of(pico_puzzle("kv4+w48", "kv2+w16").config).configure(windowed)
    assert not {"layer_types", "sliding_window"} & config.to_dict().keys()
    assert [type(layer).__name__ for layer in DynamicCache(config=config).layers] == ["DynamicLayer"] * 2
