"""What one pass over the text for everything saves: BLD of all variants together, and scores by suffix recomputation.

    python benchmarks/one_pass.py PARENT TEXT

Process CPU time of both ways in one process, in turns, on one thread.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from puzzle import Library, Pipeline, Recipe, create_folder, open_run
from puzzle.blocks import Architecture
from puzzle.child import assemble
from puzzle.library.bld import _parent_pass, _students
from puzzle.library.students import Student
from puzzle.metrics import compare
from puzzle.scores.replace_one import _run_layers, _score_layer, _Texts

STEPS = 3
SCORED_LAYERS = (0, 3, 6, 9)


def main(parent: str, text: str) -> None:
    """Print a line per comparison."""
    torch.set_num_threads(1)
    shares = dict.fromkeys(("calibration", "validation", "scoring", "test"), 0.15)
    recipe = Recipe.model_validate(
        {
            "parent": parent,
            "data": {"source": text, "sequence_length": 256, **shares},
            "calibration": {"tokens": 32_768},
            "library": {"tokens": 2048, "validation_tokens": 2048},
            "score": {"tokens": 1024},
            "target": {"throughput": "2x"},
        }
    )
    folder = Path(tempfile.mkdtemp()) / "run"
    create_folder(folder, recipe)
    with open_run(folder) as run:
        method = Pipeline(run)
        report("BLD", *time_bld(method))
        report("scores", *time_scores(method, method.library))


def report(what: str, together: float, apart: float) -> None:
    print(f"{what}: together {together:.1f} s, apart {apart:.1f} s of processor time: {apart / together:.1f} times")


def time_bld(method: Pipeline) -> tuple[float, float]:
    """All trained variants in one pass of the parent, against a pass up to its own layer for each variant."""
    model = method.parent.load()
    students = [
        student
        for layer in range(len(method.space.layers))
        for student in _students(method.parent, method.statistics, method.space, layer, torch.device("cpu"))
        if not student.variant.closed_form
    ]
    batches = [method.data.training_batch(step, 8, 0)[:, :-1] for step in range(STEPS)]

    def train(group: list[Student]) -> None:
        optimizer = torch.optim.AdamW([p for s in group for p in s.parameters().values()], fused=True)
        for tokens_BT in batches:
            for waiting, hidden_BTD, target_BTD, context in _parent_pass(model, tokens_BT, group):
                for student in waiting:
                    student.loss(hidden_BTD, target_BTD, context).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(students[:1])
    return seconds(lambda: train(students)), seconds(lambda: [train([student]) for student in students])


@torch.no_grad()
def time_scores(method: Pipeline, library: Library) -> tuple[float, float]:
    """Composed blocks of a few layers by suffix recomputation, against a forward of the whole model for each."""
    model = method.parent.load()
    texts = _Texts.start(model, method.data, method.run)
    (sequences,) = method.data.batches("scoring", 4, 1024)
    together = apart = 0.0
    for index, layer_space in enumerate(method.space.layers):
        if index in SCORED_LAYERS:
            together += seconds(lambda i=index, space=layer_space: _score_layer(model, texts, library, i, space))
            blocks = list(method.parent.architecture.blocks)
            for block in layer_space.blocks():
                blocks[index] = block
                child = assemble(method.parent, library, Architecture(tuple(blocks)))

                def score(child=child) -> None:  # type: ignore[no-untyped-def]
                    hidden_BTD = _run_layers(child, child.model.embed_tokens(sequences[:, :-1]), first=0)
                    final_ND = texts.final_BTD[0].flatten(0, 1)
                    compare(model, model, final_ND, [hidden_BTD.flatten(0, 1)], sequences[:, 1:].flatten())

                apart += seconds(score)
        texts.advance(model, index)
    return together, apart


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main(*sys.argv[1:])
