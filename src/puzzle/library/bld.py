"""Blockwise local distillation (paper section 2.2): students of many layers trained at once, each alone.

Each learns from the parent's own input to its layer. One pass of the parent over the text feeds every student of the
layers in memory; how many these are changes no result, since students share nothing but the text.

    variants/DIGEST.json           what came of one student; shared by every library of the run folder
    variants/DIGEST.safetensors    its weights; none for a variant without weights

The digest is that of everything that the result follows from, so that nothing is trained twice.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from puzzle.artefacts import LibraryRow
from puzzle.data import TokenData
from puzzle.library.students import Student, fit, held_out, student_texts, update_projections
from puzzle.parents import Parent
from puzzle.runs import Run, digest, progress, read_json, write_json, write_tensors
from puzzle.stages import BLD_BYTES
from puzzle.streams import LayerPass, Stream, Texts
from puzzle.training import remove_states, saved_names
from puzzle.variants import State, Variant

_BYTES_PER_FIXED_PARAMETER = 12
"""What is left of them in a least-squares update: weight, best so far, and the copy that is compared with it."""


@dataclass(frozen=True)
class StudentPlan:
    """A student before it is built, and where its result is kept."""

    layer: int
    variants: Sequence[Variant]
    """One, or two that are trained as a whole block."""
    num_params: int
    build: Callable[[], Student]
    identity: Any
    """What its weights follow from, beside layer and variants."""

    @cached_property
    def _named(self) -> dict[str, Any]:
        """What its row in the library's index says before any training."""
        subblock = self.variants[0].subblock if len(self.variants) == 1 else "block"
        variant = "+".join(each.name for each in self.variants)
        file = f"variants/{digest([self.identity, self.layer, subblock, variant])[:24]}.safetensors"
        return {"layer": self.layer, "subblock": subblock, "variant": variant, "file": file, "widened_from": ""}

    def result(self, root: Path) -> LibraryRow | None:
        """What came of it; None if it is not trained yet."""
        file = (root / self._named["file"]).with_suffix(".json")
        return LibraryRow(**read_json(file)) if file.exists() else None

    def write(self, root: Path, state: State, **losses: Any) -> None:
        """Keep what came of it."""
        weights = root / self._named["file"]
        weights.parent.mkdir(exist_ok=True)
        if state:
            write_tensors(weights, state)
        write_json(weights.with_suffix(".json"), self._named | ({} if state else {"file": ""}) | losses)


def train_students(
    run: Run, parent: Parent, data: TokenData, plans: Callable[[], list[StudentPlan]], layers: range, folder: Path
) -> None:
    """Train what these layers lack, as many layers at a time as fit the memory. A task, also in another process.

    Args:
        plans: of all layers; called here, since students cannot be sent.
        folder: for activations and training state, from which a training that was cut off goes on.
    """
    missing = defaultdict(list)
    for plan in plans():
        if plan.layer in layers and plan.result(run.path) is None:
            missing[plan.layer].append(plan)
    if not missing:
        return
    stream, settings = Stream(run, parent, folder / "activations"), run.recipe.library
    steps = math.ceil(settings.tokens / (settings.batch_size * data.sequence_length))
    calibration = partial(data.inputs, "calibration", settings.batch_size, run.recipe.calibration.tokens)
    texts: Texts = {**student_texts(data, run.recipe, settings.batch_size, steps), "calibration": calibration}
    begun = {int(name.partition(".")[0]) for name in saved_names(folder)}

    def training_bytes(layer: int) -> int:
        return BLD_BYTES * sum(plan.num_params for plan in missing[layer])

    for group in stream.groups(sorted(missing), training_bytes, range(min(begun), max(begun) + 1) if begun else ()):
        stream.prepare(group.start, texts)
        together = [plan for layer in group for plan in missing.pop(layer, [])]
        _train_group(run, stream, texts, group, together, steps, folder)
    stream.close()


def _train_group(
    run: Run, stream: Stream, texts: Texts, layers: range, plans: Sequence[StudentPlan], steps: int, folder: Path
) -> None:
    """The students of the layers in memory, from their start to files on disk.

    Start, held-out loss, training, least squares; of each student, what did best on held-out text is kept (law 4).
    FFNs start from their closed form. Attention starts from merged heads, and the least-squares update of these is a
    result alone: an output projection fitted to merged heads is small where they are wrong, which keeps them from
    learning, so that training from it ends worse (benchmarks/library.md).
    """
    settings, students = run.recipe.library, [plan.build() for plan in plans]
    label = f"BLD of layer {layers[0]}" if len(layers) == 1 else f"BLD of layers {layers[0]}-{layers[-1]}"
    moment_bytes = stream.room(layers) - _BYTES_PER_FIXED_PARAMETER * sum(plan.num_params for plan in plans)

    def passes(text: str, first: int = 0) -> Iterator[Iterator[LayerPass]]:
        return stream.passes(layers, text, texts[text](), first)

    def update(some: Sequence[Student]) -> None:
        update_projections(some, lambda: chain.from_iterable(passes("calibration")), moment_bytes)

    def keep_better(some: Sequence[Student]) -> None:
        """Take the losses and weights of students that are better than before."""
        found = held_out(some, passes("validation"))
        for student in some:
            if found[student.name].loss < best[student.name][0]:
                best[student.name] = found[student.name].loss, student.state()

    merged = [s for s in students if s.subblock == "attention" and settings.start == "closed_form"]
    starts = [student.state() for student in merged]
    update(merged)
    losses = held_out(students, passes("validation"))
    best = {student.name: (losses[student.name].loss, student.state()) for student in students}
    for student, start in zip(merged, starts, strict=True):
        for name, parameter in student.parameters().items():
            parameter.data.copy_(start[name])

    trained = [student for student in students if student.parameters()]
    if trained and steps:
        rate, precision = settings.learning_rate, getattr(torch, run.recipe.precision)
        with progress(label, steps) as bar:
            text = partial(passes, "training")
            done = fit(trained, text, steps=steps, learning_rate=rate, precision=precision, folder=folder, bar=bar)
        for name in done.diverged:
            run.log_warning(f"{label}: {name} diverged and stopped; lower library.learning_rate")
        keep_better(trained)
        if settings.least_squares:
            update(trained)
            keep_better(trained)
        if rest := sum(best[student.name][0] == losses[student.name].loss for student in trained):
            run.log(f"{label}: {rest} of {len(trained)} became no better and keep their start")
    for plan, student in zip(plans, students, strict=True):
        (loss, state), tokens = best[student.name], settings.tokens if student in trained else 0
        plan.write(run.path, state, initial_loss=losses[student.name].loss, loss=loss, trained_tokens=tokens)
    remove_states(folder)
