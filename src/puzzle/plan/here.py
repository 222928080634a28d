"""What a recipe takes on this machine: the space, the disk, and a rough time per stage.

Times come from operation counts and one timed matrix product, so they are right within a factor of two or so; they are
there to tell minutes from days.
"""

import math
import time

import torch

from puzzle.modeling import PuzzleConfig
from puzzle.plan.work import Work, alternatives
from puzzle.recipe import Recipe
from puzzle.units import format_bytes, format_seconds
from puzzle.variants import Space

_EFFICIENCY = 0.5
"""Share of the speed of a large matrix product that a model's layers reach (measured on CPU, 2026-11)."""
_SECONDS_PER_MEASUREMENT = 0.5
_NAMES = {"correct": "correct at most"}
"""Of the stages whose time is an upper bound."""


def estimate(recipe: Recipe, config: PuzzleConfig, space: Space, device: torch.device) -> list[str]:
    """Lines for a person."""
    work = Work(recipe, config, space)
    flops = _EFFICIENCY * _flops_per_second(device, getattr(torch, recipe.precision))
    seconds = {stage: count / flops for stage, count in work.operations.items()}
    seconds["costs"] = _measurements(recipe, space) * _SECONDS_PER_MEASUREMENT
    per_stage = ", ".join(
        f"{_NAMES.get(stage, stage)} {format_seconds(value)}" for stage, value in seconds.items() if value
    )
    return [
        *describe(work),
        f"disk: about {format_bytes(work.disk_bytes(range(len(space.layers))))}",
        f"time, roughly: {per_stage}; {format_seconds(sum(seconds.values()))} in all",
    ]


def describe(work: Work) -> list[str]:
    """The parent and the space, in a line each."""
    layers = work.space.layers
    variants = sum(len(alternatives(layer)) for layer in layers)
    blocks = sum(len(layer.blocks()) for layer in layers)
    return [
        f"parent: {work.recipe.parent}, {work.num_params / 1e6:,.1f}M parameters, {len(layers)} layers",
        f"space: {variants} variants to build, {blocks} blocks to score, "
        f"10^{math.log10(work.space.num_architectures):.0f} architectures",
    ]


def _measurements(recipe: Recipe, space: Space) -> int:
    shapes = {variant for layer in space.layers for variant in (*layer.attention, *layer.ffn)}
    return len(shapes) * len(recipe.scenario.batch_sizes) * recipe.cost.repeats


def _flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Speed of one large matrix product, the best of three."""
    size = 4096 if device.type == "cuda" else 1024
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2.0 * size**3 / min(times[1:])
