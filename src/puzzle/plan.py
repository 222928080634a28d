"""What follows from a recipe, before anything is computed: the space, the disk, and a rough time per stage.

Times come from operation counts and one timed matrix product, so they are right within a factor of two or so; they are
there to tell minutes from days. A forward pass takes two operations a parameter and token, a backward pass four.
"""

import math
import time

import torch

from puzzle.blocks import Space, num_params
from puzzle.parents import Parent
from puzzle.recipe import Recipe
from puzzle.units import format_bytes, format_seconds

_EFFICIENCY = 0.5
"""Share of the speed of a large matrix product that a model's layers reach (measured on CPU, 2026-11)."""
_SECONDS_PER_MEASUREMENT = 0.5


def estimate(recipe: Recipe, parent: Parent, space: Space, device: torch.device) -> list[str]:
    """Lines for a person."""
    flops = _EFFICIENCY * _flops_per_second(device, getattr(torch, recipe.precision))
    operations = _operations(recipe, parent, space)
    seconds = {stage: count / flops for stage, count in operations.items()}
    seconds["costs"] = _measurements(recipe, space) * _SECONDS_PER_MEASUREMENT
    variants = sum(len(layer.attention) + len(layer.ffn) - 2 for layer in space.layers)
    blocks = sum(len(layer.blocks()) for layer in space.layers)
    per_stage = ", ".join(f"{stage} {format_seconds(value)}" for stage, value in seconds.items() if value)
    return [
        f"parent: {parent.path}, {parent.num_params / 1e6:,.1f}M parameters, {len(space.layers)} layers",
        f"space: {variants} variants to build, {blocks} blocks to score, "
        f"10^{math.log10(space.num_architectures):.0f} architectures",
        f"disk: about {format_bytes(_disk_bytes(recipe, parent, space))}",
        f"time, roughly: {per_stage}; {format_seconds(sum(seconds.values()))} in all",
    ]


def _operations(recipe: Recipe, parent: Parent, space: Space) -> dict[str, float]:
    """Floating-point operations of the stages that run models."""
    config = parent.config
    head = 2.0 * config.vocab_size * config.hidden_size
    layers = [
        sum(num_params(half, config) for half in (layer.parent.attention, layer.parent.ffn)) for layer in space.layers
    ]
    forward = 2.0 * sum(layers) + head
    students = sum(
        num_params(variant, config)
        for layer in space.layers
        for variant in (*layer.attention[1:], *layer.ffn[1:])
        if not variant.closed_form
    )
    suffixes = sum(len(layer.blocks()) * (2.0 * sum(layers[index:]) + head) for index, layer in enumerate(space.layers))
    children = 2 if recipe.evaluate.uniform_baseline else 1
    return {
        "calibrate": 2 * forward * recipe.calibration.tokens,
        "library": (forward + 6.0 * students) * recipe.library.tokens,
        "score": suffixes * recipe.score.tokens,
        "refine": 4 * forward * recipe.refine.tokens * children,
        "distil": 4 * forward * recipe.distil.tokens * children,
        "evaluate": 2 * forward * recipe.evaluate.tokens * (children + 2),
    }


def _measurements(recipe: Recipe, space: Space) -> int:
    shapes = {variant for layer in space.layers for variant in (*layer.attention, *layer.ffn)}
    return len(shapes) * len(recipe.scenario.batch_sizes) * recipe.cost.repeats


def _disk_bytes(recipe: Recipe, parent: Parent, space: Space) -> int:
    """The library, its training state, and the children before and after GKD with their training states, in float32."""
    variants = sum(
        num_params(variant, parent.config)
        for layer in space.layers
        for variant in (*layer.attention[1:], *layer.ffn[1:])
    )
    children = 2 if recipe.evaluate.uniform_baseline else 1
    return 4 * (4 * variants + children * 5 * parent.num_params)


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
