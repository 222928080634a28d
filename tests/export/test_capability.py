"""What is refused is refused before anything is written, with the layer and the reason."""

from pathlib import Path

import pytest
from tests.conftest import pico_puzzle
from tests.export.conftest import SaveChild

from puzzle.errors import PuzzleError
from puzzle.export import TARGETS, check, convert, deployable, require, supported, table
from puzzle.modeling import PuzzleConfig
from puzzle.variants import (
    GatedFFN,
    GroupedQuery,
    LinearAttention,
    LinearFFN,
    LowRankFFN,
    NoAttention,
    NoFFN,
    derive_space,
)


def config_of(*blocks: str, **overrides: object) -> PuzzleConfig:
    return pico_puzzle(*blocks, **overrides).config


def test_a_model_of_sizes_alone_is_held_by_all_as_it_is() -> None:
    config = config_of("kv4+w256", "kv1+w512", "none+none", head_dim=8)
    assert all(check(config, name) == [] for name in TARGETS)


@pytest.mark.parametrize(
    ("target", "refused"),
    [("hf", []), ("vllm", []), ("gguf", []), ("tensorrt-llm", []), ("mlx-lm", [0]), ("deci", [0, 2])],
)
def test_linear_parts(target: str, refused: list[int]) -> None:
    findings = check(config_of("linear+none", "kv4+w256", "none+linear", head_dim=8), target)
    assert [finding.layer for finding in findings if finding.verdict == "no"] == refused


def test_rules_of_the_first_layer_hold_for_the_first_that_is_not_empty() -> None:
    findings = check(config_of("none+none", "none+w48", "none+w48"), "deci")
    assert [(finding.layer, finding.verdict) for finding in findings] == [(1, "rewrite")]


def test_windows_are_refused_where_the_engine_would_ignore_them() -> None:
    config = config_of("kv4+w48", "kv2+w48")
    assert config.blocks is not None
    config.blocks[1]["attention"] |= {"window": 8, "sinks": 2}
    assert check(config, "hf") == []
    for target in ("vllm", "deci", "gguf"):
        with pytest.raises(PuzzleError, match=r"layer 1: attention gqa \(window with sinks\)"):
            require(config, target)


def test_kinds_from_outside_are_refused_by_all() -> None:
    config = config_of("kv4+w256", head_dim=8)
    assert config.blocks is not None
    config.blocks[0]["ffn"] = {"kind": "mine"}
    for target in TARGETS:
        with pytest.raises(PuzzleError, match="layer 0: ffn mine"):
            require(config, target)


def test_what_concerns_the_whole_model() -> None:
    assert "biases" in str(check(config_of("kv4+w256", mlp_bias=True), "tensorrt-llm")[0])
    assert "head_dim 12" in str(check(config_of("kv4+w256"), "mlx-lm")[0])
    assert "width 48 is not a multiple of 256" in str(check(config_of("kv4+w48", head_dim=8), "mlx-lm")[0])
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    assert "rope_type yarn" in str(check(config_of("kv4+w48", rope_parameters=rope), "gguf")[0])


def test_a_space_can_be_restricted_beforehand() -> None:
    assert not supported(LinearAttention(), "deci")
    assert supported(NoAttention(), "deci")
    assert supported(LinearAttention(), "mlx-lm", "middle")
    assert not supported(LinearAttention(), "mlx-lm", "first")
    assert not supported(LinearAttention(), "mlx-lm")
    assert not supported(LowRankFFN(4), "tensorrt-llm")
    assert not supported(GatedFFN(100), "tensorrt-llm")
    assert supported(GatedFFN(512), "tensorrt-llm")
    variants = (GroupedQuery(2), LinearAttention(), NoAttention(), GatedFFN(7), LowRankFFN(4), LinearFFN(), NoFFN())
    assert all(supported(variant, name) for variant in variants for name in ("hf", "vllm", "gguf"))
    with pytest.raises(PuzzleError, match="'ggml' is unknown; use one of hf, vllm, deci"):
        supported(NoFFN(), "ggml")


@pytest.mark.parametrize("to", ["deci", "llama", "tensorrt-llm"])
def test_nothing_is_written_of_what_is_refused(save_child: SaveChild, tmp_path: Path, to: str) -> None:
    _, child = save_child("kv4+w256", "kv4+rank4")
    with pytest.raises(PuzzleError, match="layer 1"):
        convert(child, to, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_formats_and_folders_that_are_no_child(save_child: SaveChild, tmp_path: Path) -> None:
    _, child = save_child("kv4+w48")
    with pytest.raises(PuzzleError, match="'onnx' is unknown"):
        convert(child, "onnx")
    with pytest.raises(PuzzleError, match=r"no readable config\.json"):
        convert(tmp_path, "deci")


@pytest.mark.parametrize("to", ["deci", "llama", "gguf"])
def test_only_checkpoints_are_replaced_and_never_the_child(save_child: SaveChild, tmp_path: Path, to: str) -> None:
    if to == "gguf":
        pytest.importorskip("gguf", reason="pip install puzzle-llm[gguf]")
    _, child = save_child("kv4+w48")
    before = sorted(file.name for file in child.iterdir())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    for target in (child, tmp_path, tmp_path / "mine"):
        with pytest.raises(PuzzleError, match="export"):
            convert(child, to, target)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    assert sorted(file.name for file in child.iterdir()) == before
    for _ in range(2):
        written = convert(child, to)
        assert written.exists()
        assert written.parent == child.parent


def test_the_table_in_the_documentation_is_this_one() -> None:
    page = Path(__file__).parents[2] / "docs" / "engines.md"
    assert table() in page.read_text(encoding="utf-8"), "docs/engines.md: put `puzzle.export.table()` into it again"


def test_a_space_is_restricted_to_what_is_deployed_on() -> None:
    config = pico_puzzle("kv4+w48", "kv4+w48").config
    space = derive_space(config, ffn_widths=[16], attention=["linear", "none", "kv4win8"], ffn=["linear", "none"])
    assert deployable(space, config, []) == deployable(space, config, ["hf"]) == space
    deci = deployable(space, config, ["deci", "gguf"])
    assert [variant.name for variant in deci.layers[1].attention] == ["kv4", "kv2", "kv1", "none"]
    assert [variant.name for variant in deci.layers[1].ffn] == ["w48", "w16", "none"]
    with pytest.raises(PuzzleError, match="export target 'lamma' is unknown; use one of hf, vllm"):
        deployable(space, config, ["lamma"])
