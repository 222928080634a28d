"""What a person writes, and what they are told when it is wrong."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from puzzle.errors import PuzzleError
from puzzle.explain import describe, settings
from puzzle.recipe import Recipe, parse_overrides

MINIMAL: dict[str, Any] = {"parent": "model", "data": {"source": "text"}}


def read(tmp_path: Path, text: str, overrides: dict[str, Any] | None = None) -> Recipe:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return Recipe.read(file, overrides)


def complaint(tmp_path: Path, text: str, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(PuzzleError) as caught:
        read(tmp_path, text, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_units_defaults_and_sections_whose_lines_are_all_commented_out(tmp_path: Path) -> None:
    text = "parent: model\ndata: {source: [a, b], sequence_length: 1k, test: 5%}\nscore:\n#  tokens: 1M\n"
    text += "library: {tokens: 1.5M, learning_rate: 1e-3}\ntarget: {throughput: 2x, memory: 24GB, latency: 0.2s}\n"
    recipe = read(tmp_path, text)
    assert (recipe.data.source, recipe.data.sequence_length, recipe.data.test) == (["a", "b"], 1000, 0.05)
    assert (recipe.library.tokens, recipe.library.learning_rate) == (1_500_000, 1e-3)
    resolved = {name: amount.resolve(100.0) for name, amount in recipe.target if amount is not None}
    assert resolved == {"throughput": 200.0, "memory": 24e9, "latency": 200.0}
    assert recipe.score == Recipe.model_validate(MINIMAL).score


GIVEN = "parent: m\ndata: {source: t}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {source: t}", "parent is missing; give: Folder of a Hugging Face checkpoint"),
        ("parent: m", "data is missing"),
        ("parent: m\ndata:", "data.source is missing; give: Files or folders"),
        ("parent: ''\ndata: {source: t}", "parent: String should have at least 1 character, found ''"),
        ("parent: m\ndata: {source: []}", "data.source: List should have at least 1 item"),
        ("parent: m\ndata: {source: 3}", "data.source: Input should be a valid list, found 3"),
        ("parent: m\ndata: {source: t, sequence_lenght: 3}", "did you mean data.sequence_length?"),
        ("parent: m\ndata: {source: t, sequence_length: 1}", "data.sequence_length: Input should be greater than"),
        (
            "parent: m\ndata: {source: t, test: 60%, scoring: 50%}",
            "data: calibration, validation, scoring and test",
        ),
        (GIVEN + "throughput: 2x", "throughput is not a setting; did you mean target.throughput?"),
        (GIVEN + "libary: {tokens: 3}", "libary is not a setting; did you mean library?"),
        (GIVEN + "score: {zzz: 3}", "score.zzz is not a setting; allowed here: score.tokens"),
        (GIVEN + "score: 3", "score: Input should be a valid dictionary or instance of ScoreSettings, found 3"),
        (GIVEN + "precision: int4", "precision: Input should be 'auto', 'float32' or 'bfloat16', found 'int4'"),
        (GIVEN + "library: {tokens: many}", "library.tokens: expected a number such as 512k"),
        (GIVEN + "library: {batch_size: 1.5}", "library.batch_size: Input should be a valid integer"),
        (GIVEN + "library: {learning_rate: .nan}", "library.learning_rate: Input should be a finite number, found nan"),
        (
            GIVEN + "scenario: {batch_sizes: [1, 0]}",
            "scenario.batch_sizes.1: Input should be greater than",
        ),
        (GIVEN + "scenarios: [{scenario: {}, target: {memry: 1GB}}]", "scenarios.0.target.memry is not a setting; did"),
        (GIVEN + "search: {equal: some}", "search.equal: expected layers such as 7, 0-3, first:4"),
        (GIVEN + "execution: {memory: 1x}", "execution.memory: expected a number such as 24GB"),
        (GIVEN + "target: {throughput: -2x}", "target.throughput: expected a number such as 5500"),
        (GIVEN + "distil: {cosine_weight: 0, kl_weight: 0}", "nothing would be learned"),
        (GIVEN + "cost: {repeats: true}", "cost: repeats: found True; it is no yes or no"),
        (GIVEN + "scenario: {batch_sizes: [yes]}", "scenario: batch_sizes: found [True]; it is no yes or no"),
        (GIVEN + "search: {fix: {[1]: kv2}}", "is not valid YAML"),
        (GIVEN + "seed: " + "9" * 100, "999..."),
        ("parent: [\ndata: 3", "is not valid YAML: line 2, column"),
        ("parent: m\nparent: n", "is not valid YAML: line 2, column 1: parent is given twice"),
        ("parent: \x00", "is not valid YAML"),
        ("", "is empty"),
        ("- a", "holds list, not settings"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in complaint(tmp_path, text)


def test_further_problems_are_named_once(tmp_path: Path) -> None:
    line = complaint(tmp_path, "parent: m\ndata: {source: 3}\nlibrary: {batch_size: 0}\nsed: 1")
    assert line.endswith("(and 2 more: library.batch_size, sed)")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path, expected in ((tmp_path / "none.yaml", "does not exist; `puzzle init"), (tmp_path, "is a folder, not a")):
        with pytest.raises(PuzzleError, match=expected):
            Recipe.read(path)


def test_overrides_go_in_before_validation(tmp_path: Path) -> None:
    given = parse_overrides(["target.throughput=2x", "scenario.batch_sizes=[1, 8]", "seed=3"])
    recipe = read(tmp_path, yaml.safe_dump(MINIMAL | {"scenario": {"batch_sizes": [4], "prompt_tokens": 9}}), given)
    assert (recipe.scenario.batch_sizes, recipe.scenario.prompt_tokens, recipe.seed) == ([1, 8], 9, 3)
    assert recipe.target.throughput is not None


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("target.througput=2x", "did you mean target.throughput?"),
        ("tokens=3", "tokens is not a setting; did you mean calibration.tokens or library.tokens or"),
        ("parent.name=x", "--set parent.name: parent is a setting itself"),
    ],
)
def test_wrong_overrides(tmp_path: Path, assignment: str, expected: str) -> None:
    assert expected in complaint(tmp_path, yaml.safe_dump(MINIMAL), parse_overrides([assignment]))


@pytest.mark.parametrize("assignment", ["seed", "=3", "seed=[", ""])
def test_what_is_no_override(assignment: str) -> None:
    with pytest.raises(PuzzleError, match=re.escape(f"--set {assignment}:")):
        parse_overrides([assignment])


def test_a_recipe_written_out_is_the_same_recipe(tmp_path: Path) -> None:
    values = MINIMAL | {"target": {"throughput": "2x", "memory": "80%"}, "library": {"tokens": "1M"}}
    recipe = Recipe.model_validate(values)
    text = recipe.to_yaml()
    assert read(tmp_path, text) == recipe
    assert "distil" not in text


def test_every_setting_has_help_and_its_default_in_the_help() -> None:
    assert [path for path, field, _ in settings(Recipe) if not field.description and "." in path] == []
    described = yaml.safe_load(describe(Recipe))
    described["parent"], described["data"]["source"] = "model", "text"
    assert Recipe.model_validate(described) == Recipe.model_validate(MINIMAL)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_auto_is_the_precision_and_of_a_scenario_what_its_engine_is_fast_in(precision: str) -> None:
    scenarios = [{"engine": "roofline"}, {"engine": "llama.cpp"}, {"engine": "vllm"}, {"dtype": "float16"}]
    further = {"scenarios": [{"scenario": each, "target": {}} for each in scenarios]}
    for given, auto in ({"precision": precision}, "auto"), ({}, precision):
        recipe = Recipe.model_validate(MINIMAL | given | further).resolved(auto)
        assert recipe.precision == precision
        served = [scenario.dtype for _, scenario, _ in recipe.served]
        assert served == [precision, "bfloat16", "float16", precision, "float16"]
        assert recipe.resolved("auto") == recipe
    assert "scenarios" not in Recipe.model_validate(MINIMAL).resolved(precision).to_yaml()


def test_several_gpus_are_for_vllm(tmp_path: Path) -> None:
    shared = "parent: m\ndata: {source: t}\nscenario: {tensor_parallel: 2, engine: "
    assert "tensor_parallel: engine torch has none" in complaint(tmp_path, shared + "torch}")
    assert read(tmp_path, shared + "vllm}").scenario.tensor_parallel == 2
    memory = shared.replace("tensor_parallel: 2", "gpu_memory: 80%")
    assert "gpu_memory: engine llama.cpp has none" in complaint(tmp_path, memory + "llama.cpp}")
    assert read(tmp_path, memory + "vllm}").scenario.gpu_memory == 0.8
