"""The example in docs/adding-a-variant.md, taken from the page and run; and checkpoints where this package is not."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import pico_puzzle, random_tokens

from puzzle.child import realise
from puzzle.modeling import MODULES, PuzzleForCausalLM, save_checkpoint
from puzzle.pipeline import Pipeline
from puzzle.recipe import LibrarySettings, Recipe
from puzzle.runs import create_folder, open_run
from puzzle.variants import REGISTRY, Architecture, parse_variant

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-variant.md"
_IN_A_FRESH_PROCESS = """
import sys
sys.modules["puzzle"] = None  # an import of the package would raise
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
inputs = load_file(folder + "/inputs.st")["tokens"]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert model.is_remote_code() and type(model).__module__.startswith("transformers_modules."), type(model)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).blocks == model.config.blocks
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
text = model.generate(inputs, do_sample=False, max_new_tokens=4, pad_token_id=0)
model.set_attn_implementation("eager")
assert model.config._attn_implementation == "eager"
model.set_attn_implementation("sdpa")
logits = model(inputs).logits.detach()
hidden = base(inputs).last_hidden_state.detach()
model.save_pretrained(folder + "/again")
save_file({"logits": logits, "text": text, "hidden": hidden}, folder + "/outputs.st")
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's one file, imported as a user would; its kind is gone afterwards."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    file = tmp_path_factory.mktemp("example") / "mean_ffn.py"
    file.write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(file.parent)
        __import__("mean_ffn")
        yield file
    del sys.modules["mean_ffn"], REGISTRY["ffn"]["mean"], MODULES["ffn", "mean"]


@pytest.fixture(scope="module")
def pipeline(example: Path, pico_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    space = {"kv_heads": [], "ffn_widths": [16], "attention": [], "ffn": ["mean", "none"]}
    short = {"library": {"tokens": 256}, "distil": {"tokens": 256}, "evaluate": {"uniform_baseline": False}}
    recipe = Recipe.model_validate(pico_recipe.model_dump() | {"space": space, "target": {"parameters": "58%"}} | short)
    folder = tmp_path_factory.mktemp("mean") / "run"
    create_folder(folder, recipe)
    with open_run(folder) as run:
        yield Pipeline(run)


def test_it_starts_as_the_mean(pipeline: Pipeline) -> None:
    assert [[variant.name for variant in layer.ffn] for layer in pipeline.space.layers] == [
        ["w64", "w16", "mean", "none"]
    ] * 4
    mean, statistics = parse_variant("ffn", "mean"), pipeline.statistics.moments(1, "ffn")
    parent = pipeline.statistics.parent_subblock(pipeline.parent, LibrarySettings(), torch.device("cpu"), 1, "ffn")
    state = mean.initialise(parent)
    assert torch.equal(state["mlp.mean"], statistics["output_mean"])
    hidden_BTD = torch.randn(2, 3, 32)
    layer = mean.build(parent.config, state)
    torch.testing.assert_close(layer(hidden_BTD), hidden_BTD + statistics["output_mean"])


def test_it_is_built_scored_and_weighed_like_any_other(pipeline: Pipeline) -> None:
    (row,) = [row for row in pipeline.library.index.rows if (row.layer, row.variant) == (1, "mean")]
    assert row.loss == row.initial_loss < 1.1
    assert torch.equal(
        pipeline.library.state(1, parse_variant("ffn", "mean"))["mlp.mean"],
        pipeline.statistics.moments(1, "ffn")["output_mean"],
    )
    kls = {row.block: row.kl for row in pipeline.scores.rows if row.layer == 1}
    assert kls.keys() == {"kv4+w64", "kv4+w16", "kv4+mean", "kv4+none"}
    assert kls["kv4+mean"] > kls["kv4+w64"]
    assert parse_variant("ffn", "mean").num_params(pipeline.parent.config) == 2 * 32


def test_a_child_that_has_it_is_saved_and_read(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Puzzle names the kind where nobody registered it."""
    blocks = ("kv4+mean", "kv4+w64", "kv4+mean", "kv4+none")
    child = realise(pipeline.run, pipeline.parent, pipeline.library, blocks)
    model = child.load()
    assert Architecture.of(model.config).names == blocks
    assert torch.equal(model.model.layers[2].mlp.mean, pipeline.statistics.moments(2, "ffn")["output_mean"])
    assert model(random_tokens(1, 5)).logits.isfinite().all()
    monkeypatch.delitem(MODULES, ("ffn", "mean"))
    with pytest.raises(ValueError, match=r"ffn kind 'mean' is unknown; import the module that registers it first"):
        child.load()


@torch.no_grad()
def test_a_checkpoint_loads_where_neither_puzzle_nor_the_pages_file_is(example: Path, tmp_path: Path) -> None:
    """A process that cannot import this package loads a model of every kind, and computes, generates and saves it."""
    blocks = ("none+w16", "kv1+mean", "linear+linear", "kv4win4s1+w48", "kv2win5+rank3", "none+none")
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    model: PuzzleForCausalLM = pico_puzzle(*blocks, rope_parameters=rope)
    save_checkpoint(model, tmp_path, None)
    tokens_BT = random_tokens(2, 9)
    save_file({"tokens": tokens_BT}, tmp_path / "inputs.st")
    process = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", _IN_A_FRESH_PROCESS, str(tmp_path)],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    found = load_file(tmp_path / "outputs.st")
    torch.testing.assert_close(found["logits"], model(tokens_BT).logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["hidden"], model.model(tokens_BT).last_hidden_state, rtol=0, atol=1e-6)
    assert torch.equal(found["text"], model.generate(tokens_BT, do_sample=False, max_new_tokens=4, pad_token_id=0))
    assert "class MeanFFN" in (tmp_path / "again" / "modeling_puzzle.py").read_text()


def test_it_is_timed_chosen_distilled_and_reported(pipeline: Pipeline) -> None:
    """So few parameters leave a choice between the mean and nothing."""
    rows = [row for row in pipeline.costs.rows if row.variant == "mean"]
    assert len(rows) == 4
    assert all(row.weight_bytes == 4 * 2 * 32 and row.kv_bytes_per_sequence == 0 for row in rows)
    assert "kv4+mean" in pipeline.solution.blocks
    assert pipeline.child.architecture.names == pipeline.solution.blocks
    assert "mean" in pipeline.report.read_text()


def test_as_a_program_it_is_puzzle(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(example), "help", "recipe"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(example), run_name="__main__")
    assert stopped.value.code == 0
    assert "ffn_widths" in capsys.readouterr().out
