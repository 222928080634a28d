"""Students: what is trained on one layer of the parent, in BLD from the parent's own input to that layer.

A loss is E||y - y'||^2 / E||y||^2 (paper section 2.2). Its denominator is calibrated, so that a token's loss does not
depend on the batch it is in.

Shapes: B batch, T tokens, N = B * T, D hidden size, I inputs of the output projection.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from puzzle.data import TokenData
from puzzle.device import autocast
from puzzle.modeling import PuzzleConfig
from puzzle.recipe import Recipe
from puzzle.runs import Progress
from puzzle.streams import LayerPass, Texts, packed
from puzzle.training import Part, Trained, adamw, train
from puzzle.variants import State, Variant, add_sum, damping, split_state


class Student:
    """One variant of a subblock; or an attention and an FFN variant together, trained as a whole (coupled BLD).

    Args:
        variants: one, or one of each subblock. state: their tensors by their names in the layer.
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
        self.layer, self.variants, self.power, self._loss = layer, tuple(variants), power, loss
        self.subblock = variants[0].subblock if len(variants) == 1 else "block"
        # Copied: variants of a subblock start from the same tensors of the parent, and each trains its own.
        own = {name: value.to(device, copy=True) for name, value in state.items()}
        self._modules = [
            v.build(config, split_state(own, v.subblock, config), layer).requires_grad_(trained) for v in variants
        ]
        self._weights = dict(chain.from_iterable(module.named_parameters() for module in self._modules))
        last = variants[0].output_projection(config) if len(variants) == 1 else None
        self.projection = None if last is None else cast(nn.Linear, self._modules[0].get_submodule(last))
        """The linear map that a single subblock's output comes from, if its variant has one."""

    @property
    def name(self) -> str:
        """Such as `3.ffn.w512` or `3.block.kv2+w512`."""
        return f"{self.layer}.{self.subblock}.{'+'.join(variant.name for variant in self.variants)}"

    def parameters(self) -> dict[str, Tensor]:
        """What is trained, by name; float32. Empty if there is nothing to train."""
        return {name: value for name, value in self._weights.items() if value.requires_grad}

    def state(self) -> State:
        """Its weights as they are now, copies."""
        return {name: value.detach().clone() for name, value in self._weights.items()}

    def output(self, hidden_BTD: Tensor, context: Mapping[str, Any]) -> Tensor:
        """What it adds to the residual stream, [B, T, D], from its input in float32."""
        output_BTD = self._modules[0].subblock_output(self.variants[0].subblock, hidden_BTD, **context)
        for module in self._modules[1:]:
            output_BTD = output_BTD + module.subblock_output("ffn", hidden_BTD + output_BTD, **context)
        return output_BTD

    def _output(self, seen: LayerPass) -> Tensor:
        return self.output(seen.inputs_BTD[self.variants[0].subblock].float(), seen.context)

    def target(self, seen: LayerPass) -> Tensor:
        """What its loss is relative to, [B, T, D]."""
        return seen.output_BTD if self._loss == "block" else self._wanted(seen)

    def _wanted(self, seen: LayerPass) -> Tensor:
        """The output that it learns; of both subblocks not by the layer's output, which was rounded."""
        first, *rest = (seen.added_BTD[variant.subblock].float() for variant in self.variants)
        return sum(rest, first)

    def loss(self, seen: LayerPass) -> Tensor:
        """Its loss on a batch, a scalar with its gradient."""
        output_BTD, wanted_BTD = self._output(seen), self._wanted(seen)
        through_ffn = self._loss == "block" and self.subblock == "attention"
        if self._loss == "refined" or through_ffn:
            # What the others miss of the block's output is what they miss of their own, without the sum's rounding.
            output_BTD, wanted_BTD = seen.inputs_BTD["attention"].float() + output_BTD, seen.output_BTD
        if through_ffn:
            middle_BTD = output_BTD.to(seen.output_BTD.dtype)
            output_BTD = output_BTD + seen.layer.subblock_output("ffn", middle_BTD, **seen.context)
        return (output_BTD.float() - wanted_BTD.float()).square().mean() / self.power

    def projection_input(self, seen: LayerPass) -> Tensor:
        """What enters its projection on a batch, [B, T, I]."""
        captured: list[Tensor] = []
        assert self.projection is not None
        with self.projection.register_forward_pre_hook(lambda _, args: captured.append(args[0])):
            self._output(seen)
        return captured[0]


