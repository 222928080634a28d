"""Coupled BLD: whole blocks trained, an attention variant together with an FFN variant (paper section 2.2).

There are as many blocks as products of variants, so it is for a narrowed space: the variants that a search over the
decoupled library prefers (paper appendix F.1.1).

Shapes: B batch, T tokens, D hidden size.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from puzzle.library.students import Student
from puzzle.modeling import PuzzleConfig
from puzzle.parents import LayerPass
from puzzle.variants import SUBBLOCKS, BlockVariant, LayerSpace, Space, State, Variant, build_subblock, split_state


class CoupledStudent(Student):
    """One composed block, learning the output of the parent's block from the parent's own input to it.

    All of it is trained, also a subblock that is the parent's own.

    Args:
        state: the block's tensors by their names in the layer.
        target: whether errors are relative to the block's contribution or to its output.
    """

    def __init__(
        self,
        layer: int,
        block: BlockVariant,
        config: PuzzleConfig,
        state: State,
        power: float,
        device: torch.device,
        *,
        target: Literal["contribution", "block"] = "contribution",
    ) -> None:
        self.layer, self.subblock, self.block = layer, "block", block
        self.power, self._target = power, target
        own = {name: value.to(device, copy=True) for name, value in state.items()}
        self._modules = [
            build_subblock(block.subblock(subblock), config, split_state(own, subblock)) for subblock in SUBBLOCKS
        ]
        for module in self._modules:
            module.requires_grad_(True)

    @property
    def variants(self) -> tuple[str, ...]:
        return (self.block.name,)

    def parameters(self) -> dict[str, Tensor]:
        return {name: value for module in self._modules for name, value in module.named_parameters()}

    def target(self, seen: LayerPass) -> Tensor:
        if self._target == "block":
            return seen.left_BTD
        # Summed up anew: the layer's output was rounded to the parent's precision.
        return seen.attention_BTD.float() + seen.ffn_BTD.float()

    def losses(self, seen: LayerPass) -> dict[str, Tensor]:
        entered_BTD = seen.entered_BTD.float()
        output_BTD = entered_BTD
        for module in self._modules:
            output_BTD = module(output_BTD, **seen.context)
        if self._target == "contribution":
            output_BTD = output_BTD - entered_BTD
        return {self.block.name: (output_BTD.float() - self.target(seen).float()).square().mean() / self.power}

    def states(self) -> dict[str, State]:
        return {self.block.name: {name: value.detach().clone() for name, value in self.parameters().items()}}


def narrow_space(
    space: Space, solutions: Sequence[Sequence[str]], keep: int, always: Sequence[str] | None = None
) -> Space:
    """Of every layer and subblock, the `keep` variants that the architectures use most, and the parent's own (F.1.1).

    Args:
        solutions: architectures of a frontier, each one block name a layer, such as `kv2+w512`.
        always: one whose variants stay in any case, so that what it reaches can still be reached.
    """
    layers = []
    for index, layer in enumerate(space.layers):
        blocks = [BlockVariant.parse(solution[index]) for solution in solutions]
        safe = [BlockVariant.parse(always[index])] if always is not None else []
        attention, ffn = (
            _most_used(
                layer.subblock(subblock),
                [block.subblock(subblock) for block in blocks],
                keep,
                [b.subblock(subblock) for b in safe],
            )
            for subblock in SUBBLOCKS
        )
        layers.append(LayerSpace(attention, ffn))
    return Space(tuple(layers))


def _most_used(
    variants: tuple[Variant, ...], uses: Sequence[Variant], keep: int, always: Sequence[Variant]
) -> tuple[Variant, ...]:
    """The parent's own, which comes first, and the `keep` used most, in their order; earlier ones first where equal."""
    counts = Counter(uses)
    ranked = sorted(variants, key=lambda variant: -counts[variant])
    return tuple(variant for variant in variants if variant in (variants[0], *ranked[:keep], *always))
