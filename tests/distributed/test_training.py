"""Law 12 for GKD: one process and several take the same steps; what dies, stops or comes back in other numbers goes on.

Every launch of processes takes seconds, so each does many things.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.distributed.worker import compare

from puzzle.child import realise
from puzzle.errors import PuzzleError
from puzzle.pipeline import Pipeline, run_stage
from puzzle.runs import Run, open_run
from puzzle.stages import DISTIL, SEARCH

BLOCKS = ("kv1+w8", "none+w64", "kv2+none", "linear+w16")
"""No two layers alike: one without attention, one without FFN."""
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"accumulate": 2, "lm_weight": 0.5},
    "cached": {"teacher_cache": 8, "validation_tokens": 32 * 13},
    "rounded": {},
}
"""The last in bfloat16; 13 sequences are no multiple of the processes."""
WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def folder(pico_run: Run, pico_pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all stages before distil finished, for the search's child and for one of these blocks."""
    assert pico_pipeline.child_refined
    realise(pico_run, pico_pipeline.parent, pico_pipeline.library, BLOCKS)
    path = tmp_path_factory.mktemp("together") / "run"
    shutil.copytree(pico_run.path, path, ignore=shutil.ignore_patterns("distil-*", "teacher-*", ".lock"))
    return path


def launch(size: int, *command: str | Path, restarts: int = 0) -> tuple[int, str]:
    """Start so many processes by torchrun; its exit status, and all that they said."""
    several = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
    # A port of its own for each launch, so that tests can run beside each other.
    own_port = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    process = subprocess.run(
        [sys.executable, *several, *own_port, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return process.returncode, process.stdout


def test_one_process_and_several_take_the_same_steps(folder: Path, tmp_path: Path) -> None:
    here, there = (shutil.copytree(folder, tmp_path / name) for name in ("here", "there"))
    code, said = launch(3, WORKER, there, json.dumps({"blocks": BLOCKS, "trainings": SETTINGS}))
    assert code == 0, said
    assert said.count("speaks") == 1, "the first process alone speaks"
    results = json.loads((there / "results.json").read_text())
    with open_run(here) as run:
        expected = compare(run, list(BLOCKS), SETTINGS)
    for name, found in results.items():
        tolerance = 5e-2 if name == "rounded" else 1e-5
        assert len(found["curve"]) == 5
        for point, own_point in zip(expected[name]["curve"], found["curve"], strict=True):
            assert own_point == pytest.approx(point, rel=tolerance), name
        weights, own_weights = (load_file(result["weights"]) for result in (expected[name], found))
        for key, value in weights.items():
            difference = own_weights[key] - value
            # After a step of AdamW, sums in another order can end on the other side of zero: a rate's difference.
            assert float(difference.abs().max()) < (8e-3 if name == "rounded" else 2e-5), (name, key)
            assert float(difference.square().mean().sqrt()) < 5e-4, (name, key)


def test_a_training_goes_on_after_stops_and_deaths_on_other_numbers_of_processes(folder: Path, tmp_path: Path) -> None:
    undisturbed, disturbed = (shutil.copytree(folder, tmp_path / name) for name in ("undisturbed", "disturbed"))
    for path in (undisturbed, disturbed):
        text = (path / "recipe.yaml").read_text()
        assert "tokens: 8192" in text
        (path / "recipe.yaml").write_text(text.replace("tokens: 8192", "tokens: 15360\n  batch_size: 12"))
    # Of three, one dies in step 20, all begin again, and in step 30 one of them is asked to stop.
    code, said = launch(3, WORKER, disturbed, json.dumps({"dies": 20, "stops": 30}), restarts=1)
    assert code == 1  # torchrun's own
    assert "exitcode  : 130" in said, said
    assert [path.name for path in disturbed.glob("stages/distil-*/training*")] == ["training000031"]
    # Two end it, by the command itself.
    code, said = launch(2, "-m", "puzzle", "distil", disturbed)
    assert code == 0, said
    with open_run(undisturbed) as run:
        run_stage(run, "distil")
    results = [next(path.glob("stages/distil-*")) for path in (undisturbed, disturbed)]
    curves = [json.loads((stage / "curve.json").read_text()) for stage in results]
    expected, found = ([point["validation_kl"] for point in curve] for curve in curves)
    assert found == pytest.approx(expected, rel=1e-3)
    assert not list(results[1].glob("training*"))
    weights = [load_file(stage / "checkpoint/model.safetensors") for stage in results]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-3)


def test_other_commands_are_for_one_process() -> None:
    launched = os.environ | {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1"}
    command = [sys.executable, "-m", "puzzle", "search", "run"]
    process = subprocess.run(command, env=launched, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == "puzzle, process 1: torchrun: search is for one process; only distil is for several\n"


def test_a_run_of_several_works_on_its_stages_alone(pico_run: Run, tmp_path: Path) -> None:
    run = replace(pico_run, path=tmp_path, only=("distil",), used=[])
    search, distil = (dict.fromkeys(stage.inputs, "x") for stage in (SEARCH, DISTIL))
    with pytest.raises(PuzzleError, match=r"search-.* not finished.*puzzle refine"):
        run.open(SEARCH, **search)
    assert not list(tmp_path.iterdir())
    follower = replace(run, leads=False, used=[])
    stage = follower.open(DISTIL, **distil)
    follower.log("a line")
    assert not list(tmp_path.iterdir())
    assert run.open(DISTIL, **distil).path == stage.path
    assert stage.path.is_dir()
