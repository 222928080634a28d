"""Blockwise local distillation (paper section 2.2): students of many layers trained at once, each alone.

Each learns from the parent's own input to its layer. One pass of the parent over the text feeds every student of the
layers in flight; how many those are follows from the memory there is and changes no result, since students share
nothing but the text.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from puzzle.data import TokenData
from puzzle.library.refit import refit
from puzzle.library.store import VariantStore
from puzzle.library.students import Student, clip_gradients
from puzzle.parents import LayerPass, Parent, ParentPasses, Texts
from puzzle.runs import Run, progress
from puzzle.training import BETAS, TrainingState, autocast, learning_rate, saved_parameters, set_learning_rate
from puzzle.variants import State

_WARMUP = 0.05
_MAX_GRAD_NORM = 1.0
_BYTES_PER_TRAINED_PARAMETER = 28
"""float32 weight, gradient, two AdamW moments, and three copies of weights: start, best so far, now."""
_BYTES_PER_REFITTED_PARAMETER = 12
"""What is left of these in a refit: weight, best so far, and the copy that is compared with it."""
_STEPS_BETWEEN_CHECKS = 16
"""Whether losses are finite is looked at so often: each look waits for the device."""


@dataclass(frozen=True)
class Group:
    """Variants of one layer that share a student, before it is built."""

    layer: int
    subblock: str
    variants: tuple[str, ...]
    params: int
    build: Callable[[], Student]


@dataclass
class _Best:
    """What a student's variants started with, and the best weights so far, by variant."""

    initial: dict[str, float]
    losses: dict[str, float]
    states: dict[str, State]

    def update(self, losses: dict[str, float], states: dict[str, State]) -> bool:
        """Take what is better, variant by variant; whether anything was."""
        better = [name for name, loss in losses.items() if loss < self.losses[name]]
        for name in better:
            self.losses[name], self.states[name] = losses[name], states[name]
        return bool(better)


def train_groups(
    run: Run, parent: Parent, data: TokenData, store: VariantStore, groups: Sequence[Group], folder: Path
) -> None:
    """Train what is not finished yet, as many layers at a time as fit the memory, and write it to the store.

    Args:
        folder: for activations and training state, from which a training that was cut off goes on.
    """
    missing = defaultdict(list)
    for group in groups:
        if store.finished(group.layer, group.subblock, group.variants) is None:
            missing[group.layer].append(group)
    if not missing:
        return
    memory_bytes = run.memory_bytes  # asked before weights are loaded
    passes = ParentPasses(run, parent, folder / "activations")
    steps = math.ceil(run.recipe.library.tokens / (run.recipe.library.batch_size * data.sequence_length))
    texts = _texts(run, data, steps)

    def extra_bytes(layer: int) -> int:
        return sum(_BYTES_PER_TRAINED_PARAMETER * group.params for group in missing[layer])

    state_file = folder / "training.safetensors"
    # What was begun before a kill is ended first and together, though there may be more memory now than then.
    begun = [int(name.partition(".")[0]) for name in saved_parameters(state_file)]
    first = [layer for layer in sorted(missing) if begun and min(begun) <= layer <= max(begun)]
    for part in (first, [layer for layer in sorted(missing) if layer not in first]):
        for layers in passes.groups(part, extra_bytes):
            passes.prepare(layers.start, texts)
            passes.hold(layers)
            together = [group for layer in layers for group in missing.pop(layer, [])]
            refit_bytes = memory_bytes - _bytes_in_refit(passes, layers, together)
            # No name is kept of the students: they are gone before the next are built.
            students = (group.build() for group in together)
            _Flight(run, state_file, passes, texts, layers, list(students), refit_bytes).train(store, steps)
    passes.close()


def _bytes_in_refit(passes: ParentPasses, layers: range, groups: Sequence[Group]) -> int:
    """What the parent and the students hold while projections are refitted."""
    parent = passes.layer_bytes if passes.resident else [passes.layer_bytes[layer] for layer in layers]
    students = _BYTES_PER_REFITTED_PARAMETER * sum(group.params for group in groups)
    return passes.outer_bytes + sum(parent) + students


