"""What scores cost, what the race saves, and how far cheaper scores agree with replace-1-block KL.

    python benchmarks/scoring.py PARENT TEXT FOLDER [LAYERS]

Processor time of one thread, all in one process. Blocks of `LAYERS` (`0,4,9`) are scored, with 64 sequences of 256.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from setting import opened, recipe
from torch import Tensor

from puzzle import Library, Pipeline, ScoreTable, build_library, score
from puzzle.blocks import Architecture, BlockVariant, LayerSpace, Space
from puzzle.child import assemble
from puzzle.metrics import compare
from puzzle.modeling import PuzzleForCausalLM
from puzzle.runs import read_tensors
from puzzle.scores.race import _smaller, _sizes, _sum, rounds
from puzzle.scores.suffix import LayerBlocks, SuffixScorer

LAYERS, TOKENS, RACE = (0, 2, 5, 7, 9), 16_384, 0.0625
FULL_FORWARDS = 3
"""Candidates a layer that are timed by a forward of the whole model; the others are taken to need as long."""
FISHER_SEQUENCES, FISHER_SAMPLES = 32, 4
Scores = dict[tuple[int, str], float]


def main(parent: str, text: str, folder: str, layers: str = "") -> None:
    """Print the tables of scoring.md."""
    torch.set_num_threads(1)
    chosen = tuple(int(layer) for layer in layers.split(",")) if layers else LAYERS
    path = Path(folder) / "run"
    library_settings = {"tokens": 32_768, "validation_tokens": 8192}
    times: dict[str, float] = {}
    tables: dict[str, ScoreTable] = {}
    for name, race in (("suffix, with race", RACE), ("suffix, no race", None)):
        settings = recipe(parent, text, library=library_settings, score={"tokens": TOKENS, "race": race})
        with opened(path, settings) as method:
            space, library = prepared(method, chosen)
            with parts_timed() as parts:
                began = time.process_time()
                tables[name] = score(method.run, method.parent, method.data, library, space)
                times[name] = time.process_time() - began
            print(f"{name}: {times[name]:.1f} s, of these " + ", ".join(f"{k} {v:.1f}" for k, v in parts.items()))
            if race is None:
                times["full forwards"] = time_full_forwards(method, library, chosen)
                report_times(times)
                stage = next(path.glob("stages/score-*/layer000.safetensors")) if False else None
                report_proxies(method, library, chosen, tables[name], times[name])
    report_race(method, chosen, tables, path)


def prepared(method: Pipeline, layers: tuple[int, ...]) -> tuple[Space, Library]:
    """The space with alternatives in `layers` alone, and its library."""
    own = (LayerSpace(layer.attention[:1], layer.ffn[:1]) for layer in method.full_space.layers)
    space = Space(
        tuple(layer if i in layers else alone for i, (layer, alone) in enumerate(zip(method.full_space.layers, own)))
    )
    return space, build_library(method.run, method.parent, method.data, method.statistics, space)
