"""The block library: every variant of every layer, initialised and trained by blockwise local distillation (paper 2.2).

Decoupled: each half learns the parent's contribution of that half alone, from the parent's own input to it. One pass of
the parent over the text feeds every variant of the layers in flight; how many those are follows from the memory there
is and changes no result, since students share nothing but the text.
"""

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from puzzle.artefacts import LibraryIndex, LibraryRow
from puzzle.blocks import BlockVariant, ParentSubblock, Space, State, Variant, num_params, split_state
from puzzle.data import TokenData
from puzzle.library.statistics import Statistics
from puzzle.library.students import HALVES, Student, clip_gradients, contribution, half_of
from puzzle.modeling import PuzzleDecoderLayer, PuzzleForCausalLM
from puzzle.parents import Parent
from puzzle.recipe import LibrarySettings
from puzzle.runs import Run, Stage, progress, read_tensors, write_json, write_tensors, write_text
from puzzle.training import BETAS, TrainingState, learning_rate, set_learning_rate

_WARMUP = 0.05
_MAX_GRAD_NORM = 1.0
_BYTES_PER_TRAINED_PARAMETER = 20
"""float32 weight, gradient, two AdamW moments, and the best weights kept aside."""


@dataclass(frozen=True)
class Library:
    """The finished library: an index, and the weights on disk."""

    path: Path
    address: str
    parent: Parent
    index: LibraryIndex

    def state(self, layer: int, variant: Variant) -> State:
        """The weights of a variant of a layer, the parent's own included, in float32."""
        half = variant.half
        if variant == self.parent.architecture.blocks[layer].half(half):
            return split_state(self.parent.layer_state(layer), half)
        file = self.index.row(layer, half, variant.name).file
        return read_tensors(self.path / file) if file else {}

    def block_state(self, layer: int, block: BlockVariant) -> State:
        return self.state(layer, block.attention) | self.state(layer, block.ffn)


def build_library(run: Run, parent: Parent, data: TokenData, statistics: Statistics, space: Space) -> Library:
    """Initialise and train all variants that `space` names beside the parent's own."""
    names = [[variant.name for half in HALVES for variant in layer.half(half)] for layer in space.layers]
    settings = run.recipe.library.model_dump(mode="json") | {
        "space": names,
        "precision": run.recipe.precision,
        "seed": run.recipe.seed,
    }
    stage = run.stage(
        "library", version=1, settings=settings, inputs=(parent.address, data.address, statistics.address)
    )
    index_file = stage.path / "index.json"
    if not stage.done:
        missing = [layer for layer in range(len(space.layers)) if not _rows_file(stage, layer).exists()]
        if missing:
            model = parent.load(dtype=getattr(torch, run.recipe.precision), device=run.device)
            for layers in _in_flight(missing, parent, space, run.device):
                _train_layers(run, stage, model, parent, data, statistics, space, layers)
        rows = [
            LibraryRow(**row) for i in range(len(space.layers)) for row in json.loads(_rows_file(stage, i).read_text())
        ]
        write_text(index_file, LibraryIndex(rows=tuple(rows)).to_json())
        stage.commit(variants=len(rows))
    return Library(stage.path, stage.address, parent, LibraryIndex.from_json(index_file.read_text()))


def _rows_file(stage: Stage, layer: int) -> Path:
    return stage.path / f"layer{layer:03d}.json"


def _in_flight(layers: Sequence[int], parent: Parent, space: Space, device: torch.device) -> Iterator[list[int]]:
    """Layers grouped so that the students of a group fit in half the free memory."""
    budget = _free_bytes(device) / 2
    group: list[int] = []
    group_bytes = 0
    for layer in layers:
        variants = [variant for half in HALVES for variant in space.layers[layer].half(half)[1:]]
        layer_bytes = sum(_BYTES_PER_TRAINED_PARAMETER * num_params(variant, parent.config) for variant in variants)
        if group and group_bytes + layer_bytes > budget:
            yield group
            group, group_bytes = [], 0
        group.append(layer)
        group_bytes += layer_bytes
    yield group


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import os

    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _train_layers(
    run: Run,
    stage: Stage,
    model: PuzzleForCausalLM,
    parent: Parent,
    data: TokenData,
    statistics: Statistics,
    space: Space,
    layers: list[int],
) -> None:
    """All variants of `layers`, from their start to files and rows on disk."""
    settings = run.recipe.library
    students = [student for layer in layers for student in _students(parent, statistics, space, layer, run.device)]
    starts = {student.name: student.state() for student in students}
    initial = _held_out_losses(model, students, data, settings)
    trained = [student for student in students if student.variant.trained]
    label = f"BLD of layers {layers[0]}-{layers[-1]}"
    _train(run, stage, model, trained, data, label)
    final = _held_out_losses(model, students, data, settings)
    # Law 4: training that did not help is thrown away.
    worse = [student for student in students if not final[student.name] <= initial[student.name]]
    for student in worse:
        assert student.variant.trained, f"{student.name} changed without training"
        student.module.load_state_dict(starts[student.name], assign=True)
        final[student.name] = initial[student.name]
    if worse:
        run.log(f"{label}: {len(worse)} of {len(trained)} variants became no better and keep their start")
    states = {student.name: student.state() for student in students}
    _enforce_nesting(parent, students, states, final)
    for layer in layers:
        group = [student for student in students if student.layer == layer]
        rows = [_store(stage, student, states, initial, final, settings) for student in group]
        write_json(_rows_file(stage, layer), [asdict(row) for row in rows])
    _state_file(stage, layers).unlink(missing_ok=True)


