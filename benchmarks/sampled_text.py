"""Text that the parent writes against real text: one child, equal tokens, judged on real text.

    python benchmarks/sampled_text.py PARENT TEXT FOLDER [SEED ...]

The child of `setting.CHILD` with blocks trained on real text or on the parent's, then GKD on either.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from ablations import BASE
from distil_losses import spread
from setting import CHILD, opened, recipe

from puzzle import distil, realise
from puzzle.evaluate import evaluate

TOKENS = 524_288
WAYS = (("real", "real"), ("real", "sampled"), ("sampled", "sampled"))
"""Text of calibration and BLD, and of GKD."""


def main(parent: str, text: str, folder: str, *seeds: str) -> None:
    """Print and keep one row per way and seed, and at last the table."""
    distillation = {"tokens": TOKENS, "learning_rate": 3e-4, "batch_size": 8, "validation_tokens": 16_384}
    chosen = recipe(parent, text, **BASE, distil=distillation, evaluate={"tokens": 65_536})
    written = chosen.data.model_copy(update={"source": ["parent"], "sampled_tokens": 650_000})
    rows = []
    with (
        opened(Path(folder) / "real", chosen) as real,
        opened(Path(folder) / "sampled", chosen.model_copy(update={"data": written})) as sampled,
    ):
        texts = {"real": real, "sampled": sampled}
        for blocks, tokens in WAYS:
            method = texts[blocks]
            before = realise(method.run, method.parent, method.library, CHILD)
            for seed in map(int, seeds or ("0", "1")):
                run = replace(method.run, recipe=method.run.recipe.model_copy(update={"seed": seed}))
                child = distil(run, method.parent, before, texts[tokens].data)
                found = [evaluate(real.run, real.parent, each, real.data, "child") for each in (before, child)]
                rows.append({"blocks": blocks, "GKD": tokens, "seed": seed, "kl_before": found[0]["kl"], **found[1]})
                print(json.dumps(rows[-1]), flush=True)
                Path(folder, "sampled_text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("| blocks | GKD | KL before | KL to the parent | test loss | accuracy |\n|---|---|---:|---:|---:|---:|")
    for blocks, tokens in WAYS:
        own = [row for row in rows if (row["blocks"], row["GKD"]) == (blocks, tokens)]
        cells = [spread(own, "kl_before"), spread(own, "kl"), spread(own, "test_loss"), spread(own, "top1", 100) + " %"]
        print(f"| {blocks} | {tokens} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
