"""What a recipe takes before anything is computed: the space, disk, memory and time, here or on many devices.

Times follow from operation counts, and from a timed matrix product or a data sheet: right within a factor of two or so,
they tell minutes from days. docs/scaling.md derives the formulas.
"""

import math
from itertools import accumulate

import torch

from puzzle.costs import Machine, read_machine
from puzzle.device import flops_per_second
from puzzle.errors import PuzzleError
from puzzle.modeling import PuzzleConfig, empty_model
from puzzle.recipe import Recipe
from puzzle.stages import STAGES, Work
from puzzle.units import format_bytes, format_seconds
from puzzle.variants import Architecture, Space, Variant

_EFFICIENCY = 0.5
"""Share of the speed of a large matrix product that a model's layers reach (measured on a CPU, 2026-11)."""
_TRAINING_SHARE = 0.4
"""Share of a data sheet's peak rate that training reaches; a forward pass reaches the sheet's `compute_share`."""


class Shapes:
    """Counts that follow from the recipe, the parent's configuration and the space; by layer in lists.

    Attributes:
        num_params: of the parent, tied ones counted once. layer_params: of its own blocks.
        built: number of variants beside the parent's.
        trained_params: of the variants that BLD trains. library_params: of all variants beside the parent's.
        scored: numbers of blocks whose scores are measured: with one subblock replaced, and with both.
        num_stacks: distinct variants, each of which is measured once.
        children: how many are made: the child, and the uniform one beside it.
        moments: values that calibration sums up: four D x D a subblock, and what its parent variant records.
        suffixes: operations a token of the parent's layers from each one on and of the head; the last is the head's.
        forward: operations a token of the whole parent.
        itemsize: bytes of an activation, and of a weight that is not trained.
        streamed_bytes: of a parent whose layers are read as they are needed: two of them, embeddings and head.
        layer_activations: bytes that the widest layer keeps of a sequence for its backward pass: 4 D values a token in
            and between subblocks and norms, and what the subblocks keep.
    """

    recipe: Recipe
    children: int
    forward: float

    def __init__(self, recipe: Recipe, config: PuzzleConfig, space: Space) -> None:
        self.recipe, self.config, self.space = recipe, config, space
        length, hidden = recipe.data.sequence_length, config.hidden_size
        parents = [each.parent for each in space.layers]
        others = [[*layer.attention[1:], *layer.ffn[1:]] for layer in space.untyped.layers]
        self.num_params = sum(parameter.numel() for parameter in empty_model(config).parameters())
        self.layer_params = [parent.num_params(config) for parent in parents]
        self.trained_params = [sum(v.num_params(config) for v in some if not v.closed_form) for some in others]
        self.library_params = sum(variant.num_params(config) for some in others for variant in some)
        self.built = sum(map(len, others))
        every = [(layer.parent, layer.scored()[1:]) for layer in space.layers]
        singles = [sum(own.attention == b.attention or own.ffn == b.ffn for b in blocks) for own, blocks in every]
        self.scored = [(single, len(blocks) - single) for single, (_, blocks) in zip(singles, every, strict=True)]
        self.num_stacks = len({variant for layer in space.layers for variant in (*layer.attention, *layer.ffn)})
        self.children = 2 if recipe.evaluate.uniform_baseline else 1
        self.moments = [sum(4 * hidden**2 + own.recorded_values(config) for own in each.subblocks) for each in parents]
        operations = [sum(own.operations(config, length, length) for own in each.subblocks) for each in parents]
        head = 2.0 * config.vocab_size * hidden
        self.suffixes = [*accumulate((each / length for each in reversed(operations)), initial=head)][::-1]
        self.forward = self.suffixes[0]
        self.itemsize = torch.finfo(getattr(torch, recipe.precision)).bits // 8
        outside = self.num_params - sum(self.layer_params)
        self.streamed_bytes = self.itemsize * (2 * max(self.layer_params) + outside)
        kept = max(sum(_kept_values(own, config) for own in each.subblocks) for each in parents)
        self.layer_activations = length * self.itemsize * (4.0 * hidden + kept)


