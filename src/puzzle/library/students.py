"""Students: what is trained on one layer of the parent, in BLD from the parent's own input to that layer.

A loss is E||y - y'||^2 / E||y||^2 (paper section 2.2). Its denominator is calibrated, so that a token's loss does not
depend on the batch it is in.

What a GPU computes of a small student takes less time than to launch it. There students of equal shapes, one in each of
several layers, are computed as one whose batch is theirs one after another (`Stack`); elsewhere each is alone.

Shapes: L students in a stack, B batch of each, T tokens, N = B * T, D hidden size, I inputs of the output projection.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from puzzle.data import TokenData
from puzzle.device import autocast, layers_at_once
from puzzle.modeling import PuzzleConfig, PuzzleDecoderLayer
from puzzle.recipe import Recipe
from puzzle.runs import Progress
from puzzle.streams import LayerPass, Texts, packed
from puzzle.training import Part, Trained, adamw, train
from puzzle.variants import State, Variant, add_sum, damping, split_state


class _Computed:
    """What students compute: one of them, or those of a stack, whose parts of a batch follow one another, [L * B, ...].

    Args:
        modules: of the variants, one each. loss: as of `Student`.
    """

    def __init__(
        self, variants: Sequence[Variant], config: PuzzleConfig, modules: Sequence[PuzzleDecoderLayer], loss: str
    ) -> None:
        self.variants, self.modules, self._loss = tuple(variants), modules, loss
        self.subblock = variants[0].subblock if len(variants) == 1 else "block"
        last = variants[0].output_projection(config) if len(variants) == 1 else None
        self.projection = None if last is None else modules[0].get_submodule(last)
        """The linear map that a single subblock's output comes from, if it has one. A norm may follow: then its
        optimum is that of directions, which helps nearly as much."""

    def output(self, hidden_BTD: Tensor, context: Mapping[str, Any]) -> Tensor:
        """What it adds to the residual stream, [B, T, D], from its input in float32."""
        output_BTD = self.modules[0].subblock_output(self.variants[0].subblock, hidden_BTD, **context)
        for module in self.modules[1:]:
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

    @property
    def _through_ffn(self) -> bool:
        return self._loss == "block" and self.subblock == "attention"

    def missed(self, seen: LayerPass) -> Tensor:
        """What its output misses of what it learns, [B, T, D], with its gradient."""
        output_BTD, wanted_BTD = self._output(seen), self._wanted(seen)
        if self._loss == "refined" or self._through_ffn:
            # What the others miss of the block's output is what they miss of their own, without the sum's rounding.
            output_BTD, wanted_BTD = seen.inputs_BTD["attention"].float() + output_BTD, seen.output_BTD
        if self._through_ffn:
            middle_BTD = output_BTD.to(seen.output_BTD.dtype)
            output_BTD = output_BTD + seen.layer.subblock_output("ffn", middle_BTD, **seen.context)
        return output_BTD.float() - wanted_BTD.float()

    def projection_input(self, seen: LayerPass) -> Tensor:
        """What enters its projection on a batch, [B, T, I]."""
        captured: list[Tensor] = []
        assert self.projection is not None
        with self.projection.register_forward_pre_hook(lambda _, args: captured.append(args[0])):
            self._output(seen)
        return captured[0]


class Student(_Computed):
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
        # Copied: variants of a subblock start from the same tensors of the parent, and each trains its own.
        own = {name: value.to(device, copy=True) for name, value in state.items()}
        modules = [v.build(config, split_state(own, v.subblock, config), layer) for v in variants]
        super().__init__(variants, config, [module.requires_grad_(trained) for module in modules], loss)
        self.layer, self.config, self.power, self.device = layer, config, power, device
        # With buffers that checkpoints hold.
        self._weights = dict(chain.from_iterable(module.state_dict(keep_vars=True).items() for module in modules))

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

    @cached_property
    def likeness(self) -> Any:
        """What students have in common that can be a stack: variants and all that modules say beside their weights.

        A student is alone whose weights are no linear maps and norms, or whose loss asks the parent's layer.
        """
        every = [*chain.from_iterable(module.named_modules() for module in self.modules)]
        whole = all(_stacks(module) for _, module in every) and not self._through_ffn
        rules = [
            (name, type(module), key, value)
            for name, module in every
            for key, value in vars(module).items()
            if key != "layer_idx" and isinstance(value, int | float | str | None)
        ]
        return self.variants, self._loss, tuple(rules) if whole else self.layer


class Stack(_Computed):
    """Students that are alike, each of a layer of its own, computed as one."""

    def __init__(self, students: Sequence[Student]) -> None:
        first, each = students[0], zip(*(student.modules for student in students), strict=True)
        modules = [
            some[0] if len(some) == 1 else _stacked(variant.build(first.config, layer=first.layer), some)
            for variant, some in zip(first.variants, each, strict=True)
        ]
        super().__init__(first.variants, first.config, modules, first._loss)
        self.students = students
        self.powers = torch.tensor([student.power for student in students], dtype=torch.float64, device=first.device)

    def losses(self, seen: LayerPass) -> Tensor:
        """The students' losses on a batch, [L], with their gradients."""
        return self.apart(self.missed(seen)).square().mean((1, 2)) / self.powers.float()

    def apart(self, values: Tensor) -> Tensor:
        """Each student's part of a batch, [L * B, T, ...] -> [L, N, ...]."""
        return values.unflatten(0, (len(self.students), -1)).flatten(1, 2)


