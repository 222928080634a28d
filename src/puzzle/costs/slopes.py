"""From times of stacks to costs of subblocks: the slope between two depths inside a real model.

A module timed alone finds its weights in the cache, which the same module inside a model does not; so every variant is
timed as copies of its subblock between two of the parent's own blocks (the pads), and what the copies add to the pads
is divided by their number. The pads take the place of the first and last layer, which engines may treat in their own
way.

Every layer is there in every child, if only as an empty one, so the time of an empty layer belongs to what is fixed,
and `none` costs nothing.

Engines that run rows of attention and FFN put something in the place of a missing subblock (llama.cpp: an FFN of
zeros), which a whole block does not need. So whole blocks are timed as well, and what the pad takes less than its
subblocks is taken off every attention.

Engines may leave out most of the last layer's FFN in a prefill, of which only the last token's output is asked for. So
the FFN of the pad is timed as the last one too, and its share of a middle one's time holds for all FFNs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from puzzle.artefacts.costs import Part
from puzzle.modeling import PuzzleConfig
from puzzle.variants import BlockVariant, NoAttention, NoFFN, Space, Variant, num_params

COPIES = 6
"""Of the measured subblock: the stack is then as deep as a small model, and their share of its time is large."""
EMPTY_LAYERS = 64
"""An empty layer takes microseconds: so many cost nothing, and its time comes out well. A model of nothing else would
tell more directly, but vLLM refuses a model without attention."""

_EMPTY = BlockVariant(NoAttention(), NoFFN())
PADS, _EMPTY_LAYERS, _WHOLE, _LAST = "pads", "empty layers", "whole blocks", "no last ffn"

Stack = tuple[BlockVariant, ...]
StackTimes = Mapping[str, float]
"""Milliseconds by the name of the stack: those of one round, or the typical ones."""
PartName = tuple[Part | Literal["last ffn"], str]
"""As in `CostRow`: `("attention", "kv2")`, `("ffn", "none")`, `("fixed", "")`; `last ffn` is one in the last layer."""
FIXED: PartName = ("fixed", "")


@dataclass(frozen=True)
class Plan:
    """Which stacks are measured for a space, and how costs follow from their times."""

    num_layers: int
    pad: BlockVariant
    variants: tuple[Variant, ...]
    """The distinct ones of all layers: layers share the measurement of a shape."""

    @classmethod
    def of(cls, space: Space, config: PuzzleConfig) -> "Plan":
        """The plan for a space; the pad is the largest of the parent's own blocks."""
        pad = max(
            (layer.parent for layer in space.layers),
            key=lambda block: num_params(block.attention, config) + num_params(block.ffn, config),
        )
        variants = (variant for layer in space.layers for variant in (*layer.attention, *layer.ffn))
        return cls(len(space.layers), pad, tuple(dict.fromkeys(variants)))

    @property
    def stacks(self) -> dict[str, Stack]:
        """What to measure, by name."""
        stacks: dict[str, Stack] = {
            PADS: (self.pad, self.pad),
            _EMPTY_LAYERS: (self.pad, *(_EMPTY,) * EMPTY_LAYERS, self.pad),
            _WHOLE: (self.pad, *(self.pad,) * COPIES, self.pad),
            _LAST: (self.pad, BlockVariant(self.pad.attention, NoFFN())),
        }
        for variant in self.variants:
            if variant.kind != "none":
                stacks[_stack_name(variant)] = (self.pad, *(_alone(variant),) * COPIES, self.pad)
        return stacks

    def costs(self, stack_ms: StackTimes) -> dict[PartName, float]:
        """What every part adds to a model's time; noise can make it negative."""
        empty_layer_ms = (stack_ms[_EMPTY_LAYERS] - stack_ms[PADS]) / EMPTY_LAYERS
        costs = {
            part_name(variant): (stack_ms[_stack_name(variant)] - stack_ms[PADS]) / COPIES - empty_layer_ms
            if variant.kind != "none"
            else 0.0
            for variant in self.variants
        }
        whole_ms = (stack_ms[_WHOLE] - stack_ms[PADS]) / COPIES - empty_layer_ms
        attention_ms, ffn_ms = costs[part_name(self.pad.attention)], costs[part_name(self.pad.ffn)]
        saved_ms = max(0.0, attention_ms + ffn_ms - whole_ms)  # a block that takes more has found less in the cache
        last_ffn_ms = max(0.0, stack_ms[PADS] - stack_ms[_LAST] + saved_ms)
        for variant in self.variants:
            if variant.subblock == "ffn":
                costs["last ffn", variant.name] = costs[part_name(variant)] * (last_ffn_ms / ffn_ms if ffn_ms else 1.0)
            elif variant.kind != "none":
                costs[part_name(variant)] -= saved_ms
        pads_ms = 2 * (attention_ms + ffn_ms - saved_ms) - ffn_ms + last_ffn_ms
        costs[FIXED] = stack_ms[PADS] - pads_ms + (self.num_layers - 2) * empty_layer_ms
        return costs


def part_name(variant: Variant) -> PartName:
    return variant.subblock, variant.name


def _stack_name(variant: Variant) -> str:
    return f"{variant.subblock} {variant.name}"


def _alone(variant: Variant) -> BlockVariant:
    return BlockVariant(variant, NoFFN()) if variant.subblock == "attention" else BlockVariant(NoAttention(), variant)
