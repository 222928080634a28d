"""The configuration: what engines size their caches by, and its way to JSON and back."""

from pathlib import Path

import pytest
from tests.conftest import pico_puzzle
from transformers import DynamicCache

from puzzle.modeling import PuzzleConfig
from puzzle.variants import Architecture


def windows(config: PuzzleConfig) -> list[int | None]:
    return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]


def test_caches_are_numbered_by_the_layers_that_have_one(tmp_path: Path) -> None:
    """Through config.json, and once more from what was read."""
    config = pico_puzzle("none+w16", "kv1+none", "linear+linear", "kv4+w48", "kv2+w16", "none+none").config
    heads = {"0": {"num_key_value_heads": 1}, "2": {"num_key_value_heads": 2}}
    for _ in range(3):
        assert (config.num_layers, len(config.blocks), config.num_hidden_layers) == (6, 6, 3)
        assert [layer.num_key_value_heads for layer in config.per_layer_config] == [1, 4, 2]
        assert config.to_dict()["per_layer_config"] == heads
        assert windows(config) == [None] * 3
        config.save_pretrained(tmp_path)
        found = PuzzleConfig.from_pretrained(tmp_path)
        assert found.to_diff_dict() | {"dtype": None} == config.to_diff_dict() | {"dtype": None}
        config = found


def test_without_blocks_it_is_homogeneous() -> None:
    config = PuzzleConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2)
    assert Architecture.of(config).names == ("kv4+w48",) * 2
    assert (config.head_dim, config.num_key_value_heads) == (8, 4)
    assert pico_puzzle("none+w48", "linear+none").config.num_hidden_layers == 0


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        # Attention with sinks has no name there: it is full attention, which takes no less memory than it says.
        (("none+w16", "kv1win5+none", "kv4win5s2+w48", "kv2+w16", "kv2win5+w16"), [5, None, None, 5]),
        (("kv4win5+w48", "kv2win7+w16", "kv2+w16"), [5, 7, None]),
    ],
)
def test_windows_in_the_terms_that_engines_read(
    blocks: tuple[str, ...], expected: list[int | None], tmp_path: Path
) -> None:
    config = pico_puzzle(*blocks).config
    for _ in range(2):
        assert config.layer_types == [f"{'sliding' if window else 'full'}_attention" for window in expected]
        assert config.to_dict()["sliding_window"] == 5
        assert windows(config) == expected
        config.save_pretrained(tmp_path)
        config = PuzzleConfig.from_pretrained(tmp_path)
    without = Architecture.parse(["kv4+w48", "kv2+w16"]).configure(config)
    assert not {"layer_types", "sliding_window"} & without.to_dict().keys()
    assert windows(without) == [None, None]