def _stacks(module: nn.Module) -> bool:
    """Whether `_Stacked` can take its place, or nothing has to: linear maps, norms, and what has no tensors itself."""
    own = [*module.parameters(recurse=False)]
    norm = all(parameter.ndim == 1 for parameter in own) and not [*module.children()]
    return not [*module.buffers(recurse=False)] and (not own or type(module) is nn.Linear or norm)


def _stacked(made: PuzzleDecoderLayer, each: Sequence[PuzzleDecoderLayer]) -> PuzzleDecoderLayer:
    """`made`, whose weights are on `meta`, with those modules of each of these layers, together, that have weights."""
    for name, module in [*made.named_modules()]:
        if [*module.parameters(recurse=False)]:
            made.set_submodule(name, _Stacked([layer.get_submodule(name) for layer in each]))
    return made


class _Stacked(nn.Module):
    """Linear maps, or norms, in place of one: each on its own part of the batch, [L * B, T, ...]."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self._each = list(modules)

    def forward(self, inputs: Tensor) -> Tensor:
        first, parts = self._each[0], inputs.unflatten(0, (len(self._each), -1))
        every = [dict(module.named_parameters()) for module in self._each]
        weights = {name: torch.stack([own[name] for own in every]) for name in every[0]}
        if not isinstance(first, nn.Linear):
            return vmap(partial(functional_call, first))(weights, parts).flatten(0, 1)
        if weights["weight"].requires_grad:  # else each student would copy its part, as a parameter is laid out
            weights["weight"].register_hook(Tensor.contiguous)
        outputs = parts.flatten(1, -2) @ weights["weight"].mT
        if "bias" in weights:
            outputs = outputs + weights["bias"].unsqueeze(1)
        return outputs.view(*inputs.shape[:-1], -1)


def student_texts(data: TokenData, recipe: Recipe, batch_size: int, steps: int) -> Texts:
    """What students are trained on, a batch a step, and what tells whether they became better; inputs, [B, T]."""
    return {
        "training": lambda: (data.training_batch(step, batch_size, recipe.seed)[:, :-1] for step in range(steps)),
        "validation": lambda: data.inputs("validation", batch_size, recipe.library.validation_tokens),
    }


class _Stacks:
    """Students over batches: each with its layer's pass, or those of as many layers together as suit the device."""

    def __init__(self, students: Sequence[Student]) -> None:
        self._students, self._stacks_of, self._layers_at_once = students, cache(self._made), 0

    def _made(self, *layers: int) -> list[Stack]:
        alike: dict[Any, list[Student]] = defaultdict(list)
        for student in self._students:
            if student.layer in layers:
                alike[student.likeness].append(student)
        return [Stack(students) for students in alike.values()]

    def over(self, passes: Iterable[LayerPass]) -> Iterator[tuple[Stack, LayerPass]]:
        """Every student, in one of the stacks, with what they all see of a batch."""
        rest = iter(passes)
        for first in rest:
            self._layers_at_once = self._layers_at_once or layers_at_once(first.output_BTD)  # by the first batch
            seen = {each.index: each for each in (first, *islice(rest, self._layers_at_once - 1))}
            joined: dict[tuple[int, ...], LayerPass] = {}
            for stack in self._stacks_of(*seen):
                layers = tuple(student.layer for student in stack.students)
                joined[layers] = joined.get(layers) or _joined([seen[layer] for layer in layers])
                yield stack, joined[layers]


