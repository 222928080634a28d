"""Blockwise local distillation (paper section 2.2): the students of many layers trained at once, each alone.

Each student learns from the parent's own input to its layer. One pass of the parent over the text feeds every student
of the layers in memory; how many these are changes no result, since students share nothing but the text. Each ends as
`variants/DIGEST.safetensors`, its weights, and `variants/DIGEST.json`, its row of the library's index, shared by every
library of the run folder: the digest is of everything that the result follows from, so that nothing is trained twice.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from puzzle.artefacts import LibraryIndex, LibraryRow
from puzzle.data import TokenData
from puzzle.distributed.state import remove_states, saved_names
from puzzle.distributed.tasks import for_layers
from puzzle.library.library import Library, nested, read_index
from puzzle.library.statistics import Statistics
from puzzle.library.students import Student, fit, held_out, student_texts, update_projections
from puzzle.parents import Parent
from puzzle.runs import Run, digest, file_digest, progress, read_json, write_json, write_tensors, write_text
from puzzle.stages import BLD_BYTES, LIBRARY
from puzzle.streams import LayerPass, Stream, Texts
from puzzle.variants import BlockVariant, Space, State, Subblock, Variant


class StudentPlan(NamedTuple):
    """A student before it is built."""

    layer: int
    subblock: str
    """`block` for two variants that are trained as a whole."""
    variants: tuple[Variant, ...]
    num_params: int
    file: str
    """Its weights, relative to the run folder."""

    def row_file(self, root: Path) -> Path:
        return (root / self.file).with_suffix(".json")

    def is_trained(self, root: Path) -> bool:
        row = self.row_file(root)
        return row.exists() and (not read_json(row)["weights"] or (root / self.file).exists())


Planned = Mapping[StudentPlan, Student]
Make = Callable[[Sequence[StudentPlan]], Planned]


def build_library(
    run: Run, parent: Parent, data: TokenData, statistics: Statistics, space: Space, *, coupled: bool = False
) -> Library:
    """Initialise and train all variants that `space` names beside the parent's own.

    Args:
        coupled: also train every block composed of them as a whole (paper section 2.2).
    """
    subblocks = build_library(run, parent, data, statistics, space) if coupled else None
    stage = run.open(LIBRARY, parent=parent, data=data, statistics=statistics, space=space.names, coupled=coupled)
    index_file = stage.path / "index.json"
    index = read_index(run, index_file) if stage.done else None
    if index is None:
        identity = read_json(stage.path / "stage.json")  # of each student: the stage's, whatever else there is to train
        for name in ("space", "coupled"):
            del identity["inputs"][name]
        plans = student_plans(parent, space, subblocks, identity)
        costs = [1.0 + sum(plan.num_params for plan in plans if plan.layer == i) for i in range(parent.num_layers)]
        make = partial(students_at_start, run, parent, statistics, subblocks)
        for_layers(run, stage, partial(_train_layers, run, parent, data, plans, make), costs)
        rows = [LibraryRow(**read_json(plan.row_file(run.path))["row"]) for plan in plans]
        rows = nested(run.path, parent, rows) if subblocks is None else [*subblocks.index.rows, *rows]
        index = LibraryIndex(rows=tuple(rows))
        write_text(index_file, index.to_json())
        stage.commit()
    return Library(run.path, stage.address, parent, index, statistics if run.recipe.space.importance else None)


def student_plans(parent: Parent, space: Space, subblocks: Library | None, identity: Any) -> list[StudentPlan]:
    """Of every variant beside the parent's own; or of every block composed of them that has weights.

    Args:
        subblocks: what whole blocks start from; None: subblocks are trained.
        identity: what all students follow from.
    """
    plans, config = [], parent.config
    for layer, choices in enumerate(space.layers):
        every: list[tuple[Variant, ...]] = [(variant,) for variant in (*choices.attention[1:], *choices.ffn[1:])]
        if subblocks is not None:
            every = [block.subblocks for block in choices.blocks()[1:] if block.num_params(config)]
        for variants in every:
            subblock, made_of = variants[0].subblock if subblocks is None else "block", [identity]
            if subblocks is not None:
                rows = [subblocks.index.by_key.get((layer, each.subblock, each.name)) for each in variants]
                made_of += [[row.file, row.widened_from] for row in rows if row is not None]
            file = f"variants/{digest([made_of, layer, subblock, *map(str, variants)])[:24]}.safetensors"
            num_params = sum(variant.num_params(config) for variant in variants)
            plans.append(StudentPlan(layer, subblock, variants, num_params, file))
    return plans


def students_at_start(
    run: Run, parent: Parent, statistics: Statistics, subblocks: Library | None, plans: Sequence[StudentPlan]
) -> Planned:
    """The students of these plans, those of a subblock one after another: they share the ranking of its channels."""
    settings, config, students = run.recipe.library, parent.config, dict[StudentPlan, Student]()
    of_block = settings.loss == "block"
    for (layer, subblock), group in groupby(plans, key=lambda plan: (plan.layer, plan.subblock)):
        powers, trained = statistics.moments(layer), True
        if subblocks is None:
            own = statistics.parent_subblock(parent, settings, run.device, layer, cast(Subblock, subblock))
        for plan in group:
            variants = plan.variants
            if subblocks is None:
                state, own_power = variants[0].initialise(own), own.statistics["output_power"]
                trained = of_block or settings.start == "paper" or not variants[0].closed_form
            else:
                state = subblocks.block_state(layer, BlockVariant(*variants))
                own_power = powers["block_contribution_power"]
            power = float(powers["block_power"] if of_block else own_power)
            made = Student(layer, variants, config, state, power, run.device, trained=trained, loss=settings.loss)
            students[plan] = made
    return students


def _train_layers(
    run: Run, parent: Parent, data: TokenData, plans: Sequence[StudentPlan], make: Make, layers: range, folder: Path
) -> None:
    """Train what these layers lack, as many at a time as fit the memory. A task, also in another process."""
    missing = [plan for plan in plans if plan.layer in layers and not plan.is_trained(run.path)]
    if not missing:
        return
    stream, settings = Stream(run, parent, folder / "activations"), run.recipe.library
    steps = math.ceil(settings.tokens / (settings.batch_size * data.sequence_length))
    calibration = partial(data.inputs, "calibration", settings.batch_size, run.recipe.calibration.tokens)
    texts: Texts = {**student_texts(data, run.recipe, settings.batch_size, steps), "calibration": calibration}
    begun = {int(name.partition(".")[0]) for name in saved_names(folder)}
    begun_layers = range(min(begun), max(begun) + 1) if begun else ()
    training_bytes = dict.fromkeys((plan.layer for plan in missing), 0)
    for plan in missing:
        training_bytes[plan.layer] += BLD_BYTES * plan.num_params
    for group in stream.groups(training_bytes, training_bytes.__getitem__, begun_layers):
        label = f"BLD of layer {group[0]}" if len(group) == 1 else f"BLD of layers {group[0]}-{group[-1]}"
        run.log(f"{label}: starts by least squares, and their losses on held-out text")
        stream.prepare(group.start, texts)
        students = make([plan for plan in missing if plan.layer in group])
        _train_group(run, stream, texts, group, students, steps, folder, label)
    stream.close()


def _train_group(
    run: Run, stream: Stream, texts: Texts, layers: range, planned: Planned, steps: int, folder: Path, label: str
) -> None:
    """The students of the layers in memory, from their start to files on disk.

    Start, held-out loss, training, least squares; of each student, what did best on held-out text is kept (law 4).
    FFNs start from their closed form. Attention starts from merged heads, and the least-squares update of these is a
    result alone: an output projection fitted to merged heads is small where they are wrong, which keeps them from
    learning, so that training from it ends worse (benchmarks/library.md).
    """
    settings, students = run.recipe.library, [*planned.values()]
    # In a least-squares update a parameter is a weight, the best so far, and the copy that is compared with it.
    moment_bytes = stream.room(layers) - 12 * sum(plan.num_params for plan in planned)
    best: dict[str, tuple[float, State]] = {}

    def passes(text: str, first: int = 0) -> Iterator[Iterator[LayerPass]]:
        return stream.passes(layers, text, texts[text](), first)

    def update(some: Sequence[Student]) -> None:
        update_projections(some, partial(passes, "calibration"), moment_bytes)

    def keep_better(some: Sequence[Student]) -> None:
        """Keep the losses and weights of students that are better than before."""
        found = held_out(some, passes("validation"))
        for student in some:
            loss, _ = found[student.name]
            if student.name not in best or loss < best[student.name][0]:
                best[student.name] = loss, student.state()

    merged = [each for each in students if each.subblock == "attention" and settings.start == "closed_form"]
    starts = [student.state() for student in merged]
    update(merged)
    keep_better(students)
    initial = {name: loss for name, (loss, _) in best.items()}
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
        run.log(f"{label}: losses after training" + ", and after least squares" * settings.least_squares)
        keep_better(trained)
        if settings.least_squares:
            update(trained)
            keep_better(trained)
        if rest := sum(best[student.name][0] == initial[student.name] for student in trained):
            run.log(f"{label}: {rest} of {len(trained)} became no better and keep their start")
    (run.path / "variants").mkdir(exist_ok=True)
    for plan, student in planned.items():
        loss, weights = best[student.name]
        if weights:
            write_tensors(run.path / plan.file, weights)
        row = {"layer": plan.layer, "subblock": plan.subblock, "variant": "+".join(map(str, plan.variants))}
        row |= {"file": plan.file if weights else "", "widened_from": ""}
        row |= {"initial_loss": initial[student.name], "loss": loss}
        row |= {"trained_tokens": settings.tokens if student in trained else 0}
        found = file_digest(run.path / plan.file, {}) if weights else None
        write_json(plan.row_file(run.path), {"row": row, "weights": found})
    remove_states(folder)