def _students(
    parent: Parent, statistics: Statistics, space: Space, layer: int, device: torch.device
) -> Iterator[Student]:
    layer_state = parent.layer_state(layer)
    for half in HALVES:
        own, *others = space.layers[layer].half(half)
        moments = statistics.half(layer, half)
        start = ParentSubblock(
            config=parent.config, variant=own, state=split_state(layer_state, half), statistics=moments
        )
        for variant in others:
            power = float(moments["output_power"])
            yield Student(layer, variant, parent.config, variant.initialise(start), power, device)


def _train(
    run: Run, stage: Stage, model: PuzzleForCausalLM, students: list[Student], data: TokenData, label: str
) -> None:
    """AdamW on all students at once; resumes from the state on disk."""
    settings = run.recipe.library
    tokens_per_step = settings.batch_size * data.sequence_length
    steps = math.ceil(settings.tokens / tokens_per_step)
    parameters = {name: value for student in students for name, value in student.parameters().items()}
    if not parameters or steps == 0:
        return
    optimizer = torch.optim.AdamW(parameters.values(), betas=BETAS, weight_decay=0.0, fused=True)
    state = TrainingState(_state_file(stage, sorted({student.layer for student in students})), parameters, optimizer)
    first = state.restore()
    with progress(label, steps, first) as bar:
        for step in range(first, steps):
            tokens_BT = data.training_batch(step, settings.batch_size, run.recipe.seed)[:, :-1].to(run.device)
            rate = learning_rate(step, steps=steps, peak=settings.learning_rate, warmup=_WARMUP)
            set_learning_rate(optimizer, rate)
            losses = []
            for group_students, hidden_BTD, target_BTD, context in _parent_pass(model, tokens_BT, students):
                for student in group_students:
                    loss = student.loss(hidden_BTD, target_BTD, context)
                    loss.backward()
                    losses.append(loss.detach())
            clip_gradients(students, _MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            state.save_if_due(step + 1)
            bar.advance(loss=float(torch.stack(losses).mean()))


def _state_file(stage: Stage, layers: Sequence[int]) -> Path:
    return stage.path / f"training{layers[0]:03d}-{layers[-1]:03d}.safetensors"


def _parent_pass(
    model: PuzzleForCausalLM, tokens_BT: Tensor, students: Sequence[Student]
) -> Iterator[tuple[list[Student], Tensor, Tensor, dict[str, Any]]]:
    """The parent run over a batch once: per half with students, those, its input, and the parent's contribution."""
    waiting = defaultdict(list)
    for student in students:
        waiting[half_of(student)].append(student)
    last = max((layer for layer, _ in waiting), default=-1)
    with torch.no_grad():
        hidden_BTD = model.model.embed_tokens(tokens_BT)
        context = model.model.context(hidden_BTD)
    for index, layer in enumerate(model.model.layers[: last + 1]):
        for half in HALVES:
            with torch.no_grad():
                contribution_BTD = contribution(cast(PuzzleDecoderLayer, layer), half, hidden_BTD, context)
            if group := waiting.get((index, half)):
                yield group, hidden_BTD.float(), contribution_BTD, context
            hidden_BTD = hidden_BTD + contribution_BTD


@torch.no_grad()
def _held_out_losses(
    model: PuzzleForCausalLM, students: Sequence[Student], data: TokenData, settings: LibrarySettings
) -> dict[str, float]:
    """Normalised MSE of every student on the validation text; inf where it is not finite."""
    errors: dict[str, float] = defaultdict(float)
    powers: dict[str, float] = defaultdict(float)
    device = model.device
    for sequences in data.batches("validation", settings.batch_size, settings.validation_tokens):
        for group, hidden_BTD, target_BTD, context in _parent_pass(model, sequences[:, :-1].to(device), students):
            power = float(target_BTD.double().square().sum())
            for student in group:
                error_BTD = student.contribution(hidden_BTD, context).double() - target_BTD.double()
                errors[student.name] += float(error_BTD.square().sum())
                powers[student.name] += power
    losses = {name: error / powers[name] for name, error in errors.items()}
    return {name: loss if math.isfinite(loss) else math.inf for name, loss in losses.items()}


def _enforce_nesting(
    parent: Parent, students: Sequence[Student], states: dict[str, State], losses: dict[str, float]
) -> None:
    """Law 4: where a wider variant ended worse than a narrower one, it takes over the narrower one's function."""
    by_size = sorted(students, key=lambda student: num_params(student.variant, parent.config))
    for position, wide in enumerate(by_size):
        narrower = [narrow for narrow in by_size[:position] if half_of(narrow) == half_of(wide)]
        for narrow in narrower:
            if losses[narrow.name] < losses[wide.name]:
                widened = narrow.variant.widen(states[narrow.name], wide.variant, parent.config)
                if widened is not None:
                    states[wide.name], losses[wide.name] = widened, losses[narrow.name]


def _store(
    stage: Stage,
    student: Student,
    states: dict[str, State],
    initial: dict[str, float],
    final: dict[str, float],
    settings: LibrarySettings,
) -> LibraryRow:
    state = states[student.name]
    file = f"layer{student.layer:03d}.{student.variant.half}.{student.variant.name}.safetensors" if state else ""
    if file:
        write_tensors(stage.path / file, state)
    return LibraryRow(
        layer=student.layer,
        half=student.variant.half,
        variant=student.variant.name,
        file=file,
        initial_loss=initial[student.name],
        loss=final[student.name],
        trained_tokens=settings.tokens if student.variant.trained else 0,
    )
