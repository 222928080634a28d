"""The rows of a cost table: exact sizes from the modules' real shapes (law 10), times from stacks of blocks.

A module timed alone finds its weights in the processor's cache, which it does not inside a model. So every variant is
timed as copies of its subblock between two of the parent's blocks (the pads), which engines may treat in their own way;
its cost is what the copies add, divided by their number. An empty layer's time is part of what is fixed.

Engines that fill in a missing subblock (llama.cpp: an FFN of zeros) need not in a whole block. So whole pads are timed
as copies too, and what one takes less than its two subblocks is taken off every attention. Engines may skip most of
the last FFN in a prefill, as only the last token's output is used. So the pad's FFN is timed as the last one too; its
share of a middle one's time is taken for all FFNs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from puzzle.artefacts import Cost, CostRow, Part, Scenario, Totals
from puzzle.costs.engine import Sample
from puzzle.costs.timing import typical, without_drift
from puzzle.modeling import PuzzleConfig, empty_model
from puzzle.recipe import ScenarioSettings
from puzzle.variants import Architecture, BlockVariant, Space, Variant, type_bytes

COPIES = 6
"""Of the measured subblock: the stack is as deep as a small model, and the copies take most of its time."""
EMPTY_LAYERS = 64
"""An empty layer takes microseconds. vLLM refuses a model of nothing else, so these too are between pads."""
PADS, _EMPTY_LAYERS, _WHOLE, _LAST = "pads", "empty layers", "whole blocks", "no last ffn"


def stacks_of(space: Space, config: PuzzleConfig) -> dict[str, tuple[BlockVariant, ...]]:
    """What is measured for a space, by name; once for each shape."""
    pad, empty = _pad(space, config), BlockVariant.parse("none+none")
    alone = {_name(each): replace(empty, **{each.subblock: each}) for each in space.variants if not each.absent}
    return {
        PADS: (pad, pad),
        _EMPTY_LAYERS: (pad, *[empty] * EMPTY_LAYERS, pad),
        _WHOLE: (pad, *[pad] * COPIES, pad),
        _LAST: (pad, replace(empty, attention=pad.attention)),
        **{name: (pad, *[block] * COPIES, pad) for name, block in alone.items()},
    }


def cost_rows(
    config: PuzzleConfig,
    space: Space,
    scenario: Scenario,
    batch_size: int,
    samples: Mapping[str, Sequence[Sample]],
    beyond_window: int = 0,
    warn: Callable[[str], object] = lambda line: None,
) -> Iterator[CostRow]:
    """The rows at one batch size: what is fixed, then every variant of every layer; from samples of each stack."""
    dtype, tokens = getattr(torch, scenario.dtype), scenario.total_tokens
    sizes = {variant: subblock_memory(variant, config, dtype, tokens, beyond_window) for variant in space.variants}
    prefill_ms, decode_ms = (
        _part_times(space, config, {stack: [each[place] for each in rounds] for stack, rounds in samples.items()})
        for place in (0, 1)
    )

    def row(layer: int, part: Part, variant: str, size: Cost, timed_as: str) -> CostRow:
        costs = vars(size) | {"prefill_ms": prefill_ms[timed_as], "decode_ms": decode_ms[timed_as]}
        return CostRow(layer=layer, part=part, variant=variant, batch_size=batch_size, **costs)

    if not decode_ms["fixed"]:
        own, head = _pad(space, config).subblocks, config.vocab_size * config.hidden_size * dtype.itemsize
        read = 2 * sum(sizes[each].weight_bytes + batch_size * sizes[each].kv_bytes_per_sequence for each in own)
        decode_ms["fixed"] = head / (head + read) * typical([each.decode_ms for each in samples[PADS]])
        found = f"at batch {batch_size} a decode step without layers is lost in noise and taken as the head's share"
        warn(f"costs: {found}, {decode_ms['fixed']:.3g} ms; children of few layers may be slower than predicted")
    yield row(-1, "fixed", "", fixed_memory(config, dtype), "fixed")
    for index, layer in enumerate(space.layers):
        for variant in layer.variants:
            last = "last " if variant.subblock == "ffn" and index == len(space.layers) - 1 else ""
            yield row(index, variant.subblock, variant.name, sizes[variant], last + _name(variant))


def _part_times(space: Space, config: PuzzleConfig, rounds_ms: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """What each part adds to a model's time: `attention kv2`, `ffn none`, `last ffn w16`, `fixed`; at least 0."""
    stack_ms = dict(zip(rounds_ms, map(typical, without_drift([*rounds_ms.values()])), strict=True))
    empty_layer_ms = (stack_ms[_EMPTY_LAYERS] - stack_ms[PADS]) / EMPTY_LAYERS
    parts_ms = {stack: (time_ms - stack_ms[PADS]) / COPIES - empty_layer_ms for stack, time_ms in stack_ms.items()}
    pad, variants = _pad(space, config), space.variants
    attention_ms, ffn_ms = parts_ms[_name(pad.attention)], parts_ms[_name(pad.ffn)]
    # At least 0: a block that takes more has found less in the cache.
    saved_ms = max(0.0, attention_ms + ffn_ms - parts_ms[_WHOLE])
    last_ffn_ms = max(0.0, stack_ms[PADS] - stack_ms[_LAST] + saved_ms)
    for variant in variants:
        part_ms = 0.0 if variant.absent else parts_ms[_name(variant)]
        if variant.subblock == "ffn":
            parts_ms[f"last {_name(variant)}"] = part_ms * (last_ffn_ms / ffn_ms if ffn_ms else 1.0)
        elif not variant.absent:
            part_ms -= saved_ms
        parts_ms[_name(variant)] = part_ms
    pads_ms = 2 * (attention_ms + ffn_ms - saved_ms) - ffn_ms + last_ffn_ms
    parts_ms["fixed"] = stack_ms[PADS] - pads_ms + (len(space.layers) - 2) * empty_layer_ms
    return {part: max(part_ms, 0.0) for part, part_ms in parts_ms.items()}


