"""Students of BLD: what is trained on one layer of the parent, with a loss for each variant that comes of it.

A loss is E||y - y'||^2 / E||y||^2 (paper section 2.2). Its denominator is calibrated, so that a token's loss does not
depend on the batch it is in.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from puzzle.modeling import PuzzleConfig
from puzzle.parents import LayerPass
from puzzle.variants import State, Variant, build_subblock, contribution


class Student(ABC):
    """Something with parameters of its own on one layer, and the variants that come of it, by name such as `kv2`."""

    layer: int
    subblock: str
    """`attention`, `ffn`, or `block` for one that learns a whole block."""
    power: float
    """Calibrated E[y^2] of the target, per element: what the squared error is divided by."""

    @property
    @abstractmethod
    def variants(self) -> tuple[str, ...]:
        """Names of the variants that it trains: one, or all that share parameters."""

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by name; float32. Empty if there is nothing to train."""

    @abstractmethod
    def target(self, seen: LayerPass) -> Tensor:
        """What it learns to give, [B, T, D]."""

    @abstractmethod
    def losses(self, seen: LayerPass) -> dict[str, Tensor]:
        """Each variant's loss on a batch, a scalar with its gradient; BLD minimises their sum."""

    @abstractmethod
    def states(self) -> dict[str, State]:
        """Each variant's weights as they are now, copies."""

    def projections(self) -> dict[str, nn.Linear]:
        """By variant, the last linear map of each, whose output is the subblock's contribution; empty if none."""
        return {}

    def projection_inputs(self, seen: LayerPass) -> dict[str, Tensor]:
        """What enters each of these maps on a batch, [B, T, inputs]."""
        return {}

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.subblock}.{'-'.join(self.variants)}"


class SubblockStudent(Student):
    """One variant of one subblock, from the parent's own input to it towards the parent's contribution there.

    Args:
        trained: whether it has anything to learn.
        target: `block` compares the block's output: an attention's goes through the parent's own FFN (the paper's).
    """

    def __init__(
        self,
        layer: int,
        variant: Variant,
        config: PuzzleConfig,
        state: State,
        power: float,
        device: torch.device,
        *,
        trained: bool = True,
        target: Literal["contribution", "block"] = "contribution",
    ) -> None:
        self.layer, self.subblock, self.variant = layer, variant.subblock, variant
        # Copied: variants of a subblock start from the same tensors of the parent, and each trains its own.
        own = {name: value.to(device, copy=True) for name, value in state.items()}
        self._module = build_subblock(variant, config, own)
        self._module.requires_grad_(trained)
        self.power, self._target = power, target

    @property
    def variants(self) -> tuple[str, ...]:
        return (self.variant.name,)

    def parameters(self) -> dict[str, Tensor]:
        return {name: value for name, value in self._module.named_parameters() if value.requires_grad}

    def target(self, seen: LayerPass) -> Tensor:
        return seen.left_BTD if self._target == "block" else seen.contribution(self.variant.subblock)

    def losses(self, seen: LayerPass) -> dict[str, Tensor]:
        output_BTD, target_BTD = self._contribution(seen), seen.contribution(self.variant.subblock)
        if self._target == "block" and self.variant.subblock == "attention":
            # What an FFN misses of the block's output is what it misses of its own, without the rounding of the sum.
            output_BTD, target_BTD = seen.entered_BTD + output_BTD, seen.left_BTD
            middle_BTD = output_BTD.to(seen.entered_BTD.dtype)
            output_BTD = output_BTD + contribution(seen.layer, "ffn", middle_BTD, seen.context)
        error_BTD = output_BTD.float() - target_BTD.float()
        return {self.variant.name: error_BTD.square().mean() / self.power}

    def states(self) -> dict[str, State]:
        own = {name: parameter.detach().clone() for name, parameter in self._module.named_parameters()}
        return {self.variant.name: own}

    def projections(self) -> dict[str, nn.Linear]:
        name = self.variant.output_projection
        return {} if name is None else {self.variant.name: cast(nn.Linear, self._module.get_submodule(name))}

    def projection_inputs(self, seen: LayerPass) -> dict[str, Tensor]:
        captured: dict[str, Tensor] = {}
        handles = [
            module.register_forward_pre_hook(lambda _, args, name=name: captured.update({name: args[0]}))
            for name, module in self.projections().items()
        ]
        try:
            self._contribution(seen)
        finally:
            for handle in handles:
                handle.remove()
        return captured

    def _contribution(self, seen: LayerPass) -> Tensor:
        return contribution(
            self._module, self.variant.subblock, seen.entering(self.variant.subblock).float(), seen.context
        )


def clip_gradients(students: Sequence[Student], max_norm: float) -> None:
    """Clip every student by its own norm: their losses have nothing to do with each other."""
    for student in students:
        torch.nn.utils.clip_grad_norm_(student.parameters().values(), max_norm)
