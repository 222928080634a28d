"""What an engine cannot run is refused beforehand, with the layer and the reason."""

from pathlib import Path

import pytest
from tests.conftest import pico_puzzle
from tests.engines import matrix, readers
from tests.engines.parity import kind_from_outside

from puzzle.engines.capability import OPENELM, READERS, deployable, refusals, require
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.pipeline import Pipeline
from puzzle.recipe import Recipe
from puzzle.runs import create_folder, open_run
from puzzle.variants import BlockVariant, derive_space


def config_of(*blocks: str, **overrides: object) -> PuzzleConfig:
    return pico_puzzle(*blocks, **overrides).config


def table() -> str:
    """All readers as a Markdown table."""
    with kind_from_outside():
        blocks = [BlockVariant.parse(block) for block in matrix.ALTERNATIVES.values()]
    cells = dict.fromkeys(variant.cell for block in blocks for variant in block.subblocks)
    shown = {**READERS, "gguf, if spelt as Qwen3": OPENELM}
    lines = [["", *shown], ["---"] * (len(shown) + 1)]
    lines += [[cell, *("yes" if cell in reader.runs else "no" for reader in shown.values())] for cell in cells]
    lines.append(["window sizes", *("one" if reader.one_window else "any" for reader in shown.values())])
    for what in ("family", "plain_shape", "hidden_act", "rope_type", "head"):
        lines.append([what, *(", ".join(reader.limits.get(what, ["all"])) for reader in shown.values())])
    engines = [f"- `{name}`: {reader.engine}" for name, reader in shown.items()]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *engines, ""])


def test_the_table_in_the_documentation_is_this_one() -> None:
    assert table() in matrix.PAGE.read_text(), f"put into {matrix.PAGE}:\n{table()}"


def test_every_row_of_the_table_is_measured() -> None:
    assert all(f"\n| {cell} | yes" in table() for cell in READERS["hf"].runs)


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
    with pytest.raises(PuzzleError, match=r"export to gguf: layer 0: attention kv4win4 \(window\).*\(and 1 more\)"):
        require(windows, "gguf")


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
