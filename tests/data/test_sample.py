"""Text that the parent writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import EOS

from puzzle.data import prepare_data, sample_text
from puzzle.data.sample import _continued
from puzzle.parents import Parent, open_parent
from puzzle.recipe import Recipe
from puzzle.runs import Run, progress

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}[assistant]{% endif %}"


def sampling(recipe: Recipe, folder: Path, **settings: Any) -> Run:
    changed = recipe.data.model_copy(update={"source": ["parent"], "sampled_tokens": 3000, **settings})
    return Run(folder, recipe.model_copy(update={"data": changed}))


def test_tokens_come_as_often_as_the_parent_gives_them(pico_parent: Parent) -> None:
    model, tokenizer, count = pico_parent.load(), pico_parent.tokenizer(), 8192
    torch.manual_seed(0)
    with progress("", 1) as bar:
        texts, tokens = _continued(model, tokenizer, bar, [[tokenizer.eos_token_id]] * count, 1)
    with torch.no_grad():
        probabilities = model(torch.tensor([[tokenizer.eos_token_id]])).logits[0, -1].softmax(-1)
    assert tokens / count == pytest.approx(1 - float(probabilities[tokenizer.eos_token_id]), abs=0.01)
    letters = [tokenizer.decode([token]) for token in range(257)]
    for token in probabilities.topk(5).indices.tolist():
        if letters[token].isascii() and letters[token] != EOS:
            expected = float(probabilities[token])
            assert texts.count(letters[token]) / count == pytest.approx(expected, abs=4 * (expected / count) ** 0.5)


def test_it_goes_on_where_it_stood_and_is_packed_like_any_text(
    tmp_path: Path, pico_recipe: Recipe, pico_parent: Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample_text(sampling(pico_recipe, tmp_path / "whole"), pico_parent)
    assert whole is not None
    run = sampling(pico_recipe, tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr("puzzle.data.sample.write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):  # after the first lines, before they count
            sample_text(run, pico_parent)
    data = prepare_data(run, pico_parent)
    (file,) = run.path.glob("stages/sample-*/samples.jsonl")
    assert file.read_bytes() == whole.read_bytes()
    rows = [json.loads(line)["text"] for line in whole.read_text().splitlines()]
    assert len({*rows}) > 0.9 * len(rows)
    assert sum(data.counts.values()) * 33 > 2000
    assert sample_text(sampling(pico_recipe, tmp_path / "other", source=["files"]), pico_parent) is None


def test_a_parent_with_a_chat_template_writes_conversations(tmp_path: Path, pico_recipe: Recipe) -> None:
    folder = shutil.copytree(pico_recipe.parent, tmp_path / "parent")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    run = sampling(pico_recipe, tmp_path / "run", column="messages")
    parent = open_parent(str(folder))
    file = sample_text(run, parent)
    assert file is not None
    for line in file.read_text().splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert EOS not in user["content"] + assistant["content"]
    prepare_data(run, parent)
