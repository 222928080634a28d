"""The paper's ablations in small: what the child's KL before GKD owes to each choice, at equal measured cost.

    python benchmarks/ablations.py PARENT TEXT FOLDER [ABLATION ...]

Every child meets the same bound on predicted speed from the same cost table; its KL is measured on test text.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from setting import opened, recipe

from puzzle import CostTable, Pipeline, Recipe, realise, refine, solve
from puzzle.evaluate import evaluate

SPEEDS = ("1.5x", "2x", "3x")
SPACE = {"kv_heads": [3, 1], "ffn_widths": [256, 128, 64]}
BASE: dict[str, dict[str, Any]] = {
    "space": SPACE,
    "library": {"tokens": 65_536, "learning_rate": 3e-3, "batch_size": 4, "validation_tokens": 16_384},
    "score": {"tokens": 8192},
}
ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "as it is (decoupled, 65k tokens, KL)": {},
    "BLD 0 tokens": {"library": {"tokens": 0}},
    "BLD 16k tokens": {"library": {"tokens": 16_384}},
    "BLD 262k tokens": {"library": {"tokens": 262_144}},
    "paper's starts": {"library": {"start": "paper", "channels": "independent", "least_squares": False}},
    "loss on the block's output": {"library": {"loss": "block"}},
    "coupled, 2 x 2 of a layer": {"library": {"coupled": 2}},
    "refined, 65k tokens a layer": {"refine": {"tokens": 65_536, "batch_size": 4}},
    "scores: LM loss": {"search": {"score": "lm_loss"}},
    "scores: cosine": {"search": {"score": "cosine"}},
    "scores: every block on all tokens": {"score": {"composed_share": None}},
    "no-op only": {"space": {"kv_heads": [], "ffn_widths": [], "attention": ["none"], "ffn": ["none"]}},
}


def main(parent: str, text: str, folder: str, *chosen: str) -> None:
    """Print and keep one row per ablation, all or the chosen ones, and speed."""
    rows, run = [], Path(folder) / "run"
    with opened(run, settings(parent, text, {})) as pipeline:
        costs = pipeline.costs
    for name, changes in ((name, ABLATIONS[name]) for name in chosen or ABLATIONS):
        with opened(run, settings(parent, text, changes)) as pipeline:
            for speed in SPEEDS:
                rows.append({"ablation": name, "speed": speed, **child(pipeline, costs, speed)})
                print(json.dumps(rows[-1]), flush=True)
        Path(folder, "ablations.jsonl").write_text("\n".join(map(json.dumps, rows)))


def settings(parent: str, text: str, changes: dict[str, dict[str, Any]]) -> Recipe:
    """The base recipe with some settings changed."""
    return recipe(parent, text, **{name: BASE.get(name, {}) | changes.get(name, {}) for name in {*BASE, *changes}})


def child(pipeline: Pipeline, costs: CostTable, speed: str) -> dict[str, float]:
    """The best architecture at this speed by the one cost table, and its KL on test text."""
    run = pipeline.run
    target = type(run.recipe.target).model_validate({"throughput": speed})
    solution = solve(replace(pipeline.tables, costs=costs, target=target))
    realised = realise(run, pipeline.parent, pipeline.library, solution.blocks)
    made = refine(run, pipeline.parent, realised, pipeline.data)
    quality = evaluate(run, pipeline.parent, made, pipeline.data, "child")
    return {"sum of scores": solution.score, "kl": quality["kl"], "loss": quality["test_loss"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