def _texts(run: Run, data: TokenData, steps: int) -> Texts:
    settings = run.recipe.library

    def training() -> Iterator[Tensor]:
        for step in range(steps):
            yield data.training_batch(step, settings.batch_size, run.recipe.seed)[:, :-1]

    def validation() -> Iterator[Tensor]:
        for sequences in data.batches("validation", settings.batch_size, settings.validation_tokens):
            yield sequences[:, :-1]

    def calibration() -> Iterator[Tensor]:
        for sequences in data.batches("calibration", settings.batch_size, run.recipe.calibration.tokens):
            yield sequences[:, :-1]

    return {"training": training, "validation": validation, "calibration": calibration}


def _copies(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parameters.items()}


class _Flight:
    """The students of the layers in flight, from their start to files on disk.

    Args:
        refit_bytes: memory that a refit may take.
    """

    def __init__(
        self,
        run: Run,
        state_file: Path,
        passes: ParentPasses,
        texts: Texts,
        layers: range,
        students: list[Student],
        refit_bytes: int,
    ) -> None:
        self._run, self._passes, self._texts, self._layers, self._students = run, passes, texts, layers, students
        self._state_file, self._refit_bytes = state_file, refit_bytes
        self._settings = run.recipe.library
        self._label = f"BLD of layer {layers[0]}" if len(layers) == 1 else f"BLD of layers {layers[0]}-{layers[-1]}"
        self._precision: torch.dtype = getattr(torch, run.recipe.precision)

    def train(self, store: VariantStore, steps: int) -> None:
        """Start, held-out loss, training, refit; of each variant what did best on held-out text (law 4)."""
        best = self._start()
        trained = [student for student in self._students if student.parameters()]
        if trained and steps:
            self._train(trained, steps)
            improved = self._keep_better(best, trained)
            if self._settings.refit:
                self._refit(trained)
                improved |= self._keep_better(best, trained)
            if rest := len(trained) - len(improved):
                self._run.log(f"{self._label}: {rest} of {len(trained)} became no better and keep their start")
        for student in self._students:
            each = best[student.name]
            losses = {name: (each.initial[name], each.losses[name]) for name in student.variants}
            tokens = self._settings.tokens if student in trained else 0
            store.write(student.layer, student.subblock, each.states, losses, tokens)
        self._state_file.unlink(missing_ok=True)

    def _start(self) -> dict[str, _Best]:
        """What every student is worth before training, its closed form included.

        FFNs are fitted by their own start, attention here, as a result alone: an output projection fitted to merged
        heads is small where they are wrong, which keeps them from learning, so training from it ends worse
        (benchmarks/library.md). It starts from the heads as they were merged.
        """
        fitted = [s for s in self._students if s.subblock == "attention" and self._settings.start == "closed_form"]
        merged = {student.name: _copies(student.parameters()) for student in fitted}
        self._refit(fitted)
        losses = self._held_out(self._students)
        best = {s.name: _Best(losses[s.name], dict(losses[s.name]), s.states()) for s in self._students}
        for student in fitted:
            for name, parameter in student.parameters().items():
                parameter.data.copy_(merged[student.name][name])
        return best

    def _keep_better(self, best: dict[str, _Best], students: Sequence[Student]) -> set[str]:
        """Names of the students of which at least one variant became better."""
        losses = self._held_out(students)
        return {s.name for s in students if best[s.name].update(losses[s.name], s.states())}

    def _train(self, students: list[Student], steps: int) -> None:
        """AdamW on all students at once; resumes from the state on disk."""
        parameters = {f"{s.name}.{name}": value for s in students for name, value in s.parameters().items()}
        optimizer = torch.optim.AdamW(parameters.values(), betas=BETAS, weight_decay=0.0, fused=True)
        state = TrainingState(self._state_file, parameters, optimizer)
        first = state.restore()
        shown: dict[str, float] = {}
        with progress(self._label, steps, first) as bar:
            for step, tokens_BT in enumerate(self._texts["training"]()):
                if step < first:
                    continue
                rate = learning_rate(step, steps=steps, peak=self._settings.learning_rate, warmup=_WARMUP)
                set_learning_rate(optimizer, rate)
                losses = self._backward(students, step, tokens_BT)
                if step % _STEPS_BETWEEN_CHECKS == 0 or step == steps - 1:
                    students = self._finite(students, losses)
                    shown = {"loss": float(torch.stack([*losses.values()]).nanmean())} if losses else {}
                clip_gradients(students, _MAX_GRAD_NORM)
                optimizer.step()
                optimizer.zero_grad()
                state.save_if_due(step + 1)
                bar.advance(**shown)

    def _backward(self, students: Sequence[Student], step: int, tokens_BT: Tensor) -> dict[str, Tensor]:
        """Gradients of every student on one batch; the mean loss of each."""
        waiting = defaultdict(list)
        for student in students:
            waiting[student.layer].append(student)
        means = {}
        for seen in self._passes.through(self._layers, "training", step, tokens_BT):
            for student in waiting[seen.index]:
                with autocast(self._run.device, self._precision):
                    losses = torch.stack(list(student.losses(seen).values()))
                losses.sum().backward()
                means[student.name] = losses.detach().mean()
        return means

    def _finite(self, students: Sequence[Student], losses: dict[str, Tensor]) -> list[Student]:
        """The students that go on: one whose loss or weights are not finite stops alone, and keeps its start."""
        if not students:
            return []
        sums = [torch.stack([value.detach().sum() for value in s.parameters().values()]).sum() for s in students]
        finite = (torch.stack(sums) + torch.stack([losses[s.name] for s in students])).isfinite().tolist()
        for student in (student for student, goes_on in zip(students, finite, strict=True) if not goes_on):
            for value in student.parameters().values():
                value.grad = None  # AdamW leaves it alone from here on
            self._run.log_warning(
                f"{self._label}: {', '.join(student.variants)} of layer {student.layer} diverged and keeps its start; "
                "lower library.learning_rate"
            )
        return [student for student, goes_on in zip(students, finite, strict=True) if goes_on]

    def _refit(self, students: Sequence[Student]) -> None:
        passes, layers = self._passes, self._layers

        def calibration() -> Iterable[LayerPass]:
            for index, tokens_BT in enumerate(self._texts["calibration"]()):
                yield from passes.through(layers, "calibration", index, tokens_BT)

        refit([student for student in students if student.projections()], calibration, self._refit_bytes)

    @torch.no_grad()
    def _held_out(self, students: Sequence[Student]) -> dict[str, dict[str, float]]:
        """E||y - y'||^2 / E||y||^2 of every variant on validation text, by student; inf where it is not finite."""
        zero = torch.zeros((), dtype=torch.float64, device=self._run.device)  # sums stay where they are made
        errors: dict[str, dict[str, Tensor]] = {student.name: defaultdict(zero.clone) for student in students}
        powers: dict[str, Tensor] = defaultdict(zero.clone)
        for index, tokens_BT in enumerate(self._texts["validation"]()):
            for seen in self._passes.through(self._layers, "validation", index, tokens_BT):
                for student in students:
                    if student.layer == seen.index:
                        power = student.target(seen).float().square().mean().double()
                        powers[student.name] += power * tokens_BT.numel()
                        for name, loss in student.losses(seen).items():
                            errors[student.name][name] += loss.double() * student.power * tokens_BT.numel()
        losses = {
            student: {name: float(error / powers[student]) for name, error in own.items()}
            for student, own in errors.items()
        }
        return {
            student: {name: loss if math.isfinite(loss) else math.inf for name, loss in own.items()}
            for student, own in losses.items()
        }
