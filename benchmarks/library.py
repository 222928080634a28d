"""How good variants are by start and by training: held-out loss and replace-1 KL at 0, 10, 100 and 1000 steps of BLD.

    python benchmarks/library.py PARENT TEXT FOLDER

Every number of steps is a training of its own, with its own schedule. Three layers, first, middle and last but one.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from setting import opened, recipe

from puzzle import Pipeline, Space, build_library, score
from puzzle.variants import SUBBLOCKS, LayerSpace, Subblock

STEPS = (0, 10, 100, 1000)
BATCH, LENGTH = 2, 256
METHODS = {
    "paper": {"start": "paper", "channels": "independent", "least_squares": False},
    "closed form": {},
}
SPACE = {"kv_heads": [3, 1], "ffn_widths": [384, 256, 128, 64], "attention": ["linear"], "ffn": ["linear"]}


def main(parent: str, text: str, folder: str) -> None:
    """Print and keep one row per method, steps, layer and variant."""
    rows: list[dict[str, object]] = []
    for steps in STEPS:
        for method, settings in METHODS.items():
            library = {"tokens": steps * BATCH * LENGTH, "batch_size": BATCH, "learning_rate": 3e-3, **settings}
            chosen = recipe(parent, text, space=SPACE, library=library, score={"tokens": 8192, "composed_share": None})
            with opened(Path(folder) / "run", chosen) as pipeline:
                rows += [{"method": method, "steps": steps, **row} for row in measure(pipeline)]
            Path(folder, "library.jsonl").write_text("\n".join(map(json.dumps, rows)))


def measure(pipeline: Pipeline) -> Iterator[dict[str, object]]:
    """Held-out loss and replace-1 KL of every variant beside the parent's other subblock."""
    run, parent, data = pipeline.run, pipeline.parent, pipeline.data
    space = thinned(pipeline.space)
    library = build_library(run, parent, data, pipeline.statistics, space)
    for subblock in SUBBLOCKS:
        beside = Space(tuple(_alone(layer, subblock) for layer in space.layers))
        scores = score(run, parent, data, library, beside)
        for row in library.index.rows:
            if row.subblock == subblock:
                own = space.layers[row.layer].parent
                block = f"{row.variant}+{own.ffn}" if subblock == "attention" else f"{own.attention}+{row.variant}"
                kl = scores.by_key[row.layer, block].kl
                yield {"layer": row.layer, "subblock": subblock, "variant": row.variant, "loss": row.loss, "kl": kl}


def _alone(layer: LayerSpace, subblock: Subblock) -> LayerSpace:
    return (
        LayerSpace(layer.attention, layer.ffn[:1])
        if subblock == "attention"
        else LayerSpace(layer.attention[:1], layer.ffn)
    )


def thinned(space: Space) -> Space:
    """Alternatives in three layers alone."""
    last = len(space.layers) - 1
    kept = (0, last // 2, last - 1)
    return Space(
        tuple(
            layer if index in kept else LayerSpace(layer.attention[:1], layer.ffn[:1])
            for index, layer in enumerate(space.layers)
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
