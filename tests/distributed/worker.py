"""What each process of a test does: `worker.py RUN-FOLDER JSON`."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import puzzle.training
from puzzle.child import realise
from puzzle.distill import distil, distillation_curve, trainer
from puzzle.distributed.group import end, launched_rank, launched_size
from puzzle.distributed.together import open_together
from puzzle.errors import PuzzleError
from puzzle.pipeline import Pipeline
from puzzle.recipe import DistilSettings
from puzzle.runs import Run, open_run

torch.set_num_threads(1)
TAKE_STEP = trainer.Training._step


def compare(run: Run, blocks: list[str], trainings: dict[str, dict[str, Any]]) -> None:
    """Train the child of these blocks with each of the settings; losses, curve and weights go to results.json."""
    results = {name: train(run, tuple(blocks), name, settings) for name, settings in trainings.items()}
    if run.leads:
        (run.path / "results.json").write_text(json.dumps(results))
    run.log("reads")


def train(run: Run, blocks: tuple[str, ...], name: str, settings: dict[str, Any]) -> dict[str, Any]:
    changed = {"tokens": 12 * 32 * 4, "batch_size": 12, **settings}
    distil_settings = DistilSettings.model_validate(run.recipe.distil.model_dump() | changed)
    precision = "bfloat16" if name == "rounded" else "float32"
    recipe = run.recipe.model_copy(update={"distil": distil_settings, "precision": precision})
    pipeline, own = Pipeline(run), replace(run, recipe=recipe)
    steps = []

    def recorded(training: trainer.Training, step: int) -> dict[str, float]:
        steps.append(TAKE_STEP(training, step))
        return dict(steps[-1])

    trainer.Training._step = recorded
    child = realise(run, pipeline.parent, pipeline.library, blocks)
    found = distil(own, pipeline.parent, child, pipeline.data)
    curve = distillation_curve(found)
    return {"steps": steps, "curve": curve, "weights": str(found.path / "model.safetensors")}


def disturb(run: Run, dies: int, stops: int) -> None:
    """Train the run's child; in one step a process dies if it has not done so before, in another one is to stop."""
    puzzle.training.CHECKPOINT_INTERVAL_S = 0.0

    def step(training: trainer.Training, index: int) -> dict[str, float]:
        if index == dies and launched_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == stops and launched_rank() == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return TAKE_STEP(training, index)

    trainer.Training._step = step
    Pipeline(run).child  # noqa: B018


def main(path: Path, job: dict[str, Any]) -> int:
    try:
        with open_together(path) if launched_size() > 1 else open_run(path) as run:
            if "trainings" in job:
                compare(run, **job)
            else:
                disturb(run, **job)
    except KeyboardInterrupt:
        return 130
    except PuzzleError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    code = main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    if launched_size() > 1:
        end(code)
    sys.exit(code)
