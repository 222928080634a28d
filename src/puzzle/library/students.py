"""One student of BLD: a variant of one half of one layer, learning the parent's contribution."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from puzzle.blocks import Half, State, Variant, build_subblock
from puzzle.modeling import PuzzleConfig, PuzzleDecoderLayer

HALVES: tuple[Half, Half] = ("attention", "ffn")


def contribution(layer: PuzzleDecoderLayer, half: Half, hidden_BTD: Tensor, context: dict[str, Any]) -> Tensor:
    """What one half of a layer adds to the residual stream, [B, T, D]; zeros where it has no such half."""
    if half == "attention" and layer.has_attention:
        return layer.attention_contribution(hidden_BTD, **context)
    if half == "ffn" and layer.has_ffn:
        return layer.ffn_contribution(hidden_BTD)
    return torch.zeros_like(hidden_BTD)


class Student:
    """A variant's subblock with its loss: E||y - y'||^2 / E||y||^2, y the parent's contribution (paper section 2.2).

    In training the denominator is the calibrated `output_power`, so that a token's loss does not depend on its batch.
    """

    def __init__(
        self,
        layer: int,
        variant: Variant,
        config: PuzzleConfig,
        state: State,
        output_power: float,
        device: torch.device,
    ) -> None:
        self.layer = layer
        self.variant = variant
        # Copied: variants of a half start from the same tensors of the parent, and each trains its own.
        own = {name: value.to(device, copy=True) for name, value in state.items()}
        self.module = build_subblock(variant, config, own)
        self.module.requires_grad_(variant.trained)
        self._output_power = output_power

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.variant.half}.{self.variant.name}"

    def parameters(self) -> dict[str, Tensor]:
        return {f"{self.name}.{name}": parameter for name, parameter in self.module.named_parameters()}

    def contribution(self, hidden_BTD: Tensor, context: dict[str, Any]) -> Tensor:
        return contribution(self.module, self.variant.half, hidden_BTD, context)

    def loss(self, hidden_BTD: Tensor, target_BTD: Tensor, context: dict[str, Any]) -> Tensor:
        error_BTD = self.contribution(hidden_BTD, context).float() - target_BTD.float()
        return error_BTD.square().mean() / self._output_power

    def state(self) -> State:
        return {name: parameter.detach().clone() for name, parameter in self.module.named_parameters()}


def clip_gradients(students: Sequence[Student], max_norm: float) -> None:
    """Clip every student by its own norm: their losses have nothing to do with each other."""
    for student in students:
        torch.nn.utils.clip_grad_norm_(student.module.parameters(), max_norm)


def half_of(student: Student) -> tuple[int, Half]:
    return student.layer, student.variant.half
