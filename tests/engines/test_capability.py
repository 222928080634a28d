"""What an engine cannot run is refused beforehand, with the layer and the reason."""

from pathlib import Path

import pytest
from tests.conftest import pico_puzzle
from tests.engines import matrix, readers
from tests.engines.parity import kind_from_outside

from puzzle.engines.capability import READERS, deployable, reader_of, refusals, require
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig, puzzle_config, tiny_config
from puzzle.pipeline import Pipeline
from puzzle.recipe import Recipe
from puzzle.runs import create_folder, open_run
from puzzle.variants import Architecture, BlockVariant, derive_space


def config_of(*blocks: str, **overrides: object) -> PuzzleConfig:
    return pico_puzzle(*blocks, **overrides).config


def table() -> str:
    """All readers as a Markdown table."""
    with kind_from_outside():
        blocks = [BlockVariant.parse(block) for block in matrix.ALTERNATIVES.values()]
    cells = dict.fromkeys(variant.cell for block in blocks for variant in block.subblocks)
    shown = {name: reader for name, (reader, *_) in READERS.items() if name != "gguf"}
    kinds = ("openelm", "deci", "step35, windows", "step35, no windows")
    shown |= {f"gguf: {kind}": reader for kind, reader in zip(kinds, READERS["gguf"], strict=True)}
    lines = [["", *shown], ["---"] * (len(shown) + 1)]
    lines += [[cell, *("yes" if cell in reader.runs else "no" for reader in shown.values())] for cell in cells]
    for what, cell in (("sizes of windows", "window"), ("FFN widths", "narrower FFN")):
        sizes = ("one" if cell in reader.one_size else "any" for reader in shown.values())
        lines.append([what, *sizes])
    for what in ("family", "plain_shape", "hidden_act", "rope_type", "head", "biases", "positions"):
        lines.append([what, *(", ".join(reader.limits.get(what, ["all"])) for reader in shown.values())])
    engines = [f"- `{name}`: {reader.engine}" for name, reader in shown.items()]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *engines, ""])


def test_the_table_in_the_documentation_is_this_one() -> None:
    assert table() in matrix.PAGE.read_text(), f"put into {matrix.PAGE}:\n{table()}"


def test_every_row_of_the_table_is_measured() -> None:
    assert all(f"\n| {cell} | yes" in table() for cell in READERS["hf"][0].runs)


def test_the_matrix_of_the_docs_is_what_is_measured(llama_cpp: readers.Ask, vllm: readers.Ask, tmp_path: Path) -> None:
    """Law 7: an exported child computes what it computes in torch. `python -m tests.engines.matrix` writes it anew."""
    measured = matrix.measure(tmp_path)
    assert matrix.render(measured) == matrix.block_of(matrix.PAGE.read_text()).group()


def test_a_model_of_sizes_alone_runs_everywhere() -> None:
    config = config_of("kv4+w256", "kv1+w512", "none+none", head_dim=8, attention_bias=True)
    assert all(refusals(config, name) == [] for name in READERS)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("hf", []),
        ("vllm", ["layer 3: attention kv4win8s2 (window with sinks)"]),
        ("gguf", ["layer 2: ffn linear (linear FFN)", "layer 3: attention kv4win8s2", "layer 3: ffn rank4 (low-rank"]),
        ("deci", ["layer 0: attention linear (linear attention)", "layer 2: ffn linear", "layer 3: att", "layer 3: f"]),
    ],
)
def test_layers_are_refused_one_by_one(name: str, refused: list[str]) -> None:
    found = refusals(config_of("linear+none", "none+w48", "none+linear", "kv4win8s2+rank4"), name)
    assert len(found) == len(refused)
    assert all(line.startswith(start) for line, start in zip(found, refused, strict=True))


def test_what_concerns_the_whole_model() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    assert "rope_type yarn" in refusals(config_of("kv4+w48", rope_parameters=rope), "gguf")[0]
    windows = config_of("kv4win4+w48", "kv4win8+w48")
    assert "windows of 4, 8 tokens" in refusals(windows, "vllm")[0]
    with pytest.raises(
        PuzzleError, match=r"export to gguf: windows of 4, 8 tokens: llama.cpp, architecture step35 runs"
    ):
        require(windows, "gguf")
    assert refusals(config_of("kv4win4+w48", "kv1+none"), "gguf") == []
    assert "FFN widths of 16, 48 channels" in refusals(config_of("kv4win4+w48", "kv1win4+w16"), "gguf")[0]
    linear = config_of("linear+w48", "none+linear")
    with pytest.raises(PuzzleError, match=r"export to deci: layer 0: attention linear \(linear.*\(and 1 more\)"):
        require(linear, "deci")


