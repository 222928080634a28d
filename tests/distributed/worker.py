"""What each process of a test does: `worker.py RUN-FOLDER JSON`."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from puzzle.child import realise
from puzzle.distill import distil, distillation_curve, gkd
from puzzle.distributed import state
from puzzle.distributed.group import end
from puzzle.distributed.tasks import open_together
from puzzle.errors import PuzzleError
from puzzle.pipeline import Pipeline
from puzzle.recipe import DistilSettings
from puzzle.runs import Run

Results = dict[str, dict[str, Any]]


def compare(run: Run, blocks: list[str], trainings: dict[str, dict[str, Any]]) -> Results:
    """Train the child of these blocks with each of the settings; the curve and where the weights are."""
    results = {}
    for name, settings in trainings.items():
        changed = {"tokens": 12 * 32 * 4, "batch_size": 12, **settings}
        distil_settings = DistilSettings.model_validate(run.recipe.distil.model_dump() | changed)
        execution = run.recipe.execution.model_copy(update={"checkpointing": name == "plain"})
        precision = "bfloat16" if name == "rounded" else "float32"
        update = {"distil": distil_settings, "precision": precision, "execution": execution}
        own = replace(run, recipe=run.recipe.model_copy(update=update))
        pipeline = Pipeline(run)
        child = realise(run, pipeline.parent, pipeline.library, tuple(blocks))
        found = distil(own, pipeline.parent, child, pipeline.data)
        results[name] = {"curve": distillation_curve(found), "weights": str(found.path / "model.safetensors")}
    return results


def disturb(run: Run, dies: int, stops: int) -> None:
    """Train the run's child; in one step a process dies if it has not done so before, in another one is to stop."""
    gradients = gkd._gradients

    def disturbed(run: Run, model: Any, batches: Any, step: int) -> Any:
        if step == dies and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == stops and os.environ["RANK"] == "2":
            os.kill(os.getpid(), signal.SIGTERM)
        return gradients(run, model, batches, step)

    gkd._gradients = disturbed
    state.SaveTimer.due = lambda timer: True  # type: ignore[method-assign]
    state.stager = lambda device: DefaultStager(StagingOptions(*[False] * 4))  # type: ignore[attr-defined]
    sys.modules["puzzle.training"].steps_between_looks = lambda seconds: 1  # type: ignore[attr-defined]
    Pipeline(run).child  # noqa: B018


def main(path: Path, job: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    try:
        with open_together(path) as run:
            if "trainings" not in job:
                disturb(run, **job)
                return 0
            results = compare(run, **job)
            if run.leads:
                (run.path / "results.json").write_text(json.dumps(results))
            run.log("speaks")
    except KeyboardInterrupt:
        return 130
    except PuzzleError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    end(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
