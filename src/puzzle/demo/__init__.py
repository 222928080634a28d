"""`puzzle demo`: the whole method on a small real model, on the CPU, in minutes, without a network."""

from pathlib import Path

from puzzle.demo.pretrain import demo_data, demo_parent
from puzzle.pipeline import plan, run_stage
from puzzle.recipe import Recipe
from puzzle.runs import check_new, create_folder, is_run_folder, open_run

# How the time is divided; two children are distilled. Measuring comes on top.
_PARENT_SHARE, _LIBRARY_SHARE, _SCORE_SHARE, _DISTIL_SHARE = 0.37, 0.10, 0.07, 0.16

# Tokens per second of each step, relative to training the parent (measured at the demo's sizes, 2 cores, 2026-11-27).
_LIBRARY_SPEED, _SCORE_SPEED, _DISTIL_SPEED = 0.2, 0.03, 0.45


def demo(out: Path | None, minutes: float) -> None:
    """Train a small parent if there is none yet, then make a child of twice its generation throughput."""
    folder = out or Path("runs") / "demo"
    check_new(folder)
    seconds = 60 * minutes
    print("parent: a Llama of 2M parameters, trained on the source of this Python's standard library", flush=True)
    parent, corpus, speed = demo_parent(_PARENT_SHARE * seconds)
    if not is_run_folder(folder):
        create_folder(folder, demo_recipe(parent, corpus, seconds, speed))
    with open_run(folder) as run:
        for line in plan(run.recipe):
            run.log(line)
        run_stage(run, "report")


def demo_recipe(parent: Path, corpus: Path, seconds: float, speed: float) -> Recipe:
    """The recipe that fits the time.

    Args:
        speed: tokens per second at which this machine trains the parent.
    """

    def tokens(share: float, relative_speed: float) -> int:
        return max(4096, round(seconds * share * speed * relative_speed))

    return Recipe.model_validate(
        {
            "parent": str(parent),
            "data": demo_data(corpus).model_dump(exclude_unset=True),
            "calibration": {"tokens": 65_536},
            "library": {"tokens": tokens(_LIBRARY_SHARE, _LIBRARY_SPEED), "learning_rate": 5e-3},
            "score": {"tokens": tokens(_SCORE_SHARE, _SCORE_SPEED)},
            "scenario": {"batch_sizes": [64], "prompt_tokens": 256, "generated_tokens": 64},
            "target": {"throughput": "2x"},
            "correct": {"tokens": 4096},
            "distil": {"tokens": tokens(_DISTIL_SHARE, _DISTIL_SPEED), "learning_rate": 1e-3},
            "evaluate": {"tokens": 65_536},
            "execution": {"device": "cpu"},
        }
    )