def test_the_architecture_of_a_gguf_file_is_the_first_that_holds_the_child() -> None:
    def architecture(family: str, *blocks: str, **settings: object) -> str:
        tiny = tiny_config(family)
        for name, value in ({"sliding_window": None} | settings).items():
            setattr(tiny, name, value)
        config = Architecture.parse(blocks or ("kv2+w96",) * 6).configure(puzzle_config(tiny))
        assert refusals(config, "gguf") == []
        return reader_of(config, "gguf").engine.rpartition(" ")[2]

    assert architecture("llama") == architecture("llama", "kv2+w96", "linear+w32") == "deci"
    assert architecture("llama", "kv2win4+w96", "kv2+w96") == "step35"
    assert architecture("qwen3", tie_word_embeddings=True) == "openelm"
    assert architecture("qwen3", "kv2+w96", "kv1win4+none", tie_word_embeddings=True) == "step35"
    assert architecture("qwen3", tie_word_embeddings=False) == "step35"
    assert architecture("smollm3") == "step35"
    assert architecture("smollm3", *["kv2+w96"] * 3, "none+w32") == "deci"  # the fourth layer knew no positions


@pytest.mark.parametrize(
    ("family", "blocks", "settings", "reason"),
    [
        ("qwen3", "kv2+w96 kv2+w32", {"tie_word_embeddings": False}, "FFN widths of 32, 96 channels"),
        ("qwen3", "linear+w96", {"tie_word_embeddings": False}, r"layer 0: attention linear \(linear attention\)"),
        ("qwen3", "kv2+w96", {"attention_bias": True, "tie_word_embeddings": True}, "biases some"),
        ("smollm3", "kv2win4+w96 kv2+w96 kv2+w96 kv2+w96", {}, r"layer 0: attention kv2win4 \(window\)"),
        ("smollm3", "kv2+w96 kv2+w96 kv2+w96 kv1+w32", {}, "FFN widths of 32, 96 channels"),
        ("gemma2", "kv2+w96", {}, "plain_shape neither"),
    ],
)
def test_what_a_gguf_file_cannot_hold_of_other_families(
    family: str, blocks: str, settings: dict[str, object], reason: str
) -> None:
    tiny = tiny_config(family)
    for name, value in ({"sliding_window": None} | settings).items():
        setattr(tiny, name, value)
    child = Architecture.parse(blocks.split()).configure(puzzle_config(tiny))
    with pytest.raises(PuzzleError, match=f"export to gguf: ({reason})"):
        require(child, "gguf")


def test_a_space_keeps_the_parents_width_where_there_is_one_for_all() -> None:
    parent = puzzle_config(tiny_config("mistral"))
    assert reader_of(parent, "gguf").engine.endswith("step35")  # for its windows
    layer = deployable(derive_space(parent), parent, ["gguf"]).layers[0]
    assert [variant.name for variant in layer.attention] == ["kv2win8", "kv1win8", "none"]
    assert [variant.name for variant in layer.ffn] == ["w96", "none"]


def test_kinds_from_outside_run_where_the_code_in_the_checkpoint_does() -> None:
    with kind_from_outside():
        config = config_of("kv4+w256", "kv4+gain")
        assert refusals(config, "hf") == refusals(config, "vllm") == []
        for name in ("deci", "gguf"):
            with pytest.raises(PuzzleError, match=r"layer 1: ffn gain \(other kinds\): .* cannot run it"):
                require(config, name)


def test_a_space_is_restricted_to_what_is_deployed_on() -> None:
    config = config_of("kv4+w48", "kv4+w48")
    space = derive_space(config, ffn_widths=[16], attention=["linear", "none", "kv4win8"], ffn=["linear", "none"])
    assert deployable(space, config, []) == deployable(space, config, ["hf"]) == space
    deci = deployable(space, config, ["deci", "gguf"])
    assert [variant.name for variant in deci.layers[1].attention] == ["kv4", "kv2", "kv1", "none"]
    assert [variant.name for variant in deci.layers[1].ffn] == ["w48", "w16", "none"]
    windows = derive_space(config, attention=["kv4win8", "kv2win4"], ffn=[])
    with pytest.raises(PuzzleError, match=r"space.attention: windows of 4, 8 tokens: vLLM's Transf.* runs one size"):
        deployable(windows, config, ["vllm"])


def test_engines_that_are_timed_restrict_the_space_too(pico_recipe: Recipe, tmp_path: Path) -> None:
    scenario = pico_recipe.scenario.model_dump() | {"engine": "llama.cpp"}
    recipe = Recipe.model_validate(pico_recipe.model_dump() | {"scenario": scenario})
    create_folder(tmp_path / "run", recipe)
    with open_run(tmp_path / "run") as run:
        ffn = {variant.name for layer in Pipeline(run).space.layers for variant in layer.ffn}
    assert "none" in ffn
    assert "linear" not in ffn
