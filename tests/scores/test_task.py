"""A score of the user's own."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import random_tokens
from tests.scores.conftest import Scorer

from puzzle.child import assemble
from puzzle.errors import PuzzleError
from puzzle.library import Library
from puzzle.modeling import PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.scores.task import load_task, with_block
from puzzle.variants import Architecture, BlockVariant


def remaining(model: PuzzleForCausalLM) -> float:
    """The higher the better: parameters."""
    return float(model.num_parameters())


def test_every_block_has_a_task_score(scored: Scorer, pico_parent: Parent) -> None:
    table = scored(function=remaining, composed_share=0.25)
    assert all(row.task is not None for row in table.rows)
    full, smaller = table.parent_row(1), table.row(1, "none+none")
    assert full.task == pico_parent.num_params
    assert smaller.task is not None
    assert 0 < smaller.task < full.task


def test_the_task_sees_the_child_with_that_block(scored: Scorer, pico_parent: Parent, pico_library: Library) -> None:
    """As the child put together on its own, generation with a cache included."""
    parent = pico_parent.load()
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    block = BlockVariant.parse("none+w56")
    blocks = list(pico_parent.architecture.blocks)
    blocks[0] = block
    child = assemble(pico_parent, pico_library, Architecture(tuple(blocks)))
    shared = with_block(parent, 0, block, pico_library)
    tokens_BT = random_tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(shared(tokens_BT).logits, child(tokens_BT).logits)
    for use_cache in (True, False):
        generated = [
            model.generate(tokens_BT, max_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=0)
            for model in (shared, child)
        ]
        assert torch.equal(*generated)
    assert shared.model.layers[2].mlp.up_proj.weight.data_ptr() == parent.model.layers[2].mlp.up_proj.weight.data_ptr()
    assert all(torch.equal(tensor, before[name]) for name, tensor in parent.state_dict().items())


def test_a_task_that_fails_goes_on_where_it_stood(scored: Scorer) -> None:
    seen: list[int] = []

    def fails_once(model: PuzzleForCausalLM) -> float:
        seen.append(1)
        if len(seen) == 7:
            raise RuntimeError("the task's own")
        return 1.0

    with pytest.raises(RuntimeError, match="the task's own"):
        scored(function=fails_once, composed_share=None)
    assert len(scored(function=fails_once, composed_share=None).rows) == 3 * 6 + 1
    assert len(seen) == 1 + 3 * 5 + 1  # the parent, every block, and the one that failed


def test_a_task_is_named_in_the_recipe_and_found_where_the_command_is_run(
    scored: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own_task.py").write_text("def layers_with_cache(model):\n    return model.config.num_hidden_layers\n")
    try:
        table = scored(task="own_task:layers_with_cache", composed_share=None)
    finally:
        sys.modules.pop("own_task", None)
    assert table.row(1, "kv1+none").task == 4
    assert table.row(1, "none+w64").task == 3
    (stage,) = (tmp_path / "run" / "stages").glob("score-*/stage.json")
    assert json.loads(stage.read_text())["inputs"]["task"] == "own_task:layers_with_cache"


def test_a_block_without_a_finite_number_has_no_task_score(scored: Scorer, capsys: pytest.CaptureFixture[str]) -> None:
    def depth(model: PuzzleForCausalLM) -> float:
        return 1.0 if model.config.num_hidden_layers == 4 else math.inf

    table = scored(function=depth, composed_share=None)
    assert table.row(2, "none+none").task is None
    assert table.row(2, "kv1+none").task == 1.0
    assert "warning: task score of layer 2 none+none is inf; it has none" in capsys.readouterr().out


def test_of_the_parent_itself_the_number_must_be_finite(scored: Scorer) -> None:
    with pytest.raises(PuzzleError, match=r"score.task: .*<lambda> is nan for the parent itself"):
        scored(function=lambda model: math.nan)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("no_such_module:f", "score.task: found 'no_such_module:f', which cannot be imported"),
        ("os.path:no_such", "score.task: found 'os.path:no_such', which cannot be imported (AttributeError: "),
        ("os.path", "score.task: os.path is no function"),
        ("os.path:sep", "score.task: os.path:sep is no function"),
    ],
)
def test_what_cannot_be_called_is_refused_in_one_line(task: str, message: str) -> None:
    with pytest.raises(PuzzleError) as caught:
        load_task(task)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("returned", ["good", None, torch.ones(2)])
def test_what_is_not_a_number_is_refused(returned: Any, scored: Scorer) -> None:
    def task(model: PuzzleForCausalLM) -> Any:
        return returned

    with pytest.raises(PuzzleError, match=r"score.task: .*task returned (str|NoneType|Tensor), not a number"):
        scored(function=task)
