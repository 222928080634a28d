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
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from puzzle.artefacts import LibraryRow
from puzzle.data import TokenData
from puzzle.library.least_squares import update_projections
from puzzle.library.students import Student, fit, held_out_losses
from puzzle.parents import Parent
from puzzle.runs import Run, digest, progress, read_json, write_json, write_tensors
from puzzle.stages import BLD_BYTES
from puzzle.streams import LayerPass, Stream, Texts
from puzzle.training import remove_states, saved_names
from puzzle.variants import State

_BYTES_PER_FIXED_PARAMETER = 12
"""What is left of them in a least-squares update: weight, best so far, and the copy that is compared with it."""


@dataclass(frozen=True)
class StudentPlan:
    """A student before it is built, and where its result is kept."""

    row: LibraryRow
    """Of its result, losses still missing."""
    num_params: int
    build: Callable[[], Student]

    @classmethod
    def of(
        cls, layer: int, subblock: str, variant: str, num_params: int, identity: Any, build: Callable[[], Student]
    ) -> "StudentPlan":
        """The plan of a variant.

        Args:
            identity: what its weights follow from, beside layer, subblock and variant.
        """
        name = digest([identity, layer, subblock, variant])[:24]
        row = LibraryRow(
            layer=layer,
            subblock=subblock,
            variant=variant,
            file=f"variants/{name}.safetensors",
            widened_from="",
            initial_loss=math.nan,
            loss=math.nan,
            trained_tokens=0,
        )
        return cls(row, num_params, build)

    def result(self, root: Path) -> LibraryRow | None:
        """What came of it; None if it is not trained yet."""
        file = (root / self.row.file).with_suffix(".json")
        return LibraryRow(**read_json(file)) if file.exists() else None

    def write(self, root: Path, state: State, **losses: Any) -> None:
        """Keep what came of it."""
        weights = root / self.row.file
        weights.parent.mkdir(exist_ok=True)
        if state:
            write_tensors(weights, state)
        row = replace(self.row, file=self.row.file if state else "", **losses)
        write_json(weights.with_suffix(".json"), asdict(row))


def train_students(run: Run, parent: Parent, data: TokenData, plans: Sequence[StudentPlan], folder: Path) -> None:
    """Train what is not finished yet, as many layers at a time as fit the memory.

    Args:
        folder: for activations and training state, from which a training that was cut off goes on.
    """
    missing = defaultdict(list)
    for plan in plans:
        if plan.result(run.path) is None:
            missing[plan.row.layer].append(plan)
    if not missing:
        return
    stream, settings = Stream(run, parent, folder / "activations"), run.recipe.library
    steps = math.ceil(settings.tokens / (settings.batch_size * data.sequence_length))
    texts = _texts(run, data, steps)
    begun = {int(name.partition(".")[0]) for name in saved_names(folder)}

    def training_bytes(layer: int) -> int:
        return BLD_BYTES * sum(plan.num_params for plan in missing[layer])

    for layers in stream.groups(sorted(missing), training_bytes, range(min(begun), max(begun) + 1) if begun else ()):
        stream.prepare(layers.start, texts)
        stream.hold(layers)
        together = [plan for layer in layers for plan in missing.pop(layer, [])]
        _Group(run, stream, texts, layers, together, folder).train(steps)
    stream.close()


def _texts(run: Run, data: TokenData, steps: int) -> Texts:
    settings, seed = run.recipe.library, run.recipe.seed
    batch_size = settings.batch_size

    def training() -> Iterator[Tensor]:
        return (data.training_batch(step, batch_size, seed)[:, :-1] for step in range(steps))

    def validation() -> Iterator[Tensor]:
        return (each[:, :-1] for each in data.batches("validation", batch_size, settings.validation_tokens))

    def calibration() -> Iterator[Tensor]:
        return (each[:, :-1] for each in data.batches("calibration", batch_size, run.recipe.calibration.tokens))

    return {"training": training, "validation": validation, "calibration": calibration}


