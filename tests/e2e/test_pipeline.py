"""The whole method on a pico parent, by the command line and from Python."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from puzzle.cli import main
from puzzle.pipeline import Pipeline
from puzzle.quantities import QUANTITIES
from puzzle.recipe import Recipe
from puzzle.runs import open_run
from puzzle.search import frontier
from puzzle.stages import COMMANDS


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, pico_recipe: Recipe) -> Path:
    """A run folder after `puzzle run`."""
    folder = tmp_path_factory.mktemp("e2e")
    recipe = folder / "pico.yaml"
    recipe.write_text(pico_recipe.to_yaml())
    assert main(["run", str(recipe), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_run_leaves_what_a_person_looks_for(finished: Path) -> None:
    for name in ("recipe.yaml", "architecture.json", "summary.json", "report.html", "log.txt", "child/config.json"):
        assert (finished / name).stat().st_size > 0, name
    assert not list(finished.rglob("*.bin")) or all("data-" in str(path) for path in finished.rglob("*.bin"))
    assert not list(finished.rglob("*.pt"))


def test_summary_has_every_number_of_every_model(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["rows"].keys() == {"parent", "child_before", "child", "uniform"}
    for row in summary["rows"].values():
        for name in ("test_loss", "top1", "kl", "params", "weight_bytes", "kv_bytes"):
            assert row[name] >= 0
        assert row["predicted_tok_s"] > 0
        assert row["measured_tok_s"] > 0
    rows = summary["rows"]
    assert rows["parent"]["kl"] == 0
    assert rows["child"]["params"] <= 0.7 * rows["parent"]["params"]
    assert rows["uniform"]["params"] <= 0.7 * rows["parent"]["params"]
    assert rows["child"]["params"] == rows["child_before"]["params"]
    assert "parameters 70%" in summary["target"]


def test_exported_child_runs_and_is_the_distilled_one(finished: Path) -> None:
    child = AutoModelForCausalLM.from_pretrained(finished / "child")
    architecture = json.loads((finished / "architecture.json").read_text())
    assert len(architecture["blocks"]) == 4 == len(child.config.blocks)
    with open_run(finished) as run:
        pipeline = Pipeline(run)
        tokens = torch.arange(12).view(1, 12)
        assert torch.equal(child(tokens).logits, pipeline.child.load()(tokens).logits)
        assert sum(parameter.numel() for parameter in child.parameters()) == pipeline.rows["child"]["params"]


def test_nothing_runs_again_when_nothing_changed(finished: Path) -> None:
    before = _manifests(finished)
    for stage in COMMANDS:
        assert main([stage.name, str(finished)]) == 0
    assert _manifests(finished) == before


def test_an_edit_runs_only_what_depends_on_it(finished: Path) -> None:
    before = _manifests(finished)
    recipe = finished / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("parameters: 70%", "parameters: 60%"))
    try:
        assert main(["search", str(finished)]) == 0
    finally:
        recipe.write_text(text)
    new = {path.parent.name.split("-")[0] for path in _manifests(finished).keys() - before.keys()}
    assert new == {"search"}


def test_status_names_the_stages(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(finished)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("library", "score", "distil"))


def test_an_impossible_target_names_the_reachable_range(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = finished / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("parameters: 70%", "parameters: 1%"))
    try:
        assert main(["search", str(finished)]) == 2
    finally:
        recipe.write_text(text)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "target.parameters" in error
    assert "reachable" in error


def test_questions_to_the_tables_of_a_run_need_no_lock_and_no_torch(finished: Path) -> None:
    code = "import sys; from puzzle.cli import main\ncode = main(sys.argv[1:])\nprint(code, 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "search", str(finished), "--frontier", "4", "--over", "parameters"]
    assert main(["search", str(finished)]) == 0  # the last command of this recipe
    with open_run(finished) as run:  # at work meanwhile
        done = subprocess.run(command, capture_output=True, text=True)
        points = frontier(Pipeline(run).tables, "params", 4)
    assert (done.stdout.splitlines()[-1], done.stderr) == ("0 False", "")
    assert len(done.stdout.splitlines()) == 1 + len(points) + 1
    assert QUANTITIES["params"].text(points[-1].predicted["params"]) in done.stdout


def _manifests(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.glob("stages/*/manifest.json")}
