"""Law 12 for GKD: one process and several take the same steps; what dies, stops or comes back in other numbers goes on.

Every launch of processes takes seconds, so each does many things.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from puzzle import cli
from puzzle.child import realise
from puzzle.data import TokenData
from puzzle.distill.batches import Batch, Batches
from puzzle.distributed.group import Group
from puzzle.errors import PuzzleError
from puzzle.pipeline import Pipeline
from puzzle.runs import Run

BLOCKS = ("kv1+w8", "none+w64", "kv2+none", "linear+w16")
"""No two layers alike: one without attention, one without FFN."""
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"accumulate": 2, "new_only": 0.5, "ladder": 0.25, "checkpointing": True, "lm_weight": 0.5},
    "cached": {"teacher_cache": 8, "validation_tokens": 32 * 13},
    "rounded": {"optimizer": "muon", "new_only": 0.5},
}
"""The last in bfloat16, which Muon's own products are in any case; `plain` with everything that stays exact."""
WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="module")
def folder(pico_run: Run, pico_pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with all stages before distil finished, for the search's child and for one of these blocks."""
    assert pico_pipeline.child_refined
    realise(pico_run, pico_pipeline.parent, pico_pipeline.library, BLOCKS)
    path = tmp_path_factory.mktemp("together") / "run"
    shutil.copytree(pico_run.path, path, ignore=shutil.ignore_patterns("distil-*", "teacher-*", ".lock"))
    return path


def launch(size: int, *command: str | Path, restarts: int = 0) -> "subprocess.Popen[str]":
    """Start so many processes; one is started without torchrun."""
    several = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
    # A port of its own for each launch, so that tests can run beside each other.
    arguments = [*several, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"] if size > 1 else []
    return subprocess.Popen(
        [sys.executable, *arguments, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Its exit status and all that it said."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


def test_one_process_and_several_take_the_same_steps(folder: Path, tmp_path: Path) -> None:
    results: dict[int, dict[str, Any]] = {}
    for size in (1, 2, 3):
        own = tmp_path / f"run{size}"
        shutil.copytree(folder, own)
        code, said = finish(launch(size, WORKER, own, json.dumps({"blocks": BLOCKS, "trainings": SETTINGS})))
        assert code == 0, said
        assert said.count("reads") == 1, "the first process alone speaks"
        results[size] = json.loads((own / "results.json").read_text())
    for size in (2, 3):
        for name in SETTINGS:
            tolerance = 5e-2 if name == "rounded" else 1e-5
            expected, found = results[1][name], results[size][name]
            assert len(found["steps"]) == len(expected["steps"]) == 4
            for part in ("loss", "kl", "cosine", "lm", "gradient norm", "learning rate"):
                numbers = ([step[part] for step in result["steps"]] for result in (found, expected))
                assert next(numbers) == pytest.approx(next(numbers), rel=tolerance, abs=1e-7), (size, name, part)
            for point, own_point in zip(expected["curve"], found["curve"], strict=True):
                assert own_point == pytest.approx(point, rel=tolerance), (size, name)
            weights, own_weights = (load_file(result["weights"]) for result in (expected, found))
            # After a step of AdamW, sums in another order can end on the other side of zero: a rate's difference.
            atol = 5e-3 if name == "rounded" else 2e-5
            torch.testing.assert_close(own_weights, weights, rtol=0, atol=atol)


def test_a_training_goes_on_after_stops_and_deaths_on_other_numbers_of_processes(folder: Path, tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    shutil.copytree(folder, undisturbed)
    set_tokens(undisturbed, 12 * 32 * 60)
    shutil.copytree(undisturbed, disturbed)

    # Two processes by the command itself; the machine is taken away.
    process = launch(2, "-m", "puzzle", "distil", disturbed)
    await_file(disturbed, "curve.json", process)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 1, said  # torchrun's own
    assert said.count("stopped; the same command goes on where it stood") == 2
    stopped = steps_saved(disturbed)
    assert 6 <= stopped < 30

    # Three; in step 40 one dies, all begin again, and in step 50 one of them is asked to stop.
    code, said = finish(launch(3, WORKER, disturbed, json.dumps({"dies": 40, "stops": 50}), restarts=1))
    assert code == 1
    assert "exitcode  : 130" in said, said
    assert steps_saved(disturbed) == 51

    # The same command on one.
    for path in (undisturbed, disturbed):
        code, said = finish(launch(1, "-m", "puzzle", "distil", path))
        assert code == 0, said
    results = [next(path.glob("stages/distil-*")) for path in (undisturbed, disturbed)]
    curves = [json.loads((stage / "curve.json").read_text()) for stage in results]
    assert [point["validation_kl"] for point in curves[1]] == pytest.approx(
        [point["validation_kl"] for point in curves[0]], rel=1e-3
    )
    assert not list(results[1].glob("training*"))
    weights = [load_file(stage / "checkpoint/model.safetensors") for stage in results]
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-3)


def set_tokens(path: Path, tokens: int) -> None:
    recipe = path / "recipe.yaml"
    text = recipe.read_text()
    assert "tokens: 8192" in text
    recipe.write_text(text.replace("tokens: 8192", f"tokens: {tokens}\n  batch_size: 12"))


def await_file(path: Path, name: str, process: "subprocess.Popen[str]") -> None:
    while not list(path.glob(f"stages/distil-*/{name}")):
        assert process.poll() is None, finish(process)
        time.sleep(0.05)


def steps_saved(path: Path) -> int:
    (state,) = path.glob("stages/distil-*/training*")
    return int(state.name.removeprefix("training"))


def test_other_commands_are_for_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(cli, "end", ended.append)
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    cli.main(["search", "run"])
    assert ended == [2]
    assert (
        capsys.readouterr().err
        == "puzzle, process 1: torchrun: search is for one process; only distil is for several\n"
    )


def test_shares_are_all_of_a_batch_and_an_empty_one_counts_nothing() -> None:
    tokens_BT = torch.arange(10).reshape(5, 2)
    batch = Batch("", tokens_BT, tokens_BT + 1, tokens_BT + 2)
    for size in (1, 2, 3, 5, 7):
        shares = [batch.share(Group(rank, size)) for rank in range(size)]
        counted = [share for share in shares if share.counted]
        assert torch.equal(torch.cat([share.tokens_BT for share in counted]), tokens_BT)
        assert all(torch.equal(share.tokens_BT, tokens_BT[share.first :][: len(share.tokens_BT)]) for share in counted)
        assert all(torch.equal(share.targets_BT, share.tokens_BT + 1) for share in shares)
        assert sum(share.num_tokens for share in shares) == batch.num_tokens
        assert all(len(share.tokens_BT) for share in shares)


def test_a_batch_that_cannot_be_shared_is_refused_with_what_can(
    pico_run: Run, pico_data: TokenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Group, "current", lambda: Group(0, 5))
    settings = pico_run.recipe.distil.model_copy(update={"batch_size": 24, "accumulate": 2})
    with pytest.raises(PuzzleError, match=r"parts of 12 .* by 5 processes; start 1, 2, 3, 4, 6, 12 of them"):
        Batches(pico_data, settings, 0, None)


def test_a_run_of_several_works_on_its_stages_alone(pico_run: Run, tmp_path: Path) -> None:
    run = replace(pico_run, path=tmp_path, only=("distil",), _used={})
    with pytest.raises(PuzzleError, match=r"search-.* not finished.*puzzle refine"):
        run.stage("search", version=1, settings={}, inputs=())
    assert not list(tmp_path.iterdir())
    follower = replace(run, leads=False)
    stage = follower.stage("distil", version=1, settings={}, inputs=())
    follower.log("a line")
    assert not list(tmp_path.iterdir())
    assert run.stage("distil", version=1, settings={}, inputs=()).path == stage.path
    assert stage.path.is_dir()
