"""The paper's Table 17 in small: what GKD's losses are worth at equal tokens.

    python benchmarks/distil_losses.py PARENT TEXT FOLDER [SEED ...]

One child of 2x, put together once; every training takes as many steps and reads the text in the order of its seed.
The weights after the last step are compared, not the best ones.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from ablations import BASE
from setting import CHILD, opened, recipe

import puzzle.training
from puzzle import Child, Pipeline, distil, realise
from puzzle.evaluate import evaluate

TOKENS = 65_536
LOSSES = {
    "LM": (0, 0, 1),
    "cosine": (1, 0, 0),
    "KL": (0, 1, 0),
    "LM + cosine": (1, 0, 1),
    "LM + KL": (0, 1, 1),
    "cosine + KL": (1, 1, 0),
    "LM + cosine + KL": (1, 1, 1),
}
"""Weights of cosine, KL and LM."""


def main(parent: str, text: str, folder: str, *seeds: str) -> None:
    """Print and keep one row per loss and seed, and at last the table."""
    puzzle.training.best_point = lambda curve: curve[-1]
    distillation = {"tokens": TOKENS, "learning_rate": 3e-4, "batch_size": 8, "validation_tokens": 2048}
    chosen = recipe(parent, text, **BASE, distil=distillation, evaluate={"tokens": 65_536})
    rows = []
    with opened(Path(folder) / "run", chosen) as method:
        child = realise(method.run, method.parent, method.library, CHILD)
        before = quality(method, child)
        for seed in map(int, seeds or ("0", "1", "2")):
            for loss, weights in LOSSES.items():
                rows.append({"loss": loss, "seed": seed, **quality(method, trained(method, child, weights, seed))})
                print(json.dumps(rows[-1]), flush=True)
                Path(folder, "distil_losses.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("| loss | KL to the parent | test loss | next-token accuracy |\n|---|---:|---:|---:|")
    print(f"| none (before GKD) | {before['kl']:.4f} | {before['test_loss']:.4f} | {before['top1']:.2%} |")
    for loss in LOSSES:
        own = [row for row in rows if row["loss"] == loss]
        print(f"| {loss} | {spread(own, 'kl')} | {spread(own, 'test_loss')} | {spread(own, 'top1', 100)} % |")


def trained(method: Pipeline, child: Child, weights: tuple[float, float, float], seed: int) -> Child:
    """The child after GKD with these weights."""
    names = ("cosine_weight", "kl_weight", "lm_weight")
    settings = method.run.recipe.distil.model_copy(update=dict(zip(names, weights, strict=True)))
    own = method.run.recipe.model_copy(update={"distil": settings, "seed": seed})
    return distil(replace(method.run, recipe=own), method.parent, child, method.data)


def quality(method: Pipeline, child: Child) -> dict[str, float]:
    return evaluate(method.run, method.parent, child, method.data, "child")


def spread(rows: list[dict[str, float]], name: str, scale: float = 1.0) -> str:
    values = [scale * row[name] for row in rows]
    digits = 2 if scale > 1 else 4
    return f"{mean(values):.{digits}f} ± {stdev(values) if len(values) > 1 else 0:.{digits}f}"


if __name__ == "__main__":
    main(*sys.argv[1:])