def subblock_memory(
    variant: Variant, config: PuzzleConfig, dtype: torch.dtype, tokens: int, beyond_window: int = 0
) -> Cost:
    """Of one subblock, norm and biases included, held in `dtype`; `tokens` of one sequence, prompt and generated."""
    return Cost(
        params=variant.num_params(config),
        weight_bytes=variant.weight_bytes(config, dtype),
        kv_bytes_per_sequence=variant.kv_bytes(config, tokens, dtype, beyond_window),
    )


def parent_totals(config: PuzzleConfig, settings: ScenarioSettings, batch_size: int) -> Totals:
    """What is known of the parent itself from its shapes: all but times. For `auto` its own dtype is taken."""
    dtype = settings.dtype if settings.dtype != "auto" else str(config.dtype or "float32").removeprefix("torch.")
    held, tokens = getattr(torch, dtype), settings.prompt_tokens + settings.generated_tokens
    variants = (variant for block in Architecture.of(config).blocks for variant in block.subblocks)
    cost = sum((subblock_memory(variant, config, held, tokens) for variant in variants), fixed_memory(config, held))
    return Totals(batch_size=batch_size, generated_tokens=settings.generated_tokens, cost=cost)


def fixed_memory(config: PuzzleConfig, dtype: torch.dtype) -> Cost:
    """What every child has: embeddings, final norm and head, a tied head counted once."""
    parameters, outer = empty_model(config).named_parameters(), getattr(config, "outer_type", "")
    shapes = [parameter.shape for name, parameter in parameters if not name.startswith("model.layers.")]
    sizes = (type_bytes(shape, outer) if outer else shape.numel() * dtype.itemsize for shape in shapes)
    return Cost(params=sum(shape.numel() for shape in shapes), weight_bytes=sum(sizes))


def _pad(space: Space, config: PuzzleConfig) -> BlockVariant:
    """The largest of the parent's blocks."""
    return max((layer.parent for layer in space.layers), key=lambda block: block.num_params(config))


def _name(variant: Variant) -> str:
    """Of a part, and of the stack with its copies."""
    return f"{variant.subblock} {variant.name}"