def student_texts(data: TokenData, recipe: Recipe, batch_size: int, steps: int) -> Texts:
    """What students are trained on, a batch a step, and what tells whether they became better; inputs, [B, T]."""
    return {
        "training": lambda: (data.training_batch(step, batch_size, recipe.seed)[:, :-1] for step in range(steps)),
        "validation": lambda: data.inputs("validation", batch_size, recipe.library.validation_tokens),
    }


def _of_layer(students: Sequence[Student], passes: Iterable[LayerPass]) -> Iterator[tuple[Student, LayerPass]]:
    """Every student with every pass of its layer."""
    for seen in passes:
        yield from ((student, seen) for student in students if student.layer == seen.index)


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
        text: the passes of every batch from a given step on, one a step. precision: of products; weights stay float32.
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
        for student, seen in _of_layer(students, next(batches)):
            with autocast(seen.output_BTD.device, precision):
                loss = student.loss(seen)
            loss.backward()
            losses.append(loss.detach())
        return {"loss": torch.stack(losses).nanmean()}

    return train(parts, gradients, steps=steps, warmup=0.05, max_grad_norm=1.0, folder=folder, bar=bar)


@torch.no_grad()
def held_out(
    students: Sequence[Student], text: Iterable[Iterable[LayerPass]], precision: torch.dtype = torch.float32
) -> dict[str, tuple[float, float]]:
    """Of each student over a text, by name: E||y - y'||^2 / E||y||^2, or E||y'||^2 where y is 0, inf if it is not
    finite; and E||y||^2, per element.
    """
    sums: State = {}
    for student, seen in _of_layer(students, chain.from_iterable(text)):
        with autocast(seen.output_BTD.device, precision):
            error = student.loss(seen).double() * student.power
        power = student.target(seen).float().square().mean().double()
        add_sum(sums, student.name, seen.num_tokens * torch.stack([error, power, torch.ones_like(power)]))
    found = {}
    for name, (error_sum, power_sum, tokens) in ((name, sums_3.tolist()) for name, sums_3 in sums.items()):
        loss = error_sum / (power_sum or tokens)
        found[name] = loss if math.isfinite(loss) else math.inf, power_sum / tokens
    return found


@torch.no_grad()
def update_projections(students: Sequence[Student], text: Callable[[], Iterable[LayerPass]], memory_bytes: int) -> None:
    """Set the students' output projections to their optimum, a least-squares update of the present ones.

    With everything before a projection W as it is, from its input a to the subblock's output y, the optimum is
    W + (E[y a^T] - W C) (C + damping)^-1, C = E[a a^T]. A bias stays, and so does a projection whose optimum is not
    finite. Products are in float32, sums in float64. `text` is read as often as the memory for moments asks for.
    """
    projections = {student: student.projection for student in students if student.projection is not None}

    def num_bytes(student: Student) -> int:
        outputs, inputs = projections[student].weight.shape
        return 8 * inputs * (inputs + outputs)

    # While one is added to and solved, it takes the room of two more.
    room = memory_bytes - max((2 * num_bytes(student) for student in projections), default=0)
    for group in packed(projections, num_bytes, room):
        sums: dict[Student, State] = defaultdict(dict)
        for student, seen in _of_layer(group, text()):
            wanted_ND = seen.added_BTD[student.variants[0].subblock].float().flatten(0, 1)
            if (bias := projections[student].bias) is not None:
                wanted_ND = wanted_ND - bias
            input_NI = student.projection_input(seen).float().flatten(0, 1)
            add_sum(sums[student], "second_II", input_NI.T @ input_NI)
            add_sum(sums[student], "cross_DI", wanted_ND.T @ input_NI)
            add_sum(sums[student], "tokens", torch.tensor(len(input_NI)))
        for student in group:
            projection, moments = projections[student], sums.pop(student)
            second_II, cross_DI = (moments.pop(name) / moments["tokens"] for name in ("second_II", "cross_DI"))
            weight_DI = projection.weight.double()
            left_DI = cross_DI - weight_DI @ second_II
            second_II.diagonal().add_(damping(second_II))
            solved_DI = weight_DI + torch.linalg.solve(second_II, left_DI.T).T
            if solved_DI.isfinite().all():
                projection.weight.copy_(solved_DI)