def _kept_values(variant: Variant, config: PuzzleConfig) -> int:
    """Values a token kept for the backward pass between its matrices: what they give, and what the last one takes."""
    shapes, last = variant.shapes(config), f"{variant.output_projection(config)}.weight"
    kept = [shape[1] if name == last else shape[0] for name, shape in shapes.items() if len(shape) == 2]
    return sum(kept) if last in shapes else 0


def plan(
    recipe: Recipe, config: PuzzleConfig, space: Space, device: torch.device, devices: str | None = None
) -> list[str]:
    """Lines for a person: for this machine, or a table of the stages on `devices`, such as `8xh100-sxm`."""
    shapes = Shapes(recipe, config, space)
    work = {stage.name: stage.work(shapes) for stage in STAGES if stage.wanted(recipe)}
    blocks = sum(1 + single + composed for single, composed in shapes.scored)
    idle = Architecture.of(config).idle_params(config)
    active = f" ({(shapes.num_params - idle) / 1e6:,.1f}M active)" if idle else ""
    lines = [
        f"parent: {recipe.parent}, {shapes.num_params / 1e6:,.1f}M parameters{active}, {len(space.layers)} layers",
        f"space: {shapes.built} variants to build, {blocks} blocks to score, "
        f"10^{math.log10(space.num_architectures):.0f} architectures",
    ]
    disk = f"disk: about {format_bytes(sum(each.disk_bytes for each in work.values()))}"
    if devices is not None:
        return [*lines, *_table(shapes, work, devices), disk]
    flops = _EFFICIENCY * flops_per_second(device, getattr(torch, recipe.precision))
    seconds = {name: (sum(each.operations) + each.forward) / flops + each.seconds for name, each in work.items()}
    by_stage = ", ".join(f"{name} {format_seconds(value)}" for name, value in seconds.items() if value)
    whole = f"{format_seconds(sum(seconds.values()))} in all; --devices tells what other machines take"
    guess = "time, a guess from operations, several times too low for models of a few million parameters"
    return [*lines, disk, f"{guess}: {by_stage}; {whole}"]


def _table(shapes: Shapes, work: dict[str, Work], devices: str) -> list[str]:
    machine, count = read_machine(devices, "--devices")
    if (sequences := shapes.recipe.distil.batch_size) % count:
        shared = f"cannot be shared by {count} devices; take a multiple of {count}"
        raise PuzzleError(f"distil.batch_size: {sequences} sequences a step {shared}")
    rows, warnings, total = [("stage", "devices", "memory each", "time")], [], 0.0
    for name, each in work.items():
        if not each.operations:
            continue
        used = count if each.shared else min(count, len(each.operations))
        memory = each.held_bytes + each.sharded_bytes / used + shapes.streamed_bytes + shapes.layer_activations
        seconds = _seconds(each, used, machine, shapes.recipe.precision)
        rows.append((name, str(used), format_bytes(memory), format_seconds(seconds)))
        total += seconds
        if memory > 1e9 * machine.memory_gb:
            warnings.append(
                f"{name} needs {format_bytes(memory)} of a device's {machine.memory_gb:g} GB: take shorter sequences "
                "(data.sequence_length), fewer variants a layer (space), distil.accumulate, or more devices"
            )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [*lines, *warnings, f"time by calculation: {format_seconds(total)}, without text, costs and export"]


def _seconds(work: Work, used: int, machine: Machine, precision: str) -> float:
    """On `used` devices; independent tasks go to the device that is free first, the longest first."""
    busy = [0.0] * used
    for operations in sorted(work.operations, reverse=True):
        busy[busy.index(min(busy))] += operations
    most = sum(work.operations) / used if work.shared else max(busy)
    rates = {"forward": machine.compute_share, "training": _TRAINING_SHARE, "float32": machine.compute_share}

    def flops(dtype: str, share: float) -> float:
        if dtype not in machine.peak_tflops:
            raise PuzzleError(f"--devices: the data sheet has no rate for {dtype}; add it or change `precision`")
        return 1e12 * machine.peak_tflops[dtype] * share

    own = flops("float32" if work.kind == "float32" else precision, rates[work.kind])
    return most / own + work.forward / flops(precision, machine.compute_share)
