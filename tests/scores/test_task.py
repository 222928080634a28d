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

from puzzle.child import realise
from puzzle.errors import PuzzleError
from puzzle.library import Library
from puzzle.modeling import PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.runs import Run
from puzzle.scores.task import load_task, with_block
from puzzle.variants import BlockVariant


def parameters(model: PuzzleForCausalLM) -> float:
    return float(model.num_parameters())


def test_every_block_has_a_task_score(scored: Scorer, pico_parent: Parent) -> None:
    table = scored(function=parameters, composed_share=0.25)
    tasks = {(row.layer, row.block): row.task or 0.0 for row in table.rows}
    assert tasks[1, "kv4+w64"] == pico_parent.num_params
    assert 0 < tasks[1, "none+none"] < min(tasks[1, "kv1+none"], tasks[1, "none+w64"])


def test_the_task_sees_the_child_with_that_block(pico_run: Run, pico_parent: Parent, pico_library: Library) -> None:
    """As the child put together on its own, generation with a cache included; the parent stays as it is."""
    parent, tokens_BT = pico_parent.load(), random_tokens(2, 9)
    before = {name: tensor.clone() for name, tensor in parent.state_dict().items()}
    blocks = ("none+w56", *pico_parent.architecture.names[1:])
    child = realise(pico_run, pico_parent, pico_library, blocks).load()
    shared = with_block(parent, 0, BlockVariant.parse("none+w56"), pico_library)
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
        scored(function=fails_once)
    assert len(scored(function=fails_once).rows) == 3 * 6 + 1
    assert len(seen) == 1 + 3 * 5 + 1  # the parent, every block, and the one that failed


def test_a_task_is_named_in_the_recipe_and_found_where_the_command_is_run(
    scored: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_task.py").write_text("def layers_with_cache(model):\n    return model.config.num_hidden_layers\n")
    table = scored(task="own_task:layers_with_cache")
    del sys.modules["own_task"]
    assert table.by_key[1, "kv1+none"].task == 4
    assert table.by_key[1, "none+w64"].task == 3
    (stage,) = (tmp_path / "run" / "stages").glob("score-*/stage.json")
    assert json.loads(stage.read_text())["inputs"]["task"] == "own_task:layers_with_cache"


def test_a_block_without_a_finite_number_has_no_task_score(scored: Scorer, capsys: pytest.CaptureFixture[str]) -> None:
    table = scored(function=lambda model: 1.0 if model.config.num_hidden_layers == 4 else math.inf)
    assert table.by_key[2, "none+none"].task is None
    assert table.by_key[2, "kv1+none"].task == 1.0
    assert "warning: task score of layer 2 none+none is inf; it has none" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["no_such_module:f", "os.path:no_such", "os.path", "os.path:sep"])
def test_what_cannot_be_called_is_refused_in_one_line(task: str) -> None:
    with pytest.raises(
        PuzzleError, match=rf"^score.task: (found '{task}', which cannot be imported|{task} is no func).*$"
    ):
        load_task(task)


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        ("good", "returned str, not a number"),
        (None, "returned NoneType"),
        (torch.ones(2), "returned Tensor"),
        (math.nan, "is nan for the parent itself"),
    ],
)
def test_what_is_not_a_number_is_refused(returned: Any, found: str, scored: Scorer) -> None:
    def task(model: PuzzleForCausalLM) -> Any:
        return returned

    with pytest.raises(PuzzleError, match=rf"score.task: .*task {found}"):
        scored(function=task)