def _joined(passes: Sequence[LayerPass]) -> LayerPass:
    """What a stack sees: the batches of these layers one after another."""
    if len(passes) == 1:
        return passes[0]
    inputs_BTD, added_BTD = (
        {which: torch.cat([each[which] for each in some]) for which in some[0]}
        for some in zip(*((seen.inputs_BTD, seen.added_BTD) for seen in passes), strict=True)
    )
    output_BTD = torch.cat([seen.output_BTD for seen in passes])
    return replace(passes[0], inputs_BTD=inputs_BTD, added_BTD=added_BTD, output_BTD=output_BTD)


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
    stacks = _Stacks(students)
    batches: Iterator[Iterable[LayerPass]] | None = None

    def gradients(step: int) -> dict[str, Tensor]:
        nonlocal batches
        batches = batches or text(step)
        losses = []
        for stack, seen in stacks.over(next(batches)):
            with autocast(seen.output_BTD.device, precision):
                losses_L = stack.losses(seen)
            losses_L.sum().backward()
            losses.append(losses_L.detach())
        return {"loss": torch.cat(losses).nanmean()}

    return train(parts, gradients, steps=steps, warmup=0.05, max_grad_norm=1.0, folder=folder, bar=bar)


@torch.no_grad()
def held_out(
    students: Sequence[Student], text: Iterable[Iterable[LayerPass]], precision: torch.dtype = torch.float32
) -> dict[str, tuple[float, float]]:
    """By name: E||y - y'||^2 / E||y||^2, or E||y'||^2 where y is 0, inf if not finite; and E||y||^2, per element."""
    sums: dict[Stack, State] = defaultdict(dict)
    for stack, seen in chain.from_iterable(map(_Stacks(students).over, text)):
        with autocast(seen.output_BTD.device, precision):
            error_L = stack.losses(seen).double() * stack.powers
        power_L = stack.apart(stack.target(seen)).float().square().mean((1, 2)).double()
        tokens = seen.num_tokens // len(stack.students)
        add_sum(sums[stack], "sums", tokens * torch.stack([error_L, power_L, torch.ones_like(power_L)], dim=1))
    found = {}
    for stack, sums_of in sums.items():
        for student, (error_sum, power_sum, tokens) in zip(stack.students, sums_of["sums"].tolist(), strict=True):
            loss = error_sum / (power_sum or tokens)
            found[student.name] = loss if math.isfinite(loss) else math.inf, power_sum / tokens
    return found


@torch.no_grad()
def update_projections(
    students: Sequence[Student], text: Callable[[], Iterable[Iterable[LayerPass]]], memory_bytes: int
) -> None:
    """Set the students' output projections to their optimum, a least-squares update of the present ones.

    With everything before a projection W as it is, from its input a to the subblock's output y, the optimum is
    W + (E[y a^T] - W C) (C + damping)^-1, C = E[a a^T]. A bias stays, and so does a projection whose optimum is not
    finite. Products are in float32, sums in float64. `text` is read as often as the memory for moments asks for.
    """
    projections = {each: cast(nn.Linear, each.projection) for each in students if each.projection is not None}

    def num_bytes(student: Student) -> int:
        outputs, inputs = projections[student].weight.shape
        return 8 * inputs * (inputs + outputs)

    # While one is added to and solved, it takes the room of two more.
    room = memory_bytes - max((2 * num_bytes(student) for student in projections), default=0)
    for group in packed(projections, num_bytes, room):
        sums: dict[Stack, State] = defaultdict(dict)
        for stack, seen in chain.from_iterable(map(_Stacks(group).over, text())):
            wanted_LND = stack.apart(seen.added_BTD[stack.variants[0].subblock]).float() / stack.modules[0].multiplier
            biases: list[Tensor] = [bias for each in stack.students if (bias := projections[each].bias) is not None]
            if biases:
                wanted_LND = wanted_LND - torch.stack(biases).unsqueeze(1)
            input_LNI = stack.apart(stack.projection_input(seen)).float()
            add_sum(sums[stack], "second_II", input_LNI.mT @ input_LNI)
            add_sum(sums[stack], "cross_DI", wanted_LND.mT @ input_LNI)
            add_sum(sums[stack], "tokens", torch.tensor([input_LNI.shape[1]] * len(input_LNI)))
        for stack in [*sums]:
            moments = sums.pop(stack)
            each = zip(stack.students, moments["second_II"], moments["cross_DI"], moments["tokens"], strict=True)
            for student, second_II, cross_DI, tokens in each:
                weight_DI, mean_II = projections[student].weight.double(), second_II / tokens
                left_DI = cross_DI / tokens - weight_DI @ mean_II
                mean_II.diagonal().add_(damping(mean_II))
                solved_DI = weight_DI + torch.linalg.solve(mean_II, left_DI.T).T
                if solved_DI.isfinite().all():
                    projections[student].weight.copy_(solved_DI)
