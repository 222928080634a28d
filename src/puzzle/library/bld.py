"""Blockwise local distillation (paper section 2.2): students of many layers trained at once, each alone.

Each learns from the parent's own input to its layer. One pass of the parent over the text feeds every student of the
layers in memory; how many these are changes no result, since students share nothing but the text.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from puzzle.data import TokenData
from puzzle.device import autocast
from puzzle.library.least_squares import update_projections
from puzzle.library.starts import StudentPlan
from puzzle.library.students import Student
from puzzle.parents import Parent
from puzzle.runs import Run, progress
from puzzle.stages import BLD_BYTES
from puzzle.streams import LayerPass, Stream, Texts
from puzzle.training import Part, adamw, remove_states, saved_names, train
from puzzle.variants import State

_WARMUP = 0.05
_MAX_GRAD_NORM = 1.0
_BYTES_PER_FIXED_PARAMETER = 12
"""What is left of them in a least-squares update: weight, best so far, and the copy that is compared with it."""


def train_students(run: Run, parent: Parent, data: TokenData, plans: Sequence[StudentPlan], folder: Path) -> None:
    """Train what is not finished yet, as many layers at a time as fit the memory; results are kept as they are planned.

    Args:
        folder: for activations and training state, from which a training that was cut off goes on.
    """
    missing = defaultdict(list)
    for plan in plans:
        if plan.row(run.path) is None:
            missing[plan.layer].append(plan)
    if not missing:
        return
    stream = Stream(run, parent, folder / "activations")
    settings = run.recipe.library
    steps = math.ceil(settings.tokens / (settings.batch_size * data.sequence_length))
    texts = _texts(run, data, steps)
    begun = {int(name.partition(".")[0]) for name in saved_names(folder)}
    between = range(min(begun), max(begun) + 1) if begun else ()

    def training_bytes(layer: int) -> int:
        return BLD_BYTES * sum(plan.num_params for plan in missing[layer])

    for layers in stream.groups(sorted(missing), training_bytes, begun=between):
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

    initial: float
    loss: float
    state: State

    def update(self, loss: float, student: Student) -> bool:
        """Take what the student has if it is better; whether it was."""
        if better := loss < self.loss:
            self.loss, self.state = loss, student.state()
        return better


class _Group:
    """The students of the layers in memory, from their start to files on disk."""

    def __init__(
        self,
        run: Run,
        stream: Stream,
        texts: Texts,
        layers: range,
        plans: Sequence[StudentPlan],
        folder: Path,
    ) -> None:
        self._run, self._stream, self._texts, self._layers = run, stream, texts, layers
        self._plans, self._folder, self._settings = plans, folder, run.recipe.library
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
            found = best[student.name]
            tokens = self._settings.tokens if student in trained else 0
            plan.write(self._run.path, found.state, found.initial, found.loss, tokens)
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
        losses = self._held_out(self._students)
        best = {s.name: _Best(losses[s.name], losses[s.name], s.state()) for s in self._students}
        for student in attention:
            for name, parameter in student.parameters().items():
                parameter.data.copy_(merged[student.name][name])
        return best

    def _keep_better(self, best: dict[str, _Best], students: Sequence[Student]) -> set[str]:
        losses = self._held_out(students)
        return {s.name for s in students if best[s.name].update(losses[s.name], s)}

    def _fit(self, students: Sequence[Student], steps: int) -> None:
        """AdamW on all students at once, each with a gradient norm of its own; resumes from the state on disk."""
        parts = []
        for student in students:
            parameters = {f"{student.name}.{name}": value for name, value in student.parameters().items()}
            parts.append(Part(student.name, parameters, [adamw(parameters.values(), self._settings.learning_rate)]))
        text: Iterator[Iterator[LayerPass]] | None = None

        def gradients(step: int) -> dict[str, Tensor]:
            nonlocal text
            text = text or self._stream.passes(self._layers, "training", self._texts["training"](), first=step)
            return {"loss": self._backward(students, next(text))}

        with progress(self._label, steps) as bar:
            trained = train(
                parts,
                gradients,
                steps=steps,
                warmup=_WARMUP,
                max_grad_norm=_MAX_GRAD_NORM,
                folder=self._folder,
                bar=bar,
            )
        for name in trained.diverged:
            self._run.log_warning(f"{self._label}: {name} diverged and stopped; lower library.learning_rate")

    def _backward(self, students: Sequence[Student], layer_passes: Iterable[LayerPass]) -> Tensor:
        """Gradients of every student on one batch; the mean loss."""
        precision = getattr(torch, self._run.recipe.precision)
        losses = []
        for seen in layer_passes:
            for student in students:
                if student.layer == seen.index:
                    with autocast(self._run.device, precision):
                        loss = student.loss(seen)
                    loss.backward()
                    losses.append(loss.detach())
        return torch.stack(losses).nanmean()

    def _update_projections(self, students: Sequence[Student]) -> None:
        update_projections(students, lambda: self._passes("calibration"), self._moment_bytes)

    def _passes(self, text: str) -> Iterator[LayerPass]:
        for layer_passes in self._stream.passes(self._layers, text, self._texts[text]()):
            yield from layer_passes

    @torch.no_grad()
    def _held_out(self, students: Sequence[Student]) -> dict[str, float]:
        """E||y - y'||^2 / E||y||^2 on validation text, by student; inf where it is not finite."""
        zeros = torch.zeros(len(students), dtype=torch.float64, device=self._run.device)
        errors, powers = zeros.clone(), zeros.clone()
        for seen in self._passes("validation"):
            tokens = seen.input_BTD[..., 0].numel()
            for place, student in enumerate(students):
                if student.layer == seen.index:
                    errors[place] += student.loss(seen).double() * student.power * tokens
                    powers[place] += student.target(seen).float().square().mean().double() * tokens
        losses = (errors / powers).tolist()
        return {s.name: loss if math.isfinite(loss) else math.inf for s, loss in zip(students, losses, strict=True)}
