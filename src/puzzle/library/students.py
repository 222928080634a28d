"""Students: what is trained on one layer of the parent, in BLD from the parent's own input to that layer.

A loss is E||y - y'||^2 / E||y||^2 (paper section 2.2). Its denominator is calibrated, so that a token's loss does not
depend on the batch it is in.

Shapes: B batch, T tokens, D hidden size, I inputs of the output projection.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from puzzle.device import autocast
from puzzle.modeling import PuzzleConfig
from puzzle.runs import Progress
from puzzle.streams import LayerPass
from puzzle.training import Part, Trained, adamw, train
from puzzle.variants import State, Variant, split_state

_WARMUP = 0.05
_MAX_GRAD_NORM = 1.0


class Student:
    """One variant of a subblock; or an attention and an FFN variant together, trained as a whole (coupled BLD).

    Args:
        variants: one, or one of each subblock.
        state: their tensors by their names in the layer.
        power: calibrated E[y^2] of the target, per element: what the squared error is divided by.
        trained: whether anything is left to learn.
        loss: `block` compares the block's output; an attention's goes through the parent's own FFN (the paper's).
            `refined` compares the layer's output where its input is not the parent's own.
    """

    def __init__(
        self,
        layer: int,
        variants: Sequence[Variant],
        config: PuzzleConfig,
        state: State,
        power: float,
        device: torch.device,
        *,
        trained: bool = True,
        loss: Literal["subblock", "block", "refined"] = "subblock",
    ) -> None:
        self.layer, self.power, self._loss = layer, power, loss
        self.variants = tuple(variants)
        self.subblock = self.variants[0].subblock if len(self.variants) == 1 else "block"
        # Copied: variants of a subblock start from the same tensors of the parent, and each trains its own.
        own = {name: value.to(device, copy=True) for name, value in state.items()}
        self._modules = [v.build(config, split_state(own, v.subblock)) for v in self.variants]
        for module in self._modules:
            module.requires_grad_(trained)

    @property
    def name(self) -> str:
        """Such as `3.ffn.w512` or `3.block.kv2+w512`."""
        return f"{self.layer}.{self.subblock}.{'+'.join(variant.name for variant in self.variants)}"

    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by name; float32. Empty if there is nothing to train."""
        return {name: value for name, value in self._named().items() if value.requires_grad}

    def state(self) -> State:
        """Its weights as they are now, copies."""
        return {name: value.detach().clone() for name, value in self._named().items()}

    def _named(self) -> dict[str, Tensor]:
        return {name: value for module in self._modules for name, value in module.named_parameters()}

    def output(self, hidden_BTD: Tensor, context: Mapping[str, Any]) -> Tensor:
        """What it adds to the residual stream, [B, T, D], from its input in float32."""
        output_BTD = self._modules[0].subblock_output(self.variants[0].subblock, hidden_BTD, **context)
        if len(self._modules) == 2:
            output_BTD = output_BTD + self._modules[1].subblock_output("ffn", hidden_BTD + output_BTD, **context)
        return output_BTD

    def _output(self, seen: LayerPass) -> Tensor:
        return self.output(seen.subblock_input(self.variants[0].subblock).float(), seen.context)

    def target(self, seen: LayerPass) -> Tensor:
        """What its loss is relative to, [B, T, D]."""
        return seen.output_BTD if self._loss == "block" else self._wanted(seen)

    def _wanted(self, seen: LayerPass) -> Tensor:
        """The output that it learns; of both subblocks not by the layer's output, which was rounded."""
        if len(self.variants) == 2:
            return seen.attention_BTD.float() + seen.ffn_BTD.float()
        return seen.subblock_output(self.variants[0].subblock)

    def loss(self, seen: LayerPass) -> Tensor:
        """Its loss on a batch, a scalar with its gradient."""
        output_BTD, wanted_BTD = self._output(seen), self._wanted(seen)
        if self._loss == "refined" or (self._loss == "block" and self.subblock == "attention"):
            # What the others miss of the block's output is what they miss of their own, without the sum's rounding.
            output_BTD, wanted_BTD = seen.input_BTD.float() + output_BTD, seen.output_BTD
        if self._loss == "block" and self.subblock == "attention":
            middle_BTD = output_BTD.to(seen.input_BTD.dtype)
            output_BTD = output_BTD + seen.layer.subblock_output("ffn", middle_BTD, **seen.context)
        return (output_BTD.float() - wanted_BTD.float()).square().mean() / self.power

    @property
    def projection(self) -> nn.Linear | None:
        """The linear map that a single subblock's output comes from, if its variant has one."""
        name = self.variants[0].output_projection
        if name is None or len(self.variants) == 2:
            return None
        return cast(nn.Linear, self._modules[0].get_submodule(name))

    def projection_input(self, seen: LayerPass) -> Tensor:
        """What enters that map on a batch, [B, T, I]."""
        captured: list[Tensor] = []
        assert self.projection is not None
        handle = self.projection.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
        try:
            self._output(seen)
        finally:
            handle.remove()
        return captured[0]


def fit(
    students: Sequence[Student],
    text: Callable[[int], Iterator[Iterable[LayerPass]]],
    *,
    steps: int,
    learning_rate: float,
    precision: torch.dtype,
    folder: Path,
    bar: Progress,
) -> Trained:
    """AdamW on all students at once, each clipped by its own gradient norm; resumes from the state in `folder`.

    Args:
        text: the passes of every batch from a given step on, one batch a step.
        precision: of matrix products; weights stay float32.
    """
    parts = []
    for student in students:
        parameters = {f"{student.name}.{name}": value for name, value in student.parameters().items()}
        parts.append(Part(student.name, parameters, [adamw(parameters.values(), learning_rate)]))
    batches: Iterator[Iterable[LayerPass]] | None = None

    def gradients(step: int) -> dict[str, Tensor]:
        nonlocal batches
        batches = batches or text(step)
        losses = []
        for seen in next(batches):
            for student in students:
                if student.layer == seen.index:
                    with autocast(seen.input_BTD.device, precision):
                        loss = student.loss(seen)
                    loss.backward()
                    losses.append(loss.detach())
        return {"loss": torch.stack(losses).nanmean()}

    return train(parts, gradients, steps=steps, warmup=_WARMUP, max_grad_norm=_MAX_GRAD_NORM, folder=folder, bar=bar)


@torch.no_grad()
def held_out_losses(
    students: Sequence[Student], text: Iterable[Iterable[LayerPass]], precision: torch.dtype = torch.float32
) -> dict[str, float]:
    """E||y - y'||^2 / E||y||^2 over a text by name of the student, E||y'||^2 where y is 0; inf if it is not finite."""
    sums: dict[str, Tensor] = {}
    for layer_passes in text:
        for seen in layer_passes:
            tokens = seen.input_BTD[..., 0].numel()
            for student in students:
                if student.layer == seen.index:
                    with autocast(seen.input_BTD.device, precision):
                        error = student.loss(seen).double() * student.power
                    power = student.target(seen).float().square().mean().double()
                    added_3 = tokens * torch.stack([error, power, torch.ones_like(power)])
                    sums[student.name] = sums[student.name] + added_3 if student.name in sums else added_3
    losses = {}
    for name, (error_sum, power_sum, count) in ((name, sums_3.tolist()) for name, sums_3 in sums.items()):
        loss = error_sum / (power_sum or count)
        losses[name] = loss if math.isfinite(loss) else math.inf
    return losses
