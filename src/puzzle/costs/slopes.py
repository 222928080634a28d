"""From times of stacks to costs of subblocks: the slope between two depths inside a real model.

A module timed alone finds its weights in the processor's cache, which it does not inside a model. So every variant is
timed as copies of its subblock between two of the parent's blocks (the pads); its cost is what the copies add, divided
by their number. Pads are the first and last layer, which engines may treat in their own way.

Every child has all layers, if only empty ones: the time of an empty layer is part of what is fixed, and an absent
subblock costs nothing.

Engines that run rows of attention and FFN fill in a missing subblock (llama.cpp: an FFN of zeros), which a whole block
does not need. So whole pads are timed as copies too, and what one takes less than its two subblocks is taken off every
attention.

Engines may skip most of the last layer's FFN in a prefill, since only the last token's output is used. So the pad's FFN
is timed as the last one too; its share of a middle one's time is taken for all FFNs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from puzzle.artefacts.costs import Part
from puzzle.modeling import PuzzleConfig
from puzzle.variants import BlockVariant, Space, Variant

COPIES = 6
"""Of the measured subblock: the stack is as deep as a small model, and the copies take most of its time."""
EMPTY_LAYERS = 64
"""An empty layer takes microseconds. vLLM refuses a model of nothing else, so these too are between pads."""

PADS, _EMPTY_LAYERS, _WHOLE, _LAST = "pads", "empty layers", "whole blocks", "no last ffn"

Stack = tuple[BlockVariant, ...]
StackTimes = Mapping[str, float]
"""Milliseconds by the name of the stack."""
PartName = tuple[Part | Literal["last ffn"], str]
"""As in `CostRow`: `("attention", "kv2")`, `("ffn", "none")`, `("fixed", "")`; `last ffn` is one in the last layer."""
FIXED: PartName = ("fixed", "")


@dataclass(frozen=True)
class Plan:
    """Which stacks are measured for a space, and how costs follow from their times; one measurement for each shape."""

    num_layers: int
    pad: BlockVariant
    variants: tuple[Variant, ...]
    """The distinct ones of all layers."""

    @classmethod
    def of(cls, space: Space, config: PuzzleConfig) -> "Plan":
        """The plan for a space; the pad is the largest of the parent's blocks."""
        pad = max((layer.parent for layer in space.layers), key=lambda block: block.num_params(config))
        variants = (variant for layer in space.layers for variant in (*layer.attention, *layer.ffn))
        return cls(len(space.layers), pad, tuple(dict.fromkeys(variants)))

    @property
    def stacks(self) -> dict[str, Stack]:
        """What to measure, by name."""
        stacks: dict[str, Stack] = {
            PADS: (self.pad, self.pad),
            _EMPTY_LAYERS: (self.pad, *(BlockVariant.empty(),) * EMPTY_LAYERS, self.pad),
            _WHOLE: (self.pad, *(self.pad,) * COPIES, self.pad),
            _LAST: (self.pad, BlockVariant.alone(self.pad.attention)),
        }
        for variant in self.variants:
            if not variant.absent:
                stacks[_stack_name(variant)] = (self.pad, *(BlockVariant.alone(variant),) * COPIES, self.pad)
        return stacks

    def costs(self, stack_ms: StackTimes) -> dict[PartName, float]:
        """What every part adds to a model's time; noise can make it negative."""
        empty_layer_ms = (stack_ms[_EMPTY_LAYERS] - stack_ms[PADS]) / EMPTY_LAYERS

        def slope_ms(stack: str) -> float:
            return (stack_ms[stack] - stack_ms[PADS]) / COPIES - empty_layer_ms

        costs: dict[PartName, float] = {
            part_name(variant): 0.0 if variant.absent else slope_ms(_stack_name(variant)) for variant in self.variants
        }
        whole_ms = slope_ms(_WHOLE)
        attention_ms, ffn_ms = costs[part_name(self.pad.attention)], costs[part_name(self.pad.ffn)]
        saved_ms = max(0.0, attention_ms + ffn_ms - whole_ms)  # a block that takes more has found less in the cache
        last_ffn_ms = max(0.0, stack_ms[PADS] - stack_ms[_LAST] + saved_ms)
        for variant in self.variants:
            if variant.subblock == "ffn":
                costs["last ffn", variant.name] = costs[part_name(variant)] * (last_ffn_ms / ffn_ms if ffn_ms else 1.0)
            elif not variant.absent:
                costs[part_name(variant)] -= saved_ms
        pads_ms = 2 * (attention_ms + ffn_ms - saved_ms) - ffn_ms + last_ffn_ms
        costs[FIXED] = stack_ms[PADS] - pads_ms + (self.num_layers - 2) * empty_layer_ms
        return costs


def part_name(variant: Variant) -> PartName:
    return variant.subblock, variant.name


def _stack_name(variant: Variant) -> str:
    return f"{variant.subblock} {variant.name}"
