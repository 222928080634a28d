"""What one pass over the text for everything saves: BLD of all variants together, against one variant after another.

    python benchmarks/one_pass.py PARENT TEXT

Process CPU time of both ways in one process, on one thread.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from setting import opened, recipe

from puzzle import Pipeline
from puzzle.library import Student
from puzzle.library.bld import student_plans, students_at_start
from puzzle.library.students import Stack
from puzzle.streams import Stream

STEPS, BATCH = 3, 8


def main(parent: str, text: str) -> None:
    """Print the comparison."""
    torch.set_num_threads(1)
    with opened(Path(tempfile.mkdtemp()) / "run", recipe(parent, text, calibration={"tokens": 32_768})) as method:
        together, apart = time_bld(method)
    print(f"together {together:.1f} s, apart {apart:.1f} s of processor time: {apart / together:.1f} times")


def time_bld(method: Pipeline) -> tuple[float, float]:
    """All trained variants in one pass of the parent, against a pass up to its own layer for each variant."""
    plans = student_plans(method.parent, method.space, None, None)
    built = students_at_start(method.run, method.parent, method.statistics, None, plans)
    students = [student for student in built.values() if student.parameters()]
    stream = Stream(method.run, method.parent, method.run.path / "activations")
    batches = [method.data.training_batch(step, BATCH, 0)[:, :-1] for step in range(STEPS)]

    def train(some: Sequence[Student]) -> None:
        optimizer = torch.optim.AdamW([p for s in some for p in s.parameters().values()], fused=True)
        layers = range(max(student.layer for student in some) + 1)
        for layer_passes in stream.passes(layers, "training", batches):
            for seen in layer_passes:
                for student in some:
                    if student.layer == seen.index:
                        Stack([student]).losses(seen).backward()
            optimizer.step()
            optimizer.zero_grad()

    train(students[:1])
    print(f"{len(students)} students on {STEPS} batches of {batches[0].numel()} tokens")
    return seconds(lambda: train(students)), seconds(lambda: [train([student]) for student in students])


def seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main(*sys.argv[1:])
