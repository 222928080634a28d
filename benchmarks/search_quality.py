"""What the search is worth: true KL of its children and of the baselines', at equal predicted speed, also after GKD.

    python benchmarks/search_quality.py PARENT TEXT FOLDER [SPEEDS [SEEDS [GKD_TOKENS]]]

SPEEDS such as 1.3x,2x,3x; SEEDS such as 0,1,2, each with a library and scores of its own; with GKD_TOKENS all children
are also distilled on so many. All children of a speed meet one bound by one cost table, FOLDER/costs.json. Rows
are kept in FOLDER/rows.jsonl as they are finished, and none is made twice.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from setting import opened, recipe

from puzzle import CostTable, Pipeline, Recipe, distil, realise, solve, true_scores
from puzzle.errors import PuzzleError
from puzzle.evaluate import evaluate
from puzzle.recipe import TargetSettings
from puzzle.runs import Run
from puzzle.search import BASELINES, correct, solve_baseline


def main(parent: str, text: str, folder: str, speeds: str = "1.3x,2x,3x", seeds: str = "0", gkd: str = "0") -> None:
    """Print and keep one row per seed, speed and method."""
    rows_file, run = Path(folder) / "rows.jsonl", Path(folder) / "run"
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()] if rows_file.exists() else []
    table = Path(folder) / "costs.json"
    if not table.exists():
        with opened(run, settings(parent, text, 0)) as pipeline:
            table.write_text(pipeline.costs.to_json())
    costs = CostTable.from_json(table.read_text())
    for seed in map(int, seeds.split(",")):
        with opened(run, settings(parent, text, seed)) as pipeline:
            for row in measured(pipeline, costs, seed, speeds.split(","), int(gkd), rows):
                rows.append(row)
                print(json.dumps(row), flush=True)
                rows_file.write_text("".join(json.dumps(each) + "\n" for each in rows))


def settings(parent: str, text: str, seed: int) -> Recipe:
    """The recipe of the ablations."""
    base = recipe(
        parent,
        text,
        space={"kv_heads": [3, 1], "ffn_widths": [256, 128, 64]},
        library={"tokens": 65_536, "learning_rate": 3e-3, "batch_size": 4, "validation_tokens": 16_384},
        score={"tokens": 8192},
        correct={"tokens": 8192, "pool": 16},
        distil={"batch_size": 4, "validation_tokens": 4096},
        evaluate={"tokens": 16_384},
    )
    return base.model_copy(update={"seed": seed})


def measured(
    pipeline: Pipeline, costs: CostTable, seed: int, speeds: Sequence[str], gkd: int, known: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows that are not known yet."""
    done = {(row["seed"], row["speed"], row["method"], row["gkd"]) for row in known}
    for speed in speeds:
        for method, find in methods(pipeline, costs, speed).items():
            missing = [tokens for tokens in dict.fromkeys((0, gkd)) if (seed, speed, method, tokens) not in done]
            if not missing:
                continue
            where = {"seed": seed, "speed": speed, "method": method}
            try:
                blocks, facts = find()
            except PuzzleError as error:
                yield {**where, "gkd": 0, "error": str(error)}
                continue
            for tokens in missing:
                yield {**where, "gkd": tokens, **facts, **quality(pipeline, blocks, tokens), "blocks": blocks}


def methods(
    pipeline: Pipeline, costs: CostTable, speed: str
) -> dict[str, Callable[[], tuple[tuple[str, ...], dict[str, float]]]]:
    """By name, how each finds its blocks, with what it knows of them."""
    target = TargetSettings.model_validate({"throughput": speed})
    tables = replace(pipeline.tables, costs=costs, target=target)
    first = solve(tables)

    def corrected() -> tuple[tuple[str, ...], dict[str, float]]:
        its = replace(pipeline.run, recipe=pipeline.run.recipe.model_copy(update={"target": target}))
        evaluate = partial(true_scores, pipeline.run, pipeline.parent, pipeline.data, pipeline.library)
        found = correct(its, tables, first, evaluate, pipeline.library, pipeline.data)
        return found.ranked[0].blocks, {"scoring kl": min(each.kl for each in found.evaluated)}

    def baseline(name: str) -> tuple[tuple[str, ...], dict[str, float]]:
        found = solve_baseline(tables, name, pipeline.run.recipe.seed)
        return found.blocks, {"sum of scores": found.score}

    own = {"search": lambda: (first.blocks, {"sum of scores": first.score}), "pool 16": corrected}
    return own | {name: (lambda name=name: baseline(name)) for name in BASELINES}


def quality(pipeline: Pipeline, blocks: tuple[str, ...], gkd: int) -> dict[str, float]:
    """On test text."""
    run: Run = pipeline.run
    child = realise(run, pipeline.parent, pipeline.library, blocks)
    if gkd:
        changed = run.recipe.distil.model_copy(update={"tokens": gkd})
        run = replace(run, recipe=run.recipe.model_copy(update={"distil": changed}))
        child = distil(run, pipeline.parent, child, pipeline.data)
    found = evaluate(run, pipeline.parent, child, pipeline.data, "child")
    return {"kl": found["kl"], "loss": found["test_loss"]}


if __name__ == "__main__":
    main(*sys.argv[1:])