@dataclass
class _Best:
    """A student's loss before training, and its best loss and weights so far."""

    initial_loss: float
    loss: float
    state: State


class _Group:
    """The students of the layers in memory, from their start to files on disk."""

    def __init__(
        self, run: Run, stream: Stream, texts: Texts, layers: range, plans: Sequence[StudentPlan], folder: Path
    ) -> None:
        self._run, self._plans, self._folder, self._settings = run, plans, folder, run.recipe.library
        self._stream, self._texts, self._layers = stream, texts, layers
        self._students = [plan.build() for plan in plans]
        fixed_bytes = _BYTES_PER_FIXED_PARAMETER * sum(plan.num_params for plan in plans)
        self._moment_bytes = stream.room(layers) - fixed_bytes
        self._label = f"BLD of layer {layers[0]}" if len(layers) == 1 else f"BLD of layers {layers[0]}-{layers[-1]}"

    def train(self, steps: int) -> None:
        """Start, held-out loss, training, least squares; of each student what did best on held-out text (law 4)."""
        best = self._start()
        trained = [student for student in self._students if student.parameters()]
        if trained and steps:
            self._fit(trained, steps)
            improved = self._keep_better(best, trained)
            if self._settings.least_squares:
                self._update_projections(trained)
                improved |= self._keep_better(best, trained)
            if rest := len(trained) - len(improved):
                self._run.log(f"{self._label}: {rest} of {len(trained)} became no better and keep their start")
        for plan, student in zip(self._plans, self._students, strict=True):
            found, tokens = best[student.name], self._settings.tokens if student in trained else 0
            losses = {"initial_loss": found.initial_loss, "loss": found.loss, "trained_tokens": tokens}
            plan.write(self._run.path, found.state, **losses)
        remove_states(self._folder)

    def _start(self) -> dict[str, _Best]:
        """Every student before training, its closed form included.

        FFNs start from their closed form. Attention starts from merged heads, and the least-squares update of these is
        a result alone: an output projection fitted to merged heads is small where they are wrong, which keeps them from
        learning, so that training from it ends worse (benchmarks/library.md).
        """
        closed_form = self._settings.start == "closed_form"
        attention = [student for student in self._students if student.subblock == "attention" and closed_form]
        merged = {student.name: student.state() for student in attention}
        self._update_projections(attention)
        losses = held_out_losses(self._students, self._passes("validation"))
        best = {s.name: _Best(losses[s.name], losses[s.name], s.state()) for s in self._students}
        for student in attention:
            for name, parameter in student.parameters().items():
                parameter.data.copy_(merged[student.name][name])
        return best

    def _keep_better(self, best: dict[str, _Best], students: Sequence[Student]) -> set[str]:
        """Take the weights of students that are better than before; their names."""
        losses = held_out_losses(students, self._passes("validation"))
        better = [student for student in students if losses[student.name] < best[student.name].loss]
        for student in better:
            best[student.name] = replace(best[student.name], loss=losses[student.name], state=student.state())
        return {student.name for student in better}

    def _fit(self, students: Sequence[Student], steps: int) -> None:
        with progress(self._label, steps) as bar:
            trained = fit(
                students,
                lambda first: self._passes("training", first),
                steps=steps,
                learning_rate=self._settings.learning_rate,
                precision=getattr(torch, self._run.recipe.precision),
                folder=self._folder,
                bar=bar,
            )
        for name in trained.diverged:
            self._run.log_warning(f"{self._label}: {name} diverged and stopped; lower library.learning_rate")

    def _update_projections(self, students: Sequence[Student]) -> None:
        update_projections(students, lambda: chain.from_iterable(self._passes("calibration")), self._moment_bytes)

    def _passes(self, text: str, first: int = 0) -> Iterator[Iterator[LayerPass]]:
        return self._stream.passes(self._layers, text, self._texts[text](), first)
