"""Tasks of lm-eval on parent and children."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from tests.conftest import TASK_CHOICES, write_task
from torch.nn.functional import cross_entropy

from puzzle.artefacts import TaskScore, mean_kept
from puzzle.child import realise
from puzzle.cli import main
from puzzle.errors import PuzzleError
from puzzle.library import Library
from puzzle.parents import Parent
from puzzle.recipe import Recipe
from puzzle.runs import Run
from puzzle.tasks import Task, check_tasks, load_tasks, run_tasks


@pytest.fixture
def chosen(tmp_path: Path) -> list[Task]:
    return load_tasks([str(write_task(tmp_path, "numbers"))])


@pytest.fixture
def run(tmp_path: Path, pico_recipe: Recipe) -> Run:
    return Run(tmp_path / "run", pico_recipe)


def test_a_task_is_scored_as_by_hand(run: Run, pico_parent: Parent, chosen: list[Task]) -> None:
    score = run_tasks(run, "parent", pico_parent, chosen)["numbers"]
    model, tokenizer = pico_parent.load(), pico_parent.tokenizer()
    right = []
    for number in range(10):
        prompt = tokenizer(f"zero one {number}", add_special_tokens=False)["input_ids"]
        means = []
        for choice in TASK_CHOICES:
            answer = tokenizer(choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer][:-1]])).logits[0, -len(answer) :]
            means.append(float(-cross_entropy(logits, torch.tensor(answer), reduction="sum")) / len(choice))
        right.append(float(max(range(3), key=means.__getitem__) == number % 3))
    value = sum(right) / 10
    assert (score.metric, score.value, score.questions) == ("acc_norm", pytest.approx(value), 10)
    assert score.chance == pytest.approx(1 / 3)
    assert score.stderr == pytest.approx(math.sqrt(value * (1 - value) / 9))
    assert score.metrics.keys() == {"acc", "acc_norm"}


def test_a_task_that_is_done_is_not_run_again(
    tmp_path: Path, run: Run, pico_parent: Parent, chosen: list[Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_tasks(run, "parent", pico_parent, chosen)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    both = load_tasks([str(write_task(folder, "numbers")), str(write_task(folder, "others"))])
    asked = []
    monkeypatch.setattr("puzzle.tasks._loaded", lambda *_: None)
    monkeypatch.setattr("puzzle.tasks._asked", lambda lm, task, *_: asked.append(task.name) or first)
    run_tasks(run, "parent", pico_parent, both)
    assert asked == ["others"]  # where a task lies does not matter
    write_task(folder, "numbers", doc_to_text="Q: {{query}}")
    run_tasks(run, "parent", pico_parent, load_tasks([str(folder / "numbers.yaml")]))
    assert asked == ["others", "numbers"]  # how it is asked does


def test_two_tasks_of_one_name_do_not_share_requests(
    tmp_path: Path, run: Run, pico_parent: Parent, chosen: list[Task]
) -> None:
    run_tasks(run, "parent", pico_parent, chosen)
    perplexity = [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}]
    words = {"output_type": "loglikelihood", "doc_to_target": " nine.", "metric_list": perplexity}
    (other,) = load_tasks([str(write_task(tmp_path, "numbers", **words))])
    score = run_tasks(run, "parent", pico_parent, [other])["numbers"]
    assert (score.metric, score.chance) == ("perplexity", None)
    assert score.value > 1
    assert score.stderr is not None


def test_a_group_is_one_line_and_a_folder_the_tasks_in_it(
    tmp_path: Path, run: Run, pico_parent: Parent, pico_library: Library
) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    for name, choices in (("first", TASK_CHOICES), ("second", TASK_CHOICES[:2])):
        write_task(folder, name, doc_to_choice=choices, doc_to_target=0)
    tasks = load_tasks([str(folder)])
    assert [task.name for task in tasks] == ["first", "second"]
    child = realise(run, pico_parent, pico_library, ("kv1+w32", "none+none", "kv4+none", "linear+w64"))
    single = run_tasks(run, "child", child, tasks)
    group = {"group": "both", "task": ["first", "second"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "group.yaml").write_text(json.dumps(group))
    (both,) = run_tasks(run, "child", child, load_tasks([str(folder / "group.yaml")])).items()
    assert both[0] == "both"
    assert both[1].value == pytest.approx(sum(score.metrics["acc"][0] for score in single.values()) / 2)
    assert (both[1].chance, both[1].questions) == (pytest.approx((1 / 3 + 1 / 2) / 2), 20)


def test_what_is_kept_counts_from_chance_and_only_where_the_parent_is_above_it() -> None:
    def score(value: float, chance: float | None = 0.25) -> TaskScore:
        return TaskScore("acc", value, 0.02, chance, 100, {})

    assert score(0.45).kept(score(0.65)) == pytest.approx(0.5)
    assert math.isnan(score(0.28).kept(score(0.29)))
    assert math.isnan(score(30.0, None).kept(score(20.0, None)))
    parent = {"easy": score(0.65), "hard": score(0.26), "open": score(0.4, 0.0)}
    child = {"easy": score(0.45), "hard": score(0.30), "open": score(0.3, 0.0)}
    assert mean_kept(child, parent) == pytest.approx((0.5 + 0.75) / 2)


def test_tasks_of_a_whole_run(tmp_path: Path, pico_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, task = tmp_path / "pico.yaml", write_task(tmp_path, "numbers")
    recipe.write_text(pico_recipe.to_yaml())
    out = str(tmp_path / "run")
    assert main(["run", str(recipe), "--out", out, "--set", f"evaluate.tasks=[{task}]"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tasks"].keys() == {"parent", "child", "uniform"}
    assert summary["tasks"]["child"]["numbers"]["metric"] == "acc_norm"
    assert "numbers" in (tmp_path / "run" / "report.html").read_text()
    assert "child keeps" in (tmp_path / "run" / "child" / "README.md").read_text()
    capsys.readouterr()
    other = write_task(tmp_path, "later")
    assert main(["evaluate", out, "--tasks", str(other)]) == 0
    shown = capsys.readouterr().out
    assert "later" in shown.splitlines()[-2]
    assert "numbers" not in shown


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("arc_eazy", "evaluate.tasks: found arc_eazy, which is no task; give a name"),
        ("none.yaml", "found none.yaml, which is no task"),
        (".", "found ., which is no task"),
    ],
)
def test_what_is_no_task_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, expected: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PuzzleError, match=expected):
        check_tasks([entry])


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("puzzle.tasks.find_spec", lambda name: None)
    with pytest.raises(PuzzleError, match=re.escape("pip install 'puzzle-llm[eval]'")):
        check_tasks(["piqa"])


def test_a_task_whose_questions_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    path = write_task(tmp_path, "lost")
    (tmp_path / "lost.jsonl").unlink()
    with pytest.raises(PuzzleError, match=r"lost cannot be loaded \(.*lost\.jsonl"):
        load_tasks([str(path)])
