"""Law 11: a run killed at any moments and resumed ends with the architecture and the weights of one left alone."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from puzzle.library import Library
from puzzle.pipeline import run_stage
from puzzle.runs import Run, open_run

# State is saved after every step, so that a kill can fall between any two; in a thread, as beside a GPU.
RUN_TO_THE_END = """
import sys
from pathlib import Path
import torch
import puzzle.distributed.state
import puzzle.training
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
torch.set_num_threads(1)
puzzle.training.steps_between_looks = lambda seconds: 1
puzzle.distributed.state.SaveTimer.due = lambda timer: True
puzzle.distributed.state.stager = lambda device: DefaultStager(StagingOptions(*[False] * 4))
from puzzle.pipeline import run_stage
from puzzle.runs import open_run
with open_run(Path(sys.argv[1])) as run:
    run_stage(run, sys.argv[2])
"""
KILLS = 6


def test_a_killed_run_ends_like_one_left_alone(pico_run: Run, tmp_path: Path) -> None:
    undisturbed = _fresh_copy(pico_run, tmp_path / "undisturbed")
    began = time.monotonic()
    assert _run(undisturbed).wait() == 0
    seconds = time.monotonic() - began
    disturbed = _fresh_copy(pico_run, tmp_path / "disturbed")
    # Costs are measurements, no function of their inputs: both runs search on the same ones.
    for costs in undisturbed.glob("stages/cost-*"):
        shutil.copytree(costs, disturbed / "stages" / costs.name)
    kills = 0
    moments = random.Random(11)
    while kills < KILLS:
        process = _run(disturbed)
        # The first early, so that at least one falls into the run on a machine whose speed wavers.
        share = moments.uniform(0.3, 1.0) if kills else 0.4
        try:
            process.wait(share * seconds)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    process = _run(disturbed)
    assert process.wait() == 0
    assert kills > 0
    for pattern in ("variants/*.safetensors", "stages/distil-*/checkpoint/*.safetensors"):
        expected, found = _files(undisturbed, pattern), _files(disturbed, pattern)
        assert found.keys() == expected.keys()
        assert expected
        for name in expected:
            _equal(expected[name], found[name])
    for pattern in ("stages/search-*/solution.json", "stages/score-*/scores.json"):
        assert len(_files(undisturbed, pattern)) == 1
    expected_blocks = next(undisturbed.glob("stages/realise-*/architecture.json")).read_text()
    assert next(disturbed.glob("stages/realise-*/architecture.json")).read_text() == expected_blocks


def test_a_killed_library_of_a_streamed_parent_has_the_same_weights(
    pico_run: Run, pico_library: Library, tmp_path: Path
) -> None:
    """With room for one layer at a time; compared with the variants of a parent in memory, which was left alone."""
    folder = _fresh_copy(pico_run, tmp_path / "streamed")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {
        "space": {"kv_heads": [2], "ffn_widths": [16], "attention": [], "ffn": []},
        "execution": {"memory": "1B"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for stage in ("data", "calibrate"):
        (found,) = pico_run.path.glob(f"stages/{stage}-*")
        shutil.copytree(found, folder / "stages" / found.name)
    process = _run(folder, "library")
    # In the training of the third layer.
    while len(_files(folder, "variants/*.json")) < 4 or not _files(
        folder, "stages/library-*/part*/training*/*.safetensors"
    ):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(_files(folder, "variants/*.json")) < 8
    with open_run(folder) as run:
        run_stage(run, "library")
    expected, found_files = _files(pico_run.path, "variants/*"), _files(folder, "variants/*")
    assert len(found_files) == 2 * 8
    for name, file in found_files.items():
        if file.suffix == ".safetensors":
            _equal(expected[name], file)
        else:
            assert file.read_text() == expected[name].read_text()


def _fresh_copy(run: Run, folder: Path) -> Path:
    """A run folder of the same recipe with nothing done."""
    folder.mkdir()
    for name in ("puzzle.json", "recipe.yaml"):
        shutil.copy(run.path / name, folder / name)
    (folder / "stages").mkdir()
    return folder


def _run(folder: Path, stage: str = "distil") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", RUN_TO_THE_END, str(folder), stage]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def _files(folder: Path, pattern: str) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.glob(pattern)}


def _equal(expected: Path, found: Path) -> None:
    tensors, others = load_file(expected), load_file(found)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors), expected
