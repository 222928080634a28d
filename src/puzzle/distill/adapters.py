"""Low-rank updates of a model's matrices, trained in their place and merged at the end (LoRA, Hu et al. 2021).

A matrix W [O, I] becomes W + up @ down, with down [R, I] random and up [O, R] zero at first.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from puzzle.modeling import PuzzleForCausalLM

_DOWN, _UP = "down", "up"


def add_adapters(model: PuzzleForCausalLM, rank: int, seed: int) -> dict[str, Tensor]:
    """Give every matrix of the layers an update of this rank, in float32; these are all that trains, by name."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    added: dict[str, Tensor] = {}
    for name, module in _matrices(model):
        outputs, inputs = module.weight.shape
        down = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        for part, value in ((_DOWN, down), (_UP, torch.zeros(outputs, rank))):
            parameter = nn.Parameter(value.to(module.weight.device))
            module.register_parameter(part, parameter)
            added[f"{name}.{part}"] = parameter
        module.register_forward_hook(_with_update)
    return added


@torch.no_grad()
def merge_adapters(model: PuzzleForCausalLM, updates: Mapping[str, Tensor]) -> None:
    """Add to the matrices of a model without adapters what those of another were trained to."""
    for name, module in _matrices(model):
        if f"{name}.{_UP}" in updates:
            module.weight += updates[f"{name}.{_UP}"] @ updates[f"{name}.{_DOWN}"]


def _matrices(model: PuzzleForCausalLM) -> Iterator[tuple[str, nn.Linear]]:
    """Those of the layers, by their names in the model."""
    for name, module in model.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            yield f"model.layers.{name}", module


def _with_update(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    parts = dict(module.named_parameters(recurse=False))
    return output + linear(linear(inputs[0], parts[_DOWN]), parts[_UP])
